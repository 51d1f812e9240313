"""How a run is spread over processes: four sizes, checked against the world and the model before anything is built.

With R replicas, C context ranks and E expert ranks on W processes, S = W / (R * C) rows of data are worked on inside
each replica, and a replica's S * C ranks share the weights.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator

from trinity.base.errors import UsageError
from trinity.config.base import Frozen

if TYPE_CHECKING:
    from trinity.config.run import RunConfig

ContextOrder = Literal["zigzag", "contiguous"]


class ParallelConfig(Frozen):
    """Sizes whose product is the number of processes: replicate * shard * context. One process ignores them."""

    replicate: PositiveInt = 1
    """Copies of the sharded model (HSDP); gradients are summed over them."""
    shard: Annotated[int, Field(ge=-1)] = -1
    """Data-parallel ranks inside a replica; -1 or "auto" takes what the other sizes leave."""
    expert: PositiveInt = 1
    """Ranks that share the experts of a layer; divides shard * context and model.num_experts."""
    context: PositiveInt = 1
    """Ranks that share a row's tokens."""
    context_order: ContextOrder = "zigzag"
    """Which tokens: two chunks each, an early and a late one, which evens out global layers; or one chunk each, which
    halves the windows that local layers exchange."""

    @field_validator("shard", mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return -1 if value == "auto" else value

    @field_validator("shard")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError('use "auto" or a size of at least 1')
        return value


@dataclass(frozen=True)
class ParallelSizes:
    """The sizes with `shard` filled in."""

    replicate: int
    shard: int
    expert: int
    context: int
    context_order: ContextOrder = "zigzag"

    @property
    def world(self) -> int:
        return self.replicate * self.fsdp

    @property
    def fsdp(self) -> int:
        """Ranks that share the weights outside the experts: shard * context."""
        return self.shard * self.context

    @property
    def efsdp(self) -> int:
        """Ranks that share the weights of one rank's experts: shard * context / expert."""
        return self.fsdp // self.expert

    @property
    def data(self) -> int:
        """Ranks that get different rows: replicate * shard."""
        return self.replicate * self.shard


def parallel_sizes(settings: ParallelConfig, world_size: int) -> ParallelSizes:
    """The sizes on `world_size` processes. Raises UsageError naming the key and sizes that would do."""
    replicate, context, expert = settings.replicate, settings.context, settings.expert
    fixed = replicate * context
    if world_size % fixed:
        keys = " * ".join(f"parallel.{k} = {v}" for k, v in (("replicate", replicate), ("context", context)) if v > 1)
        raise UsageError(
            f"{keys} does not divide {world_size} processes: start a multiple of {fixed} processes, or choose sizes "
            f"whose product is one of {divisors(world_size)}"
        )
    shard = world_size // fixed if settings.shard == -1 else settings.shard
    if fixed * shard != world_size:
        raise UsageError(
            f"parallel.shard = {shard} with parallel.replicate = {replicate} and parallel.context = {context} makes "
            f"{fixed * shard} processes, but {world_size} run: start {fixed * shard}, or use "
            f"parallel.shard={world_size // fixed}"
        )
    if (shard * context) % expert:
        raise UsageError(
            f"parallel.expert = {expert} does not divide the {shard * context} ranks of a replica "
            f"(parallel.shard * parallel.context): use one of {divisors(shard * context)}"
        )
    return ParallelSizes(replicate, shard, expert, context, settings.context_order)


def check_parallel(config: "RunConfig", stage: str, world_size: int) -> ParallelSizes:
    """The sizes of `stage` ("pretrain", ...), checked against the model, the data and the rows.

    Raises UsageError naming the key and values that would do. Touches no device.
    """
    settings, model = config.parallel, config.model
    sizes = parallel_sizes(settings, world_size)
    if model.num_experts % sizes.expert:
        fits = [n for n in divisors(sizes.fsdp) if model.num_experts % n == 0]
        raise UsageError(
            f"parallel.expert = {sizes.expert} does not divide model.num_experts = {model.num_experts}: "
            f"use one of {fits}"
        )
    seq_len = getattr(config, stage).seq_len
    if sizes.context > 1 and stage == "rl":
        raise UsageError("parallel.context is not for rl, whose rows are generated whole: use parallel.context=1")
    chunks = 2 if settings.context_order == "zigzag" else 1
    if sizes.context > 1 and seq_len % (chunks * sizes.context):
        fits = [n for n in divisors(world_size // sizes.replicate) if n == 1 or seq_len % (chunks * n) == 0]
        each = "twice " if chunks == 2 else ""
        raise UsageError(
            f"{each}parallel.context = {sizes.context} does not divide {stage}.seq_len = {seq_len}: use one of {fits}"
        )
    if stage in ("pretrain", "extend") and config.data.streams % sizes.data:
        raise UsageError(
            f"{sizes.data} data-parallel ranks (parallel.replicate * parallel.shard) cannot share data.streams = "
            f"{config.data.streams}: use a number of ranks out of {divisors(config.data.streams)}, or for a new run a "
            f"multiple of {sizes.data} as data.streams"
        )
    return sizes


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
