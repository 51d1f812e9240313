"""Selective recomputation: the same gradients, with less kept, however often and in whatever view a result is used."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from train_helpers import small_config
from trinity.base.errors import UserError
from trinity.config import resolve
from trinity.model import attention, linear, transformer
from trinity.model.norm import Kernels
from trinity.model.transformer import Recompute, Transformer
from trinity.ops.remake import remade, selective, set_aside


def build(recompute: Recompute, kernels: Kernels = "fast") -> Transformer:
    model = Transformer(small_config().model, kernels=kernels, recompute=recompute)
    model.init_weights(0)
    return model


@pytest.mark.parametrize("kernels", ["fast", "reference"])
def test_a_model_has_the_same_gradients_bit_for_bit(kernels: Kernels) -> None:
    tokens = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(0))
    found: list[list[Tensor]] = []
    for recompute in ("none", "selective"):
        model = build(recompute, kernels)
        for _ in range(2):  # gradients of a second pass are added
            model(tokens).float().square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) == len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_made_again_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the forward pass the storages are gone that without it are still there."""
    alive: list[weakref.ref[Tensor]] = []

    def watched(out: Tensor, operation: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        alive.append(weakref.ref(out))
        return remade(out, operation, *inputs)

    for module in (attention, linear, transformer):
        monkeypatch.setattr(module, "remade", watched)
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    left: dict[str, int] = {}
    for recompute in ("none", "selective"):
        alive.clear()
        model = build(recompute)
        output = model(tokens)
        gc.collect()
        left[recompute] = sum(ref() is not None for ref in alive)
        output.sum().backward()
        # Two norms, a gate and an activation (dense, or of the shared expert) in each of four layers.
        assert len(alive) == 16
    assert left["none"] == 16
    assert left["selective"] == 0


def test_one_repetition_serves_all_who_saved_it() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    weight = torch.randn(6, 6, requires_grad=True)
    calls: list[int] = []

    def double(x: Tensor) -> Tensor:
        calls.append(1)
        return 2 * x.exp()

    def graph() -> Tensor:
        y = remade(double(x), double, x)
        return (y @ weight).sum() + (y[1:3].t() * y[1:3].t()).sum() + y.view(3, 8)[1].sin().sum()

    expected = torch.autograd.grad(graph(), (x, weight))
    calls.clear()
    with selective():
        total = graph()
    # A whole, a view that is transposed and a row of another shape: saved as views of one recipe.
    actual = torch.autograd.grad(total, (x, weight), retain_graph=True)
    assert len(calls) == 2
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    again = torch.autograd.grad(total, (x, weight))  # a graph that is kept may be gone through again
    for a, b in zip(again, expected, strict=True):
        assert torch.equal(a, b)


def test_other_tensors_and_other_times_are_left_alone() -> None:
    x = torch.randn(3, 3, requires_grad=True)

    def never(_: Tensor) -> Tensor:
        raise AssertionError("made again")

    y = remade(x.exp(), never, x)  # outside
    (y * y).sum().backward()
    with selective():
        (x.sin() * x).sum().backward()
        z = remade(x.exp(), never, x)
        with set_aside():
            kept = (z * z).sum()
    with pytest.raises(AssertionError, match="contexts"), selective(), selective():
        pass
    torch.testing.assert_close(torch.autograd.grad(kept, x)[0], 2 * (2 * x.detach()).exp())


def test_an_operation_that_answers_otherwise_is_found_out() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with selective():
        y = remade(x * 1.0, lambda x: x.t(), x)
        total = (y * y).sum()
    with pytest.raises(AssertionError, match="another layout"):
        total.backward()


def test_a_compiled_graph_is_not_broken() -> None:
    def work(x: Tensor) -> Tensor:
        y = remade(x.exp(), torch.exp, x)
        with set_aside():
            return y.sum()

    x = torch.randn(3)
    compiled = torch.compile(work, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), work(x))


def test_the_compiler_decides_for_itself() -> None:
    with pytest.raises(UserError, match=r"runtime\.compile = false"):
        resolve("demo", overrides=("runtime.recompute=selective", "runtime.compile=true"))
