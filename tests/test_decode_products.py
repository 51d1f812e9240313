"""Products, experts and attention of generation against their references; in Triton's interpreter without a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from test_decode_kernels import DEVICE, EPS, assert_close, normal
from trinity.ops.block_fp8 import dequantize_blocks, quantize_blocks
from trinity.ops.decode.attention import decode_attention, reference_decode_attention
from trinity.ops.decode.experts import ExpertWeights, few_experts, many_experts, reference_few, reference_outputs
from trinity.ops.decode.products import (
    best,
    gemv,
    norm_project,
    project,
    reference_best,
    reference_norm_project,
    reference_project,
)
from trinity.ops.decode.prompts import prompt_attention, reference_prompt_attention
from trinity.ops.swiglu import reference_swiglu


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(stored, scale, what they stand for)"""
    stored, scale = quantize_blocks(weight)
    return stored, scale, dequantize_blocks(stored, scale)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("tiles", [1, 3])
def test_norm_and_product(fp8: bool, tiles: int) -> None:
    N, D, C = 2, 160 if fp8 else 24, 200 if fp8 else 50
    x, y, post, pre, weight = normal(N, D), normal(N, D, seed=1), normal(D), normal(D, seed=1), normal(C, D)
    stored, scale = (weight, None)
    if fp8:
        stored, scale, weight = quantized(weight)
    out, x_out, h = torch.empty(N, C, device=DEVICE), torch.empty_like(x), torch.empty_like(x)
    for residual in (None, y):
        after = post if residual is not None else None
        norm_project(x, residual, after, pre, stored, EPS, out, x_out, h, scale=scale, tiles=tiles)
        expected = reference_norm_project(x, residual, after, pre, weight, EPS)
        for found, wanted in zip((out, x_out, h), expected, strict=True):
            assert_close(found, wanted)


@pytest.mark.parametrize("fp8", [False, True])
def test_products(fp8: bool) -> None:
    N, C, O = 5, 160, 140
    x, double, weight = normal(N, C), normal(N, 2 * C), normal(O, C)
    stored, scale = (weight, None)
    if fp8:
        stored, scale, weight = quantized(weight)
    out = torch.empty(N, O, device=DEVICE)
    gemv(x, stored, out, scale=scale)
    assert_close(out, reference_project(x, weight))
    gemv(double, stored, out, scale=scale, swiglu=True)
    assert_close(out, reference_project(reference_swiglu(double), weight))
    project(x, stored, out, scale=scale)
    assert_close(out, reference_project(x, weight))
    if fp8:
        assert_close(reference_project(x, stored, scale), reference_project(x, weight))


def test_wide_products_use_wide_tiles() -> None:
    x, weight = normal(3, 20), normal(4200, 20)
    out = torch.empty(3, 4200, device=DEVICE)
    project(x, weight, out)
    assert_close(out, reference_project(x, weight))


@pytest.mark.parametrize("V", [100, 5000])
def test_most_probable_token(V: int) -> None:
    logits = normal(3, V) * 4
    logits[1, -1] = 50.0
    logits[2, [7, 60]] = 30.0  # a tie: the first
    tokens, logprobs = torch.empty(3, dtype=torch.int64, device=DEVICE), torch.empty(3, device=DEVICE)
    for limit in (V, 61):
        best(logits, limit, tokens, logprobs)
        expected = reference_best(logits, limit)
        assert torch.equal(tokens, expected[0])
        assert_close(logprobs, expected[1])


