"""Tensors of the public layout -> safetensors files of bounded size."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from trinity.base.errors import UserError
from trinity.base.files import write_json
from trinity.config import ModelConfig
from trinity.export.balance_state import is_momentum
from trinity.export.files import INDEX, SINGLE
from trinity.export.formats import Format
from trinity.export.keys import Piece, our_shapes, pieces

Read = Callable[[Piece], torch.Tensor]
"""Gives the value of a public tensor."""


def write_weights(read: Read, config: ModelConfig, directory: Path, chosen: Format, max_shard_bytes: int) -> None:
    """Write every public tensor in the chosen format, one file at a time.

    Above `max_shard_bytes` the tensors are spread over several files with an index; no more than one file is ever in
    memory. Raises UserError when a tensor that is quantised holds NaN or infinity, and when the disk is full.
    """
    shards = _plan(config, chosen, max_shard_bytes)
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for piece in shard:
            tensors |= _stored(read(piece), piece, chosen)
        _save(tensors, directory / name)
        index |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))})


def state_reader(state: Mapping[str, torch.Tensor], config: ModelConfig) -> Read:
    """Reads pieces out of our state dict. Raises UserError where its shapes are not those of `config`."""
    _check(state, config)
    return lambda piece: piece.of(state[piece.ours].detach())


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Raises UserError when the file cannot be written, such as on a full disk."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while serializing: ")
        raise UserError(f"{path.name} could not be written beside its place: {reason}; nothing was replaced") from error


def _stored(value: torch.Tensor, piece: Piece, chosen: Format) -> dict[str, torch.Tensor]:
    # A copy in every case: safetensors refuses tensors that share memory, as views of one fused matrix do.
    value = value.to(device="cpu", copy=True)
    if chosen.quantizes(piece.public) and not value.isfinite().all():
        raise UserError(f"{piece.public} holds NaN or infinity and cannot be quantised; the model is broken")
    return {name: tensor.contiguous() for name, tensor in chosen.stored(piece.public, value).items()}


def _plan(config: ModelConfig, chosen: Format, max_shard_bytes: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces(config):
        num_bytes = chosen.num_bytes(piece.public, piece.shape)
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += num_bytes
    return shards


def _check(state: Mapping[str, torch.Tensor], config: ModelConfig) -> None:
    shapes = our_shapes(config)
    for name, shape in shapes.items():
        if name not in state:
            raise UserError(f"the model has no {name} (shape {shape}); its settings and weights do not belong together")
        if tuple(state[name].shape) != shape:
            raise UserError(f"{name} has shape {tuple(state[name].shape)}, but the model's settings say {shape}")
    extra = sorted(name for name in state if name not in shapes and not is_momentum(name))
    if extra:
        raise UserError(f"the model has {extra[0]}, for which the afmoe format has no place")
