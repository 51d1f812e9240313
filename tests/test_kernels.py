# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Triton's language is not typed.
"""Triton kernels against the plain formulas, forward and gradients: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

from trinity.config import resolve
from trinity.model.rope import Rotation, reference_rotate, rotation
from trinity.model.router import Documents, Routing, routing_stats
from trinity.ops import exact_linear as exact
from trinity.ops.accumulate import reference_accumulate_
from trinity.ops.cross_entropy import IGNORE, reference_cross_entropy
from trinity.ops.exact_linear import reference_exact_linear
from trinity.ops.experts import reference_experts, sort_by_expert
from trinity.ops.gate import reference_gated_heads
from trinity.ops.kernels import cross_entropy, elementwise, experts, heads, muon, norm, routing
from trinity.ops.rms_norm import reference_residual_norm, reference_rms_norm
from trinity.ops.swiglu import reference_swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)]


def leaf(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype).requires_grad_()


def assert_same(mine, theirs, leaves: tuple[Tensor, ...], tolerance: float) -> None:
    """Outputs and gradients of `mine` against `theirs` in float32 on the same (rounded) inputs."""
    wide = tuple(t.detach().float().requires_grad_() for t in leaves)
    actual, expected = mine(*leaves), theirs(*wide)
    actual, expected = (x if isinstance(x, tuple) else (x,) for x in (actual, expected))
    ups = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(x) for i, x in enumerate(expected)]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.float(), e, atol=tolerance * max(1, e.abs().max().item()), rtol=tolerance)
    grads = torch.autograd.grad(actual, leaves, [u.to(a.dtype) for u, a in zip(ups, actual, strict=True)])
    wanted = torch.autograd.grad(expected, wide, [u.to(a.dtype).float() for u, a in zip(ups, actual, strict=True)])
    for g, w, x in zip(grads, wanted, leaves, strict=True):
        assert g.dtype == x.dtype
        torch.testing.assert_close(g.float(), w, atol=tolerance * max(1, w.abs().max().item()), rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 64), (1, 1)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    x, gain = leaf(*shape, seed=0, dtype=dtype), leaf(shape[-1], seed=1, dtype=dtype)
    assert_same(lambda x, w: norm.norm(x, w, 1e-5), lambda x, w: reference_rms_norm(x, w, 1e-5), (x, gain), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("has_next", [True, False])
def test_residual_norm(has_next: bool, dtype: torch.dtype, tolerance: float) -> None:
    x, y = leaf(2, 4, 24, seed=0, dtype=dtype), leaf(2, 4, 24, seed=1, dtype=dtype)
    post, after = leaf(24, seed=2, dtype=dtype), leaf(24, seed=3, dtype=dtype)
    if has_next:
        leaves = (x, y, post, after)
        assert_same(
            lambda *t: norm.residual_norm(*t, 1e-5), lambda *t: reference_residual_norm(*t, 1e-5), leaves, tolerance
        )
    else:
        assert_same(
            lambda *t: norm.residual_norm(*t, None, 1e-5)[0],
            lambda *t: reference_residual_norm(*t, None, 1e-5)[0],
            (x, y, post),
            tolerance,
        )


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_swiglu(dtype: torch.dtype, tolerance: float) -> None:
    assert_same(experts.SwiGLU.apply, reference_swiglu, (leaf(3, 5, 2 * 24, seed=0, dtype=dtype),), tolerance)


def choose(num_tokens: int, num_experts: int, k: int) -> Tensor:
    """Experts of each token; the last expert has none."""
    draws = torch.rand(num_tokens, num_experts - 1, generator=torch.Generator().manual_seed(3))
    return draws.topk(k, dim=1).indices.to(DEVICE)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES if DEVICE == "cpu" else DTYPES[1:])
def test_experts(dtype: torch.dtype, tolerance: float) -> None:
    N, E, D, F = 13, 5, 32, 16
    indices = choose(N, E, 2)
    order = sort_by_expert(indices, E)
    leaves = (
        leaf(N, D, seed=0, dtype=dtype),
        torch.rand(N, 2, generator=torch.Generator().manual_seed(8)).to(DEVICE).requires_grad_(),
        (leaf(E, 2 * F, D, seed=1, dtype=dtype).detach() / 4).requires_grad_(),
        (leaf(E, D, F, seed=2, dtype=dtype).detach() / 4).requires_grad_(),
    )
    assert_same(
        lambda x, w, gate_up, down: experts.Experts.apply(x, w, gate_up, down, *order, False),
        lambda x, w, gate_up, down: reference_experts(x, indices, w, gate_up, down),
        leaves,
        tolerance,
    )


def test_rows_gathered_and_added_up() -> None:
    x, k = leaf(7, 24, seed=0).detach(), 3
    order = sort_by_expert(choose(7, 6, k), 6)
    rows = experts.gather_rows(x, order.token_R)
    torch.testing.assert_close(rows, x[order.token_R])
    torch.testing.assert_close(experts.add_up_rows(rows, order.row_Nk), k * x)
    weights = torch.rand(7, k, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    torch.testing.assert_close(experts.add_up_rows(rows, order.row_Nk, weights), x * weights.sum(1, keepdim=True))


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(
    ("turned", "normed", "has_gate"), [(True, True, True), (False, True, True), (True, False, False)]
)
def test_split_heads(turned: bool, normed: bool, has_gate: bool, dtype: torch.dtype, tolerance: float) -> None:
    B, T, H, G, K = 2, 3, 3, 1, 16
    widths = [H * K, G * K, G * K, *([H * K] if has_gate else [])]
    x, q_gain, k_gain = leaf(B, T, sum(widths), seed=0, dtype=dtype), leaf(K, seed=1), leaf(K, seed=2)
    turn = rotation(torch.arange(T, device=DEVICE).expand(B, T) * 7, K, 100.0)

    def mine(x, *gains):
        cos_sin = (turn.cos, turn.sin) if turned else (None, None)
        outputs = heads.SplitHeads.apply(x, *(gains or (None, None)), *cos_sin, H, G, K, 1e-5)
        # queries as FlexAttention's gradient returns them: heads before positions
        return tuple(
            o.transpose(1, 2).contiguous().transpose(1, 2) if o.ndim == 4 else o for o in outputs if o is not None
        )

    def theirs(x, *gains):
        q, k, v, *gate = x.split(widths, dim=-1)
        q, k, v = (t.unflatten(-1, (-1, K)) for t in (q, k, v))
        if gains:
            q, k = (reference_rms_norm(t, gain, 1e-5) for t, gain in zip((q, k), gains, strict=True))
        if turned:
            q, k = (reference_rotate(t, Rotation(turn.cos, turn.sin)) for t in (q, k))
        return (q, k, v, *gate)

    assert_same(mine, theirs, (x, q_gain, k_gain) if normed else (x,), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_gate_of_strided_heads(dtype: torch.dtype, tolerance: float) -> None:
    o, wide = leaf(2, 3, 5, 8, seed=0, dtype=dtype), leaf(2, 5, 40, seed=1, dtype=dtype)
    assert_same(
        lambda o, wide: heads.GateHeads.apply(o.transpose(1, 2), wide[..., 7:31]),
        lambda o, wide: reference_gated_heads(o.transpose(1, 2), wide[..., 7:31]),
        (o, wide),
        tolerance,
    )


@pytest.mark.parametrize("normalise", [True, False])
def test_select(normalise: bool) -> None:
    N, E, k = 37, 6, 2
    logits, bias = leaf(N, E, seed=0), leaf(E, seed=1).detach() / 3

    def reference(logits):
        scores = logits.sigmoid()
        indices = (scores.detach() + bias).topk(k, dim=-1).indices
        weights = scores.gather(1, indices)
        return indices, (weights / (weights.sum(-1, keepdim=True) + 1e-20) if normalise else weights) * 2.5

    assert torch.equal(routing.Select.apply(logits, bias, k, normalise, 2.5)[0], reference(logits)[0])
    assert_same(
        lambda x: routing.Select.apply(x, bias, k, normalise, 2.5)[1], lambda x: reference(x)[1], (logits,), 1e-5
    )


def test_select_of_nan_names_an_expert() -> None:
    logits = torch.full((3, 6), float("nan"), device=DEVICE)
    indices, _ = routing.Select.apply(logits, torch.zeros(6, device=DEVICE), 2, True, 1.0)
    assert ((indices >= 0) & (indices < 6)).all()


@pytest.mark.parametrize("padded", [True, False])
def test_balance(padded: bool) -> None:
    N, E, k = 37, 6, 2
    logits, indices = leaf(N, E, seed=0), choose(N, E, k)
    document = (torch.arange(N, device=DEVICE) // 9).clamp(max=3)
    real = torch.arange(N, device=DEVICE) < 30 if padded else None

    def reference(logits):
        routed = Routing(indices, indices.float(), logits.sigmoid(), logits)
        return routing_stats(routed, Documents(document, N, real))

    mine = routing.Balance.apply(logits, indices, document, N, real)
    for a, e in zip(mine, reference(logits)[:5], strict=True):
        torch.testing.assert_close(a, e.to(a.dtype), atol=1e-5, rtol=1e-5)
    assert_same(
        lambda x: routing.Balance.apply(x, indices, document, N, real)[1], lambda x: reference(x)[1], (logits,), 1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunk_loss(dtype: torch.dtype) -> None:
    C, V, D = 5, 300, 8
    x, head = leaf(C, D, seed=0), leaf(V, D, seed=1)
    targets = torch.tensor([3, IGNORE, 299, 0, IGNORE], device=DEVICE)
    logits = (x @ head.t()).detach().requires_grad_()
    d_logits = torch.empty(C, V, dtype=dtype, device=DEVICE)
    stats = cross_entropy.chunk_loss(logits.detach(), targets, 0.1, IGNORE, d_logits)
    expected = reference_cross_entropy(x, head, targets, z_loss=0.1)
    torch.testing.assert_close(stats[0].sum(), expected.ce_sum)
    torch.testing.assert_close(stats[1].sum() * 0.1, expected.z_sum)
    torch.testing.assert_close(stats[2].max(), expected.logit_max)
    keep = targets != IGNORE
    ce = torch.nn.functional.cross_entropy(logits[keep], targets[keep], reduction="sum")
    loss = ce + 0.1 * logits[keep].logsumexp(-1).square().sum()
    (wanted,) = torch.autograd.grad(loss, logits)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(d_logits.float(), wanted, atol=tolerance, rtol=tolerance)
    assert not d_logits[~keep].any()


def test_accumulate() -> None:
    total, part = leaf(5000, seed=0).detach(), leaf(5000, seed=1, dtype=torch.bfloat16).detach()
    expected = total.clone()
    reference_accumulate_(expected, part)
    elementwise.accumulate_(total, part)
    assert torch.equal(total, expected)


def test_split_product_is_as_exact_as_float32() -> None:
    x, weight = leaf(33, 64, seed=0, dtype=torch.bfloat16), leaf(6, 64, seed=1)
    up = leaf(33, 6, seed=2).detach()
    actual = exact._SplitLinear.apply(x, weight)
    expected = x.detach().double() @ weight.detach().double().t()
    error, usual = (
        (y.double() - expected).abs().max() for y in (actual, reference_exact_linear(x.detach(), weight.detach()))
    )
    assert error <= 4 * usual
    dx, dw = torch.autograd.grad(actual, (x, weight), up)
    torch.testing.assert_close(dw.double(), up.double().t() @ x.detach().double(), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(dx.double(), up.double() @ weight.detach().double(), atol=2e-2, rtol=1e-2)


def test_the_preset_fits_the_kernels() -> None:
    """grouped_mm wants widths that are multiples of 8; RoPE's halves and the blocks of heads are powers of two."""
    model = resolve("nano")[0].model
    assert model.dim % 8 == model.expert_dim % 8 == 0
    assert model.head_dim & (model.head_dim - 1) == 0


