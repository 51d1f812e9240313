"""Several greedy answers after one long prompt: it is read once, and its cache copied for each question about it."""

from collections.abc import Sequence
from itertools import pairwise

from trinity.infer.engine import Engine
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


def answer_after(
    engine: Engine,
    prefix: Sequence[int],
    tails: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
) -> list[list[int]]:
    """The most probable tokens after `prefix` and each tail (at least one token), up to a stop token, which is left
    out.

    One of the engine's slots holds the prefix meanwhile, the others answer; `max_tokens` must have room for both.
    """
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, stop_ids=tuple(stop_ids))
    read = engine.read(prefix)
    try:
        done = engine.generate([[*prefix, *tail] for tail in tails], params, branch=read)
    finally:
        engine.release(read)
    return [completion.tokens[: -1 if completion.finish == "stop" else None] for completion in done]
