"""What every stage does before its training loop: device, tokenizer, model, optimizer, shards, checks."""

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from trinity.base import dist
from trinity.base.errors import UsageError, UserError
from trinity.base.rundir import RunDir
from trinity.config import RunConfig, StageConfig, check_parallel
from trinity.data.shards import Shards
from trinity.model.lora import Adapters
from trinity.model.transformer import Transformer
from trinity.ops.borrowed_cross_entropy import check_kind
from trinity.optim.optimizer import MuonAdamW, build_optimizer
from trinity.parallel.mesh import build_meshes
from trinity.parallel.muon import MuonExchange
from trinity.parallel.shard import Sharding, shard_model
from trinity.stages.adapters import ADAPTED_STAGES, adapter_optim, open_adapters
from trinity.stages.start import check_tokenizer, load_weights
from trinity.tokenizer import Tokenizer
from trinity.train.compilation import compile_blocks
from trinity.train.job import Silent

GATHERED_SHARE = 0.4
"""Of a GPU's memory that all weights may take for an evaluation that generates; beyond it those are left out."""

SILENT = Silent()


@dataclass(frozen=True)
class Stage:
    """A stage, ready to be given its data."""

    name: str
    config: RunConfig
    settings: StageConfig
    run: RunDir
    device: torch.device
    tokenizer: Tokenizer
    model: Transformer
    optimizer: MuonAdamW
    sharding: Sharding | None = None
    """Where several processes train: how the model is spread over them."""
    adapters: Adapters | None = None
    """Low-rank adapters, where only they train."""
    start_from: Path | None = None
    """What the weights came from."""

    @property
    def data_rank(self) -> int:
        """Which rows this process works on, from 0 to data_size - 1."""
        return self.sharding.meshes.data_rank if self.sharding else 0

    @property
    def data_size(self) -> int:
        return self.sharding.meshes.data_size if self.sharding else 1

    @property
    def generates(self) -> bool:
        """Whether all weights of a replica fit beside the training state of this process, as generation needs them."""
        if self.sharding is None or self.device.type != "cuda":
            return True
        memory = torch.cuda.get_device_properties(self.device).total_memory
        needed = self.sharding.gathered_bytes(getattr(torch, self.config.runtime.dtype))
        return needed <= GATHERED_SHARE * memory

    def gathered(self) -> AbstractContextManager[None]:
        """All weights on this process, for code that calls parts of the model instead of the whole."""
        return self.sharding.gathered() if self.sharding else nullcontext()


def open_stage(name: str, config: RunConfig, run_dir: Path, start_from: Path | None) -> Stage:
    """Device, tokenizer, model (new, or of `start_from`: a model or run directory) and optimizer.

    Raises UserError or UsageError for a device that is not there, a tokenizer that is missing or has more entries than
    the model, a model of another shape, and, but in `extend`, rows longer than the model's positions.
    """
    settings: StageConfig = getattr(config, name)
    if dist.world_size() > 1:
        check_parallel(config, name, dist.world_size())
    if settings.seq_len > config.model.max_positions and name != "extend":  # which may train beyond the target
        raise UsageError(
            f"{name}.seq_len = {settings.seq_len} exceeds model.max_positions = {config.model.max_positions}: "
            "lower the one or raise the other"
        )
    if not config.data.tokenizer:
        raise UsageError("data.tokenizer is not set: name the tokenizer's directory, data.tokenizer=DIR")
    tokenizer = Tokenizer.load(Path(config.data.tokenizer))
    tokenizer.check_model_vocab(config.model.vocab_size)
    device = open_device(config)
    if device.type == "cuda" and config.runtime.compile and config.runtime.dtype == "float32":
        raise UsageError(
            "runtime.dtype = float32 cannot be compiled on a GPU (its grouped products are bfloat16): use "
            "runtime.dtype=bfloat16 or runtime.compile=false"
        )
    check_kind(config.loss.cross_entropy, config.loss.z_loss, device)
    model, sharding = _open_model(config, device)
    if start_from is not None:
        check_tokenizer(tokenizer, config.data.tokenizer, start_from)
        load_weights(model, config.model, start_from, sharding)
    elif sharding is None:
        model.init_weights(config.runtime.seed)
    else:
        sharding.init_weights(config.runtime.seed)
    if sharding is None and not config.runtime.master_weights:
        model.to(getattr(torch, config.runtime.dtype))
    adapters, trained, optim = None, model, config.optim
    if config.lora.enabled and name in ADAPTED_STAGES:
        adapters = trained = open_adapters(config, device, sharding)
        optim = adapter_optim(config)
    exchange = None if sharding is None else MuonExchange(sharding, config.model)
    optimizer = build_optimizer(trained, config.model, optim, exchange)
    run = RunDir(run_dir)
    return Stage(name, config, settings, run, device, tokenizer, model, optimizer, sharding, adapters, start_from)


def _open_model(config: RunConfig, device: torch.device) -> tuple[Transformer, Sharding | None]:
    """The model with unset weights; of several processes each has its part, and never the whole."""
    runtime = config.runtime
    several = dist.world_size() > 1
    with torch.device("meta") if several else device:
        model = Transformer(config.model, kernels=runtime.kernels, recompute=runtime.recompute)
    if runtime.fp8:
        model.use_fp8(device)
    compile_blocks(model, runtime, device)
    if not several:
        return model, None
    if not runtime.master_weights:
        model.to(getattr(torch, runtime.dtype))
    meshes = build_meshes(config.parallel, dist.world_size(), device.type)
    return model, shard_model(model, meshes, runtime)


def open_device(config: RunConfig) -> torch.device:
    """The device of this process; also sets the number of CPU threads. Raises UsageError when there is no GPU to
    use."""
    if dist.world_size() == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("WORLD_SIZE names several processes, which have not been joined (parallel.rendezvous.joined)")
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    kind = config.runtime.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("runtime.device = cuda, but no GPU is visible: use runtime.device=cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def open_shards(stage: Stage) -> tuple[Shards, Shards]:
    """The training and the held-out shards. Raises UserError when they are missing or made with another tokenizer."""
    if not stage.config.data.shards:
        raise UsageError(
            "data.shards is not set: name the directory that `trinity data prepare` wrote, data.shards=DIR"
        )
    directory = Path(stage.config.data.shards)
    both = Shards.open(directory / "train"), Shards.open(directory / "val")
    for shards in both:
        if shards.tokenizer_fingerprint != stage.tokenizer.fingerprint:
            raise UserError(
                f"{shards.directory} was made with another tokenizer than {stage.config.data.tokenizer}: "
                "prepare the shards again or name the tokenizer that made them"
            )
    return both


def check_batches(stage: Stage, batch_sizes: Iterable[int]) -> None:
    """Refuse batches that the data-parallel ranks cannot share. Raises UsageError with sizes that would do."""
    ranks = stage.data_size
    for rows in batch_sizes:
        if rows % ranks:
            fits = [size for size in (rows // ranks * ranks, -(-rows // ranks) * ranks) if size]
            raise UsageError(
                f"{stage.name}: a batch of {rows} rows cannot be shared by {ranks} data-parallel ranks; "
                f"use {' or '.join(map(str, fits))} rows"
            )
