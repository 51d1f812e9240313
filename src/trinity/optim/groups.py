"""Which optimizer moves which parameter, and which matrices a fused parameter is made of."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from trinity.config import ModelConfig, OptimConfig


@dataclass(frozen=True)
class MuonMatrix:
    """A hidden parameter [..., R, N]: its rows split into `parts`, each a matrix that is orthogonalised on its own."""

    name: str
    parameter: nn.Parameter
    parts: tuple[int, ...]


@dataclass(frozen=True)
class ParameterGroups:
    muon: list[MuonMatrix]
    adamw_decay: dict[str, nn.Parameter]
    """Matrices under AdamW: embedding, head and, by setting, the routers or all."""
    adamw_vectors: dict[str, nn.Parameter]
    """Norm gains; no weight decay."""


def lr_multiplier(rows: int, columns: int) -> float:
    """sqrt(max(1, fan_out / fan_in)) of a [rows = fan_out, columns = fan_in] matrix (spec: width-aware LR)."""
    return max(1.0, rows / columns) ** 0.5


def matrix_parts(name: str, shape: Iterable[int], config: ModelConfig) -> tuple[int, ...]:
    """Row counts of the matrices fused into a parameter [..., R, N]; they add up to R."""
    rows = tuple(shape)[-2]
    if name.endswith("attn.qkvg.weight"):
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = (query, kv, kv, query) if config.attention_gate else (query, kv, kv)
    elif "gate_up" in name:
        parts = (rows // 2, rows // 2)
    else:
        parts = (rows,)
    assert sum(parts) == rows, f"{name}: parts {parts} do not add up to {rows} rows"
    return parts


def group_parameters(
    named: Iterable[tuple[str, nn.Parameter]], config: ModelConfig, settings: OptimConfig
) -> ParameterGroups:
    """Muon: every matrix of a layer. AdamW: embedding, head, every vector. The router goes by `settings.router`; with
    `settings.hidden` AdamW moves all."""
    muon: list[MuonMatrix] = []
    matrices: dict[str, nn.Parameter] = {}
    vectors: dict[str, nn.Parameter] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        outside = settings.hidden == "adamw" or not name.startswith("layers.")
        outside |= name.endswith("router.weight") and settings.router == "adamw"
        if parameter.ndim < 2:
            vectors[name] = parameter
        elif outside:
            matrices[name] = parameter
        else:
            muon.append(MuonMatrix(name, parameter, matrix_parts(name, parameter.shape, config)))
    return ParameterGroups(muon, matrices, vectors)


def describe(groups: ParameterGroups, settings: OptimConfig) -> list[tuple[str, str, str, str, str]]:
    """Rows (parameters, shape, count, optimizer, learning rate), layers of equal shape folded into one row."""
    folded: dict[tuple[str, str, str, str], int] = {}

    def add(name: str, tensor: Tensor, optimizer: str, lr: str) -> None:
        key = (re.sub(r"\d+", "*", name), "x".join(map(str, tensor.shape)), optimizer, lr)
        folded[key] = folded.get(key, 0) + tensor.numel()

    for matrix in groups.muon:
        columns = matrix.parameter.shape[-1]
        rates = sorted({settings.muon_lr * lr_multiplier(rows, columns) for rows in matrix.parts})
        add(matrix.name, matrix.parameter, "Muon", " / ".join(f"{rate:.3g}" for rate in rates))
    for name, parameter in groups.adamw_decay.items():
        add(name, parameter, "AdamW", f"{settings.adamw_lr:.3g}")
    for name, parameter in groups.adamw_vectors.items():
        add(name, parameter, "AdamW, no decay", f"{settings.adamw_lr:.3g}")
    return [(name, shape, f"{count:,}", optimizer, lr) for (name, shape, optimizer, lr), count in folded.items()]
