"""SMEBU and the sign update against hand-computed float64 sequences, and what a bias may and may not change."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trinity.config import BalanceConfig
from trinity.model.balance import apply_balance, max_vio, sign_update, smebu


def smebu_by_hand(steps: list[list[int]], rate: float, kappa: float, beta: float) -> tuple[list[float], list[float]]:
    """Scalar float64 loop over the report's five lines."""
    num = len(steps[0])
    bias, momentum = [0.0] * num, [0.0] * num
    for counts in steps:
        mean = sum(counts) / num
        delta = [rate * math.tanh(kappa * (mean - n) / mean) for n in counts]
        centre = sum(delta) / num
        for i in range(num):
            momentum[i] = beta * momentum[i] + (1 - beta) * (delta[i] - centre)
            bias[i] += momentum[i]
    return bias, momentum


@given(st.lists(st.lists(st.integers(0, 5000), min_size=4, max_size=4).filter(any), min_size=1, max_size=20))
@settings(max_examples=50)
def test_smebu_follows_the_formula(steps: list[list[int]]) -> None:
    bias, momentum = torch.zeros(1, 4), torch.zeros(1, 4)
    for counts in steps:
        bias, momentum = smebu(bias, momentum, torch.tensor([counts]), rate=5e-4, kappa=2.0, beta=0.5)
    want_bias, want_momentum = smebu_by_hand(steps, 5e-4, 2.0, 0.5)
    torch.testing.assert_close(bias[0].double(), torch.tensor(want_bias, dtype=torch.float64), atol=1e-8, rtol=1e-5)
    torch.testing.assert_close(
        momentum[0].double(), torch.tensor(want_momentum, dtype=torch.float64), atol=1e-9, rtol=1e-5
    )


def test_smebu_golden_values() -> None:
    """Two experts, counts 30 and 10: v = -0.5, 0.5; tanh(1) = 0.761594; one step moves half of rate * tanh."""
    bias, momentum = smebu(torch.zeros(2), torch.zeros(2), torch.tensor([30, 10]), rate=1e-3, kappa=2.0, beta=0.5)
    expected = torch.tensor([-0.5e-3 * 0.76159416, 0.5e-3 * 0.76159416])
    torch.testing.assert_close(bias, expected, atol=1e-10, rtol=1e-6)
    torch.testing.assert_close(momentum, expected, atol=1e-10, rtol=1e-6)


@given(st.lists(st.integers(0, 100), min_size=2, max_size=16).filter(any))
def test_infinite_kappa_is_the_sign_update(counts: list[int]) -> None:
    n = torch.tensor(counts)
    bias, _ = smebu(torch.zeros(len(counts)), torch.zeros(len(counts)), n, rate=1e-3, kappa=1e9, beta=0.0)
    torch.testing.assert_close(bias, sign_update(torch.zeros(len(counts)), n, rate=1e-3, recenter=True))


def test_recentering_keeps_the_mean_at_zero() -> None:
    counts = torch.tensor([100, 1, 1, 1])
    centred, drifting = torch.zeros(4), torch.zeros(4)
    for _ in range(10):
        centred = sign_update(centred, counts, rate=1e-3, recenter=True)
        drifting = sign_update(drifting, counts, rate=1e-3, recenter=False)
    assert abs(centred.mean()) < 1e-9
    assert drifting.mean() > 4e-3


def test_a_layer_without_tokens_keeps_its_state() -> None:
    bias, momentum = torch.tensor([[0.1, -0.1]] * 2), torch.tensor([[0.01, -0.01]] * 2)
    counts = torch.tensor([[0, 0], [3, 1]])
    new_bias, new_momentum = smebu(bias, momentum, counts, rate=1e-3, kappa=2.0, beta=0.5)
    assert torch.equal(new_bias[0], bias[0])
    assert torch.equal(new_momentum[0], momentum[0])
    assert not torch.equal(new_bias[1], bias[1])


def test_max_vio() -> None:
    assert max_vio(torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [0, 0, 0, 0]])).tolist() == [0.0, 3.0, 0.0]


class _Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(4))
        self.register_buffer("momentum", torch.zeros(4))


class _Model(nn.Module):
    """Only the names that the balancing relies on; 12 layers, so that layer 10 must not come before layer 2."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"moe": nn.ModuleDict({"router": _Router()})}) for _ in range(12))


def test_apply_balance_moves_layers_in_order() -> None:
    model = _Model()
    counts = torch.full((12, 4), 10)
    counts[2] = torch.tensor([40, 0, 0, 0])
    apply_balance(model, counts, BalanceConfig(kind="smebu", rate=1e-2))
    buffers = dict(model.named_buffers())
    assert buffers["layers.2.moe.router.bias"][0] < 0
    assert buffers["layers.2.moe.router.momentum"].abs().sum() > 0
    for i in (0, 1, 10, 11):
        assert buffers[f"layers.{i}.moe.router.bias"].abs().sum() == 0


@pytest.mark.parametrize("kind", ["smebu", "sign"])
def test_a_skipped_or_frozen_step_changes_nothing(kind: str) -> None:
    model = _Model()
    counts = torch.randint(0, 50, (12, 4))
    config = BalanceConfig.model_validate({"kind": kind, "rate": 1e-2})
    before = {k: v.clone() for k, v in model.named_buffers()}
    apply_balance(model, counts, config, skip=torch.tensor(1.0))
    apply_balance(model, counts, config.model_copy(update={"frozen": True}))
    apply_balance(model, counts, config.model_copy(update={"kind": "none"}))
    assert all(torch.equal(before[k], v) for k, v in model.named_buffers())
    apply_balance(model, counts, config, skip=torch.tensor(0.0))
    assert any(not torch.equal(before[k], v) for k, v in model.named_buffers())
