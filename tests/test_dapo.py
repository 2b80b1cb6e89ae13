"""The mathematics of DAPO against hand computation, autograd and the textbook formula."""

import math

import pytest
import torch

from stages.rl import dapo


def test_a_group_with_equal_raw_rewards_teaches_nothing():
    assert not dapo.is_informative([0.0, 0.0, 0.0])
    assert not dapo.is_informative([1.0, 1.0])
    assert dapo.is_informative([0.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, 0.0), (79, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0), (120, -1.0)],
)
def test_overlong_penalty_falls_linearly_over_the_buffer(num_tokens, expected):
    assert dapo.overlong_penalty(num_tokens, 100, 20) == pytest.approx(expected)


def test_overlong_penalty_scales_and_can_be_off():
    assert dapo.overlong_penalty(100, 100, 20, penalty=0.5) == -0.5
    assert dapo.overlong_penalty(100, 100, 0) == 0.0


def test_advantages_are_deviations_in_units_of_the_sample_standard_deviation():
    rewards = [1.0, 0.0, 0.0, -1.0]
    expected = [reward / math.sqrt(2 / 3) for reward in rewards]
    assert dapo.normalised(rewards, 0.0) == pytest.approx(expected)
    reference = torch.tensor(rewards, dtype=torch.float64)
    reference = (reference - reference.mean()) / (reference.std() + 1e-4)
    assert dapo.normalised(rewards, 1e-4) == pytest.approx(reference.tolist(), abs=1e-15)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -1.0, 1e9])
def test_a_constant_group_has_advantages_of_exactly_zero(reward):
    assert dapo.normalised([reward] * 7, 1e-6) == [0.0] * 7


def test_centred_advantages_are_plain_deviations_whatever_their_spread():
    assert dapo.centred([1.0, 0.0, 0.0, 0.0], 1e-6) == [0.75, -0.25, -0.25, -0.25]
    assert dapo.centred([0.1] * 3, 1e-6) == [0.0] * 3


@pytest.mark.parametrize("right", [1, 3, 7])
def test_maxrl_s_advantages_give_the_gradient_of_the_log_of_the_pass_rate(right):
    """Of a policy over 8 answers, the first `right` of which are correct; each is sampled once."""
    logits = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    rewards = [1.0] * right + [0.0] * (8 - right)
    log_probs = logits.log_softmax(0)
    log_probs[:right].exp().sum().log().backward()
    expected, logits.grad = logits.grad.clone(), None
    advantages = torch.tensor(dapo.per_success(rewards, 0.0), dtype=torch.float64)
    (logits.log_softmax(0) * advantages).mean().backward()
    assert torch.allclose(logits.grad, expected)


def test_the_coefficient_of_the_entropy_rises_below_the_target_falls_above_and_acts_below_alone():
    entropies = [0.5, 0.1, 0.1, 0.2, 0.3, 0.1, 0.3, 0.3, 0.3]
    coefficients, weights = [0.0], []
    for entropy in entropies:
        weights.append(dapo.entropy_weight(coefficients[-1], entropy, 0.2))
        coefficients.append(dapo.next_coefficient(coefficients[-1], entropy, 0.2, 0.25))
    assert coefficients == [0.0, 0.0, 0.25, 0.5, 0.25, 0.0, 0.25, 0.0, 0.0, 0.0]
    assert weights == [0.0, 0.0, 0.25, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert dapo.next_coefficient(0.0, 0.0, 0.0, 0.0) == dapo.entropy_weight(0.0, 0.0, 0.0) == 0.0, "off"


def loss_by_hand(log_probs, old, advantage, mask, low, high, weights):
    total, held_low, held_high = 0.0, 0, 0
    for i, row in enumerate(log_probs):
        for t, value in enumerate(row):
            if not mask[i][t]:
                continue
            ratio, a = math.exp(value - old[i][t]), advantage[i]
            clipped = min(max(ratio, 1 - low), 1 + high)
            total -= weights[i][t] * min(ratio * a, clipped * a)
            held_low += ratio < 1 - low and a < 0
            held_high += ratio > 1 + high and a > 0
    return total, held_low, held_high


def test_token_loss_and_clip_counts_equal_the_formula_written_out():
    torch.manual_seed(0)
    old = torch.randn(5, 7, dtype=torch.float64)
    log_probs = old + 0.4 * torch.randn(5, 7, dtype=torch.float64)
    advantage = torch.tensor([1.5, -0.7, 0.0, 2.0, -1.0], dtype=torch.float64)
    mask = torch.rand(5, 7) < 0.8
    weights = torch.rand(5, 7, dtype=torch.float64) + 0.5
    terms = dapo.token_loss(log_probs, old, advantage[:, None], mask, 0.2, 0.28, weights)
    expected = loss_by_hand(
        log_probs.tolist(), old.tolist(), advantage.tolist(), mask.tolist(), 0.2, 0.28, weights.tolist()
    )
    assert terms.loss.item() == pytest.approx(expected[0], rel=1e-12)
    assert (terms.clipped_low.item(), terms.clipped_high.item()) == expected[1:]
    assert expected[1] > 0
    assert expected[2] > 0


def test_a_clipped_token_gives_no_gradient_and_an_unclipped_one_its_weighted_ratio():
    old = torch.zeros(1, 4, dtype=torch.float64)
    log_probs = torch.log(torch.tensor([[1.5, 1.1, 0.5, 0.9]], dtype=torch.float64)).requires_grad_()
    mask = torch.ones(1, 4, dtype=torch.bool)
    dapo.token_loss(log_probs, old, torch.tensor([[2.0]]), mask, 0.2, 0.28).loss.backward()
    # for a positive advantage only a ratio above 1 + clip_high is held; below, d(-ratio * A)/d(log p) = -ratio * A
    assert log_probs.grad[0].tolist() == pytest.approx([0.0, -2.2, -1.0, -1.8])


def test_importance_weights_are_the_probability_ratio_up_to_the_cap():
    trainer = torch.log(torch.tensor([0.5, 0.3, 0.1]))
    engine = torch.log(torch.tensor([0.25, 0.1, 0.2]))
    assert dapo.importance_weights(trainer, engine, 2.5).tolist() == pytest.approx([2.0, 2.5, 0.5])
