"""Muon against a singular value decomposition and torch.optim.Muon; groups; skipped steps; state."""

import warnings

import pytest
import torch
from torch import nn

from trinity.config import OptimConfig, resolve
from trinity.ops.newton_schulz import COEFFICIENTS, orthogonalize, orthogonalize_reference
from trinity.optim import muon
from trinity.optim.groups import group_parameters, lr_multiplier, matrix_parts
from trinity.optim.muon import muon_reference
from trinity.optim.optimizer import build_optimizer

CONFIG = resolve(
    "demo",
    overrides=[
        "model.vocab_size=32",
        "model.num_layers=2",
        "model.dim=16",
        "model.num_heads=4",
        "model.head_dim=8",
        "model.ffn_dim=24",
        "model.expert_dim=8",
        "model.num_experts=4",
    ],
)[0].model


class Model(nn.Module):
    """Parameters with the names and shapes of a two-layer Trinity model (dense, then MoE), without a forward."""

    def __init__(self) -> None:
        super().__init__()
        d, shapes = 16, {}
        for i in range(2):
            shapes[f"layers.{i}.attn.qkvg.weight"] = (2 * 32 + 2 * 16, d)
            shapes[f"layers.{i}.attn.o.weight"] = (d, 32)
            shapes[f"layers.{i}.attn_norm.weight"] = (d,)
        shapes |= {"layers.0.ffn.gate_up.weight": (48, d), "layers.0.ffn.down.weight": (d, 24)}
        shapes |= {"layers.1.moe.router.weight": (4, d), "layers.1.moe.experts.gate_up": (4, 16, d)}
        shapes |= {"layers.1.moe.experts.down": (4, d, 8), "embed.weight": (32, d), "head.weight": (32, d)}
        generator = torch.Generator().manual_seed(0)
        self.tensors = {k: nn.Parameter(torch.randn(s, generator=generator) * 0.1) for k, s in shapes.items()}

    def named_parameters(self, *args, **kwargs):
        yield from self.tensors.items()

    def give_gradients(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in self.tensors.values():
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


@pytest.mark.parametrize("shape", [(3, 24, 16), (2, 16, 40), (1, 32, 32), (5, 2, 16, 8)])
@pytest.mark.parametrize("name", ["quintic", "polar-express"])
def test_newton_schulz_is_close_to_the_polar_factor(shape: tuple[int, ...], name: str) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    got, want = orthogonalize(matrices, COEFFICIENTS[name]), orthogonalize_reference(matrices)
    singular = torch.linalg.svdvals(got)
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    assert torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.97


@pytest.mark.parametrize("name", ["quintic", "polar-express"])
def test_the_iteration_in_bfloat16_is_close_to_the_one_in_float32(name: str) -> None:
    """A GPU iterates in bfloat16: singular values stay near 1, and the direction is the same to about a per cent."""
    torch.manual_seed(0)
    matrices = torch.randn(3, 24, 64)
    full, half = (orthogonalize(matrices, COEFFICIENTS[name], dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(full.flatten(), half.float().flatten(), dim=0) > 0.999
    singular = torch.linalg.svdvals(half.float())
    assert singular.min() > 0.6
    assert singular.max() < 1.3


def test_newton_schulz_of_zeros_is_zeros() -> None:
    assert orthogonalize(torch.zeros(2, 8, 4)).abs().sum() == 0


def test_a_batch_is_orthogonalised_matrix_by_matrix() -> None:
    torch.manual_seed(0)
    stack = torch.randn(4, 8, 16) * torch.tensor([1e-3, 1.0, 10.0, 1e3]).view(4, 1, 1)
    batched = orthogonalize(stack)
    for i in range(4):
        torch.testing.assert_close(batched[i], orthogonalize(stack[i : i + 1])[0], atol=1e-5, rtol=1e-5)


def test_groups_split_fused_matrices_and_cover_every_parameter() -> None:
    model = Model()
    groups = group_parameters(model.named_parameters(), CONFIG, OptimConfig())
    parts = {m.name: m.parts for m in groups.muon}
    assert parts["layers.0.attn.qkvg.weight"] == (32, 16, 16, 32)
    assert parts["layers.0.ffn.gate_up.weight"] == (24, 24)
    assert parts["layers.1.moe.experts.gate_up"] == (8, 8)
    assert parts["layers.1.moe.experts.down"] == (16,)
    assert set(groups.adamw_decay) == {"embed.weight", "head.weight", "layers.1.moe.router.weight"}
    assert parts.keys() | groups.adamw_decay.keys() | groups.adamw_vectors.keys() == model.tensors.keys()
    with_router = group_parameters(model.named_parameters(), CONFIG, OptimConfig(router="muon"))
    assert "layers.1.moe.router.weight" in {m.name for m in with_router.muon}
    adamw = group_parameters(model.named_parameters(), CONFIG, OptimConfig(hidden="adamw", router="muon"))
    assert adamw.muon == []
    assert adamw.adamw_decay.keys() | adamw.adamw_vectors.keys() == model.tensors.keys()


def test_adamw_alone_moves_every_parameter() -> None:
    """Against torch.optim.AdamW over the same parameters, with decay on matrices only."""
    model, other = Model(), Model()
    optimizer = build_optimizer(model, CONFIG, OptimConfig(hidden="adamw"))
    matrices = [p for p in other.tensors.values() if p.ndim > 1]
    vectors = [p for p in other.tensors.values() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    oracle = torch.optim.AdamW(groups, lr=2e-4, betas=(0.9, 0.95), eps=1e-8)
    for seed in range(3):
        for m in (model, other):
            m.give_gradients(seed)
        optimizer.step()
        oracle.step()
    for name, p in model.tensors.items():
        torch.testing.assert_close(p, other.tensors[name])


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_against_torch_matrix_by_matrix(nesterov: bool) -> None:
    """torch.optim.Muon knows 2-D matrices only: it gets each part and each expert as a parameter of its own."""
    settings = OptimConfig(muon_lr=0.02, nesterov=nesterov, newton_schulz="quintic", weight_decay=0.1)
    model = Model()
    optimizer = build_optimizer(model, CONFIG, settings)
    pieces: dict[str, list[nn.Parameter]] = {}
    for matrix in optimizer.groups.muon:
        split = matrix.parameter.detach().split(matrix.parts, dim=-2)
        pieces[matrix.name] = [nn.Parameter(m.clone()) for s in split for m in s.reshape(-1, *s.shape[-2:])]
    oracle = torch.optim.Muon(
        [p for ps in pieces.values() for p in ps],
        lr=0.02,
        weight_decay=0.1,
        momentum=0.95,
        nesterov=nesterov,
        ns_coefficients=COEFFICIENTS["quintic"][0],
        ns_steps=5,
    )
    for seed in range(3):
        model.give_gradients(seed)
        for matrix in optimizer.groups.muon:
            assert matrix.parameter.grad is not None
            grads = [m for s in matrix.parameter.grad.split(matrix.parts, dim=-2) for m in s.reshape(-1, *s.shape[-2:])]
            for piece, grad in zip(pieces[matrix.name], grads, strict=True):
                piece.grad = grad.clone()
        optimizer.step()
        oracle.step()
    for matrix in optimizer.groups.muon:
        split = matrix.parameter.detach().split(matrix.parts, dim=-2)
        ours = [m for s in split for m in s.reshape(-1, *s.shape[-2:])]
        for mine, theirs in zip(ours, pieces[matrix.name], strict=True):
            # torch iterates in bfloat16; the update has entries of about lr
            torch.testing.assert_close(mine, theirs.detach(), atol=0.02 * 0.05, rtol=0)


def test_muon_against_the_exact_reference() -> None:
    settings = OptimConfig(muon_lr=0.02)
    model = Model()
    optimizer = build_optimizer(model, CONFIG, settings)
    name = "layers.0.attn.o.weight"
    weight, momentum = model.tensors[name].detach().clone(), torch.zeros(16, 32)
    for seed in range(4):
        model.give_gradients(seed)
        grad = model.tensors[name].grad
        assert grad is not None
        weight, momentum = muon_reference(weight, grad, momentum, lr=0.02, beta=0.95, nesterov=True, weight_decay=0.1)
        optimizer.step()
    moved = 4 * 0.02 * lr_multiplier(16, 32)
    assert (model.tensors[name].detach() - weight).norm() < 0.15 * moved * 16**0.5
    torch.testing.assert_close(optimizer.muon.momentum[name], momentum, atol=1e-6, rtol=1e-5)


def test_equal_shapes_share_one_iteration_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query, key, gate and up of all layers with the same shape are one batch; a smaller limit only splits it."""
    counted: list[int] = []

    def spy(stack: torch.Tensor, coefficients) -> torch.Tensor:
        counted.append(stack.shape[0])
        return orthogonalize(stack, coefficients)

    monkeypatch.setattr(muon, "orthogonalize", spy)
    moved = []
    for limit in (2**27, 1):
        monkeypatch.setattr(muon, "STACK_ELEMENTS", limit)
        counted.clear()
        model = Model()
        model.give_gradients(0)
        build_optimizer(model, CONFIG, OptimConfig()).step()
        moved.append((sorted(counted), {k: p.detach().clone() for k, p in model.tensors.items()}))
    # [32, 16]: query and gate of 2 layers; [16, 16]: key and value; [16, 32]: output; [24, 16]: gate and up of layer
    # 0; [16, 24]: its down; [8, 16]: gate and up of 4 experts; [16, 8]: their down
    assert moved[0][0] == sorted([4, 4, 2, 2, 1, 8, 4])
    assert sum(moved[1][0]) == sum(moved[0][0])
    assert len(moved[1][0]) > len(moved[0][0])
    for name, tensor in moved[0][1].items():
        torch.testing.assert_close(moved[1][1][name], tensor, atol=1e-7, rtol=1e-5)


def test_lr_multiplier() -> None:
    assert lr_multiplier(64, 16) == 2.0
    assert lr_multiplier(16, 64) == 1.0


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_skipped_step_leaves_everything_bit_for_bit(poison: float) -> None:
    model = Model()
    optimizer = build_optimizer(model, CONFIG, OptimConfig())
    model.give_gradients(0)
    optimizer.step(skip=torch.tensor(0.0))
    weights = {k: p.detach().clone() for k, p in model.tensors.items()}
    state = {k: t.clone() for k, t in optimizer.state_dict().items()}
    for p in model.tensors.values():
        p.grad = torch.full_like(p, poison)
    optimizer.step(skip=torch.tensor(1.0))
    assert all(torch.equal(weights[k], p) for k, p in model.tensors.items())
    assert all(torch.equal(state[k], t) for k, t in optimizer.state_dict().items())


def test_a_step_that_is_not_skipped_equals_a_plain_one() -> None:
    plain, guarded = Model(), Model()
    optimizers = [build_optimizer(m, CONFIG, OptimConfig()) for m in (plain, guarded)]
    for seed in range(3):
        for m in (plain, guarded):
            m.give_gradients(seed)
        optimizers[0].step()
        optimizers[1].step(skip=torch.tensor(0.0))
    for name, p in plain.tensors.items():
        torch.testing.assert_close(p, guarded.tensors[name], atol=1e-7, rtol=1e-6)


def test_state_survives_a_round_trip_and_a_wrong_one_is_named() -> None:
    first, second = Model(), Model()
    a, b = build_optimizer(first, CONFIG, OptimConfig()), build_optimizer(second, CONFIG, OptimConfig())
    first.give_gradients(0)
    a.step()
    b.load_state_dict({k: t.clone() for k, t in a.state_dict().items()})
    for name, p in second.tensors.items():
        p.data.copy_(first.tensors[name].data)
    for model, optimizer in ((first, a), (second, b)):
        model.give_gradients(1)
        optimizer.step()
    assert all(torch.equal(first.tensors[k], second.tensors[k]) for k in first.tensors)
    state = dict(a.state_dict())
    state.pop("muon.momentum.layers.0.attn.o.weight")
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.o\.weight"):
        b.load_state_dict(state)


def test_every_published_preset_has_a_group_for_every_matrix() -> None:
    for preset in ("nano", "mini", "large"):
        config = resolve(preset)[0].model
        heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = matrix_parts("layers.0.attn.qkvg.weight", (2 * heads + 2 * kv, config.dim), config)
        assert parts == (heads, kv, kv, heads)


def test_no_warning_from_the_fused_optimizer() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Model()
        model.give_gradients(0)
        build_optimizer(model, CONFIG, OptimConfig()).step()
