"""How many groups a round draws: enough for one round, within bounds, by an acceptance that follows the run."""

import random

import pytest

from stages.rl.rounds import Acceptance, Rounds


def steps(shares, batch_size, max_rounds=10, seed=0):
    """The rounds of steps whose groups are informative with the chances `shares`."""
    luck, acceptance, done = random.Random(seed), Acceptance(), []
    for share in shares:
        rounds = Rounds(batch_size, max_rounds, acceptance.faded())
        while num_wanted := rounds.num_wanted:
            rounds.count(sum(luck.random() < share for _ in range(num_wanted)), num_wanted)
        acceptance = rounds.acceptance
        done.append(rounds)
    return done


@pytest.mark.parametrize("batch_size", [16, 512])
def test_one_round_is_enough_while_the_acceptance_changes(batch_size):
    falling = [0.7 - 0.01 * step for step in range(50)]
    for shares in (falling, falling[::-1]):
        done = steps(shares, batch_size)
        assert all(rounds.num_missing == 0 for rounds in done)
        assert sum(rounds.num_rounds for rounds in done) <= 1.3 * len(done)


def test_a_large_batch_is_filled_with_little_left_over():
    done = steps([0.5] * 20, 512)
    assert sum(rounds.num_drawn for rounds in done) < 1.15 * 20 * 512 / 0.5


def test_with_so_many_missing_and_informative_the_formula_is_drawn():
    rounds = Rounds(16, 10, Acceptance(25, 50))
    assert rounds.num_wanted == 47  # 16 / 0.5 + 2.5 sqrt(16 * 0.5) / 0.5 = 46.1
    rounds.count(12, 47)
    assert rounds.acceptance == Acceptance(37, 97)
    assert rounds.num_wanted == 21  # 4 / 0.381 + 2.5 sqrt(4 * 0.619) / 0.381 = 20.8
    rounds.count(5, 21)
    assert (rounds.num_missing, rounds.num_wanted) == (0, 0)


@pytest.mark.parametrize("max_rounds", [1, 2, 10])
def test_problems_that_never_teach_anything_cost_max_rounds_full_batches_a_step(max_rounds):
    done = steps([0.0] * 4000, 16, max_rounds)
    assert {rounds.num_drawn for rounds in done} == {16 * max_rounds}
    assert all(rounds.num_rounds <= max_rounds for rounds in done)


def test_after_a_dry_spell_the_acceptance_comes_back_within_a_few_steps():
    done = steps([0.0] * 200 + [0.5] * 6, 64)
    assert done[-1].acceptance.share == pytest.approx(0.5, abs=0.15)
