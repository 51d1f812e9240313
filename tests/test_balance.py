"""SMEBU and the sign update against hand-computed float64 sequences, and what a bias may and may not change."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trinity.base.errors import UsageError
from trinity.config import BalanceConfig, resolve
from trinity.model.balance import (
    MARGIN_BINS,
    apply_balance,
    margin_bins,
    margin_range,
    max_vio,
    quantile_update,
    sign_update,
    smebu,
)


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


def test_a_golden_sequence_of_smebu() -> None:
    """Three experts over three steps, worked out by hand in float64 with rate 1, kappa 2 and beta 0.5.

    Step 1, counts 9 0 0: v = -2 1 1, tanh = -0.99932930 0.96402758 0.96402758, their mean 0.30957529, so
    d = -1.30890459 0.65445229 0.65445229; m = d / 2; b = m. Step 2, counts 0 3 6: v = 1 0 -1, d = 0.96402758 0
    -0.96402758; m = m / 2 + d / 2; b += m. Step 3, counts 4 4 4: d = 0; m = m / 2; b += m.
    """
    bias, momentum = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    expected = [
        ([-0.65445229, 0.32722615, 0.32722615], [-0.65445229, 0.32722615, 0.32722615]),
        ([-0.49966465, 0.49083922, 0.00882543], [0.15478764, 0.16361307, -0.31840072]),
        ([-0.42227083, 0.57264576, -0.15037493], [0.07739382, 0.08180654, -0.15920036]),
    ]
    for counts, (want_bias, want_momentum) in zip(([9, 0, 0], [0, 3, 6], [4, 4, 4]), expected, strict=True):
        bias, momentum = smebu(bias, momentum, torch.tensor(counts), rate=1.0, kappa=2.0, beta=0.5)
        assert bias.tolist() == pytest.approx(want_bias, abs=1e-7)  # float32
        assert momentum.tolist() == pytest.approx(want_momentum, abs=1e-7)  # float32


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


def route(scores_NE: torch.Tensor, bias_E: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [E] and histograms of margins [E, B], token by token."""
    num_experts = scores_NE.shape[1]
    top = (scores_NE + bias_E).topk(k + 1)
    counts_E = torch.bincount(top.indices[:, :k].flatten(), minlength=num_experts)
    bins_NE = margin_bins(scores_NE, top.values[:, k], bias_E)
    return counts_E, torch.stack([torch.bincount(column, minlength=MARGIN_BINS) for column in bins_NE.T])


def test_quantile_golden_values() -> None:
    """Two experts, one a token, four tokens with scores 0.9 and 0.1, 0.8 and 0.2009, ...: margins of the first are
    -0.8, -0.5991, -0.3, -0.1 and of the second 0. Bins are 0.002 wide from -1 on. Two of four margins of the first lie
    below the upper edge of the bin of -0.5991, which is -0.598; all of the second lie in [0, 0.002), half of them below
    0.001. Less their mean that is -0.2995 and 0.2995."""
    scores_NE = torch.tensor([[0.9, 0.1], [0.8, 0.2009], [0.7, 0.4], [0.6, 0.5]])
    bias_E = torch.zeros(2)
    counts_E, margins_EB = route(scores_NE, bias_E, 1)
    assert counts_E.tolist() == [4, 0]
    assert margins_EB[0, 200] == 1
    assert margins_EB[1, 500] == 4
    bias_E = quantile_update(bias_E, counts_E, margins_EB)
    torch.testing.assert_close(bias_E, torch.tensor([-0.2995, 0.2995]), atol=1e-6, rtol=0)
    assert route(scores_NE, bias_E, 1)[0].tolist() == [2, 2]


shapes = st.sampled_from([(2, 1), (8, 1), (8, 7), (16, 4)])


def skewed_scores(num_tokens: int, num_experts: int, seed: int) -> torch.Tensor:
    """Scores [N, E] of experts that tokens like very unequally."""
    draws = torch.Generator().manual_seed(seed)
    skew_E = torch.randn(num_experts, generator=draws)
    return (skew_E + torch.randn(num_tokens, num_experts, generator=draws)).sigmoid()


