"""Expert parallelism: each rank of a group has some of a layer's experts, and tokens travel to them and back.

Rows are sorted by expert, so one exchange with as many rows as each rank needs carries them all: nothing is dropped
or padded, whatever the routing. The shared expert is computed while the rows are on their way, and so is its backward
pass while their gradients are: autograd runs what was recorded between `_Send` and `_Arrive` between their backwards.

`Transport` is where another library's exchange (such as DeepEP's `Buffer.dispatch` and `combine`) would be put in.
Suffixes as in `ops.experts`; S rows that arrive here, e experts that are here.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trinity.model.moe import Experts
from trinity.ops.autograd import once_differentiable, uncompiled
from trinity.ops.experts import Order, combine, permute, sort_by_expert


class Arrived(NamedTuple):
    """Rows of all ranks for this rank's experts."""

    x_SD: Tensor
    """Sorted by expert, at least one row."""
    ends_e: Tensor
    """int32: one past the last row of each expert here; the last is S."""
    route: Any
    """What the transport needs to bring the outputs back."""


class Transport(Protocol):
    """Brings rows to the ranks of their experts and their outputs back; differentiable both ways."""

    def send(self, x_ND: Tensor, indices_Nk: Tensor, experts_here: int) -> Any:
        """Set the rows off; every rank has `experts_here` experts, in the order of ranks."""
        ...

    def arrive(self, sent: Any) -> Arrived:
        """Wait for the rows."""
        ...

    def give_back(self, y_SD: Tensor, weights_Nk: Tensor, route: Any) -> Tensor:
        """[N, D]: bring each row's output back to its token, weighed and added up."""
        ...


class ExpertParallel:
    """The dispatcher (`model.moe.Dispatcher`) of a layer whose experts are spread over ranks."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    @uncompiled
    def __call__(
        self, x_ND: Tensor, indices_Nk: Tensor, weights_Nk: Tensor, experts: Experts, shared: nn.Module | None
    ) -> Tensor:
        sent = self.transport.send(x_ND, indices_Nk, experts.gate_up.shape[0])
        shared_ND = None if shared is None else shared(x_ND)
        arrived = self.transport.arrive(sent)
        y_SD = experts(arrived.x_SD, arrived.ends_e)
        y_ND = self.transport.give_back(y_SD, weights_Nk, arrived.route)
        return y_ND if shared_ND is None else y_ND + shared_ND


class _Sent(NamedTuple):
    token: Tensor
    flight: "_Flight"
    order: Order
    counts_re: Tensor


class _Route(NamedTuple):
    order: Order
    row_S: Tensor
    """int64: where each row, sorted by expert, lies among those that arrived sorted by rank."""
    back_S: Tensor
    """int64: the inverse."""
    flight: "_Flight"


class AllToAll:
    """One all-to-all each way with as many rows for each rank as it needs; the counts travel ahead of it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.ranks = group, group.size()

    def send(self, x_ND: Tensor, indices_Nk: Tensor, experts_here: int) -> _Sent:
        order = sort_by_expert(indices_Nk, self.ranks * experts_here)
        leaving_re = order.counts_E.view(self.ranks, -1)
        counts_re = torch.empty_like(leaving_re)  # from each rank, for each expert here
        dist.all_to_all_single(counts_re, leaving_re, group=self.group)
        leaving, coming = self.lengths(leaving_re, counts_re, indices_Nk.numel())
        flight = _Flight(leaving, coming, self.group)
        return _Sent(_Send.apply(permute(x_ND, order), flight), flight, order, counts_re)

    def lengths(self, leaving_re: Tensor, counts_re: Tensor, num_rows: int) -> tuple[list[int], list[int]]:
        """Rows for each rank and from each; `num_rows` leave in all. Waits for the device."""
        leaving, coming = torch.stack([leaving_re.sum(1), counts_re.sum(1)]).tolist()
        return leaving, coming

    def arrive(self, sent: _Sent) -> Arrived:
        x_SD = _Arrive.apply(sent.token, sent.flight)
        counts_re = sent.counts_re
        experts = torch.arange(counts_re.shape[1], device=x_SD.device).repeat(self.ranks)
        expert_S = experts.repeat_interleave(counts_re.flatten(), output_size=x_SD.shape[0])
        row_S = expert_S.argsort(stable=True)
        back_S = torch.empty_like(row_S).scatter_(0, row_S, torch.arange(row_S.numel(), device=row_S.device))
        ends_e = counts_re.sum(0).cumsum(0).int()
        x_SD = _Reorder.apply(x_SD, row_S, back_S)
        if x_SD.shape[0] == 0:
            # Kernels want a row, and every expert needs its gradient, zero, or ranks would disagree about whose
            # gradients they reduce. The last expert gets a row of zeros, which gives zeros.
            x_SD = torch.cat([x_SD, x_SD.new_zeros(1, x_SD.shape[1])])
            ends_e = torch.cat([ends_e[:-1], ends_e.new_ones(1)])
        return Arrived(x_SD, ends_e, _Route(sent.order, row_S, back_S, sent.flight.reversed()))

    def give_back(self, y_SD: Tensor, weights_Nk: Tensor, route: _Route) -> Tensor:
        y_SD = _Reorder.apply(y_SD[: route.row_S.numel()], route.back_S, route.row_S)
        y_RD = _Arrive.apply(_Send.apply(y_SD, route.flight), route.flight)
        return combine(y_RD, weights_Nk, route.order)


class _Flight:
    """An exchange between its start and its end, forward or backward."""

    def __init__(self, leaving: list[int], coming: list[int], group: dist.ProcessGroup) -> None:
        self.leaving, self.coming, self.group = leaving, coming, group
        self._work: dist.Work | None = None
        self._tensors: tuple[Tensor, Tensor] | None = None

    def reversed(self) -> "_Flight":
        return _Flight(self.coming, self.leaving, self.group)

    def start(self, x: Tensor, leaving: list[int], coming: list[int]) -> None:
        assert self._work is None, "an exchange was started twice"
        outgoing, arriving = x.contiguous(), x.new_empty(sum(coming), *x.shape[1:])
        self._work = dist.all_to_all_single(arriving, outgoing, coming, leaving, group=self.group, async_op=True)
        self._tensors = outgoing, arriving

    def wait(self) -> Tensor:
        assert self._work is not None, "an exchange was not started"
        assert self._tensors is not None
        self._work.wait()
        arrived = self._tensors[1]
        self._work = self._tensors = None
        return arrived


class _Send(torch.autograd.Function):
    """Starts an exchange and returns a token for `_Arrive`. Backward ends the exchange of the gradients."""

    @staticmethod
    def forward(ctx, x_RD: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.start(x_RD, flight.leaving, flight.coming)
        return x_RD.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        return ctx.flight.wait(), None


class _Arrive(torch.autograd.Function):
    """Ends an exchange. Backward starts the exchange of the gradients."""

    @staticmethod
    def forward(ctx, token: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        flight = ctx.flight
        flight.start(d_outputs[0], flight.coming, flight.leaving)
        return d_outputs[0].new_empty(0), None


class _Reorder(torch.autograd.Function):
    """Row gather by a permutation, whose backward is the gather by the inverse."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        return d_outputs[0].index_select(0, ctx.inverse), None, None
