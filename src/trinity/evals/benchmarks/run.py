"""Running a suite: files checked first, replies kept as they come, figures with standard errors at the end."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trinity.base.errors import UsageError, UserError, nearest
from trinity.base.files import append_jsonl, mend_jsonl, read_json, read_jsonl, write_json
from trinity.evals.benchmarks.definitions import TASKS
from trinity.evals.benchmarks.records import Record, checksum, find_file, missing_file, read_records
from trinity.evals.benchmarks.suites import SUITES, Entry
from trinity.evals.benchmarks.task import CodeRunner, CodeTask, Shots, Source, Task, no_sandbox
from trinity.evals.language_model import LanguageModel

CHUNK = 128
"""Questions whose replies are kept together: what an interruption may lose."""


@dataclass(frozen=True)
class Ready:
    """A task whose files are there."""

    entry: Entry
    task: Task
    records: list[Record]
    shots: list[Record]
    files: dict[str, str]
    """Checksum of each file by name."""

    def examples(self, record: Record) -> list[Record]:
        """Examples for a question: the first of the shots, of its group, without itself."""
        if self.task.shots is None:
            return []
        found, group = [], self.task.shots.group
        for shot in self.shots:
            if shot is not record and shot != record and (not group or shot[group] == record[group]):
                found.append(shot)
                if len(found) == self.task.shots.count:
                    break
        return found


def entries(suite: str | None, tasks: Sequence[str] = (), limit: int | None = None) -> list[Entry]:
    """What to run: a suite, or tasks by name. Raises UsageError for unknown ones."""
    if suite is not None and suite not in SUITES:
        raise UsageError(f"there is no suite {suite!r}; choose from {', '.join(SUITES)}{nearest(suite, SUITES)}")
    for task in tasks:
        if task not in TASKS:
            raise UsageError(f"there is no benchmark {task!r}; choose from {', '.join(TASKS)}{nearest(task, TASKS)}")
    asked = [*(SUITES[suite].entries if suite is not None else ()), *(Entry(task) for task in tasks)]
    return asked if limit is None else [replace(entry, limit=limit) for entry in asked]


def runs_programs(asked: Sequence[Entry]) -> bool:
    """Whether a `CodeRunner` is needed."""
    return any(isinstance(TASKS[entry.task], CodeTask) for entry in asked)


def prepare(
    asked: Sequence[Entry],
    data: Path,
    runner: CodeRunner | None = None,
    *,
    without_runner: str = "",
    skip_missing: bool = False,
) -> tuple[list[Ready], dict[str, str]]:
    """(tasks that can run, why the others cannot, by name), with every file read.

    without_runner: why there is no `runner`.

    Raises UserError that says what to put where when something is missing, unless `skip_missing`.
    """
    if not data.is_dir():
        raise UserError(f"there is no directory {data}: name the one that holds the benchmarks' files, --data DIR")
    ready, missing = [], {}
    for entry in asked:
        task = TASKS[entry.task]
        if isinstance(task, CodeTask):
            if runner is None:
                missing[entry.task] = no_sandbox(entry.task, without_runner)
                continue
            task = replace(task, runner=runner)
        found = _files(task, data)
        if isinstance(found, str):
            missing[entry.task] = found
            continue
        records = [r for r in read_records(found[0], task.source.fields) if task.source.keep(r)]
        shots = [] if found[1] is None else _read_shots(found[1], task, data)
        files = {path.name: checksum(path) for path in found if path is not None}
        ready.append(Ready(entry, task, records[: entry.limit], shots, files))
    if missing and not skip_missing:
        told = "; ".join(missing.values())
        raise UserError(
            f"{len(missing)} of {len(asked)} benchmarks cannot run: {told} (--skip-missing runs the others)"
        )
    return ready, missing


def _files(task: Task, data: Path) -> tuple[Path, Path | None] | str:
    """The task's file and that of its examples, or what is missing."""
    questions = find_file(data, task.source.name)
    if questions is None:
        return missing_file(data, task.source.name, task.source.fields, task.source.origin)
    if task.shots is None:
        return questions, None
    shots = _shot_source(task.shots, data)
    if shots is None:
        wanted = task.shots.sources[0]
        return missing_file(data, wanted.name, wanted.fields, wanted.origin)
    return questions, find_file(data, shots.name)


