"""vLLM in front of an exported directory: the argument list, and becoming that process."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trinity.base.errors import UserError
from trinity.config import ServeConfig
from trinity.infer.load import find, find_tokenizer
from trinity.tokenizer import Tokenizer


def vllm_arguments(
    directory: Path, config: ServeConfig, tokenizer: Tokenizer, *, dtype: str | None = None, more: Sequence[str] = ()
) -> list[str]:
    """Arguments of `python -m vllm.entrypoints.openai.api_server`, without the key, which goes by the environment.

    The tool parser follows the chat template: JSON calls are "hermes", XML ones "qwen3_coder". A reasoning parser is
    chosen only where the template itself opens <think>: vLLM's take an answer without the tag for reasoning.
    `more` is appended as it is, so that it wins.
    """
    template = tokenizer.chat_template
    arguments = [
        f"--model={directory}",
        f"--served-model-name={config.name}",
        f"--host={config.host}",
        f"--port={config.port}",
        f"--max-num-seqs={config.max_batch}",
        f"--dtype={dtype or 'auto'}",
    ]
    if config.cache == "fp8":
        arguments.append("--kv-cache-dtype=fp8")
    if config.fp8_weights:
        arguments.append("--quantization=fp8")
    if config.max_prompt_tokens is not None:
        arguments.append(f"--max-model-len={config.max_prompt_tokens + config.default_max_tokens}")
    if "tool_call" in template:
        parser = "qwen3_coder" if "<function=" in template else "hermes"
        arguments += ["--enable-auto-tool-choice", f"--tool-call-parser={parser}"]
    if _opens_thinking(tokenizer):
        arguments.append("--reasoning-parser=deepseek_r1")
    return [*arguments, *more]


def run_vllm(
    path: Path, config: ServeConfig, api_key: str | None, *, dtype: str | None = None, more: Sequence[str] = ()
) -> None:
    """Replace this process by vLLM's server. Raises UserError when vLLM or an exported model is not there."""
    place = find(path)
    if place.run is not None:
        raise UserError(
            f"{path} is a training checkpoint, which vLLM does not read; write a model directory first: "
            f"trinity export {path} --out DIR"
        )
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed in this environment (pip install vllm); --backend native needs nothing")
    arguments = vllm_arguments(place.weights, config, find_tokenizer(place), dtype=dtype, more=more)
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if api_key is not None:
        environment["VLLM_API_KEY"] = api_key
    os.execve(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments], environment)


def _opens_thinking(tokenizer: Tokenizer) -> bool:
    try:
        text = tokenizer.render_chat([{"role": "user", "content": "x"}], add_generation_prompt=True)
    except UserError:  # a template with demands of its own
        return False
    return text.rstrip().endswith("<think>")
