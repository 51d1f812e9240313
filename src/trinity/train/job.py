"""What the training loop is given and gives back. One loop serves every stage; stages differ in these values."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from trinity.base.rundir import RunDir
from trinity.config import RunConfig, StageConfig
from trinity.model.lora import Adapters
from trinity.optim.schedule import StepPlan
from trinity.parallel.shard import Sharding
from trinity.train.losses import LossFunction

Record = dict[str, Any]
"""One JSON object of metrics.jsonl, events.jsonl or samples.jsonl."""


class Source(Protocol):
    """What feeds a stage: the loader, conversations, or rollouts.

    The state is small JSON, the same on every rank, and speaks of the batches handed out, not of any prefetched.
    """

    def next_batch(self, step: int) -> Sequence[Any]:
        """The micro-batches of this rank for step `step` (from 0), asked for once a step, in order.

        Each is a dataclass with the NumPy arrays of `data.rows.Rows`; further arrays reach the loss by their field
        name.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Optimizer(Protocol):
    """The part of `optim.MuonAdamW` that the loop uses."""

    def set_lr(self, scale: float) -> None: ...

    def step(self, skip: Tensor | None = None, number: int = 0) -> None:
        """Update the parameters; a non-zero `skip` on the device leaves parameters and state unchanged."""
        ...

    def zero_grad(self) -> None: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found."""

    metrics: Sequence[Record] = ()
    """Records for metrics.jsonl; `stage` and `step` are added by the loop."""
    samples: Sequence[Record] = ()
    stop: str | None = None
    """A reason to end the stage here, such as a score that was reached."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation every `every` steps (0: never) and, with `at_end`, after the last step.

    `run` gets the model in eval mode without gradients, and must leave it and the random state of torch alone.
    """

    run: Callable[[nn.Module, int], Outcome]
    every: int
    at_end: bool = True
    at_phase_end: bool = False
    """Also after the last step of each phase of the plan."""
    at_start: bool = False
    """Also before the first step of a new run."""


class Progress(Protocol):
    """Who watches a run: the console. Called on the main rank only."""

    def on_step(self, record: Record) -> None: ...

    def on_event(self, record: Record) -> None: ...

    def on_metric(self, record: Record) -> None:
        """A record of an evaluation."""
        ...


class Silent:
    """Nobody watches."""

    def on_step(self, record: Record) -> None: ...

    def on_event(self, record: Record) -> None: ...

    def on_metric(self, record: Record) -> None: ...


@dataclass(frozen=True)
class TrainJob:
    """One stage of training, ready to run."""

    config: RunConfig
    stage: str
    """pretrain, extend, sft or rl: names the settings section and marks every record."""
    stage_config: StageConfig
    model: nn.Module
    """On its device, initialised; float32 parameters where `runtime.master_weights` is on."""
    optimizer: Optimizer
    """Built over this model's parameters."""
    source: Source
    loss: LossFunction
    plan: StepPlan
    run_dir: RunDir
    evaluations: Sequence[Evaluation] = ()
    describe: Callable[[Any], list[Record]] | None = None
    """Documents of one micro-batch as {source, id, domain, offset}, for events."""
    step_fields: Callable[[int, Sequence[Any]], Mapping[str, Any]] | None = None
    """Further fields of a step's record that are known on the host, such as the mean reward of its rollouts."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of what the run depends on (tokenizer, shards): a checkpoint with others is refused."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the start and resume events: the environment, the path that each operation takes."""
    progress: Progress = field(default_factory=Silent)
    sharding: Sharding | None = None
    """Of a model whose weights are spread over the ranks; without it every rank has a copy."""
    adapters: Adapters | None = None
    """Low-rank adapters, which then are all that trains; the optimizer is built over them."""


@dataclass(frozen=True)
class TrainResult:
    step: int
    """Steps done, skipped ones included."""
    tokens: int
    finished: bool
    """The plan is done, or an evaluation ended the stage; False after a signal."""
    reason: str
    last: Record | None
    """The last step's record; None when there was nothing left to do."""