@pytest.mark.parametrize("skipped", [None, 0.0, 1.0])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muons_two_passes(nesterov: bool, skipped: float | None) -> None:
    """On rows 2 to 6 of stacked matrices, whose other rows stay as they are."""
    whole = [leaf(3, 8, 5, seed=seed).detach() for seed in range(3)]
    grad, momentum, weight = (t[:, 2:6] for t in whole)
    before = [t.clone() for t in whole]
    skip = None if skipped is None else torch.tensor(skipped, device=DEVICE)
    if skipped:
        grad[0, 0, 0] = float("nan")
    out = torch.empty(3, 4, 5, device=DEVICE)
    muon.direction(grad, momentum, skip, out, beta=0.9, nesterov=nesterov)
    muon.move(weight, out, skip, rate=0.1, decay=0.01)
    if skipped:
        assert torch.equal(whole[1], before[1])
        assert torch.equal(whole[2], before[2])
        return
    moved = torch.lerp(before[1][:, 2:6], before[0][:, 2:6], 0.1)
    update = torch.lerp(before[0][:, 2:6], moved, 0.9) if nesterov else moved
    torch.testing.assert_close(momentum, moved)
    torch.testing.assert_close(out, update)
    torch.testing.assert_close(weight, before[2][:, 2:6] * 0.99 - 0.1 * update)
    for t, b in zip(whole, before, strict=True):
        assert torch.equal(t[:, :2], b[:, :2])
        assert torch.equal(t[:, 6:], b[:, 6:])


