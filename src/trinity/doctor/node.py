"""Checks of the machine that this process runs on: versions, GPUs, memory, limits."""

import importlib.metadata
import os
import platform
import resource
import shutil
from pathlib import Path

import torch
import torch.cuda.nccl

from trinity.base.package import package_fingerprint
from trinity.doctor.finding import Finding
from trinity.rl.sandbox.pool import examine as sandbox_layers

GIB = 1 << 30
_MIN_TORCH = (2, 11)
_MIN_CAPABILITY = (8, 0)
_FILES = 4096
_SHARED_MEMORY = 1 * GIB


def versions() -> dict[str, str]:
    """What must be equal on all machines of a run, by name; "-" for what is not there."""
    found = {
        "python": platform.python_version(),
        "trinity": f"{_version('trinity-moe')}, code {package_fingerprint()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "CUDA": torch.version.cuda or "-",
        "NCCL": "-",
        "GPU driver": _driver(),
    }
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        version = torch.cuda.nccl.version()
        found["NCCL"] = ".".join(map(str, version)) if isinstance(version, tuple) else str(version)
    return found


def examine_node() -> list[Finding]:
    """All checks that need no storage and no other process."""
    return [
        *_versions(),
        *_gpus(),
        _memory(),
        _processors(),
        _open_files(),
        _locked_memory(),
        _shared_memory(),
        _sandbox(),
    ]


def _sandbox() -> Finding:
    """Only code benchmarks and rewards by unit tests need one: a machine without it is fit for all other runs."""
    missing = [layer for layer in sandbox_layers() if layer.problem]
    needed = next((f"no: {layer.name} ({layer.problem})" for layer in missing if layer.needed), "")
    return Finding("sandbox for code", needed or ", ".join(["yes", *(f"without {layer.name}" for layer in missing)]))


def _versions() -> list[Finding]:
    findings = []
    for name, value in versions().items():
        problem = ""
        if name == "torch" and tuple(int(part) for part in value.split("+")[0].split(".")[:2]) < _MIN_TORCH:
            problem = f"torch {value} is older than {_MIN_TORCH[0]}.{_MIN_TORCH[1]}: pip install -U torch"
        if name == "triton" and value == "-" and torch.cuda.is_available():
            problem = "triton is not installed, which compiled kernels on a GPU need: pip install triton"
        if name == "CUDA" and value == "-" and _driver() != "-":
            problem = (
                "the machine has a GPU driver, but this torch is built without CUDA: install a CUDA build of torch"
            )
        findings.append(Finding(name, value, problem))
    return findings


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding("GPUs", "none: the CPU works")]
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        free, total = torch.cuda.mem_get_info(index)
        problem = ""
        if capability < _MIN_CAPABILITY:
            problem = (
                f"GPU {index} ({properties.name}) has compute capability {capability[0]}.{capability[1]}, without "
                "bfloat16: use runtime.device=cpu or a GPU of capability 8.0 or newer"
            )
        elif free < 0.9 * total:
            problem = (
                f"GPU {index} has {(total - free) / GIB:.1f} of {total / GIB:.0f} GiB in use by another program: "
                "end it, or leave this GPU out with CUDA_VISIBLE_DEVICES"
            )
        value = (
            f"{properties.name}, {total / GIB:.0f} GiB, {free / GIB:.0f} GiB free, "
            f"capability {capability[0]}.{capability[1]}"
        )
        findings.append(Finding(f"GPU {index}", value, problem, (("bytes free", free), ("bytes", total))))
    return findings


def _memory() -> Finding:
    fields = {}
    for line in _lines("/proc/meminfo"):
        key, _, rest = line.partition(":")
        fields[key] = int(rest.split()[0]) * 1024
    total, free = fields.get("MemTotal", 0), fields.get("MemAvailable", 0)
    if not total:  # not Linux
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = total
    limit = _number("/sys/fs/cgroup/memory.max")
    if limit and limit < total:  # a container's
        used = _number("/sys/fs/cgroup/memory.current") or 0
        total, free = limit, min(free, max(0, limit - used))
    problem = ""
    if free < 2 * GIB:
        problem = f"only {free / GIB:.1f} GiB of memory are free: end other programs or raise the container's limit"
    return Finding("memory", f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB free", problem, (("bytes free", free),))


def _processors() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = torch.cuda.device_count()
    problem = ""
    if gpus > count:
        problem = f"{gpus} GPUs share {count} processors, which cannot feed them: ask for more processors per GPU"
    return Finding("processors", f"{count}, {torch.get_num_threads()} threads", problem)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    problem = ""
    if soft != resource.RLIM_INFINITY and soft < min(_FILES, 1024):
        problem = f"at most {soft} files may be open: ulimit -n {_FILES}"
    return Finding("open files", f"{_limit(soft)} (at most {_limit(hard)})", problem)


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    problem = ""
    if Path("/dev/infiniband").exists() and soft != resource.RLIM_INFINITY:
        problem = (
            f"only {soft // 1024} KiB of memory may be locked, and InfiniBand needs no limit: ulimit -l unlimited "
            "(in a container, the IPC_LOCK capability)"
        )
    return Finding("locked memory", _limit(soft, 1024, " KiB"), problem)


def _shared_memory() -> Finding:
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding("shared memory", "no /dev/shm")
    usage = shutil.disk_usage(place)
    problem = ""
    if torch.cuda.device_count() > 1 and usage.total < _SHARED_MEMORY:
        problem = (
            f"/dev/shm has {usage.total / GIB:.2f} GiB, too little for NCCL between GPUs of one machine: mount at "
            "least 1 GiB (docker --shm-size=8g, or a memory volume at /dev/shm)"
        )
    return Finding("shared memory", f"{usage.total / GIB:.1f} GiB", problem)


def _driver() -> str:
    for line in _lines("/proc/driver/nvidia/version"):
        for word in line.split():
            if word.count(".") >= 1 and word.replace(".", "").isdigit():
                return word
    return "-"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _number(path: str) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _limit(value: int, unit: int = 1, suffix: str = "") -> str:
    return "no limit" if value == resource.RLIM_INFINITY else f"{value // unit}{suffix}"
