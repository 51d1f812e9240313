"""Everything that a step depends on, as one snapshot, and back."""

from dataclasses import dataclass
from pathlib import Path

import torch

from trinity.base.errors import UserError
from trinity.train import resume
from trinity.train.checkpoint import Snapshot, load_checkpoint
from trinity.train.guard import GuardPolicy, SpikeGuard
from trinity.train.job import TrainJob
from trinity.train.manifest import MODEL, OPTIMIZER, STATE
from trinity.train.metrics import ExpertWatch
from trinity.train.precision import MasterWeights


@dataclass
class Position:
    """How far a run is."""

    step: int
    """Steps done."""
    finished: str | None
    """Why the stage ended, if an evaluation ended it."""


@dataclass
class TrainingState:
    """What a checkpoint covers: model, optimizer, source, random state, guard and expert watch."""

    job: TrainJob
    masters: MasterWeights
    guard: SpikeGuard
    policy: GuardPolicy
    watch: ExpertWatch
    device: torch.device

    def capture(self, position: Position, tokens: int, *, copy: bool) -> Snapshot:
        """The present state on the CPU, sharing no memory with what trains if `copy`. A collective."""
        job = self.job
        state = {
            "step": position.step,
            "tokens": tokens,
            "stage": job.stage,
            "finished": position.finished,
            "source": job.source.state_dict(),
            "random": resume.random_state(self.device),
            "guard": {"history": self.guard.state_dict(), **self.policy.state_dict()},
            "idle_experts": self.watch.state_dict(),
            "fingerprints": dict(job.fingerprints),
            "config": job.config.model_dump(mode="json"),
            "torch": torch.__version__,
        }
        model = resume.to_host(resume.model_state(job.model, self.masters), copy=copy)
        optimizer = resume.to_host(job.optimizer.state_dict(), copy=copy)
        return Snapshot(position.step, model, optimizer, resume.frozen_json(state))

    def restore(self, path: Path) -> Position:
        """Take over a checkpoint. Raises UserError when it is damaged or of another stage, plan, model or data."""
        snapshot = load_checkpoint(path)
        with resume.refuse_malformed(path / STATE):
            return self._take_over(path, snapshot)

    def _take_over(self, path: Path, snapshot: Snapshot) -> Position:
        state, job = snapshot.state, self.job
        if state["stage"] != job.stage:
            raise UserError(f"{path} is a checkpoint of stage {state['stage']!r}, not {job.stage!r}")
        if not 0 <= state["step"] <= len(job.plan):
            raise UserError(f"{path} is of step {state['step']}, but this run has {len(job.plan)} steps")
        for name, value in job.fingerprints.items():
            if state["fingerprints"].get(name) != value:
                raise UserError(f"{path} was trained with another {name} than this run has (their fingerprints differ)")
        model = resume.model_state(job.model, self.masters)
        resume.check_state(model, snapshot.model, str(path / MODEL))
        resume.check_state(job.optimizer.state_dict(), snapshot.optimizer, str(path / OPTIMIZER))
        resume.copy_state(model, snapshot.model)
        self.masters.refresh()
        job.optimizer.load_state_dict(dict(snapshot.optimizer))
        job.source.load_state_dict(state["source"])
        resume.restore_random(state["random"], self.device)
        self.guard.load_state_dict(state["guard"]["history"])
        self.policy.load_state_dict(state["guard"])
        self.watch.load_state_dict(state["idle_experts"])
        return Position(state["step"], state["finished"])
