"""What makes a rewrite useless whatever its form: copied, off length, another language, made-up numbers, refusals."""

import re
import unicodedata
from functools import cache

import numpy as np

from trinity.curate.language import NONE, identify
from trinity.curate.recipes import Recipe
from trinity.curate.words import shingles, word_hashes
from trinity.data.filters import judge

COPIED_RUN = 8
REPEATED_RUN = 6
LEAKED_RUN = 8
"""Words in a row that count as copied from the passage, as said before, as leaked from the prompt."""
SURE = 0.8
"""Probability from which the identified language of a rewrite is believed against the expected one."""
SHORT = 60
"""Characters below which nothing is said about a language."""

_NUMBER = re.compile(r"\d+(?:[.,'\u2019\u00a0\u202f]\d+)*")
_NUMBERING = re.compile(r"^[ \t]*(?:[-*•|]\s*)?\d+[.)]\s", re.MULTILINE)
_REFUSAL = re.compile(
    r"""^\W*(?:
    (?:i\s+am|i['\u2019]m)\s+(?:very\s+)?(?:sorry|unable|not\s+able) | sorry,?
    | i\s+(?:can(?:['\u2019]t|\s*not)|won['\u2019]t|must\s+decline)
    | (?:as|being)\s+an?\s+(?:ai|artificial|language\s+model) | unfortunately,?\s+i | i\s+apologi[sz]e
    | es\s+tut\s+mir\s+leid | ich\s+kann\s+(?:leider\s+)?(?:nicht|keine?)
    | (?:je\s+suis\s+)?désolée? | je\s+ne\s+peux\s+pas
    | lo\s+siento | no\s+puedo | desculpe | não\s+posso | mi\s+dispiace | non\s+posso | извините | к\s+сожалению,\s+я
    | 抱歉 | 对不起 | 我无法 | 申し訳 | 죄송
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_ABOUT_ITSELF = re.compile(
    r"\b(?:as an ai\b|ai language model|language model trained|i cannot (?:assist|help|fulfil+) |my training data)",
    re.IGNORECASE,
)
_LEAK = re.compile(
    r"<\|[a-z_]+\|>|</?(?:think|tool_call|system|user|assistant)>|\[/?INST\]|^\W*(?:sure|certainly|of course|okay)[,!:]"
    r"|^\W*here(?:['\u2019]s| is| are) (?:the|a|an|your|my)\b.{0,80}:\s*$"
    r"|\b(?:the|this) (?:passage|text) (?:above|below|provided)|\bprovided passage\b",
    re.IGNORECASE | re.MULTILINE,
)


def find_fault(text: str, passage: str, recipe: Recipe, language: str, asked: str | None) -> str | None:
    """The first reason to drop a rewrite of a passage in `language`; `asked` is the language that was asked for."""
    checks = recipe.checks
    if not text.strip():
        return "empty"
    if is_refusal(text):
        return "refusal"
    if leaks_prompt(text, passage, recipe):
        return "leaked prompt"
    if len(text) < checks.min_chars or len(text) < checks.min_length * len(passage):
        return "too short"
    if len(text) > max(checks.max_length * len(passage), checks.min_chars):
        return "too long"
    broken = judge(text, 1, None, quality=True)
    if broken is not None:
        return broken
    if repeated(text) > checks.max_repeated:
        return "repetition"
    if copied(text, passage) > checks.max_copied:
        return "copied"
    known, kept = numbers_kept(text, passage)
    if known < checks.min_numbers_known:
        return "made-up numbers"
    if kept < checks.min_numbers_kept:
        return "lost numbers"
    expected = {"kept": language, "asked": asked or NONE, "any": NONE}[checks.language]
    return None if speaks(text, expected) else "another language"


def copied(text: str, passage: str) -> float:
    """Share of the words of a text that lie in runs of COPIED_RUN words which the passage has too."""
    words = word_hashes(text)
    if len(words) < COPIED_RUN:
        return 0.0
    same = np.isin(shingles(words, COPIED_RUN), shingles(word_hashes(passage), COPIED_RUN))
    ends = np.zeros(len(words) + 1, np.int64)
    np.add.at(ends, np.flatnonzero(same), 1)
    np.add.at(ends, np.flatnonzero(same) + COPIED_RUN, -1)
    return float((ends.cumsum()[:-1] > 0).mean())


def repeated(text: str) -> float:
    """Share of the runs of REPEATED_RUN words that stood in the text before."""
    words = word_hashes(text)
    if len(words) < 2 * REPEATED_RUN:
        return 0.0
    runs = shingles(words, REPEATED_RUN)
    return 1.0 - len(np.unique(runs)) / len(runs)


def numbers(text: str) -> set[str]:
    """The numbers of a text from 10 up, as digits without separators: 1,250.5 and 1.250,5 are the same.

    The numbering of lists does not count, nor do small numbers, which may as well be words."""
    found = set()
    for match in _NUMBER.findall(_NUMBERING.sub("", text)):
        digits = "".join(str(unicodedata.digit(c)) for c in match if c.isdecimal()).lstrip("0")
        if len(digits) >= 2:
            found.add(digits)
    return found


def numbers_kept(text: str, passage: str) -> tuple[float, float]:
    """(share of the text's numbers that the passage has, share of the passage's numbers that the text has)."""
    own, given = numbers(text), numbers(passage)
    both = len(own & given)
    return (both / len(own) if own else 1.0), (both / len(given) if given else 1.0)


def is_refusal(text: str) -> bool:
    """Whether a text begins by declining the task, or speaks of itself as a model."""
    return _REFUSAL.match(text) is not None or _ABOUT_ITSELF.search(text) is not None


def leaks_prompt(text: str, passage: str, recipe: Recipe) -> bool:
    """Whether a text shows marks of a conversation, a preface, or a run of the prompt's words."""
    found = _LEAK.search(text)
    if found is not None and found.group() not in passage:
        return True
    words = word_hashes(text)
    if len(words) < LEAKED_RUN:
        return False
    runs = shingles(words, LEAKED_RUN)
    leaked = runs[np.isin(runs, _prompt_runs(recipe.system + "\n" + recipe.user.replace("{text}", "")))]
    return bool(len(leaked)) and not np.isin(leaked, shingles(word_hashes(passage), LEAKED_RUN)).all()


def speaks(text: str, expected: str) -> bool:
    """Whether a text may be in the expected language; nothing is said about short texts."""
    if expected == NONE or len(text) < SHORT:
        return True
    code, probability = identify(text)
    return code == expected or probability < SURE


@cache
def _prompt_runs(prompt: str) -> np.ndarray:
    words = word_hashes(prompt)
    return shingles(words, LEAKED_RUN) if len(words) >= LEAKED_RUN else np.zeros(0, np.uint64)
