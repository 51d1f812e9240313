"""Whether an answer keeps to the chat template: one turn, closed, with its markup in pairs and calls that parse."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trinity.infer.engine import Engine
from trinity.infer.sampling import SamplingParams
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer
from trinity.tokenizer.template import CONTROL_TOKENS, TURN_END

_PAIRS = (("<think>", "</think>"), ("<tool_call>", "</tool_call>"))
_NEVER = ("<tool_response>", "</tool_response>")  # the environment's to write


def complaint(text: str) -> str | None:
    """What is wrong with the text of an assistant's turn (without its end); None when nothing is."""
    for token in (*CONTROL_TOKENS, *_NEVER):
        if token in text:
            return f"{token} inside the turn"
    for start, end in _PAIRS:
        found = re.findall(f"{re.escape(start)}|{re.escape(end)}", text)
        if found != [start, end] * (len(found) // 2):
            return f"{start} and {end} are not in pairs"
    thoughts = text.count("<think>")
    if thoughts > 1 or (thoughts and not text.startswith("<think>")):
        return "<think> stands elsewhere than once at the beginning"
    for call in re.findall(r"<tool_call>(.*?)</tool_call>", text, flags=re.DOTALL):
        try:
            parsed = json.loads(call)
        except ValueError:
            return "a tool call is not JSON"
        if not isinstance(parsed, dict) or not isinstance(parsed.get("name"), str):
            return "a tool call has no name"
        if not isinstance(parsed.get("arguments"), dict):
            return "a tool call has no object of arguments"
    return None


@dataclass(frozen=True)
class Answer:
    prompt: list[int]
    text: str
    ended: bool
    """By the token that closes a turn."""
    wrong: str | None


def sample_answers(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_new_tokens: int, seed: int = 0
) -> list[Answer]:
    """One answer at temperature 1 to each prompt (which opens the assistant's turn)."""
    engine = Engine(model, tokenizer, max_batch=64, max_tokens=max(1 << 18, max(map(len, prompts)) + max_new_tokens))
    params = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=1.0, seed=seed, stop_ids=tuple(tokenizer.stop_ids)
    )
    closing = tokenizer.special_id(TURN_END)
    answers = []
    for prompt, done in zip(prompts, engine.generate(prompts, params), strict=True):
        ended = done.finish == "stop" and done.tokens[-1] == closing
        inside = done.tokens[:-1] if done.finish == "stop" else done.tokens
        wrong = complaint(tokenizer.decode(inside)) if ended else None
        if not ended:
            wrong = "cut off" if done.finish == "length" else "the document ended inside the turn"
        answers.append(Answer(prompt, done.text, ended, wrong))
    return answers


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """`{value, standard_error, samples, wrong: {complaint: times}}`; value is the share without a complaint."""
    value = sum(answer.wrong is None for answer in answers) / len(answers)
    wrong: dict[str, int] = {}
    for answer in answers:
        if answer.wrong is not None:
            wrong[answer.wrong] = wrong.get(answer.wrong, 0) + 1
    return {
        "value": value,
        "standard_error": (value * (1 - value) / len(answers)) ** 0.5,
        "samples": len(answers),
        "wrong": wrong,
    }
