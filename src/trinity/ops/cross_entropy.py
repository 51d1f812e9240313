"""Losses over a large vocabulary without the logits of all tokens.

The logits of `chunk_tokens` tokens exist at a time. `fused_cross_entropy` computes the gradients in the forward pass,
chunk by chunk, so that no logits are kept or computed twice; `token_logprobs` computes them again in the backward
pass, because there the gradient of each token is not known before. A target of -100 gives no loss and a gradient of
exactly zero.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.ops import kernels
from trinity.ops.autograd import once_differentiable
from trinity.ops.matmul import widens

IGNORE = -100


@dataclass(frozen=True)
class CrossEntropy:
    """Sums over the tokens that have a target; scalars. Only `loss_sum` carries a gradient."""

    loss_sum: Tensor
    """ce_sum + z_sum: what to differentiate, after division by the global number of tokens."""
    ce_sum: Tensor
    """Sum of -log p(target), in nats."""
    z_sum: Tensor
    """z_loss * sum of logsumexp(logits)^2: the weight is in it."""
    num_tokens: Tensor
    """int64: tokens that have a target."""
    logit_max: Tensor
    """Largest logit; -inf without tokens."""
    logit_mean: Tensor
    """Mean logit; 0 without tokens."""


def reference_cross_entropy(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, *, z_loss: float = 0.0) -> CrossEntropy:
    """The plain formula, with all logits in fp32."""
    keep_N = targets_N != IGNORE
    logits_NV = F.linear(x_ND[keep_N].float(), head_VD.float())
    ce_sum = F.cross_entropy(logits_NV, targets_N[keep_N], reduction="sum")
    z_sum = z_loss * logits_NV.logsumexp(dim=-1).square().sum()
    detached = logits_NV.detach()
    empty = detached.numel() == 0
    return CrossEntropy(
        loss_sum=ce_sum + z_sum,
        ce_sum=ce_sum.detach(),
        z_sum=z_sum.detach(),
        num_tokens=keep_N.sum(),
        logit_max=detached.new_tensor(float("-inf")) if empty else detached.max(),
        logit_mean=detached.new_zeros(()) if empty else detached.mean(),
    )


def fused_cross_entropy(
    x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, *, z_loss: float = 0.0, chunk_tokens: int = 2048
) -> CrossEntropy:
    """Cross-entropy and z-loss of `x_ND @ head_VD^T` against `targets_N` (int64; -100: no loss), in fp32.

    With gradients enabled the gradients of x and head are computed here and kept until the backward pass: [N, D] and
    [V, D].
    """
    loss_sum, *rest = _FusedCrossEntropy.apply(x_ND, head_VD, targets_N, z_loss, chunk_tokens)
    return CrossEntropy(loss_sum, *rest)


def reference_token_logprobs(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(target) of each token with p = softmax(logits / temperature), fp32 [N]; 0 where the target is -100."""
    keep_N = targets_N != IGNORE
    logprobs_NV = (F.linear(x_ND.float(), head_VD.float()) / temperature).log_softmax(dim=-1)
    picked_N = logprobs_NV.gather(1, targets_N.where(keep_N, 0)[:, None])[:, 0]
    return picked_N.where(keep_N, 0.0)


def token_logprobs(
    x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, *, chunk_tokens: int = 2048, temperature: float = 1.0
) -> Tensor:
    """As the reference, in chunks; differentiable once. The fp32 logits are divided by the temperature."""
    return _TokenLogprobs.apply(x_ND, head_VD, targets_N, chunk_tokens, temperature, False)[0]


