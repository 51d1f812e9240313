"""A path -> (model, tokenizer): a public model directory, a run directory, one checkpoint or a pipeline directory."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from trinity.base.errors import UsageError, UserError
from trinity.base.files import read_json
from trinity.base.rundir import STAGES
from trinity.config import LoRAConfig, ModelConfig, resolve
from trinity.export.reading import iterate_state, read_config
from trinity.model.lora import Adapters, is_factor
from trinity.model.transformer import Transformer
from trinity.parallel.saved import SavedTensors
from trinity.tokenizer import Tokenizer

CHECKPOINT = re.compile(r"step-\d{8,}")
MODEL_PART = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Place(NamedTuple):
    """Where the weights, the settings and the tokenizer of a path lie."""

    weights: Path
    """A public model directory, or the folder of a training checkpoint."""
    run: Path | None
    """The run directory of a training checkpoint; None for a public model directory."""
    tokenizers: tuple[Path, ...]
    """Where a tokenizer may be, in order."""


def load(
    path: Path | str, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> tuple[Transformer, Tokenizer]:
    """The model in evaluation mode, and its tokenizer.

    `path` is a model directory (config.json and safetensors), a run directory (its `model/`, else its newest whole
    checkpoint), one checkpoint of a run, or a pipeline directory (its last stage that has a model). `device` None is
    CUDA where there is one; `dtype` None keeps the stored type. Raises UserError that names what is missing or wrong.
    """
    place = find(Path(path))
    target = find_device(device)
    tokenizer = find_tokenizer(place)
    model = _load_weights(place, target, dtype)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer of {path} has {tokenizer.vocab_size} entries, but its model only "
            f"{model.config.vocab_size}; they do not belong together"
        )
    return model, tokenizer


def load_model(
    path: Path | str, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> Transformer:
    """As `load`, for a path that need not have a tokenizer."""
    return _load_weights(find(Path(path)), find_device(device), dtype)


def find_device(device: str | torch.device | None) -> torch.device:
    """`device`, by default a GPU if there is one. Raises UsageError when it is unknown or not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {str(device)!r} is unknown: use cpu, cuda or cuda:N") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {found} is not there: {torch.cuda.device_count()} GPUs are visible; use cpu")
    return found


def find(path: Path) -> Place:
    """What `load` would read. Raises UserError when nothing there is a model."""
    if not path.exists():
        raise UserError(f"there is no model at {path}: give a local directory that trinity or another tool wrote")
    if path.is_file():
        raise UserError(
            f"{path} is a file; give the directory that holds config.json or the run, such as {path.parent}"
        )
    if (path / "config.json").exists():
        return Place(path, None, (path,))
    if CHECKPOINT.fullmatch(path.name) and path.parent.name == "checkpoints":
        return _checkpoint(path, path.parent.parent)
    if (path / "model" / "config.json").exists():
        return Place(path / "model", None, (path / "model",))
    if (path / "run.toml").exists():
        return _checkpoint(_newest(path), path)
    for stage in STAGES:
        folder = path / stage
        if (folder / "model" / "config.json").exists() or (folder / "checkpoints").is_dir():
            return find(folder)
    raise UserError(
        f"{path} is neither a model directory (config.json) nor a run directory (run.toml, model/, checkpoints/)"
    )


def has_tokenizer(place: Place) -> bool:
    return any((folder / "tokenizer.json").exists() for folder in place.tokenizers)


def find_tokenizer(place: Place) -> Tokenizer:
    """The tokenizer beside a model. Raises UserError that lists where it was looked for."""
    for folder in place.tokenizers:
        if (folder / "tokenizer.json").exists():
            return Tokenizer.load(folder)
    looked = ", ".join(str(folder / "tokenizer.json") for folder in place.tokenizers)
    raise UserError(f"{place.weights} has no tokenizer: there is no {looked}")


def _checkpoint(folder: Path, run: Path) -> Place:
    settings = run / "run.toml"
    if not settings.exists():
        raise UserError(f"{folder} is a checkpoint, but its run directory has no {settings}")
    config, _ = resolve(str(settings))
    named = [Path(config.data.tokenizer)] if config.data.tokenizer else []
    return Place(folder, run, (run / "tokenizer", *named, run.parent / "tokenizer"))


