"""vLLM engines inside the cluster, by `ray.data.llm`: requests stream through them, answers are journaled in batches.

Each request is a row. Ray Data keeps several batches in every engine, so that its queue never runs dry, and holds back
the reading of blocks when engines are slower.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trinity.base.errors import UserError
from trinity.config.curate import CurateConfig
from trinity.curate.answers import Answer, Journal
from trinity.curate.asking import open_requests
from trinity.curate.graph import Graph
from trinity.data.ray_team import Row, guarded, opened

CONCURRENT_BATCHES = 8
STAGES = 4
"""Reading requests, chat template, tokenizing, detokenizing: with too few CPUs they would wait for each other."""


def ask_engines(graph: Graph, blocks: Sequence[int], config: CurateConfig, work: Path, retry: bool) -> None:
    """Answer all open requests of the blocks. Raises UserError without vLLM and `ray.data.llm`."""
    ray, build, engine_config = _llm()
    settings = config.generate
    assert settings.model is not None
    cpus = ray.cluster_resources().get("CPU", 0)
    if cpus < STAGES + settings.workers:
        raise UserError(
            f"vLLM in Ray runs {STAGES} stages beside its engines, of a CPU each, and the cluster has {cpus:g}: set "
            f"run.workers to at least {STAGES + settings.workers} (of a local cluster they may be more than there are)"
        )
    here, model = os.getcwd(), str(Path(settings.model).resolve())  # noqa: PTH109
    kwargs: dict[str, Any] = {"max_num_seqs": settings.concurrency, **settings.engine}
    options: dict[str, Any] = {} if settings.on_gpu else {"placement_group_config": {"bundles": [{"CPU": 1}]}}
    processor = build(
        engine_config(
            model_source=model,
            engine_kwargs=kwargs,
            concurrency=(settings.workers, settings.workers),
            batch_size=settings.engine_batch,
            max_concurrent_batches=CONCURRENT_BATCHES,
            should_continue_on_error=True,
            log_engine_metrics=False,
            **options,
        ),
        preprocess=_before,
        postprocess=_after,
    )
    rows = ray.data.from_items([{"block": block} for block in blocks], override_num_blocks=len(blocks))
    asked = rows.flat_map(_reader(here, config, work, retry), **graph.task)
    done = processor(asked).map_batches(_keeper(here, work, model), batch_size=settings.engine_batch, num_cpus=0)
    for row in done.iter_rows():
        opened(row)


def _llm() -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    try:
        import vllm  # noqa: F401, I001  # pyright: ignore[reportMissingImports]
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data.llm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"generate.backend vllm needs vLLM and ray.data.llm on every node ({error}): pip install vllm 'ray[llm]', "
            "or start servers and use the backend endpoint"
        ) from None
    return ray, ray.data.llm.build_processor, ray.data.llm.vLLMEngineProcessorConfig


def _reader(here: str, config: CurateConfig, work: Path, retry: bool) -> Callable[[Row], Iterator[Row]]:
    def read(row: Row) -> Iterator[Row]:
        os.chdir(here)
        for request in open_requests(work, int(row["block"]), config, retry):
            body = request.body(config)
            yield {"block": int(row["block"]), "key": request.key, "body": json.dumps(body, ensure_ascii=False)}

    return read


def _before(row: Row) -> Row:
    body = json.loads(row["body"])
    sampling = {name: body[name] for name in ("max_tokens", "temperature", "top_p", "seed")}
    return {"messages": body["messages"], "sampling_params": sampling, **row}


def _after(row: Row) -> Row:
    most = json.loads(row["body"])["max_tokens"]
    made = _count(row.get("num_generated_tokens"))
    return {
        "block": row["block"],
        "key": row["key"],
        "text": row.get("generated_text") or "",
        "failure": str(row.get("__inference_error__") or "")[:200],
        "finish": "length" if made >= most else "stop",
        "prompt_tokens": _count(row.get("num_input_tokens")),
        "completion_tokens": made,
    }


def _keeper(here: str, work: Path, model: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Journals a batch of answers."""

    def keep(batch: dict[str, Any]) -> dict[str, Any]:
        os.chdir(here)
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]

        def write() -> int:
            for block in sorted({int(row["block"]) for row in rows}):
                with Journal(work, block) as journal:
                    for row in rows:
                        if int(row["block"]) == block:
                            journal.write(_answer(row, model))
            return len(rows)

        return {name: [value] for name, value in guarded(write).items()}

    return keep


def _answer(row: Row, model: str) -> Answer:
    """Rows of failed requests skip `_after`; in a batch they have nothing in its columns."""
    error = str(row.get("failure") or "") if row.get("failure") == row.get("failure") else ""
    error = error or str(row.get("__inference_error__") or "")[:200]
    text = row.get("text")
    text = text if isinstance(text, str) and not error else ""
    failure = "engine error" if error else "" if text.strip() else "engine gave an empty text"
    return Answer(
        str(row["key"]),
        "" if failure else text,
        failure,
        str(row.get("finish") or ""),
        Path(model).name,
        "vLLM in Ray",
        _count(row.get("prompt_tokens")),
        _count(row.get("completion_tokens")),
        troubles={f"engine error: {error[:80]}": 1} if error else {},
    )


def _count(value: Any) -> int:
    """A number of tokens; None and NaN, which stand for nothing, are none."""
    return 0 if value is None or value != value else int(value)
