"""Reinforcement learning on verifiable rewards: groups of sampled answers, the policy loss, the same training loop."""

from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import nn

from trinity.base.errors import UsageError
from trinity.base.rng import derive
from trinity.config import LossConfig, RLConfig, RunConfig
from trinity.data.rows import Rows, to_device
from trinity.evals import arithmetic
from trinity.evals.scoring import target_logprobs
from trinity.infer.engine import Engine
from trinity.infer.sampling import SamplingParams
from trinity.model.transformer import Transformer
from trinity.ops.cross_entropy import token_logprobs
from trinity.optim.schedule import StepPlan
from trinity.rl.loss import policy_loss
from trinity.rl.rewards import exact_integer
from trinity.rl.rollout import Rollouts, Sampled, Sampler, Scorer, Task
from trinity.stages.evaluations import arithmetic_evaluation, sample_evaluation
from trinity.stages.setup import SILENT, Stage, StageResult, open_stage, run_stage
from trinity.train.job import Progress, TrainJob
from trinity.train.losses import Batch, LossOutput, Share

_MAX_BATCH = 256  # answers sampled together


def run(
    config: RunConfig, run_dir: Path, *, start_from: Path | None = None, progress: Progress = SILENT
) -> StageResult:
    """Improve the chat model of `start_from` (required for a new run) on generated arithmetic.

    Raises UserError or UsageError for whatever is missing or does not fit together (`setup.open_stage`), and when a
    question and its answer would not fit into a row.
    """
    settings = config.rl
    if start_from is None:
        raise UsageError("rl needs a model to start from: name its run or model directory")
    if config.parallel.expert > 1 or config.parallel.context > 1:
        raise UsageError(
            "rl cannot share experts or rows: each rank samples answers of its own length, without the others; use "
            "parallel.expert=1 parallel.context=1"
        )
    stage = open_stage("rl", config, run_dir, start_from)
    if not stage.generates:
        raise UsageError(
            f"rl samples with all weights on each GPU, and the {config.model.num_params():,} parameters of this model "
            "do not fit beside its training state: use a smaller model"
        )
    seed = derive(config.runtime.seed, "rl")

    def task(number: int) -> Task:
        rng = Random(derive(seed, "question", number))
        asked = arithmetic.chat_question(stage.tokenizer, rng, settings.max_number, held_out=False)
        needed = len(asked.prompt) + settings.max_new_tokens
        if needed > settings.seq_len:
            raise UsageError(
                f"a question of {len(asked.prompt)} tokens and an answer of rl.max_new_tokens = "
                f"{settings.max_new_tokens} do not fit into rl.seq_len = {settings.seq_len}: use {needed} or more"
            )
        return Task(asked.prompt, lambda text, finished: exact_integer(text, asked.answer, finished=finished))

    rollouts = Rollouts(settings, task, _sampler(stage, settings), _scorer(stage.model), seed)
    scores = arithmetic_evaluation(stage, "chat")
    prompts = [task(number).prompt for number in range(4)]
    job = TrainJob(
        config=config,
        stage=stage.name,
        stage_config=settings,
        model=stage.model,
        optimizer=stage.optimizer,
        source=rollouts,
        loss=PolicyGradient(settings),
        plan=StepPlan.constant(settings, "rl", settings.steps, settings.prompts_per_step * settings.group),
        run_dir=stage.run,
        evaluations=[scores, sample_evaluation(stage, prompts)],
        step_fields=rollouts.summary,
        fingerprints={"tokenizer": stage.tokenizer.fingerprint},
        progress=progress,
    )
    return run_stage(stage, job)


@dataclass(frozen=True)
class PolicyGradient:
    """`rl.loss.policy_loss` on `rl.rollout.PolicyRows`, with the sequence-wise balance loss of every stage."""

    settings: RLConfig

    def __call__(self, model: nn.Module, batch: Batch, share: Share, settings: LossConfig) -> LossOutput:
        assert isinstance(model, Transformer)
        features = model.features(batch.tokens_BT, batch.segments_BT, batch.positions_BT)
        there_BT = batch.targets_BT != -100
        logprobs_N = token_logprobs(features.x_BTD[there_BT], model.head.weight, batch.targets_BT[there_BT])
        old_N = batch.extra["old_logprobs_BT"][there_BT]
        result = policy_loss(
            logprobs_N,
            torch.where(old_N.isnan(), logprobs_N.detach(), old_N),
            batch.extra["sampler_logprobs_BT"][there_BT],
            batch.extra["advantages_BT"][there_BT],
            clip_low=self.settings.clip_low,
            clip_high=self.settings.clip_high,
        )
        routing = features.routing
        part = (batch.segments_BT >= 0).sum() / share.tokens
        sequence_loss = settings.sequence_loss * part * routing.sequence_loss
        return LossOutput(
            loss=result.sum / share.targets + sequence_loss,
            terms={
                "policy_loss": result.sum.detach() / share.targets,
                "sequence_loss": sequence_loss.detach(),
                "kl_gap": result.gap_sum / share.targets,
                "clip_fraction": result.clipped_tokens / share.targets,
                "router_entropy": routing.entropy_L * part,
            },
            mean=result.sum.detach() / there_BT.sum().clamp(min=1),
            counts_LE=routing.counts_LE,
            extremes={"router_max": routing.logit_max_L, "router_negated_min": -routing.logit_min_L},
            margins_LEB=routing.margins_LEB,
        )


def _sampler(stage: Stage, settings: RLConfig) -> Sampler:
    stops = tuple(stage.tokenizer.stop_ids)

    def sample(prompts: list[list[int]], seeds: list[int]) -> list[Sampled]:
        longest = max(map(len, prompts)) + settings.max_new_tokens
        engine = Engine(stage.model, stage.tokenizer, max_batch=_MAX_BATCH, max_tokens=_MAX_BATCH * longest)
        params = [
            SamplingParams(
                max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, seed=seed, stop_ids=stops
            )
            for seed in seeds
        ]
        with stage.gathered():
            return [
                Sampled(done.text, done.tokens, done.logprobs, done.finish == "stop")
                for done in engine.generate(prompts, params)
            ]

    return sample


def _scorer(model: Transformer) -> Scorer:
    """The trainer's log-probabilities: the same forward pass and head as the loss."""

    @torch.no_grad()
    def score(rows: Rows) -> np.ndarray:
        return target_logprobs(model, to_device(rows, next(model.parameters()).device)).cpu().numpy()

    return score
