"""What the hand-written gradients share."""

from collections.abc import Callable
from typing import Any

from torch.autograd import function


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of that name, typed: a second derivative raises an error instead of being silently wrong."""
    return function.once_differentiable(backward)
