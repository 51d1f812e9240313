"""Instructions that can be checked by looking at the text: the kinds of IFEval (arXiv 2311.07911), by their names.

Words are runs of letters and digits with inner apostrophes and hyphens; sentences end with . ! ? or their full-width
forms before white space, abbreviations and initials aside. IFEval's own counts come from NLTK's models and differ on
odd texts.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trinity.base.errors import UserError, nearest
from trinity.rl.rewards.attempt import Attempt

_WORD = re.compile("[^\\W_]+(?:['\N{RIGHT SINGLE QUOTATION MARK}-][^\\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]]*(?=\s|$)|[\u3002\uff01\uff1f]+")
_ABBREVIATIONS = frozenset(
    ("mr", "mrs", "ms", "dr", "prof", "st", "vs", "etc", "e.g", "i.e", "inc", "ltd", "no", "approx")
)
_LANGUAGES = {
    "ARABIC": "ar fa ur",
    "BENGALI": "bn",
    "CJK": "zh",
    "CYRILLIC": "bg ru uk",
    "DEVANAGARI": "hi mr ne",
    "GREEK": "el",
    "GUJARATI": "gu",
    "GURMUKHI": "pa",
    "HANGUL": "ko",
    "HEBREW": "he",
    "HIRAGANA": "ja",
    "KANNADA": "kn",
    "MALAYALAM": "ml",
    "TAMIL": "ta",
    "TELUGU": "te",
    "THAI": "th",
}
_SCRIPTS = {language: script for script, languages in _LANGUAGES.items() for language in languages.split()}
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def words(text: str) -> list[str]:
    return _WORD.findall(text)


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, white space around them removed."""
    found, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        last = text[start : end.start()].split()[-1:] or [""]
        word = last[0].lower().lstrip("(\"'\u201c\u2018")
        if end.group().startswith(".") and (
            word in _ABBREVIATIONS or re.fullmatch(r"[a-z]", word) or _is_marker(text, start, end.start())
        ):
            continue
        found.append(text[start : end.end()].strip())
        start = end.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if words(sentence)]


def _is_marker(text: str, start: int, end: int) -> bool:
    """Whether nothing but a number stands before the full stop: "1. First" is no sentence of its own."""
    line = text[max(start, text.rfind("\n", 0, end) + 1) : end]
    return bool(re.fullmatch(r"\s*\d{1,3}", line))


def paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _compare(count: int, relation: str, wanted: int) -> bool:
    if relation not in ("less than", "at least"):
        raise UserError(f"a relation is 'less than' or 'at least', not {relation!r}")
    return count < wanted if relation == "less than" else count >= wanted


def _has(text: str, phrase: str) -> int:
    """How often a word or phrase stands in a text as a whole, letters of either case."""
    return len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE))


def _existence(text: str, keywords: Sequence[str]) -> bool:
    return all(_has(text, keyword) for keyword in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(_has(text, keyword), relation, frequency)


def _forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(_has(text, word) for word in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def _language(text: str, language: str) -> bool:
    """By script, for languages that have one of their own or nearly so: at least half of the letters."""
    if language not in _SCRIPTS:
        raise UserError(
            f"the language {language!r} cannot be told by its script; those that can: {', '.join(_SCRIPTS)}"
        )
    scripts = Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
    if language == "ja":  # written in three scripts, of which one could be Chinese
        scripts["HIRAGANA"] += (scripts["KATAKANA"] + scripts["CJK"]) if scripts["HIRAGANA"] else 0
    return 2 * scripts[_SCRIPTS[language]] > sum(1 for c in text if c.isalpha())


def _number_words(text: str, num_words: int, relation: str) -> bool:
    return _compare(len(words(text)), relation, num_words)


def _number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compare(len(sentences(text)), relation, num_sentences)


def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are divided by lines of ***."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    inner = parts[1 if not parts[0].strip() else 0 : -1 if not parts[-1].strip() and len(parts) > 1 else None]
    return all(part.strip() for part in inner) and len(inner) == num_paragraphs


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    found = paragraphs(text)
    if len(found) != num_paragraphs or not 1 <= nth_paragraph <= len(found):
        return False
    first = words(found[nth_paragraph - 1])[:1]
    return bool(first) and first[0].lower() == first_word.lower()


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]]+\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    letters = [re.escape(letter) for letter in postscript_marker if letter.isalpha()]
    marker = r"\s*\.?\s*".join(letters)
    return re.search(rf"(?im)^\s*{marker}\b.*\S", text) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*(?!\*)|-(?!-))\s*\S", text, re.MULTILINE)) == num_bullets


def _one_of_three(text: str) -> bool:
    return any(option in text for option in _OPTIONS)


