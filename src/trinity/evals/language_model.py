"""What an evaluation asks of a model, in text: log-likelihoods and continuations; answered by the native engine.

The meaning of the three questions is that of the public evaluation harness (`lm_eval.api.model.LM`), so that scores
compare: trailing blanks of a context move to the continuation, a text that is too long loses its beginning, and a text
alone is read in windows of the model's positions of which each token is predicted once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from trinity.infer.engine import Engine
from trinity.infer.sampling import SamplingParams
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer


class Likelihood(NamedTuple):
    """Of a continuation after its context."""

    logprob: float
    """Natural logarithm, summed over the tokens."""
    greedy: bool
    """Whether the continuation is what the most probable tokens give."""


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and where to stop."""

    text: str
    until: tuple[str, ...] = ()
    max_new_tokens: int = 256
    chat: bool = False
    """`text` is a rendered conversation, in which strings such as <|im_end|> are special tokens."""


class LanguageModel(Protocol):
    name: str

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Of each continuation given its context (context, continuation)."""
        ...

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Of each text as a whole."""
        ...

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """The most probable continuation of each, cut before the first stop string."""
        ...

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation as a prompt for the assistant's next turn."""
        ...


class Scored(NamedTuple):
    """Tokens to score: `tokens` are read, the last `count` of them and `last` are predicted."""

    tokens: list[int]
    targets: list[int]


class NativeModel:
    """`LanguageModel` over a model and its tokenizer. batch_tokens: tokens of one forward pass, padding included."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        batch_tokens: int = 16384,
        max_batch: int = 64,
        name: str = "",
    ) -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.batch_tokens, self.max_batch = batch_tokens, max_batch
        self.max_length = model.config.max_positions
        self._device = model.embed.weight.device

    # Tokens

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of context and continuation, cut apart in the tokens of both together. An empty context is the end of
        a document."""
        blanks = len(context) - len(context.rstrip())
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        if not context:
            return [self.tokenizer.eos_id], self.tokenizer.encode(continuation)
        whole = self.tokenizer.encode(context + continuation)
        before = self.tokenizer.encode(context)
        return before, whole[len(before) :]

    def windows(self, tokens: Sequence[int]) -> list[Scored]:
        """Windows of a text: the first reads the end of a document and then the text; each later one reads at least the
        token before what it predicts, the last as much as the model holds."""
        length, eos = self.max_length, self.tokenizer.eos_id
        read = [eos, *tokens]  # read[i] stands before tokens[i]
        found, done = [], 0
        while done < len(tokens):
            end = min(len(tokens), done + length)
            start = max(0, end - length)
            found.append(Scored(read[start:end], list(tokens[done:end])))
            done = end
        return found

    # Scoring

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        scored = []
        for context, continuation in pairs:
            before, after = self.encode_pair(context, continuation)
            both = [*before, *after][-(self.max_length + 1) :]
            scored.append(Scored(both[:-1], after[-self.max_length :] if after else []))
        return self.score(scored)

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        windows = [self.windows(self.tokenizer.encode(text)) for text in texts]
        flat = iter(self.score([window for several in windows for window in several]))
        return [sum(next(flat).logprob for _ in several) for several in windows]

    @torch.no_grad()
    def score(self, scored: Sequence[Scored]) -> list[Likelihood]:
        """Likelihood of each. What is read twice (the choices of one letter after one question) is computed once."""
        results: list[Likelihood | None] = [Likelihood(0.0, True) if not one.targets else None for one in scored]
        places: dict[tuple[int, ...], list[int]] = {}
        for number, one in enumerate(scored):
            if one.targets:
                places.setdefault(tuple(one.tokens), []).append(number)
        for batch in self._batches(sorted(places, key=len, reverse=True)):
            x_BTD = self._features(batch)
            for row, tokens in enumerate(batch):
                numbers = places[tokens]
                most = max(len(scored[number].targets) for number in numbers)
                x_ND = x_BTD[row, len(tokens) - most : len(tokens)]
                logprobs_NV = self.model.head(x_ND).float().log_softmax(-1)
                best_N = logprobs_NV.argmax(-1)
                for number in numbers:
                    targets = scored[number].targets
                    targets_N = torch.tensor(targets, device=self._device)
                    rows_N = torch.arange(most - len(targets), most, device=self._device)
                    total = logprobs_NV[rows_N, targets_N].double().sum()
                    results[number] = Likelihood(float(total), bool((best_N[rows_N] == targets_N).all()))
        assert all(result is not None for result in results)
        return [result for result in results if result is not None]

    def _batches(self, rows: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Rows of falling length, so many that padded to the longest they are `batch_tokens` at most."""
        start = 0
        while start < len(rows):
            count = max(1, min(self.max_batch, self.batch_tokens // len(rows[start])))
            yield rows[start : start + count]
            start += count

    def _features(self, batch: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Outputs of the last layer [B, T, D]; rows are padded on the right with tokens of no segment."""
        longest = max(map(len, batch))
        tokens_BT = torch.full((len(batch), longest), self.tokenizer.pad_id, dtype=torch.int64)
        segments_BT = torch.full((len(batch), longest), -1, dtype=torch.int32)
        for row, tokens in enumerate(batch):
            tokens_BT[row, : len(tokens)] = torch.tensor(tokens)
            segments_BT[row, : len(tokens)] = 0
        positions_BT = torch.arange(longest, dtype=torch.int32).expand(len(batch), -1).contiguous()
        arrays = (array.to(self._device) for array in (tokens_BT, segments_BT, positions_BT))
        return self.model.features(*arrays).x_BTD

    # Generating

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(prompts), self.max_batch):
            texts += self._generate(prompts[start : start + self.max_batch])
        return texts

    def _generate(self, prompts: Sequence[Prompt]) -> list[str]:
        tokens, params = [], []
        for prompt in prompts:
            room = min(prompt.max_new_tokens, self.max_length // 2)
            ids = self.tokenizer.encode(prompt.text, special=prompt.chat) or [self.tokenizer.eos_id]
            tokens.append(ids[-(self.max_length - room) :])
            stops = tuple(self.tokenizer.stop_ids)
            params.append(SamplingParams(max_new_tokens=room, temperature=0.0, stop_ids=stops, stop=prompt.until))
        # As many tokens as the longest ones need together, so that no request is refused.
        most = max(len(ids) + p.max_new_tokens for ids, p in zip(tokens, params, strict=True))
        engine = Engine(self.model, self.tokenizer, max_batch=len(prompts), max_tokens=max(most, 1 << 18))
        return [completion.text for completion in engine.generate(tokens, params)]

    def render_chat(self, messages: Sequence[dict[str, Any]]) -> str:
        return self.tokenizer.render_chat(list(messages), add_generation_prompt=True)
