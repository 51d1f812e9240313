# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Triton's language is not typed.
"""Cross-entropy, z-loss and their gradient on a chunk of fp32 logits: two reads, one bfloat16 write."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _chunk(
    logits, targets, d_logits, stats, N, V, z_loss, ignore, BLOCK: tl.constexpr, GRADIENT: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    keep = (target != ignore).to(tl.float32)
    target = tl.where(target != ignore, target, 0)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * V + col, mask=col < V, other=float("-inf"))
        higher = tl.maximum(top, tl.max(value, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(value - higher), 0)
        top = higher
    lse = top + tl.log(total)
    picked = tl.load(logits + row * V + target)
    tl.store(stats + row, tl.where(keep > 0, lse - picked, 0.0))
    tl.store(stats + N + row, tl.where(keep > 0, lse * lse, 0.0))
    tl.store(stats + 2 * N + row, tl.where(keep > 0, top, float("-inf")))
    if GRADIENT:
        # d/dlogits of lse - logits[target] + z * lse^2
        factor = tl.where(keep > 0, (1 + 2 * z_loss * lse) / total, 0.0)
        for start in range(0, V, BLOCK):
            col = start + tl.arange(0, BLOCK)
            value = tl.load(logits + row * V + col, mask=col < V, other=float("-inf"))
            grad = factor * tl.exp(value - top) - tl.where(col == target, keep, 0.0)
            tl.store(d_logits + row * V + col, grad.to(d_logits.dtype.element_ty), mask=col < V)


def chunk_loss(logits_CV: Tensor, targets_C: Tensor, z_loss: float, ignore: int, d_logits_CV: Tensor | None) -> Tensor:
    """[3, C] of each token: cross-entropy, logsumexp^2, largest logit; 0, 0, -inf where the target is `ignore`.

    Writes the gradient of their sum (logsumexp^2 times z_loss) into `d_logits_CV`, if given.
    """
    C, V = logits_CV.shape
    stats_3C = torch.empty(3, C, dtype=torch.float32, device=logits_CV.device)
    gradient = d_logits_CV is not None
    _chunk[(C,)](
        logits_CV, targets_C, d_logits_CV if gradient else logits_CV, stats_3C, C, V, z_loss, ignore,
        BLOCK=min(8192, triton.next_power_of_2(V)), GRADIENT=gradient, num_warps=16,
    )  # fmt: skip
    return stats_3C
