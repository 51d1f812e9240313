"""One optimizer step: forward and backward over the micro-batches, clip, judge, update, balance.

Nothing here waits for the device; `Packed.read` does, when the loop asks for the step's numbers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trinity.base import dist
from trinity.config import RunConfig
from trinity.model.balance import apply_balance, needs_margins
from trinity.model.transformer import Transformer
from trinity.optim.schedule import PlannedStep
from trinity.parallel.shard import Sharding
from trinity.train.adapted import AdaptedWeights
from trinity.train.guard import SpikeGuard
from trinity.train.job import Optimizer
from trinity.train.launch import Graphed, Launched, is_recorded
from trinity.train.losses import LossFunction, LossOutput, Share, to_device
from trinity.train.metrics import Packed
from trinity.train.precision import MasterWeights

IGNORED = -100
"""Target of a position without loss."""


@dataclass
class StepRunner:
    """What a step works on."""

    model: nn.Module
    optimizer: Optimizer
    loss: LossFunction
    config: RunConfig
    guard: SpikeGuard
    masters: MasterWeights | AdaptedWeights
    device: torch.device
    sharding: Sharding | None = None
    """Of a model whose weights are spread over ranks; without it ranks hold copies."""
    before_update: Callable[[], None] = lambda: None
    """Called when forward and backward passes are done, before parameters, optimizer state and biases change."""

    def __post_init__(self) -> None:
        if needs_margins(self.config.balance):
            assert isinstance(self.model, Transformer), f"the model is a {type(self.model).__name__}"
            self.model.record_margins()
        self.launcher = self._launcher()

    def _launcher(self) -> Launched:
        alone = dist.world_size() == 1 and self.sharding is None
        if is_recorded(self.config.runtime, self.device, self.loss, self.config.loss, alone=alone):
            return Graphed(self.model, self.loss, self.config.loss, self.masters.trained().values())
        return Launched(self.model, self.loss, self.config.loss)

    def run(self, planned: PlannedStep, micro_batches: Sequence[Any], *, stop: bool = False) -> Packed:
        """Take one step; its numbers are on their way to the host when this returns.

        A bad step (the guard's verdict, on the device) leaves parameters, optimizer state and biases unchanged.
        `stop` is shared with the other ranks: the numbers tell whether any of them asked to stop.
        """
        share = step_share(micro_batches, self.device)
        self.launcher.begin(self.optimizer.zero_grad)
        totals = Totals()
        for number, rows in enumerate(micro_batches, start=1):
            if self.sharding is not None:
                self.sharding.micro_batch(last=number == len(micro_batches))
            totals.add(self.launcher.run(to_device(rows, self.device), share))
        packed = totals.pack(stop)

        gradients = self._gradients()
        norm = total_norm(gradients.values()) if self.sharding is None else self.sharding.total_norm(gradients)
        verdict = self.guard.judge(packed.device_value("loss"), norm)
        clip_(list(gradients.values()), norm, self.config.optim.clip_norm)
        self.before_update()
        self.optimizer.set_lr(planned.lr_scale)
        self.optimizer.step(skip=verdict.skip, number=planned.step)
        self.masters.refresh()
        counts_LE = packed.device_value("counts")
        if counts_LE.numel():
            margins_LEB = totals.margins()
            apply_balance(self.model, counts_LE, self.config.balance, margins_LEB=margins_LEB, skip=verdict.skip)

        packed.append(
            {"grad_norm": norm, "skip": verdict.skip, "spike_scores": verdict.scores_2, **bias_stats(self.model)}
        )
        packed.send()
        return packed

    def _gradients(self) -> dict[str, Tensor]:
        """Gradients of every trainable parameter by name, summed over ranks; of sharded ones this rank's part."""
        if self.sharding is not None:
            return self.sharding.gradients()
        gradients = {}
        for name, parameter in self.masters.trained().items():
            if parameter.grad is None:
                if dist.world_size() == 1:
                    continue
                parameter.grad = torch.zeros_like(parameter)
            gradients[name] = dist.all_reduce_sum(parameter.grad)
        return gradients


def step_share(micro_batches: Sequence[Any], device: torch.device) -> Share:
    """Target tokens and tokens of the whole step, over all micro-batches and ranks."""
    targets = sum(int(np.count_nonzero(rows.targets_BT != IGNORED)) for rows in micro_batches)
    tokens = sum(int(np.count_nonzero(rows.segments_BT >= 0)) for rows in micro_batches)
    totals = torch.tensor([targets, tokens], dtype=torch.float64).to(device, non_blocking=True)
    totals = dist.all_reduce_sum(totals).float().clamp(min=1)
    return Share(targets=totals[0], tokens=totals[1])


class Totals:
    """Sums and maxima over a step's micro-batches, on the device."""

    def __init__(self) -> None:
        self._summed: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}
        self._means: list[Tensor] = []
        self._margins_LEB: Tensor | None = None

    def add(self, output: LossOutput) -> None:
        mean = output.mean.detach().double()
        loss = output.loss.detach().double()
        parts = {"loss": loss, "counts": output.counts_LE, "mean_sum": mean, "micro_batches": torch.ones_like(mean)}
        for name, value in {**parts, **output.terms}.items():
            value = value.detach().double()
            self._summed[name] = self._summed[name] + value if name in self._summed else value
        for name, value in {"mean_max": mean, **output.extremes}.items():
            value = value.detach().double()
            self._largest[name] = torch.maximum(self._largest[name], value) if name in self._largest else value
        self._means.append(mean)
        if output.margins_LEB is not None:
            self._margins_LEB = (
                output.margins_LEB if self._margins_LEB is None else self._margins_LEB + output.margins_LEB
            )

    def margins(self) -> Tensor | None:
        """Histograms of margins (int64 [L, E, B]) over all ranks. Not among the step's numbers: the host has no use
        for them."""
        return None if self._margins_LEB is None else dist.all_reduce_sum(self._margins_LEB.clone())

    def pack(self, stop: bool) -> Packed:
        asked = torch.full_like(self._means[0], float(stop))
        return Packed(self._summed, {**self._largest, "stop": asked}, {"means": torch.stack(self._means)})


@torch.no_grad()
def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, float32 scalar (`Sharding.total_norm` where they are sharded)."""
    norms = torch._foreach_norm(list(gradients), 2, dtype=torch.float32)
    assert norms, "no parameter has a gradient"
    return torch.stack(norms).norm()


@torch.no_grad()
def clip_(gradients: list[Tensor], norm: Tensor, largest: float) -> None:
    """Scale all gradients in place so that their total norm is at most `largest`."""
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor)


def bias_stats(model: nn.Module) -> Mapping[str, Tensor]:
    """Smallest and largest expert bias, and the norm of the biases, of each MoE layer [L]."""
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("moe.router.bias")]
    if not biases:
        return {}
    bias_LE = torch.stack(biases)
    return {"bias_min": bias_LE.amin(1), "bias_max": bias_LE.amax(1), "bias_norm": bias_LE.norm(dim=1)}
