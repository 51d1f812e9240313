"""One curation from recipe to committed blocks: `OUT/data/*.parquet` and `OUT/curated.json`, resumable after any kill.

1. clean: blocks of documents are read, normalised, filtered and hashed.
2. duplicates: all hashes and signatures together decide which documents stay.
3. ask: answers to all requests are journaled as they come in.
4. finish: answers are judged and labelled, blocks committed; streams behind 3, block by block.
5. summary, `OUT/curated.json` last.

What is committed is not done again; the work of earlier steps lies under `OUT/.work`, which goes when nothing is open.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trinity.base.errors import UsageError, UserError
from trinity.base.files import locked, read_json, write_json
from trinity.config.curate import CurateConfig
from trinity.curate.answers import spent
from trinity.curate.asking import open_requests
from trinity.curate.blocks import block_path, read_about
from trinity.curate.clean import Block, clean_block
from trinity.curate.duplicates import decide
from trinity.curate.embedded import embedded
from trinity.curate.finish import Judges, finish_block
from trinity.curate.forms import MakeRunner
from trinity.curate.graph import Graph, cluster
from trinity.curate.quality import read_examples, train
from trinity.curate.recipes import check_recipes, load_recipe
from trinity.curate.summary import summarise
from trinity.data.corpus import Input, InputFile, cut_together, list_files
from trinity.data.overlap import Overlap, question_text
from trinity.data.ray_team import LOCAL
from trinity.data.records import read_records

RESULT, DATA, WORK, QUALITY, REPORT = "curated.json", "data", ".work", "quality.json", "report.html"
_ANY_TIME = {"run": True, "budget": True}
_ANY_TIME_GENERATE = {"timeout", "retries", "backoff", "patience", "workers", "concurrency", "on_gpu"}
_ANY_TIME_GENERATE |= {"engine_batch", "engine"}


@dataclass(frozen=True)
class Progress:
    """How far a step is."""

    step: str
    done: int
    blocks: int


def curate(
    config: CurateConfig,
    out_dir: Path | str,
    *,
    retry: bool = False,
    force: bool = False,
    make_runner: MakeRunner | None = None,
    progress: Callable[[Progress], object] = id,
) -> dict[str, Any]:
    """Run a recipe into `out_dir`; returns what `out_dir/curated.json` holds.

    The same call goes on after a kill and returns at once when everything is there. Budget, timeouts, retries and where
    it runs may change between calls; anything else makes another curation, which another directory must hold (or
    `force` starts over). `retry` asks again what failed. `make_runner` makes what runs the programs of code recipes.

    Raises UserError for inputs that cannot be read, recipes of code without a runner, endpoints that are gone.
    """
    check_recipes(config)
    _check_runner(config, make_runner)
    _check_backend(config)
    out = Path(out_dir)
    listing = list_files([Input.parse(path) for path in config.input.paths])
    pieces = cut_together(listing.files, config.input.block_bytes)
    blocks = [Block(number, together) for number, together in enumerate(pieces)]
    judges, plan = _judges(config, make_runner), _plan(config, listing.files)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, f"another process is curating into {out}; wait for it or name another directory"):
        _claim(out, plan, force)
        result = out / RESULT
        if result.exists():
            found = read_json(result)
            if found["complete"] and not (retry and found["failed"]):
                shutil.rmtree(out / WORK, ignore_errors=not retry)
                return found
        for path in out.rglob(".*.partial"):
            path.unlink()
        start = time.time()
        try:
            _work(config, out, blocks, judges, retry, progress)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error}; what is done so far is kept") from error
        if judges.quality is not None:
            write_json(out / QUALITY, {"model": judges.quality.save_as(), "report": judges.report})
        summary = summarise(out / DATA, out / WORK, len(blocks), config, judges.report)
        summary["seconds_of_last_call"] = round(time.time() - start, 1)
        write_json(result, {**summary, "plan": plan})
        if summary["complete"] and not summary["failed"]:
            shutil.rmtree(out / WORK)
        return {**summary, "plan": plan}


def _work(
    config: CurateConfig,
    out: Path,
    blocks: Sequence[Block],
    judges: Judges,
    retry: bool,
    progress: Callable[[Progress], object],
) -> None:
    work, data = out / WORK, out / DATA
    data.mkdir(exist_ok=True)
    with ExitStack() as stack:
        graph = stack.enter_context(cluster(config.run))
        missing = [block for block in blocks if not block_path(work / "clean", block.number).exists()]
        done = len(blocks) - len(missing)
        for _ in graph.each(clean_block, missing, config, work / "clean"):
            done += 1
            progress(Progress("clean", done, len(blocks)))
        progress(Progress("duplicates", 0, len(blocks)))
        numbers = [block.number for block in blocks]
        decide(work, numbers, config)
        todo = [number for number in numbers if _is_open(block_path(data, number), retry)]
        done = len(blocks) - len(todo)
        shared = (config, work, data, judges)
        for _ in _ask_and_finish(stack, graph, todo, config, work, retry, shared):
            done += 1
            progress(Progress("rephrase", done, len(blocks)))


def _ask_and_finish(
    stack: ExitStack,
    graph: Graph,
    todo: Sequence[int],
    config: CurateConfig,
    work: Path,
    retry: bool,
    shared: tuple[Any, ...],
) -> Any:
    asks = config.has("rephrase") and any(True for block in todo for _ in open_requests(work, block, config, retry))
    if not asks:
        return graph.each(finish_block, todo, *shared)
    if config.generate.backend == "vllm":
        from trinity.curate.engines import ask_engines

        ask_engines(graph, todo, config, work, retry)
        return graph.each(finish_block, todo, *shared)
    endpoints = config.generate.endpoints
    if config.generate.backend == "embedded":
        endpoints = (stack.enter_context(embedded(config.generate)),)
    purse = graph.purse(config, *spent(work))
    return graph.ask(todo, config, endpoints, work, retry, purse, finish_block, shared)


def _is_open(path: Path, retry: bool) -> bool:
    """Whether a block is not committed, or was with requests that can still be asked."""
    if not path.exists():
        return True
    about = read_about(path)
    return bool(about["unasked"] or (retry and about["failed"]))


def _check_runner(config: CurateConfig, make_runner: MakeRunner | None) -> None:
    """Raises UserError when a recipe of code is asked for and nothing can run its programs."""
    if not config.has("rephrase") or not config.has("validate"):
        return
    names = [rewrite.recipe for rewrite in config.rephrase if load_recipe(rewrite.recipe).form == "code"]
    if names and make_runner is None:
        raise UserError(
            f"the recipe {names[0]} runs programs that a model wrote, which needs a sandbox, and none is there: leave "
            "this recipe out"
        )
    if names and make_runner is not None:
        made = make_runner()  # says what is missing before the work begins
        close = getattr(made, "close", None)
        if close is not None:
            close()


def _check_backend(config: CurateConfig) -> None:
    if not config.has("rephrase"):
        return
    if config.generate.backend == "embedded" and config.run.ray != LOCAL:
        raise UsageError(
            f"the embedded server is reached from this machine alone, and run.ray is {config.run.ray!r}: start servers "
            "and name them under generate.endpoints"
        )
    if config.generate.backend == "vllm" and (config.budget.tokens or config.budget.money):
        raise UsageError("a budget is kept for endpoints, not for vLLM engines of one's own; leave [budget] out")


def _judges(config: CurateConfig, make_runner: MakeRunner | None) -> Judges:
    tests = None
    if config.checks.tests and config.has("validate"):
        tests = Overlap(config.checks.ngram)
        for name in config.checks.tests:
            path = Path(name)
            for number, record in enumerate(read_records(path, {}), start=1):
                tests.add(path.name.split(".")[0], str(record.get("id", number)), question_text(record))
    quality = None
    if config.label.examples is not None and config.has("label"):
        quality = train(read_examples(Path(config.label.examples)))
    return Judges(quality[0] if quality else None, tests, make_runner, quality[1] if quality else None)


def _plan(config: CurateConfig, files: Sequence[InputFile]) -> dict[str, Any]:
    settings = config.model_dump(mode="json", exclude={**_ANY_TIME, "generate": _ANY_TIME_GENERATE})
    if config.generate.backend != "endpoint":
        del settings["generate"]["endpoints"]
    for endpoint in settings["generate"].get("endpoints", []):
        del endpoint["concurrency"]
    recipes = {rewrite.recipe: load_recipe(rewrite.recipe).fingerprint for rewrite in config.rephrase}
    read = [path for path in (*config.checks.tests, config.label.examples) if path is not None]
    return {
        "settings": settings,
        "recipes": recipes,
        "files": {file.path: [file.domain, file.size, file.mtime_ns] for file in files},
        "contents": {path: hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] for path in read},
    }


def _claim(out: Path, plan: dict[str, Any], force: bool) -> None:
    """Make `out` the place of this plan; UserError if it is another's place."""
    ours = {DATA, WORK, RESULT, QUALITY, REPORT, "plan.json"}
    strange = sorted({path.name for path in out.iterdir()} - ours)
    if strange:
        raise UserError(f"{out} holds {strange[0]}, which is no part of a curation; name another directory")
    if force:
        (out / RESULT).unlink(missing_ok=True)
        for name in (DATA, WORK):  # the plan goes last: until then a kill leaves what `force` may remove
            shutil.rmtree(out / name, ignore_errors=True)
        for name in (QUALITY, REPORT, "plan.json"):
            (out / name).unlink(missing_ok=True)
    started = out / "plan.json"
    if started.exists():
        difference = first_difference(read_json(started), plan)
        if difference is not None:
            raise UserError(
                f"{out} was made differently: {difference}; name another directory, or start over with --force"
            )
    elif any(out.iterdir()):
        raise UserError(f"{out} holds a curation whose plan is lost; start over with --force")
    else:
        write_json(started, plan)


def first_difference(before: Any, now: Any, key: str = "") -> str | None:
    """The first difference of two plans in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in (*now, *(name for name in before if name not in now)):
            where = f"{key}.{name}" if key and key != "settings" else name
            if name not in before:
                return f"without {where}"
            if name not in now:
                return f"with {where}"
            found = first_difference(before[name], now[name], where)
            if found is not None:
                return found
        return None
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return next((d for i, (a, b) in pairs if (d := first_difference(a, b, f"{key}.{i}")) is not None), None)
    return None if before == now else f"with {key} = {before} and not {now}"
