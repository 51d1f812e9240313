"""A run directory as values: what the files hold, in bounded memory, whatever state the run was left in.

Half-written lines, missing files and damaged records do not stop a report; what could not be read is counted and told.
"""

import json
import math
import tomllib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trinity.base.errors import UserError
from trinity.report.series import Folded, is_number, is_step, kept_steps

STAGES = {
    "pretrain": "Pretraining",
    "extend": "Context extension",
    "sft": "Supervised tuning",
    "rl": "Reinforcement learning",
}
"""Stage names in the order of a pipeline, with their titles."""

SCALARS = """
    tokens loss ce z_loss sequence_loss grad_norm lr_scale rows tokens_per_second mfu batch_het max_vio logit_max
    logit_mean seconds reward reward_std length length_std finished informative kl_gap clip_fraction
    truncated_fraction policy_entropy gap_replayed gap_free kl_start
""".split()  # noqa: SIM905
LAYERED = "max_vio_layers dead_experts load_entropy bias_min bias_max bias_norm router_min router_max".split()  # noqa: SIM905

LOAD_CELLS = 450_000
"""Expert-load values of a whole page at most, one byte each."""
MAX_EVENTS = 4000
MAX_SAMPLES = 400
MAX_GRIDS = 400


@dataclass
class Stage:
    """One stage of a run. `step_N` and `scalars` hold the records that count, in order of steps."""

    name: str
    path: Path
    step_N: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    scalars: dict[str, np.ndarray] = field(default_factory=dict)
    phases: list[tuple[int, str]] = field(default_factory=list)
    """(first step, name) of each run of equal phase names."""
    layers: dict[str, Folded] = field(default_factory=dict)
    loads: list[tuple[int, np.ndarray]] = field(default_factory=list)
    """(step, load_LE as a share of the mean)."""
    evals: list[dict[str, Any]] = field(default_factory=list)
    niah: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    """Where each setting came from, by dotted key; empty when it was not recorded."""
    repeated: int = 0
    """Step records that a later record of the same step replaced."""
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return STAGES.get(self.name, self.name)

    @property
    def status(self) -> str:
        """ "finished", "stopped" or "unfinished" (still running, or killed: the files cannot tell)."""
        ends = [e["event"] for e in self.events if e.get("event") in ("start", "resume", "stop", "finish")]
        last = ends[-1] if ends else None
        return {"finish": "finished", "stop": "stopped"}.get(str(last), "unfinished")


@dataclass
class Run:
    """What the page shows: the stages in pipeline order, and the summary of a pipeline directory."""

    path: Path
    stages: list[Stage]
    summary: dict[str, Any]


def read_run(directory: Path) -> Run:
    """Read a run directory or a pipeline directory. Raises UserError when it is neither."""
    if not directory.is_dir():
        raise UserError(f"there is no run directory {directory}")
    folders = [directory / name for name in STAGES if _is_run(directory / name)]
    # A pipeline directory has a run.toml too, but no records of its own.
    if _is_run(directory) and not (folders and not _has_records(directory)):
        folders.insert(0, directory)
    if not folders:
        raise UserError(f"{directory} is not a run directory: it holds no run.toml, metrics.jsonl or events.jsonl")
    stages = [stage for folder in folders for stage in _read_folder(folder)]
    stages.sort(key=lambda s: list(STAGES).index(s.name) if s.name in STAGES else len(STAGES))
    _thin_loads(stages)
    summary = _read_object(directory / "summary.json", stages[0].notes)
    return Run(directory, stages, summary)


def _is_run(folder: Path) -> bool:
    return (folder / "run.toml").is_file() or _has_records(folder)


def _has_records(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("metrics.jsonl", "events.jsonl"))


def _read_folder(folder: Path) -> list[Stage]:
    """The stages whose records a run directory holds: one, as a rule."""
    builders: dict[str, _Builder] = {}
    notes: list[str] = []
    first = folder.name if folder.name in STAGES else "pretrain"

    def builder(record: dict[str, Any]) -> _Builder:
        name = record.get("stage")
        name = name if isinstance(name, str) else next(iter(builders), first)
        if name not in builders:
            builders[name] = _Builder(Stage(name, folder))
        return builders[name]

    for record in _records(folder / "metrics.jsonl", notes):
        builder(record).add(record)
    for record in _records(folder / "events.jsonl", notes):
        if isinstance(record.get("event"), str):
            _append(builder(record).stage.events, record, MAX_EVENTS)
    for record in _records(folder / "samples.jsonl", notes):
        _append(builder(record).stage.samples, record, MAX_SAMPLES)
    settings = _read_settings(folder / "run.toml", notes)
    stages = [b.finish() for b in builders.values()] or [Stage(first, folder)]
    own = folder / "origins.json"
    recorded = _read_object(own if own.exists() else folder.parent / "origins.json", notes)
    origins = {key: value for key, value in recorded.items() if isinstance(value, str)}
    for stage in stages:
        stage.settings, stage.origins = settings, origins
    stages[0].notes += notes
    return stages


