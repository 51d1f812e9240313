"""Decorators of torch, typed."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.autograd import function

F = TypeVar("F", bound=Callable[..., Any])


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of that name, typed: a second derivative raises an error instead of being silently wrong."""
    return function.once_differentiable(backward)


def uncompiled(work: F) -> F:
    """`work` is not traced into a compiled graph: the graph ends before it, and another begins after it."""
    return cast("F", torch.compiler.disable(work))
