"""Checkpoints: folders that are either whole or absent, whatever moment the process dies at.

    RUN/checkpoints/step-00000100/  model.safetensors  optimizer.safetensors  state.json  manifest.json

A checkpoint is written into a hidden folder beside its place, every file is flushed to the disk, the manifest with
sizes and checksums comes last, and one rename makes it visible. Reading checks the manifest first. Nothing is ever
unpickled, and only the three names above are ever opened.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trinity.base.errors import UserError
from trinity.base.files import sync_folder
from trinity.train.manifest import FORMAT, MANIFEST, MODEL, OPTIMIZER, STATE, read_json, read_manifest, size
from trinity.train.tensorfile import Digest, digest, read_tensors, write_bytes, write_tensors

NAME = re.compile(r"step-(\d{8,})")
ASIDE = re.compile(r"\.step-\d{8,}\.(partial|removed)")


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, on the CPU."""

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    """JSON: step, tokens, source, random state, guard, fingerprints, settings."""


@dataclass(frozen=True)
class CheckpointInfo:
    path: Path
    step: int
    bytes: int
    """By the manifest; 0 where that is missing or unreadable."""
    complete: bool
    """Every file of the manifest is there with its size; `verify_checkpoint` also reads them."""


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[CheckpointInfo]:
    """Checkpoints in a run's `checkpoints/`, oldest first; links are not followed."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = NAME.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            try:
                files = read_manifest(path)
                complete = all(size(path / name) == entry.bytes for name, entry in files.items())
                total = sum(entry.bytes for entry in files.values())
            except UserError:
                complete, total = False, 0
            found.append(CheckpointInfo(path, int(match[1]), total, complete))
    return sorted(found, key=lambda info: info.step)


def verify_checkpoint(path: Path) -> dict[str, Digest]:
    """Read every file of a checkpoint against its manifest. Raises UserError that names the file and what differs."""
    files = read_manifest(path)
    for name, expected in files.items():
        found = digest(path / name)
        if found.bytes != expected.bytes:
            raise UserError(f"{path / name} has {found.bytes} bytes, its manifest says {expected.bytes}: it is damaged")
        if found.sha256 != expected.sha256:
            raise UserError(
                f"{path / name} has checksum {found.sha256[:16]}..., the manifest {expected.sha256[:16]}...: damaged"
            )
    return files


def load_checkpoint(path: Path) -> Snapshot:
    """A verified checkpoint, its tensors on the CPU.

    Raises UserError when it is damaged or not one, is of another step than its folder's name says, or holds numbers
    that are not finite: no run could go on from them.
    """
    verify_checkpoint(path)
    state = read_json(path / STATE)
    if not isinstance(state, dict) or type(state.get("step")) is not int:
        raise UserError(f"{path / STATE} is not the state of a checkpoint: it has no step")
    named = NAME.fullmatch(path.name)
    if named and int(named[1]) != state["step"]:
        raise UserError(f"{path / STATE} is of step {state['step']}, not of the step in its folder's name")
    return Snapshot(state["step"], _read_finite(path / MODEL), _read_finite(path / OPTIMIZER), state)


def _read_finite(path: Path) -> dict[str, Tensor]:
    tensors = read_tensors(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"{path}: {name} holds numbers that are not finite; take an earlier checkpoint")
    return tensors


def latest_good(folder: Path, on_damage: Callable[[CheckpointInfo, str], None]) -> Path | None:
    """The newest checkpoint that verifies; None when there is none.

    `on_damage` is told of every newer one that is passed over, and why: going back is never silent.
    """
    for info in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(info.path)
        except UserError as error:
            on_damage(info, str(error))
        else:
            return info.path
    return None


def save_checkpoint(folder: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint and commit it by one rename; returns its folder.

    A whole checkpoint of the same step is left as it is; a damaged one is replaced. Raises UserError when the disk is
    full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / checkpoint_name(snapshot.step)
    partial = folder / f".{final.name}.partial"
    if os.path.lexists(final):
        try:
            verify_checkpoint(final)
        except UserError:
            _remove(final)
        else:
            return final
    try:
        if os.path.lexists(partial):
            shutil.rmtree(partial)
        os.mkdir(partial)  # noqa: PTH102  (all writing goes through `os`, where the tests inject faults)
        state = json.dumps(snapshot.state, indent=1, ensure_ascii=False, allow_nan=False).encode()
        files = {
            MODEL: write_tensors(partial / MODEL, snapshot.model),
            OPTIMIZER: write_tensors(partial / OPTIMIZER, snapshot.optimizer),
            STATE: write_bytes(partial / STATE, state),
        }
        manifest = {"format": FORMAT, "files": {name: entry._asdict() for name, entry in files.items()}}
        write_bytes(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
        sync_folder(partial)
        os.rename(partial, final)  # noqa: PTH104
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"the checkpoint of step {snapshot.step} could not be written to {folder}: {error.strerror or error}; "
            "earlier checkpoints are unchanged"
        ) from error
    return final


def prune(folder: Path, keep_last: int, keep_every: int) -> list[int]:
    """Remove whole checkpoints beyond the newest `keep_last`, but for multiples of `keep_every`; returns their steps.

    Damaged ones are neither counted nor removed, so at least one whole checkpoint always stays.
    """
    whole = [info for info in list_checkpoints(folder) if info.complete]
    gone = [info for info in whole[:-keep_last] if not (keep_every and info.step % keep_every == 0)]
    for info in gone:
        _remove(info.path)
    return [info.step for info in gone]


def clean_partials(folder: Path) -> list[str]:
    """Remove what a killed run left half-written or half-removed; returns the names."""
    names = [path.name for path in folder.iterdir() if ASIDE.fullmatch(path.name)] if folder.is_dir() else []
    for name in names:
        path = folder / name
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
    return names


def _remove(path: Path) -> None:
    """Take a checkpoint out of sight by one rename, then delete it; a link is removed, never followed."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    aside = path.parent / f".{path.name}.removed"
    if aside.exists():
        shutil.rmtree(aside)
    os.rename(path, aside)  # noqa: PTH104
    shutil.rmtree(aside)