def _shot_source(shots: Shots, data: Path) -> Source | None:
    return next((source for source in shots.sources if find_file(data, source.name) is not None), None)


def _read_shots(path: Path, task: Task, data: Path) -> list[Record]:
    assert task.shots is not None
    source = _shot_source(task.shots, data)
    assert source is not None
    return [record for record in read_records(path, source.fields) if source.keep(record)]


def run(
    model: LanguageModel,
    ready: Sequence[Ready],
    out: Path,
    *,
    about: dict[str, Any] | None = None,
    missing: dict[str, str] | None = None,
    on_note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Ask what is not answered yet; results by task, also in OUT/results.json.

    Each reply is kept in OUT/TASK.jsonl as it comes, so that the same call goes on where it was cut off. Raises
    UserError when `out` holds the answers of another model or to other questions.
    """
    settings = {
        "model": {"name": model.name, **(about or {})},
        "tasks": {one.task.name: {"limit": one.entry.limit, "files": one.files} for one in ready},
    }
    _open(out, settings)
    results: dict[str, Any] = {}
    for one in ready:
        name = one.task.name
        path = out / f"{name}.jsonl"
        mend_jsonl(path)
        done = read_jsonl(path)
        if done:
            on_note(f"{name}: {len(done)} of {len(one.records)} answers are there already")
        for chunk in _chunks(list(enumerate(one.records))[len(done) :]):
            questions = [(record, one.examples(record)) for _, record in chunk]
            for (number, record), score in zip(chunk, one.task.evaluate(model, questions), strict=True):
                row = {"number": number, "group": record.get(one.task.group, "") if one.task.group else "", **score}
                append_jsonl(path, row)
                done.append(row)
        results[name] = summarize(one, done)
        on_note(f"{name} is done")
    outcome = {**settings, "results": results, "missing": missing or {}}
    write_json(out / "results.json", outcome)
    return outcome


def _open(out: Path, settings: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    if path.exists():
        before = read_json(path)
        if before["model"] != settings["model"]:
            raise UserError(
                f"{out} holds the answers of another model ({before['model']['name']}): choose another --out"
            )
        for name, asked in settings["tasks"].items():
            if before["tasks"].get(name, asked) != asked:
                raise UserError(f"{out} holds answers to other questions of {name}: choose another --out")
        settings = {**settings, "tasks": {**before["tasks"], **settings["tasks"]}}
    write_json(path, settings)


def _chunks(items: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]


def summarize(one: Ready, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error of every metric (the sample's standard deviation over root n), overall and by group."""
    names = [key for key in rows[0] if key not in ("number", "group")]
    found: dict[str, Any] = {name: _mean([row[name] for row in rows]) for name in names}
    found |= {
        "metric": one.task.metric,
        "samples": len(rows),
        "chance": sum(map(one.task.chance, one.records)) / len(one.records),
        "shots": one.task.shots.count * one.task.shots.each if one.task.shots else 0,
        "files": one.files,
    }
    if one.entry.reported is not None:
        found["reported"] = one.entry.reported / 100
    if one.entry.note:
        found["note"] = one.entry.note
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row[one.task.metric])
    if one.task.group:
        found["groups"] = {name: {"value": sum(v) / len(v), "samples": len(v)} for name, v in sorted(groups.items())}
    return found


def _mean(values: Sequence[float]) -> dict[str, float]:
    n, mean = len(values), math.fsum(values) / len(values)
    spread = math.fsum((value - mean) ** 2 for value in values) / max(1, n - 1)
    return {"value": mean, "standard_error": math.sqrt(spread / n)}


def table(outcome: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of (task, metric, ours, standard error, samples, chance, reported), in percent."""
    rows = []
    for name, result in outcome["results"].items():
        own = result[result["metric"]]
        reported = f"{100 * result['reported']:.2f}" if "reported" in result else ""
        percent = [f"{100 * own['value']:.2f}", f"{100 * own['standard_error']:.2f}"]
        rows.append(
            (name, result["metric"], *percent, str(result["samples"]), f"{100 * result['chance']:.1f}", reported)
        )
    rows += [(name, "-", "not run", "", "", "", "") for name in outcome["missing"]]
    return rows
