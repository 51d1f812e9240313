"""Pretraining: the phases of the data mix, a batch ramp, warm-up, stable and decay; a share of retrieval documents."""

from pathlib import Path

from trinity.config import RunConfig
from trinity.data.retrieval import Hay
from trinity.data.validation import ValidationRows
from trinity.optim.schedule import StepPlan
from trinity.stages.evaluations import beginnings, heldout_evaluation, sample_evaluation
from trinity.stages.finish import StageResult, run_stage
from trinity.stages.setup import SILENT, check_batches, open_shards, open_stage
from trinity.stages.sources import RetrievalSource, TextSource
from trinity.train.job import Progress, TrainJob
from trinity.train.losses import language_model_loss


def run(
    config: RunConfig, run_dir: Path, *, start_from: Path | None = None, progress: Progress = SILENT
) -> StageResult:
    """Pretrain from new weights, or go on from those of `start_from`; a started `run_dir` is resumed.

    Raises UserError or UsageError for whatever is missing or does not fit together (`setup.open_stage`, `Loader`).
    """
    stage = open_stage("pretrain", config, run_dir, start_from)
    settings = config.pretrain
    check_batches(stage, [entry.rows for entry in settings.batch])
    train_shards, val_shards = open_shards(stage)
    plan = StepPlan.pretrain(settings)
    heldout = heldout_evaluation(stage, ValidationRows(val_shards, settings.seq_len, settings.eval_rows))
    with TextSource(stage, train_shards, settings.phases, plan) as text:
        source = text
        if settings.niah_share:
            hay = Hay(train_shards, stage.tokenizer)
            source = RetrievalSource(stage, text, plan, settings.niah_share, hay)
        job = TrainJob(
            config=config,
            stage=stage.name,
            stage_config=settings,
            model=stage.model,
            optimizer=stage.optimizer,
            source=source,
            loss=language_model_loss,
            plan=plan,
            run_dir=stage.run,
            evaluations=[heldout, sample_evaluation(stage, beginnings(val_shards))],
            describe=source.describe,
            fingerprints={
                "tokenizer": stage.tokenizer.fingerprint,
                "shards": train_shards.fingerprint,
                **source.fingerprints,
            },
            progress=progress,
        )
        return run_stage(stage, job)
