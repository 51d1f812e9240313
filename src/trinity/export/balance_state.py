"""The one thing of a model that the public layout has no name for: the momenta of SMEBU, in a file of their own.

`trinity_state.json` beside the weights, which other engines ignore. Not safetensors: some engines load every
`*.safetensors` of a directory without an index as weights. A float32 number written as decimal comes back bit for bit.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trinity.base.errors import UserError
from trinity.base.files import read_json, write_json
from trinity.config import ModelConfig

STATE = "trinity_state.json"
FORMAT = 1
MOMENTUM = "moe.router.momentum"


def is_momentum(name: str) -> bool:
    """Whether a name of our state dict is a momentum [E] of the balancing, float32 in every file."""
    return name.endswith(MOMENTUM)


def momentum_names(config: ModelConfig) -> list[str]:
    return [f"layers.{i}.{MOMENTUM}" for i in range(config.num_dense_layers, config.num_layers)]


def write_momenta(state: Mapping[str, torch.Tensor], config: ModelConfig, directory: Path) -> None:
    """Write the momenta of a state dict; no file where all are zero, as without SMEBU and after an import."""
    momenta = {name: state[name].detach().float().cpu() for name in momentum_names(config) if name in state}
    for name, momentum_E in momenta.items():
        if not bool(momentum_E.isfinite().all()):
            raise UserError(f"{name} holds numbers that are not finite; export an earlier checkpoint")
    if any(bool(momentum_E.any()) for momentum_E in momenta.values()):
        numbers = {name: momentum_E.tolist() for name, momentum_E in momenta.items()}
        write_json(directory / STATE, {"format": FORMAT, "momentum": numbers})


def read_momenta(directory: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The momentum of every MoE layer, float32 [E]; zeros without a file.

    Raises UserError when the file is not what `write_momenta` writes for such a model.
    """
    names, path = momentum_names(config), directory / STATE
    if not path.exists():
        return {name: torch.zeros(config.num_experts) for name in names}
    content = read_json(path)
    momenta = content.get("momentum") if isinstance(content, dict) and content.get("format") == FORMAT else None
    if not isinstance(momenta, dict):
        raise UserError(f"{path} is not a state of format {FORMAT}; without this file balancing starts anew")
    if set(momenta) != set(names):
        odd = sorted(set(momenta) ^ set(names))[0]
        raise UserError(f"{path} and config.json disagree about {odd}")
    for name, values in momenta.items():
        if not (isinstance(values, list) and len(values) == config.num_experts and all(map(_is_finite, values))):
            raise UserError(f"{path}: {name} is not a list of {config.num_experts} finite numbers")
    return {name: torch.tensor(momenta[name], dtype=torch.float32) for name in names}


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
