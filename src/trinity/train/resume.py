"""What makes a resumed run the same run: its settings, and everything that a step depends on."""

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trinity.base import dist
from trinity.base.errors import UserError
from trinity.base.files import atomic_write
from trinity.base.rundir import RunDir
from trinity.config import RunConfig, resolve, to_toml
from trinity.parallel.shard import Sharding
from trinity.parallel.slices import Slice
from trinity.train.checkpoint import Part

STAGES = ("pretrain", "extend", "sft", "rl")
CHANGEABLE = (
    "name",
    "checkpoint.",
    "guard.",
    "eval.",
    "parallel.",
    "runtime.device",
    "runtime.threads",
    "runtime.timeout",
    "runtime.compile",
    "runtime.cuda_graphs",
    "runtime.recompute",
    "runtime.kernels",
    "data.prefetch",
    "data.shards",
    "data.tokenizer",
)
"""Settings that a resumed run may change: none decides what is learned. Paths may move: fingerprints are compared."""
CHANGEABLE_OF_STAGE = ("eval_every", "eval_rows", "niah_every", "stop_at", "micro_rows")


def changed_settings(old: RunConfig, new: RunConfig, stage: str) -> tuple[list[str], list[str]]:
    """Dotted keys that differ and matter to `stage`: (those that must not change, those that may)."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    differing = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    others = tuple(f"{name}." for name in STAGES if name != stage)
    relevant = [key for key in differing if not key.startswith(others)]
    allowed = {key for key in relevant if key.startswith(CHANGEABLE)}
    allowed |= {key for key in relevant if key in {f"{stage}.{name}" for name in CHANGEABLE_OF_STAGE}}
    return [key for key in relevant if key not in allowed], sorted(allowed)


def open_settings(run: RunDir, config: RunConfig, stage: str) -> list[str]:
    """Write `run.toml`, or compare it with `config`; returns the keys that changed and may.

    Raises UserError when the directory is of another stage or was made with other settings, naming the keys.
    """
    text = to_toml(config)
    if not run.settings.exists():
        _write(run, text)
        return []
    owner = run.stage()
    if owner not in (None, stage):
        raise UserError(f"{run.path} is a run of stage {owner!r}, not {stage!r}: choose another --run-dir")
    old, _ = resolve(str(run.settings))
    refused, allowed = changed_settings(old, config, stage)
    if refused:
        before, after = _flat(old.model_dump(mode="json")), _flat(config.model_dump(mode="json"))
        listed = "; ".join(f"{key} was {before.get(key)!r}, now {after.get(key)!r}" for key in refused[:5])
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise UserError(
            f"{run.path} was made with other settings: {listed}{more}; use the old values or choose another --run-dir"
        )
    if allowed:
        _write(run, text)
    return allowed


def _write(run: RunDir, text: str) -> None:
    with atomic_write(run.settings, "w") as file:
        file.write(text)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def state_slices(sharding: Sharding, optimizer: Mapping[str, Tensor]) -> dict[str, Slice]:
    """What each sharded tensor of the model and of the optimizer's state is a part of."""
    slices = {name: part for name, part in sharding.slices.items() if part.size != part.shape}
    for key in optimizer:
        kind = next((kind for kind in _KINDS if key.startswith(kind)), None)
        name = key.removeprefix(kind or "")
        if kind is not None and name in slices:
            slices[key] = slices[name]
    return slices


_KINDS = ("muon.momentum.", "adamw.exp_avg.", "adamw.exp_avg_sq.")


def own_part(
    sharding: Sharding, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Part]:
    """What this rank saves of model and optimizer: its part of sharded tensors, and on the main rank the others.

    Ranks of other replicas hold the same as those of the first and save nothing.
    """
    slices = state_slices(sharding, optimizer)
    meshes = sharding.meshes
    part = Part(meshes.shard_rank, meshes.sizes.fsdp, slices, writes=meshes.replica == 0)

    def own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not part.writes:
            return {}
        return {k: t for k, t in tensors.items() if (t.numel() if k in slices else part.number == 0)}

    return own(model), own(optimizer), part


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, themselves where they are there already."""
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def check_state(target: Mapping[str, Tensor], saved: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError for a saved tensor that is missing, unknown, mis-shaped or mis-typed."""
    missing, unknown = sorted(target.keys() - saved.keys()), sorted(saved.keys() - target.keys())
    if missing or unknown:
        raise UserError(f"{where} does not fit this run: missing {missing[:3]}, unknown {unknown[:3]}")
    for name, tensor in target.items():
        have = saved[name]
        if have.shape != tensor.shape or have.dtype != tensor.dtype:
            raise UserError(
                f"{where}: {name} is {have.dtype} {list(have.shape)}, but this run has "
                f"{tensor.dtype} {list(tensor.shape)}"
            )


@torch.no_grad()
def copy_state(target: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved tensors, which `check_state` has passed, into the present ones by name."""
    for name, tensor in target.items():
        tensor.copy_(saved[name])


@contextmanager
def refuse_malformed(where: Path) -> Iterator[None]:
    """Turns the errors of taking over a state that has not the fields and types it should into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{where} is not the state of such a run: {type(error).__name__}: {error}; take an earlier checkpoint"
        ) from error


def random_state(device: torch.device) -> list[dict[str, str]]:
    """State of torch's generators on every rank (a collective)."""
    state = {"cpu": _encode(torch.get_rng_state())}
    if device.type == "cuda":
        state["cuda"] = _encode(torch.cuda.get_rng_state(device))
    return dist.gather_objects(state)


def restore_random(states: list[dict[str, str]], device: torch.device) -> None:
    """Take back this rank's state; saved by another number of ranks or on another device it is left out."""
    if len(states) != dist.world_size():
        return
    state = states[dist.rank()]
    torch.set_rng_state(_decode(state["cpu"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_decode(state["cuda"]), device)


def _encode(tensor: Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def frozen_json(value: Any) -> Any:
    """A copy of JSON-able `value` that shares nothing with it."""
    return json.loads(json.dumps(value, allow_nan=False))
