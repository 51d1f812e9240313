"""The suite on a saved model: settings from the run behind it, cut to what the model can take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trinity.base.errors import UsageError, nearest
from trinity.base.rundir import find_settings
from trinity.config import EvalConfig, override_eval, resolve
from trinity.data.shards import Shards
from trinity.evals.suite import SUITE, run_suite
from trinity.infer.load import load

_ON_SHARDS = {"heldout", "positions"}
_SEQ_LEN = 4096  # of held-out rows, and
_MAX_NUMBER = 9  # the largest operand, where no run tells


@dataclass(frozen=True)
class _Asked:
    """What the run behind a model says about its evaluation."""

    eval: EvalConfig = field(default_factory=EvalConfig)
    seq_len: int = _SEQ_LEN
    max_number: int = _MAX_NUMBER
    seed: int = 0


def evaluate_saved(
    path: Path,
    *,
    tasks: Sequence[str] = (),
    overrides: Sequence[str] = (),
    shards: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    on_note: Callable[[str], None],
    on_result: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """`run_suite` on the model of `path` (`infer.load`); results by task.

    Settings are the run's that the model belongs to, else the defaults, then `overrides` (`eval.KEY=VALUE`). Needle
    lengths that nobody asked for on the command line are cut to the model's positions, which `on_note` is told. `tasks`
    empty is all of SUITE, held-out loss where `shards` (a directory of `data prepare` or its held-out split) is given.

    Raises UsageError for unknown tasks and settings, UserError for a model or shards that cannot be read.
    """
    for task in tasks:
        if task not in SUITE:
            raise UsageError(f"there is no task {task!r}; choose from {', '.join(SUITE)}{nearest(task, SUITE)}")
    names = tuple(tasks) or tuple(name for name in SUITE if name not in _ON_SHARDS or shards is not None)
    if _ON_SHARDS & set(names) and shards is None:
        raise UsageError("held-out loss needs shards: name their directory, --shards DIR")
    asked = _asked(path)
    settings, changed = override_eval(asked.eval, overrides)
    held_out = None if shards is None else Shards.open(shards / "val" if (shards / "val").is_dir() else shards)
    model, tokenizer = load(path, device=device, dtype=dtype)
    if "niah" in names and "niah_lengths" not in changed:
        settings = _fitting(settings, model.config.max_positions, on_note)
    return run_suite(
        model,
        tokenizer,
        settings,
        names=names,
        shards=held_out,
        seq_len=asked.seq_len,
        max_number=asked.max_number,
        seed=asked.seed,
        on_result=on_result,
    )


def _asked(path: Path) -> _Asked:
    found = find_settings(path)
    if found is None:
        return _Asked()
    config, _ = resolve(str(found))
    return _Asked(config.eval, config.pretrain.seq_len, config.rl.max_number, config.runtime.seed)


def _fitting(settings: EvalConfig, positions: int, on_note: Callable[[str], None]) -> EvalConfig:
    fit = tuple(length for length in settings.niah_lengths if length <= positions) or (positions,)
    if fit == settings.niah_lengths:
        return settings
    shown = ", ".join(map(str, fit))
    on_note(f"the model has {positions} positions: needles are hidden at {shown} tokens (eval.niah_lengths)")
    return settings.model_copy(update={"niah_lengths": fit})
