"""Trains an opened stage and exports what came of it."""

import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trinity.base import dist
from trinity.base.errors import UserError
from trinity.export.afmoe import export_afmoe
from trinity.export.peft import export_peft
from trinity.export.shards import export_shards
from trinity.infer.load import checkpoint_tensors
from trinity.model.transformer import Transformer
from trinity.stages.setup import Stage
from trinity.train.checkpoint import checkpoint_name
from trinity.train.job import TrainJob, TrainResult
from trinity.train.launch import LAUNCHED, RECORDED, is_recorded
from trinity.train.loop import train

GATE_PARAMS = 10_000_000_000
"""Of a model trained by several processes, up to this size the export compares logits, for which one process holds
three copies in float32 on the CPU; beyond it compares tensors."""


@dataclass(frozen=True)
class StageResult:
    train: TrainResult
    model_dir: Path | None
    """The export of the final weights; None when the stage was interrupted or saves nothing."""


def about(stage: Stage, job: TrainJob) -> dict[str, Any]:
    """Environment, the path that each operation takes, and which optimizer moves what, for the start event."""
    device = torch.cuda.get_device_name(stage.device) if stage.device.type == "cuda" else platform.processor() or "cpu"
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "ranks": dist.world_size(),
        "layout": asdict(stage.sharding.meshes.sizes) if stage.sharding else None,
    }
    # The shortest row that has a window: the paths are the same, the masks of a long row would cost memory.
    length = min(stage.settings.seq_len // stage.config.parallel.context, stage.config.model.window + 1)
    layout = stage.model.layout((1, length + length % 2))
    alone = dist.world_size() == 1 and stage.sharding is None
    recorded = is_recorded(stage.config.runtime, stage.device, job.loss, stage.config.loss, alone=alone)
    return {
        "environment": environment,
        "paths": stage.model.paths(layout) | {"micro-batch": RECORDED if recorded else LAUNCHED},
        "generates": stage.generates,
        "optimizer": [list(row) for row in stage.optimizer.table()],
    }


def run_stage(stage: Stage, job: TrainJob) -> StageResult:
    """Train, or go on where the run was left, and export the final weights to RUN/model."""
    if not stage.run.read_events("start") and stage.run.model.exists():  # it would be replaced at the end
        raise UserError(f"{stage.run.model} exists already, but no run is recorded beside it: choose another --run-dir")
    stage.run.create()
    result = train(
        replace(job, about={**about(stage, job), **job.about}, sharding=stage.sharding, adapters=stage.adapters)
    )
    if not (result.finished and stage.config.checkpoint.enabled):
        return StageResult(result, None)
    dist.place.arrive("the export")
    dist.on_main(lambda: _export(stage, result.step))
    return StageResult(result, stage.run.model)


def _export(stage: Stage, step: int) -> None:
    config = stage.config.model
    dtype = "float32" if stage.config.runtime.dtype == "float32" else "bfloat16"
    origin = {"run": stage.config.name, "stage": stage.name, "step": str(step)}
    target, model = stage.run.model, stage.model
    if stage.sharding is not None:
        saved = checkpoint_tensors(stage.run.checkpoints / checkpoint_name(step))
        if config.num_params() > GATE_PARAMS:
            export_shards(saved, config, stage.tokenizer, target, dtype=dtype, origin=origin, force=True)
            return
        model = Transformer(config)
        model.load_state_dict({name: saved.read(name) for name in saved.names})
    export_afmoe(model, config, stage.tokenizer, target, dtype=dtype, origin=origin, force=True)
    if stage.adapters is not None:
        export_peft(stage.adapters, str(stage.start_from), stage.run.path / "adapter")
