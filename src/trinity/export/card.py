"""The model card, README.md of an exported directory."""

from collections.abc import Mapping
from typing import Any

from trinity.config import ModelConfig
from trinity.export.parity import ParityReport


def model_card(
    name: str, config: ModelConfig, public: Mapping[str, Any], report: ParityReport, origin: Mapping[str, str]
) -> str:
    """Sizes, origin, how the export was checked and how to load it, as Markdown with a Hub header."""
    local = config.layers.count("local")
    kinds = f"{config.num_dense_layers} dense; {local} local, {config.num_layers - local} global"
    rows = {
        "parameters": f"{config.num_params():,}",
        "active per token": f"{config.num_active_params():,}",
        "layers": f"{config.num_layers}: {kinds}",
        "width": f"{config.dim}, {config.num_heads} query and {config.num_kv_heads} key heads of {config.head_dim}",
        "experts": f"{config.num_experts}, {config.experts_per_token} per token, {config.num_shared_experts} shared",
        "window": f"{config.window} tokens in local layers",
        "positions": f"{config.max_positions}",
        "vocabulary": f"{config.vocab_size}",
        "weights": _weights(public),
    }
    facts = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    source = "\n".join(f"- {key}: `{value}`" for key, value in origin.items())
    checks = "\n".join(f"- {line}" for line in report.lines())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [afmoe, moe, trinity]
---
# {name}

A sparse mixture-of-experts language model in the `afmoe` format, written by `trinity`.

| | |
|---|---|
{facts}

## Origin
{source}

## Checked on export
{checks}

## Use
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""


def _weights(public: Mapping[str, Any]) -> str:
    quantization = public.get("quantization_config")
    if quantization is None:
        return str(public["dtype"])
    return f"FP8 (e4m3) in blocks of 128 x 128, `{quantization['quant_method']}`; all else {public['dtype']}"
