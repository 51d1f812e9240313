"""Every attention plan against the reference, forward and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trinity.ops.attention import (
    BlockPlan,
    DocumentPlan,
    FlexPlan,
    MaskedPlan,
    dense_plan,
    document_lengths,
    fast_plan,
    visible,
)

CPU = torch.device("cpu")


def tensors(rows: int, seq_len: int, heads: int, kv_heads: int, head_dim: int, dtype=torch.float32, device=CPU):
    shapes = [(rows, seq_len, heads, head_dim)] + 2 * [(rows, seq_len, kv_heads, head_dim)]
    generator = torch.Generator().manual_seed(seq_len)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def segments_of(rows: list[list[int]]) -> Tensor:
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]).int()


def assert_same(plan, reference, q: Tensor, k: Tensor, v: Tensor, tolerance: float = 2e-5) -> None:
    expected, actual = reference.attend(q, k, v), plan.attend(q, k, v)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).to(expected)
    for mine, theirs in zip(
        torch.autograd.grad(actual, (q, k, v), weight), torch.autograd.grad(expected, (q, k, v), weight), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=5 * tolerance, rtol=5 * tolerance)


@st.composite
def packed(draw) -> tuple[int, Tensor | None]:
    seq_len = draw(st.integers(1, 70))
    if draw(st.booleans()):
        return seq_len, None
    rows = []
    for _ in range(2):
        cuts = sorted(draw(st.sets(st.integers(1, seq_len - 1), max_size=6))) if seq_len > 1 else []
        rows.append(torch.diff(torch.tensor([0, *cuts, seq_len])).tolist())
    return seq_len, segments_of(rows)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=packed(), window=st.none() | st.integers(1, 80), heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]))
def test_fast_plans_equal_the_reference(rows, window: int | None, heads: tuple[int, int]) -> None:
    seq_len, segments = rows
    q, k, v = tensors(2, seq_len, *heads, head_dim=8)
    shape = (2, seq_len, window, segments, CPU)
    assert_same(fast_plan(*shape), dense_plan(*shape), q, k, v)


def test_each_plan_is_chosen() -> None:
    short = segments_of([[2] * 100, [3] * 60 + [20]])
    long = segments_of([[150, 50], [60, 140]])
    assert isinstance(fast_plan(2, 200, 16, long, CPU), BlockPlan)
    assert isinstance(fast_plan(2, 200, None, long, CPU), DocumentPlan)
    assert isinstance(fast_plan(2, 200, None, short, CPU), MaskedPlan)
    assert isinstance(fast_plan(2, 200, None, None, CPU), DocumentPlan)
    assert isinstance(fast_plan(2, 200, 200, None, CPU), DocumentPlan), "a window over the whole row is no window"
    for window, segments in ((16, long), (None, long), (None, short), (150, short)):
        shape = (2, 200, window, segments, CPU)
        assert_same(fast_plan(*shape), dense_plan(*shape), *tensors(2, 200, 4, 2, 16))


def test_bfloat16_stays_near_float32() -> None:
    for window in (24, None):
        shape = (2, 96, window, None, CPU)
        wide = tensors(2, 96, 4, 2, 16)
        narrow = [x.detach().bfloat16().requires_grad_() for x in wide]
        o = fast_plan(*shape).attend(*narrow)
        assert o.dtype == torch.bfloat16
        torch.testing.assert_close(o.float(), dense_plan(*shape).attend(*wide), atol=3e-2, rtol=3e-2)


def test_local_layers_do_not_pay_for_keys_outside_the_window() -> None:
    plan = fast_plan(1, 4096, 128, None, CPU)
    assert isinstance(plan, BlockPlan)
    assert plan.seen_XUS.numel() <= 4096 * 2 * 128


def test_document_lengths() -> None:
    assert document_lengths(segments_of([[3, 2], [5]])) == (3, 2, 5)
    assert document_lengths(torch.tensor([[0, 0, -1, -1], [0, 1, 1, -1]])) == (2, 2, 1, 2, 1)


def test_padding_sees_itself_and_nothing_is_nan() -> None:
    segments = torch.tensor([[0] * 10 + [-1] * 30, [-1] * 40]).int()
    for window in (4, None):
        shape = (2, 40, window, segments, CPU)
        assert_same(fast_plan(*shape), dense_plan(*shape), *tensors(2, 40, 2, 1, 8))


def test_flex_rules_equal_the_reference_mask() -> None:
    """FlexAttention itself needs a GPU; its mask rules are plain functions of indices."""
    from trinity.ops.attention import _causal, _causal_in_document

    segments = segments_of([[7, 3, 10], [20]])
    index = torch.arange(20)
    b, query, key = torch.meshgrid(torch.arange(2), index, index, indexing="ij")
    for window in (None, 1, 5):
        rule = _causal_in_document(window, segments)
        expected = visible(index, index, window, segments, segments)
        assert torch.equal(rule(b, b, query, key), expected)
        assert torch.equal(_causal(window)(b, b, query, key)[:1], visible(index, index, window, None, None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("seq_len", [256, 300])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_equals_the_reference(window, seq_len: int, packed: bool, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    segments = segments_of([[200, seq_len - 200], [seq_len]]).to(device) if packed else None
    shape = (2, seq_len, window, segments, device)
    plan = fast_plan(*shape)
    assert isinstance(plan, FlexPlan)
    q, k, v = tensors(2, seq_len, 4, 2, 64, dtype, device)
    assert_same(plan, dense_plan(*shape), q, k, v, 2e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_new_batch_does_not_compile_again() -> None:
    device = torch.device("cuda")
    q, k, v = tensors(2, 256, 4, 2, 64, torch.bfloat16, device)
    for cut in (100, 200):
        segments = segments_of([[cut, 256 - cut], [256]]).to(device)
        if cut == 200:
            torch._dynamo.config.error_on_recompile = True
        try:
            fast_plan(2, 256, 100, segments, device).attend(q, k, v)
        finally:
            torch._dynamo.config.error_on_recompile = False
