"""RMSNorm, SwiGLU, gate, rotation and matrix product: fast paths against the plain formulas, forward and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.model.rope import reference_rotate, rotate, rotation
from trinity.ops import matmul
from trinity.ops.gate import gated, reference_gated
from trinity.ops.rms_norm import reference_rms_norm, rms_norm
from trinity.ops.swiglu import reference_swiglu, swiglu

DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
    ),
]


def leaf(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype).requires_grad_()


def assert_same(fast, reference, leaves: tuple[Tensor, ...], tolerance: float) -> None:
    actual, expected = fast(*leaves), reference(*leaves)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).to(expected)
    for mine, theirs in zip(
        torch.autograd.grad(actual, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        assert mine.dtype == theirs.dtype
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(mine, theirs, atol=tolerance * scale, rtol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_rms_norm(device: str, dtype: torch.dtype, tolerance: float) -> None:
    for shape in ((5, 24), (2, 7, 3, 8), (1, 1)):
        x = leaf(*shape, seed=0, dtype=dtype, device=device)
        weight = leaf(shape[-1], seed=1, dtype=dtype, device=device)
        assert_same(
            lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: reference_rms_norm(x, w, 1e-5), (x, weight), tolerance
        )
        strided = x.expand(3, *x.shape).transpose(0, -2)
        torch.testing.assert_close(
            rms_norm(strided, weight, 1e-5), reference_rms_norm(strided, weight, 1e-5), atol=tolerance, rtol=tolerance
        )


def test_rms_norm_of_zero_is_zero_with_a_finite_gradient() -> None:
    x = torch.zeros(3, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), 1e-5).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_the_gradient_of_the_norm_weight_does_not_drown_in_bfloat16() -> None:
    x = leaf(4096, 8, seed=0, dtype=torch.bfloat16, device="cpu")
    weight = torch.ones(8, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.ones_like(x)
    (mine,) = torch.autograd.grad(rms_norm(x.abs(), weight, 1e-5), weight, upstream)
    exact = reference_rms_norm(x.detach().abs().float(), torch.ones(8), 1e-5).sum(dim=0)
    torch.testing.assert_close(mine.float(), exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_swiglu_and_gate(device: str, dtype: torch.dtype, tolerance: float) -> None:
    assert_same(swiglu, reference_swiglu, (leaf(5, 3, 16, seed=0, dtype=dtype, device=device),), tolerance)
    both = tuple(leaf(5, 16, seed=i, dtype=dtype, device=device) for i in range(2))
    assert_same(gated, reference_gated, both, tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_rotation(device: str, dtype: torch.dtype, tolerance: float) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [5, 6, 1000, 100000, 3]], device=device)
    turn = rotation(positions, 8, 1e4)
    x = leaf(2, 5, 3, 8, seed=0, dtype=dtype, device=device)
    assert_same(lambda x: rotate(x, turn), lambda x: reference_rotate(x, turn), (x,), tolerance)
    torch.testing.assert_close(rotate(x, turn)[0, 0], x[0, 0])
    torch.testing.assert_close(
        rotate(x, turn).float().norm(dim=-1), x.float().norm(dim=-1), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("wide", [True, False])
def test_linear(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "cpu_has_bfloat16", lambda: not wide)
    for dtype, tolerance in DTYPES:
        x = leaf(2, 9, 24, seed=0, dtype=dtype, device="cpu")
        weight = leaf(16, 24, seed=1, dtype=dtype, device="cpu")
        assert matmul.widens(x) == (wide and dtype == torch.bfloat16)
        assert_same(matmul.linear, F.linear, (x, weight), tolerance)
