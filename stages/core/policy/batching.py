"""Which sequences go through a model together: micro-batches by token budget."""

import math
from collections.abc import Hashable, Sequence

PASS = 16  # a pass costs, whatever it holds, about as much as this part of the tokens that a micro-batch may hold


def microbatches(
    lengths: Sequence[int], token_budget: int, prompts: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """Pack sequence numbers into micro-batches of at most `token_budget` tokens, padding included, longest first.

    Of all cuts of the sequences sorted by length it takes the one with the fewest tokens, a further micro-batch counted
    as token_budget / PASS of them. A sequence that is longer than the budget has a micro-batch of its own. With
    `prompts` each sequence follows its prompt, and a micro-batch holds each of its prompts once, padded too.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    widths = [lengths[index] for index in order]
    heads: list[Sequence[int]] = [tuple(prompts[index]) for index in order] if prompts else [()] * len(order)
    numbers: dict[Hashable, int] = {head: number for number, head in enumerate(dict.fromkeys(heads))}
    keys = [numbers[head] for head in heads]
    cheapest, begins = [0.0] + [math.inf] * len(order), [0] * (len(order) + 1)
    for start, width in enumerate(widths):
        inside: set[int] = set()
        longest = 0
        for end in range(start + 1, len(order) + 1):
            inside.add(keys[end - 1])
            longest = max(longest, len(heads[end - 1]))
            tokens = (end - start) * width + len(inside) * longest
            if tokens > token_budget and end > start + 1:
                break
            cost = cheapest[start] + tokens + token_budget / PASS
            if cost < cheapest[end]:
                cheapest[end], begins[end] = cost, start
    pieces = []
    end = len(order)
    while end:
        pieces.append(order[begins[end] : end])
        end = begins[end]
    return pieces[::-1]
