"""A step of any layout, on a machine that has none of its GPUs: one rank of it, with tensors that have no content.

The code that runs is the code that trains: `shard_model`, the dispatcher, `ContextLayout`, `StepRunner`, the optimizer.
Only what needs a device or a value is stood in for:

- tensors are fake (`FakeTensorMode`) and the process group too: shapes are computed, numbers are not;
- attention is an operation that keeps what FlexAttention keeps (q, k, v, the output and one number a query and head);
- routing is even: a layout's experts all get the same number of tokens (a real step has MaxVio on top);
- the paths are those of a GPU (grouped products, bfloat16 in Newton-Schulz), run eagerly: a compiled block may keep
  somewhat less.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from trinity.base import dist
from trinity.base.dist import local
from trinity.base.errors import UsageError
from trinity.config import ParallelSizes, RunConfig, check_parallel
from trinity.data.rows import Chunk, Rows, empty_rows, finish_row
from trinity.model.transformer import Transformer
from trinity.optim.optimizer import MuonAdamW, build_optimizer
from trinity.optim.schedule import PlannedStep
from trinity.parallel import context
from trinity.parallel.ledger import ACTIVATIONS, GRADIENTS, Ledger, Memory
from trinity.parallel.mesh import Meshes, build_meshes
from trinity.parallel.muon import MuonExchange
from trinity.parallel.shard import Sharding, shard_model
from trinity.parallel.split import RowSplit
from trinity.train.guard import SpikeGuard
from trinity.train.losses import Batch, LossOutput, Share, language_model_loss
from trinity.train.precision import MasterWeights
from trinity.train.stand_ins import (
    MetaModel,
    ShapesContext,
    fake_group,
    gpu_paths,
    own_group,
    route_evenly,
    shapes_layout,
)
from trinity.train.step import StepRunner

PARAMETERS, OPTIMIZER, WORKING = "parameters", "optimizer state", "working copies"
MICRO_BATCH, UPDATE = "micro-batch", "update"
REPLICAS = "replicas"


@dataclass(frozen=True)
class Exchanged:
    """Messages of one kind in one optimizer step."""

    kind: str
    over: str
    ranks: int
    messages: int
    bytes_sent: int
    """By this rank."""


@dataclass(frozen=True)
class Rehearsal:
    """One rank of a step. Memory in bytes."""

    stage: str
    ranks: int
    rank: int
    sizes: ParallelSizes
    seq_len: int
    local_len: int
    """Tokens of a row on this rank."""
    micro_rows: int
    micro_batches: int
    recompute: str
    parameters: int
    """float32 masters and, in one process, their working copies."""
    gradients: int
    optimizer_state: int
    activations: int
    """Kept from the forward for the backward pass of one micro-batch."""
    forward_backward: dict[str, int]
    """By kind, at the moment of a micro-batch at which most is alive."""
    update: dict[str, int]
    """The same for the optimizer's step."""
    muon_updates: int
    """Part of `update`: Muon holds the updates of all matrices that are whole on this rank at once."""
    exchanged: tuple[Exchanged, ...]

    @property
    def peak(self) -> int:
        return max(sum(self.forward_backward.values()), sum(self.update.values()))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak}