@given(st.integers(0, 1000), shapes)
@settings(max_examples=50, deadline=None)
def test_the_histogram_finds_the_quantile_within_a_bin(seed: int, shape: tuple[int, int]) -> None:
    """Against sorted margins; a bin more for the mean that is taken off."""
    num_experts, k = shape
    scores_NE, bias_E = skewed_scores(512, num_experts, seed), torch.linspace(-0.3, 0.3, num_experts)
    found_E = quantile_update(bias_E, *route(scores_NE, bias_E, k))
    cutoff_N = (scores_NE + bias_E).topk(k + 1).values[:, k]
    exact_E = (cutoff_N[:, None] - scores_NE).sort(dim=0).values[512 * k // num_experts - 1]
    low_1, high_1 = margin_range(bias_E)
    width = float(high_1 - low_1) / MARGIN_BINS
    torch.testing.assert_close(found_E, exact_E - exact_E.mean(), atol=2 * width, rtol=0)


@given(st.integers(0, 1000), shapes)
@settings(max_examples=10, deadline=None)
def test_fixed_scores_become_balanced(seed: int, shape: tuple[int, int]) -> None:
    """What imbalance is left after a few steps is a part of the tokens in a bin (the worst of 60 seeds: 0.04)."""
    scores_NE, bias_E = skewed_scores(4096, shape[0], seed), torch.zeros(shape[0])
    for _ in range(15):
        bias_E = quantile_update(bias_E, *route(scores_NE, bias_E, shape[1]))
    assert float(max_vio(route(scores_NE, bias_E, shape[1])[0])) < 0.06


def test_every_margin_lies_inside_the_range() -> None:
    scores_NE, bias_E = torch.rand(512, 8), 3 * torch.randn(8)
    cutoff_N = (scores_NE + bias_E).topk(3).values[:, 2]
    low_1, high_1 = margin_range(bias_E)
    margins_NE = cutoff_N[:, None] - scores_NE
    assert (margins_NE >= low_1).all()
    assert (margins_NE <= high_1).all()
    bins_NE = margin_bins(scores_NE, cutoff_N, bias_E)
    edges_NE = low_1 + bins_NE * (high_1 - low_1) / MARGIN_BINS
    assert ((margins_NE - edges_NE) > -1e-5).all()
    assert ((margins_NE - edges_NE) < (high_1 - low_1) / MARGIN_BINS + 1e-5).all()


def test_a_layer_without_tokens_keeps_its_quantile_bias() -> None:
    bias_LE = torch.tensor([[0.1, -0.1]] * 2)
    counts_E, margins_EB = route(torch.rand(16, 2), bias_LE[0], 1)
    counts_LE, margins_LEB = torch.stack([0 * counts_E, counts_E]), torch.stack([0 * margins_EB, margins_EB])
    moved_LE = quantile_update(bias_LE, counts_LE, margins_LEB)
    assert torch.equal(moved_LE[0], bias_LE[0])
    assert not torch.equal(moved_LE[1], bias_LE[1])


def test_quantile_balancing_needs_an_expert_that_is_not_selected() -> None:
    with pytest.raises(UsageError, match=r"experts_per_token below model\.num_experts"):
        resolve("demo", overrides=["balance.kind=quantile", "model.num_experts=4", "model.experts_per_token=4"])


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


@pytest.mark.parametrize("kind", ["smebu", "sign", "quantile"])
def test_a_skipped_or_frozen_step_changes_nothing(kind: str) -> None:
    model = _Model()
    counts, margins = torch.randint(0, 50, (12, 4)), torch.zeros(12, 4, MARGIN_BINS, dtype=torch.int64)
    margins.scatter_(2, torch.randint(0, MARGIN_BINS, (12, 4, 1)), 100)
    config = BalanceConfig.model_validate({"kind": kind, "rate": 1e-2})
    before = {k: v.clone() for k, v in model.named_buffers()}
    apply_balance(model, counts, config, margins_LEB=margins, skip=torch.tensor(1.0))
    apply_balance(model, counts, config.model_copy(update={"frozen": True}), margins_LEB=margins)
    apply_balance(model, counts, config.model_copy(update={"kind": "none"}))
    assert all(torch.equal(before[k], v) for k, v in model.named_buffers())
    apply_balance(model, counts, config, margins_LEB=margins, skip=torch.tensor(0.0))
    assert any(not torch.equal(before[k], v) for k, v in model.named_buffers())
