"""One process against many: the same model, rows and settings, sharded over ranks.

`reference(folder)` trains in this process and leaves what it found in files; `compare_layouts(rank, folder, layouts)`
runs on every rank and compares with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from trinity.base.dist import local
from trinity.base.rundir import RunDir
from trinity.config import ParallelConfig, RunConfig, resolve
from trinity.data.rows import Chunk, Rows, empty_rows, finish_row
from trinity.model.transformer import Transformer
from trinity.optim.optimizer import build_optimizer
from trinity.optim.schedule import StepPlan
from trinity.parallel.mesh import build_meshes
from trinity.parallel.muon import MuonExchange
from trinity.parallel.shard import Sharding, shard_model
from trinity.train import TrainJob, train
from trinity.train.guard import SpikeGuard
from trinity.train.losses import language_model_loss, to_device
from trinity.train.precision import MasterWeights
from trinity.train.step import StepRunner, step_share

SETTINGS = (
    # No width is a multiple of another's shards: uneven and empty shards, and matrices cut inside a projection.
    "model={vocab_size=61, num_layers=4, num_dense_layers=1, dim=24, num_heads=3, num_kv_heads=1, head_dim=8,"
    " ffn_dim=40, expert_dim=16, num_experts=4, experts_per_token=2, window=8, max_positions=64, init_scale=2.0}",
    "pretrain.seq_len=32",
    "pretrain.micro_rows=2",
    "pretrain.warmup_steps=2",
    'pretrain.phases=[{name="a", tokens=5120, weights={x=1.0}}]',
    "pretrain.batch=[{from_tokens=0, rows=8}]",
    "optim.muon_lr=0.01",
    "loss.sequence_loss=1e-2",
    "balance.rate=1e-2",
    "runtime.dtype=float32",
    "runtime.compile=false",
)
STEPS = 5


def config(*overrides: str) -> RunConfig:
    return resolve("demo", overrides=(*SETTINGS, *overrides))[0]


def rows_of(step: int, settings: RunConfig) -> Rows:
    """The global batch of a step: documents of random lengths, padding at the end of some rows."""
    draws = np.random.default_rng([3, step])
    length, rows = settings.pretrain.seq_len, empty_rows(settings.pretrain.batch[0].rows, settings.pretrain.seq_len)
    for b in range(len(rows)):
        rows.tokens_BT[b] = draws.integers(0, settings.model.vocab_size, length)
        rows.targets_BT[b] = (rows.tokens_BT[b] * 7 + 3) % settings.model.vocab_size
        first, rest = int(draws.integers(1, length)), int(draws.integers(0, 2)) * 4
        sizes = [first] if length - first <= rest else [first, length - first - rest]
        rows.targets_BT[b, sum(sizes) :] = -100
        finish_row(rows, b, [Chunk(10 * step + b, 0, size) for size in sizes])
    return rows


class Training:
    """A model, whole or sharded, with all that a step needs."""

    def __init__(self, settings: RunConfig, device: torch.device, layout: dict[str, int] | None) -> None:
        self.settings, self.device = settings, device
        self.sharding: Sharding | None = None
        if layout is None:
            with device:
                self.model = Transformer(settings.model, settings.runtime.kernels, settings.runtime.recompute)
            self.model.init_weights(0)
            exchange = None
        else:
            with torch.device("meta"):
                self.model = Transformer(settings.model, settings.runtime.kernels, settings.runtime.recompute)
            meshes = build_meshes(ParallelConfig.model_validate(layout), dist.get_world_size(), device.type)
            self.sharding = shard_model(self.model, meshes, settings.runtime)
            self.sharding.init_weights(0)
            exchange = MuonExchange(self.sharding, settings.model)
        self.optimizer = build_optimizer(self.model, settings.model, settings.optim, exchange)
        dtype = getattr(torch, settings.runtime.dtype) if layout is None else torch.float32
        masters = MasterWeights(self.model, dtype)
        guard = SpikeGuard(settings.guard, device)
        self.runner = StepRunner(
            self.model, self.optimizer, language_model_loss, settings, guard, masters, device, self.sharding
        )
        self.plan = StepPlan.pretrain(settings.pretrain)

    def micro_batches(self, step: int) -> Sequence[Any]:
        rows = rows_of(step, self.settings)
        if self.sharding is not None:
            meshes = self.sharding.meshes
            rows = self.sharding.take(rows[meshes.data_rank :: meshes.data_size])
        return rows.split(self.settings.pretrain.micro_rows)

    def gradients(self, step: int = 0) -> dict[str, torch.Tensor]:
        """Raw gradients: neither clipped nor seen by an optimizer."""
        self.optimizer.zero_grad()
        batches = self.micro_batches(step)
        share = step_share(batches, self.device)
        for number, batch in enumerate(batches, start=1):
            if self.sharding is not None:
                self.sharding.micro_batch(last=number == len(batches))
            language_model_loss(self.model, to_device(batch, self.device), share, self.settings.loss).loss.backward()
        return {name: gradient.clone() for name, gradient in self.runner._gradients().items()}

    def step(self, step: int) -> dict[str, Any]:
        packed = self.runner.run(self.plan[step], self.micro_batches(step))
        return packed.read()

    def biases(self) -> dict[str, torch.Tensor]:
        return {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def muon_step(self) -> dict[str, torch.Tensor]:
        """The weights after one optimizer step on made-up gradients, from the starting weights."""
        parameters = self.runner.masters.trained()
        for name, parameter in parameters.items():
            shape = self.sharding.slices[name].shape if self.sharding else tuple(parameter.shape)
            seed = sum(name.encode())
            whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
            if self.sharding is None:
                parameter.grad = whole
                continue
            parameter.grad = torch.zeros_like(parameter)
            local(parameter.grad).copy_(self.sharding.slices[name].of(whole))
        self.optimizer.set_lr(1.0)
        self.optimizer.step()
        return {name: local(p.detach()).clone() for name, p in parameters.items()}


def reference(folder: Path, settings: RunConfig, device: torch.device) -> None:
    """What one process finds, in files of `folder`."""
    save_file(_cpu(Training(settings, device, None).muon_step()), folder / "stepped.safetensors")
    training = Training(settings, device, None)
    save_file(_cpu(training.gradients()), folder / "gradients.safetensors")
    values = [training.step(step) for step in range(STEPS)]
    losses = torch.tensor([[v["loss"], v["grad_norm"], v["sequence_loss"]] for v in values], dtype=torch.float64)
    counts = torch.stack([torch.from_numpy(v["counts"].copy()) for v in values])
    save_file({"losses": losses, "counts": counts, **_cpu(training.biases())}, folder / "steps.safetensors")


@dataclass(frozen=True)
class Bounds:
    """`loss`, of every step, and `step` are absolute, the others relative."""

    loss: float = 2e-6
    gradient: float = 1e-6
    gain: float = 3e-6
    """Gradients of norm gains: sums over all tokens of products that nearly cancel."""
    step: float = 1e-6
    same_counts: bool = True
    """Every token goes to the same experts."""


def compare_layouts(
    rank: int,
    folder: str,
    layouts: Sequence[dict[str, int]],
    settings: RunConfig,
    device_type: str = "cpu",
    bounds: Bounds = Bounds(),
) -> None:
    device = torch.device("cpu") if device_type == "cpu" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
    for layout in layouts:
        compare_layout(Path(folder), layout, settings, device, bounds)


def compare_layout(
    folder: Path, layout: dict[str, int], settings: RunConfig, device: torch.device, bounds: Bounds
) -> None:
    stepped, gradients = load_file(folder / "stepped.safetensors"), load_file(folder / "gradients.safetensors")
    steps = load_file(folder / "steps.safetensors")

    training = Training(settings, device, layout)
    sharding = training.sharding
    assert sharding is not None
    for name, found in training.muon_step().items():
        error = (found.cpu() - sharding.slices[name].of(stepped[name])).abs().max() if found.numel() else 0.0
        assert error <= bounds.step, f"{layout}: {name} moved {error:.2e} elsewhere"

    training = Training(settings, device, layout)
    sharding = training.sharding
    assert sharding is not None
    for name, found in training.gradients().items():
        expected = gradients[name]
        # Of the whole gradient's size: a part of it may be nearly zero.
        error = float((found.cpu() - sharding.slices[name].of(expected)).norm() / expected.norm())
        assert error <= (bounds.gain if "norm" in name else bounds.gradient), f"{layout}: {name} {error:.2e}"
    for step in range(STEPS):
        values = training.step(step)
        found = [values["loss"], values["grad_norm"], values["sequence_loss"]]
        for have, want in zip(found, steps["losses"][step].tolist(), strict=True):
            assert abs(have - want) <= bounds.loss, f"{layout}, step {step}: {have} is not {want}"
        if bounds.same_counts:
            assert np.array_equal(values["counts"], steps["counts"][step].numpy()), f"{layout}, step {step}"
    for name, found in training.biases().items():
        if bounds.same_counts:
            assert torch.equal(found.cpu(), steps[name]), f"{layout}: {name}"


def _cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def job(path: Path, settings: RunConfig, layout: dict[str, int] | None) -> TrainJob:
    """A whole stage over the rows of `rows_of`."""
    training = Training(settings, torch.device("cpu"), layout)
    return TrainJob(
        config=settings,
        stage="pretrain",
        stage_config=settings.pretrain,
        model=training.model,
        optimizer=training.optimizer,
        source=_Source(training),
        loss=language_model_loss,
        plan=training.plan,
        run_dir=RunDir(path),
        fingerprints={"tokenizer": "t", "shards": "s"},
        sharding=training.sharding,
    )


class _Source:
    """Whole rows of a rank; the loop takes its part of them."""

    def __init__(self, training: Training) -> None:
        self._training, self.handed_out = training, 0

    def next_batch(self, step: int) -> list[Rows]:
        rows = rows_of(self.handed_out, self._training.settings)
        self.handed_out += 1
        if self._training.sharding is not None:
            meshes = self._training.sharding.meshes
            rows = rows[meshes.data_rank :: meshes.data_size]
        return rows.split(self._training.settings.pretrain.micro_rows)

    def state_dict(self) -> dict[str, Any]:
        return {"handed_out": self.handed_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.handed_out = state["handed_out"]


def losses(path: str | Path) -> list[float]:
    return [record["loss"] for record in RunDir(Path(path)).read_metrics("step")]


def train_all(rank: int, runs: Sequence[tuple[str, dict[str, int] | None]], settings: RunConfig) -> None:
    """Train or resume in each directory, in the layout given with it."""
    for path, layout in runs:
        train(job(Path(path), settings, layout))
