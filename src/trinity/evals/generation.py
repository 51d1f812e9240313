"""Greedy answers of a model, as evaluations need them."""

from collections.abc import Callable, Sequence

from trinity.infer.engine import Engine
from trinity.infer.sampling import SamplingParams
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer

CACHE_TOKENS = 1 << 18
"""Tokens that the engine may hold at a time, unless one prompt needs more: bounds the memory of an evaluation."""

Complete = Callable[[Sequence[Sequence[int]], int], list[str]]
"""(prompts, most new tokens) -> texts, each cut at the end of a turn or document."""


def greedy(model: Transformer, tokenizer: Tokenizer) -> Complete:
    """The model's most probable continuations."""

    def complete(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        longest = max(map(len, prompts)) + max_new_tokens
        engine = Engine(model, tokenizer, max_tokens=max(CACHE_TOKENS, longest))
        params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, stop_ids=tuple(tokenizer.stop_ids))
        return [completion.text for completion in engine.generate(prompts, params)]

    return complete
