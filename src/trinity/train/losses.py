"""The loss of a micro-batch, and the batch on the device.

A step's loss is the mean over its target tokens, however many micro-batches and ranks they are spread over: each
micro-batch contributes its local sum divided by the step's global number, so accumulated gradients equal those of one
big batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trinity.config import LossConfig
from trinity.model.transformer import Transformer
from trinity.ops.borrowed_cross_entropy import cross_entropy


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device (`data.rows.Rows` and whatever arrays a stage adds)."""

    tokens_BT: Tensor
    targets_BT: Tensor
    segments_BT: Tensor
    positions_BT: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Arrays beyond those of Rows, by field name."""


@dataclass(frozen=True)
class Share:
    """What a micro-batch is a part of: the step's totals over all micro-batches and ranks."""

    targets: Tensor
    """Target tokens, scalar float32, at least 1."""
    tokens: Tensor
    """Tokens that are not padding, scalar float32, at least 1."""


@dataclass(frozen=True)
class LossOutput:
    """A micro-batch's part of the step. Everything but `loss` is detached."""

    loss: Tensor
    """Differentiable scalar; its sum over micro-batches and ranks is the step's loss."""
    terms: Mapping[str, Tensor]
    """Scalars that add up over micro-batches and ranks to the record's fields: ce, z_loss, sequence_loss, ..."""
    mean: Tensor
    """This micro-batch's own mean loss per target token, for BatchHet."""
    counts_LE: Tensor
    """Tokens routed to each expert."""
    extremes: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalars or vectors of which the step reports the largest: logit_max, router_max [L], ..."""
    margins_LEB: Tensor | None = None
    """Histograms of margins, for quantile balancing."""


class LossFunction(Protocol):
    def __call__(self, model: nn.Module, batch: Batch, share: Share, settings: LossConfig) -> LossOutput: ...


def language_model_loss(model: nn.Module, batch: Batch, share: Share, settings: LossConfig) -> LossOutput:
    """Cross-entropy + z_loss * mean(logsumexp(logits)^2) + sequence_loss * sum over MoE layers of sum_i f_i P_i.

    The means of the first two are over target tokens; f_i P_i is that of the spec (section 3), a mean over documents
    weighed by their tokens, and layers add up, as each has the term of its own. The terms are recorded with their
    coefficients: they add up to the loss.
    """
    assert isinstance(model, Transformer), f"the model is a {type(model).__name__}"
    layout = model.layout((len(batch.tokens_BT), batch.tokens_BT.shape[1]), batch.segments_BT, batch.positions_BT)
    features = model.features(batch.tokens_BT, layout=layout)
    entropy = cross_entropy(
        settings.cross_entropy,
        features.x_BTD.flatten(0, 1),
        model.head.weight,
        batch.targets_BT.flatten(),
        z_loss=settings.z_loss,
        chunk_tokens=settings.chunk_tokens,
    )
    own = settings.cross_entropy == "chunked"
    routing = features.routing
    part = (batch.segments_BT >= 0).sum() / share.tokens
    sequence_loss = settings.sequence_loss * part * routing.sequence_loss
    targets = entropy.num_tokens / share.targets
    rows_2 = torch.stack([entropy.ce_sum, entropy.num_tokens.float()])
    if layout.sum_parts is not None:
        rows_2 = layout.sum_parts(rows_2)
    return LossOutput(
        loss=entropy.loss_sum / share.targets + sequence_loss,
        terms={
            "ce": entropy.ce_sum / share.targets,
            "z_loss": entropy.z_sum / share.targets,
            "sequence_loss": sequence_loss.detach(),
            **({"logit_mean": entropy.logit_mean * targets} if own else {}),
            "router_entropy": routing.entropy_L * part,
        },
        mean=rows_2[0] / rows_2[1].clamp(min=1),
        counts_LE=routing.counts_LE,
        extremes={
            **({"logit_max": entropy.logit_max} if own else {}),
            "router_max": routing.logit_max_L,
            "router_negated_min": -routing.logit_min_L,
        },
        margins_LEB=routing.margins_LEB,
    )


BASE = ("tokens_BT", "targets_BT", "segments_BT", "positions_BT")


def to_device(rows: Any, device: torch.device) -> Batch:
    """The arrays of a Rows-like dataclass as tensors; on a GPU copied from pinned memory, without waiting."""
    arrays = {f.name: getattr(rows, f.name) for f in fields(rows) if isinstance(getattr(rows, f.name), np.ndarray)}
    tensors = {name: _send(torch.from_numpy(np.ascontiguousarray(a)), device) for name, a in arrays.items()}
    base = {name: tensors.pop(name) for name in BASE}
    return Batch(**base, extra=tensors)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
