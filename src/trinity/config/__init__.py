"""Settings: typed, frozen, resolved from `preset + overlay + key=value`, each value with its origin. No torch."""

from trinity.config.lora import LoRAConfig
from trinity.config.model import ModelConfig
from trinity.config.parallel import ParallelConfig, ParallelSizes, check_parallel, parallel_sizes
from trinity.config.resolve import Origin, list_presets, override_eval, resolve, to_toml
from trinity.config.retrieval import RetrievalConfig
from trinity.config.rl import RLConfig
from trinity.config.run import (
    BalanceConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    GuardConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    RuntimeConfig,
    TokenizerConfig,
)
from trinity.config.serve import ServeConfig
from trinity.config.sft import SFTConfig
from trinity.config.stage import ExtendConfig, Phase, PretrainConfig, StageConfig

__all__ = [
    "BalanceConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "ExtendConfig",
    "GuardConfig",
    "LoRAConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "Origin",
    "ParallelConfig",
    "ParallelSizes",
    "Phase",
    "PretrainConfig",
    "RLConfig",
    "RetrievalConfig",
    "RunConfig",
    "RuntimeConfig",
    "SFTConfig",
    "ServeConfig",
    "StageConfig",
    "TokenizerConfig",
    "check_parallel",
    "list_presets",
    "override_eval",
    "parallel_sizes",
    "resolve",
    "to_toml",
]
