"""From requests to token ids within the server's limits. Runs in threads, beside the event loop."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trinity.config import ServeConfig
from trinity.serve.errors import bad
from trinity.serve.protocol import ChatRequest, CompletionRequest, chosen_tools, tidy_messages
from trinity.serve.tools import CALL_END, THINK, AnswerParser
from trinity.tokenizer import Tokenizer

COMPLETION_TOKENS = 16
"""Length limit of a completion whose request gives none, as in the protocol."""


@dataclass(frozen=True)
class Prompt:
    """What the engine gets, and what reading the answer needs."""

    ids: list[int]
    max_tokens: int
    stop_ids: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()
    """Stop strings beside those of the request."""
    text: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    prefix: str = ""
    thinking: bool = False

    def parser(self) -> AnswerParser:
        """A fresh reader for one answer."""
        return AnswerParser(tools=self.tools, thinking=self.thinking, prefix=self.prefix)


class Prompts:
    """Renders and tokenizes; refuses what does not fit the model, the cache or the limits."""

    def __init__(self, tokenizer: Tokenizer, config: ServeConfig, max_positions: int, cache_tokens: int) -> None:
        self.max_positions = max_positions
        self.created = int(time.time())
        self._tokenizer, self._config, self._cache_tokens = tokenizer, config, cache_tokens

    def chat(self, ask: ChatRequest) -> Prompt:
        """Raises ApiError, or UserError for a conversation that the template refuses."""
        tools, prefix = chosen_tools(ask)
        messages = tidy_messages(ask.messages)
        text = self._tokenizer.render_chat(messages, tools or None, add_generation_prompt=True)
        ids = self._tokenizer.encode(text + prefix, special=True)
        thinking = not prefix and text.rstrip().endswith(THINK)
        single = bool(tools) and (ask.parallel_tool_calls is False or bool(prefix))
        return Prompt(
            ids,
            self._room(ids, ask.limit, self._config.default_max_tokens, "messages"),
            stop_ids=tuple(self._tokenizer.stop_ids),
            stops=(CALL_END,) if single else (),
            tools=tools,
            prefix=prefix,
            thinking=thinking,
        )

    def split(self, prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
        """The prompts of a completion request one by one. Raises ApiError when there is none."""
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise bad("prompt is an empty list", "prompt")
        if all(isinstance(token, int) for token in prompt):
            return [[token for token in prompt if isinstance(token, int)]]
        return [one for one in prompt if not isinstance(one, int)]

    def complete(self, ask: CompletionRequest, texts: Sequence[str | list[int]]) -> list[Prompt]:
        """Raises ApiError, or UserError for text that is none."""
        prompts = []
        for text in texts:
            # Documents end with eos, so after eos a document begins.
            ids = self._tokenizer.encode(text) or [self._tokenizer.eos_id] if isinstance(text, str) else text
            outside = next((token for token in ids if not 0 <= token < self._tokenizer.vocab_size), None)
            if not ids or outside is not None:
                what = "is an empty list of tokens" if not ids else f"has the token {outside}, which does not exist"
                raise bad(f"the prompt {what}; tokens are 0 to {self._tokenizer.vocab_size - 1}", "prompt")
            shown = (text if isinstance(text, str) else self._tokenizer.decode(ids)) if ask.echo else ""
            prompts.append(Prompt(ids, self._room(ids, ask.max_tokens, COMPLETION_TOKENS, "prompt"), text=shown))
        return prompts

    def _room(self, ids: Sequence[int], asked: int | None, default: int, param: str) -> int:
        """Tokens that the answer may have. Raises ApiError."""
        limits = {
            f"the model's {self.max_positions} positions": self.max_positions - len(ids),
            f"the {self._cache_tokens} tokens that the server's cache holds": self._cache_tokens - len(ids),
        }
        most = self._config.max_prompt_tokens
        if most is not None and len(ids) > most:
            raise bad(
                f"the prompt has {len(ids)} tokens and this server takes {most}", param, "context_length_exceeded"
            )
        what, room = min(limits.items(), key=lambda one: one[1])
        if room < (asked or 1):
            answer = f" and an answer of up to {asked}" if asked else ""
            raise bad(f"a prompt of {len(ids)} tokens{answer} does not fit {what}", param, "context_length_exceeded")
        return asked or min(default, room)
