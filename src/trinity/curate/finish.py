"""The last pass over a block: judge the answers, label what is good, commit it with its provenance."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from trinity.base.rng import bits, derive
from trinity.config.curate import CurateConfig
from trinity.curate.answers import Answer, read_answers
from trinity.curate.blocks import block_path, write_block
from trinity.curate.checks import find_fault
from trinity.curate.clean import count_tokens
from trinity.curate.forms import CodeRunner, MakeRunner, plain, read_form, run_code
from trinity.curate.language import NONE, identify
from trinity.curate.quality import QualityModel, tier
from trinity.curate.recipes import load_recipe, recipe_name
from trinity.curate.requests import Request, Source, kept_sources, requests_of
from trinity.curate.shift import BINS, add_words
from trinity.curate.tally import Tallies, Tally
from trinity.data.overlap import Overlap

NOT_ASKED = "not asked: the budget is used up"
SAMPLES = 3
"""Of each verdict that a block shows in the report."""
SAMPLE_CHARS = 1500
HAYSTACK_CHARS = 40_000
"""Of a long document made for retrieval, at most."""


@cache
def _runner(make: MakeRunner) -> CodeRunner:
    return make()


@dataclass(frozen=True)
class Judges:
    """What all blocks are judged with."""

    quality: QualityModel | None
    tests: Overlap | None
    make_runner: MakeRunner | None
    """Called once in each process that judges programs."""
    report: dict[str, Any] | None = None
    """On the quality model."""


@dataclass
class _Written:
    """One text to be written."""

    text: str
    source: Source
    id: str
    recipe: str
    fingerprint: str = ""
    passage: int = -1
    style: str = ""
    answer: Answer | None = None
    request: Request | None = None


def finish_block(block: int, config: CurateConfig, work: Path, out: Path, judges: Judges) -> dict[str, Any]:
    """Judge, label and commit `out/BLOCK.parquet`; a pure function of the cleaned block and its answers."""
    sources = kept_sources(work, block)
    tallies: Tallies = {}
    samples: list[dict[str, Any]] = []
    written: list[_Written] = []
    use: Counter[str] = Counter()
    troubles: Counter[str] = Counter()
    money = 0.0
    answered: list[tuple[Request, Answer]] = []
    if config.has("rephrase"):
        requests = list(requests_of(sources, config))
        answers = read_answers(work, block)
        tallies["rephrase"] = _collect(requests, answers, config)
        answered = [(r, a) for r in requests if (a := answers.get(r.key)) is not None]
        for _, answer in answered:
            use.update(
                prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens, attempts=answer.attempts
            )
            money += answer.money
            troubles.update(answer.troubles)
        good = [(r, a) for r, a in answered if not a.failure]
        if config.has("validate"):
            tallies["validate"] = _judge(good, sources, config, judges, written, samples)
        else:
            written = [_as_written(r, a, plain(a.text), config) for r, a in good]
    if config.label.keep_sources or not config.has("rephrase"):
        written = [_Written(s.text, s, s.name, "source") for s in sources] + written
    rows, words = _label(written, config, judges, tallies)
    about = {
        "tallies": {name: tally.as_json() for name, tally in tallies.items()},
        "use": {**use, "money": money},
        "troubles": dict(troubles),
        "unasked": tallies["rephrase"].drops[NOT_ASKED] if "rephrase" in tallies else 0,
        "failed": sum(bool(a.failure) for _, a in answered),
        "samples": samples,
        "words": {str(i): int(words[i]) for i in np.flatnonzero(words)},
        "domains": _domains(sources, rows),
    }
    write_block(block_path(out, block), _table(rows), about)
    return about


def _collect(requests: Sequence[Request], answers: dict[str, Answer], config: CurateConfig) -> Tally:
    tally = Tally()
    for request in requests:
        tally.taken += 1
        tally.tokens_in += count_tokens(request.passage, config.tokenizer)
        answer = answers.get(request.key)
        where = f"{request.source.name}, passage {request.number}"
        if answer is None:
            tally.drop(NOT_ASKED, where)
            continue
        tally.seconds += answer.seconds
        if answer.failure:
            tally.drop(answer.failure, f"{where}: {answer.attempts} attempts")
        else:
            tally.given += 1
            tally.tokens_out += count_tokens(answer.text, config.tokenizer)
    return tally


def _judge(
    answered: Sequence[tuple[Request, Answer]],
    sources: Sequence[Source],
    config: CurateConfig,
    judges: Judges,
    written: list[_Written],
    samples: list[dict[str, Any]],
) -> Tally:
    tally = Tally()
    shown: Counter[str] = Counter()
    for request, answer in answered:
        start = time.perf_counter()
        tally.taken += 1
        tokens = count_tokens(answer.text, config.tokenizer)
        tally.tokens_in += tokens
        text, reason = verdict(request, answer, sources, config, judges)
        if reason is None:
            tally.given += 1
            tally.tokens_out += count_tokens(text, config.tokenizer)
            written.append(_as_written(request, answer, text, config))
        else:
            tally.drop(reason, f"{request.source.name}, passage {request.number}")
        kind = reason or "kept"
        if shown[kind] < SAMPLES:
            shown[kind] += 1
            samples.append(
                {
                    "source": request.source.name,
                    "recipe": recipe_name(config.rephrase[request.rewrite].recipe),
                    "verdict": kind,
                    "passage": request.passage[:SAMPLE_CHARS],
                    "text": (text or answer.text)[:SAMPLE_CHARS],
                }
            )
        tally.seconds += time.perf_counter() - start
    return tally


def verdict(
    request: Request, answer: Answer, sources: Sequence[Source], config: CurateConfig, judges: Judges
) -> tuple[str, str | None]:
    """(text to go on with, reason to drop it or None)."""
    settings = config.rephrase[request.rewrite]
    recipe = load_recipe(settings.recipe)
    if answer.finish == "length":
        return "", "cut off at max_tokens"
    found = read_form(recipe.form, answer.text, request.passage, recipe.checks)
    raw = found.text or plain(answer.text)
    reason = find_fault(raw, request.passage, recipe, request.source.language, settings.language)
    if reason is not None and (found.reason is None or reason in ("refusal", "leaked prompt", "empty", "repetition")):
        return "", reason
    if found.reason is not None:
        return "", found.reason
    text = found.text
    if recipe.form == "retrieval":
        made = bury(text, request, sources)
        if made is None:
            return "", "the answer stands elsewhere too"
        text = made
    if recipe.form == "code":
        assert judges.make_runner is not None  # checked before the run
        reason = run_code(text, _runner(judges.make_runner), config.checks.code_seconds)
        if reason is not None:
            return "", reason
    if judges.tests is not None and judges.tests.touched_by(text) is not None:
        return "", "words of a benchmark"
    return text, None


def bury(asked: str, request: Request, sources: Sequence[Source]) -> str | None:
    """The passage among other documents of the block, in an order by hash, then the question and its answer.

    None when the answer stands in another of them.
    """
    answer = asked.rsplit("\nAnswer: ", 1)[1]
    others = [source for source in sources if source.id != request.source.id or source.source != request.source.source]
    draws = bits(derive(request.seed, "haystack"), np.arange(len(others) + 1))
    chosen, size = [], len(request.passage)
    for number in np.argsort(draws[:-1]).tolist():
        text = others[number].text
        if size + len(text) <= HAYSTACK_CHARS:
            chosen.append(text)
            size += len(text)
    if any(answer in text for text in chosen):
        return None
    chosen.insert(int(draws[-1] % np.uint64(len(chosen) + 1)), request.passage)
    return "\n\n".join(chosen) + f"\n\n{asked}"


def _as_written(request: Request, answer: Answer, text: str, config: CurateConfig) -> _Written:
    settings = config.rephrase[request.rewrite]
    name = recipe_name(settings.recipe)
    id = f"{request.source.name}#{name}-{request.rewrite}-{request.number}"
    fingerprint = load_recipe(settings.recipe).fingerprint
    return _Written(text, request.source, id, name, fingerprint, request.number, request.style, answer, request)


def _label(
    written: Sequence[_Written], config: CurateConfig, judges: Judges, tallies: Tallies
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The rows to be written and the words in them."""
    rows: list[dict[str, Any]] = []
    words = np.zeros(BINS, np.int64)
    tally = Tally()
    start = time.perf_counter()
    for one in written:
        tally.taken += 1
        tokens = count_tokens(one.text, config.tokenizer)
        tally.tokens_in += tokens
        score = judges.quality.score(one.text) if judges.quality is not None and config.has("label") else None
        if score is not None and score < config.label.drop_below:
            tally.drop("low quality", one.id)
            continue
        tally.given += 1
        tally.tokens_out += tokens
        if one.recipe != "source":
            add_words(words, one.text)
        rows.append(_row(one, score, tokens, config))
    tally.seconds = time.perf_counter() - start
    tallies["label" if config.has("label") else "write"] = tally
    return rows, words


