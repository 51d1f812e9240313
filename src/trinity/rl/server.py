"""A server as the sampler of rollouts: `/v1/completions` of vLLM or SGLang over token ids, weights synced by export.

The prompt goes out as token ids and the answer must come back as such: text does not tell which tokens the policy
chose. Which experts a server chose is not part of the protocol, so there is no replay.
"""

import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trinity.base.errors import UserError
from trinity.config import RLConfig
from trinity.rl.sample import Sampled
from trinity.tokenizer import Tokenizer

RETRIES = 5
BUSY = (408, 425, 429, 500, 502, 503, 504)
WORKERS = 32
"""Requests at a time; the server batches them."""

Export = Callable[[Path], None]
"""Writes the trainer's weights as a model directory that the server can load."""


class ServerSampler:
    """Asks the server `rl.server`, after `sync` has written the weights to `folder` and told it to load them.

    Folders of weights alternate between two names, so that the server never reads what is being written. Both sides
    must see `folder` under the same path. The key is TRINITY_API_KEY, if that is set.
    """

    def __init__(self, settings: RLConfig, tokenizer: Tokenizer, folder: Path, export: Export) -> None:
        self._settings, self._tokenizer, self._folder, self._export = settings, tokenizer, folder, export
        self._url = settings.server.rstrip("/")
        self._root = self._url.removesuffix("/v1")
        self._syncs = 0
        key = os.environ.get("TRINITY_API_KEY")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def sync(self) -> None:
        """Export the weights and have the server load them. Raises UserError when it does not."""
        target = self._folder / f"weights-{self._syncs % 2}"
        self._syncs += 1
        shutil.rmtree(target, ignore_errors=True)
        self._export(target)
        path = str(target.resolve())
        if self._settings.server_kind == "sglang":
            answer = self._post(f"{self._root}/update_weights_from_disk", {"model_path": path})
            if isinstance(answer, dict) and answer.get("success") is False:
                raise UserError(f"{self._root} did not load {path}: {answer.get('message')}")
        else:
            self._post(f"{self._root}/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})

    def __call__(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sampled]:
        with ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(self._sample, prompts, seeds))

    def _sample(self, prompt: list[int], seed: int) -> Sampled:
        stops = list(self._tokenizer.stop_ids)
        body = {
            "model": self._settings.server_model,
            "prompt": prompt,
            "max_tokens": self._settings.max_new_tokens,
            "temperature": self._settings.temperature,
            "seed": seed % 2**31,
            "logprobs": 1,
            "stop_token_ids": stops,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        answer = self._post(f"{self._url}/completions", body)
        try:
            choice = answer["choices"][0]
            finished = choice["finish_reason"] == "stop"
            logprobs = choice["logprobs"]
            tokens = _token_ids(choice, logprobs)
            values = [float(value) for value in logprobs["token_logprobs"]]
        except (LookupError, TypeError, ValueError):
            raise UserError(
                f"{self._url}/completions answered without token ids and their log-probabilities "
                f"({json.dumps(answer)[:200]}): use a server with return_token_ids or return_tokens_as_token_ids, "
                "such as vLLM"
            ) from None
        if len(tokens) != len(values) or not tokens:
            raise UserError(f"{self._url} answered {len(tokens)} tokens with {len(values)} log-probabilities")
        inside = tokens[:-1] if finished and tokens[-1] in stops else tokens
        return Sampled(self._tokenizer.decode(inside, skip_special=True), tokens, values, finished)

    def _post(self, url: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(url, json.dumps(body).encode(), self._headers)
        for attempt in range(RETRIES):
            try:
                with urllib.request.urlopen(request, timeout=600) as response:
                    text = response.read()
                return json.loads(text) if text.strip() else None
            except urllib.error.HTTPError as error:
                detail = error.read().decode("utf-8", "replace")[:200]
                if error.code not in BUSY or attempt == RETRIES - 1:
                    raise UserError(f"{url} answered {error.code}: {detail}") from None
            except (OSError, ValueError) as error:
                if attempt == RETRIES - 1:
                    raise UserError(f"{url} cannot be asked: {error}") from None
            time.sleep(min(8.0, 0.25 * 2**attempt))
        raise AssertionError


def _token_ids(choice: dict[str, Any], logprobs: dict[str, Any]) -> list[int]:
    if choice.get("token_ids"):
        return [int(token) for token in choice["token_ids"]]
    return [int(name.removeprefix("token_id:")) for name in logprobs["tokens"]]
