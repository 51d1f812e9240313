"""Sharding a finished model from outside: FSDP2 per block and at the root, experts on a mesh of their own.

Weights outside the experts are split over `dense` (replicate, fsdp). With expert parallelism each rank keeps a
contiguous range of every layer's experts as a smaller stack, and that stack is split over (replicate, efsdp) of
`sparse`: the modules see plain tensors and need to know nothing of it. Router weights stay whole on every rank in
float32, as they do in one process (their logits would tie if rounded), and are small.

A step's loss is a sum over ranks of local sums over a global count, so every reduction is a plain sum: the divide
factor is 1.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.utils import _pytree

from trinity.base import dist
from trinity.config import RuntimeConfig
from trinity.data.rows import Rows
from trinity.model.init import fill, initial_matrix
from trinity.model.layout import make_layout
from trinity.model.moe import Experts
from trinity.model.norm import RMSNorm
from trinity.model.router import Router
from trinity.model.transformer import Features, RoutingStats, Transformer
from trinity.parallel.context import ContextLayout, split_rows
from trinity.parallel.expert import AllToAll, ExpertParallel
from trinity.parallel.mesh import Meshes
from trinity.parallel.slices import Slice, chunk

REPLICATED = ("router.weight",)
"""Endings of names of parameters that every rank keeps whole."""


@dataclass
class Sharding:
    """A sharded model: its parameters as they rest between steps, and what of the whole each rank holds."""

    model: Transformer
    meshes: Meshes
    parameters: dict[str, nn.Parameter]
    """By the model's names: sharded ones are DTensors, replicated ones plain."""
    slices: dict[str, Slice]
    """This rank's part of every parameter."""
    units: list[FSDPModule] = field(default_factory=list)
    """Modules that are gathered as one, the root first."""
    alone: list[FSDPModule] = field(default_factory=list)
    """Units whose weights are on one rank only: they are cast once a step instead of gathered for every pass."""
    context: ContextLayout | None = None
    """Where a row's tokens are spread over ranks."""

    def take(self, rows: Rows) -> Rows:
        """This rank's part of rows, which its context group shares."""
        if self.context is None:
            return rows
        length = rows.tokens_BT.shape[1]
        return self.context.split(length // self.context.size).take(rows, self.context.rank)

    @contextmanager
    def whole_rows(self) -> Iterator[None]:
        """For evaluations: rows are not split over ranks inside, and no gathered weights are left behind."""
        maker = self.model.layout_maker
        self.model.layout_maker = make_layout
        try:
            yield
        finally:
            self.model.layout_maker = maker
            self.reshard()

    def micro_batch(self, *, last: bool) -> None:
        """Say before each backward pass whether it is the step's last: replicas add up gradients only then.

        Where a unit's weights lie on one rank whole, so do its gradients, and reducing them to shards would only copy
        them: they add up in float32 as they are until the last pass.
        """
        if self.meshes.sizes.replicate > 1:
            self.units[0].set_requires_all_reduce(last)
        for unit in self.alone:
            unit.set_reshard_after_backward(last, recurse=False)
            unit.set_requires_gradient_sync(last, recurse=False)
        self.units[0].set_is_last_backward(last)

    def reshard(self) -> None:
        """Drop gathered weights, as after an evaluation: the next forward pass gathers what the shards hold then."""
        for unit in self.units:
            unit.reshard()

    def gathered_bytes(self, dtype: torch.dtype) -> int:
        """Memory of `gathered` on each rank."""
        numbers = sum(parameter.numel() for parameter in self.parameters.values())
        return numbers * dtype.itemsize

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights of a replica on each of its ranks in the compute type (of the experts: this rank's), for code
        that calls parts of the model, such as generation. No gradients may be taken in it."""
        for unit in self.units:
            unit.unshard()
        try:
            yield
        finally:
            self.reshard()

    def gradients(self) -> dict[str, Tensor]:
        """This rank's part of every gradient, summed over all ranks; replicated ones are summed here, in one
        collective."""
        found: dict[str, Tensor] = {}
        whole: list[Tensor] = []
        for name, parameter in self.parameters.items():
            if not parameter.requires_grad:
                continue
            if not isinstance(parameter, DTensor):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                whole.append(parameter.grad)
            if parameter.grad is not None:
                found[name] = dist.local(parameter.grad)
        if whole:
            flat = dist.all_reduce_sum(torch.cat([gradient.reshape(-1) for gradient in whole]))
            parts = flat.split([gradient.numel() for gradient in whole])
            torch._foreach_copy_(whole, [part.view_as(g) for part, g in zip(parts, whole, strict=True)])
        return found

    @torch.no_grad()
    def total_norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """Euclidean norm of all gradients, float32 scalar, the same on every rank.

        Whatever the mesh, a replica's ranks hold each number of a sharded gradient once.
        """
        sharded = [g for name, g in gradients.items() if isinstance(self.parameters[name], DTensor)]
        whole = [g for name, g in gradients.items() if not isinstance(self.parameters[name], DTensor)]
        total = torch.zeros((), device=next(iter(gradients.values())).device)
        if sharded:
            total = total + torch.stack(torch._foreach_norm(sharded, 2, dtype=torch.float32)).square().sum()
        if self.meshes.sizes.fsdp > 1:
            torch.distributed.all_reduce(total, group=self.meshes.shard_group)
        if whole:
            total = total + torch.stack(torch._foreach_norm(whole, 2, dtype=torch.float32)).square().sum()
        return total.sqrt()

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """The values that `Transformer.init_weights` gives, this rank's part of them; experts elsewhere are not
        drawn."""
        config = self.model.config
        std = config.init_scale * config.dim**-0.5
        matrices = [(name, parameter) for name, parameter in self.parameters.items() if parameter.ndim > 1]
        with ThreadPoolExecutor() as pool:  # one stream a matrix, so the order does not matter
            list(pool.map(lambda entry: self._draw(entry[0], entry[1], std, seed), matrices))
        for module in self.model.modules():
            if isinstance(module, RMSNorm):
                dist.local(module.weight).fill_(module.gain)
            elif isinstance(module, Router):
                module.bias.zero_()
                module.momentum.zero_()

    @torch.no_grad()
    def _draw(self, name: str, parameter: nn.Parameter, std: float, seed: int) -> None:
        part, mine = self.slices[name], dist.local(parameter)
        if parameter.ndim == 2:
            mine.copy_(part.of(initial_matrix(name, part.shape, std, seed)))
        elif part.size[1:] == part.shape[1:]:
            fill(name, mine, std, seed, first_expert=part.start[0])
        else:
            for number, expert in enumerate(mine, start=part.start[0]):
                whole = initial_matrix(f"{name}/{number}", part.shape[1:], std, seed)
                expert.copy_(whole[part.box[1:]])

    def state(self) -> dict[str, Tensor]:
        """This rank's part of every parameter, and the buffers, by the model's names; references."""
        parts = {name: dist.local(parameter.detach()) for name, parameter in self.parameters.items()}
        return {**parts, **dict(self.model.named_buffers())}

    @torch.no_grad()
    def load(self, state: Iterable[tuple[str, Tensor]]) -> None:
        """Take this rank's part of whole tensors, handed over one at a time by name."""
        self.reshard()
        own = self.state()
        for name, whole in state:
            part = self.slices.get(name)
            own[name].copy_(whole if part is None else part.of(whole))


def shard_model(model: Transformer, meshes: Meshes, settings: RuntimeConfig) -> Sharding:
    """Shard `model` in place over the meshes; every rank must call it.

    A model on the meta device comes out with unset weights on the device of the meshes, and never exists whole: call
    `Sharding.init_weights` or `load` next. One with weights keeps them. float32 parameters are the masters; with
    `runtime.dtype` bfloat16 they are gathered in bfloat16, and gradients are reduced in float32.
    """
    dtype = getattr(torch, settings.dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    sizes = meshes.sizes
    dense = meshes.dense if sizes.replicate > 1 else meshes.dense["fsdp"]
    sparse = meshes.sparse["replicate", "efsdp"] if sizes.replicate > 1 else meshes.sparse["efsdp"]
    replicated = {p for name, p in model.named_parameters() if name.endswith(REPLICATED)}

    def place(parameter: nn.Parameter, ranks: int) -> Shard:
        return Shard(_shard_dim(parameter.shape, ranks))

    def shard(module: nn.Module, mesh: DeviceMesh) -> None:
        ranks = mesh.size(mesh.ndim - 1)
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=None if ranks > 1 else False,
            shard_placement_fn=lambda p: place(p, ranks),
            mp_policy=policy,
            ignored_params=replicated,
        )
        assert isinstance(module, FSDPModule)
        units.append(module)
        if ranks == 1:
            alone.append(module)

    units: list[FSDPModule] = []
    alone: list[FSDPModule] = []
    if sizes.expert > 1:
        dispatcher = ExpertParallel(AllToAll(meshes.expert_group))
        for block in model.blocks:
            if block.moe is not None:
                _keep_own_experts(block.moe.experts, meshes)
                block.moe.dispatcher = dispatcher
                shard(block.moe.experts, sparse)
    for block in model.blocks:
        shard(block, dense)
    shard(model, dense)
    units.reverse()  # the root first
    for unit in units:
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "features")
    _show_tensors_to_hooks()
    if model.embed.weight.is_meta:
        model.to_empty(device="cpu" if meshes.dense.device_type == "cpu" else torch.cuda.current_device())
    # What the first forward pass would do: parts get their final place in memory, and weights can be gathered before.
    units[0]._get_fsdp_state()._lazy_init()
    parameters = dict(model.named_parameters())
    slices = {name: _slice(name, parameter, meshes) for name, parameter in parameters.items()}
    context = split_rows(model, meshes.context_group, sizes.context_order) if sizes.context > 1 else None
    return Sharding(model, meshes, parameters, slices, units, alone, context)


def _keep_own_experts(experts: Experts, meshes: Meshes) -> None:
    for name in ("gate_up", "down"):
        whole = getattr(experts, name)
        own = chunk(whole.shape[0], meshes.sizes.expert, meshes.expert_rank)
        setattr(experts, name, nn.Parameter(whole.detach()[own.start : own.stop].clone()))


def _shard_dim(shape: torch.Size, ranks: int) -> int:
    """Matrices by rows. Stacks of experts by experts where they share out evenly, which leaves whole matrices to the
    optimizer; else by rows, where those do."""
    by_rows = len(shape) > 2 and shape[0] % ranks and shape[1] % ranks == 0
    return 1 if by_rows else 0


def _slice(name: str, parameter: nn.Parameter, meshes: Meshes) -> Slice:
    """This rank's part of a parameter, whose shape has only this rank's experts."""
    shape, start, size = list(parameter.shape), [0] * parameter.ndim, list(parameter.shape)
    if isinstance(parameter, DTensor):
        placement = parameter.placements[-1]
        assert isinstance(placement, Shard), f"{name} is placed as {placement}"
        mesh = parameter.device_mesh
        rows = chunk(shape[placement.dim], mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1))
        start[placement.dim], size[placement.dim] = rows.start, len(rows)
        assert tuple(size) == tuple(parameter.to_local().shape), f"{name}: {size}, {parameter.to_local().shape}"
    if ".moe.experts." in name:
        start[0] += meshes.expert_rank * shape[0]
        shape[0] *= meshes.sizes.expert
    return Slice(tuple(shape), tuple(start), tuple(size))


def _show_tensors_to_hooks() -> None:
    """FSDP looks for gradients in what `features` returns, and sees into pytrees only."""
    for kind in (Features, RoutingStats):
        if kind not in _pytree.SUPPORTED_NODES:
            _pytree.register_dataclass(kind)
