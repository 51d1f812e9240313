"""Low-rank adapters: which matrices they change, by how much, and what they become when merged.

A fused parameter (q, k, v and gate; gate and up) has an adapter for each matrix in it, and a stack of experts one for
each expert. `A` [rank, in] starts at random, `B` [out, rank] at zero, so that an adapted model starts as its base.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trinity.config import LoRAConfig, ModelConfig
from trinity.model.init import fill

A, B = "lora_a", "lora_b"


@dataclass(frozen=True)
class AdaptedMatrix:
    """One matrix, or one of each expert, inside a parameter of the model."""

    name: str
    """Such as `layers.3.attn.k`; its factors are `NAME.lora_a` and `NAME.lora_b`."""
    parameter: str
    """Of the model, such as `layers.3.attn.qkvg.weight`."""
    start: int
    rows: int
    columns: int
    experts: int | None
    rank: int

    def of(self, parameter: Tensor) -> Tensor:
        """The view of the parameter [..., R, N] that this matrix is."""
        return parameter.narrow(-2, self.start, self.rows)


def adapted_matrices(config: ModelConfig, settings: LoRAConfig) -> Iterator[AdaptedMatrix]:
    """Every matrix that `settings` gives a rank, in the order of the forward pass."""
    queries, keys, dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.dim
    shared = config.num_shared_experts * config.expert_dim
    for i in range(config.num_layers):
        attn = f"layers.{i}.attn"
        fused = [("q", queries, settings.attention), ("k", keys, settings.attention), ("v", keys, settings.attention)]
        if config.attention_gate:
            fused.append(("gate", queries, settings.gate))
        found = list(_fused(f"{attn}.qkvg.weight", attn, fused, dim, None))
        found += _fused(f"{attn}.o.weight", attn, [("o", dim, settings.attention)], queries, None)
        if i < config.num_dense_layers:
            found += _swiglu(f"layers.{i}.ffn", ".weight", dim, config.ffn_dim, None, settings.dense)
        else:
            moe = f"layers.{i}.moe"
            found += _swiglu(f"{moe}.experts", "", dim, config.expert_dim, config.num_experts, settings.experts)
            if shared:
                found += _swiglu(f"{moe}.shared", ".weight", dim, shared, None, settings.shared)
        yield from (matrix for matrix in found if matrix.rank)


def _fused(
    parameter: str, prefix: str, parts: list[tuple[str, int, int]], columns: int, experts: int | None
) -> Iterator[AdaptedMatrix]:
    start = 0
    for name, rows, rank in parts:
        yield AdaptedMatrix(f"{prefix}.{name}", parameter, start, rows, columns, experts, rank)
        start += rows


def _swiglu(prefix: str, ending: str, dim: int, hidden: int, experts: int | None, rank: int) -> Iterator[AdaptedMatrix]:
    parts = [("gate", hidden, rank), ("up", hidden, rank)]
    yield from _fused(f"{prefix}.gate_up{ending}", prefix, parts, dim, experts)
    yield from _fused(f"{prefix}.down{ending}", prefix, [("down", dim, rank)], hidden, experts)


class Adapters:
    """The factors of every adapted matrix, float32 parameters on one device."""

    def __init__(self, config: ModelConfig, settings: LoRAConfig, device: torch.device, seed: int) -> None:
        self.config, self.settings = config, settings
        self.matrices = list(adapted_matrices(config, settings))
        assert self.matrices, "no matrix has a rank"
        self._factors: dict[str, nn.Parameter] = {}
        for matrix in self.matrices:
            stack = () if matrix.experts is None else (matrix.experts,)
            down = torch.zeros(*stack, matrix.rank, matrix.columns, device=device)
            # The deviation of PEFT's and the paper's uniform start, U(-1, 1) / sqrt(in).
            fill(f"{matrix.name}.{A}", down, (3 * matrix.columns) ** -0.5, seed)
            self._factors[f"{matrix.name}.{A}"] = nn.Parameter(down)
            up = torch.zeros(*stack, matrix.rows, matrix.rank, device=device)
            self._factors[f"{matrix.name}.{B}"] = nn.Parameter(up)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._factors.items()

    @property
    def by_parameter(self) -> dict[str, list[AdaptedMatrix]]:
        """The adapted matrices of each adapted parameter of the model."""
        found: dict[str, list[AdaptedMatrix]] = {}
        for matrix in self.matrices:
            found.setdefault(matrix.parameter, []).append(matrix)
        return found

    def factors(self, matrix: AdaptedMatrix) -> tuple[nn.Parameter, nn.Parameter]:
        """(A [..., rank, in], B [..., out, rank])"""
        return self._factors[f"{matrix.name}.{A}"], self._factors[f"{matrix.name}.{B}"]

    def scale(self, matrix: AdaptedMatrix) -> float:
        return self.settings.alpha / matrix.rank

    @torch.no_grad()
    def merge(self, name: str, base: Tensor) -> Tensor:
        """The model's parameter `name`, given as `base`, with its adapters added, in float32."""
        merged = base.float().clone()
        for matrix in self.by_parameter.get(name, ()):
            a, b = self.factors(matrix)
            matrix.of(merged).add_(b @ a, alpha=self.scale(matrix))
        return merged

    @torch.no_grad()
    def collect(self, name: str, gradient: Tensor) -> None:
        """Add to the factors' gradients what follows from the gradient of the merged parameter `name`:
        dA = s B^T dW, dB = s dW A^T, in float32."""
        for matrix in self.by_parameter[name]:
            a, b = self.factors(matrix)
            part = matrix.of(gradient).float() * self.scale(matrix)
            for factor, found in ((a, b.transpose(-1, -2) @ part), (b, part @ a.transpose(-1, -2))):
                if factor.grad is None:
                    factor.grad = found
                else:
                    factor.grad.add_(found)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over factors by name, as a checkpoint holds them."""
        with torch.no_grad():
            for name, factor in self._factors.items():
                factor.copy_(tensors[name])


def is_factor(name: str) -> bool:
    """Whether a name in a checkpoint is that of an adapter's factor."""
    return name.endswith((f".{A}", f".{B}"))
