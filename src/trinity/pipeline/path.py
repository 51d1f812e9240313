"""From texts to a tuned, exported model in one directory: every step is the verb of the same name, on the same files.

    DIR/tokenizer  DIR/shards  DIR/pretrain  DIR/extend  DIR/sft  DIR/rl  DIR/model  DIR/summary.json  DIR/report.html

A directory that was left half-way is gone on with: finished steps are passed over, a stage resumes from its checkpoint.
"""

import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trinity.base.console import Console
from trinity.base.errors import UserError
from trinity.base.files import read_json, write_json
from trinity.config import RunConfig, to_toml
from trinity.pipeline.summary import stage_row

if TYPE_CHECKING:
    from trinity.stages.finish import StageResult
    from trinity.tokenizer import Tokenizer

STAGES = ("pretrain", "extend", "sft", "rl")
WORKERS = 2


class Interruption(Exception):  # noqa: N818 - nothing went wrong
    """A signal ended a stage after saving; the same command goes on from there."""


def run_path(
    run_dir: Path,
    config: RunConfig,
    corpus: Sequence[Path],
    conversations: Sequence[Path],
    *,
    console: Console,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Take `corpus` (files with a domain column) to `run_dir/model`; returns what `run_dir/summary.json` holds.

    `facts` (such as the corpus' fingerprint) are kept in the summary. Raises UserError when `run_dir` holds a run with
    other settings, and Interruption when a signal ended a stage.
    """
    begin(run_dir, config)
    summary: dict[str, Any] = read_json(run_dir / "summary.json") if (run_dir / "summary.json").exists() else {}
    summary = {"name": config.name, **(facts or {}), "steps": [], **summary}
    done = {step["step"] for step in summary["steps"]}

    def finish(name: str, started: float, **found: Any) -> None:
        row = {"step": name, "seconds": round(time.perf_counter() - started, 1), **found}
        summary["steps"].append(row)
        summary["seconds"] = round(sum(step["seconds"] for step in summary["steps"]), 1)
        summary["peak_memory_mib"] = max(peak_memory_mib(), summary.get("peak_memory_mib", 0))
        write_json(run_dir / "summary.json", summary)
        console.say(f"{name}: {row.get('what', 'done')} ({row['seconds']}s)")

    config = config.model_copy(
        update={
            "data": config.data.model_copy(
                update={"tokenizer": str(run_dir / "tokenizer"), "shards": str(run_dir / "shards")}
            ),
            "sft": config.sft.model_copy(update={"conversations": tuple(map(str, conversations))}),
        }
    )
    if "tokenizer" not in done:
        started = time.perf_counter()
        tokenizer = _train_tokenizer(run_dir / "tokenizer", config, corpus, console)
        finish("tokenizer", started, what=f"{tokenizer.vocab_size:,} entries", fingerprint=tokenizer.fingerprint)
    if "shards" not in done:
        started = time.perf_counter()
        finish("shards", started, **_prepare(run_dir, corpus, console))
    before: Path | None = None
    for stage in STAGES:
        if stage not in done:
            started = time.perf_counter()
            _run_stage(stage, config, run_dir / stage, before, console)
            finish(stage, started, **stage_row(run_dir / stage, stage))
        before = run_dir / stage
    if "model" not in done:
        started = time.perf_counter()
        finish("model", started, **_export(run_dir, console))
    return summary


def begin(run_dir: Path, config: RunConfig) -> None:
    """Take an empty or own directory. Raises UserError for one that belongs to a run with other settings."""
    settings = run_dir / "run.toml"
    text = to_toml(config)
    if settings.exists():
        if settings.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{run_dir} holds a run with other settings: choose another --run-dir, or --force to start over"
            )
        return
    if run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"{run_dir} exists and is not a run of this program: choose another --run-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    settings.write_text(text, encoding="utf-8")


def start_over(run_dir: Path) -> None:
    """Remove a pipeline directory. Raises UserError for a directory that is none."""
    if not run_dir.exists():
        return
    if not (run_dir / "run.toml").exists():
        raise UserError(f"{run_dir} is not a run of this program, so --force does not remove it")
    shutil.rmtree(run_dir)


def peak_memory_mib() -> int:
    """Peak resident memory of this process or of the largest of its children, whichever is more."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(max(peaks) * unit / 2**20)


def _train_tokenizer(out: Path, config: RunConfig, corpus: Sequence[Path], console: Console) -> "Tokenizer":
    from trinity.data.corpus import Input, list_files, read_documents
    from trinity.tokenizer import train_tokenizer

    total = sum(file.text_bytes for file in list_files([Input.parse(path) for path in corpus]).files)
    texts = (document.text for document in read_documents(corpus))
    with console.progress("Learning the vocabulary", total=min(total, config.tokenizer.sample_bytes), unit="B") as view:
        tokenizer = train_tokenizer(texts, config.tokenizer, progress=view.set, total_bytes=total)
    tokenizer.check_model_vocab(config.model.vocab_size)
    tokenizer.save(out)
    return tokenizer


def _prepare(run_dir: Path, corpus: Sequence[Path], console: Console) -> dict[str, Any]:
    from trinity.data.prepare import Progress, prepare
    from trinity.tokenizer import Tokenizer

    with console.progress("Preparing", unit="units") as view:

        def on_progress(p: Progress) -> None:
            view.expect(p.units)
            view.set(p.units_done, p.step)

        made = prepare(
            list(corpus),
            Tokenizer.load(run_dir / "tokenizer"),
            run_dir / "shards",
            workers=WORKERS,
            val_fraction=0.02,
            progress=on_progress,
        )
    documents, tokens = sum(made.documents.values()), sum(made.tokens.values())
    return {"what": f"{tokens:,} tokens in {documents:,} documents", "fingerprint": made.fingerprint}


def _run_stage(stage: str, config: RunConfig, run_dir: Path, start_from: Path | None, console: Console) -> None:
    from trinity.stages import extend, pretrain, rl, sft

    run = {"pretrain": pretrain.run, "extend": extend.run, "sft": sft.run, "rl": rl.run}[stage]
    with console.training(stage) as view:
        result: StageResult = run(config, run_dir, start_from=start_from, progress=view)
    if not result.train.finished:
        raise Interruption(result.train.reason)


def _export(run_dir: Path, console: Console) -> dict[str, Any]:
    """The last stage's model as the model of the whole path, through the parity gate, with what it says."""
    import torch

    from trinity.export.afmoe import export_afmoe
    from trinity.infer.load import load

    model, tokenizer = load(run_dir / STAGES[-1], device="cpu", dtype=torch.float32)
    report = export_afmoe(model, model.config, tokenizer, run_dir / "model", dtype=torch.float32, force=True)
    for line in report.lines():
        console.say(line)
    return {"what": "afmoe model directory, logits compared"}
