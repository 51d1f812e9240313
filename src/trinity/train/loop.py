"""The training loop of every stage: steps, evaluations, checkpoints, the guard's decisions, and leaving in good order.

Order at a border between steps: the step's record, then evaluations, then the checkpoint. A checkpoint therefore
implies every record up to its step, and a resumed run drops the records after it: no step is recorded twice or not at
all.
"""

import time
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
from trinity.train.checkpoint import (
    MODEL,
    OPTIMIZER,
    STATE,
    CheckpointInfo,
    CheckpointWriter,
    Snapshot,
    clean_partials,
    latest_good,
    list_checkpoints,
    load_checkpoint,
    verify_checkpoint,
)
from trinity.train.guard import GuardPolicy, SpikeGuard
from trinity.train.hardware import peak_flops
from trinity.train.interrupt import StopSignal
from trinity.train.job import Evaluation, Record, TrainJob, TrainResult
from trinity.train.metrics import ExpertWatch
from trinity.train.precision import MasterWeights
from trinity.train.records import InFlight, documents, step_head, step_record
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
        self.job, self.stop, self.run_dir, config = job, stop, job.run_dir, job.config
        self.device = next(job.model.parameters()).device
        dtype = getattr(torch, config.runtime.dtype)
        self.masters = MasterWeights(job.model, dtype if config.runtime.master_weights else torch.float32)
        self.guard = SpikeGuard(config.guard, self.device)
        self.policy = GuardPolicy(config.guard)
        self.watch = ExpertWatch()
        settings = config.checkpoint
        self.writer = CheckpointWriter(self.run_dir.checkpoints, settings.keep_last, settings.keep_every)
        self.runner = StepRunner(job.model, job.optimizer, job.loss, config, self.guard, self.masters, self.device)
        self.flops = config.model.flops_per_token(job.stage_config.seq_len)
        self.peak, self.peak_source = peak_flops(self.device, dtype)
        # A GPU is given the next step before the last one's numbers are read; on a CPU there is nothing to overlap.
        self.lag = 1 if self.device.type == "cuda" else 0
        self.in_flight: list[InFlight] = []
        self.step = 0
        self.finished: str | None = None
        self.saved_step = -1
        self.checkpoint_due = False
        self.last: Record | None = None
        self.stop_agreed: str | None = None

    # The run

    def run(self) -> TrainResult:
        self._open()
        total = len(self.job.plan)
        while self.finished is None and self.step < total:
            if not (self._advance() and self._settle(self.lag)):
                continue  # rolled back
            for info in self.writer.written():
                self._report_checkpoint(info)
            signal = self.stop.received if dist.world_size() == 1 else self.stop_agreed
            if self._border_due(signal) and self._settle(0):
                self._border(signal)
                if signal is not None and self.finished is None and self.step < total:
                    return self._leave(signal)
        if self.finished is None:
            self.finished = "the plan is done"
        self._wait_for_writer()
        self._event("finish", reason=self.finished, skips=self.policy.skips, rollbacks=self.policy.rollbacks)
        return self._result(self.finished)

    def close(self) -> None:
        """Give the model its float32 parameters back, and let a save under way end; called however the run ends."""
        self.writer.join()
        self.masters.restore()

    def _leave(self, signal: str) -> TrainResult:
        self._wait_for_writer()
        kept = f"checkpoint of step {self.saved_step} is saved" if self.saved_step >= 0 else "nothing is saved"
        reason = f"stopped by {signal} after step {self.step}; {kept}"
        self._event("stop", reason=reason, checkpoint=self.saved_step)
        return self._result(reason)

    def _result(self, reason: str) -> TrainResult:
        return TrainResult(self.step, self._tokens(), self.finished is not None, reason, self.last)

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
            rows = self.job.source.next_batch(planned.step)
            self.guard.enter_phase(planned.phase)
            dist.place.arrive(f"step {planned.step + 1}")
            packed = self.runner.run(planned, rows, stop=self.stop.received is not None)
            self.in_flight.append(InFlight(planned, rows, packed, started))
        self.step += 1
        return True

    def _jump(self, planned: PlannedStep) -> None:
        rows = self.job.source.next_batch(planned.step)
        self._event("jump", step=planned.step + 1, **documents(self.job, rows, None))
        nothing = dict.fromkeys(("loss", "ce", "z_loss", "sequence_loss", "grad_norm"))
        self._metric({**step_head(self.job, planned), **nothing, "skipped": True, "jumped": True})

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
        self._metric(step_record(self.job, flight, values, seconds, utilisation, dead_L, spikes))
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
        self._wait_for_writer()
        whole = dist.on_main(self._whole_checkpoints)
        if not whole:
            raise UserError(f"step {step} asks for a rollback, but {self.run_dir.checkpoints} has no whole checkpoint")
        target = self.policy.plan_rollback(list(whole), step)
        jumps = sorted(s for s in self.policy.jumps if s > target)
        counters = self.policy.state_dict()
        self._restore(whole[target])
        self.policy.load_state_dict(counters)
        self._forget_records()
        self._event("rollback", step=step, to_step=target, jump_steps=jumps)

    def _whole_checkpoints(self) -> dict[int, Path]:
        """Folders of the checkpoints that verify, by step, oldest first; the others are reported."""
        whole = {}
        for info in list_checkpoints(self.run_dir.checkpoints):
            try:
                verify_checkpoint(info.path)
            except UserError as error:
                self._event("damaged_checkpoint", checkpoint=info.step, reason=str(error))
            else:
                whole[info.step] = info.path
        return whole

    # Borders between steps

    def _border_due(self, signal: str | None) -> bool:
        jumped = self.step in self.policy.jumps  # what a jump leaves behind may be older than a checkpoint of that step
        self.checkpoint_due |= self.step % self.job.config.checkpoint.every_steps == 0 and not jumped
        due = any(self._is_due(e) for e in self.job.evaluations)
        return signal is not None or self.checkpoint_due or due or self.step == len(self.job.plan)

    def _is_due(self, evaluation: Evaluation) -> bool:
        plan, step = self.job.plan, self.step
        if step == len(plan):
            return evaluation.at_end
        if evaluation.at_phase_end and plan[step].phase != plan[step - 1].phase:
            return True
        return evaluation.every > 0 and step % evaluation.every == 0

    def _border(self, signal: str | None) -> None:
        for evaluation in self.job.evaluations:
            if self._is_due(evaluation):
                outcome = self._evaluate(evaluation.run)
                if outcome.stop is not None:
                    self.finished = outcome.stop
        ends = self.finished is not None or self.step == len(self.job.plan)
        # Never after a bad step: what made it bad may be in the weights, and a checkpoint is what a rollback goes back
        # to.
        wanted = (self.checkpoint_due or signal is not None) and not self.policy.streak
        if ends or wanted:
            self._save(wait=ends or signal is not None or not self.job.config.checkpoint.asynchronous)
            self.checkpoint_due = False

    def _evaluate(self, run: Any) -> Any:
        dist.place.arrive(f"the evaluation after step {self.step}")
        model, training = self.job.model, self.job.model.training
        devices = [self.device] if self.device.type == "cuda" else []
        model.eval()
        with torch.random.fork_rng(devices), torch.no_grad():
            outcome = run(model, self.step)
        model.train(training)
        for record in outcome.metrics:
            self._metric({"stage": self.job.stage, "step": self.step, **record})
        for sample in outcome.samples:
            if dist.is_main():
                self.run_dir.append_sample({"stage": self.job.stage, "step": self.step, **sample})
        return outcome

    # Saving and restoring

    def _save(self, *, wait: bool) -> None:
        if not self.job.config.checkpoint.enabled:
            return
        dist.place.arrive(f"the checkpoint after step {self.step}")
        state = {
            "step": self.step,
            "tokens": self._tokens(),
            "stage": self.job.stage,
            "finished": self.finished,
            "source": self.job.source.state_dict(),
            "random": resume.random_state(self.device),
            "guard": {"history": self.guard.state_dict(), **self.policy.state_dict()},
            "idle_experts": self.watch.state_dict(),
            "fingerprints": dict(self.job.fingerprints),
            "config": self.job.config.model_dump(mode="json"),
            "torch": torch.__version__,
        }
        model = resume.to_host(resume.model_state(self.job.model, self.masters), copy=not wait)
        optimizer = resume.to_host(self.job.optimizer.state_dict(), copy=not wait)
        if dist.is_main():
            self.run_dir.flush()
            self.writer.save(Snapshot(self.step, model, optimizer, resume.frozen_json(state)), wait=wait)
        self.saved_step = self.step
        self.policy.checkpoint_written(self.step)

    def _wait_for_writer(self) -> None:
        dist.on_main(self.writer.wait)
        for info in self.writer.written():
            self._report_checkpoint(info)

    def _report_checkpoint(self, info: CheckpointInfo) -> None:
        self._event("checkpoint", step=info.step, path=f"checkpoints/{info.path.name}", bytes=info.bytes)

    def _open(self) -> None:
        """Start, or resume from the newest whole checkpoint."""
        job = self.job
        changed, path = dist.on_main(self._find_start)
        if path is not None:
            self._restore(path)
        self._forget_records()
        peak = {"peak_flops": self.peak, "peak_source": self.peak_source, **job.about}
        if path is None:
            if not dist.on_main(lambda: self.run_dir.read_events("start")):
                for evaluation in job.evaluations:
                    if evaluation.at_start:
                        self._evaluate(evaluation.run)
            parameters = sum(p.numel() for p in job.model.parameters())
            self._event("start", parameters=parameters, steps=len(job.plan), **peak)
            self._save(wait=False)
        else:
            self._event("resume", checkpoint=f"checkpoints/{path.name}", changed=changed, **peak)

    def _find_start(self) -> tuple[list[str], Path | None]:
        """The settings that changed since the run's start, and the checkpoint to resume from. On the main rank."""
        folder = self.run_dir.checkpoints
        changed = resume.open_settings(self.run_dir, self.job.config, self.job.stage)
        clean_partials(folder)
        damaged: list[str] = []

        def report(info: CheckpointInfo, reason: str) -> None:
            damaged.append(reason)
            self._event("damaged_checkpoint", checkpoint=info.step, reason=reason)

        path = latest_good(folder, report)
        if path is None and damaged:
            raise UserError(f"no checkpoint in {folder} is whole; the newest: {damaged[0]}")
        return changed, path

    def _restore(self, path: Path) -> None:
        snapshot = load_checkpoint(path)
        with resume.refuse_malformed(path / STATE):
            self._take_over(path, snapshot)

    def _take_over(self, path: Path, snapshot: Snapshot) -> None:
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
        self.step, self.saved_step, self.finished = state["step"], state["step"], state["finished"]
        self.checkpoint_due = False

    def _forget_records(self) -> None:
        if dist.is_main():
            self.run_dir.forget_after(self.step)

    # Telling

    def _metric(self, record: Record) -> None:
        if dist.is_main():
            self.run_dir.append_metric(record)
            if record.get("kind") == "step":
                self.job.progress.on_step(record)
            else:
                self.job.progress.on_metric(record)
        if record.get("kind") == "step":
            self.last = record

    def _event(self, event: str, **fields: Any) -> None:
        if dist.is_main():
            record = {"stage": self.job.stage, "step": self.step, "event": event, **fields}
            self.run_dir.append_event(record)
            self.job.progress.on_event(record)
