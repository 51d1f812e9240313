"""From texts to shards: `OUT/train` and `OUT/val`, in parallel, resumable after any kill.

1. list: the inputs become pieces, the pieces units of similar size; neither depends on the number of workers.
2. scan: each unit is read, filtered and hashed.
3. duplicates: all hashes together decide which documents stay.
4. encode: each unit is read again and its kept documents are tokenized into token files.
5. index: the parts are joined and the manifests written, `OUT/prepare.json` last.

Steps 2 and 4 commit files for each unit, their records under `OUT/.work`; what is committed is not done again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trinity.base.errors import UsageError, UserError
from trinity.base.files import locked, read_json, write_json
from trinity.data.corpus import Input, Listing, cut_together, list_files
from trinity.data.duplicates import choose_kept
from trinity.data.readers import Columns
from trinity.data.shard_writer import assemble
from trinity.data.shards import Shards
from trinity.data.team import RunJobs, run_jobs
from trinity.data.units import (
    SPLITS,
    Drops,
    Rules,
    Tally,
    TokenizerLike,
    Unit,
    encode_unit,
    index_path,
    scan_path,
    scan_unit,
)

RESULT = "prepare.json"
WORK = ".work"
MIN_UNIT_BYTES = 1 << 20
MAX_UNIT_BYTES = 1 << 30
UNITS = 64
"""Units that a corpus of middling size is cut into: enough to balance the workers, few enough for few token files."""


@dataclass(frozen=True)
class Progress:
    """How far a step is; documents, tokens and bytes of text are those of the units that this call finished in it."""

    step: str
    units_done: int
    units: int
    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Prepared:
    """What was made; `OUT/prepare.json` holds the same."""

    directory: Path
    fingerprint: str
    """Of the content of both splits."""
    documents: dict[str, int]
    """By split."""
    tokens: dict[str, int]
    """By split."""
    dropped: dict[str, int]
    """By reason."""
    examples: dict[str, list[str]]
    """Where some of the dropped documents are, by reason."""
    passed_over: int
    """Files of unknown type in the folders."""


def prepare(
    inputs: Sequence[str | Path | Input],
    tokenizer: TokenizerLike,
    out_dir: Path | str,
    *,
    workers: int | None = 1,
    ray: str | None = None,
    val_fraction: float = 0.005,
    text_column: str = "text",
    domain_column: str = "domain",
    min_chars: int = 1,
    max_chars: int | None = None,
    quality: bool = True,
    deduplicate: bool = True,
    unit_bytes: int | None = None,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Prepared:
    """Filter, deduplicate, hold out and tokenize documents into the shards `out_dir/train` and `out_dir/val`.

    The same call goes on after a kill and returns at once when everything is there. The content depends on the inputs
    and their order, the tokenizer and the settings, not on `workers`, kills or where the files lie; a document goes to
    `val` by the hash of its text. `unit_bytes` of text make one unit of work (default: a 64th of all, within 1 MiB and
    1 GiB). With `ray` the workers are tasks on the Ray cluster at that address (`ray_team`); `workers` None means as
    many as there are CPUs.

    Raises UserError for inputs that cannot be read, for an `out_dir` of other inputs, settings or tokenizer (unless
    `force`, which starts over), when no document is left, and when the disk is full (what is committed stays).
    """
    _check_arguments(inputs, workers, val_fraction, unit_bytes)
    out = Path(out_dir)
    rules = Rules(Columns(text_column, domain_column), min_chars, max_chars, quality, val_fraction)
    listing = list_files([Input.parse(one) for one in inputs])
    units = _units(listing, unit_bytes)
    plan = {
        "tokenizer": tokenizer.fingerprint,
        "settings": {**asdict(rules), "deduplicate": deduplicate, "unit_bytes": unit_bytes},
        "files": [[file.path, file.domain, file.size, file.mtime_ns] for file in listing.files],
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        busy = f"another process is preparing {out}; wait for it or name another directory"
        with locked(out, busy), ExitStack() as stack:
            if _claim(out, plan, force):
                return _read_result(out)
            _remove_partial_files(out)
            work, run_all = out / WORK, _team(stack, workers, ray)
            scans = [unit for unit in units if not scan_path(work, unit.number).exists()]
            scan_jobs = [(unit,) for unit in scans]
            _run("scan", scan_unit, scan_jobs, (rules, work), len(units), run_all, progress)
            ends, drops = _decide(work, units, deduplicate)
            encode_jobs = [
                (unit, start, stop)
                for unit, start, stop in zip(units, [0, *ends], ends, strict=False)
                if not all(index_path(work, split, unit.number).exists() for split in SPLITS)
            ]
            _run("encode", encode_unit, encode_jobs, (rules, work, out, tokenizer), len(units), run_all, progress)
            return _finish(out, units, tokenizer, plan, drops, listing.passed_over)
    except OSError as error:
        what = error.strerror or str(error)
        raise UserError(f"{out} cannot be written: {what}; what is done so far is kept") from error


def _check_arguments(inputs: Sequence[Any], workers: int | None, val_fraction: float, unit_bytes: int | None) -> None:
    if not inputs:
        raise UsageError("there are no inputs to prepare")
    if workers is not None and workers < 1:
        raise UsageError(f"workers is {workers}; it must be at least 1")
    if not 0.0 <= val_fraction < 1.0:
        raise UsageError(f"val_fraction is {val_fraction}; it must be at least 0 and below 1")
    if unit_bytes is not None and unit_bytes < 1:
        raise UsageError(f"unit_bytes is {unit_bytes}; it must be at least 1")


def _team(stack: ExitStack, workers: int | None, ray: str | None) -> RunJobs:
    if ray is None:
        return partial(run_jobs, workers=workers or os.cpu_count() or 1)
    from trinity.data.ray_team import ray_team

    return stack.enter_context(ray_team(ray, workers))


def _units(listing: Listing, unit_bytes: int | None) -> list[Unit]:
    """Consecutive pieces in units that each stop once they reach the size."""
    total = sum(file.text_bytes for file in listing.files)
    limit = unit_bytes or min(max(total // UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    return [Unit(number, pieces) for number, pieces in enumerate(cut_together(listing.files, limit))]


def _claim(out: Path, plan: dict[str, Any], force: bool) -> bool:
    """Make `out` the place of this plan; True if everything is there already, UserError if it is another's place."""
    ours = {*SPLITS, WORK, RESULT}
    present = {path.name for path in out.iterdir()}
    if not present <= ours:
        raise UserError(f"{out} holds {min(present - ours)}, which is no part of shards; name another directory")
    started, finished = out / WORK / "plan.json", out / RESULT
    if force:
        finished.unlink(missing_ok=True)
        for name in (*SPLITS, WORK):  # the plan goes last: until then a kill leaves what `force` may remove
            shutil.rmtree(out / name, ignore_errors=True)
        present = set()
    if started.exists() and {path.name for path in started.parent.iterdir()} == {started.name}:
        started.unlink()  # nothing was done under that plan, such as when its inputs could not be read
    if finished.exists() or started.exists():
        before = read_json(finished)["plan"] if finished.exists() else read_json(started)
        difference = _difference(before, json.loads(json.dumps(plan)))
        if difference:
            raise UserError(
                f"{out} was made differently: {difference}; name another directory, or start over with --force"
            )
        return finished.exists()
    if present - {WORK}:
        raise UserError(f"{out} holds shards that prepare did not finish and cannot continue; start over with --force")
    write_json(started, plan)
    return False


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first difference of two plans in words."""
    if before["tokenizer"] != now["tokenizer"]:
        return f"by the tokenizer {before['tokenizer']:.12} and not {now['tokenizer']:.12}"
    for key, value in now["settings"].items():
        had = before["settings"].get(key)
        if isinstance(value, dict) and isinstance(had, dict):  # the columns
            key = next((name for name in value if had.get(name) != value[name]), key)
            had, value = had.get(key), value.get(key)
        if had != value:
            return f"with {key} = {had} and not {value}"
    old, new = ({(path, domain): rest for path, domain, *rest in plan["files"]} for plan in (before, now))
    for (path, domain), rest in new.items():
        if (path, domain) not in old:
            return f"without the input {path}" + (f"={domain}" if domain else "")
        if old[path, domain] != rest:
            return f"before {path} was changed"
    for path, domain in old:
        if (path, domain) not in new:
            return f"with the input {path}" + (f"={domain}" if domain else "")
    return None if before["files"] == now["files"] else "with the inputs in another order"


def _remove_partial_files(out: Path) -> None:
    """What a killed process left half written."""
    for path in out.rglob(".*.partial"):
        path.unlink()


def _run(
    step: str,
    function: Callable[..., Tally],
    jobs: Sequence[tuple[Any, ...]],
    shared: tuple[Any, ...],
    num_units: int,
    run_all: RunJobs,
    progress: Callable[[Progress], None] | None,
) -> None:
    done = num_units - len(jobs)
    totals = (0, 0, 0)
    for tally in run_all(function, jobs, shared):
        done += 1
        totals = tuple(a + b for a, b in zip(totals, tally, strict=True))
        if progress is not None:
            progress(Progress(step, done, num_units, *totals))


def _decide(work: Path, units: Sequence[Unit], deduplicate: bool) -> tuple[list[int], Drops]:
    """Write `work/keep.npy`; returns where each unit's documents end in it, and all drops."""
    scans = [scan_path(work, unit.number) for unit in units]
    choose_kept(scans, work / "keep.npy", deduplicate)
    drops = Drops()
    ends: list[int] = []
    passed = 0
    for scan in scans:
        with np.load(scan, allow_pickle=False) as members:
            verdicts: np.ndarray = members["verdicts"]
            about = json.loads(members["about"].tobytes())
        drops.merge(about["counts"], about["examples"])
        ends.append((ends[-1] if ends else 0) + verdicts.size)
        passed += int((verdicts == 0).sum())
    kept = int(np.load(work / "keep.npy", mmap_mode="r").sum())
    if passed > kept:
        drops.counts["duplicate"] = passed - kept
    if kept == 0:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(drops.counts.items()))
        first = next(iter(drops.examples.values()), ["the inputs hold no document"])[0]
        raise UserError(f"no document is left ({reasons or 'none was there'}); the first: {first}")
    return ends, drops


