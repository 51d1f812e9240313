"""Export a model to a public `afmoe` directory, whole and proven, or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trinity.base.errors import UserError
from trinity.base.files import write_json
from trinity.config import ModelConfig
from trinity.export.balance_state import write_momenta
from trinity.export.card import model_card
from trinity.export.config import config_to_public
from trinity.export.folder import check_replaceable, folder_aside, weights_fingerprint
from trinity.export.formats import Format, find_format, format_of, quantization_config
from trinity.export.parity import ParityReport, Sample, check_parity
from trinity.export.writing import state_reader, write_weights
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5_000_000_000


def export_afmoe(
    model: Transformer,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    out_dir: Path | str,
    *,
    dtype: torch.dtype | str = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    load_balance_coeff: float = 5e-4,
    origin: Mapping[str, str] | None = None,
    sample: Sample | None = None,
    force: bool = False,
) -> ParityReport:
    """Write `model` and `tokenizer` as a model directory that other engines load without custom code.

    `dtype` is a floating type or the name of a format (`formats.FORMATS`), such as "fp8-block". Everything is written
    into a folder beside `out_dir`, read back and compared with `model` (`check_parity`), and only then renamed.
    `origin` (such as run, step and data fingerprint) goes into the model card; `sample` is the text on which a
    quantised model is compared with the one in bfloat16. Raises UserError when `out_dir` exists and `force` is off,
    when the model is an ablation that the format cannot hold, when the tokenizer has more entries than the model, and
    ParityError when what was written does not compute what `model` computes.
    """
    out_dir = Path(out_dir)
    chosen = find_format(dtype) if isinstance(dtype, str) else format_of(dtype)
    if chosen is None:
        raise UserError(f"cannot store weights as {dtype}; use float32, bfloat16 or float16")
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} entries, but the model only {config.vocab_size}; "
            "they do not belong together"
        )
    check_replaceable(out_dir, force=force)
    public = public_config(config, chosen, tokenizer, load_balance_coeff)
    read = state_reader(model.state_dict(), config)
    with folder_aside(out_dir) as folder:
        write_weights(read, config, folder, chosen, max_shard_bytes)
        write_momenta(model.state_dict(), config, folder)
        write_beside(folder, public, config, tokenizer)
        report = check_parity(model, folder, stored_as=chosen, tokenizer=tokenizer, sample=sample)
        write_card(folder, out_dir.name, config, public, report, tokenizer, origin)
    return report


def write_model(
    model: Transformer, config: ModelConfig, tokenizer: Tokenizer | None, out_dir: Path, *, dtype: torch.dtype
) -> None:
    """`export_afmoe` without the comparison and the card, for a reader that is told of the weights by the writer.

    Raises UserError when the disk is full.
    """
    chosen = format_of(dtype)
    assert chosen is not None, f"{dtype} is no type of weights"
    with folder_aside(out_dir) as folder:
        write_weights(state_reader(model.state_dict(), config), config, folder, chosen, MAX_SHARD_BYTES)
        write_beside(folder, public_config(config, chosen, tokenizer), config, tokenizer)


def public_config(
    config: ModelConfig, chosen: Format, tokenizer: Tokenizer | None, load_balance_coeff: float = 5e-4
) -> dict[str, Any]:
    """The content of config.json."""
    return config_to_public(
        config,
        dtype=str(chosen.dtype).removeprefix("torch."),
        eos_token_id=tokenizer.eos_id if tokenizer else None,
        pad_token_id=tokenizer.pad_id if tokenizer else None,
        load_balance_coeff=load_balance_coeff,
        quantization=quantization_config(chosen, config),
    )


def write_beside(folder: Path, public: Mapping[str, Any], config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Everything of a model directory but weights and model card."""
    write_json(folder / "config.json", public)
    if tokenizer is not None:
        tokenizer.save(folder, model_max_length=config.max_positions)
    write_json(folder / "generation_config.json", _generation_config(tokenizer))


def write_card(
    folder: Path,
    name: str,
    config: ModelConfig,
    public: Mapping[str, Any],
    report: ParityReport,
    tokenizer: Tokenizer | None,
    origin: Mapping[str, str] | None,
) -> None:
    """README.md, with the fingerprints of what was written."""
    facts = {"weights": weights_fingerprint(folder)}
    if tokenizer is not None:
        facts["tokenizer"] = tokenizer.fingerprint
    card = model_card(name, config, public, report, {**facts, **(origin or {})})
    (folder / "README.md").write_text(card, encoding="utf-8")


def _generation_config(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Greedy by default; the stop tokens are the ends of a document and of a chat turn."""
    if tokenizer is None:
        return {"do_sample": False}
    return {"eos_token_id": tokenizer.stop_ids, "pad_token_id": tokenizer.pad_id, "do_sample": False}
