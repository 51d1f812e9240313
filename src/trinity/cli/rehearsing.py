"""The verb that tries a layout without its GPUs."""

from typing import TYPE_CHECKING, Annotated

import typer

from trinity.base.errors import UsageError
from trinity.cli.options import (
    JsonOption,
    OverlayOption,
    SettingsArgument,
    note,
    print_json,
    print_rows,
    resolve_settings,
)

if TYPE_CHECKING:
    from trinity.config import RunConfig
    from trinity.train.rehearsal import Rehearsal

STAGES = ("pretrain", "extend", "sft")


def rehearse(
    settings: SettingsArgument = None,
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="Processes of the layout, one a GPU.")] = 1,
    stage: Annotated[str, typer.Option("--stage", help="pretrain, extend or sft: its rows and batch.")] = "pretrain",
    overlay: OverlayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Trace one training step of any layout on this machine: memory and traffic of a rank, without its GPUs.

    The layout is the settings' (parallel.*); nothing is written.
    """
    if stage not in STAGES:
        raise UsageError(f"--stage {stage} is not one of {', '.join(STAGES)}")
    config, _ = resolve_settings(settings, overlay)
    from trinity.train.rehearsal import rehearse as trace

    found = trace(config, stage, ranks)
    if as_json:
        print_json({"name": config.name, **found.to_json()})
        return
    _print(config, found)


def _print(config: "RunConfig", found: "Rehearsal") -> None:
    sizes = found.sizes
    layout = ", ".join(f"{k} {getattr(sizes, k)}" for k in ("replicate", "shard", "expert", "context"))
    print(f"{config.name}, {found.stage}: rank {found.rank} of {found.ranks:,} ({layout})")
    part = f", {found.local_len:,} of them on a rank" if sizes.context > 1 else ""
    print(
        f"rows of {found.seq_len:,} tokens{part}; {found.micro_batches:,} micro-batches of {found.micro_rows} rows a "
        f"step; recomputation: {found.recompute}\n"
    )
    memory = [
        ("parameters", found.parameters),
        ("gradients", found.gradients),
        ("optimizer state", found.optimizer_state),
        ("activations kept for the backward pass", found.activations),
        ("peak of forward and backward", sum(found.forward_backward.values())),
        *((f"  {kind}", size) for kind, size in found.forward_backward.items()),
        ("peak of the optimizer's step", sum(found.update.values())),
        *((f"  {kind}", size) for kind, size in found.update.items()),
    ]
    print_rows(("memory of the rank", "GiB"), [(name, _gib(size)) for name, size in memory])
    print()
    if found.exchanged:
        rows = [(e.kind, e.over, e.ranks, e.messages, _gib(e.bytes_sent)) for e in found.exchanged]
        print_rows(("sent in a step", "over", "ranks", "messages", "GiB"), rows)
        print()
    note(
        f"Muon's step holds the updates of all matrices that are whole on the rank at once: {_gib(found.muon_updates)} "
        "GiB of its peak. Routing is taken as even. Not counted: what the allocator, NCCL and compiled kernels need "
        "beyond tensors."
    )


def _gib(size: int) -> float:
    return round(size / 2**30, 2)