def test_rounding_by_chance() -> None:
    """Neighbours only, and right on average (four standard errors)."""
    share, count = 0.3, 20_000
    value = torch.full((count,), 1 + share * 2**-7, device=DEVICE)
    target = torch.empty(count, dtype=torch.bfloat16, device=DEVICE)
    elementwise.stochastic_round_(target, value, 5)
    assert set(target.float().unique().tolist()) == {1.0, 1.0 + 2**-7}
    up = float((target.float() > 1.0).float().mean())
    assert up == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)
    again = torch.empty_like(target)
    elementwise.stochastic_round_(again, value, 5)
    assert torch.equal(again, target)
    elementwise.stochastic_round_(again, value, 6)
    assert not torch.equal(again, target)


def test_muon_moves_weights_without_masters() -> None:
    """A step of a tenth of the last place moves a tenth of the weights; a skipped one none."""
    weight = torch.ones(4, 50, 100, dtype=torch.bfloat16, device=DEVICE)
    step = torch.ones_like(weight)
    muon.move(weight, step, None, rate=2**-8 / 10, decay=0.0, seed=3)
    moved = float((weight.float() < 1.0).float().mean())
    assert moved == pytest.approx(0.1, abs=4 * (0.09 / weight.numel()) ** 0.5)
    assert set(weight.float().unique().tolist()) == {1.0, 1.0 - 2**-8}
    before = weight.clone()
    muon.move(weight, step, torch.ones((), device=DEVICE), rate=0.5, decay=0.1, seed=4)
    assert torch.equal(weight, before)
