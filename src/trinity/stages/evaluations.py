"""The evaluations of `evals/` as the training loop calls them: by cadence, with records for the run directory."""

from collections.abc import Sequence

from torch import nn

from trinity.data.chat import Conversation
from trinity.data.shards import Shards
from trinity.evals import arithmetic, chat_format, heldout, niah
from trinity.evals.generation import greedy
from trinity.evals.needles import Half, Haystack
from trinity.stages.setup import Stage
from trinity.tokenizer import Tokenizer
from trinity.train.job import Evaluation, Outcome

_PROMPT_TOKENS = 24
_SAMPLE_TOKENS = 48
_KEPT_ANSWERS = 4
_HAYSTACK_DOCUMENTS = 64
_HAYSTACK_TOKENS = 65536  # of one document: a book is longer than any haystack needs


def heldout_evaluation(stage: Stage, rows: heldout.HeldOut) -> Evaluation:
    """Loss and bits per byte before the first step, every `eval_every` steps and at the end."""
    bytes_V = heldout.token_bytes(stage.tokenizer, stage.config.model.vocab_size)

    def run(_model: nn.Module, _step: int) -> Outcome:
        return Outcome([{"kind": "eval", **heldout.evaluate(stage.model, rows, bytes_V, stage.settings.micro_rows)}])

    return Evaluation(run, stage.settings.eval_every, at_start=True, at_phase_end=True)


def sample_evaluation(stage: Stage, prompts: Sequence[Sequence[int]]) -> Evaluation:
    """Greedy continuations of fixed prompts every `eval_every` steps and at the end, for samples.jsonl."""
    texts = [stage.tokenizer.decode(prompt) for prompt in prompts]

    def run(_model: nn.Module, _step: int) -> Outcome:
        if not stage.generates:
            return Outcome()
        with stage.gathered():
            answers = greedy(stage.model, stage.tokenizer)(prompts, _SAMPLE_TOKENS) if prompts else []
        return Outcome(samples=[{"prompt": p, "text": a} for p, a in zip(texts, answers, strict=True)])

    return Evaluation(run, stage.settings.eval_every)


def template_evaluation(stage: Stage, prompts: Sequence[list[int]], max_new_tokens: int) -> Evaluation:
    """`score` records `template`: the share of sampled answers that keep to the chat template, before the first step,
    every `eval_every` steps and at the end; the first answers go to samples.jsonl."""

    def run(_model: nn.Module, _step: int) -> Outcome:
        if not stage.generates:
            return Outcome()
        with stage.gathered():
            answers = chat_format.sample_answers(stage.model, stage.tokenizer, prompts, max_new_tokens)
        samples = [
            {"prompt": stage.tokenizer.decode(a.prompt), "text": a.text, "template": a.wrong or "kept"}
            for a in answers[:_KEPT_ANSWERS]
        ]
        return Outcome([{"kind": "score", "name": "template", **chat_format.summary(answers)}], samples)

    return Evaluation(run, stage.settings.eval_every, at_start=True)


def arithmetic_evaluation(stage: Stage, form: arithmetic.Form) -> Evaluation:
    """`score` records before the first step, every `eval_every` steps and at the end: `arithmetic` on problems that no
    stage trains on, and `arithmetic_seen` on those that generated training data is made of."""
    count, most = stage.config.eval.arithmetic_questions, stage.config.rl.max_number
    asked = {
        name: arithmetic.questions(stage.tokenizer, count, most, form=form, held_out=name == "arithmetic")
        for name in ("arithmetic", "arithmetic_seen")
    }

    def run(_model: nn.Module, _step: int) -> Outcome:
        if not stage.generates:
            return Outcome()
        complete = greedy(stage.model, stage.tokenizer)
        with stage.gathered():
            scores = {name: arithmetic.evaluate(complete, questions) for name, questions in asked.items()}
        return Outcome([{"kind": "score", "name": name, **score} for name, score in scores.items()])

    return Evaluation(run, stage.settings.eval_every, at_start=True)


def niah_evaluation(stage: Stage, haystack: Haystack, every: int, stop_at: float) -> Evaluation:
    """MK-NIAH on the grid of `eval`; ends the stage when the score at the stage's row length reaches `stop_at` < 1."""
    asked = niah.questions(stage.tokenizer, stage.config.eval, stage.config.runtime.seed, haystack)
    length = max(q.length for q in asked if q.length <= stage.settings.seq_len)

    def run(_model: nn.Module, _step: int) -> Outcome:
        if not stage.generates:
            return Outcome()
        with stage.gathered():
            record = niah.evaluate(greedy(stage.model, stage.tokenizer), stage.tokenizer, asked)
        reached = niah.score_at(record, length)
        stop = f"MK-NIAH at {length} tokens reached {reached:.3f}" if stop_at < 1 and reached >= stop_at else None
        return Outcome([{"kind": "niah", "haystack": haystack.kind, **record}], stop=stop)

    return Evaluation(run, every, at_start=True)


def beginnings(shards: Shards, most: int = 4) -> list[list[int]]:
    """The first tokens of a document from each of the first domains: prompts for samples."""
    first = {int(domain): doc for doc, domain in reversed(list(enumerate(shards.domain_ids.tolist())))}
    docs = [first[domain] for domain in sorted(first)][:most]
    return [shards.tokens(doc, 0, min(_PROMPT_TOKENS, int(shards.lengths[doc]) - 1)).tolist() for doc in docs]


def turn_prompt(tokenizer: Tokenizer, conversation: Conversation, turn: int) -> list[int]:
    """The conversation up to one of its answers (modulo their number), as a prompt for it."""
    places = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    until = places[turn % len(places)]
    ids, _ = tokenizer.encode_chat(conversation.messages[:until], conversation.tools, add_generation_prompt=True)
    return ids


def haystack(shards: Shards, tokenizer: Tokenizer, half: Half) -> Haystack:
    """Real documents of one half for needles to hide in, the longest of each domain first; noise if there are none."""
    order = sorted(range(shards.num_documents), key=lambda doc: -int(shards.lengths[doc]))[:_HAYSTACK_DOCUMENTS]
    texts = [
        tokenizer.decode(shards.tokens(doc, 0, min(_HAYSTACK_TOKENS, int(shards.lengths[doc]))), skip_special=True)
        for doc in order
    ]
    return Haystack.of(half, texts)
