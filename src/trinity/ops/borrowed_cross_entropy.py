"""The loss over a large vocabulary by libraries, by setting: Liger Kernel's and Apple's cut cross-entropy.

Both run on a GPU only and give what `cross_entropy.fused_cross_entropy` gives but for the largest and the mean logit,
which they do not report (NaN here, absent from the records).
"""

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from trinity.base.errors import UsageError
from trinity.ops.cross_entropy import IGNORE, CrossEntropy, fused_cross_entropy

Kind = Literal["chunked", "liger", "cce"]
PACKAGES = {"liger": ("liger_kernel", "liger-kernel"), "cce": ("cut_cross_entropy", "cut-cross-entropy")}


def check_kind(kind: Kind, z_loss: float, device: torch.device) -> None:
    """Raises UsageError when the library is not installed, does not run here or has no z-loss."""
    if kind == "chunked":
        return
    module, package = PACKAGES[kind]
    if importlib.util.find_spec(module) is None:
        raise UsageError(
            f"loss.cross_entropy = {kind} needs the package {package}: install it, or use loss.cross_entropy=chunked"
        )
    if device.type != "cuda":
        raise UsageError(f"loss.cross_entropy = {kind} runs on a GPU only: use loss.cross_entropy=chunked")
    if kind == "cce" and z_loss:
        raise UsageError(
            f"loss.cross_entropy = cce has no z-loss, and loss.z_loss = {z_loss}: use loss.z_loss=0 or another one"
        )


def cross_entropy(
    kind: Kind, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, *, z_loss: float, chunk_tokens: int
) -> CrossEntropy:
    """As `fused_cross_entropy`, by the path that `kind` names; `check_kind` must have passed."""
    if kind == "chunked":
        return fused_cross_entropy(x_ND, head_VD, targets_N, z_loss=z_loss, chunk_tokens=chunk_tokens)
    unknown = x_ND.new_full((), float("nan"), dtype=torch.float32)
    num_tokens = (targets_N != IGNORE).sum()
    if kind == "liger":
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
            liger_fused_linear_cross_entropy,
        )

        found = liger_fused_linear_cross_entropy(
            x_ND,
            head_VD,
            targets_N,
            ignore_index=IGNORE,
            lse_square_scale=z_loss,
            reduction="sum",
            return_z_loss=True,
            accum_dtype=torch.float32,
        )
        loss_sum, z_sum = found.loss.float(), found.z_loss.detach().float()
        return CrossEntropy(loss_sum, loss_sum.detach() - z_sum, z_sum, num_tokens, unknown, unknown)
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    loss_sum = linear_cross_entropy(x_ND, head_VD, targets_N, ignore_index=IGNORE, reduction="sum").float()
    return CrossEntropy(loss_sum, loss_sum.detach(), torch.zeros_like(unknown), num_tokens, unknown, unknown)