def _highlights(text: str, num_highlights: int) -> bool:
    found = re.findall(r"\*\*([^*\n]+)\*\*|\*([^*\n]+)\*", text)
    return sum(bool((double or single).strip()) for double, single in found) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"(?m)^\W*{re.escape(section_spliter.strip())}\s+\d+", text)) >= num_sections


def _json(text: str) -> bool:
    body = text.strip()
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?```", body, re.DOTALL | re.IGNORECASE)
    try:
        json.loads(fenced.group(1) if fenced else body)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(title.strip() for title in re.findall(r"<<([^<>\n]+)>>", text))


def _two(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    filled = [part for part in parts if part]
    return len(filled) == 2 and filled[0] != filled[1] and all(parts[1:-1])


def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _start(text: str, start_phrase: str) -> bool:
    return text.strip().lower().startswith(start_phrase.strip().lower())


def _quoted(text: str) -> bool:
    body = text.strip()
    return len(body) > 1 and body[0] == '"' and body[-1] == '"'


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _compare(sum(word.isupper() for word in words(text)), capital_relation, capital_frequency)


def _upper(text: str) -> bool:
    return text.isupper()


def _lower(text: str) -> bool:
    return text.islower()


def _no_comma(text: str) -> bool:
    return not set(text) & set(",\uff0c\u3001")


KINDS: dict[str, tuple[Callable[..., bool], tuple[str, ...]]] = {
    "keywords:existence": (_existence, ("keywords",)),
    "keywords:frequency": (_frequency, ("keyword", "frequency", "relation")),
    "keywords:forbidden_words": (_forbidden, ("forbidden_words",)),
    "keywords:letter_frequency": (_letters, ("letter", "let_frequency", "let_relation")),
    "language:response_language": (_language, ("language",)),
    "length_constraints:number_words": (_number_words, ("num_words", "relation")),
    "length_constraints:number_sentences": (_number_sentences, ("num_sentences", "relation")),
    "length_constraints:number_paragraphs": (_number_paragraphs, ("num_paragraphs",)),
    "length_constraints:nth_paragraph_first_word": (_first_word, ("num_paragraphs", "nth_paragraph", "first_word")),
    "detectable_content:number_placeholders": (_placeholders, ("num_placeholders",)),
    "detectable_content:postscript": (_postscript, ("postscript_marker",)),
    "detectable_format:number_bullet_lists": (_bullets, ("num_bullets",)),
    "detectable_format:constrained_response": (_one_of_three, ()),
    "detectable_format:number_highlighted_sections": (_highlights, ("num_highlights",)),
    "detectable_format:multiple_sections": (_sections, ("section_spliter", "num_sections")),
    "detectable_format:json_format": (_json, ()),
    "detectable_format:title": (_title, ()),
    "combination:two_responses": (_two, ()),
    "combination:repeat_prompt": (_repeat, ("prompt_to_repeat",)),
    "startend:end_checker": (_end, ("end_phrase",)),
    "startend:start_checker": (_start, ("start_phrase",)),
    "startend:quotation": (_quoted, ()),
    "change_case:capital_word_frequency": (_capital_words, ("capital_frequency", "capital_relation")),
    "change_case:english_capital": (_upper, ()),
    "change_case:english_lowercase": (_lower, ()),
    "punctuation:no_comma": (_no_comma, ()),
}
"""Kind -> (check, names of its settings), named as in IFEval's file; `start_checker` is ours."""


def follows(text: str, kind: str, settings: Mapping[str, Any]) -> bool:
    """Whether a text follows one instruction; an empty text follows none.

    Settings that are None count as not given. Raises UserError for an unknown kind or other settings than its own.
    """
    if kind not in KINDS:
        raise UserError(f"there is no constraint {kind!r}; choose from {', '.join(KINDS)}{nearest(kind, KINDS)}")
    check, names = KINDS[kind]
    given = {name: value for name, value in settings.items() if value is not None}
    if set(given) != set(names):
        raise UserError(
            f"the constraint {kind} has the settings {', '.join(names) or 'none'}, not {', '.join(given) or 'none'}"
        )
    return bool(text.strip()) and check(text, **given)


def all_followed(attempt: Attempt) -> float:
    """1 when the text follows every instruction of `info["constraints"]`, pairs of kind and settings."""
    return float(all(follows(attempt.text, kind, settings) for kind, settings in attempt.info["constraints"]))


def share_followed(attempt: Attempt) -> float:
    """The share of the instructions that the text follows."""
    asked = attempt.info["constraints"]
    return sum(follows(attempt.text, kind, settings) for kind, settings in asked) / len(asked)
