"""Supervised fine-tuning on conversations: loss on what the assistant wrote, whole conversations packed into rows."""

from pathlib import Path

from trinity.base.errors import UsageError
from trinity.config import RunConfig
from trinity.data.chat import ChatRows, is_held_out, read_conversations
from trinity.optim.schedule import StepPlan
from trinity.stages.evaluations import heldout_evaluation, sample_evaluation, template_evaluation, turn_prompt
from trinity.stages.finish import StageResult, run_stage
from trinity.stages.setup import SILENT, check_batches, open_stage
from trinity.stages.sources import ChatSource, HeldOutChats
from trinity.train.job import Progress, TrainJob
from trinity.train.losses import language_model_loss


def run(
    config: RunConfig, run_dir: Path, *, start_from: Path | None = None, progress: Progress = SILENT
) -> StageResult:
    """Tune the model of `start_from` (required for a new run) on `sft.conversations`.

    Raises UserError or UsageError for whatever is missing or does not fit together (`setup.open_stage`, `data.chat`).
    """
    settings = config.sft
    if start_from is None:
        raise UsageError("sft needs a model to start from: name its run or model directory")
    if not settings.conversations:
        raise UsageError('sft.conversations is empty: name files of conversations, sft.conversations=["chats.jsonl"]')
    stage = open_stage("sft", config, run_dir, start_from)
    check_batches(stage, [settings.batch_rows])
    conversations = list(read_conversations(settings.conversations))
    held_out = [c for c in conversations if is_held_out(c, settings.held_out)]
    training = [c for c in conversations if not is_held_out(c, settings.held_out)]
    data = ChatRows(
        training,
        stage.tokenizer,
        settings.seq_len,
        config.runtime.seed,
        turns=settings.turns,
        packing=settings.packing,
    )
    rows = sum(len(data.plan(epoch)) for epoch in range(settings.epochs))
    plan = StepPlan.constant(settings, "sft", -(-rows // settings.batch_rows), settings.batch_rows)
    evaluations = []
    if held_out:
        kept = ChatRows(held_out, stage.tokenizer, settings.seq_len, turns=settings.turns)
        most = config.model.max_positions - settings.sample_tokens
        prompts = [turn_prompt(stage.tokenizer, conversation, number) for number, conversation in enumerate(held_out)]
        prompts = [prompt for prompt in prompts if len(prompt) <= most]
        evaluations = [
            heldout_evaluation(stage, HeldOutChats(kept, settings.eval_rows)),
            sample_evaluation(stage, prompts[:4]),
        ]
        if prompts[: settings.template_samples]:
            asked = prompts[: settings.template_samples]
            evaluations.append(template_evaluation(stage, asked, settings.sample_tokens))
    job = TrainJob(
        config=config,
        stage=stage.name,
        stage_config=settings,
        model=stage.model,
        optimizer=stage.optimizer,
        source=ChatSource(stage, data, plan, settings.epochs),
        loss=language_model_loss,
        plan=plan,
        run_dir=stage.run,
        evaluations=evaluations,
        fingerprints={"tokenizer": stage.tokenizer.fingerprint, "conversations": data.fingerprint},
        about={"conversations": len(training), "cut": data.truncated, "dropped": data.dropped},
        progress=progress,
    )
    return run_stage(stage, job)
