"""The demonstration: the whole path on a corpus gathered from the machine's own Python installation."""

import json
import time
from pathlib import Path
from random import Random
from typing import Any

from trinity.base.console import Console
from trinity.base.files import atomic_write, read_json, read_jsonl, write_json
from trinity.config import Origin, RunConfig
from trinity.pipeline.path import begin, run_path, start_over
from trinity.pipeline.summary import table

CORPUS_BYTES = 6_000_000
CONVERSATIONS = 2000
CHATS = "conversations.jsonl"


def run(
    run_dir: Path, config: RunConfig, *, origins: dict[str, Origin], force: bool, console: Console
) -> dict[str, Any]:
    """Everything from gathering texts to the report in `run_dir`; gone on with when it was left half-way.

    `origins` of the settings are kept for the report.
    Raises UserError for a directory of something else, and Interruption when a signal ended a stage.
    """
    from trinity.report import write_report

    if force:
        start_over(run_dir)
    begin(run_dir, config)
    write_json(run_dir / "origins.json", {key: origin.source for key, origin in origins.items()})
    facts = _corpus(run_dir, config, console)
    files = [run_dir / "corpus" / name for name in facts["corpus_files"]]
    summary = run_path(run_dir, config, files, [run_dir / CHATS], console=console, facts=facts)
    summary["samples"] = samples(run_dir)
    write_json(run_dir / "summary.json", summary)
    summary["report"] = str(write_report(run_dir))
    return summary


def _corpus(run_dir: Path, config: RunConfig, console: Console) -> dict[str, Any]:
    """Gather texts and conversations once; returns the corpus' facts for the summary."""
    from trinity.data.machine import gather

    marker = run_dir / "corpus" / "corpus.json"
    if not marker.exists():
        started = time.perf_counter()
        gathered = gather(run_dir / "corpus", CORPUS_BYTES, config.runtime.seed)
        _write_conversations(run_dir / CHATS, config)
        facts = {
            "corpus": gathered.fingerprint,
            "corpus_bytes": gathered.num_bytes,
            "corpus_files": [file.name for file in gathered.files],
            "corpus_seconds": round(time.perf_counter() - started, 1),
        }
        write_json(marker, facts)
    facts = read_json(marker)
    sizes = ", ".join(f"{domain} {size / 1e6:.1f} MB" for domain, size in facts["corpus_bytes"].items())
    console.say(f"corpus: {sizes}; fingerprint {facts['corpus'][:16]} ({facts['corpus_seconds']}s)")
    return facts


def _write_conversations(path: Path, config: RunConfig) -> None:
    """Arithmetic as questions and answers, from the training side of its split."""
    from trinity.data.arithmetic import conversation

    rng = Random(config.runtime.seed)
    with atomic_write(path, "w") as file:
        for _ in range(CONVERSATIONS):
            file.write(json.dumps(conversation(rng, config.rl.max_number)) + "\n")


def samples(run_dir: Path) -> list[dict[str, str]]:
    """The same prompts answered early and late: by the base model in pretraining, by the chat model in RL."""
    found = []
    for stage in ("pretrain", "rl"):
        records = read_jsonl(run_dir / stage / "samples.jsonl")
        for prompt in dict.fromkeys(r["prompt"] for r in records):
            texts = [r["text"] for r in records if r["prompt"] == prompt]
            found.append({"stage": stage, "prompt": prompt, "before": texts[0], "after": texts[-1]})
    return found


def render(summary: dict[str, Any]) -> str:
    """The closing words: the table of stages, samples before and after, where the report is."""
    from trinity.base.console import clean, format_table

    lines = [format_table(*table(summary)), ""]
    for sample in summary["samples"]:
        lines.append(clean(f"{sample['stage']}  {_short(sample['prompt'])}"))
        lines.append(clean(f"  before  {_short(sample['before'])}"))
        lines.append(clean(f"  after   {_short(sample['after'])}"))
    lines += [
        "",
        f"{summary['seconds']:.0f} seconds, at most {summary['peak_memory_mib']:,} MiB of memory",
        f"report: {summary['report']}",
    ]
    return "\n".join(lines)


def _short(text: str, most: int = 100) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
