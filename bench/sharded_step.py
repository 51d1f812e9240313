"""Full training steps of one layout on made-up rows, timed: what `cluster.py` and `multi_gpu.py` measure.

A step is that of training: forward, backward, gradient norm, clip, Muon and AdamW, balancing, the packed numbers.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist

from trinity.base.dist import local
from trinity.config import RunConfig
from trinity.data.rows import Chunk, Rows, empty_rows, finish_row
from trinity.model.norm import RMSNorm
from trinity.model.transformer import Transformer
from trinity.optim.optimizer import build_optimizer
from trinity.optim.schedule import StepPlan
from trinity.parallel.mesh import build_meshes
from trinity.parallel.muon import MuonExchange
from trinity.parallel.shard import Sharding, shard_model
from trinity.train.guard import SpikeGuard
from trinity.train.hardware import peak_flops
from trinity.train.losses import language_model_loss
from trinity.train.precision import MasterWeights
from trinity.train.step import StepRunner


class Subject:
    """A model in training, whole (`sharded` off) or over the ranks of the default group as `parallel` says."""

    def __init__(self, config: RunConfig, device: torch.device, *, sharded: bool) -> None:
        self.config, self.device = config, device
        runtime = config.runtime
        with torch.device("meta") if sharded else device:
            self.model = Transformer(config.model, runtime.kernels, runtime.recompute)
        if runtime.compile and device.type == "cuda":
            torch._dynamo.config.recompile_limit = 64
            for block in self.model.layers:
                block.compile()
        self.sharding: Sharding | None = None
        if sharded:
            meshes = build_meshes(config.parallel, torch_dist.get_world_size(), device.type)
            self.sharding = shard_model(self.model, meshes, runtime)
        self._fill()
        exchange = MuonExchange(self.sharding, config.model) if self.sharding else None
        self.optimizer = build_optimizer(self.model, config.model, config.optim, exchange)
        copies = runtime.master_weights and not sharded
        masters = MasterWeights(self.model, getattr(torch, runtime.dtype) if copies else torch.float32)
        guard = SpikeGuard(config.guard, device)
        self.runner = StepRunner(
            self.model, self.optimizer, language_model_loss, config, guard, masters, device, self.sharding
        )
        self.plan = StepPlan.pretrain(config.pretrain)
        self.steps = 0

    @torch.no_grad()
    def _fill(self) -> None:
        """Random weights drawn on the device: `init_weights` draws on the CPU, minutes for large models."""
        torch.manual_seed(0 if self.sharding is None else torch_dist.get_rank())
        std = self.config.model.init_scale * self.config.model.dim**-0.5
        for parameter in self.model.parameters():
            local(parameter).normal_(std=std)
        for module in self.model.modules():
            if isinstance(module, RMSNorm):
                local(module.weight).fill_(module.gain)
        for buffer in self.model.buffers():
            buffer.zero_()
        if self.sharding is not None and torch_dist.get_world_size() > 1:
            for name, parameter in self.sharding.parameters.items():
                if name.endswith("router.weight"):
                    torch_dist.broadcast(parameter, 0)

    def rows(self, step: int) -> Sequence[Any]:
        """This rank's micro-batches: documents of random lengths, tokens of Zipf's law."""
        settings, meshes = self.config.pretrain, self.sharding.meshes if self.sharding else None
        ranks, rank = (meshes.data_size, meshes.data_rank) if meshes else (1, 0)
        draws = np.random.default_rng([step, rank])
        rows = empty_rows(settings.batch[0].rows // ranks, settings.seq_len)
        for b in range(len(rows)):
            rows.tokens_BT[b] = (draws.zipf(1.2, settings.seq_len) - 1) % self.config.model.vocab_size
            rows.targets_BT[b] = np.roll(rows.tokens_BT[b], -1)
            first = int(draws.integers(1, settings.seq_len))
            finish_row(rows, b, [Chunk(b, 0, first), Chunk(b, first, settings.seq_len - first)])
        batches: Sequence[Rows] = rows.split(settings.micro_rows)
        return [self.sharding.take(batch) for batch in batches] if self.sharding else batches

    def step(self) -> dict[str, Any]:
        """One step; returns its numbers, and so waits for the device."""
        packed = self.runner.run(self.plan[self.steps % len(self.plan)], self.rows(self.steps))
        self.steps += 1
        return packed.read()

    def seconds(self, count: int) -> list[float]:
        """Of each of `count` steps."""
        found = []
        for _ in range(count):
            self._synchronize()
            started = time.perf_counter()
            self.step()
            self._synchronize()
            found.append(time.perf_counter() - started)
        return found

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(subject: Subject, *, warmup: int, steps: int, profiled: bool = True) -> dict[str, Any]:
    """Seconds of a step, tokens a second and GPU, MFU, memory, and how much of a step is communication."""
    config, device = subject.config, subject.device
    ranks = torch_dist.get_world_size() if torch_dist.is_initialized() else 1
    subject.seconds(warmup)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = subject.seconds(steps)
    last = subject.step()
    step, tokens = statistics.median(seconds), config.pretrain.batch[0].rows * config.pretrain.seq_len
    peak, source = peak_flops(device, getattr(torch, config.runtime.dtype))
    rate = tokens / step / ranks
    found = {
        "ranks": ranks,
        "step_seconds": step,
        "all_step_seconds": seconds,
        "tokens_per_second_per_gpu": rate,
        "mfu": rate * config.model.flops_per_token(config.pretrain.seq_len) / peak,
        "peak_flops": peak,
        "peak_source": source,
        "loss": last["loss"],
        "largest_expert_load": float((last["counts"].max(1) / last["counts"].mean(1)).max()),
    }
    if device.type == "cuda":
        found["peak_allocated_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        found["peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
        if profiled:
            found["communication"] = communication(subject)
    return found


def communication(subject: Subject) -> dict[str, Any]:
    """Of one profiled step, as shares of its time on the device: NCCL kernels by kind, and NCCL while nothing else
    ran, which is what communication costs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        subject.seconds(1)
    events = [e for e in profiler.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in events]
    if not spans:
        return {"error": "the profiler saw no kernel"}
    whole = max(end for _, _, end in spans) - min(start for _, start, _ in spans)
    nccl = [span for span in spans if "nccl" in span[0].lower()]
    other = union([(start, end) for name, start, end in spans if "nccl" not in name.lower()])
    kinds: dict[str, float] = {}
    for kind in ("AllGather", "ReduceScatter", "AllReduce", "SendRecv"):  # an all-to-all is many sends
        kinds[kind] = length(union([(start, end) for name, start, end in nccl if kind.lower() in name.lower()])) / whole
    both = union([(start, end) for _, start, end in nccl] + other)
    return {
        "step_milliseconds": whole / 1e3,
        "shares": kinds,
        "share_of_all": length(union([(start, end) for _, start, end in nccl])) / whole,
        "share_exposed": (length(both) - length(other)) / whole,
    }


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Disjoint spans that cover the same times, in order."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def length(spans: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


def settings_of_batch(rows: int, micro_rows: int, seq_len: int) -> list[str]:
    """Overrides for a run of full steps of one size, constant learning rate."""
    return [
        f"pretrain.seq_len={seq_len}",
        f"pretrain.micro_rows={micro_rows}",
        f"pretrain.batch=[{{ from_tokens = 0, rows = {rows} }}]",
        f'pretrain.phases=[{{ name = "all", tokens = {1000 * rows * seq_len}, weights = {{ web = 1.0 }} }}]',
        "pretrain.warmup_steps=10",
    ]