class _Builder:
    """Takes the records of one stage one after the other."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.steps = array("q")
        self.columns = {name: array("d") for name in SCALARS}
        self.phases: list[tuple[int, str]] = []

    def add(self, record: dict[str, Any]) -> None:
        kind, step = record.get("kind", "step"), record.get("step")
        if kind == "score":
            _append(self.stage.scores, record, MAX_GRIDS)
        elif not is_step(step):
            return
        elif kind == "step":
            self._step(step, record)
        elif kind == "eval":
            self.stage.evals = [r for r in self.stage.evals if r["step"] != step] + [record]
        elif kind == "niah" and isinstance(record.get("grid"), list):
            self.stage.niah = [r for r in self.stage.niah if r["step"] != step] + [record]
            del self.stage.niah[:-MAX_GRIDS]

    def _step(self, step: int, record: dict[str, Any]) -> None:
        self.steps.append(step)
        for name, column in self.columns.items():
            column.append(_number(record.get(name)))
        phase = record.get("phase")
        if isinstance(phase, str):
            while self.phases and self.phases[-1][0] >= step:
                self.phases.pop()
            if not self.phases or self.phases[-1][1] != phase:
                self.phases.append((step, phase))
        for name in LAYERED:
            row_L = _row(record.get(name))
            if row_L is not None:
                self.stage.layers.setdefault(name, Folded()).add(step, row_L)
        load = record.get("load")
        if isinstance(load, list) and load:
            self._load(step, load)

    def _load(self, step: int, rows: list[Any]) -> None:
        try:
            load_LE = np.array(rows, dtype=np.float32)
        except (TypeError, ValueError):
            return
        if load_LE.ndim != 2:
            return
        loads = self.stage.loads
        while loads and loads[-1][0] >= step:
            loads.pop()
        if loads and loads[-1][1].shape != load_LE.shape:
            return
        loads.append((step, load_LE))
        if len(loads) > 256:
            del loads[1:-1:2]

    def finish(self) -> Stage:
        stage = self.stage
        step_N = np.frombuffer(self.steps, dtype=np.int64) if self.steps else np.zeros(0, dtype=np.int64)
        keep = kept_steps(step_N)
        stage.step_N = step_N[keep]
        stage.repeated = int(step_N.size - keep.sum())
        for name, column in self.columns.items():
            values = np.frombuffer(column, dtype=np.float64)[keep] if column else np.zeros(0)
            if np.isfinite(values).any():
                stage.scalars[name] = values
        stage.phases = self.phases
        stage.evals.sort(key=lambda r: r["step"])
        stage.niah.sort(key=lambda r: r["step"])
        return stage


def _records(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    damaged = 0
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                damaged += line.endswith(b"\n")  # a last line without a line break is a write that a kill cut off
                continue
            if isinstance(record, dict):
                yield record
            else:
                damaged += 1
    if damaged:
        notes.append(f"{path.parent.name}/{path.name}: {damaged} damaged line{'s' if damaged > 1 else ''} left out")


def _read_settings(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.parent.name}/{path.name} could not be read: {error}")
        return {}


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        notes.append(f"{path.name} could not be read: {error}")
        return {}
    return value if isinstance(value, dict) else {}


def _thin_loads(stages: list[Stage]) -> None:
    """Keep evenly spaced expert loads, so that those of all stages fit LOAD_CELLS; the first and the last stay."""
    with_loads = [s for s in stages if s.loads]
    for stage in with_loads:
        cells = stage.loads[0][1].size
        most = max(4, min(96, LOAD_CELLS // (len(with_loads) * cells)))
        if len(stage.loads) > most:
            picks = np.unique(np.linspace(0, len(stage.loads) - 1, most).round().astype(int))
            stage.loads = [stage.loads[i] for i in picks]


def _append(records: list[dict[str, Any]], record: dict[str, Any], most: int) -> None:
    """Append; beyond `most`, records from the middle go, so that the beginning and the end of a run stay."""
    records.append(record)
    if len(records) > most:
        del records[most // 2]


def _number(value: Any) -> float:
    return float(value) if is_number(value) else math.nan


def _row(value: Any) -> np.ndarray | None:
    """A list of numbers as float64, NaN for what is none; None for anything else."""
    if not isinstance(value, list) or not value:
        return None
    try:
        row = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return np.where(np.isfinite(row), row, np.nan) if row.ndim == 1 else None
