"""Several greedy answers after one long prompt: it is read once, and its cache copied for each question about it."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from trinity.infer.attention import Chunk
from trinity.infer.engine import Engine
from trinity.infer.request import Request
from trinity.infer.sampling import SamplingParams

LEAST = 256
"""Tokens that prompts must share for the copy to be worth it."""


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two prompts have in common at their starts."""
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    low, high = 0, most  # a[:low] is shared, a[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low


def groups(prompts: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
    """Neighbouring prompts that share at least `LEAST` tokens and half of their length: (their numbers, tokens in
    common). One alone shares nothing. The last token of a prompt is never shared: it is what the answer begins from."""
    shared = [shared_length(a, b) for a, b in pairwise(prompts)]
    found: list[tuple[list[int], int]] = []
    for number, prompt in enumerate(prompts):
        common = min(shared[number - 1], len(prompt) - 1) if number else 0
        if found and common >= max(LEAST, len(prompt) // 2):
            numbers, before = found[-1]
            before = before or len(prompts[numbers[0]]) - 1
            if min(before, common) >= max(LEAST, len(prompt) // 2):
                found[-1] = ([*numbers, number], min(before, common))
                continue
        found.append(([number], 0))
    return found


@torch.no_grad()
def answer_after(
    engine: Engine,
    prefix: Sequence[int],
    tails: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    chunk: int,
) -> list[list[int]]:
    """The most probable tokens after `prefix` and each tail (at least one token), up to a stop token, which is left
    out; `chunk` tokens of a prompt are read at a time.

    The engine must be idle; one of its slots holds the prefix, the others answer, as many tails at a time as there are.
    Its cache is empty again afterwards.
    """
    assert engine.num_running == engine.num_waiting == 0
    cache = engine.cache
    training, together = engine.model.training, len(cache.lengths) - 1
    engine.model.eval()
    answers: list[list[int]] = []
    try:
        _read(engine, [(0, prefix)], chunk)
        for start in range(0, len(tails), together):
            answers += _answer(engine, tails[start : start + together], max_new_tokens, stop_ids, chunk)
    finally:
        for slot in range(len(cache.lengths)):
            cache.release(slot)
        engine.model.train(training)
    ends = [next((i for i, token in enumerate(answer) if token in stop_ids), len(answer)) for answer in answers]
    return [answer[:end] for answer, end in zip(answers, ends, strict=True)]


def _answer(
    engine: Engine, tails: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int], chunk: int
) -> list[list[int]]:
    """Answers to tails that fit beside the prefix, which slot 0 holds."""
    cache, slots = engine.cache, list(range(1, 1 + len(tails)))
    for slot in slots:
        cache.release(slot)
        cache.copy(0, slot)
    x_BD = torch.cat([_read(engine, [(slot, tail)], chunk) for slot, tail in zip(slots, tails, strict=True)])
    tokens = _most_probable(engine, engine.model.head(x_BD))
    answers = [[token] for token in tokens]
    ahead = engine._ahead
    if ahead is not None and max_new_tokens > 1:
        ahead.start(slots, tokens)
    for _ in range(max_new_tokens - 1):
        if all(set(answer) & set(stop_ids) for answer in answers):
            break
        if ahead is None:
            parts = [(slot, answer[-1:]) for slot, answer in zip(slots, answers, strict=True)]
            tokens = _most_probable(engine, engine.model.head(_read(engine, parts, chunk)))
        else:
            ahead.launch()
            ahead.send()
            tokens, _, _ = ahead.collect()
        for answer, token in zip(answers, tokens, strict=True):
            answer.append(token)
    return answers


def _read(engine: Engine, parts: Sequence[tuple[int, Sequence[int]]], size: int) -> torch.Tensor:
    """Feed tokens to slots, `size` at a time; features [B, D] after the last token of each. Several parts are of one
    token each."""
    x_BD = torch.empty(0)
    for start in range(0, max(len(tokens) for _, tokens in parts), size):
        chunks = [Chunk(slot, list(tokens[start : start + size])) for slot, tokens in parts]
        params = SamplingParams(max_new_tokens=1, temperature=0.0)
        requests = [Request(chunk.tokens, params, 1, None) for chunk in chunks]
        x_ND, last_B = engine._forward(requests, chunks)
        x_BD = x_ND[last_B]
    return x_BD


def _most_probable(engine: Engine, logits_BV: torch.Tensor) -> list[int]:
    limit = None if engine.decoder is None else engine.decoder.vocab_size
    return logits_BV[:, :limit].argmax(-1).tolist()
