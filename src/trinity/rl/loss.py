"""The policy-gradient loss: group-relative advantages, an asymmetric clip, truncated importance sampling, KL penalty.

Sources: group baseline and KL penalty, GRPO (arXiv 2402.03300); token-level normalisation, asymmetric clip, dropping of
groups without variance, penalty of overlong answers, DAPO (arXiv 2503.14476); advantages without the deviation and a
constant divisor, Dr. GRPO (arXiv 2503.20783); truncated importance sampling between sampler and trainer, Yao et al.
2025.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["std", "none"]
Normalise = Literal["token", "answer", "constant"]


def group_advantages(rewards_PG: Tensor, scale: Scale = "std") -> Tensor:
    """Advantages of P prompts with G samples each: reward - group mean, with "std" over the group's standard deviation.

    A group whose rewards are all equal says nothing about what to prefer: its advantages are 0 (`informative` tells).
    """
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if scale == "std":
        centred_PG = centred_PG / rewards_PG.std(dim=1, keepdim=True, correction=0).clamp_min(1e-6)
    return torch.where(informative(rewards_PG)[:, None], centred_PG, 0.0)


def informative(rewards_PG: Tensor) -> Tensor:
    """Whether each group's rewards differ, bool [P]."""
    return (rewards_PG != rewards_PG[:, :1]).any(dim=1)


def overlong_penalty(length: int, most: int, margin: int) -> float:
    """What an answer of `length` tokens loses of its reward: 0 up to `most - margin`, then linearly, 1 at `most`
    (DAPO's soft overlong punishment). `margin` 0: never."""
    return 0.0 if margin == 0 else min(1.0, max(0.0, (length - (most - margin)) / margin))


def length_factors(lengths: Sequence[int], normalise: Normalise, most: int) -> list[float]:
    """Factor of each answer's advantage, so that the sum over tokens divided by the number of tokens is

    token     the mean over all tokens of the step: a long answer weighs more;
    answer    the mean over answers of each answer's mean (GRPO as published): a long answer's tokens weigh less;
    constant  the sum over tokens divided by answers * `most`: a token weighs the same whatever the lengths are.

    A positive factor of the advantage is a factor of the loss, clip included.
    """
    if normalise == "token" or not lengths:
        return [1.0] * len(lengths)
    mean = sum(lengths) / len(lengths)
    return [mean / (max(1, length) if normalise == "answer" else most) for length in lengths]


@dataclass(frozen=True)
class PolicyLoss:
    """`sum` is to be divided by the step's number of completion tokens; the rest is for the log, without gradient."""

    sum: Tensor
    clipped_tokens: Tensor
    """Tokens whose ratio the clip held back."""
    truncated_tokens: Tensor
    """Tokens whose importance weight was truncated."""
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
    `old` are the trainer's log-probabilities before the first update on these samples; the sampler's own may differ,
    because it runs other kernels, in a MoE may pick other experts, and when it works ahead has older weights.
    """
    free_weight_N = (old_logprobs_N - sampler_logprobs_N).exp().detach()
    weight_N = free_weight_N.clamp_max(max_weight)
    ratio_N = (logprobs_N - old_logprobs_N.detach()).exp()
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    free, held = ratio_N * advantages_N, clipped_N * advantages_N
    return PolicyLoss(
        sum=-(weight_N * torch.minimum(free, held)).sum(),
        clipped_tokens=(held < free).sum(),
        truncated_tokens=(free_weight_N > max_weight).sum(),
        gap_sum=divergence((logprobs_N - sampler_logprobs_N).detach()).sum(),
    )


def kl_penalty(logprobs_N: Tensor, start_logprobs_N: Tensor) -> Tensor:
    """Sum over tokens of exp(d) - 1 - d with d = start - logprob: GRPO's estimate of KL(policy || start) on tokens that
    the policy wrote, to be divided as `PolicyLoss.sum`. The gradient of a token is (1 - exp(d)) * dlogprob."""
    return divergence(start_logprobs_N.detach() - logprobs_N).sum()


def divergence(difference: Tensor) -> Tensor:
    """exp(d) - 1 - d of differences d = log q - log p, elementwise: over tokens of p unbiased for KL(p || q), never
    negative (Schulman's k3)."""
    return difference.exp() - 1 - difference
