"""The kernels of generation against their references; without a GPU they run in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from trinity.ops.decode.rows import (
    add_norm,
    choose,
    gate_rows,
    heads_to_cache,
    reference_add_norm,
    reference_choose,
    reference_heads,
    reference_mix,
    swiglu_rows,
)
from trinity.ops.gate import reference_gated
from trinity.ops.swiglu import reference_swiglu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert found.shape == expected.shape
    scale = max(1.0, expected.float().abs().max().item()) * (10 if found.is_cuda else 1)  # its exponentials are coarser
    assert (found.float() - expected.float()).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("dim", [24, 64])
def test_residual_and_norms(dim: int) -> None:
    x, y, post, pre = normal(3, dim), normal(3, dim, seed=1), normal(dim), normal(dim, seed=1)
    x_out, h = torch.empty_like(x), torch.empty_like(x)
    add_norm(x, None, None, pre, EPS, x_out, h)
    assert torch.equal(x_out, x)
    assert_close(h, reference_add_norm(x, None, None, pre, EPS)[1])
    add_norm(x, y, post, pre, EPS, x_out, h)
    expected = reference_add_norm(x, y, post, pre, EPS)
    assert_close(x_out, expected[0])
    assert_close(h, expected[1])
    out, rows, weights = normal(7, dim), torch.tensor([[4, 1], [6, 0], [3, 3]], device=DEVICE), normal(3, 2)
    add_norm(x, out, post, pre, EPS, x_out, h, rows_Nk=rows, weights_Nk=weights, shared_ND=y)
    expected = reference_add_norm(x, reference_mix(out, rows, weights) + y, post, pre, EPS)
    assert_close(x_out, expected[0])
    assert_close(h, expected[1])


@pytest.mark.parametrize("turn", [True, False])
@pytest.mark.parametrize("K", [10, 16])
def test_heads_are_normalised_turned_and_cached(turn: bool, K: int) -> None:
    H, G, N = 4, 2, 3
    qkvg = normal(N, (2 * H + 2 * G) * K)
    angles = normal(N, K // 2)
    rotation = (angles.cos(), angles.sin()) if turn else None
    q_norm, k_norm = normal(K), normal(K, seed=1)
    k_cache, v_cache = torch.zeros(9, G, K, device=DEVICE), torch.zeros(9, G, K, device=DEVICE)
    places = torch.tensor([5, -1, 2], device=DEVICE)
    found = heads_to_cache(qkvg, q_norm, k_norm, rotation, (H, G), EPS, places, k_cache, v_cache)
    expected = reference_heads(qkvg, q_norm, k_norm, rotation, (H, G), EPS)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)
    for cache, new in ((k_cache, expected[1]), (v_cache, expected[2])):
        assert_close(cache[5], new[0])
        assert_close(cache[2], new[2])
        assert not cache[[0, 1, 3, 4, 6, 7, 8]].any()


def test_gate_and_swiglu() -> None:
    x, fused = normal(3, 40), normal(3, 100)
    assert_close(gate_rows(x, fused), reference_gated(x, fused[:, 60:]))
    assert_close(swiglu_rows(fused), reference_swiglu(fused))
    assert swiglu_rows(fused[:0]).shape == (0, 50)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("E", [4, 12])
def test_choice_of_experts(norm: bool, E: int) -> None:
    logits, bias = normal(5, E) * 2, normal(E) * 0.3
    logits[1] = 0.25  # all tied but for the bias
    bias[2] = bias[1]
    indices, weights = torch.empty(5, 3, dtype=torch.int32, device=DEVICE), torch.empty(5, 3, device=DEVICE)
    choose(logits, bias, norm, 2.5, indices, weights)
    expected = reference_choose(logits, bias, 3, norm, 2.5)
    apart = [0, 2, 3, 4]
    assert torch.equal(indices[apart].long(), expected[0][apart])
    assert torch.equal(indices[1].sort().values.long(), expected[0][1].sort().values)
    assert_close(weights[apart], expected[1][apart])
    slots = torch.tensor([0, 4, -1, 2, 1], dtype=torch.int32, device=DEVICE)
    choose(logits, bias, norm, 2.5, indices, weights, slots)
    assert (indices[2] == -1).all()
    assert torch.equal(indices[[0, 3]].long(), expected[0][[0, 3]])