def _finish(
    out: Path, units: Sequence[Unit], tokenizer: TokenizerLike, plan: dict[str, Any], drops: Drops, passed_over: int
) -> Prepared:
    dropped = dict(sorted(drops.counts.items()))
    about = {"settings": plan["settings"], "dropped": dropped, "dropped_examples": drops.examples}
    manifests = {
        split: assemble(
            out / split,
            [index_path(out / WORK, split, unit.number) for unit in units],
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            extra={"prepared": about},
        )
        for split in SPLITS
    }
    both = "".join(manifests[split]["fingerprint"] for split in SPLITS)
    result = {
        "fingerprint": hashlib.sha256(both.encode()).hexdigest(),
        "documents": {split: manifests[split]["num_documents"] for split in SPLITS},
        "tokens": {split: manifests[split]["num_tokens"] for split in SPLITS},
        "dropped": dropped,
        "examples": drops.examples,
        "passed_over": passed_over,
    }
    write_json(out / RESULT, {**result, "plan": plan})
    shutil.rmtree(out / WORK)
    return Prepared(out, **result)


def _read_result(out: Path) -> Prepared:
    for split in SPLITS:
        try:
            Shards.open(out / split)  # nothing is missing or cut
        except UserError as error:
            raise UserError(f"{error}; prepare {out} anew with --force") from None
    shutil.rmtree(out / WORK, ignore_errors=True)  # a kill may have come before it
    result = {key: value for key, value in read_json(out / RESULT).items() if key != "plan"}
    return Prepared(out, **result)
