"""Reinforcement learning on verifiable rewards: groups of sampled answers, the policy loss, the same training loop."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import nn

from trinity.base.errors import UsageError
from trinity.base.rng import derive
from trinity.config import RLConfig, RunConfig
from trinity.evals import arithmetic
from trinity.export.afmoe import write_model
from trinity.optim.schedule import StepPlan
from trinity.rl.rewards import exact_integer
from trinity.rl.rollout import Rollouts
from trinity.rl.sample import Sampler, Task
from trinity.rl.samplers import CopySampler, LiveSampler
from trinity.rl.server import ServerSampler
from trinity.stages.evaluations import arithmetic_evaluation, sample_evaluation
from trinity.stages.finish import StageResult, run_stage
from trinity.stages.policy import PolicyGradient, fingerprint, scorer, start_policy
from trinity.stages.rl_tasks import EnvironmentTasks, TaskSource, named_tasks
from trinity.stages.setup import SILENT, Stage, open_stage
from trinity.train.job import Evaluation, Outcome, Progress, TrainJob


def run(
    config: RunConfig,
    run_dir: Path,
    *,
    start_from: Path | None = None,
    progress: Progress = SILENT,
    environment: Callable[[Stage], TaskSource] | None = None,
) -> StageResult:
    """Improve the chat model of `start_from` (required for a new run) on the tasks of `rl.environment`, or of
    `environment`, which is called once with the opened stage.

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
    if settings.ahead and stage.sharding is not None:
        raise UsageError(
            "rl.ahead needs a copy of the weights, which several processes do not make: use rl.ahead=false"
        )
    if settings.kl and stage.sharding is not None:
        raise UsageError(
            "rl.kl needs a copy of the weights it starts from, which several processes do not make: use rl.kl=0, or "
            "start without torchrun"
        )
    if settings.server and stage.sharding is not None:
        raise UsageError("rl.server is synced by one process: start without torchrun, or sample natively")
    with ExitStack() as stack:
        if environment is None:
            named = settings.environment != "arithmetic"
            environment = (lambda opened: named_tasks(opened, stack)) if named else arithmetic_tasks
        return _run(stage, environment, progress)


def _run(stage: Stage, environment: Callable[[Stage], TaskSource], progress: Progress) -> StageResult:
    config, settings = stage.config, stage.config.rl
    source = environment(stage)
    seed = derive(config.runtime.seed, "rl")
    start = start_policy(stage) if settings.kl else None
    rollouts = Rollouts(
        settings,
        _fitting(source, settings),
        _sampler(stage, settings),
        scorer(stage.model, settings.temperature),
        seed,
        None if start is None else scorer(start, settings.temperature),
    )
    evaluations = [sample_evaluation(stage, [source(number, 0).prompt for number in range(4)])]
    if environment is arithmetic_tasks:
        evaluations.insert(0, arithmetic_evaluation(stage, "chat"))
    if isinstance(source, EnvironmentTasks) and settings.held_out_tasks:
        evaluations.insert(0, _held_out_rewards(stage, source, rollouts))
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
        evaluations=[*evaluations, _rollout_samples(stage, rollouts)],
        step_fields=rollouts.summary,
        fingerprints={"tokenizer": stage.tokenizer.fingerprint}
        | ({} if start is None else {"start policy": fingerprint(start)}),
        progress=progress,
    )
    return run_stage(stage, job)


def arithmetic_tasks(stage: Stage) -> TaskSource:
    """Generated arithmetic, of the problems that training may see."""
    seed = derive(stage.config.runtime.seed, "rl")

    def task(number: int, attempt: int) -> Task:
        rng = Random(derive(seed, "question", number, *([attempt] if attempt else [])))
        asked = arithmetic.chat_question(stage.tokenizer, rng, stage.config.rl.max_number, held_out=False)
        return Task(asked.prompt, lambda text, finished: exact_integer(text, asked.answer, finished=finished))

    return task


def _held_out_rewards(stage: Stage, source: EnvironmentTasks, rollouts: Rollouts) -> Evaluation:
    """`score` records: the mean reward of one sampled answer to each of `held_out_tasks` tasks that training never
    meets, before the first step, every `eval_every` steps and at the end."""
    seed = derive(stage.config.runtime.seed, "rl", "held out")

    def run(_model: nn.Module, _step: int) -> Outcome:
        numbers = range(stage.config.rl.held_out_tasks)
        samples = rollouts.play(
            [source.held_out(number, 0) for number in numbers], [derive(seed, number) for number in numbers]
        )
        rewards = np.array([sample.reward for sample in samples])
        score = {
            "value": float(rewards.mean()),
            "standard_error": float(rewards.std() / len(rewards) ** 0.5),
            "samples": len(rewards),
        }
        return Outcome([{"kind": "score", "name": source.name, **score}])

    return Evaluation(run, stage.settings.eval_every, at_start=True)


def _fitting(source: TaskSource, settings: RLConfig) -> TaskSource:
    """The same tasks; a prompt that leaves no room for its answer is refused."""

    def task(number: int, attempt: int) -> Task:
        found = source(number, attempt)
        needed = len(found.prompt) + settings.max_new_tokens
        if needed > settings.seq_len:
            raise UsageError(
                f"a question of {len(found.prompt)} tokens and an answer of rl.max_new_tokens = "
                f"{settings.max_new_tokens} do not fit into rl.seq_len = {settings.seq_len}: use {needed} or more"
            )
        return found

    return task


def _sampler(stage: Stage, settings: RLConfig) -> Sampler:
    if settings.server:
        return ServerSampler(settings, stage.tokenizer, stage.run.path / "served", lambda target: _serve(stage, target))
    if settings.ahead:
        return CopySampler(stage.model, stage.tokenizer, settings)
    return LiveSampler(stage.model, stage.tokenizer, settings, stage.gathered)


def _serve(stage: Stage, target: Path) -> None:
    """The weights as they are, for a server to load. What the stage leaves at its end passes the parity gate; this,
    written once a step, does not."""
    dtype = getattr(torch, stage.config.runtime.dtype)
    write_model(stage.model, stage.config.model, stage.tokenizer, target, dtype=dtype)


def _rollout_samples(stage: Stage, rollouts: Rollouts) -> Evaluation:
    """Answers of the last step's first question with their rewards, for samples.jsonl."""

    def run(_model: nn.Module, _step: int) -> Outcome:
        return Outcome(
            samples=[
                {
                    "prompt": stage.tokenizer.decode(sample.prompt),
                    "text": stage.tokenizer.decode(sample.tokens),
                    "reward": sample.reward,
                }
                for _, sample in rollouts.last_samples[:4]
            ]
        )

    return Evaluation(run, stage.settings.eval_every)
