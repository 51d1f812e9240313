"""What a rehearsal stands in for: content, devices and other ranks. Everything else of a step runs as it is."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from trinity.config import ModelConfig
from trinity.model import moe
from trinity.model.layout import Layout
from trinity.model.norm import Kernels
from trinity.model.rope import rotation
from trinity.model.router import Documents
from trinity.model.transformer import Transformer
from trinity.ops import cross_entropy, experts, matmul
from trinity.ops.key_ranges import KeyRanges
from trinity.ops.newton_schulz import orthogonalize
from trinity.ops.swiglu import swiglu
from trinity.optim import muon
from trinity.parallel.context import ContextLayout
from trinity.parallel.expert import AllToAll, ExpertParallel
from trinity.parallel.muon import _Batch, _Travel


class MetaModel(Transformer):
    """A model on the meta device, which shards fast, and whose weights then become fake ones on a device."""

    mode: FakeTensorMode

    def to_empty(self, *, device: Any, recurse: bool = True) -> Self:
        with self.mode:
            return super().to_empty(device=device, recurse=recurse)


def _stack(batch: _Batch, flat: Tensor) -> Tensor:
    """As `_Batch.stack`, without a copy for each of up to thousands of ranks."""
    return flat.new_empty(len(batch.owned[batch.rank]), batch.rows, batch.columns)


def _send_back(batch: _Batch, stack: Tensor) -> _Travel:
    return _Travel(stack.new_empty(sum(batch.takes)), batch.takes, batch.sends, batch.group)


class _Attention:
    """Keeps for the backward pass what FlexAttention keeps."""

    def attend(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0].transpose(1, 2)

    def describe(self) -> str:
        return "shapes of attention"


def shapes_layout(
    config: ModelConfig,
    shape: tuple[int, int],
    device: torch.device,
    kernels: Kernels,
    segments_BT: Tensor | None = None,
    positions_BT: Tensor | None = None,
) -> Layout:
    """As `make_layout`, with attention in shapes and as many documents as a GPU reckons with."""
    del kernels
    assert positions_BT is not None
    tokens = shape[0] * shape[1]
    real_N = None if segments_BT is None else segments_BT.flatten() >= 0
    documents = Documents(torch.zeros(tokens, dtype=torch.int64, device=device), tokens, real_N)
    turn = rotation(positions_BT, config.head_dim, config.rope_theta)
    return Layout(turn, _Attention(), _Attention(), documents)


class ShapesContext(ContextLayout):
    """Context parallelism with attention in shapes."""

    def plan(self, ranges: KeyRanges, window: int | None, kernels: Kernels) -> _Attention:
        return _Attention()

    def num_documents(self, running_N: Tensor, most: int) -> int:
        return most


class _Even(AllToAll):
    """Every rank gets as many rows as it sends."""

    def lengths(self, leaving_re: Tensor, counts_re: Tensor, num_rows: int) -> tuple[list[int], list[int]]:
        share = [num_rows // self.ranks + (rank < num_rows % self.ranks) for rank in range(self.ranks)]
        return share, share


def own_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Another group of the same ranks."""
    return cast("dist.ProcessGroup", dist.new_group(dist.get_process_group_ranks(group)))


def route_evenly(model: Transformer, group: dist.ProcessGroup) -> None:
    for block in model.blocks:
        if block.moe is not None and isinstance(block.moe.dispatcher, ExpertParallel):
            block.moe.dispatcher = ExpertParallel(_Even(group))


def _grouped_experts(
    x_RD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ends_E: Tensor, *, fp8: bool = False
) -> Tensor:
    del fp8  # results and what is kept have the same shapes and types
    if x_RD.dtype != torch.bfloat16:  # grouped_mm knows nothing else; the shapes of one expert on all rows are the same
        return F.linear(swiglu(F.linear(x_RD, gate_up_E2FD[0])), down_EDF[0])
    gate_up_R2F = F.grouped_mm(x_RD, gate_up_E2FD.transpose(1, 2), offs=ends_E)
    return F.grouped_mm(swiglu(gate_up_R2F), down_EDF.transpose(1, 2), offs=ends_E)


@contextmanager
def gpu_paths() -> Iterator[None]:
    """Operations take on fake CPU tensors the path that they take on a GPU."""
    replaced: Sequence[tuple[Any, str, Any]] = (
        (moe, "grouped_experts", _grouped_experts),
        (experts, "grouped_experts", _grouped_experts),
        (matmul, "cpu_has_bfloat16", lambda: True),
        (cross_entropy, "_chunk_size", lambda chunk_tokens, _: chunk_tokens),
        (_Batch, "stack", _stack),
        (_Batch, "send_back", _send_back),
        (muon, "orthogonalize", partial(orthogonalize, dtype=torch.bfloat16)),
    )
    with ExitStack() as stack:
        for module, name, value in replaced:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


@contextmanager
def fake_group(ranks: int, rank: int) -> Iterator[None]:
    if ranks == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
