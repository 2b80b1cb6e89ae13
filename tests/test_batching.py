"""Micro-batches, shares and the stream of problems: nothing is lost, nothing comes twice."""

import random

import pytest

from stages.core.batching import microbatches
from stages.rl.batching import ProblemStream, microbatches_after, shares, split


@pytest.mark.parametrize("budget", [1, 50, 300, 10_000])
def test_microbatches_hold_each_sequence_once_within_the_budget(budget):
    lengths = [random.Random(budget).randint(1, 90) for _ in range(57)]
    batches = microbatches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(57))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_microbatches_of_neighbours_in_length_waste_little_on_padding():
    lengths = [random.Random(3).randint(1, 256) for _ in range(512)]
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in microbatches(lengths, 2048))
    assert padded < 1.1 * sum(lengths)


@pytest.mark.parametrize("budget", [1, 60, 300, 10_000])
def test_microbatches_after_prompts_count_each_prompt_once(budget):
    draw = random.Random(budget)
    prompts = [[number] * draw.randint(1, 30) for number in range(8) for _ in range(7)]
    lengths = [draw.randint(1, 90) for _ in prompts]
    batches = microbatches_after(prompts, lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(56))

    def tokens(batch):
        heads = {tuple(prompts[i]) for i in batch}
        return len(heads) * max(map(len, heads)) + len(batch) * max(lengths[i] for i in batch)

    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        assert len(batch) == 1 or tokens(batch) <= budget
        assert following is None or tokens([*batch, following[0]]) > budget  # it was full


def test_shares_deal_every_sequence_once_and_evenly():
    lengths = [random.Random(1).randint(1, 2000) for _ in range(101)]
    dealt = shares(lengths, 4)
    assert sorted(index for share in dealt for index in share) == list(range(101))
    loads = [sum(lengths[i] for i in share) for share in dealt]
    assert max(loads) - min(loads) <= max(lengths)


def test_split_drops_no_remainder():
    assert split(range(7), 3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert split(range(2), 5) == [[0], [1]]
    assert split([], 4) == []


def test_the_stream_gives_every_problem_once_an_epoch_in_ever_new_order():
    stream = ProblemStream(10, seed=0)
    epochs = [stream.take(10) for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_new_epoch_begins_in_the_middle_of_a_draw_without_losing_or_repeating():
    stream, whole = ProblemStream(7, seed=5), ProblemStream(7, seed=5)
    pieces = [number for size in (3, 6, 1, 4) for number in stream.take(size)]
    assert pieces == whole.take(14)
    assert sorted(pieces[:7]) == sorted(pieces[7:]) == list(range(7))


def test_a_stream_resumed_at_a_position_goes_on_as_if_it_had_never_stopped():
    whole = ProblemStream(9, seed=2).take(40)
    resumed = ProblemStream(9, seed=2, position=23)
    assert resumed.take(17) == whole[23:]
