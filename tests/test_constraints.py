"""Instructions that a text follows or not: each kind with texts on both sides of its line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity.base.errors import UserError
from trinity.rl.rewards import Attempt
from trinity.rl.rewards.constraints import KINDS, all_followed, follows, sentences, share_followed, words

AT_LEAST, LESS = "at least", "less than"
CASES = [
    (
        "keywords:existence",
        {"keywords": ["sea", "old boat"]},
        "An Old boat on the sea.",
        "The seaside and an old boats.",
    ),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": AT_LEAST}, "a b A", "a banana"),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": LESS}, "a banana", "a a"),
    ("keywords:forbidden_words", {"forbidden_words": ["no"]}, "Nothing known", "I say No."),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 3, "let_relation": AT_LEAST}, "Eee", "see"),
    ("language:response_language", {"language": "ko"}, "안녕하세요 여러분 ok", "hello 안녕"),
    ("language:response_language", {"language": "ja"}, "これは日本語のテキストです", "这是中文"),
    ("language:response_language", {"language": "zh"}, "这是中文", "これはひらがなです"),
    ("language:response_language", {"language": "ru"}, "Привет, мир", "Hello, мир"),
    ("length_constraints:number_words", {"num_words": 3, "relation": AT_LEAST}, "one two three", "one-and two"),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": AT_LEAST},
        "One. Two!",
        "Dr. A. Smith left.",
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": LESS}, "It costs 3.50 now.", "One. Two."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\na\n***\nb\n***", "a\n***\n***\nb"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        'First.\n\n"Then, so.',
        "Then.\n\nFirst.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b c]", "[a] and []"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Yours\nP.S. More", "Yours PS. More"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "x\nP.P.S more", "x\nP.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n- b\n- c"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "- a\n**bold**\n---", "**a** b"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "Maybe."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and ** **"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\nx\n# Section 2\ny",
        "Section 1\nsee Section 2",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<A song>>\nx", "<< >>\nx"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Write it."}, "write it. Here", "Here: write it."),
    ("startend:end_checker", {"end_phrase": "The end."}, 'So. "the end."', "The end. Or not"),
    ("startend:start_checker", {"start_phrase": "Dear"}, " dear you", "My dear"),
    ("startend:quotation", {}, '"all of it"', '"only" this'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": AT_LEAST},
        "THE sea is OLD",
        "The SEA",
    ),
    ("change_case:english_capital", {}, "ALL 3 OF IT", "All"),
    ("change_case:english_lowercase", {}, "all 3 of it", "All"),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
]


@pytest.mark.parametrize(("kind", "settings", "good", "bad"), CASES)
def test_both_sides_of_the_line(kind: str, settings: dict, good: str, bad: str) -> None:
    assert follows(good, kind, settings)
    assert not follows(bad, kind, settings)
    assert not follows(" \n", kind, settings)  # saying nothing follows no instruction


def test_every_kind_is_tried() -> None:
    assert {case[0] for case in CASES} == set(KINDS)


def test_unknown_kinds_and_settings_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'startend:quotation'"):
        follows("x", "startend:quotatio", {})
    with pytest.raises(UserError, match="has the settings num_words, relation, not num_words"):
        follows("x", "length_constraints:number_words", {"num_words": 3, "relation": None})
    with pytest.raises(UserError, match="not 'exactly'"):
        follows("x", "length_constraints:number_words", {"num_words": 3, "relation": "exactly"})
    with pytest.raises(UserError, match="'en' cannot be told by its script"):
        follows("x", "language:response_language", {"language": "en"})


def test_rewards_over_several() -> None:
    constraints = [("punctuation:no_comma", {}), ("startend:quotation", {})]
    both, one = Attempt.of_text('"a b"', constraints=constraints), Attempt.of_text("a b", constraints=constraints)
    assert (all_followed(both), share_followed(both)) == (1.0, 1.0)
    assert (all_followed(one), share_followed(one)) == (0.0, 0.5)


@given(st.lists(st.text(st.characters(categories=["Lu", "Ll"]), min_size=1, max_size=9), min_size=1, max_size=30))
def test_counts_of_plain_words(parts: list[str]) -> None:
    text = " ".join(parts)
    assert words(text) == parts
    count = len(parts)
    for bound in (count - 1, count, count + 1):
        settings = {"num_words": bound, "relation": AT_LEAST}
        assert follows(text, "length_constraints:number_words", settings) == (count >= bound)
        settings["relation"] = LESS
        assert follows(text, "length_constraints:number_words", settings) == (count < bound)


@given(st.integers(1, 20), st.sampled_from([".", "!", "?", "..."]))
def test_counts_of_plain_sentences(count: int, mark: str) -> None:
    assert len(sentences(" ".join(f"The boat number {i} left the harbour{mark}" for i in range(count)))) == count


@given(st.text(max_size=200))
def test_any_text_is_judged(text: str) -> None:
    for kind, settings, _, _ in CASES:
        assert follows(text, kind, settings) in (True, False)
