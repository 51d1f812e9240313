"""A public model directory -> ModelConfig and our state dict."""

from collections.abc import Iterator
from pathlib import Path

import torch

from trinity.base.errors import UserError
from trinity.base.files import read_json
from trinity.config import ModelConfig
from trinity.export.balance_state import read_momenta
from trinity.export.config import config_from_public
from trinity.export.files import TensorFiles
from trinity.export.keys import Piece, is_bias, our_shapes, pieces

IGNORED = ("rotary_emb.inv_freq",)
"""Endings of tensors that old writers add and that carry nothing."""


def read_config(directory: Path) -> ModelConfig:
    """The ModelConfig of `directory/config.json`."""
    path = directory / "config.json"
    public = read_json(path)
    if not isinstance(public, dict):
        raise UserError(f"{path} is not a JSON object")
    return config_from_public(public, path)


def import_afmoe(
    directory: Path | str, dtype: torch.dtype | None = None
) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """The settings and the whole state dict of a public model directory, on the CPU.

    `dtype` None keeps each tensor's stored type (a quantised model becomes float32). Expert biases are float32 always,
    and so are the momenta of the balancing, zero where the directory has none. Raises UserError naming the tensor and
    the shapes when one is missing, unexpected or of another shape.
    """
    directory = Path(directory)
    config = read_config(directory)
    return config, dict(iterate_state(directory, config, dtype))


def iterate_state(
    directory: Path, config: ModelConfig, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Our tensors one at a time, so that the memory needed beside the model is that of one fused tensor."""
    quantization = read_json(directory / "config.json").get("quantization_config")
    with TensorFiles(directory, quantization) as files:
        check_files(files, config)
        if quantization and dtype is None:
            dtype = torch.float32
        shapes = our_shapes(config)
        grouped: dict[str, list[Piece]] = {}
        for piece in pieces(config):
            grouped.setdefault(piece.ours, []).append(piece)
        for name, parts in grouped.items():
            yield name, _assemble(files, name, parts, shapes[name], dtype)
        yield from read_momenta(directory, config).items()


def _assemble(
    files: TensorFiles, name: str, parts: list[Piece], shape: tuple[int, ...], dtype: torch.dtype | None
) -> torch.Tensor:
    whole: torch.Tensor | None = None
    for piece in parts:
        value = read_piece(files, piece)
        if whole is None:
            kind = torch.float32 if is_bias(name) else dtype or value.dtype
            whole = torch.empty(shape, dtype=kind)
        piece.of(whole).copy_(value)
    assert whole is not None
    return whole


def read_piece(files: TensorFiles, piece: Piece) -> torch.Tensor:
    """One public tensor, also out of a tensor that holds all experts of a layer; FP8 becomes float32."""
    if piece.public in files.names:
        return files.read(piece.public)
    assert piece.fused is not None
    return files.read(piece.fused, piece.expert, slice(piece.start, piece.start + piece.shape[0]))


def check_files(files: TensorFiles, config: ModelConfig) -> None:
    """Names and shapes of everything, before anything is read. Raises UserError that names the tensor."""
    held = files.names
    shapes = our_shapes(config)
    expected: set[str] = set()
    for piece in pieces(config):
        shape, name = piece.shape, piece.public
        if name not in held and piece.fused in held:
            shape, name = shapes[piece.ours], piece.fused
        if name not in held:
            raise UserError(f"{files.directory}: {name} of shape {shape} is missing")
        if name not in expected and files.shape(name) != shape:
            raise UserError(f"{files.directory}: {name} has shape {files.shape(name)}, but config.json says {shape}")
        expected.add(name)
    unexpected = sorted(name for name in held - expected if not name.endswith(IGNORED))
    if unexpected:
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise UserError(
            f"{files.directory}: {unexpected[0]}{more} (shape {files.shape(unexpected[0])}) has no place in a model of "
            "this config.json"
        )
