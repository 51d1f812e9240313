"""The routed experts' fast path against the plain loop, forward and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.base.errors import UserError
from trinity.ops.experts import combine, grouped_experts, permute, reference_experts, sort_by_expert

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
)


def fast_experts(x_ND, indices_Nk, weights_Nk, gate_up, down):
    order = sort_by_expert(indices_Nk, gate_up.shape[0])
    return combine(grouped_experts(permute(x_ND, order), gate_up, down, order.ends_E), weights_Nk, order)


def problem(tokens: int, experts: int, k: int, seed: int, dtype=torch.float32, device="cpu", used: int | None = None):
    g = torch.Generator().manual_seed(seed)
    x, gate_up, down = (
        torch.randn(tokens, 16, generator=g),
        torch.randn(experts, 48, 16, generator=g),
        torch.randn(experts, 16, 24, generator=g),
    )
    scores = torch.rand(tokens, experts, generator=g)
    scores[:, used or experts :] -= 1  # experts past `used` get no token
    indices = scores.topk(k, dim=1).indices
    weights = torch.rand(tokens, k, generator=g)
    leaves = [t.to(device, dtype).requires_grad_() for t in (x, gate_up / 4, down / 4)]
    return leaves[0], indices.to(device), weights.to(device).requires_grad_(), leaves[1], leaves[2]


def assert_same(arguments, tolerance: float) -> None:
    x, _, weights, gate_up, down = arguments
    expected, actual = reference_experts(*arguments), fast_experts(*arguments)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).to(expected)
    leaves = (x, weights, gate_up, down)
    for mine, theirs in zip(
        torch.autograd.grad(actual, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, atol=4 * tolerance, rtol=4 * tolerance)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 40), experts=st.integers(1, 9), k=st.integers(1, 4), seed=st.integers(0, 99))
def test_fast_equals_the_loop(tokens: int, experts: int, k: int, seed: int) -> None:
    assert_same(problem(tokens, experts, min(k, experts), seed), 2e-5)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_bfloat16(device: str) -> None:
    assert_same(problem(64, 8, 2, 0, torch.bfloat16, device), 3e-2)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_experts_without_tokens_get_a_gradient_of_zero(device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    arguments = problem(32, 8, 2, 0, dtype, device, used=3)
    fast_experts(*arguments).sum().backward()
    for parameter in arguments[3:]:
        assert parameter.grad is not None
        assert parameter.grad[:3].abs().sum() > 0
        assert (parameter.grad[3:] == 0).all()


def test_order_is_stable_and_inverse() -> None:
    indices = torch.tensor([[2, 0], [0, 1], [2, 1]])
    order = sort_by_expert(indices, 4)
    assert order.token_R.tolist() == [0, 1, 1, 2, 0, 2]
    assert order.row_Nk.tolist() == [[4, 0], [1, 2], [5, 3]]
    assert order.ends_E.tolist() == [2, 4, 6, 6]
    assert order.counts_E.tolist() == [2, 2, 2, 0]


def test_the_weight_multiplies_the_output_of_an_expert() -> None:
    x, indices, _, gate_up, down = problem(8, 4, 1, 0)
    once = fast_experts(x, indices, torch.ones(8, 1), gate_up, down)
    twice = fast_experts(x, indices, torch.full((8, 1), 2.0), gate_up, down)
    torch.testing.assert_close(twice, 2 * once)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_widths_that_the_gpu_cannot_group_are_refused() -> None:
    x, ends = (
        torch.zeros(4, 12, device="cuda", dtype=torch.bfloat16),
        torch.tensor([4], device="cuda", dtype=torch.int32),
    )
    gate_up = torch.zeros(1, 24, 12, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(UserError, match="multiples of 8"):
        grouped_experts(x, gate_up, gate_up[:, :12].contiguous(), ends)
