"""Training products in FP8: the quantisation, both kinds of products with gradients, and a model that uses them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train_helpers import small_config
from trinity.base.errors import UserError
from trinity.config import resolve
from trinity.model.transformer import Transformer
from trinity.ops import fp8
from trinity.ops.experts import experts_in_one, grouped_experts, sort_by_expert
from trinity.ops.swiglu import reference_swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = 2e-2 if DEVICE == "cuda" else 1e-5
"""On a GPU results are rounded to bfloat16, and sums of the tensor cores keep fewer bits."""


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def same(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    actual, expected = actual.detach().float(), expected.detach().float()
    error = (actual - expected).abs().max()
    assert error <= tolerance * max(1e-6, float(expected.abs().max())), float(error)


def rounded(x: Tensor) -> Tensor:
    """To e4m3 and back with a scale for each row, by the formula."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


@given(st.integers(1, 40), st.integers(1, 40), st.floats(1e-6, 1e6), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_row_is_kept_to_a_sixteenth_of_each_number(rows: int, width: int, size: float, seed: int) -> None:
    """Three bits after the first one, down to numbers 2^-14 of the largest; zeros stay zeros."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * size
    x[0] = 0.0
    back = fp8.reference_quantize_rows(x).wide()
    assert torch.equal(back[0], x[0])
    floor = x.abs().amax(-1, keepdim=True) * 2**-14
    assert ((back - x).abs() <= torch.maximum(x.abs() / 16, floor) * 1.001).all()


def test_both_quantisations_are_those_of_the_reference() -> None:
    x = draw(3, 32, 48, seed=0) * 10
    x[1, 2] = 0
    for mine, theirs in (
        (fp8.quantize_rows(x), fp8.reference_quantize_rows(x)),
        (fp8.quantize_columns(x), fp8.reference_quantize_rows(x.transpose(-1, -2).contiguous())),
    ):
        assert torch.equal(mine.scales, theirs.scales)
        assert torch.equal(mine.values.view(torch.uint8), theirs.values.view(torch.uint8))


@pytest.mark.parametrize("shape", [(24, 32), (2, 12, 32)])
def test_linear(shape: tuple[int, ...]) -> None:
    """Forward and input gradient from rounded factors, the weight's gradient from exact ones."""
    x, weight = draw(*shape, seed=0).requires_grad_(), draw(48, 32, seed=1).requires_grad_()
    y = fp8.linear(x, weight)
    same(y, rounded(x.detach()) @ rounded(weight.detach()).t())
    dy = draw(*y.shape, seed=2)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    same(dx, rounded(dy) @ rounded(weight.detach().t()).t())
    same(dw, dy.float().flatten(0, -2).t() @ x.detach().float().flatten(0, -2))
    assert dx.dtype == x.dtype
    assert dw.dtype == weight.dtype


@pytest.mark.parametrize("counts", [[16, 0, 32, 16], [0, 0, 64, 0]])
def test_grouped_linear(counts: list[int]) -> None:
    """Experts without a row are left out, and their weights' gradients are zero."""
    x, weight = draw(64, 32, seed=0).requires_grad_(), draw(4, 48, 32, seed=1).requires_grad_()
    ends = torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)
    y = fp8.grouped_linear(x, weight, ends)
    dy = draw(*y.shape, seed=2)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    start = 0
    for expert, count in enumerate(counts):
        rows, w = slice(start, start + count), weight[expert].detach()
        start += count
        if count:
            same(y[rows], rounded(x[rows].detach()) @ rounded(w).t())
            same(dx[rows], rounded(dy[rows]) @ rounded(w.t()).t())
        same(dw[expert], dy[rows].float().t() @ x[rows].detach().float())


def test_experts_are_two_grouped_products() -> None:
    x, gate_up, down = draw(24, 32, seed=0), draw(4, 64, 32, seed=1), draw(4, 32, 32, seed=2)
    indices = torch.rand(24, 4, generator=torch.Generator().manual_seed(3)).topk(2).indices.to(DEVICE)
    weights = draw(24, 2, seed=4).float().sigmoid()
    order = sort_by_expert(indices, 4)
    inputs = tuple(t.clone().requires_grad_() for t in (x, weights, gate_up, down))
    y = experts_in_one(inputs[0], inputs[1], inputs[2], inputs[3], order, fp8=True)

    apart = tuple(t.clone().requires_grad_() for t in (x, weights, gate_up, down))
    h = reference_swiglu(fp8.grouped_linear(apart[0][order.token_R], apart[2], order.ends_E))
    rows = fp8.grouped_linear(h, apart[3], order.ends_E)
    expected = (rows[order.row_Nk].float() * apart[1][..., None]).sum(1)
    # On a GPU the weight of a token is applied before the second product, so that other numbers are rounded.
    tolerance = 0.15 if DEVICE == "cuda" else 1e-4
    same(y, expected, tolerance)
    up = draw(24, 32, seed=5)
    for mine, theirs in zip(
        torch.autograd.grad(y, inputs, up), torch.autograd.grad(expected, apart, up.float()), strict=True
    ):
        same(mine, theirs, tolerance)
    assert not torch.equal(y, experts_in_one(x, weights, gate_up, down, order))
    same(grouped_experts(x[order.token_R], gate_up, down, order.ends_E, fp8=True), rows, tolerance)


def test_a_model_computes_its_blocks_in_fp8_and_learns() -> None:
    """Close to float32, not equal; the router and the head are left alone; the loss falls as without."""
    config = small_config().model
    tokens = torch.randint(0, config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    curves: dict[bool, list[float]] = {}
    for quantised in (False, True):
        model = Transformer(config)
        model.init_weights(0)
        if quantised:
            model.use_fp8(torch.device("cpu"))
            assert "e4m3" in model.paths(model.layout((2, 16)))["matrix products"]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        curves[quantised] = []
        for _ in range(12):
            loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[quantised].append(float(loss.detach()))
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    exact, coarse = curves[False], curves[True]
    assert exact[0] != coarse[0]
    assert coarse[0] == pytest.approx(exact[0], rel=1e-2)
    assert coarse[-1] < 0.9 * coarse[0]
    assert coarse[-1] == pytest.approx(exact[-1], rel=0.1)


def test_only_the_blocks_matrices_are_quantised() -> None:
    model = Transformer(small_config().model)
    model.use_fp8(torch.device("cpu"))
    flagged = {name for name, module in model.named_modules() if getattr(module, "fp8", False)}
    assert flagged
    assert all(name.startswith("layers.") and "router" not in name for name in flagged)
    assert not model.head.fp8


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(UserError, match=r"runtime\.compile = false"):
        resolve("demo", overrides=("runtime.fp8=true", "runtime.compile=true"))
    with pytest.raises(UserError, match="kernels = fast"):
        resolve("demo", overrides=("runtime.fp8=true", "runtime.compile=false", "runtime.kernels=reference"))
    assert resolve("demo", overrides=("runtime.fp8=true", "runtime.compile=false"))[0].runtime.fp8
