"""The requests of OpenAI's protocol: what may stand in them, and what it means for the engine.

A field that is unknown, or known but not supported with that value, is refused by name: a client that asks for
something must not get an answer in which it was left out.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from trinity.base.errors import nearest
from trinity.infer.sampling import SamplingParams
from trinity.serve.errors import ApiError, bad

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_TOP_LOGPROBS = 20

IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields for the provider's own accounts and storage, without a bearing on the answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "reasoning_effort": (),
    "verbosity": (),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
}
"""Fields of the protocol that are taken only with these values (or null), which ask for nothing."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False
    """Padding against an observer of the network; never added."""


class _Request(BaseModel):
    """What both kinds of requests have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = 1
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1)] | None = 0
    """0 and -1 keep all tokens; with min_p, repetition_penalty and ignore_eos an extension, named as in vLLM."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = 1.0
    ignore_eos: bool | None = False

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def choices(self) -> int:
        return self.n or 1

    def stops(self) -> tuple[str, ...]:
        """Raises ApiError for too many, too long or empty stop strings."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
            raise bad(
                f"stop takes at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters each", param="stop"
            )
        return stops

    def sampling(
        self, max_new_tokens: int, stop_ids: tuple[int, ...], top_logprobs: int, more_stops: tuple[str, ...] = ()
    ) -> list[SamplingParams]:
        """One for each of the n choices; with a seed, choice i uses seed + i."""
        base = None if self.seed is None else self.seed % 2**62
        return [
            SamplingParams(
                max_new_tokens=max_new_tokens,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=max(0, self.top_k or 0),
                top_p=1.0 if self.top_p is None else self.top_p,
                min_p=self.min_p or 0.0,
                repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
                seed=None if base is None else base + i,
                stop_ids=() if self.ignore_eos else stop_ids,
                stop=self.stops() + more_stops,
                top_logprobs=top_logprobs,
            )
            for i in range(self.choices)
        ]


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = 0

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most, under either name."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]] = ""
    echo: bool | None = False
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


AnyRequest = TypeVar("AnyRequest", ChatRequest, CompletionRequest)


def parse(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """JSON -> request. Raises ApiError that names the place in the text or the field."""
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad(
            f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}", code="invalid_utf8"
        ) from None
    fields = _json_object(body)
    for name in IGNORED:
        fields.pop(name, None)
    for name, allowed in NEUTRAL.items():
        if name in fields and (value := fields.pop(name)) is not None and not any(value == one for one in allowed):
            raise bad(f"{name} = {_short(value)} is not supported", name, "unsupported_value")
    for name in fields:
        if name not in kind.model_fields:
            raise bad(f"the field {name!r} is unknown{nearest(name, kind.model_fields)}", name, "unknown_parameter")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from None


def check_choices(request: _Request) -> None:
    """Refuse combinations that contradict themselves. Raises ApiError."""
    if request.stream_options is not None and not request.stream:
        raise bad("stream_options needs stream = true", "stream_options")
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise bad("top_logprobs needs logprobs = true", "top_logprobs")
    if isinstance(request, CompletionRequest):
        if request.best_of is not None and request.best_of != request.choices:
            raise bad("best_of other than n is not supported", "best_of", "unsupported_value")
        if request.echo and request.logprobs is not None:
            raise bad("echo with logprobs is not supported: the prompt's own log-probabilities are not kept", "echo")


def tidy_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as the chat template reads them: text parts joined, `developer` as `system`. Raises ApiError."""
    return [_tidy(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _tidy(message: dict[str, Any], where: str) -> dict[str, Any]:
    tidy = {key: value for key, value in message.items() if value is not None}
    if tidy.get("role") == "developer":
        tidy["role"] = "system"
    if "reasoning" in tidy:  # the name that some clients send it back under
        tidy.setdefault("reasoning_content", tidy.pop("reasoning"))
    content = tidy.get("content")
    if isinstance(content, list):
        texts = []
        for number, part in enumerate(content):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise bad(f"{where}.content[{number}] is no text part; text is all that this model reads", where)
            texts.append(part["text"])
        tidy["content"] = "".join(texts)
    return tidy


def chosen_tools(request: ChatRequest) -> tuple[list[dict[str, Any]], str]:
    """The tools that the model is shown, and the text that its answer must begin with. Raises ApiError.

    A required call is met by beginning it in the model's place.
    """
    tools = request.tools or []
    names = [_tool_name(tool, number) for number, tool in enumerate(tools)]
    choice = request.tool_choice
    if choice == "none":
        return [], ""
    if choice in (None, "auto"):
        return tools, ""
    if not tools:
        raise bad("tool_choice asks for a call, but there are no tools", "tool_choice")
    if choice == "required":
        return tools, '<tool_call>\n{"name": "'
    assert isinstance(choice, dict)
    function = choice.get("function")
    name = function.get("name") if choice.get("type") == "function" and isinstance(function, Mapping) else None
    if name not in names:
        raise bad(f"tool_choice names {name!r}, which is not among the tools{nearest(str(name), names)}", "tool_choice")
    return tools, f'<tool_call>\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '


def _tool_name(tool: Mapping[str, Any], number: int) -> str:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise bad(f'tools[{number}] must read {{"type": "function", "function": {{"name": ...}}}}', f"tools[{number}]")
    return function["name"]


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise bad(f"the body is a JSON {type(fields).__name__}; it must be an object", code="invalid_json")
    return fields


def _refusal(error: ValidationError) -> ApiError:
    """The first complaint; a union complains once per member, of which the first is shown."""
    first = error.errors(include_url=False, include_context=False)[0]
    names = [str(part) for part in first["loc"]]
    where = names[0] if names else None
    given = "" if first["type"] == "missing" else f" = {_short(first['input'])}"
    message = first["msg"][:1].lower() + first["msg"][1:]
    return bad(f"{where or 'the request'}{given}: {message}", where, first["type"])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
