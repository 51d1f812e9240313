"""The chunked losses against the plain formulas, forward and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.ops.cross_entropy import (
    IGNORE,
    fused_cross_entropy,
    reference_cross_entropy,
    reference_token_logprobs,
    token_logprobs,
    token_logprobs_and_entropies,
)

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
)


def problem(tokens: int, vocab: int, seed: int, ignored: float, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    x, head = torch.randn(tokens, 8, generator=g), torch.randn(vocab, 8, generator=g)
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    targets[torch.rand(tokens, generator=g) < ignored] = IGNORE
    return x.to(device, dtype).requires_grad_(), head.to(device, dtype).requires_grad_(), targets.to(device)


def assert_gradients(mine, theirs, leaves, tolerance: float) -> None:
    for a, b in zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * max(1.0, b.abs().max().item()), rtol=tolerance)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 150),
    vocab=st.sampled_from([1, 2, 33]),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-4, 0.1]),
    chunk=st.sampled_from([1, 7, 64, 1000]),
    seed=st.integers(0, 99),
)
def test_fused_equals_the_reference(tokens, vocab, ignored, z_loss, chunk, seed) -> None:
    x, head, targets = problem(tokens, vocab, seed, ignored)
    expected = reference_cross_entropy(x, head, targets, z_loss=z_loss)
    actual = fused_cross_entropy(x, head, targets, z_loss=z_loss, chunk_tokens=chunk)
    for name in ("loss_sum", "ce_sum", "z_sum", "num_tokens", "logit_max", "logit_mean"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), atol=2e-4, rtol=2e-5, msg=name)
    assert_gradients(actual.loss_sum * 0.5, expected.loss_sum * 0.5, (x, head), 2e-5)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_bfloat16_is_computed_in_float32(device: str) -> None:
    x, head, targets = problem(300, 50, 0, 0.2, torch.bfloat16, device)
    expected = reference_cross_entropy(x, head, targets, z_loss=1e-3)
    actual = fused_cross_entropy(x, head, targets, z_loss=1e-3, chunk_tokens=64)
    torch.testing.assert_close(actual.loss_sum, expected.loss_sum, rtol=1e-4, atol=0)
    assert_gradients(actual.loss_sum, expected.loss_sum, (x, head), 1e-2)
    assert_gradients(
        token_logprobs(x, head, targets, chunk_tokens=64).sum(),
        reference_token_logprobs(x, head, targets).sum(),
        (x, head),
        1e-2,
    )


def test_ignored_targets_give_a_gradient_of_exactly_zero() -> None:
    x, head, targets = problem(64, 33, 0, 0.5)
    ignored = targets == IGNORE
    for loss in (
        fused_cross_entropy(x, head, targets, z_loss=0.1, chunk_tokens=10).loss_sum,
        token_logprobs(x, head, targets, chunk_tokens=10).sum(),
    ):
        (gradient,) = torch.autograd.grad(loss, x)
        assert (gradient[ignored] == 0).all()
        assert (gradient[~ignored].abs().sum(dim=1) > 0).all()


def test_large_logits_do_not_overflow() -> None:
    x = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    head = torch.tensor([[1.0], [-1.0]])
    result = fused_cross_entropy(x, head, torch.tensor([0, 0]))
    assert result.ce_sum.item() == pytest.approx(600.0)
    assert result.logit_max.item() == 300.0
    assert torch.isfinite(torch.autograd.grad(result.loss_sum, x)[0]).all()


def test_only_loss_sum_carries_a_gradient() -> None:
    result = fused_cross_entropy(*problem(8, 5, 0, 0.0), z_loss=0.1)
    assert result.loss_sum.requires_grad
    assert not result.ce_sum.requires_grad
    assert not result.z_sum.requires_grad
    torch.testing.assert_close(result.loss_sum.detach(), result.ce_sum + result.z_sum)


def test_nothing_is_computed_for_gradients_without_need() -> None:
    x, head, targets = problem(8, 5, 0, 0.0)
    with torch.no_grad():
        assert not fused_cross_entropy(x, head, targets).loss_sum.requires_grad
    frozen = head.detach()
    fused_cross_entropy(x, frozen, targets).loss_sum.backward()
    assert x.grad is not None
    assert frozen.grad is None


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 90),
    ignored=st.sampled_from([0.0, 0.5]),
    chunk=st.sampled_from([1, 16, 100]),
    seed=st.integers(0, 99),
    temperature=st.sampled_from([1.0, 0.7, 3.0]),
)
def test_token_logprobs(tokens, ignored, chunk, seed, temperature) -> None:
    x, head, targets = problem(tokens, 33, seed, ignored)
    expected = reference_token_logprobs(x, head, targets, temperature)
    actual = token_logprobs(x, head, targets, chunk_tokens=chunk, temperature=temperature)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    weight = torch.randn(tokens, generator=torch.Generator().manual_seed(1))
    assert_gradients((actual * weight).sum(), (expected * weight).sum(), (x, head), 2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropies_are_those_of_the_distributions(temperature) -> None:
    x, head, targets = torch.randn(9, 8), torch.randn(30, 8), torch.randint(30, (9,))
    logprobs, entropies = token_logprobs_and_entropies(x, head, targets, chunk_tokens=4, temperature=temperature)
    expected = torch.distributions.Categorical(logits=x @ head.T / temperature)
    torch.testing.assert_close(entropies, expected.entropy())
    torch.testing.assert_close(logprobs, expected.log_prob(targets))
