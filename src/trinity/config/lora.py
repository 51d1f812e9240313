"""Settings of low-rank adapters."""

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat

from trinity.config.base import Frozen


class LoRAConfig(Frozen):
    """Low-rank adapters for SFT and RL (LoRA, arXiv 2106.09685): W + alpha / rank * B A, of which only A and B train.

    A rank of 0 leaves the matrices of that kind as they are; where all ranks are 0 every weight trains.
    """

    attention: NonNegativeInt = 0
    """Rank for each of queries, keys, values and output."""
    gate: NonNegativeInt = 0
    """Rank for the gate of the attention."""
    dense: NonNegativeInt = 0
    """Rank for gate, up and down of the feed-forward networks of the dense layers."""
    shared: NonNegativeInt = 0
    """Rank for gate, up and down of the shared expert."""
    experts: NonNegativeInt = 0
    """Rank for gate, up and down of every routed expert."""
    alpha: PositiveFloat = 32.0
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Which optimizer moves the adapters."""
    lr: PositiveFloat = 2e-4
    """Peak learning rate of the adapters, under either optimizer; the stage's lr_scale is a factor on it."""
    weight_decay: NonNegativeFloat = 0.0

    @property
    def enabled(self) -> bool:
        return any((self.attention, self.gate, self.dense, self.shared, self.experts))
