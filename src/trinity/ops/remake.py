"""Selective recomputation: results that are cheap to make again are not kept for the backward pass.

Matrix products and attention keep what they need; what lies between them (norms, gates, activations) costs one pass
over memory, and its results are a fifth of what a layer of Trinity Nano keeps. Inside `selective()` an operation may
say by `remade` how its result is made again; whoever saves that result for its gradient, or a view of it, then saves
the recipe instead. All that need it share one repetition. The numbers are the same: the same operation runs again on
the same inputs.

The hooks are autograd's (`torch.autograd.graph.saved_tensors_hooks`), so custom operations need nothing of their own.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_local = threading.local()


class _Recipe:
    """How one result is made again, and how many times it is still wanted."""

    def __init__(self, out: Tensor, make: Callable[[], Tensor]) -> None:
        self.layout = (out.shape, out.stride(), out.dtype)
        self._make, self.uses, self._value = make, 0, None

    @torch.no_grad()
    def take(self) -> Tensor:
        value = self._make() if self._value is None else self._value
        assert (value.shape, value.stride(), value.dtype) == self.layout, "made again with another layout"
        self.uses -= 1
        self._value = value if self.uses > 0 else None
        return value


class _View(NamedTuple):
    """A saved tensor as a view of a result that is to be made again."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Selection:
    """The results of one piece of a forward pass that can be made again, by the storage they lie in."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[_Recipe, Tensor]] = {}  # the tensor: its storage must not be given to another
        self.hooks = saved_tensors_hooks(self.pack, self.unpack)

    def add(self, out: Tensor, make: Callable[[], Tensor]) -> None:
        assert out.is_contiguous()
        assert out.storage_offset() == 0
        self._known[out.untyped_storage()._cdata] = (_Recipe(out, make), out)

    def pack(self, saved: Tensor) -> Tensor | _View:
        found = self._known.get(saved.untyped_storage()._cdata)
        if found is None:
            return saved
        recipe = found[0]
        recipe.uses += 1
        return _View(recipe, saved.shape, saved.stride(), int(saved.storage_offset()))

    def forget(self) -> None:
        """Let go of the results; autograd keeps the hooks, and so this object, until the backward pass."""
        self._known.clear()

    @staticmethod
    def unpack(saved: Tensor | _View) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        return saved.recipe.take().as_strided(saved.size, saved.stride, saved.offset)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        self.hooks.__exit__()
        try:
            yield
        finally:
            self.hooks.__enter__()


@contextmanager
def selective() -> Iterator[None]:
    """What `remade` says inside holds until the end of this context; contexts do not nest."""
    assert getattr(_local, "selection", None) is None, "contexts do not nest"
    selection = _local.selection = _Selection()
    try:
        with selection.hooks:
            yield
    finally:
        _local.selection = None
        selection.forget()


def remade(out: Tensor, operation: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`out`, a contiguous result of its own, which `operation(*inputs)` makes again; the inputs must be kept anyway."""
    if not torch.compiler.is_compiling():
        selection: _Selection | None = getattr(_local, "selection", None)
        if selection is not None:
            selection.add(out, partial(operation, *(x.detach() for x in inputs)))
    return out


def set_aside() -> AbstractContextManager[None]:
    """A context in which everything is kept: for compiled operations, which have ideas of their own about what they
    save."""
    if torch.compiler.is_compiling():
        return nullcontext()
    selection: _Selection | None = getattr(_local, "selection", None)
    return nullcontext() if selection is None else selection.suspended()
