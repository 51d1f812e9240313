"""Export a model to a public `afmoe` directory, whole and proven, or not at all."""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trinity.base.errors import UserError
from trinity.base.files import FULL, sync_folder, write_json
from trinity.config import ModelConfig
from trinity.export.balance_state import write_momenta
from trinity.export.card import model_card
from trinity.export.config import config_to_public
from trinity.export.parity import ParityReport, check_parity
from trinity.export.writing import write_weights
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5_000_000_000
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def export_afmoe(
    model: Transformer,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    out_dir: Path | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    load_balance_coeff: float = 5e-4,
    origin: Mapping[str, str] | None = None,
    force: bool = False,
) -> ParityReport:
    """Write `model` and `tokenizer` as a model directory that other engines load without custom code.

    Everything is written into a folder beside `out_dir`, read back and compared with `model` (`check_parity`), and only
    then renamed. `origin` (such as run, step and data fingerprint) goes into the model card. Raises UserError when
    `out_dir` exists and `force` is off, when the model is an ablation that the format cannot hold, when the tokenizer
    has more entries than the model, and ParityError when what was written does not compute what `model` computes.
    """
    out_dir = Path(out_dir)
    if dtype not in DTYPES:
        raise UserError(f"cannot store weights as {dtype}; use float32, bfloat16 or float16")
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} entries, but the model only {config.vocab_size}; "
            "they do not belong together"
        )
    if out_dir.exists() and not force:
        raise UserError(f"{out_dir} exists already; choose another directory or pass --force to replace it")
    _check_replaceable(out_dir)
    public = config_to_public(
        config,
        dtype=DTYPES[dtype],
        eos_token_id=tokenizer.eos_id if tokenizer else None,
        pad_token_id=tokenizer.pad_id if tokenizer else None,
        load_balance_coeff=load_balance_coeff,
    )
    state = model.state_dict()
    with _folder_aside(out_dir) as folder:
        write_weights(state, config, folder, dtype, max_shard_bytes)
        write_momenta(state, config, folder)
        write_json(folder / "config.json", public)
        if tokenizer is not None:
            tokenizer.save(folder, model_max_length=config.max_positions)
        write_json(folder / "generation_config.json", _generation_config(tokenizer))
        report = check_parity(model, folder, dtype=dtype, tokenizer=tokenizer)
        facts = {"weights": weights_fingerprint(folder)}
        if tokenizer is not None:
            facts["tokenizer"] = tokenizer.fingerprint
        card = model_card(out_dir.name, config, public, report, {**facts, **(origin or {})})
        (folder / "README.md").write_text(card, encoding="utf-8")
    return report


def weights_fingerprint(directory: Path) -> str:
    """sha256 over the names and bytes of the safetensors files, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _generation_config(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Greedy by default; the stop tokens are the ends of a document and of a chat turn."""
    if tokenizer is None:
        return {"do_sample": False}
    return {"eos_token_id": tokenizer.stop_ids, "pad_token_id": tokenizer.pad_id, "do_sample": False}


def _check_replaceable(out_dir: Path) -> None:
    """Only a model directory, or an empty one, may give way to another: raises UserError for everything else."""
    if not out_dir.exists():
        return
    if not out_dir.is_dir():
        raise UserError(f"{out_dir} is a file; name a directory")
    inside = list(out_dir.iterdir())
    folders = [path for path in inside if path.is_dir()]
    if inside and (folders or not (out_dir / "config.json").exists()):
        raise UserError(
            f"{out_dir} holds {(folders or inside)[0].name}, which is no part of a model; it is not replaced"
        )


@contextmanager
def _folder_aside(out_dir: Path) -> Iterator[Path]:
    """A new folder beside `out_dir` that takes its place when the block succeeds and is removed when it does not."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = out_dir.with_name(f".{out_dir.name}.partial")
    old = out_dir.with_name(f".{out_dir.name}.old")
    if old.exists() and not out_dir.exists():  # killed between the two renames below
        old.rename(out_dir)
    for leftover in (folder, old):  # of an export that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        sync_folder(folder)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise UserError(f"the disk is full: {out_dir} was not written") from error
        raise
    if out_dir.exists():
        out_dir.rename(old)
    folder.rename(out_dir)
    sync_folder(out_dir.parent)
    shutil.rmtree(old, ignore_errors=True)
