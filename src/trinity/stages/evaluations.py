"""The evaluations of `evals/` as the training loop calls them: by cadence, with records for the run directory."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from trinity.data.shards import Shards
from trinity.evals import heldout, niah
from trinity.evals.generation import Complete, greedy
from trinity.evals.needles import Half, Haystack
from trinity.stages.setup import Stage
from trinity.tokenizer import Tokenizer
from trinity.train.job import Evaluation, Outcome

_PROMPT_TOKENS = 24
_SAMPLE_TOKENS = 48
_HAYSTACK_DOCUMENTS = 64
_HAYSTACK_TOKENS = 65536  # of one document: a book is longer than any haystack needs


def heldout_evaluation(stage: Stage, rows: heldout.HeldOut) -> Evaluation:
    """Loss and bits per byte every `eval_every` steps and at the end."""
    bytes_V = heldout.token_bytes(stage.tokenizer, stage.config.model.vocab_size)

    def run(model: nn.Module, step: int) -> Outcome:
        return Outcome([{"kind": "eval", **heldout.evaluate(model, rows, bytes_V, stage.settings.micro_rows)}])

    return Evaluation(run, stage.settings.eval_every)


def sample_evaluation(stage: Stage, prompts: Sequence[Sequence[int]]) -> Evaluation:
    """Greedy continuations of fixed prompts every `eval_every` steps and at the end, for samples.jsonl."""
    texts = [stage.tokenizer.decode(prompt) for prompt in prompts]

    def run(model: nn.Module, step: int) -> Outcome:
        answers = greedy(model, stage.tokenizer)(prompts, _SAMPLE_TOKENS) if prompts else []
        return Outcome(samples=[{"prompt": p, "text": a} for p, a in zip(texts, answers, strict=True)])

    return Evaluation(run, stage.settings.eval_every)


def score_evaluation(stage: Stage, name: str, score: Callable[[Complete], dict[str, Any]]) -> Evaluation:
    """A `score` record (value, standard error, samples) every `eval_every` steps and at the end."""

    def run(model: nn.Module, step: int) -> Outcome:
        return Outcome([{"kind": "score", "name": name, **score(greedy(model, stage.tokenizer))}])

    return Evaluation(run, stage.settings.eval_every)


def niah_evaluation(stage: Stage, haystack: Haystack, every: int, stop_at: float) -> Evaluation:
    """MK-NIAH on the grid of `eval`; ends the stage when the score at the stage's row length reaches `stop_at` < 1."""
    asked = niah.questions(stage.tokenizer, stage.config.eval, stage.config.runtime.seed, haystack)
    length = max(q.length for q in asked if q.length <= stage.settings.seq_len)

    def run(model: nn.Module, step: int) -> Outcome:
        record = niah.evaluate(greedy(model, stage.tokenizer), stage.tokenizer, asked)
        reached = niah.score_at(record, length)
        stop = f"MK-NIAH at {length} tokens reached {reached:.3f}" if stop_at < 1 and reached >= stop_at else None
        return Outcome([{"kind": "niah", **record}], stop=stop)

    return Evaluation(run, every)


def beginnings(shards: Shards, most: int = 4) -> list[list[int]]:
    """The first tokens of a document from each of the first domains: prompts for samples."""
    first = {int(domain): doc for doc, domain in reversed(list(enumerate(shards.domain_ids.tolist())))}
    docs = [first[domain] for domain in sorted(first)][:most]
    return [shards.tokens(doc, 0, min(_PROMPT_TOKENS, int(shards.lengths[doc]) - 1)).tolist() for doc in docs]


def haystack(shards: Shards, tokenizer: Tokenizer, half: Half) -> Haystack:
    """Real documents of one half for needles to hide in, the longest of each domain first; noise if there are none."""
    order = sorted(range(shards.num_documents), key=lambda doc: -int(shards.lengths[doc]))[:_HAYSTACK_DOCUMENTS]
    texts = [
        tokenizer.decode(shards.tokens(doc, 0, min(_HAYSTACK_TOKENS, int(shards.lengths[doc]))), skip_special=True)
        for doc in order
    ]
    return Haystack.of(half, texts)
