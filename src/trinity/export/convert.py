"""A public model directory -> another one in a chosen format, with never more than one file of it in memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from trinity.base.files import read_json
from trinity.config import ModelConfig
from trinity.export.afmoe import public_config, write_beside, write_card
from trinity.export.balance_state import read_momenta, write_momenta
from trinity.export.files import TensorFiles
from trinity.export.folder import check_replaceable, folder_aside
from trinity.export.formats import FORMATS, Format, find_format
from trinity.export.keys import Piece, pieces
from trinity.export.oracle import oracle_forward
from trinity.export.parity import ParityError, ParityReport, Sample, compare_logits, prompts
from trinity.export.quality import compare_quality
from trinity.export.reading import check_files, read_config, read_piece
from trinity.export.writing import write_weights
from trinity.tokenizer import Tokenizer

SHARD_BYTES = 1_000_000_000
"""Of each written file, and with it of the memory that a conversion takes."""

Progress = Callable[[str], None]


def convert_afmoe(
    source: Path | str,
    out_dir: Path | str,
    *,
    dtype: str = "bfloat16",
    max_shard_bytes: int = SHARD_BYTES,
    origin: Mapping[str, str] | None = None,
    sample: Sample | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ParityReport:
    """Read the public directory `source` (experts fused or apart, one file or many, plain or FP8) and write `out_dir`.

    No model is built: tensors pass one at a time, and a file is written when it is full. Then every tensor is read back
    and compared, and an independent forward pass (`oracle`), which has one tensor in memory, gives the same logits,
    routing and most probable tokens from both directories. Raises UserError for what cannot be read, ParityError when
    both do not agree.
    """
    source, out_dir = Path(source), Path(out_dir)
    say = progress or (lambda _text: None)
    chosen = find_format(dtype)
    config = read_config(source)
    tokenizer = Tokenizer.load(source) if (source / "tokenizer.json").exists() else None
    check_replaceable(out_dir, force=force)
    public = public_config(config, chosen, tokenizer, _coefficient(source))
    with _files(source) as files:
        check_files(files, config)
        with folder_aside(out_dir) as folder:

            def read(piece: Piece) -> torch.Tensor:
                say(piece.public)
                return read_piece(files, piece)

            write_weights(read, config, folder, chosen, max_shard_bytes)
            write_momenta(read_momenta(source, config), config, folder)
            write_beside(folder, public, config, tokenizer)
            say("comparing tensors")
            _compare_tensors(files, folder, config, chosen)
            say("comparing logits")
            report = _compare(source, folder, config, chosen, tokenizer, sample)
            write_card(folder, out_dir.name, config, public, report, tokenizer, origin)
    return report


@contextmanager
def _files(directory: Path) -> Iterator[TensorFiles]:
    with TensorFiles(directory, read_json(directory / "config.json").get("quantization_config")) as files:
        yield files


def _coefficient(source: Path) -> float:
    return float(read_json(source / "config.json").get("load_balance_coeff") or 5e-4)


def _compare_tensors(files: TensorFiles, folder: Path, config: ModelConfig, chosen: Format) -> None:
    with _files(folder) as written:
        for piece in pieces(config):
            expected = chosen.rounded(piece.public, read_piece(files, piece))
            if not torch.equal(read_piece(written, piece).float(), expected):
                raise ParityError(f"{folder}: {piece.public} comes back with other values than in {files.directory}")


def _compare(
    source: Path, folder: Path, config: ModelConfig, chosen: Format, tokenizer: Tokenizer | None, sample: Sample | None
) -> ParityReport:
    rows_BT = prompts(config, tokenizer)
    expected = oracle_forward(source, rows_BT, rounding=chosen.rounded)
    found = oracle_forward(folder, rows_BT, expected.indices_LNk)
    if found.regret_LN.numel() and found.regret_LN.max() > 0:
        raise ParityError(f"{folder}: tokens go to other experts than in {source}")
    name = "independent forward pass"
    error = compare_logits(name, expected.logits_BTV, found.logits_BTV, folder)
    quality = None
    if chosen.scale is not None:
        sample = sample or Sample("the gate's prompts, mostly random tokens", rows_BT)
        before = oracle_forward(source, sample.tokens_BT, rounding=FORMATS["bfloat16"].rounded)
        quality = compare_quality(before.logits_BTV, folder, sample.tokens_BT, sample.what)
    skipped = {"transformers": "a conversion builds no whole model; `trinity export` compares with it"}
    return ParityReport(rows_BT.numel(), {name: error}, skipped, quality)