def token_logprobs_and_entropies(
    x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, *, chunk_tokens: int = 2048, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and without gradient the entropy in nats of each distribution, fp32 [N]."""
    return _TokenLogprobs.apply(x_ND, head_VD, targets_N, chunk_tokens, temperature, True)


def _chunk_size(chunk_tokens: int, head_VD: Tensor) -> int:
    """Tokens of a chunk; on a CPU its fp32 logits stay near 16 MB: near the cache, yet few passes over the head."""
    if head_VD.device.type == "cpu":
        return min(chunk_tokens, max(64, 2**22 // head_VD.shape[0]))
    return chunk_tokens


def _factors(x_ND: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of the logits in the type in which they are multiplied; the head is widened once, not per chunk."""
    return (x_ND.float(), head_VD.float()) if widens(x_ND) else (x_ND, head_VD)


def _logits(x_CD: Tensor, head_VD: Tensor) -> Tensor:
    """fp32 logits of a chunk. A GPU multiplies bfloat16 and returns the fp32 sums: 8 bits are too few for logits."""
    if x_CD.dtype == torch.bfloat16 and x_CD.device.type == "cuda":
        return torch.mm(x_CD, head_VD.t(), out_dtype=torch.float32)
    return (x_CD @ head_VD.t()).float()


def _tempered(logits_CV: Tensor, temperature: float) -> Tensor:
    """In place; as they came at temperature 1."""
    return logits_CV if temperature == 1.0 else logits_CV.div_(temperature)


def _exponentials_(logits_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of exponentials, logsumexp, maximum) of each row; `logits_CV` becomes exp(logits - maximum)."""
    top_C = logits_CV.amax(dim=-1)
    sum_C = logits_CV.sub_(top_C[:, None]).exp_().sum(dim=-1)
    return sum_C, top_C + sum_C.log(), top_C


def _chunk_gradients(
    d_logits_CV: Tensor, x_CD: Tensor, head_VD: Tensor, d_x_CD: Tensor | None, d_head_VD: Tensor | None
) -> None:
    """Writes d_x of the chunk and adds to the fp32 d_head."""
    d_logits_CV = d_logits_CV.to(x_CD.dtype)
    if d_x_CD is not None:
        d_x_CD.copy_(d_logits_CV @ head_VD)
    if d_head_VD is None:
        return
    if x_CD.dtype == torch.float32:
        d_head_VD.addmm_(d_logits_CV.t(), x_CD)
    elif x_CD.device.type == "cuda":
        d_head_VD.add_(torch.mm(d_logits_CV.t(), x_CD, out_dtype=torch.float32))
    else:
        d_head_VD.add_(d_logits_CV.t() @ x_CD)


def _subtract_targets(d_logits_CV: Tensor, targets_C: Tensor, amount_C: Tensor) -> None:
    d_logits_CV.scatter_add_(1, targets_C[:, None], -amount_C[:, None])


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, z_loss: float, chunk_tokens: int):
        needs_x, needs_head = ctx.needs_input_grad[:2]
        d_x_ND = torch.empty_like(x_ND) if needs_x else None
        d_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if needs_head else None
        chunk_tokens = _chunk_size(chunk_tokens, head_VD)
        ce_sum, z_sum = x_ND.new_zeros(2, dtype=torch.float32).unbind()
        logit_max = x_ND.new_full((), float("-inf"), dtype=torch.float32)
        keep_N = targets_N != IGNORE
        safe_N = targets_N.where(keep_N, 0)
        factor_ND, factor_VD = _factors(x_ND, head_VD)
        for start in range(0, x_ND.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            x_CD, keep_C, target_C = factor_ND[chunk], keep_N[chunk].float(), safe_N[chunk]
            logits_CV = _logits(x_CD, factor_VD)
            if kernels.enabled(x_ND) and x_ND.dtype == torch.bfloat16:
                from trinity.ops.kernels.cross_entropy import chunk_loss

                d_logits_CV = torch.empty_like(logits_CV, dtype=x_ND.dtype) if needs_x or needs_head else None
                stats_3C = chunk_loss(logits_CV, targets_N[chunk], z_loss, IGNORE, d_logits_CV)
                sums_3 = stats_3C.sum(dim=1)
                ce_sum, z_sum = ce_sum + sums_3[0], z_sum + sums_3[1] * z_loss
                logit_max = torch.maximum(logit_max, stats_3C[2].max())
                if d_logits_CV is not None:
                    _chunk_gradients(d_logits_CV, x_CD, factor_VD, None if d_x_ND is None else d_x_ND[chunk], d_head_VD)
                continue
            picked_C = logits_CV.gather(1, target_C[:, None])[:, 0]
            sum_C, lse_C, top_C = _exponentials_(logits_CV)
            ce_sum = ce_sum + ((lse_C - picked_C) * keep_C).sum()
            z_sum = z_sum + (lse_C.square() * keep_C).sum() * z_loss
            logit_max = torch.maximum(logit_max, top_C.where(keep_N[chunk], float("-inf")).max())
            if needs_x or needs_head:
                # d/dlogits of lse - logits[target] + z * lse^2
                d_logits_CV = logits_CV.mul_((keep_C * (1 + 2 * z_loss * lse_C) / sum_C)[:, None])
                _subtract_targets(d_logits_CV, target_C, keep_C)
                _chunk_gradients(d_logits_CV, x_CD, factor_VD, None if d_x_ND is None else d_x_ND[chunk], d_head_VD)
        num_tokens = keep_N.sum()
        # The mean logit is linear in the features: no pass over the logits.
        kept_D = (x_ND * keep_N[:, None]).sum(dim=0, dtype=torch.float32)
        logit_sum = (kept_D * head_VD.mean(dim=0, dtype=torch.float32)).sum()
        logit_mean = logit_sum / num_tokens.clamp(min=1)
        ctx.save_for_backward(d_x_ND, None if d_head_VD is None else d_head_VD.to(head_VD.dtype))
        loss_sum = ce_sum + z_sum
        rest = ce_sum, z_sum, num_tokens, logit_max, logit_mean
        ctx.mark_non_differentiable(*rest)
        return loss_sum, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        d_loss = d_outputs[0]
        d_x_ND, d_head_VD = ctx.saved_tensors
        d_x_ND, d_head_VD = (None if d is None else d * d_loss.to(d.dtype) for d in (d_x_ND, d_head_VD))
        return d_x_ND, d_head_VD, None, None, None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x_ND: Tensor,
        head_VD: Tensor,
        targets_N: Tensor,
        chunk_tokens: int,
        temperature: float,
        with_entropies: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_ND, head_VD, targets_N)
        ctx.temperature = temperature
        ctx.chunk_tokens = chunk_tokens = _chunk_size(chunk_tokens, head_VD)
        keep_N = targets_N != IGNORE
        safe_N = targets_N.where(keep_N, 0)
        factor_ND, factor_VD = _factors(x_ND, head_VD)
        logprobs_N, entropies_N = x_ND.new_zeros(2, x_ND.shape[0], dtype=torch.float32)
        for start in range(0, x_ND.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits_CV = _tempered(_logits(factor_ND[chunk], factor_VD), temperature)
            lse_C = logits_CV.logsumexp(dim=-1)
            logprobs_N[chunk] = logits_CV.gather(1, safe_N[chunk, None])[:, 0] - lse_C
            if with_entropies:
                share_CV = (logits_CV - lse_C[:, None]).exp_()
                entropies_N[chunk] = lse_C - torch.linalg.vecdot(share_CV, logits_CV)
        ctx.mark_non_differentiable(entropies_N)
        return logprobs_N.where(keep_N, 0.0), entropies_N

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        x_ND, head_VD, targets_N = ctx.saved_tensors
        needs_x, needs_head = ctx.needs_input_grad[:2]
        d_x_ND = torch.empty_like(x_ND) if needs_x else None
        d_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if needs_head else None
        keep_N = targets_N != IGNORE
        d_N = d_outputs[0].float().where(keep_N, 0.0)
        safe_N = targets_N.where(keep_N, 0)
        factor_ND, factor_VD = _factors(x_ND, head_VD)
        for start in range(0, x_ND.shape[0], ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            d_C = d_N[chunk]
            d_C = d_C / ctx.temperature
            logits_CV = _tempered(_logits(factor_ND[chunk], factor_VD), ctx.temperature)
            d_logits_CV = torch.softmax(logits_CV, dim=-1).mul_(-d_C[:, None])
            _subtract_targets(d_logits_CV, safe_N[chunk], -d_C)
            _chunk_gradients(
                d_logits_CV, factor_ND[chunk], factor_VD, None if d_x_ND is None else d_x_ND[chunk], d_head_VD
            )
        return d_x_ND, None if d_head_VD is None else d_head_VD.to(head_VD.dtype), None, None, None, None
