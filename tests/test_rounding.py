"""Stochastic rounding: between the two neighbours, right on average; and optimizers over weights without masters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from test_optim import CONFIG, Model
from trinity.config import OptimConfig
from trinity.ops.rounding import reference_stochastic_round, stochastic_round_
from trinity.optim.optimizer import MuonAdamW, build_optimizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rounded(value: Tensor, seed: int) -> Tensor:
    target = torch.empty(value.shape, dtype=torch.bfloat16, device=value.device)
    stochastic_round_(target, value, seed)
    return target


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50), st.integers(0, 2**31 - 1))
@settings(max_examples=100, deadline=None)
def test_the_result_is_one_of_the_two_neighbours(values: list[float], seed: int) -> None:
    value = torch.tensor(values, device=DEVICE)
    result = rounded(value, seed).float()
    towards_zero = (value.view(torch.int32) & -(1 << 16)).view(torch.float32)
    away = ((value.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    exact = towards_zero == value
    assert ((result == towards_zero) | (~exact & (result == away))).all()
    assert torch.equal(rounded(value, seed).float(), result)


def test_what_is_exact_or_not_finite_stays() -> None:
    value = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-130, torch.inf, -torch.inf, torch.nan], device=DEVICE)
    for seed in range(20):
        assert torch.equal(rounded(value, seed)[:-1], value[:-1].bfloat16())
        assert rounded(value, seed)[-1].isnan()


def test_the_mean_is_the_value() -> None:
    """Four standard errors over 100 000 roundings of numbers between 1 and 1 + 2^-7."""
    for share in (0.01, 0.3, 0.5, 0.9):
        value = torch.full((100_000,), 1 + share * 2**-7, device=DEVICE)
        up = float((rounded(value, 3).float() > 1.0).float().mean())
        assert up == pytest.approx(share, abs=4 * (share * (1 - share) / 100_000) ** 0.5)


def test_the_reference_adds_and_cuts() -> None:
    value = torch.tensor([1.0 + 2**-9])
    low, high = (torch.tensor([noise], dtype=torch.int32) for noise in (0, 65535))
    assert float(reference_stochastic_round(value, low)) == 1.0
    assert float(reference_stochastic_round(value, high)) == 1.0 + 2**-7


def optimizer_of(model: Model, rounding: str, dtype: torch.dtype, hidden: str = "muon") -> MuonAdamW:
    for parameter in model.tensors.values():
        parameter.data = parameter.data.to(DEVICE, dtype)
    chosen = OptimConfig.model_validate({"rounding": rounding, "hidden": hidden, "muon_lr": 1e-5, "adamw_lr": 1e-5})
    return build_optimizer(model, CONFIG, chosen)


def train(model: Model, optimizer: MuonAdamW, steps: range) -> None:
    for step in steps:
        model.give_gradients(0)  # always the same, so that all steps have one direction
        optimizer.step(number=step)


@pytest.mark.parametrize("hidden", ["muon", "adamw"])
def test_small_steps_arrive_on_average(hidden: str) -> None:
    """Weights of about 0.1 have a last place of about 2^-11; a step of 1e-5 is a fiftieth of it. Rounded to the nearest
    number nothing but the smallest weights moves; rounded by chance they go where float32 goes."""
    moved: dict[str, dict[str, Tensor]] = {}
    for name, rounding, dtype in (
        ("exact", "nearest", torch.float32),
        ("nearest", "nearest", torch.bfloat16),
        ("stochastic", "stochastic", torch.bfloat16),
    ):
        model = Model()
        optimizer = optimizer_of(model, rounding, dtype, hidden)
        before = {name: p.detach().float().clone() for name, p in model.tensors.items()}
        train(model, optimizer, range(40))
        moved[name] = {key: p.detach().float() - before[key] for key, p in model.tensors.items()}
        assert all(p.dtype == dtype for p in model.tensors.values())

    def share(name: str) -> float:
        """Of the way that float32 went, along it."""
        along = sum(float((moved[name][key] * exact).sum()) for key, exact in moved["exact"].items())
        return along / sum(float(exact.square().sum()) for exact in moved["exact"].values())

    assert share("nearest") < 0.3
    assert share("stochastic") == pytest.approx(1.0, abs=0.1)


def test_a_skipped_step_changes_nothing() -> None:
    model = Model()
    optimizer = optimizer_of(model, "stochastic", torch.bfloat16)
    train(model, optimizer, range(2))
    before = {name: p.detach().clone() for name, p in model.tensors.items()}
    state = {name: t.clone() for name, t in optimizer.state_dict().items()}
    optimizer.step(skip=torch.ones((), device=DEVICE), number=2)
    assert all(torch.equal(p.detach(), before[name]) for name, p in model.tensors.items())
    assert all(torch.equal(t, state[name]) for name, t in optimizer.state_dict().items())


def test_a_resumed_run_rounds_as_it_would_have() -> None:
    models = [Model() for _ in range(2)]
    optimizers = [optimizer_of(model, "stochastic", torch.bfloat16) for model in models]
    train(models[0], optimizers[0], range(3))
    for name, parameter in models[0].tensors.items():
        models[1].tensors[name].data.copy_(parameter.data)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(3, 6))
    assert all(torch.equal(p, models[1].tensors[name]) for name, p in models[0].tensors.items())
