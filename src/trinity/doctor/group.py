"""Checks over all processes of a group: equal software, clocks, storage that is really shared, and the network."""

import fcntl
import os
import secrets
import socket
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from trinity.base import dist
from trinity.doctor.finding import Finding
from trinity.doctor.node import versions

MIB = 1 << 20
_SKEW = 1.0
_SEEN = 15.0  # seconds that a file may take to appear on another machine: NFS remembers what was not there
_STRAGGLER = 0.85


def examine_group(device: torch.device, shared: Path | None, min_bandwidth: float, *, quick: bool) -> list[Finding]:
    """A collective; every rank gets the findings. min_bandwidth: GB/s of bus bandwidth that the largest all-reduce must
    reach."""
    findings = [*_same_software(), _clocks()]
    if shared is not None:
        findings.append(_shared_storage(shared))
    if device.type == "cuda":
        findings.append(_equal_speed(device))
    sizes = (MIB, 16 * MIB, 256 * MIB) if device.type == "cuda" else (MIB // 4, 4 * MIB)
    findings += _network(device, sizes[:1] if quick else sizes, min_bandwidth)
    return dist.from_main(findings)


def _same_software() -> list[Finding]:
    """Every version on every rank against rank 0's."""
    facts = {**versions(), "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "-"}
    everyone = dist.gather_objects((socket.gethostname(), facts))
    (first_host, first), hosts = everyone[0], {host for host, _ in everyone}
    findings = [Finding("group", f"{len(everyone)} ranks on {len(hosts)} hosts: {', '.join(sorted(hosts)[:4])}")]
    for name, value in first.items():
        others = [(rank, host, f[name]) for rank, (host, f) in enumerate(everyone) if f[name] != value]
        problem = ""
        if others:
            rank, host, other = others[0]
            problem = (
                f"{name} is {value} on rank 0 ({first_host}) and {other} on rank {rank} ({host}), and differs on "
                f"{len(others)} of {len(everyone)} ranks: use the same on all"
            )
        findings.append(Finding(f"same {name}", "differs" if others else "yes", problem))
    return findings


def _clocks(rounds: int = 5) -> Finding:
    """Offset of every clock against rank 0's: half the round trip is the uncertainty, the shortest trip counts."""
    best = (float("inf"), 0.0)
    box = torch.zeros(1, dtype=torch.float64)
    for rank in range(1, dist.world_size()):
        for _ in range(rounds):
            if dist.rank() == rank:
                sent = time.time()
                torch_dist.send(box, 0)
                torch_dist.recv(box, 0)
                received = time.time()
                best = min(best, (received - sent, box.item() - (sent + received) / 2))
            elif dist.is_main():
                torch_dist.recv(box, rank)
                box.fill_(time.time())
                torch_dist.send(box, rank)
    offsets = dist.gather_objects((socket.gethostname(), 0.0 if dist.is_main() else -best[1], best[0] / 2))
    worst = max(range(len(offsets)), key=lambda rank: abs(offsets[rank][1]))
    host, offset, uncertain = offsets[worst]
    problem = ""
    if abs(offset) - (uncertain if worst else 0) > _SKEW:
        problem = (
            f"the clock of rank {worst} ({host}) is {offset:+.1f} s off rank 0's, so records and file times mislead: "
            "run a time service such as chrony"
        )
    return Finding("clock offset", f"{1000 * abs(offset):.1f} ms at most", problem, (("s", offset),))


def _shared_storage(place: Path) -> Finding:
    """Rank 0's file is seen by all under the same name with the same bytes, all ranks' files are seen by rank 0, and a
    lock that rank 0 holds keeps the others out."""
    token = dist.from_main(secrets.token_hex(8))
    folder = place / f".doctor-shared-{token}"
    handle = None
    failed = ""
    try:
        if dist.is_main():
            folder.mkdir(parents=True)
            (folder / "aside").write_text(token)
            (folder / "aside").rename(folder / "token")
            handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        failed = f"rank 0 cannot write {place}: {error.strerror}"
    failed = dist.from_main(failed)
    if not failed:
        state = _look(folder, token)
        states = dist.gather_objects((socket.gethostname(), state))
        bad = [(rank, host, state) for rank, (host, state) in enumerate(states) if state]
        if bad:
            rank, host, state = bad[0]
            failed = f"rank {rank} ({host}) {state} in {place}: mount the same storage on every machine"
        if dist.is_main() and not failed:
            unseen = [r for r in range(dist.world_size()) if not _appears(folder / f"rank-{r}")]
            failed = (
                f"rank 0 does not see what rank {unseen[0]} wrote in {place}: mount it for writing" if unseen else ""
            )
        failed = dist.from_main(failed)
    dist.barrier()
    if dist.is_main():
        if handle is not None:
            os.close(handle)
        for path in folder.glob("*"):
            path.unlink()
        if folder.exists():
            folder.rmdir()
    return Finding("shared storage", "no" if failed else f"{place} is one on all ranks", failed)


def _look(folder: Path, token: str) -> str:
    """What is wrong with the shared folder as this rank sees it."""
    if not _appears(folder / "token"):
        return "does not see rank 0's files"
    if (folder / "token").read_text() != token:
        return "reads other bytes than rank 0 wrote"
    try:
        (folder / f"rank-{dist.rank()}").write_text(token)
        if not dist.is_main():
            with (folder / "lock").open("r+b") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return ""
            return "is not kept out by rank 0's lock (mount with flock)"
    except OSError as error:
        return f"cannot write ({error.strerror})"
    return ""


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _SEEN
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _equal_speed(device: torch.device, size: int = 8192) -> Finding:
    """bfloat16 matrix products on every GPU: a slow one (hot, throttled, shared) slows all down."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        torch.mm(a, a)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(10):
        torch.mm(a, a)
    torch.cuda.synchronize(device)
    speed = 10 * 2 * size**3 / (time.perf_counter() - started)
    speeds = [(s, host) for s, host in dist.gather_objects((speed, socket.gethostname()))]
    middle = statistics.median(s for s, _ in speeds)
    slow = [(rank, s, host) for rank, (s, host) in enumerate(speeds) if s < _STRAGGLER * middle]
    problem = ""
    if slow:
        rank, s, host = slow[0]
        problem = (
            f"the GPU of rank {rank} ({host}) does {s / 1e12:.0f} TFLOP/s, the middle one {middle / 1e12:.0f}: look "
            "for throttling or another program on it, or leave it out"
        )
    value = f"{min(s for s, _ in speeds) / 1e12:.0f} to {max(s for s, _ in speeds) / 1e12:.0f} TFLOP/s"
    return Finding("matrix products", value, problem, (("FLOP/s", speed),))


def _network(device: torch.device, sizes: Sequence[int], min_bandwidth: float) -> list[Finding]:
    """Bus bandwidth of all-reduce, 2 (n - 1) / n x bytes / time, and of all-to-all, (n - 1) / n x bytes / time."""
    n = dist.world_size()
    findings = []
    for name, factor in (("all-reduce", 2 * (n - 1) / n), ("all-to-all", (n - 1) / n)):
        for size in sizes:
            elements = size // 4 // n * n
            data = torch.full((elements,), float(dist.rank()), device=device)
            out = torch.empty_like(data)
            seconds = _time(name, data, out, device)
            bandwidth = factor * elements * 4 / seconds
            right = _right(name, data, out)
            problem = ""
            if not right:
                problem = (
                    f"{name} of {_size(size)} gave wrong numbers: a link or a GPU is faulty, leave the machine out"
                )
            elif name == "all-reduce" and size == sizes[-1] and bandwidth < min_bandwidth * 1e9:
                problem = (
                    f"all-reduce of {_size(size)} reaches {bandwidth / 1e9:.2f} GB/s, asked for {min_bandwidth:g}: set "
                    "NCCL_DEBUG=INFO and look which network NCCL chose (NCCL_SOCKET_IFNAME, NCCL_IB_HCA)"
                )
            value = f"{bandwidth / 1e9:.2f} GB/s, {1000 * seconds:.2f} ms"
            findings.append(Finding(f"{name} {_size(size)}", value, problem, (("bytes/s", bandwidth),)))
    return findings


def _time(name: str, data: torch.Tensor, out: torch.Tensor, device: torch.device, repeats: int = 5) -> float:
    """Seconds of one collective: the slowest rank's mean."""

    def once() -> None:
        if name == "all-reduce":
            out.copy_(data)
            torch_dist.all_reduce(out)
        else:
            torch_dist.all_to_all_single(out, data)

    once()
    _synchronize(device)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(repeats):
        once()
    _synchronize(device)
    seconds = torch.tensor([(time.perf_counter() - started) / repeats], dtype=torch.float64, device=device)
    return float(dist.all_reduce_max(seconds).item())


def _right(name: str, data: torch.Tensor, out: torch.Tensor) -> bool:
    n = dist.world_size()
    if name == "all-reduce":
        wrong = (out != n * (n - 1) / 2).any()
    else:
        wrong = (out.view(n, -1) != torch.arange(n, device=out.device, dtype=out.dtype)[:, None]).any()
    return not dist.all_reduce_max(wrong.float()).item()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _size(size: int) -> str:
    return f"{size / MIB:g} MiB"


def worst_of(gathered: Sequence[Sequence[Finding]], hosts: Sequence[str]) -> list[Finding]:
    """One line a check over all ranks: rank 0's, or the first rank's that has a problem."""
    lines: dict[str, Any] = {finding.name: finding for finding in gathered[0]}
    for rank, findings in enumerate(gathered):
        for finding in findings:
            seen = lines.setdefault(finding.name, finding)
            if finding.problem and not seen.problem:
                where = f"rank {rank} ({hosts[rank]}): " if len(gathered) > 1 else ""
                lines[finding.name] = Finding(finding.name, finding.value, where + finding.problem, finding.numbers)
    return list(lines.values())
