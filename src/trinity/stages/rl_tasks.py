"""What `rl.environment` names: a source of tasks, those of them that training never meets, and their sandbox."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trinity.base.errors import UsageError
from trinity.base.rng import derive
from trinity.rl.environments.code_tasks import CodeTasks
from trinity.rl.environments.environment import Environment, Row, Session
from trinity.rl.environments.questions import Instructions, WordProblems
from trinity.rl.environments.repository import Repository
from trinity.rl.environments.tasks import task_source
from trinity.rl.rewards.attempt import Rubric
from trinity.rl.sample import Task
from trinity.rl.sandbox.pool import Sandbox
from trinity.stages.setup import Stage

TaskSource = Callable[[int, int], Task]
"""(number, attempt) -> the task; the same one for the same numbers, on every rank and after every resumption."""


@dataclass(frozen=True)
class EnvironmentTasks:
    """The tasks of an environment of messages, as a source."""

    name: str
    training: TaskSource
    held_out: TaskSource

    def __call__(self, number: int, attempt: int) -> Task:
        return self.training(number, attempt)


class _HeldOut:
    """The environment's held-out tasks in place of the others."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self.name: str = environment.name
        self.tools: Sequence[Mapping[str, Any]] = environment.tools
        self.rubric: Rubric = environment.rubric
        self.max_turns: int = environment.max_turns

    def row(self, number: int, *, held_out: bool = False) -> Row:
        return self._environment.row(number, held_out=True)

    def session(self, row: Row) -> Session:
        return self._environment.session(row)


def of_environment(environment: Environment, stage: Stage) -> EnvironmentTasks:
    tokenizer = stage.tokenizer
    return EnvironmentTasks(
        environment.name, task_source(environment, tokenizer), task_source(_HeldOut(environment), tokenizer)
    )


def named_tasks(stage: Stage, stack: ExitStack) -> EnvironmentTasks:
    """The environment that `rl.environment` names, other than arithmetic; its sandbox is closed with `stack`.

    Raises UsageError when it needs `rl.questions`, UserError when those cannot be read or nothing isolates programs.
    """
    settings, seed = stage.config.rl, derive(stage.config.runtime.seed, "rl")
    name = settings.environment
    if name in ("word-problems", "instructions"):
        if not settings.questions:
            raise UsageError(f"rl.environment = {name} needs its questions: rl.questions=FILE.jsonl")
        kind = WordProblems if name == "word-problems" else Instructions
        return of_environment(kind(Path(settings.questions), seed), stage)
    sandbox = stack.enter_context(Sandbox())
    kind = CodeTasks if name == "code" else Repository
    return of_environment(kind(sandbox, seed), stage)
