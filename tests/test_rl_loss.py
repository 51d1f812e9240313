"""The policy loss and its advantages, against a plain float64 reference written from the formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trinity.rl.loss import (
    Normalise,
    group_advantages,
    informative,
    kl_penalty,
    length_factors,
    overlong_penalty,
    policy_loss,
)
from trinity.rl.rewards import exact_integer, read_integer


def reference(new, old, sampler, advantages, low, high, max_weight):
    """The loss and its derivative with respect to each new log-probability, one token at a time."""
    loss, grads = 0.0, []
    for n, o, s, a in zip(new, old, sampler, advantages, strict=True):
        weight = min(math.exp(o - s), max_weight)
        ratio = math.exp(n - o)
        clipped = min(max(ratio, 1 - low), 1 + high)
        loss -= weight * min(ratio * a, clipped * a)
        grads.append(-weight * ratio * a if ratio * a <= clipped * a else 0.0)
    return loss, grads


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), low=st.floats(0.05, 0.5), high=st.floats(0.05, 0.5))
def test_loss_and_gradient_equal_the_formula(seed, low, high):
    generator = torch.Generator().manual_seed(seed)
    new, old, sampler, advantages = torch.randn(4, 20, generator=generator, dtype=torch.float64)
    sampler = old + 0.5 * sampler
    new = (old + 0.4 * new).requires_grad_()
    result = policy_loss(new, old, sampler, advantages, clip_low=low, clip_high=high)
    result.sum.backward()
    loss, grads = reference(new.tolist(), old.tolist(), sampler.tolist(), advantages.tolist(), low, high, 2.0)
    assert result.sum.item() == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(new.grad, torch.tensor(grads, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def kl_reference(new, start):
    """k3 summed over tokens and its derivative with respect to each new log-probability."""
    loss, grads = 0.0, []
    for n, s in zip(new, start, strict=True):
        ratio = math.exp(s) / math.exp(n)
        loss += ratio - math.log(ratio) - 1
        grads.append(1 - ratio)
    return loss, grads


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), coefficient=st.floats(0.001, 1.0))
def test_the_kl_penalty_and_its_gradient_equal_the_formula(seed, coefficient):
    generator = torch.Generator().manual_seed(seed)
    new, old, start, advantages = torch.randn(4, 20, generator=generator, dtype=torch.float64)
    new.requires_grad_()
    penalty = kl_penalty(new, start.requires_grad_())
    loss, grads = kl_reference(new.tolist(), start.tolist())
    assert penalty.item() == pytest.approx(loss, rel=1e-12)
    assert penalty.item() > 0
    policy = policy_loss(new, old, old, advantages, clip_low=0.2, clip_high=0.28).sum
    (policy + coefficient * penalty).backward()
    _, policy_grads = reference(new.tolist(), old.tolist(), old.tolist(), advantages.tolist(), 0.2, 0.28, 2.0)
    expected = [p + coefficient * g for p, g in zip(policy_grads, grads, strict=True)]
    torch.testing.assert_close(new.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert start.grad is None  # the start does not move


def test_the_kl_penalty_is_unbiased_and_nothing_at_the_start():
    policy, start = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert kl_penalty(policy, policy) == 0
    each = torch.stack([kl_penalty(policy[i : i + 1], start[i : i + 1]) for i in range(7)])
    expected = (policy.exp() * (policy - start)).sum()
    torch.testing.assert_close((policy.exp() * each).sum(), expected)


def test_on_policy_the_gradient_is_plain_reinforce():
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -0.5, 0.25])
    result = policy_loss(logprobs, logprobs.detach(), logprobs.detach(), advantages, clip_low=0.2, clip_high=0.28)
    result.sum.backward()
    torch.testing.assert_close(logprobs.grad, -advantages)
    assert result.clipped_tokens == 0
    assert result.gap_sum == 0


def test_the_clip_holds_back_only_moves_beyond_it_in_the_advantage_s_direction():
    old = torch.zeros(4)
    new = torch.tensor([0.5, 0.5, -0.5, -0.5]).requires_grad_()  # ratios 1.65 and 0.61
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    result = policy_loss(new, old, old, advantages, clip_low=0.2, clip_high=0.28)
    result.sum.backward()
    assert new.grad is not None
    assert (new.grad != 0).tolist() == [False, True, True, False]
    assert result.clipped_tokens == 2


def test_importance_weights_are_truncated_and_carry_no_gradient():
    sampler = torch.tensor([-3.0, 0.0])
    new = torch.tensor([-1.0, -1.0], requires_grad=True)
    policy_loss(new, new.detach(), sampler, torch.ones(2), clip_low=0.2, clip_high=0.28).sum.backward()
    torch.testing.assert_close(new.grad, torch.tensor([-2.0, -math.exp(-1)]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=4, max_size=4), min_size=1, max_size=6))
def test_advantages_are_standardised_in_each_group_and_zero_without_variance(rewards):
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64))
    for group, row, useful in zip(rewards, advantages, informative(torch.tensor(rewards)), strict=True):
        assert useful.item() == (len(set(group)) > 1)
        assert row.sum().item() == pytest.approx(0, abs=1e-9)
        assert (row**2).mean().item() == pytest.approx(1.0 if useful else 0.0)


def test_advantages_may_keep_the_scale_of_the_rewards():
    advantages = group_advantages(torch.tensor([[0.0, 1.0], [0.5, 0.5]]), "none")
    torch.testing.assert_close(advantages, torch.tensor([[-0.5, 0.5], [0.0, 0.0]]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 10**6))
def test_each_normalisation_is_the_mean_that_it_names(lengths, seed):
    """The step divides the sum over tokens by their number; with the factors that becomes each published form."""
    generator = torch.Generator().manual_seed(seed)
    losses = [torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths]
    expected: dict[Normalise, Tensor] = {
        "token": torch.cat(losses).mean(),
        "answer": torch.stack([part.mean() for part in losses]).mean(),
        "constant": torch.cat(losses).sum() / (len(lengths) * 20),
    }
    for normalise, value in expected.items():
        factors = length_factors(lengths, normalise, 20)
        total = sum((f * part).sum() for f, part in zip(factors, losses, strict=True))
        torch.testing.assert_close(total / sum(lengths), value)


def test_overlong_answers_lose_up_to_one():
    assert [overlong_penalty(n, 10, 4) for n in (3, 6, 8, 10)] == [0.0, 0.0, 0.5, 1.0]
    assert overlong_penalty(10, 10, 0) == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 12", 12),
        ("12.", 12),
        ("-3", -3),
        ("\N{MINUS SIGN}3", -3),
        ("+07\n", 7),
        ("12 apples", None),
        ("1.5", None),
        ("", None),
        ("-", None),
        ("\N{ARABIC-INDIC DIGIT THREE}", None),
        ("9" * 5000, None),
    ],
)
def test_an_answer_is_one_integer_and_nothing_else(text, number):
    assert read_integer(text) == number


def test_rewards():
    assert exact_integer(" 12", 12, finished=True) == 1.0
    assert exact_integer(" 13", 12, finished=True) == 0.1
    assert exact_integer("twelve", 12, finished=True) == 0.0
    assert exact_integer(" 12", 12, finished=False) == 0.0