def _newest(run: Path) -> Path:
    folders = sorted(
        (f for f in (run / "checkpoints").glob("step-*") if CHECKPOINT.fullmatch(f.name)),
        key=lambda f: int(f.name.removeprefix("step-")),
    )
    whole = [folder for folder in folders if (folder / "manifest.json").exists()]
    if not whole:
        state = f"none of its {len(folders)} checkpoints is whole" if folders else "nothing was saved yet"
        raise UserError(f"{run} has neither model/ nor a whole checkpoint in checkpoints/: {state}")
    return whole[-1]


def weights(
    path: Path | str, *, dtype: str | torch.dtype | None = None
) -> tuple[ModelConfig, Iterator[tuple[str, torch.Tensor]]]:
    """Settings and tensors of what `load_model` would load, on the CPU, one tensor at a time."""
    return _weights(find(Path(path)), dtype)


def _load_weights(place: Place, device: torch.device, dtype: str | torch.dtype | None) -> Transformer:
    config, state = _weights(place, dtype)
    return _build(config, state, device)


def _weights(place: Place, dtype: str | torch.dtype | None) -> tuple[ModelConfig, Iterator[tuple[str, torch.Tensor]]]:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    if place.run is None:
        config = read_config(place.weights)
        return config, iterate_state(place.weights, config, dtype)
    config = resolve(str(place.run / "run.toml"))[0]
    return config.model, _checkpoint_state(place.weights, config.model, config.lora, dtype)


def _build(config: ModelConfig, state: Iterable[tuple[str, torch.Tensor]], device: torch.device) -> Transformer:
    """The model with its tensors taken over one at a time, without weights that are only made to be overwritten."""
    with torch.device("meta"):
        model = Transformer(config)
    tensors = {name: tensor.to(device) for name, tensor in state}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


def checkpoint_tensors(folder: Path) -> SavedTensors:
    """The weights of a training checkpoint, saved by one process or in parts by many, once its files agree with the
    manifest. Raises UserError when they do not."""
    manifest = read_json(folder / "manifest.json")
    try:
        expected = {
            name: entry["sha256"]
            for name, entry in manifest["files"].items()
            if name == "model.safetensors" or MODEL_PART.fullmatch(name)
        }
        if not expected:
            raise KeyError
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / 'manifest.json'} gives no checksum of model.safetensors") from None
    for name, checksum in sorted(expected.items()):
        path = folder / name
        if not path.exists():
            raise UserError(f"{path} is missing; the manifest lists it")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != checksum:
            raise UserError(f"{path} is damaged: its checksum is {found[:16]}..., the manifest says {checksum[:16]}...")
    return SavedTensors(folder / name for name in sorted(expected))


def _checkpoint_state(
    folder: Path, config: ModelConfig, lora: LoRAConfig, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a training checkpoint, one at a time, low-rank adapters merged."""
    saved = checkpoint_tensors(folder)
    where = saved.files[0] if len(saved.files) == 1 else folder
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    names = {name for name in saved.names if not is_factor(name)}
    adapters = None
    if len(names) < len(saved.names) and dtype is None:
        dtype = torch.float32  # the base may lie in several types, and what is merged is float32
    if len(names) < len(saved.names):
        adapters = Adapters(config, lora, torch.device("cpu"), seed=0)
        expected = {name: factor.shape for name, factor in adapters.named_parameters()}
        if {name: tuple(shape) for name, shape in expected.items()} != {
            name: saved.shape(name) for name in saved.names if is_factor(name)
        }:
            raise UserError(f"{where} and the run's settings of [lora] disagree about the adapters")
        adapters.load({name: saved.read(name) for name in expected})
    if names != set(shapes):
        odd = sorted(names ^ set(shapes))[0]
        raise UserError(f"{where} and the run's settings disagree about {odd}")
    for name, shape in shapes.items():
        if saved.shape(name) != tuple(shape):
            raise UserError(f"{where}: {name} has shape {saved.shape(name)}, run.toml says {tuple(shape)}")
        keep = name.endswith((".router.bias", ".router.momentum"))
        tensor = saved.read(name)
        if adapters is not None and name in adapters.by_parameter:
            tensor = adapters.merge(name, tensor)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"{where}: {name} holds numbers that are not finite; take an earlier checkpoint")
        yield name, tensor if keep or dtype is None else tensor.to(dtype)
