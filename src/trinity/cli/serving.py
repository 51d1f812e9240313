"""The verb that serves a model over HTTP."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trinity.base.errors import UsageError, UserError
from trinity.cli.models import ModelArgument
from trinity.cli.options import DeviceOption, DtypeOption, note

if TYPE_CHECKING:
    from trinity.config import ServeConfig


def serve(
    path: ModelArgument,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; loopback unless told.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes any free port.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="Model name in requests; by default the directory's.")
    ] = None,
    backend: Annotated[str, typer.Option("--backend", help="native, or vllm where it is installed.")] = "native",
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", help="File with the key that clients must send; else $TRINITY_API_KEY."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="Further name that the Host header may give on loopback."),
    ] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Answers generated together.")] = 32,
    max_queued: Annotated[int, typer.Option("--max-queued", min=0, help="Answers that may wait; more get 429.")] = 256,
    max_cache_tokens: Annotated[
        int | None,
        typer.Option("--max-cache-tokens", min=1, help="Tokens of all answers under way; by default what fits."),
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option("--max-prompt-tokens", min=1, help="By default what the model allows.")
    ] = None,
    default_max_tokens: Annotated[
        int, typer.Option("--default-max-tokens", min=1, help="Length of a chat answer whose request gives none.")
    ] = 1024,
    max_body_mib: Annotated[int, typer.Option("--max-body-mib", min=1, help="Largest request.")] = 16,
    request_seconds: Annotated[float, typer.Option("--request-seconds", min=0.1, help="Longest request.")] = 600.0,
    shutdown_seconds: Annotated[
        float, typer.Option("--shutdown-seconds", min=0.0, help="For answers under way when told to end.")
    ] = 30.0,
    cache: Annotated[
        str, typer.Option("--cache", help="auto: keys and values as the weights; fp8: half of bfloat16's memory.")
    ] = "auto",
    fp8_weights: Annotated[
        bool, typer.Option("--fp8-weights", help="Quantise the weights to FP8 at the start; needs a GPU.")
    ] = False,
    vllm_arg: Annotated[
        list[str] | None,
        typer.Option("--vllm-arg", help="Passed on to vLLM as it is, such as --vllm-arg=--tensor-parallel-size=2."),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Serve a model in OpenAI's protocol, with a page to chat in.

    SIGTERM and Ctrl-C let answers under way finish first.
    """
    if backend not in ("native", "vllm"):
        raise UsageError(f"--backend {backend} is not one of native, vllm")
    if vllm_arg and backend != "vllm":
        raise UsageError("--vllm-arg needs --backend vllm")
    if cache not in ("auto", "fp8"):
        raise UsageError(f"--cache {cache} is not one of auto, fp8")
    from trinity.config import ServeConfig

    config = ServeConfig(
        cache="fp8" if cache == "fp8" else "auto",
        fp8_weights=fp8_weights,
        name=name or path.resolve().name,
        host=host,
        port=port,
        allowed_hosts=tuple(allow_host or ()),
        max_batch=max_batch,
        max_queued=max_queued,
        max_cache_tokens=max_cache_tokens,
        max_prompt_tokens=max_prompt_tokens,
        default_max_tokens=default_max_tokens,
        max_body_bytes=max_body_mib << 20,
        request_seconds=request_seconds,
        shutdown_seconds=max(0.1, shutdown_seconds),
    )
    if backend == "vllm":
        from trinity.serve.vllm import run_vllm

        run_vllm(path, config, _key(config, api_key_file), dtype=dtype, more=vllm_arg or ())
        return
    _require("starlette", "uvicorn", "prometheus_client")
    import trinity
    from trinity.serve.app import Service
    from trinity.serve.run import find_cache_tokens, run

    key = _key(config, api_key_file)
    model, tokenizer = trinity.load(path, device=device, dtype=dtype)
    weight = model.embed.weight
    value_bytes = 1 if config.cache == "fp8" else weight.element_size()
    tokens = max_cache_tokens or find_cache_tokens(model.config, weight.device, value_bytes, max_batch)
    service = Service(model, tokenizer, config, api_key=key, cache_tokens=tokens)

    def told(address: str, port: int) -> None:
        shown = f"[{address}]" if ":" in address else address
        note(
            f"{config.name} on {weight.device} at http://{shown}:{port} (page) and http://{shown}:{port}/v1; "
            f"{max_batch} answers at once, {tokens} tokens of cache"
        )

    if not run(service, told):
        raise UserError(f"answers were still under way after {config.shutdown_seconds:g} seconds and were ended")


def _key(config: "ServeConfig", path: Path | None) -> str | None:
    from trinity.serve.key import read_key

    key = read_key(path)
    if key is None and not config.on_loopback:
        note(f"anyone who can reach {config.host} may use this server: no API key is set")
    return key


def _require(*packages: str) -> None:
    import importlib.util

    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"the server needs {', '.join(missing)}: pip install 'trinity-moe[serve]'")
