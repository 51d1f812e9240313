"""Our state dict -> safetensors in the public layout, in files of bounded size."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from trinity.base.errors import UserError
from trinity.base.files import write_json
from trinity.config import ModelConfig
from trinity.export.balance_state import is_momentum
from trinity.export.files import INDEX, SINGLE
from trinity.export.keys import Piece, is_bias, our_shapes, pieces


def write_weights(
    state: Mapping[str, torch.Tensor], config: ModelConfig, directory: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Write every public tensor in `dtype` (expert biases float32), one file at a time.

    Above `max_shard_bytes` the tensors are spread over several files with an index. Raises UserError naming the tensor
    and the shapes when the state does not have the shapes of `config`.
    """
    _check(state, config)
    shards = _plan(config, dtype, max_shard_bytes)
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {piece.public: _value(state, piece, dtype) for piece in shard}
        _save(tensors, directory / name)
        index |= dict.fromkeys(tensors, name)
        total += sum(_num_bytes(piece, dtype) for piece in shard)
    if len(shards) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))})


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Raises UserError when the file cannot be written, such as on a full disk."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while serializing: ")
        raise UserError(f"{path.name} could not be written beside its place: {reason}; nothing was replaced") from error


def _value(state: Mapping[str, torch.Tensor], piece: Piece, dtype: torch.dtype) -> torch.Tensor:
    kind = torch.float32 if is_bias(piece.public) else dtype
    # A copy in every case: safetensors refuses tensors that share memory, as views of one fused matrix do.
    return piece.of(state[piece.ours].detach()).to(device="cpu", dtype=kind, copy=True).contiguous()


def _num_bytes(piece: Piece, dtype: torch.dtype) -> int:
    kind = torch.float32 if is_bias(piece.public) else dtype
    return torch.Size(piece.shape).numel() * kind.itemsize


def _plan(config: ModelConfig, dtype: torch.dtype, max_shard_bytes: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces(config):
        num_bytes = _num_bytes(piece, dtype)
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
