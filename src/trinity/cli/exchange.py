"""Verbs that exchange models with other engines: export, import."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trinity.base.errors import UsageError, UserError
from trinity.cli.models import ModelArgument
from trinity.cli.options import ForceOption, JsonOption, check_output, print_json

if TYPE_CHECKING:
    from trinity.export.parity import ParityReport

TYPE_HELP = "fp32, bf16, fp16, fp8-block or compressed-tensors (FP8 in blocks of 128 x 128)."
TextOption = Annotated[
    Path | None, typer.Option("--text", help="Text on which FP8 is compared with bfloat16.", metavar="FILE")
]
OutOption = Annotated[
    Path, typer.Option("--out", help="Directory to write; with --format gguf a file.", metavar="PATH")
]
FormatOption = Annotated[
    str, typer.Option("--format", help="afmoe (a directory), or gguf (a file for llama.cpp; fp32, bf16, fp16).")
]


def export(
    path: ModelArgument,
    out: OutOption,
    form: FormatOption = "afmoe",
    dtype: Annotated[str, typer.Option("--dtype", help=TYPE_HELP)] = "bf16",
    text: TextOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model directory that other engines load.

    Refused when what was written gives other logits than the model. An FP8 export tells its perplexity beside that in
    bfloat16, on --text or on what the model itself says.
    """
    import trinity
    from trinity.export import export_afmoe
    from trinity.export.formats import find_format

    _check_form(form, out)
    if form == "gguf":
        _export_gguf(path, out, dtype, force=force, as_json=as_json)
        return
    check_output(out)
    chosen = find_format(dtype)
    model, tokenizer = trinity.load(path, device="cpu")
    sample = None
    if chosen.scale is not None:
        from trinity.infer.sample import own_text, sample_of_text

        sample = own_text(model, tokenizer) if text is None else sample_of_text(text, tokenizer, model.config)
    report = export_afmoe(
        model, model.config, tokenizer, out, dtype=chosen.name, origin={"from": path.name}, sample=sample, force=force
    )
    _say_exported(out, chosen.name, report, as_json)


def import_model(
    directory: Annotated[
        Path, typer.Argument(help="Public model directory (config.json, safetensors).", metavar="DIR")
    ],
    out: OutOption,
    form: FormatOption = "afmoe",
    dtype: Annotated[str, typer.Option("--dtype", help=TYPE_HELP)] = "bf16",
    text: TextOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take in a public `afmoe` model.

    Reads and checks every tensor (experts fused or apart, FP8 too) and writes a model directory in the chosen format,
    file by file: a model larger than memory is no problem.
    """
    from trinity.export import convert_afmoe
    from trinity.export.formats import find_format
    from trinity.export.reading import read_config
    from trinity.infer.load import find
    from trinity.tokenizer import Tokenizer

    _check_form(form, out)
    if form == "gguf":
        _import_gguf(directory, out, dtype, force=force, as_json=as_json)
        return
    check_output(out)
    chosen = find_format(dtype)
    place = find(directory)
    if place.run is not None:
        raise UserError(f"{directory} is a run without a model directory; use trinity export")
    directory = place.weights
    sample = None
    if chosen.scale is not None and text is not None:
        from trinity.infer.sample import sample_of_text

        sample = sample_of_text(text, Tokenizer.load(directory), read_config(directory))
    report = convert_afmoe(
        directory, out, dtype=chosen.name, origin={"from": directory.name}, sample=sample, force=force
    )
    _say_exported(out, chosen.name, report, as_json)


def _check_form(form: str, out: Path) -> None:
    if form not in ("afmoe", "gguf"):
        raise UsageError(f"--format {form} is not one of afmoe, gguf")
    if form == "afmoe" and out.suffix == ".gguf":
        raise UsageError(f"{out} would be a directory in the afmoe format; for a GGUF file add --format gguf")


def _export_gguf(path: Path, out: Path, dtype: str, *, force: bool, as_json: bool) -> None:
    """By way of a model directory beside it, so that both gates are passed."""
    import trinity
    from trinity.export import export_afmoe
    from trinity.export.gguf import check_file, check_gguf, check_type, export_gguf, import_gguf

    import_gguf()
    check_type(dtype)
    check_output(out.parent)
    check_file(out, force=force)
    model, tokenizer = trinity.load(path, device="cpu")
    check_gguf(model.config)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        between = Path(folder) / out.stem
        export_afmoe(model, model.config, tokenizer, between, dtype=dtype, origin={"from": path.name})
        del model
        report = export_gguf(between, out, dtype=dtype, force=force)
    _say_written(out, dtype, report, as_json)


def _import_gguf(directory: Path, out: Path, dtype: str, *, force: bool, as_json: bool) -> None:
    """Straight from the files: no model is built."""
    from trinity.export.gguf import export_gguf
    from trinity.infer.load import find

    place = find(directory)
    if place.run is not None:
        raise UserError(f"{directory} is a run without a model directory; use trinity export")
    check_output(out.parent)
    _say_written(out, dtype, export_gguf(place.weights, out, dtype=dtype, force=force), as_json)


def _say_written(out: Path, dtype: str, report: "ParityReport", as_json: bool) -> None:
    if as_json:
        import dataclasses

        print_json({"file": str(out), "dtype": dtype, "parity": dataclasses.asdict(report)})
    else:
        print(f"{out}: GGUF, {dtype}, compared with the model")


def _say_exported(out: Path, dtype: str, report: "ParityReport", as_json: bool) -> None:
    if as_json:
        import dataclasses

        print_json({"directory": str(out), "dtype": dtype, "parity": dataclasses.asdict(report)})
    else:
        print(f"{out}: {dtype}, compared with the model")
        if report.quality is not None:
            print(report.quality.line())
