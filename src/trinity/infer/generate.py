"""`trinity.generate`: text in, text out."""

from collections.abc import Callable
from typing import Any, overload

from trinity.base.errors import UsageError
from trinity.infer.engine import Engine
from trinity.infer.request import Event
from trinity.infer.sampling import SamplingParams
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer


@overload
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    on_text: Callable[[str], None] | None = None,
    on_prompt: Callable[[int, int], None] | None = None,
    max_batch: int = 32,
    **sampling: Any,
) -> str: ...
@overload
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: list[str],
    *,
    on_prompt: Callable[[int, int], None] | None = None,
    max_batch: int = 32,
    **sampling: Any,
) -> list[str]: ...
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | list[str],
    *,
    on_text: Callable[[str], None] | None = None,
    on_prompt: Callable[[int, int], None] | None = None,
    max_batch: int = 32,
    **sampling: Any,
) -> str | list[str]:
    """Continue one prompt (str -> str) or several (list of str -> list of str).

    `sampling` are the fields of SamplingParams, such as `max_new_tokens=64, temperature=0.7, seed=1`; the tokenizer's
    stop tokens end an answer unless `stop_ids` says otherwise. An empty prompt starts a document. `on_text` gets the
    answer piece by piece and needs a single prompt; `on_prompt` gets how many tokens of the prompts are read, and how
    many there are. For conversations see `trinity.infer.chat.ChatSession`.
    """
    texts = [prompt] if isinstance(prompt, str) else prompt
    if on_text is not None and not isinstance(prompt, str):
        raise UsageError("on_text needs a single prompt; use trinity.infer.engine.Engine to stream several")
    sampling.setdefault("stop_ids", tuple(tokenizer.stop_ids))
    try:
        params = SamplingParams(**sampling)
    except TypeError as error:
        raise UsageError(f"{error}; see trinity.infer.sampling.SamplingParams for what can be set") from None

    def forward_text(number: int, event: Event) -> None:
        if on_text is not None and event.text:
            on_text(event.text)

    engine = Engine(model, tokenizer, max_batch=min(max_batch, max(1, len(texts))))
    # Documents end with eos, so after eos a document begins.
    prompts = [tokenizer.encode(text) or [tokenizer.eos_id] for text in texts]
    answers = [completion.text for completion in engine.generate(prompts, params, forward_text, on_prompt)]
    return answers[0] if isinstance(prompt, str) else answers
