"""The guard: a step whose loss or gradient is not finite, or far above its history, does not reach the weights.

`SpikeGuard` judges on the device, without a host sync: its verdict is a scalar that turns the optimizer step and the
balance update into no-ops. `GuardPolicy` runs on the host, as soon as the step's record has arrived:

    skip      the step changes nothing: parameters, optimizer state, biases and history stay bit for bit as they were
    rollback  after `skips_before_rollback` bad steps in a row the last good checkpoint is loaded and the run goes on
              from there
    jump      the data of the bad steps is passed over when it comes again; where the same checkpoint is needed once
              more, the data of every step since it is passed over, and after that an older checkpoint is taken
    stop      after `max_rollbacks` rollbacks

The score (deviations above the mean of the last 128 steps, one-sided, 6 of them are a spike) is that of OLMo-core's
step-skipping optimizer. Ours differs in that a skipped step does not enter the history, a short history has a wider
bound, and a new phase of the data starts a new one. A skipped step leaves the weights, so a gradient norm that has
risen for good would be skipped for ever; in the first steps of a run that is common (AdamW's norms rise by a factor of
ten and stay there, and the clipped steps do no harm), so as long as less than half a window is known a gradient norm
is bad only beyond `EARLY_FACTOR` times their mean.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trinity.base.errors import UserError
from trinity.config import GuardConfig

MIN_HISTORY = 8
"""Steps before any score is given; only values that are not finite are caught before."""
EARLY_FACTOR = 16.0
"""How far above the mean of the gradient norms one must lie to be a spike while less than half a window is known."""
MIN_DEVIATION = 1e-3
"""Least standard deviation, as a share of the mean: a flat curve must not turn noise into spikes."""


class Verdict(NamedTuple):
    skip: Tensor
    """float32 scalar: 1 to leave everything as it is, else 0."""
    scores_2: Tensor
    """Deviations above the mean of loss and gradient norm, float64; 0 while the history is short."""


class SpikeGuard:
    """History and judgement on the device. Ranks that are given the same global values judge alike."""

    def __init__(self, settings: GuardConfig, device: torch.device) -> None:
        self.settings = settings
        self.phase: str | None = None
        self._history_2W = torch.zeros(2, settings.window, dtype=torch.float64, device=device)
        self._filled = torch.zeros((), dtype=torch.int64, device=device)
        self._slots_W = torch.arange(settings.window, device=device)

    def enter_phase(self, phase: str) -> None:
        """Start a new history when the mix of the data changes: its losses are not comparable with the old ones."""
        if phase != self.phase:
            self._filled.zero_()
            self.phase = phase

    @torch.no_grad()
    def judge(self, loss: Tensor, grad_norm: Tensor) -> Verdict:
        """The verdict on a step; the values of a good step enter the history."""
        values_2 = torch.stack([loss.double(), grad_norm.double()])
        window = self.settings.window
        count = self._filled.clamp(max=window)
        known_W = self._slots_W < count
        mean_2 = (self._history_2W * known_W).sum(1) / count.clamp(min=1)
        square_2 = ((self._history_2W - mean_2[:, None]).square() * known_W).sum(1)
        deviation_2 = (square_2 / (count - 1).clamp(min=1)).sqrt()
        deviation_2 = torch.maximum(deviation_2, MIN_DEVIATION * mean_2.abs()).clamp(min=1e-12)
        scores_2 = torch.where(count >= MIN_HISTORY, (values_2 - mean_2) / deviation_2, 0.0)

        bound = self.settings.sigma * (window / count.clamp(min=1)).sqrt()
        above_2 = scores_2 > bound
        settled = (2 * count >= window) | (values_2[1] > EARLY_FACTOR * mean_2[1])
        bad = ~torch.isfinite(values_2).all() | above_2[0] | (above_2[1] & settled)
        if not self.settings.enabled:
            bad = torch.zeros_like(bad)
        slot_W = (self._slots_W == self._filled % window) & ~bad
        self._history_2W = torch.where(slot_W, values_2[:, None], self._history_2W)
        self._filled = self._filled + (~bad).long()
        return Verdict(bad.float(), scores_2)

    def state_dict(self) -> dict[str, Any]:
        """Oldest values first; a host sync."""
        filled, window = int(self._filled), self.settings.window
        slots = torch.arange(max(0, filled - window), filled, device=self._slots_W.device) % window
        loss, grad_norm = self._history_2W[:, slots].tolist()
        return {"phase": self.phase, "filled": filled, "window": window, "loss": loss, "grad_norm": grad_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a history, each value in the slot it had; of one with another window the newest values."""
        window = self.settings.window
        values_2N = torch.tensor([state["loss"][-window:], state["grad_norm"][-window:]], dtype=torch.float64)
        count = values_2N.shape[1]
        filled = state["filled"] if state["window"] == window else count
        slots = torch.arange(filled - count, filled) % window
        self._history_2W.zero_()
        self._history_2W[:, slots.to(self._slots_W.device)] = values_2N.to(self._slots_W.device)
        self._filled.fill_(filled)
        self.phase = state["phase"]


@dataclass
class GuardPolicy:
    """What to do about bad steps; small, on the host, the same on every rank."""

    settings: GuardConfig
    skips: int = 0
    """Bad steps of the whole run: the spike counter."""
    rollbacks: int = 0
    streak: list[int] = field(default_factory=list)
    """The bad steps in a row that end at the present one."""
    jumps: set[int] = field(default_factory=set)
    """Steps whose data is passed over."""
    attempts: int = 0
    """Rollbacks since the last checkpoint was written."""

    def good(self) -> None:
        self.streak.clear()

    def bad(self, step: int) -> bool:
        """Count a bad step; whether it is time to roll back. Raises UserError when the rollbacks are used up."""
        self.skips += 1
        self.streak.append(step)
        if len(self.streak) < self.settings.skips_before_rollback:
            return False
        if self.rollbacks >= self.settings.max_rollbacks:
            raise UserError(
                f"training does not recover: {len(self.streak)} bad steps in a row up to step {step} after "
                f"{self.rollbacks} rollbacks (guard.max_rollbacks); events.jsonl names their documents; lower the "
                "learning rates, clean the data, or raise guard.max_rollbacks and resume"
            )
        return True

    def plan_rollback(self, checkpoints: list[int], step: int) -> int:
        """Choose the checkpoint to go back to (steps, oldest first) and the data to jump; returns its step."""
        back = max(0, self.attempts - 1)
        target = checkpoints[max(0, len(checkpoints) - 1 - back)]
        self.jumps |= set(self.streak) if self.attempts == 0 else set(range(target + 1, step + 1))
        self.attempts += 1
        self.rollbacks += 1
        self.streak.clear()
        return target

    def checkpoint_written(self, step: int) -> None:
        self.attempts = 0
        self.jumps = {s for s in self.jumps if s > step}

    def state_dict(self) -> dict[str, Any]:
        return {"skips": self.skips, "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skips, self.rollbacks = state["skips"], state["rollbacks"]
        self.streak.clear()
