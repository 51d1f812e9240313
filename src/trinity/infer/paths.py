"""Which of its two forward passes an engine takes."""

import importlib.util
from typing import Literal

import torch

from trinity.base.errors import UsageError, UserError
from trinity.model.transformer import Transformer

Path = Literal["auto", "reference", "fast"]
WIDEST = 4096
"""Model width that the kernels hold in registers."""


def use_kernels(model: Transformer, path: Path) -> bool:
    """Whether the Triton kernels run; "auto" is on a GPU whenever they serve the model.

    Raises UserError when "fast" is asked for and they do not.
    """
    if path not in ("auto", "reference", "fast"):
        raise UsageError(f"path {path!r} is not one of auto, reference, fast")
    if path == "reference" or (path == "auto" and model.embed.weight.device.type != "cuda"):
        return False
    reason = why_not_kernels(model)
    if reason is not None and path == "fast":
        raise UserError(f"the kernels do not serve this model: {reason}; use the reference path")
    return reason is None


def why_not_kernels(model: Transformer) -> str | None:
    """Why the kernels do not serve a model here; None when they do."""
    config = model.config
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not (config.qk_norm and config.attention_gate):
        return "it lacks QK-norm or the attention gate"
    if model.kernels == "reference":
        return "it was built for the reference path"
    if config.dim > WIDEST:
        return f"dim is above {WIDEST}"
    if model.embed.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its type is {model.embed.weight.dtype}"
    if config.dim % 8 or config.expert_dim % 8:
        return "dim or expert_dim is no multiple of 8"
    return None
