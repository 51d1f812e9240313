"""A suite on a saved model or on a server."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trinity.base.errors import UsageError, UserError
from trinity.evals.benchmarks.run import entries, prepare, run, runs_programs
from trinity.evals.benchmarks.task import CodeRunner
from trinity.evals.endpoint import Endpoint
from trinity.evals.language_model import LanguageModel, NativeModel
from trinity.infer.load import find, load


def run_saved(
    model: str,
    data: Path,
    out: Path,
    *,
    suite: str | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    skip_missing: bool = False,
    endpoint: str | None = None,
    key: str = "",
    device: str | None = None,
    dtype: str | None = None,
    batch_tokens: int = 16384,
    make_runner: Callable[[], CodeRunner] | None = None,
    on_note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """`run` on the model of a path, or on the model of that name behind `endpoint`; files are checked before it loads.

    make_runner: makes what runs programs that the model wrote; called when a task needs it. A UserError of it is the
    reason why such tasks cannot run.

    Raises UsageError for unknown suites and tasks, UserError for files, models and servers that cannot be used.
    """
    asked = entries(suite, tasks, limit)
    if not asked:
        raise UsageError("name a suite or benchmarks to run")
    runner, reason = None, ""
    if make_runner is not None and runs_programs(asked):
        try:
            runner = make_runner()
        except UserError as error:
            reason = str(error)
    ready, missing = prepare(asked, data, runner, without_runner=reason, skip_missing=skip_missing)
    for reason in missing.values():
        on_note(reason)
    about: dict[str, Any]
    asks: LanguageModel
    if endpoint is not None:
        asks, about = Endpoint(endpoint, model, key=key), {"endpoint": endpoint}
    else:
        about = {"weights": weights_mark(Path(model))}
        loaded, tokenizer = load(Path(model), device=device, dtype=dtype)
        about["dtype"] = str(loaded.embed.weight.dtype).removeprefix("torch.")
        asks = NativeModel(loaded, tokenizer, batch_tokens=batch_tokens, name=model)
    return run(asks, ready, out, about=about, missing=missing, on_note=on_note)


def weights_mark(path: Path) -> str:
    """Tells one state of a model's files from another, by their names, sizes and times: answers of the one must not be
    mixed with those of the other."""
    place = find(path).weights
    digest = hashlib.sha256()
    for file in sorted(place.glob("*.safetensors")):
        state = file.stat()
        digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
