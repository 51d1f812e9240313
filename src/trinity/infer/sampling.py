"""Choosing the next token: temperature, truncation, penalty, and a random stream of each request's own."""

import dataclasses
import math
import secrets
from collections.abc import Sequence

import numpy as np
import torch

from trinity.base.errors import UsageError

HEAD = 1024
"""Tokens that top-p ranks before it ranks all."""


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
    tempered_logprobs: bool = False
    """Report log-probabilities after the temperature (a temperature of 0 leaves them): what a trainer needs whose
    policy is the tempered distribution."""

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
    The log-probability is the model's own, log_softmax of the logits as they came: neither truncation nor penalty
    changes it, and the temperature only where `tempered_logprobs` says so, so that a trainer which scores the same
    tokens finds the same number.
    """
    logits_BV = logits_BV.float()
    logprobs_BV = _logprobs(logits_BV, params)
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


def _logprobs(logits_BV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    temperatures = [(p.temperature or 1.0) if p.tempered_logprobs else 1.0 for p in params]
    if any(t != 1.0 for t in temperatures):
        shifted_BV = logits_BV - logits_BV.amax(-1, keepdim=True)  # a tiny temperature gives -inf, not inf - inf
        logits_BV = shifted_BV / torch.tensor(temperatures, device=logits_BV.device)[:, None]
    return logits_BV.log_softmax(-1)


def most_probable(
    logits_BV: torch.Tensor, params: Sequence[SamplingParams], vocab_size: int | None = None
) -> list[list[tuple[int, float]]]:
    """For each row its `top_logprobs` most probable tokens with their log-probabilities, descending.

    As in `sample`, the log-probabilities are the model's own, and ids from `vocab_size` on never come.
    """
    count = max(p.top_logprobs for p in params)
    if count == 0:
        return [[] for _ in params]
    logprobs_BV = _logprobs(logits_BV.float(), params)[:, :vocab_size]
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


def num_kept(
    sorted_BK: torch.Tensor, total_B1: torch.Tensor, params: Sequence[SamplingParams], vocab: int
) -> torch.Tensor:
    """How many of the most probable tokens top-k, then top-p, then min-p leave: int64 [B], at least one.

    sorted_BK: the K largest of each row's unnormalised probabilities, descending; total_B1: the sum of all `vocab`.
    Each rule sees the distribution that the rule before it left, renormalised. Where a row's rules would leave more
    than K, it is K.
    """
    device, K = sorted_BK.device, sorted_BK.shape[1]
    most_B1 = torch.tensor([p.top_k or vocab for p in params], device=device)[:, None]
    weights_BK = sorted_BK * (torch.arange(K, device=device) < most_B1)
    kept_BK = weights_BK > 0
    if any(p.top_p < 1 for p in params):
        total_B1 = torch.where(most_B1 < vocab, weights_BK.sum(-1, keepdim=True), total_B1)
        before_BK = (weights_BK.cumsum(-1) - weights_BK) / total_B1
        top_p_B = torch.tensor([p.top_p if p.top_p < 1 else 2.0 for p in params], dtype=weights_BK.dtype, device=device)
        kept_BK &= before_BK < top_p_B[:, None]
    if any(p.min_p for p in params):
        kept_BK &= weights_BK >= _min_p(params, weights_BK) * weights_BK[:, :1]
    return kept_BK.sum(-1).clamp(min=1)


def kept_by_sorting(weights_BV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Which tokens the rules leave, bool [B, V]: the reference of `kept`, which sorts whole rows.

    Of tokens that are equally probable the one with the smaller number comes first.
    """
    sorted_BV, order_BV = weights_BV.sort(dim=-1, descending=True, stable=True)
    count_B = num_kept(sorted_BV, weights_BV.sum(-1, keepdim=True), params, weights_BV.shape[1])
    first_BV = torch.arange(weights_BV.shape[1], device=weights_BV.device) < count_B[:, None]
    return torch.zeros_like(first_BV).scatter(1, order_BV, first_BV)


def kept(weights_BV: torch.Tensor, params: Sequence[SamplingParams], head: int = HEAD) -> torch.Tensor | None:
    """As `kept_by_sorting`, from the largest entries alone; None: no rule leaves anything out.

    Without top-p the host does not wait. With it, `head` tokens are ranked first, and whole rows only where these do
    not hold the share that was asked for.
    """
    vocab = weights_BV.shape[1]
    ranked = [bool(p.top_k) or p.top_p < 1 for p in params]
    by_share = [p.top_p < 1 and not p.top_k for p in params]
    if not any(ranked) and not any(p.min_p for p in params):
        return None
    # min-p alone compares with the largest entry and needs no ranks.
    probable_BV = weights_BV >= _min_p(params, weights_BV) * weights_BV.amax(-1, keepdim=True)
    if not any(ranked):
        return probable_BV
    total_B1 = weights_BV.sum(-1, keepdim=True)
    K = min(vocab, max(max(p.top_k for p in params), head if any(by_share) else 1))
    sorted_BK = weights_BV.topk(K, dim=-1).values
    count_B = num_kept(sorted_BK, total_B1, params, vocab)
    if any(by_share) and vocab > K:
        counts = count_B.tolist()  # the host waits
        if any(open_ended and count == K for open_ended, count in zip(by_share, counts, strict=True)):
            sorted_BK = weights_BV.sort(dim=-1, descending=True).values
            count_B = num_kept(sorted_BK, total_B1, params, vocab)
    # Ranks by values, so that ties are broken by number whatever topk does.
    lowest_B1 = sorted_BK.gather(1, count_B[:, None] - 1)
    above_BV, equal_BV = weights_BV > lowest_B1, weights_BV == lowest_B1
    room_B1 = count_B[:, None] - above_BV.sum(-1, keepdim=True)
    first_BV = above_BV | (equal_BV & (equal_BV.cumsum(-1, dtype=torch.int32) <= room_B1))
    return torch.where(torch.tensor(ranked, device=weights_BV.device)[:, None], first_BV, probable_BV)


def _min_p(params: Sequence[SamplingParams], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([p.min_p for p in params], dtype=like.dtype, device=like.device)[:, None]


def _draw(scores_BV: torch.Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]) -> torch.Tensor:
    """Inverse of the cumulative distribution at `uniform`, tokens in the order of their numbers."""
    device = scores_BV.device
    temperature_B = torch.tensor([p.temperature or 1.0 for p in params], device=device)
    # Shifted before the division, so that a tiny temperature gives -inf and not inf - inf.
    shifted_BV = (scores_BV - scores_BV.amax(-1, keepdim=True)) / temperature_B[:, None]
    # float64: at 200 000 entries the rounding of a float32 sum is larger than the probability of rare tokens.
    weights_BV = shifted_BV.double().exp()
    # Rows that take the most probable token are not drawn from: no rule is worth looking at.
    kept_BV = kept(weights_BV, [p if p.temperature > 0 else SamplingParams() for p in params])
    if kept_BV is not None:
        weights_BV = weights_BV * kept_BV
    total_BV = weights_BV.cumsum(-1)
    point_B = torch.tensor(uniform, dtype=torch.float64, device=device) * total_BV[:, -1]
    place_B = torch.searchsorted(total_BV, point_B[:, None], right=True)[:, 0]
    # Rounding may put the point on the total: the last token of positive probability.
    last_B = (total_BV < total_BV[:, -1:]).sum(-1)
    return place_B.minimum(last_B)
