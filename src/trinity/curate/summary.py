"""What a curation did, summed over its blocks: counts, reasons, use, domain shift, samples."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trinity.base.files import read_json
from trinity.config.curate import CurateConfig
from trinity.curate.blocks import block_path, read_about
from trinity.curate.duplicates import REPORT
from trinity.curate.shift import BINS, divergence
from trinity.curate.tally import Tally, total

MOST_SAMPLES = 4
"""Of each recipe and verdict."""


def summarise(
    data: Path, work: Path, num_blocks: int, config: CurateConfig, quality: dict[str, Any] | None
) -> dict[str, Any]:
    """The content of curated.json. Every block must be committed."""
    cleaned = [read_about(block_path(work / "clean", number)) for number in range(num_blocks)]
    finished = [read_about(block_path(data, number)) for number in range(num_blocks)]
    duplicates = read_json(work / REPORT)
    tallies = total([about["tallies"] for about in cleaned])
    tallies |= total([duplicates["tallies"]])
    tallies |= total([about["tallies"] for about in finished])
    for stage, tally in tallies.items():
        assert tally.check(), f"{stage}: {tally.taken} in, {tally.given} out, {tally.drops.total()} dropped"
    use: Counter[str] = Counter()
    troubles: Counter[str] = Counter()
    for about in finished:
        use.update(about["use"])
        troubles.update(about["troubles"])
    unasked = sum(about["unasked"] for about in finished)
    before, after = _words(cleaned), _words(finished)
    return {
        "complete": not unasked,
        "stopped": f"the budget is used up; {unasked} requests were not asked" if unasked else None,
        "unasked": unasked,
        "failed": sum(about["failed"] for about in finished),
        "blocks": num_blocks,
        "documents": list(tallies.values())[-1].given,
        "tokens": list(tallies.values())[-1].tokens_out,
        "tokens_by": "tokenizer" if config.tokenizer is not None else "bytes / 4",
        "stages": {stage: tally.as_json() for stage, tally in tallies.items()},
        "use": {name: use[name] for name in ("attempts", "prompt_tokens", "completion_tokens", "money")},
        "troubles": dict(troubles.most_common()),
        "compared": duplicates["compared"],
        "domains": _domains(finished),
        "word_divergence": divergence(before, after),
        "quality": quality,
        "samples": _samples(finished),
    }


def chain_holds(stages: dict[str, dict[str, Any]]) -> bool:
    """Whether what one stage gave out is what the next took in, where both count documents."""
    tallies = {stage: Tally.from_json(value) for stage, value in stages.items()}
    documents = [t for stage, t in tallies.items() if stage not in ("rephrase", "validate", "label", "write")]
    texts = [tallies[stage] for stage in ("rephrase", "validate") if stage in tallies]
    pairs = [*pairwise(documents), *pairwise(texts)]
    return all(tally.check() for tally in tallies.values()) and all(one.given == other.taken for one, other in pairs)


def _words(abouts: list[dict[str, Any]]) -> np.ndarray:
    words = np.zeros(BINS, np.int64)
    for about in abouts:
        for number, count in about["words"].items():
            words[int(number)] += count
    return words


def _domains(abouts: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, Counter[str]]] = {"before": {}, "after": {}}
    for about in abouts:
        for side, domains in about["domains"].items():
            for domain, entry in domains.items():
                found[side].setdefault(domain, Counter()).update(entry)
    return {
        side: {
            domain: {
                "documents": int(entry["documents"]),
                "tokens": int(entry["tokens"]),
                "quality": entry["score"] / entry["scored"] if entry["scored"] else None,
            }
            for domain, entry in sorted(domains.items())
        }
        for side, domains in found.items()
    }


def _samples(abouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    shown: Counter[tuple[str, str]] = Counter()
    chosen = []
    for about in abouts:
        for sample in about["samples"]:
            key = sample["recipe"], sample["verdict"]
            if shown[key] < MOST_SAMPLES:
                shown[key] += 1
                chosen.append(sample)
    return sorted(chosen, key=lambda s: (s["verdict"] != "kept", s["recipe"], s["verdict"]))