@pytest.mark.gpu  # the interpreter warns of NaN, which is an error in tests
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_logits_that_are_no_numbers_give_a_token_all_the_same() -> None:
    """It is the next step's input: outside the vocabulary it would be read from anywhere."""
    logits = torch.full((2, 5000), float("nan"), device=DEVICE)
    logits[1, :100] = 1.0
    tokens, logprobs = torch.empty(2, dtype=torch.int64, device=DEVICE), torch.empty(2, device=DEVICE)
    best(logits, 61, tokens, logprobs)
    assert ((tokens >= 0) & (tokens < 61)).all()


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("fp8", [False, True])
def test_experts(shared: int, fp8: bool) -> None:
    N, E, k, D, F = 3, 5, 2, 128 if fp8 else 24, 128 if fp8 else 20
    gate_up, down = normal(E, 2 * F, D), normal(E, D, F)
    both = (normal(2 * F * shared, D), normal(D, F * shared)) if shared else None
    stored, scales, exact = (gate_up, down, both), None, (gate_up, down, both)
    if fp8:
        parts = [quantized(w) for w in (gate_up, down, *(both or ()))]
        stored = (parts[0][0], parts[1][0], (parts[2][0], parts[3][0]) if shared else None)
        exact = (parts[0][2], parts[1][2], (parts[2][2], parts[3][2]) if shared else None)
        scales = tuple(part[1] for part in parts) + (parts[0][1], parts[1][1]) * (not shared)
    weights = ExpertWeights(*stored, scales)
    logits, bias, h = normal(N, E), normal(E) * 0.2, normal(N, D)
    act = torch.empty(N, k + weights.num_shared, weights.FMAX, device=DEVICE)
    indices, factors = torch.empty(N, k, dtype=torch.int32, device=DEVICE), torch.empty(N, k, device=DEVICE)
    y = torch.empty(N, D, device=DEVICE)
    few_experts(logits, bias, True, 1.5, h, weights, act, indices, factors, y)
    assert_close(y, reference_few(logits, bias, k, True, 1.5, h, *exact), 5e-6)
    out = torch.full((N * (k + weights.num_shared), D), 7.0, device=DEVICE)
    indices[1] = -1
    many_experts(h, indices, weights, act.flatten(0, 1), out)
    expected = reference_outputs(h, indices.clamp(min=0), *exact)
    found = out.view(expected.shape)
    assert_close(found[[0, 2]], expected[[0, 2]], 5e-6)
    assert (found[1, :k] == 7).all()


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize(("H", "G", "K"), [(4, 2, 16), (3, 3, 10)])
@pytest.mark.parametrize("ranges", [1, 3])
def test_decode_attention(window: int | None, H: int, G: int, K: int, ranges: int) -> None:
    """Requests of unequal lengths, of which one is new and one idle, over blocks in any order."""
    block, ring = 4, None if window is None else 3
    lengths = [0, 150, 3, 40]
    B = len(lengths)
    slots = torch.tensor([2, 0, -1, 3], dtype=torch.int32, device=DEVICE)
    held = ring or 40
    table = torch.randperm(4 * held, generator=torch.Generator().manual_seed(1)).view(4, held).to(DEVICE)
    k_cache, v_cache = normal(4 * held, block, G, K), normal(4 * held, block, G, K, seed=1)
    qkvg = normal(B, (2 * H + 2 * G) * K)
    positions = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    angles = normal(B, K // 2)
    turn = (angles.cos(), angles.sin()) if window else None
    q_norm, k_norm = normal(K), normal(K, seed=1)
    old_k, old_v, places = [], [], []
    for b, length in enumerate(lengths):
        seen = range(max(0, length - window + 1) if window else 0, length + 1)
        at = [table[max(int(slots[b]), 0), p // block % (ring or 10**9)] * block + p % block for p in seen]
        places.append(int(at.pop()))
        old_k.append(torch.stack([k_cache.flatten(0, 1)[a] for a in at]) if at else k_cache.new_zeros(0, G, K))
        old_v.append(torch.stack([v_cache.flatten(0, 1)[a] for a in at]) if at else v_cache.new_zeros(0, G, K))
    expected, new_k, new_v = reference_decode_attention(qkvg, q_norm, k_norm, turn, (H, G), EPS, old_k, old_v)
    before = k_cache.clone()
    out = torch.empty(B, H * K, device=DEVICE)
    nan = float("nan")
    parts = (
        torch.full((B, H, ranges), nan, device=DEVICE),
        torch.full((B, H, ranges), nan, device=DEVICE),
        torch.full((B, H, ranges, K), nan, device=DEVICE),
    )
    decode_attention(
        qkvg, q_norm, k_norm, turn, (H, G), EPS, positions, slots, table, k_cache, v_cache, out, parts,
        window=window, ring=ring,
    )  # fmt: skip
    for b in (0, 1, 3):
        assert_close(out[b], expected[b], 5e-6)
        assert_close(k_cache.flatten(0, 1)[places[b]], new_k[b])
        assert_close(v_cache.flatten(0, 1)[places[b]], new_v[b])
    assert not out[2].any()
    changed = (k_cache != before).flatten(0, 1).flatten(1).any(1).nonzero().flatten().tolist()
    assert sorted(changed) == sorted(places[b] for b in (0, 1, 3))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("past", [0, 11])
@pytest.mark.parametrize("C", [5, 70])
def test_prompt_attention(window: int | None, past: int, C: int) -> None:
    B, H, G, K = 2, 4, 2, 10
    q, k, v = normal(B, C, H, K), normal(B, C, G, K), normal(B, C, G, K, seed=1)
    starts = torch.tensor([past, past // 2], device=DEVICE)
    old = None
    if past:
        positions = torch.full((B, 14), -1, device=DEVICE)
        for b, start in enumerate(starts.tolist()):
            order = torch.randperm(14, generator=torch.Generator().manual_seed(b))[:start]
            positions[b, order.to(DEVICE)] = torch.arange(start, device=DEVICE)
        old = (normal(B, 14, G, K, seed=2), normal(B, 14, G, K, seed=3), positions)
    found = prompt_attention(q, k, v, starts, window, old)
    assert_close(found, reference_prompt_attention(q, k, v, starts, window, old), 5e-6)
