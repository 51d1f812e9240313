"""A conversation with a model: history, template, streamed answers, and what to do when the context is full."""

import dataclasses
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from trinity.base.errors import UserError
from trinity.infer.documents import Gathered, check_room
from trinity.infer.engine import Engine
from trinity.infer.request import Finish, Request
from trinity.infer.sampling import SamplingParams
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer

Message = dict[str, Any]


class _Turn(NamedTuple):
    """What was asked last: the text of the prompt, and its request."""

    prompt: str
    request: Request


class ChatSession:
    """Messages so far, and `send` to add a turn.

        session = ChatSession(model, tokenizer, system="Answer briefly.")
        for piece in session.send("What is a mixture of experts?"):
            print(piece, end="", flush=True)

    When prompt and answer would not fit the model's positions, the oldest turns are left out of the prompt (the system
    message and the documents in it stay); `dropped` tells how many messages the last answer did not see. What was read
    stays in the cache: the next turn reads only what is new, as long as nothing was left out.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        documents: Gathered | None = None,
        params: SamplingParams | None = None,
    ) -> None:
        """`documents` stand in the system message, after `system`. Raises UserError when they leave no room."""
        self.tokenizer = tokenizer
        self.params = params or SamplingParams(max_new_tokens=1024)
        first = "\n\n".join(part for part in (system, documents.text if documents else None) if part)
        self.messages: list[Message] = [{"role": "system", "content": first}] if first else []
        self.finish: Finish | None = None
        """How the last answer ended; "cancelled" when the caller stopped listening."""
        self.dropped = 0
        self._max_positions = model.config.max_positions
        if documents is not None:
            shortest = [*self.messages, {"role": "user", "content": "?"}]
            ids, _ = tokenizer.encode_chat(shortest, add_generation_prompt=True)
            check_room(documents, tokenizer, ids, self._max_positions, self._answer)
        self._engine = Engine(model, tokenizer, max_batch=1)
        self._last: _Turn | None = None
        self._rendered = ""
        """The text of the last prompt."""

    def send(self, text: str, on_prompt: Callable[[int, int], None] | None = None) -> Generator[str, None, None]:
        """Add what the user says and yield the answer piece by piece; `on_prompt` gets how many tokens of the prompt
        are read, and how many there are.

        The answer joins the history when it ends, also when the caller stops listening before that. Raises UserError
        when the message alone does not fit; it is then taken back.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._prompt()
        except UserError:
            self.messages.pop()
            raise
        stops = tuple({*self.params.stop_ids, *self.tokenizer.stop_ids})
        params = dataclasses.replace(self.params, stop_ids=stops)
        if self._last is not None:
            self._engine.cancel(self._last.request)  # nothing to do but when nobody listened to its end
        request = self._engine.submit(prompt, params, keep=True, follow=self._last and self._last.request)
        self._last = _Turn(self._rendered, request)
        try:
            if on_prompt is not None:
                on_prompt(request.num_read, len(request.prompt))
            while not request.done:
                events = self._engine.step()
                if on_prompt is not None and not request.completion.tokens[1:]:
                    on_prompt(request.num_read, len(request.prompt))
                for event in events:
                    if event.text:
                        yield event.text
        finally:
            self._engine.cancel(request)
            self.finish = request.completion.finish
            self.messages.append({"role": "assistant", "content": request.completion.text})

    def reset(self) -> None:
        """Forget every turn but the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self.dropped = 0
        self.finish = None
        if self._last is not None:
            self._engine.cancel(self._last.request)
            self._engine.release(self._last.request)
            self._last = None

    @property
    def _answer(self) -> int:
        """Tokens that are kept free for the answer."""
        return min(self.params.max_new_tokens, self._max_positions // 2)

    def _prompt(self) -> list[int]:
        """Tokens of the conversation, the oldest turns left out until the answer has room."""
        room = self._max_positions - self._answer
        system = self.messages[:1] if self.messages[0]["role"] == "system" else []
        turns = self.messages[len(system) :]
        starts = [i for i, message in enumerate(turns) if message["role"] == "user"]
        ids: list[int] = []
        for start in starts:
            ids = self._encode(system + turns[start:])
            if len(ids) <= room:
                self.dropped = start
                return ids
        raise UserError(
            f"the message is too long: with the template it has {len(ids)} tokens, and {room} of the model's "
            f"{self._max_positions} positions are left for it"
        )

    def _encode(self, messages: list[Message]) -> list[int]:
        """Tokens of a conversation: those of the last turn as they were read and generated, where it goes on from
        there, so that the engine reads only what is new."""
        text = self.tokenizer.render_chat(messages, add_generation_prompt=True)
        self._rendered = text
        if self._last is not None:
            request = self._last.request
            answer = [token for token in request.completion.tokens if token not in request.params.stop_ids]
            said = request.completion.text
            # Our template leaves out white space before an answer; others show answers otherwise altogether.
            shown = next((part for part in (said, said.lstrip()) if text.startswith(self._last.prompt + part)), None)
            # Not where characters were cut or control tokens left out: the text is not all that was generated.
            if shown is not None and self.tokenizer.decode(answer) == said:
                rest = text[len(self._last.prompt + shown) :]
                return request.prompt + answer + self.tokenizer.encode(rest, special=True)
        return self.tokenizer.encode(text, special=True)
