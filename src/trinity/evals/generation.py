"""Greedy answers of a model, as evaluations need them."""

from collections.abc import Callable, Sequence

from trinity.infer.engine import Engine
from trinity.infer.prefix import answer_after, groups
from trinity.infer.sampling import SamplingParams
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer

CACHE_TOKENS = 1 << 18
"""Tokens that the engine may hold at a time, unless one prompt needs more: bounds the memory of an evaluation."""

PREFILL_CHUNK = 8192
"""Prompt tokens of one forward pass on a GPU: no one waits for an answer meanwhile."""
TOGETHER = 16
"""Questions about one text that are answered together at most."""

Complete = Callable[[Sequence[Sequence[int]], int], list[str]]
"""(prompts, most new tokens) -> texts, each cut at the end of a turn or document."""


def greedy(model: Transformer, tokenizer: Tokenizer) -> Complete:
    """The model's most probable continuations. Of neighbouring prompts that begin alike, the beginning is read once."""
    chunk = PREFILL_CHUNK if model.embed.weight.device.type == "cuda" else PREFILL_CHUNK // 8

    def engine_for(longest: int, max_batch: int, *, whole: bool = False) -> Engine:
        room = max(CACHE_TOKENS, longest * (max_batch if whole else 1))
        return Engine(model, tokenizer, max_batch=max_batch, max_tokens=room, prefill_chunk=chunk)

    def complete(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        longest = max(map(len, prompts)) + max_new_tokens
        stop_ids = tuple(tokenizer.stop_ids)
        found = groups(prompts)
        texts = [""] * len(prompts)
        alone = [numbers[0] for numbers, common in found if not common]
        if alone:
            params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, stop_ids=stop_ids)
            completions = engine_for(longest, 32).generate([prompts[number] for number in alone], params)
            for number, completion in zip(alone, completions, strict=True):
                texts[number] = completion.text
        together = [(numbers, common) for numbers, common in found if common]
        if together:
            most = min(TOGETHER, max(len(numbers) for numbers, _ in together))
            slots = 1 + max(1, min(most, CACHE_TOKENS // longest - 1))
            engine = engine_for(longest, slots, whole=True)
            engine.cache.reserve(slots, longest)  # a cache that grows moves
            for numbers, common in together:
                tails = [prompts[number][common:] for number in numbers]
                answers = answer_after(engine, prompts[numbers[0]][:common], tails, max_new_tokens, stop_ids)
                for number, answer in zip(numbers, answers, strict=True):
                    texts[number] = tokenizer.decode(answer, skip_special=True)
        return texts

    return complete
