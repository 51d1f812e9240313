"""Everything that a step depends on, as one snapshot, and back."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trinity.base import dist
from trinity.base.errors import UserError
from trinity.train import resume
from trinity.train.adapted import AdaptedWeights
from trinity.train.checkpoint import Snapshot, load_checkpoint
from trinity.train.guard import GuardPolicy, SpikeGuard
from trinity.train.host_copy import HostCopies
from trinity.train.job import TrainJob
from trinity.train.manifest import MODEL, OPTIMIZER, STATE
from trinity.train.metrics import ExpertWatch
from trinity.train.precision import MasterWeights
from trinity.train.run_checkpoints import verify_together


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
    masters: MasterWeights | AdaptedWeights
    guard: SpikeGuard
    policy: GuardPolicy
    watch: ExpertWatch
    copies: HostCopies
    device: torch.device

    def capture(self, position: Position, tokens: int, *, copy: bool) -> Snapshot:
        """The present state on the CPU, of sharded tensors this rank's part. A collective.

        With `copy` training may go on: what it holds is overwritten by the next such call and by nothing else. Without,
        it may share memory with what trains. Ranks that save nothing hold nothing.
        """
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
        model, optimizer, part = self._model(), job.optimizer.state_dict(), None
        if job.sharding is not None:
            model, optimizer, part = resume.own_part(job.sharding, model, optimizer)
        elif not dist.is_main():
            model, optimizer = {}, {}
        frozen = resume.frozen_json(state)
        if not copy:
            return Snapshot(position.step, resume.to_host(model), resume.to_host(optimizer), frozen, part)
        files = ((MODEL, model), (OPTIMIZER, optimizer))
        taken = self.copies.take({(file, name): t for file, tensors in files for name, t in tensors.items()})
        model, optimizer = ({n: t for (f, n), t in taken.tensors.items() if f == file} for file, _ in files)
        return Snapshot(position.step, model, optimizer, frozen, part, taken.ready)

    def _model(self) -> dict[str, Tensor]:
        if self.job.sharding is not None:
            return self.job.sharding.state()
        return self.masters.state()

    def restore(self, path: Path) -> Position:
        """Take over a checkpoint of any layout. Raises UserError when it is damaged or of another stage, plan, model
        or data. A collective."""
        slices = None
        if dist.world_size() > 1:
            verify_together(path)
            sharding = self.job.sharding
            slices = {} if sharding is None else resume.state_slices(sharding, self.job.optimizer.state_dict())
        snapshot = dist.together(lambda: load_checkpoint(path, slices))
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
        model = self._model()
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
