"""Log-probabilities of given tokens under a model."""

from typing import Protocol

from torch import Tensor

from trinity.model.transformer import Transformer
from trinity.ops.cross_entropy import token_logprobs


class Tokens(Protocol):
    """The arrays of a batch on the device (`data.rows.TensorRows`, `train.losses.Batch`)."""

    @property
    def tokens_BT(self) -> Tensor: ...
    @property
    def targets_BT(self) -> Tensor: ...
    @property
    def segments_BT(self) -> Tensor: ...
    @property
    def positions_BT(self) -> Tensor: ...


def target_logprobs(
    model: Transformer, batch: Tokens, chosen_BTLk: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Log-probability of each target [B, T] at a temperature, float32, differentiable; 0 where there is no target.

    `chosen_BTLk`: experts to take, see `Transformer.features`.
    """
    features = model.features(batch.tokens_BT, batch.segments_BT, batch.positions_BT, chosen_BTLk=chosen_BTLk)
    targets_BT = batch.targets_BT
    logprobs_N = token_logprobs(
        features.x_BTD.flatten(0, 1), model.head.weight, targets_BT.flatten(), temperature=temperature
    )
    return logprobs_N.view_as(targets_BT)
