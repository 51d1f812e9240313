"""`LanguageModel` over an OpenAI-compatible server: `/v1/completions`, with `echo` and `logprobs` for log-likelihoods.

Servers such as vLLM return the log-probabilities of the prompt when asked to echo it. Special tokens in a rendered
conversation are the server's business, so chats go to `/v1/chat/completions`.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trinity.base.errors import UserError
from trinity.evals.language_model import Likelihood, Prompt

_RETRIES = 5
_BUSY = (408, 425, 429, 500, 502, 503, 504)


class Endpoint:
    """url: of the server up to and with `/v1`. workers: requests at a time."""

    def __init__(self, url: str, model: str, *, key: str = "", workers: int = 8, timeout: float = 600.0) -> None:
        self.url, self.name, self.timeout, self.workers = url.rstrip("/"), model, timeout, workers
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        return self._each(self._pair, pairs)

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Without the first token, which nothing predicts on a server that adds no token before it."""
        return self._each(lambda text: sum(p for p in self._echo(text)[1] if p is not None), texts)

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        return self._each(self._generate, prompts)

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The messages themselves, for the server's own template."""
        return json.dumps(list(messages), ensure_ascii=False)

    def _each(self, work: Any, items: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(work, items))

    def _pair(self, pair: tuple[str, str]) -> Likelihood:
        context, continuation = pair
        blanks = len(context) - len(context.rstrip())
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        offsets, logprobs, greedy = self._echo(context + continuation)
        # A token that spans the border belongs to the continuation, as where tokens are cut by the text's own.
        start = next((i for i, at in enumerate(offsets) if at >= len(context)), len(offsets))
        tail = logprobs[start:]
        if not continuation:
            return Likelihood(0.0, True)
        if any(p is None for p in tail) or not tail:
            raise UserError(f"{self.url} gives no log-probability of the first token: the context must not be empty")
        return Likelihood(sum(p for p in tail if p is not None), all(greedy[start:]))

    def _echo(self, text: str) -> tuple[list[int], list[float | None], list[bool]]:
        """Offset in the text, log-probability and whether it was the most probable, of each token."""
        asked = {"prompt": text, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        found = self._choice("/completions", asked).get("logprobs")
        if not found or not found.get("token_logprobs"):
            raise UserError(
                f"{self.url} does not return log-probabilities of the prompt (echo with logprobs): use a server that "
                "does, such as vLLM, or tasks that generate"
            )
        offsets = found["text_offset"]
        count = sum(1 for at in offsets if at < len(text))  # without the token that had to be generated
        tops = found.get("top_logprobs") or [None] * count
        logprobs = found["token_logprobs"][:count]
        greedy = [
            p is not None and (top is None or p >= max(top.values()) - 1e-9)
            for p, top in zip(logprobs, tops[:count], strict=True)
        ]
        return offsets[:count], logprobs, greedy

    def _generate(self, prompt: Prompt) -> str:
        asked: dict[str, Any] = {"max_tokens": prompt.max_new_tokens, "temperature": 0}
        if prompt.until:
            asked["stop"] = list(prompt.until[:4])  # the interface's limit
        if prompt.chat:
            asked["messages"] = json.loads(prompt.text)
            text = self._choice("/chat/completions", asked)["message"]["content"] or ""
        else:
            text = self._choice("/completions", {"prompt": prompt.text, **asked})["text"]
        for stop in prompt.until:
            text = text.split(stop, 1)[0]
        return text

    def _choice(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._post(path, {"model": self.name, **body})
        try:
            return answer["choices"][0]
        except (LookupError, TypeError):
            raise UserError(f"{self.url}{path} answered without choices: {json.dumps(answer)[:200]}") from None

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), self._headers)
        for attempt in range(_RETRIES):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                detail = error.read().decode("utf-8", "replace")[:200]
                if error.code not in _BUSY or attempt == _RETRIES - 1:
                    raise UserError(f"{self.url}{path} answered {error.code}: {detail}") from None
            except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
                if attempt == _RETRIES - 1:
                    raise UserError(f"{self.url} cannot be asked: {error}") from None
            time.sleep(min(8.0, 0.25 * 2**attempt))
        raise AssertionError
