"""Low-rank adapters of a stage, and the settings of their optimizer."""

import torch

from trinity.base.errors import UsageError
from trinity.base.rng import derive
from trinity.config import OptimConfig, RunConfig
from trinity.model.lora import Adapters, adapted_matrices
from trinity.parallel.shard import Sharding

ADAPTED_STAGES = ("sft", "rl")
"""Stages that `lora` is for."""


def open_adapters(config: RunConfig, device: torch.device, sharding: Sharding | None) -> Adapters:
    """The adapters that `lora` describes, at their start.

    Raises UsageError for several processes and for ranks of matrices that the model does not have.
    """
    if sharding is not None:
        raise UsageError("lora trains in one process: start without torchrun, or set all ranks of [lora] to 0")
    if not any(adapted_matrices(config.model, config.lora)):
        raise UsageError(
            "lora gives a rank only to matrices that this model does not have (lora.dense, lora.shared and lora.gate "
            "need dense layers, a shared expert and the attention's gate)"
        )
    return Adapters(config.model, config.lora, device, derive(config.runtime.seed, "lora"))


def adapter_optim(config: RunConfig) -> OptimConfig:
    """The optimizer's settings with those of the adapters in their place."""
    lora = config.lora
    own = {"hidden": lora.optimizer, "muon_lr": lora.lr, "adamw_lr": lora.lr, "weight_decay": lora.weight_decay}
    return config.optim.model_copy(update=own)
