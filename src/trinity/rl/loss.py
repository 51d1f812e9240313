"""The policy-gradient loss: group-relative advantages, an asymmetric clip, truncated importance sampling, no KL term.

Sources: group baseline, GRPO (arXiv 2402.03300); token-level normalisation, asymmetric clip and dropping of groups
without variance, DAPO (arXiv 2503.14476); truncated importance sampling between sampler and trainer, Yao et al. 2025.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def group_advantages(rewards_PG: Tensor) -> Tensor:
    """Advantages of P prompts with G samples each: (reward - group mean) / group standard deviation.

    A group whose rewards are all equal says nothing about what to prefer: its advantages are 0 (`informative` tells).
    """
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    std_P1 = rewards_PG.std(dim=1, keepdim=True, correction=0)
    return torch.where(informative(rewards_PG)[:, None], centred_PG / std_P1.clamp_min(1e-6), 0.0)


def informative(rewards_PG: Tensor) -> Tensor:
    """Whether each group's rewards differ, bool [P]."""
    return (rewards_PG != rewards_PG[:, :1]).any(dim=1)


@dataclass(frozen=True)
class PolicyLoss:
    """`sum` is to be divided by the step's number of completion tokens; the rest is for the log, without gradient."""

    sum: Tensor
    clipped_tokens: Tensor
    """Tokens whose ratio the clip held back."""
    gap_sum: Tensor
    """Sum over tokens of exp(d) - 1 - d with d = trainer - sampler log-probability: an estimate of their KL
    divergence."""


def policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    sampler_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    max_weight: float = 2.0,
) -> PolicyLoss:
    """Loss over the N completion tokens of a micro-batch.

    With r = exp(logprob - old) and w = min(exp(old - sampler), max_weight), token by token:
    -w * min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A).
    `old` are the trainer's log-probabilities under the weights that sampled; the sampler's own may differ, because it
    runs other kernels and, in a MoE, may pick other experts.
    """
    weight_N = (old_logprobs_N - sampler_logprobs_N).exp().clamp_max(max_weight).detach()
    ratio_N = (logprobs_N - old_logprobs_N.detach()).exp()
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    free, held = ratio_N * advantages_N, clipped_N * advantages_N
    gap_N = (logprobs_N - sampler_logprobs_N).detach()
    return PolicyLoss(
        sum=-(weight_N * torch.minimum(free, held)).sum(),
        clipped_tokens=(held < free).sum(),
        gap_sum=(gap_N.exp() - 1 - gap_N).sum(),
    )