def _row(one: _Written, score: float | None, tokens: int, config: CurateConfig) -> dict[str, Any]:
    level = None if score is None else tier(score, config.label.tiers)
    domain = one.source.domain
    if config.has("label"):
        suffix = {"source": None, "recipe": one.recipe if one.recipe != "source" else None, "tier": level}
        kind = config.label.domain
        if suffix[kind] is not None:
            domain = f"{domain}-{'tier' if kind == 'tier' else ''}{suffix[kind]}"
    language = identify(one.text, config.filter.min_language_probability)[0] if one.recipe != "source" else None
    answer = one.answer
    return {
        "text": one.text,
        "domain": domain,
        "source": one.source.source if one.recipe == "source" else f"{one.source.source}#{one.recipe}",
        "id": one.id,
        "language": one.source.language if language is None else language,
        "tokens": tokens,
        "quality": score,
        "tier": level,
        "recipe": one.recipe,
        "recipe_fingerprint": one.fingerprint,
        "style": one.style,
        "origin_source": one.source.source,
        "origin_id": one.source.id,
        "origin_domain": one.source.domain,
        "origin_language": one.source.language if one.source.language != NONE else None,
        "origin_hash": one.source.hash.hex(),
        "passage": one.passage,
        "request": one.request.key if one.request is not None else "",
        "seed": one.request.seed if one.request is not None else None,
        "model": answer.model if answer is not None else "",
        "endpoint": answer.endpoint if answer is not None else "",
        "prompt_tokens": answer.prompt_tokens if answer is not None else 0,
        "completion_tokens": answer.completion_tokens if answer is not None else 0,
        "money": answer.money if answer is not None else 0.0,
    }


