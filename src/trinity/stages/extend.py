"""Context extension: straight to long rows, long documents favoured, needles to find; stops when they are found.

Nothing of the model changes: local windows and RoPE stay, only the global layers, which have no positional encoding,
see further.
"""

from pathlib import Path

from trinity.base.errors import UsageError
from trinity.config import Phase, RunConfig
from trinity.data.halves import Half
from trinity.data.retrieval import Hay
from trinity.data.validation import ValidationRows
from trinity.optim.schedule import StepPlan
from trinity.stages.evaluations import beginnings, haystack, heldout_evaluation, niah_evaluation, sample_evaluation
from trinity.stages.finish import StageResult, run_stage
from trinity.stages.setup import SILENT, check_batches, open_shards, open_stage
from trinity.stages.sources import RetrievalSource, TextSource
from trinity.train.job import Progress, TrainJob
from trinity.train.losses import language_model_loss


def run(
    config: RunConfig, run_dir: Path, *, start_from: Path | None = None, progress: Progress = SILENT
) -> StageResult:
    """Extend the model of `start_from` (required for a new run); MK-NIAH before, during and after.

    Raises UserError or UsageError for whatever is missing or does not fit together (`setup.open_stage`, `Loader`).
    """
    settings, grid = config.extend, config.eval
    if start_from is None:
        raise UsageError("extend needs a model to start from: name its run or model directory")
    longest = max(grid.niah_lengths)
    if longest > config.model.max_positions:
        raise UsageError(
            f"eval.niah_lengths has {longest}, more than model.max_positions = {config.model.max_positions}"
        )
    stage = open_stage("extend", config, run_dir, start_from)
    check_batches(stage, [settings.batch_rows])
    train_shards, val_shards = open_shards(stage)
    weights = settings.weights or config.pretrain.phases[-1].weights
    phase = Phase(name="extend", tokens=settings.tokens, weights=weights)
    plan = StepPlan(settings, [(phase.name, phase.tokens)], [(0, settings.batch_rows)])
    needles = niah_evaluation(
        stage, haystack(val_shards, stage.tokenizer, Half.EVALUATION), settings.niah_every, settings.stop_at
    )
    heldout = heldout_evaluation(stage, ValidationRows(val_shards, settings.seq_len, settings.eval_rows))
    with TextSource(stage, train_shards, [phase], plan, settings.length_bias) as text:
        source = text
        if settings.niah_share:
            source = RetrievalSource(stage, text, plan, settings.niah_share, Hay(train_shards, stage.tokenizer))
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
            evaluations=[heldout, sample_evaluation(stage, beginnings(val_shards)), needles],
            describe=source.describe,
            fingerprints={
                "tokenizer": stage.tokenizer.fingerprint,
                "shards": train_shards.fingerprint,
                **source.fingerprints,
            },
            progress=progress,
        )
        return run_stage(stage, job)
