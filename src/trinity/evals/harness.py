"""Our models inside the public evaluation harness: `lm_eval.simple_evaluate(model=HarnessModel(...), tasks=[...])`.

Needs the extra `eval` (`pip install trinity-moe[eval]`). The benchmarks of `evals.benchmarks` do without it.
"""

from collections.abc import Sequence
from typing import Any

from trinity.base.errors import UserError
from trinity.evals.language_model import LanguageModel, Prompt

try:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise UserError("the evaluation harness is not installed: pip install 'trinity-moe[eval]'") from error

_MAX_NEW_TOKENS = 256


class HarnessModel(LM):
    """`lm_eval`'s model interface over any `LanguageModel`: the native engine or an endpoint."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model
        self._chats: set[str] = set()

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        return [(one.logprob, one.greedy) for one in self.model.loglikelihood([r.args for r in requests])]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        return self.model.loglikelihood_rolling([r.args[0] for r in requests])

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        return self.model.generate([self._prompt(*r.args) for r in requests])

    def _prompt(self, text: str, arguments: dict[str, Any]) -> Prompt:
        until = arguments.get("until", ())
        stops = (until,) if isinstance(until, str) else tuple(until)
        if arguments.get("do_sample") or arguments.get("temperature", 0.0):
            raise UserError("sampling is not supported by this adapter: set do_sample to false")
        most = int(arguments.get("max_gen_toks", arguments.get("max_new_tokens", _MAX_NEW_TOKENS)))
        return Prompt(text, stops, most, chat=text in self._chats)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not add_generation_prompt:
            raise UserError("an answer that is already begun cannot be continued through this adapter")
        text = self.model.render_chat(chat_history)
        self._chats.add(text)
        return text

    @property
    def tokenizer_name(self) -> str:
        return self.model.name