def _table(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[Any, list[Any]]]:
    import pyarrow as pa

    text, count, real = pa.string(), pa.int64(), pa.float64()
    texts = "domain source id language recipe recipe_fingerprint style origin_source origin_id origin_domain"
    texts += " origin_language origin_hash request model endpoint"
    counts = "tokens tier passage seed prompt_tokens completion_tokens"
    kinds: dict[str, Any] = {"text": pa.large_string()}
    kinds |= dict.fromkeys(texts.split(), text) | dict.fromkeys(counts.split(), count)
    kinds |= {"quality": real, "money": real}
    return {name: (kind, [row[name] for row in rows]) for name, kind in kinds.items()}


def _domains(sources: Sequence[Source], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Documents, tokens and the sum of scores by domain: of the kept sources, and of what is written."""
    found: dict[str, dict[str, dict[str, float]]] = {"before": {}, "after": {}}

    def count(side: str, domain: str, tokens: int, score: float | None) -> None:
        entry = found[side].setdefault(domain, {"documents": 0, "tokens": 0, "scored": 0, "score": 0.0})
        entry["documents"] += 1
        entry["tokens"] += tokens
        if score is not None:
            entry["scored"] += 1
            entry["score"] += score

    for source in sources:
        count("before", source.domain, source.tokens, None)
    for row in rows:
        count("after", row["domain"], row["tokens"], row["quality"])
    return found
