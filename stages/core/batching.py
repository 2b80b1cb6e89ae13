"""Which sequences go through a model together: micro-batches by token budget."""

from collections.abc import Sequence


def microbatches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Pack sequence numbers into micro-batches of at most `token_budget` tokens, padding included, longest first.

    Sorting by length first makes padding small: neighbours are nearly as long as each other. A sequence that is
    longer than the budget has a micro-batch of its own. Ties keep their order.
    """
    batches: list[list[int]] = []
    widest = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batches and (len(batches[-1]) + 1) * widest <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
            widest = lengths[index]
    return batches