def rehearse(config: RunConfig, stage: str, ranks: int) -> Rehearsal:
    """One step of `stage` ("pretrain", "extend", "sft") on one of `ranks` ranks.

    Raises UsageError for a layout that does not fit (`config.check_parallel`, `RowSplit`) and for a stage whose step is
    not this one (RL).
    """
    if stage == "rl":
        raise UsageError("rehearse knows pretrain, extend and sft; a step of rl also generates")
    if dist.initialized():
        raise UsageError("rehearse makes a process group of its own and cannot run inside another")
    sizes = check_parallel(config, stage, ranks)
    settings = getattr(config, stage)
    split = RowSplit(sizes.context, settings.seq_len, sizes.context_order)
    rows = _rows_of_step(config, stage)
    if rows % sizes.data:
        raise UsageError(
            f"{stage}: a step of {rows} rows cannot be shared by {sizes.data} data-parallel ranks: use a multiple of "
            f"{sizes.data} rows"
        )
    micro_rows = min(settings.micro_rows, rows // sizes.data)
    rank = 1 % sizes.context  # a rank in the middle of rows has the most windows to fetch
    with fake_group(ranks, rank), gpu_paths():
        return _Rehearsing(config, stage, sizes, split, micro_rows, -(-(rows // sizes.data) // micro_rows), rank).run()


def group_names(
    meshes: Meshes, experts: torch.distributed.ProcessGroup, context: torch.distributed.ProcessGroup
) -> dict[str, str]:
    """What the groups of a layout are called in a rehearsal, by their own names. `experts` and `context` are groups of
    their own: those of the meshes may be one with others, where they have all ranks."""
    return {
        meshes.sparse.get_group("replicate").group_name: REPLICAS,
        meshes.dense.get_group("replicate").group_name: REPLICAS,
        meshes.sparse.get_group("efsdp").group_name: "expert weights",
        meshes.dense.get_group("fsdp").group_name: "weights",
        experts.group_name: "experts",
        context.group_name: "context",
    }


def _rows_of_step(config: RunConfig, stage: str) -> int:
    if stage == "pretrain":
        return config.pretrain.batch[-1].rows
    return getattr(config, stage).batch_rows


class _Rehearsing:
    def __init__(
        self,
        config: RunConfig,
        stage: str,
        sizes: ParallelSizes,
        split: RowSplit,
        micro_rows: int,
        micro_batches: int,
        rank: int,
    ) -> None:
        self.config, self.stage, self.sizes, self.split, self.rank = config, stage, sizes, split, rank
        self.micro_rows, self.micro_batches = micro_rows, micro_batches
        self.ledger = Ledger()
        self.kept = self.backward_peak = Memory({})
        self.muon_updates = 0

    def run(self) -> Rehearsal:
        config, ledger = self.config, self.ledger
        ranks = self.sizes.world
        meshes = build_meshes(config.parallel, ranks, "cpu") if ranks > 1 else None
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            model = MetaModel(config.model, recompute=config.runtime.recompute)
        model.mode, sharding, exchange = mode, None, None
        if meshes is None:
            model.to_empty(device="cpu")
        else:
            sharding = shard_model(model, meshes, config.runtime)
            exchange = MuonExchange(sharding, config.model)
        model.layout_maker = shapes_layout
        if meshes is not None:
            experts, around = own_group(meshes.expert_group), own_group(meshes.context_group)
            ledger.groups = group_names(meshes, experts, around)
            route_evenly(model, experts)
            if self.sizes.context > 1:
                model.layout_maker = ShapesContext(around, self.sizes.context_order)
                # What is cached must not be fake.
                context.prepare(self.split, meshes.context_rank, config.model.window, torch.device("cpu"))
        with mode, ledger.watching():
            optimizer = build_optimizer(model, config.model, config.optim, exchange)
            parameters = [local(p.detach()) for p in model.parameters()]
            ledger.claim(PARAMETERS, parameters)
            state = [t for t in optimizer.state_dict().values() if t.ndim]
            ledger.claim(OPTIMIZER, state)
            dtype = getattr(torch, config.runtime.dtype)
            alone = sharding is None and config.runtime.master_weights
            masters = MasterWeights(model, dtype if alone else torch.float32)
            if alone:
                ledger.claim(WORKING, [p.detach() for p in model.parameters()])
            runner = self._runner(model, optimizer, masters, sharding)
            rows = self._rows()
            planned = PlannedStep(0, self.stage, self.micro_rows, 0, 1.0)
            ledger.phase = MICRO_BATCH
            runner.run(planned, [rows])
        return self._result()

    def _runner(
        self, model: Transformer, optimizer: MuonAdamW, masters: MasterWeights, sharding: Sharding | None
    ) -> StepRunner:
        device = torch.device("cpu")
        guard = SpikeGuard(self.config.guard, device)
        return StepRunner(
            model, _Watched(optimizer, self), self._loss, self.config, guard, masters, device, sharding=sharding
        )

    def _loss(self, model: nn.Module, batch: Batch, share: Share, settings: Any) -> LossOutput:
        self.ledger.reset_peak()
        output = language_model_loss(model, batch, share, settings)
        self.kept = self.ledger.now()
        return output

    def before_update(self, optimizer: MuonAdamW) -> None:
        self.backward_peak = self.ledger.peak
        gradients = [m.parameter.grad for m in optimizer.groups.muon]
        gradients += [
            p.grad for p in (*optimizer.groups.adamw_decay.values(), *optimizer.groups.adamw_vectors.values())
        ]
        self.ledger.claim(GRADIENTS, [local(g.detach()) for g in gradients if g is not None])
        self.gradients = self.ledger.now().by_kind[GRADIENTS]
        exchange = optimizer.muon.exchange
        self.muon_updates = sum(
            momentum.numel() * momentum.element_size()
            for name, momentum in optimizer.muon.momentum.items()
            if exchange is None or not exchange.splits(name)
        )
        self.ledger.reset_peak()
        self.ledger.phase = UPDATE

    def _rows(self) -> Rows:
        rows = empty_rows(self.micro_rows, self.split.seq_len)
        rows.tokens_BT.fill(0)
        rows.targets_BT.fill(0)
        for row in range(len(rows)):
            finish_row(rows, row, [Chunk(0, 0, self.split.seq_len)])
        return self.split.take(rows, self.rank) if self.sizes.context > 1 else rows

    def _result(self) -> Rehearsal:
        kept = self.kept.by_kind
        return Rehearsal(
            stage=self.stage,
            ranks=self.sizes.world,
            rank=self.rank,
            sizes=self.sizes,
            seq_len=self.split.seq_len,
            local_len=self.split.local_len,
            micro_rows=self.micro_rows,
            micro_batches=self.micro_batches,
            recompute=self.config.runtime.recompute,
            parameters=kept.get(PARAMETERS, 0) + kept.get(WORKING, 0),
            gradients=self.gradients,
            optimizer_state=kept.get(OPTIMIZER, 0),
            activations=kept.get(ACTIVATIONS, 0),
            forward_backward=dict(sorted(self.backward_peak.by_kind.items())),
            update=dict(sorted(self.ledger.peak.by_kind.items())),
            muon_updates=self.muon_updates,
            exchanged=self._exchanged(),
        )

    def _exchanged(self) -> tuple[Exchanged, ...]:
        found: dict[tuple[str, str], Exchanged] = {}
        for (phase, kind, over), entry in self.ledger.traffic.items():
            if entry.ranks == 1:
                continue
            # Sums over ranks are taken once a step; but for those that a split row's documents need.
            once = phase == UPDATE or (kind == "all-reduce" and over != "context")
            times = 1 if once else self.micro_batches
            name = _KINDS.get((phase, kind, over), kind)
            before = found.get((name, over))
            messages, sent = (before.messages, before.bytes_sent) if before else (0, 0)
            found[name, over] = Exchanged(
                name, over, entry.ranks, messages + times * entry.messages, sent + times * entry.sent
            )
        return tuple(sorted(found.values(), key=lambda e: -e.bytes_sent))


_KINDS = {
    (MICRO_BATCH, "all-gather", "weights"): "all-gather of weights",
    (MICRO_BATCH, "all-gather", "expert weights"): "all-gather of weights",
    (MICRO_BATCH, "reduce-scatter", "weights"): "reduce-scatter of gradients",
    (MICRO_BATCH, "reduce-scatter", "expert weights"): "reduce-scatter of gradients",
    (MICRO_BATCH, "all-reduce", REPLICAS): "all-reduce of gradients",
    (MICRO_BATCH, "all-to-all", "experts"): "all-to-all of tokens",
    (MICRO_BATCH, "all-to-all", "context"): "halo of local layers, all-to-all",
    (MICRO_BATCH, "all-gather", "context"): "all-gather of keys and values",
    (MICRO_BATCH, "reduce-scatter", "context"): "reduce-scatter of their gradients",
    (MICRO_BATCH, "all-reduce", "context"): "all-reduce of documents' counts",
    (MICRO_BATCH, "all-reduce", "all ranks"): "all-reduce of routers' gradients and counts",
    (MICRO_BATCH, "all-reduce", "weights"): "all-reduce of the norm, and what all ranks sum",
    (UPDATE, "all-to-all", "weights"): "all-to-all of Muon's matrices",
    (UPDATE, "all-to-all", "expert weights"): "all-to-all of Muon's matrices",
}


class _Watched:
    """The optimizer, telling when its step begins."""

    def __init__(self, optimizer: MuonAdamW, rehearsing: _Rehearsing) -> None:
        self._optimizer, self._rehearsing = optimizer, rehearsing

    def step(self, skip: Tensor | None = None, number: int = 0) -> None:
        self._rehearsing.before_update(self._optimizer)
        self._optimizer.step(skip, number)

    def set_lr(self, scale: float) -> None:
        self._optimizer.set_lr(scale)

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._optimizer.load_state_dict(state)
