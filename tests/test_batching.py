"""Micro-batches, shares and the stream of problems: nothing is lost, nothing comes twice."""

import random
from itertools import pairwise

import pytest

from stages.core.policy.batching import PASS, microbatches
from stages.rl.batching import ProblemStream, shares, split


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
def test_microbatches_after_prompts_hold_each_prompt_once_within_the_budget(budget):
    draw = random.Random(budget)
    prompts = [[number] * draw.randint(1, 30) for number in range(8) for _ in range(7)]
    lengths = [draw.randint(1, 90) for _ in prompts]
    batches = microbatches(lengths, budget, prompts)
    assert sorted(index for batch in batches for index in batch) == list(range(56))
    for batch in batches:
        assert len(batch) == 1 or tokens(batch, lengths, prompts) <= budget


def tokens(batch, lengths, prompts):
    heads = {tuple(prompts[i]) for i in batch}
    return len(heads) * max(map(len, heads)) + len(batch) * max(lengths[i] for i in batch)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_cut_of_the_sequences_sorted_by_length_is_cheaper(seed):
    draw = random.Random(seed)
    prompts = [draw.choice([[], [1] * 9, [2] * 20]) for _ in range(9)]
    lengths = [draw.randint(1, 60) for _ in prompts]
    order = sorted(range(9), key=lambda index: -lengths[index])
    costs = []
    for cuts in range(2**8):
        ends = [index for index in range(1, 9) if cuts >> (index - 1) & 1]
        batches = [order[start:end] for start, end in pairwise([0, *ends, 9])]
        sizes = [tokens(batch, lengths, prompts) for batch in batches]
        if all(size <= 160 for size in sizes):
            costs.append(sum(sizes) + len(batches) * 160 / PASS)
    batches = microbatches(lengths, 160, prompts)
    assert sum(tokens(batch, lengths, prompts) for batch in batches) + len(batches) * 160 / PASS == min(costs)


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
