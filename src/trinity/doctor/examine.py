"""All checks in order, on one machine or over a group."""

import socket
from pathlib import Path

import torch

from trinity.base import dist
from trinity.doctor.finding import Finding
from trinity.doctor.group import examine_group, worst_of
from trinity.doctor.node import examine_node
from trinity.doctor.storage import examine_storage


def examine(
    place: Path, *, shared: Path | None = None, device: str = "auto", min_bandwidth: float = 0.0, quick: bool = False
) -> list[Finding]:
    """Findings of this machine and, in a group of processes, of every rank's machine and what joins them.

    place: where runs are kept, written to and left as it was. shared: a place that all ranks must see as one; by
    default `place` in a group. Every rank gets the same list.
    """
    mine = [*examine_node(), *examine_storage(place, 8 if quick else 64)]
    gathered = dist.gather_objects((socket.gethostname(), mine))
    findings = worst_of([findings for _, findings in gathered], [host for host, _ in gathered])
    if dist.world_size() > 1:
        on_gpu = device != "cpu" and torch.cuda.is_available()
        target = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        findings += examine_group(target, shared or place, min_bandwidth, quick=quick)
    return findings
