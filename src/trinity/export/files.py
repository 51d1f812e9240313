"""The tensors of a model directory: one safetensors file or several with an index, plain or block-quantised FP8."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from trinity.base.errors import UserError
from trinity.base.files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F64", "F32", "F16", "BF16"}
SCALES = ("_scale_inv", "_scale")


class TensorFiles:
    """Reads tensors by name, one at a time, from the safetensors of `directory`; a context manager.

    Raises UserError that names the file when one is missing, cut off or contradicts the index.
    """

    def __init__(self, directory: Path, quantization: Mapping[str, Any] | None = None) -> None:
        self.directory = directory
        self._block = _block_size(quantization or {}, directory)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        for name, listed in self._listing():
            held = set(self._open(name).keys())
            absent = sorted(listed - held)
            if absent:
                raise UserError(f"{directory / INDEX} says that {absent[0]} is in {name}, but it is not there")
            self._where |= dict.fromkeys(listed or held, name)
        self.names = frozenset(name for name in self._where if not self._is_scale(name))
        """Names of the tensors, the scales of quantised ones left out."""

    def _listing(self) -> list[tuple[str, set[str]]]:
        """File names and the tensors that the index expects in each (empty: whatever is there)."""
        if not (self.directory / INDEX).exists():
            if not (self.directory / SINGLE).exists():
                raise UserError(f"{self.directory} has no weights: neither {SINGLE} nor {INDEX}")
            return [(SINGLE, set())]
        index = read_json(self.directory / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{self.directory / INDEX} has no weight_map")
        files: dict[str, set[str]] = {}
        for key, name in weight_map.items():
            if Path(name).name != name:
                raise UserError(f"{self.directory / INDEX}: {key} lies outside the directory, in {name!r}")
            files.setdefault(name, set()).add(key)
        return sorted(files.items())

    def _open(self, name: str) -> Any:
        path = self.directory / name
        if not path.exists():
            raise UserError(f"{path} is missing; the index lists it")
        try:
            self._files[name] = self._stack.enter_context(safe_open(path, "pt"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from None
        return self._files[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, expert: int | None = None, rows: slice | None = None) -> torch.Tensor:
        """The tensor, or a part of it, in the file's type; FP8 comes back as float32, multiplied by its scale."""
        part = self._slice(name)
        kind = part.get_dtype()
        if kind in FLOATS:
            if expert is None:
                return part[rows] if rows is not None else self._files[self._where[name]].get_tensor(name)
            return part[expert] if rows is None else part[expert, rows]
        if kind != "F8_E4M3":
            raise UserError(f"{self.directory}: {name} is stored as {kind}; floating point or FP8 (e4m3) can be read")
        scale_name = next((name + suffix for suffix in SCALES if name + suffix in self._where), None)
        if scale_name is None:
            raise UserError(f"{self.directory}: {name} is FP8 but {name}{SCALES[0]} is missing")
        scale_part = self._slice(scale_name)
        scale_kind = scale_part.get_dtype()
        if scale_kind not in FLOATS and scale_kind != "F8_E8M0":
            raise UserError(f"{self.directory}: {scale_name} is stored as {scale_kind}, which is no type of a scale")
        if expert is None:
            weight, scale = part[:], scale_part[:]
        else:
            weight = part[expert]
            scale = scale_part[expert] if len(scale_part.get_shape()) == 3 else scale_part[:]
        value = weight.float() * self._expand(scale.float(), weight, scale_name)
        return value if rows is None else value[rows]

    def raw(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, a scale too."""
        return self._files[self._where[name]].get_tensor(name)

    def holds(self, name: str) -> bool:
        """Whether there is a tensor of this name, scales included."""
        return name in self._where

    def _expand(self, scale: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
        """A scale per tensor, per output channel or per block, spread over the weight [out, in]."""
        out, inner = weight.shape
        if scale.numel() == 1 or scale.shape == (out, 1):
            return scale
        rows, columns = self._block
        expected = (-(-out // rows), -(-inner // columns))
        if scale.shape != expected:
            raise UserError(
                f"{self.directory}: {name} has shape {tuple(scale.shape)}, but blocks of {rows}x{columns} over "
                f"{tuple(weight.shape)} make {expected}"
            )
        return scale.repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :inner]

    def _slice(self, name: str) -> Any:
        return self._files[self._where[name]].get_slice(name)

    def _is_scale(self, name: str) -> bool:
        return any(name.endswith(suffix) and name.removesuffix(suffix) in self._where for suffix in SCALES)


def _block_size(quantization: Mapping[str, Any], directory: Path) -> tuple[int, int]:
    """Rows and columns that share a scale, from `quantization_config`."""
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        groups = quantization.get("config_groups") or {}
        shapes = [(group.get("weights") or {}).get("block_structure") for group in groups.values()]
        block = next((shape for shape in shapes if shape), None)
    elif method in (None, "fp8"):
        block = quantization.get("weight_block_size")
    else:
        raise UserError(f"{directory / 'config.json'}: quantisation {method!r} cannot be read, only block FP8")
    rows, columns = block or (128, 128)
    return int(rows), int(columns)
