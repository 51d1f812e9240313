"""The training loop of every stage: steps, evaluations, checkpoints, the guard's decisions, and leaving in good order.

Order at a border between steps: the step's record, then evaluations, then the checkpoint. A checkpoint therefore
implies every record up to its step, and a resumed run drops the records after it: no step is recorded twice or not at
all.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trinity.base import dist
from trinity.base.errors import UserError
from trinity.base.rundir import RunDir
from trinity.optim.schedule import PlannedStep
from trinity.train import resume
from trinity.train.adapted import AdaptedWeights
from trinity.train.evaluating import evaluate, is_due
from trinity.train.guard import GuardPolicy, SpikeGuard
from trinity.train.hardware import peak_flops
from trinity.train.host_copy import HostCopies
from trinity.train.interrupt import StopSignal
from trinity.train.job import TrainJob, TrainResult
from trinity.train.journal import Journal
from trinity.train.metrics import ExpertWatch
from trinity.train.precision import MasterWeights
from trinity.train.records import InFlight, documents, step_head, step_record
from trinity.train.run_checkpoints import RunCheckpoints
from trinity.train.state import Position, TrainingState
from trinity.train.step import StepRunner


def train(job: TrainJob) -> TrainResult:
    """Run a stage to its end, or on from where its run directory stands.

    Raises UserError when the run directory belongs to another process, stage or settings, when no whole checkpoint is
    left, when the disk is full and when training does not recover. SIGTERM and Ctrl-C end it after the step, saved.
    """
    with ExitStack() as stack:
        dist.on_main(lambda: _occupy(job.run_dir, stack))
        stop = stack.enter_context(StopSignal())
        loop = _Loop(job, stop)
        try:
            return loop.run()
        finally:
            loop.close()


def _occupy(run_dir: RunDir, stack: ExitStack) -> None:
    run_dir.create()
    stack.enter_context(run_dir.lock())
    run_dir.mend()


class _Loop:
    def __init__(self, job: TrainJob, stop: StopSignal) -> None:
        self.job, self.stop, config = job, stop, job.config
        self.device = next(job.model.parameters()).device
        dtype = getattr(torch, config.runtime.dtype)
        # A sharded model gathers its weights in that type by itself.
        copies = config.runtime.master_weights and job.sharding is None
        working = dtype if copies else torch.float32
        self.masters = (
            MasterWeights(job.model, working)
            if job.adapters is None
            else AdaptedWeights(job.model, job.adapters, dtype)
        )
        self.guard = SpikeGuard(config.guard, self.device)
        self.policy = GuardPolicy(config.guard)
        self.watch = ExpertWatch()
        self.journal = Journal(job)
        self.checkpoints = RunCheckpoints(job, self.journal)
        self.copies = HostCopies(self.device)
        self.state = TrainingState(job, self.masters, self.guard, self.policy, self.watch, self.copies, self.device)
        self.runner = StepRunner(
            job.model,
            job.optimizer,
            job.loss,
            config,
            self.guard,
            self.masters,
            self.device,
            job.sharding,
            before_update=self.copies.protect,
        )
        self.flops = config.model.flops_per_token(job.stage_config.seq_len)
        self.peak, self.peak_source = peak_flops(self.device, dtype)
        # A GPU is given the next step before the last one's numbers are read; on a CPU there is nothing to overlap.
        self.lag = 1 if self.device.type == "cuda" else 0
        self.in_flight: list[InFlight] = []
        self.step = 0
        self.finished: str | None = None
        self.checkpoint_due = False
        self.stop_agreed: str | None = None

    # The run

    def run(self) -> TrainResult:
        self._open()
        total = len(self.job.plan)
        while self.finished is None and self.step < total:
            if not (self._advance() and self._settle(self.lag)):
                continue  # rolled back
            self.checkpoints.report()
            signal = self.stop.received if dist.world_size() == 1 else self.stop_agreed
            if self._border_due(signal) and self._settle(0):
                self._border(signal)
                if signal is not None and self.finished is None and self.step < total:
                    return self._leave(signal)
        if self.finished is None:
            self.finished = "the plan is done"
        self.checkpoints.wait()
        self._event("finish", reason=self.finished, skips=self.policy.skips, rollbacks=self.policy.rollbacks)
        return self._result(self.finished)

    def close(self) -> None:
        """Give the model its float32 parameters back, and let a save under way end; called however the run ends."""
        self.checkpoints.join()
        self.copies.close()
        self.masters.restore()

    def _leave(self, signal: str) -> TrainResult:
        self.checkpoints.wait()
        saved = self.checkpoints.saved_step
        kept = f"checkpoint of step {saved} is saved" if saved >= 0 else "nothing is saved"
        reason = f"stopped by {signal} after step {self.step}; {kept}"
        self._event("stop", reason=reason, checkpoint=saved)
        return self._result(reason)

    def _result(self, reason: str) -> TrainResult:
        return TrainResult(self.step, self._tokens(), self.finished is not None, reason, self.journal.last_step)

    def _tokens(self) -> int:
        """Tokens of the plan up to the present step."""
        if self.step == 0:
            return 0
        planned = self.job.plan[self.step - 1]
        return planned.tokens_before + planned.rows * self.job.stage_config.seq_len

    # Steps

    def _advance(self) -> bool:
        """Take the next step, or pass over its data; False when an earlier step led to a rollback instead."""
        planned = self.job.plan[self.step]
        if planned.step + 1 in self.policy.jumps:
            if not self._settle(0):
                return False
            self._jump(planned)
        else:
            started = time.perf_counter()
            rows = self._batch(planned)
            self.guard.enter_phase(planned.phase)
            dist.place.arrive(f"step {planned.step + 1}")
            packed = self.runner.run(planned, rows, stop=self.stop.received is not None)
            self.in_flight.append(InFlight(planned, rows, packed, started))
        self.step += 1
        return True

    def _batch(self, planned: PlannedStep) -> Sequence[Any]:
        """This rank's micro-batches, of rows that are spread over ranks its part."""
        rows, sharding = self.job.source.next_batch(planned.step), self.job.sharding
        return rows if sharding is None else [sharding.take(batch) for batch in rows]

    def _jump(self, planned: PlannedStep) -> None:
        rows = self._batch(planned)
        self._event("jump", step=planned.step + 1, **documents(self.job, rows, None))
        nothing = dict.fromkeys(("loss", "ce", "z_loss", "sequence_loss", "grad_norm"))
        self.journal.metric({**step_head(self.job, planned), **nothing, "skipped": True, "jumped": True})

    def _settle(self, most: int) -> bool:
        """Read steps in flight until `most` are left; False when that led to a rollback."""
        while len(self.in_flight) > most:
            if not self._settle_oldest():
                return False
        return True

    def _settle_oldest(self) -> bool:
        """Read the oldest step in flight, record it and follow the guard; False when that led to a rollback."""
        flight = self.in_flight.pop(0)
        values = flight.packed.read()
        if values.pop("stop") > 0:
            self.stop_agreed = self.stop.received or "a signal on another rank"
        # From start to start: when a step's numbers are read says little where the host runs ahead of the device.
        seconds = (self.in_flight[0].started if self.in_flight else time.perf_counter()) - flight.started
        step, bad = flight.planned.step + 1, values["skip"] != 0
        counts_LE = values["counts"]
        died = [] if bad else self.watch.update(counts_LE)
        dead_L, spikes = self.watch.dead_L(), self.policy.skips + int(bad)
        utilisation = self.flops / (self.peak * dist.world_size())
        self.journal.metric(step_record(self.job, flight, values, seconds, utilisation, dead_L, spikes))
        for layer, experts in died:
            real = layer + self.job.config.model.num_dense_layers
            self._event("dead_expert", step=step, layer=real, experts=experts)
        if not bad:
            self.policy.good()
            return True
        loss_score, norm_score = values["spike_scores"].tolist()
        self._event(
            "skip",
            step=step,
            loss=values["loss"],
            grad_norm=values["grad_norm"],
            reason="spike" if np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"]) else "not finite",
            loss_score=loss_score,
            grad_norm_score=norm_score,
            **documents(self.job, flight.rows, values["means"]),
        )
        try:
            unstable = self.policy.bad(step)
        except UserError as error:
            self._event("stop", step=step, reason=str(error))
            raise
        if unstable:
            self._roll_back(step)
        return not unstable

    def _roll_back(self, step: int) -> None:
        self.in_flight.clear()
        self.checkpoints.wait()
        whole = self.checkpoints.whole(self.step)
        if not whole:
            raise UserError(f"step {step} asks for a rollback, but {self.checkpoints.folder} has no whole checkpoint")
        target = self.policy.plan_rollback(list(whole), step)
        jumps = sorted(s for s in self.policy.jumps if s > target)
        counters = self.policy.state_dict()
        self._restore(whole[target])
        self.policy.load_state_dict(counters)
        self.journal.forget_after(self.step)
        self._event("rollback", step=step, to_step=target, jump_steps=jumps)

    # Borders between steps

    def _border_due(self, signal: str | None) -> bool:
        jumped = self.step in self.policy.jumps  # what a jump leaves behind may be older than a checkpoint of that step
        self.checkpoint_due |= self.step % self.job.config.checkpoint.every_steps == 0 and not jumped
        due = any(is_due(e, self.job.plan, self.step) for e in self.job.evaluations)
        return signal is not None or self.checkpoint_due or due or self.step == len(self.job.plan)

    def _border(self, signal: str | None) -> None:
        for evaluation in self.job.evaluations:
            if is_due(evaluation, self.job.plan, self.step):
                outcome = evaluate(self.job, evaluation, self.step, self.journal)
                if outcome.stop is not None:
                    self.finished = outcome.stop
        ends = self.finished is not None or self.step == len(self.job.plan)
        # Never after a bad step: what made it bad may be in the weights, and a checkpoint is what a rollback goes back
        # to.
        wanted = (self.checkpoint_due or signal is not None) and not self.policy.streak
        if ends or wanted:
            self._save(wait=ends or signal is not None or not self.job.config.checkpoint.asynchronous)
            self.checkpoint_due = False

    # Saving and restoring

    def _save(self, *, wait: bool) -> None:
        if not self.job.config.checkpoint.enabled:
            return
        dist.place.arrive(f"the checkpoint after step {self.step}")
        self.checkpoints.wait()  # the last copy must be on the disk before the next one takes its place
        snapshot = self.state.capture(Position(self.step, self.finished), self._tokens(), copy=not wait)
        self.checkpoints.save(snapshot, wait=wait)
        self.policy.checkpoint_written(self.step)

    def _open(self) -> None:
        """Start, or resume from the newest whole checkpoint."""
        job = self.job
        changed = dist.on_main(lambda: resume.open_settings(job.run_dir, job.config, job.stage))
        path = self.checkpoints.newest()
        if path is not None:
            self._restore(path)
        self.journal.forget_after(self.step)
        peak = {"peak_flops": self.peak, "peak_source": self.peak_source, **job.about}
        if path is None:
            if not dist.on_main(lambda: job.run_dir.read_events("start")):
                for evaluation in job.evaluations:
                    if evaluation.at_start:
                        evaluate(job, evaluation, 0, self.journal)
            parameters = job.config.model.num_params()
            self._event("start", parameters=parameters, steps=len(job.plan), **peak)
            self._save(wait=not job.config.checkpoint.asynchronous)
        else:
            self._event("resume", checkpoint=f"checkpoints/{path.name}", changed=changed, **peak)

    def _restore(self, path: Path) -> None:
        position = self.state.restore(path)
        self.step, self.finished, self.checkpoint_due = position.step, position.finished, False
        self.checkpoints.saved_step = position.step

    def _event(self, event: str, **fields: Any) -> None:
        self.journal.event(event, **{"step": self.step, **fields})
