"""A training checkpoint -> a public model directory, tensor by tensor: no model is built and nothing is gathered."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from trinity.base.errors import UserError
from trinity.base.files import read_json
from trinity.config import ModelConfig
from trinity.export.afmoe import public_config, write_beside, write_card
from trinity.export.balance_state import momentum_names, write_momenta
from trinity.export.files import TensorFiles
from trinity.export.folder import check_replaceable, folder_aside
from trinity.export.formats import FORMATS, Format, find_format
from trinity.export.keys import Piece, our_shapes, pieces
from trinity.export.oracle import oracle_forward, oracle_pass
from trinity.export.parity import ParityError, ParityReport, compare_logits, prompts
from trinity.export.quality import compare_quality
from trinity.export.reading import read_piece
from trinity.export.writing import Read, write_weights
from trinity.parallel.saved import SavedTensors
from trinity.parallel.slices import Slice
from trinity.tokenizer import Tokenizer

SHARD_BYTES = 1_000_000_000
"""Of each written file, and with it of the memory that an export takes."""


def export_shards(
    saved: SavedTensors,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    out_dir: Path | str,
    *,
    dtype: str = "bfloat16",
    max_shard_bytes: int = SHARD_BYTES,
    origin: Mapping[str, str] | None = None,
    force: bool = False,
) -> ParityReport:
    """Write the weights of a checkpoint, whole or in parts, as `out_dir`, for models that no host can hold.

    Every tensor is read back and compared, and an independent forward pass with one tensor in memory must give finite
    logits, the same from the checkpoint and from what was written. The trained model itself does not run:
    `export_afmoe` compares with it where it fits. Raises UserError when the checkpoint is of another shape than
    `config`, ParityError when the directory is not what the checkpoint is.
    """
    out_dir, chosen = Path(out_dir), find_format(dtype)
    shapes = our_shapes(config)
    for name, shape in shapes.items():
        if name not in saved or saved.shape(name) != shape:
            found = f"has shape {list(saved.shape(name))}" if name in saved else "is missing"
            raise UserError(f"{name} {found} in the checkpoint, but the model's settings say {list(shape)}")
    check_replaceable(out_dir, force=force)

    def read(piece: Piece) -> torch.Tensor:
        shape = shapes[piece.ours]
        if piece.expert is None:
            return saved.read(piece.ours, Slice(shape, (piece.start, *[0] * (len(shape) - 1)), piece.shape))
        part = Slice(shape, (piece.expert, piece.start, 0), (1, *piece.shape))
        return saved.read(piece.ours, part)[0]

    public = public_config(config, chosen, tokenizer)
    with folder_aside(out_dir) as folder:
        write_weights(read, config, folder, chosen, max_shard_bytes)
        write_momenta({name: saved.read(name) for name in momentum_names(config) if name in saved}, config, folder)
        write_beside(folder, public, config, tokenizer)
        with TensorFiles(folder, read_json(folder / "config.json").get("quantization_config")) as written:
            for piece in pieces(config):
                if not torch.equal(read_piece(written, piece).float(), chosen.rounded(piece.public, read(piece))):
                    raise ParityError(f"{folder}: {piece.public} comes back with other values than in the checkpoint")
        report = _compare(_Checkpoint(read, config), public, folder, chosen, config, tokenizer)
        write_card(folder, out_dir.name, config, public, report, tokenizer, origin)
    return report


class _Checkpoint:
    """The checkpoint's tensors by public name, one in memory at a time; `oracle.Tensors`."""

    def __init__(self, read: Read, config: ModelConfig) -> None:
        self._read = read
        self._pieces = {piece.public: piece for piece in pieces(config)}

    @property
    def names(self) -> Container[str]:
        return self._pieces

    def holds(self, name: str) -> bool:
        return name in self._pieces

    def raw(self, name: str) -> torch.Tensor:
        return self._read(self._pieces[name])


def _compare(
    checkpoint: _Checkpoint,
    public: Mapping[str, Any],
    folder: Path,
    chosen: Format,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
) -> ParityReport:
    """Raises ParityError when the checkpoint and the directory do not give the same logits and experts."""
    rows_BT = prompts(config, tokenizer)
    expected = oracle_pass(checkpoint, public, rows_BT, rounding=chosen.rounded)
    if not bool(expected.logits_BTV.isfinite().all()):
        raise ParityError(f"{folder}: the logits are not finite")
    found = oracle_forward(folder, rows_BT, expected.indices_LNk)
    if found.regret_LN.numel() and found.regret_LN.max() > 0:
        raise ParityError(f"{folder}: tokens go to other experts than in the checkpoint")
    name = "independent forward pass"
    error = compare_logits(name, expected.logits_BTV, found.logits_BTV, folder)
    quality = None
    if chosen.scale is not None:
        before = oracle_pass(checkpoint, public, rows_BT, rounding=FORMATS["bfloat16"].rounded)
        quality = compare_quality(before.logits_BTV, folder, rows_BT, "the gate's prompts, mostly random tokens")
    skipped = {"the trained model": "too large to run beside the export"}
    return ParityReport(rows_BT.numel(), {name: error}, skipped, quality)
