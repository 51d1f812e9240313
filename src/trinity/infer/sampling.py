"""Choosing the next token: temperature, truncation, penalty, and a random stream of each request's own."""

import dataclasses
import math
import secrets
from collections.abc import Sequence

import numpy as np
import torch

from trinity.base.errors import UsageError


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Raises UsageError for a value outside its range."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    """0 always takes the most probable token."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens that holds this probability."""
    min_p: float = 0.0
    """Keep tokens of at least this share of the highest probability."""
    repetition_penalty: float = 1.0
    """Divide positive logits, multiply negative ones, of every token of the prompt and the answer so far."""
    seed: int | None = None
    """Start of the request's random stream; the same seed gives the same tokens in any batch. None draws one."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer; the token is part of `Completion.tokens`, not of the text."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; the text is cut before them."""
    top_logprobs: int = 0
    """Report this many most probable tokens beside each chosen one."""

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
            "top_logprobs": (self.top_logprobs >= 0, "0 (none) or more"),
            "stop": (all(self.stop), "without empty strings"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
        }
        for name, (good, allowed) in ranges.items():
            if not good:
                raise UsageError(f"{name} = {getattr(self, name)!r} must be {allowed}")


class TokenStream:
    """Uniform numbers in [0, 1), one a token, which depend on the seed alone: not on the batch, not on the device."""

    def __init__(self, seed: int | None) -> None:
        self._random = np.random.Generator(np.random.PCG64(secrets.randbits(63) if seed is None else seed))

    def next(self) -> float:
        return float(self._random.random())


def sample(
    logits_BV: torch.Tensor,
    params: Sequence[SamplingParams],
    uniform: Sequence[float],
    seen: Sequence[torch.Tensor | None],
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens [B] int64 and their log-probabilities [B] float32.

    `uniform` has one number in [0, 1) a row; `seen` marks, bool [V], the tokens of the prompt and the answer so far
    in rows with a repetition penalty. Ids from `vocab_size` on, which the tokenizer does not have, never come.
    The log-probability is the model's own, log_softmax of the logits as they came: neither temperature nor truncation
    nor penalty changes it, so that a trainer which scores the same tokens finds the same number.
    """
    logits_BV = logits_BV.float()
    logprobs_BV = logits_BV.log_softmax(-1)
    scores_BV = _penalise(logits_BV, params, seen)
    if vocab_size is not None and vocab_size < scores_BV.shape[1]:
        padding_V = torch.arange(scores_BV.shape[1], device=scores_BV.device) >= vocab_size
        scores_BV = scores_BV.masked_fill(padding_V, -torch.inf)
    tokens_B = scores_BV.argmax(-1)
    if any(p.temperature > 0 for p in params):
        drawn_B = _draw(scores_BV, params, uniform)
        random_B = torch.tensor([p.temperature > 0 for p in params], device=logits_BV.device)
        tokens_B = torch.where(random_B, drawn_B, tokens_B)
    return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0]


def most_probable(
    logits_BV: torch.Tensor, params: Sequence[SamplingParams], vocab_size: int | None = None
) -> list[list[tuple[int, float]]]:
    """For each row its `top_logprobs` most probable tokens with their log-probabilities, descending.

    As in `sample`, the log-probabilities are the model's own, and ids from `vocab_size` on never come.
    """
    count = max(p.top_logprobs for p in params)
    if count == 0:
        return [[] for _ in params]
    logprobs_BV = logits_BV.float().log_softmax(-1)[:, :vocab_size]
    top = logprobs_BV.topk(min(count, logprobs_BV.shape[1]), dim=-1)
    rows = zip(top.indices.tolist(), top.values.tolist(), params, strict=True)
    return [list(zip(ids, values, strict=True))[: p.top_logprobs] for ids, values, p in rows]


def _penalise(
    logits_BV: torch.Tensor, params: Sequence[SamplingParams], seen: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    if all(p.repetition_penalty == 1.0 for p in params):
        return logits_BV
    rows = []
    for scores_V, p, seen_V in zip(logits_BV, params, seen, strict=True):
        if p.repetition_penalty != 1.0:
            assert seen_V is not None
            factor = torch.where(scores_V > 0, 1 / p.repetition_penalty, p.repetition_penalty)
            scores_V = torch.where(seen_V, scores_V * factor, scores_V)
        rows.append(scores_V)
    return torch.stack(rows)


def truncate(probs_BV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Zero what top-k, then top-p, then min-p leave out; rows are descending. The first token always stays.

    Each rule sees the distribution that the rule before it left, renormalised.
    """
    device = probs_BV.device
    vocab = probs_BV.shape[1]
    if any(p.top_k for p in params):
        keep_B = torch.tensor([p.top_k or vocab for p in params], device=device)
        probs_BV = probs_BV * (torch.arange(vocab, device=device) < keep_B[:, None])
    if any(p.top_p < 1 for p in params):
        total_B1 = probs_BV.sum(-1, keepdim=True)
        before_BV = (probs_BV.cumsum(-1) - probs_BV) / total_B1
        top_p_B = torch.tensor([p.top_p if p.top_p < 1 else 2.0 for p in params], dtype=probs_BV.dtype, device=device)
        probs_BV = probs_BV * (before_BV < top_p_B[:, None])
    if any(p.min_p for p in params):
        min_p_B = torch.tensor([p.min_p for p in params], dtype=probs_BV.dtype, device=device)
        probs_BV = probs_BV * (probs_BV >= min_p_B[:, None] * probs_BV[:, :1])
    return probs_BV


def _draw(scores_BV: torch.Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]) -> torch.Tensor:
    """Inverse of the cumulative distribution at `uniform`, tokens in descending order of probability."""
    device = scores_BV.device
    temperature_B = torch.tensor([p.temperature or 1.0 for p in params], device=device)
    # Shifted before the division, so that a tiny temperature gives -inf and not inf - inf.
    shifted_BV = (scores_BV - scores_BV.amax(-1, keepdim=True)) / temperature_B[:, None]
    sorted_BV, order_BV = shifted_BV.sort(dim=-1, descending=True, stable=True)
    # float64: at 200 000 entries the rounding of a float32 sum is larger than the probability of rare tokens.
    probs_BV = truncate(sorted_BV.double().softmax(-1), params)
    total_BV = probs_BV.cumsum(-1)
    point_B = torch.tensor(uniform, dtype=torch.float64, device=device) * total_BV[:, -1]
    place_B = torch.searchsorted(total_BV, point_B[:, None], right=True)[:, 0]
    # Rounding may put the point on the total: the last token of positive probability.
    last_B = (probs_BV > 0).sum(-1) - 1
    return order_BV.gather(1, place_B.minimum(last_B)[:, None])[:, 0]
