"""In which numbers a model directory is stored: one type for all weights, or FP8 blocks for the large matrices."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from trinity.base.errors import UsageError
from trinity.config import ModelConfig
from trinity.export.keys import is_bias, pieces
from trinity.ops.block_fp8 import BLOCK, dequantize_blocks, quantize_blocks


class Format(NamedTuple):
    """How tensors are stored."""

    name: str
    dtype: torch.dtype
    """Of everything that is not quantised, expert biases excepted, which are float32 always."""
    scale: str | None = None
    """Ending of the name of a quantised tensor's scales; None: nothing is quantised."""

    def quantizes(self, public: str) -> bool:
        """Whether the tensor of this public name is stored as FP8 blocks."""
        return self.scale is not None and is_quantizable(public)

    def stored(self, public: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that hold `value`, by name."""
        if not self.quantizes(public):
            return {public: value.to(torch.float32 if is_bias(public) else self.dtype)}
        weight, scale = quantize_blocks(value)
        return {public: weight, f"{public}{self.scale}": scale}

    def rounded(self, public: str, value: torch.Tensor) -> torch.Tensor:
        """float32: what comes back from the file for `value`."""
        if not self.quantizes(public):
            return (value if is_bias(public) else value.to(self.dtype)).float()
        return dequantize_blocks(*quantize_blocks(value))

    def num_bytes(self, public: str, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor in the file, scales included."""
        count = torch.Size(shape).numel()
        if not self.quantizes(public):
            return count * (torch.float32 if is_bias(public) else self.dtype).itemsize
        return count + 4 * -(-shape[0] // BLOCK) * -(-shape[1] // BLOCK)


FORMATS = {
    "float32": Format("float32", torch.float32),
    "bfloat16": Format("bfloat16", torch.bfloat16),
    "float16": Format("float16", torch.float16),
    "fp8-block": Format("fp8-block", torch.bfloat16, "_scale_inv"),
    "compressed-tensors": Format("compressed-tensors", torch.bfloat16, "_scale"),
}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def find_format(name: str) -> Format:
    """The format of a name or its short form. Raises UsageError that lists them."""
    found = FORMATS.get(SHORT.get(name, name))
    if found is None:
        raise UsageError(f"--dtype {name} is not one of {', '.join((*SHORT, *FORMATS))}")
    return found


def format_of(dtype: torch.dtype) -> Format | None:
    """The unquantised format of a type."""
    return next((f for f in FORMATS.values() if f.dtype == dtype and f.scale is None), None)


def is_quantizable(public: str) -> bool:
    """The projections of attention, dense FFNs, shared and routed experts; never routers, norms, embedding, head."""
    return public.endswith("_proj.weight")


def quantization_config(chosen: Format, config: ModelConfig) -> Mapping[str, Any] | None:
    """The `quantization_config` of config.json, in the form that engines read; None when nothing is quantised.

    Modules that are not quantised are listed by their whole names: some engines compare names, not patterns.
    """
    if chosen.scale is None:
        return None
    plain = sorted(
        piece.public.removesuffix(".weight")
        for piece in pieces(config)
        if len(piece.shape) == 2 and not is_quantizable(piece.public) and piece.public != "model.embed_tokens.weight"
    )
    if chosen.name == "fp8-block":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": plain,
        }
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**number, "strategy": "block", "block_structure": [BLOCK, BLOCK], "dynamic": False},
        "input_activations": {**number, "strategy": "group", "group_size": BLOCK, "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": plain,
        "kv_cache_scheme": None,
    }


def partial_blocks(config: ModelConfig) -> str | None:
    """Why some engines refuse FP8 blocks of this shape; None when they do not."""
    for piece in pieces(config):
        if is_quantizable(piece.public) and (piece.shape[0] % BLOCK or piece.shape[1] % BLOCK):
            return f"{piece.public} {piece.shape} does not consist of whole blocks of {BLOCK} x {BLOCK}"
    return None
