"""Settings of the server: where it listens and what a request may ask of it."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from trinity.config.base import Frozen


class ServeConfig(Frozen):
    """Limits are refusals, never silent changes: a request beyond one gets an error that names it."""

    name: str
    """Name of the model in requests and answers."""
    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback lets other machines in."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 takes any free port."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names that the Host header may give, without port. On loopback others than localhost are refused, so
    that a web page elsewhere cannot reach the server through a name of its own."""
    max_batch: PositiveInt = 32
    """Answers that are generated together."""
    max_queued: Annotated[int, Field(ge=0)] = 256
    """Answers that may wait beyond those; more are refused with status 429."""
    max_cache_tokens: PositiveInt | None = None
    """Prompt and answer tokens of all answers under way; None: by the memory that is free."""
    cache: Literal["auto", "fp8"] = "auto"
    """Keys and values as the weights are stored, or in FP8 (e4m3): half the memory of bfloat16, less exact."""
    fp8_weights: bool = False
    """Multiply with weights quantised to FP8 blocks at the start; needs a GPU."""
    prefill_chunk: PositiveInt = 1024
    """Prompt tokens of one forward pass."""
    max_prompt_tokens: PositiveInt | None = None
    """None: what the model's positions allow."""
    default_max_tokens: PositiveInt = 1024
    """Length limit of a chat answer whose request gives none."""
    max_body_bytes: PositiveInt = 16 << 20
    request_seconds: PositiveFloat = 600.0
    """From the request's first byte to the answer's last one."""
    body_seconds: PositiveFloat = 30.0
    """For receiving the request's body."""
    shutdown_seconds: PositiveFloat = 30.0
    """For answers under way once the server was told to end."""

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host == "localhost" or self.host == "::1" or self.host.startswith("127.")
