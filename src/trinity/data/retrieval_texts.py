"""What training documents about retrieval say: facts, questions about them and answers, as text.

Nothing of it meets the evaluation (`evals/needles.py`): every word of a key is of the training half (`halves.py`), no
key is two words with a hyphen, no value is a number of seven digits, and no wording is shared.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from trinity.base.rng import Draws
from trinity.data.halves import Half, half_of

T = TypeVar("T")
WORD = re.compile(r"[A-Za-z]{3,10}")
DIGITS = (3, 4, 5, 6, 8, 9, 10)
"""Lengths of numbers; 7 is the evaluation's."""


@dataclass(frozen=True)
class Group:
    """Statements, to be put anywhere in a text in this order, and questions with their answers, to come later.

    An answer follows its question directly and brings its own white space.
    """

    statements: list[str]
    questions: list[tuple[str, str]]


@dataclass(frozen=True)
class Style:
    """How the facts of one document are worded: {k} is the key, {v} the value, {n} the kind of value."""

    noun: str
    statement: str
    ask: str
    end: str
    """What follows an answer."""

    def state(self, key: str, value: str) -> str:
        return self.statement.format(n=self.noun, k=key, v=value)

    def question(self, key: str) -> str:
        return self.ask.format(n=self.noun, k=key)


_NOUNS = """
    code price weight address score budget ticket serial balance distance height label token password answer total
    position extension speed limit temperature rank order account locker room seat depth amount reference
""".split()  # noqa: SIM905
STATEMENTS = (
    "The {n} of {k} is {v}.",
    "{k} has the {n} {v}.",
    "For {k}, the {n} is {v}.",
    "Note: the {n} for {k} is: {v}.",
    "{k}: {v}",
    "{k} -> {v}",
    "{n} of {k}: {v}.",
    "Remember that {k} goes with the {n} {v}.",
    "A recent {n} written down for {k} was {v}.",
    'The {n} belonging to "{k}" reads {v}.',
    "As of today, {k} keeps {v} as its {n}.",
    "| {k} | {n} | {v} |",
)
ASKS = (
    "What is the {n} of {k}? The {n} of {k} is",
    "Question: which {n} belongs to {k}? Answer:",
    "The text above gives a {n} for {k}, namely",
    "{n} of {k}:",
    "{k} ->",
    "{k}:",
    "Recall the {n} of {k}. The {n} of {k}, as told above, is:",
    "As stated before, the {n} of {k} was",
    "Which {n} was written down for {k} in this document? The {n} written down for {k} in this document was:",
    'Look up "{k}" and give its {n}:',
    "Earlier in the text {k} came with a {n}. That {n} reads",
    "{k} has the {n}",
)
QUESTIONS = (
    "Which {n} belongs to {k}{w}",
    "What {n} does {k} have{w}",
    "Can you tell the {n} of {k}{w}",
    "Do you recall the {n} that {k} had{w}",
    "What was written down as the {n} of {k}{w}",
    "Someone asks for the {n} of {k}{w}; what should one say",
    "{k}: what {n} goes with it{w}",
    "Which {n} stands beside {k}{w}",
)
LEADS = (
    "The {n} of {k}{w} is",
    "The {n} for {k}{w} is:",
    "The {n} that belongs to {k}{w} is",
    "The {n} written down for {k}{w} was:",
    "{k}{w} has the {n}",
    "For {k}{w}, the {n} is:",
    "The {n} standing beside {k}{w} reads",
    "It is",
    "Answer:",
    "{k}:",
)
WHERES = (
    "",
    "",
    " in this document",
    " in the pages above",
    " according to what was said before",
    " as noted earlier",
    " by the lines above",
    ", if one reads all of it,",
    " somewhere on these pages",
)
"""Questions and the beginnings of their answers go together at will, so that no single wording has to be learned: a
model that knew only a few found every needle that was asked for in one of them, and guessed where not."""
INTROS = (
    "",
    "Notes stand between the lines of this document. Keep them in mind.\n",
    "Some entries are scattered over the pages below; questions about them follow.\n",
    "Read on and remember what is written down about each name.\n",
)
_ENDS = (".", ".", "\n", "", " .", ";")
_SYLLABLES = """
    ba be bo da den do fa fin fo ga gor gu ha hel ho ka kel kin la lin lo ma mar mi na nel no pa pen ra ren ri sa sol
    ta tar tu va ven vi wa zan zo
""".split()  # noqa: SIM905


class Vocabulary:
    """Words that keys and values are made of, all of the training half: given ones, and made-up ones."""

    def __init__(self, words: Sequence[str] = ()) -> None:
        self._words = sorted(
            {word for word in words if WORD.fullmatch(word) and half_of(word.lower()) is Half.TRAINING}
        )

    def word(self, draws: Draws) -> str:
        if self._words and draws.below(4):
            return self._words[draws.below(len(self._words))].lower()
        while True:
            word = "".join(pick(draws, _SYLLABLES) for _ in range(2 + draws.below(2)))
            if half_of(word) is Half.TRAINING:
                return word

    def key(self, draws: Draws, form: int) -> str:
        """A key of one of KEY_FORMS forms."""
        first, second = self.word(draws), self.word(draws)
        match form:
            case 0:
                return f"{first} {second}"
            case 1:
                return f"{first}_{second}"
            case 2:
                return f"{first}/{second}"
            case 3:
                return f"{first.capitalize()} {second.capitalize()}"
            case 4:
                return f"the {first} {second}"
            case 5:
                return f"{first}-{second}-{self.word(draws)}"
            case 6:
                return f"{first.capitalize()} {self.number(draws, 3)}"
            case 7:
                return first
            case 8:
                return first.capitalize()
            case _:
                return f"{first}.{second}"

    def value(self, draws: Draws, form: int) -> str:
        """A value of one of VALUE_FORMS forms; most are numbers."""
        if form < len(DIGITS):
            return self.number(draws, DIGITS[form])
        if form == len(DIGITS):
            return f"{self.word(draws)} {self.word(draws)}"
        return f"{self.word(draws)[:2].upper()}-{self.number(draws, 4)}"

    def number(self, draws: Draws, digits: int) -> str:
        while True:
            number = str(10 ** (digits - 1) + draws.below(9 * 10 ** (digits - 1)))
            if half_of(number) is Half.TRAINING:
                return number


KEY_FORMS = 10
VALUE_FORMS = len(DIGITS) + 2


def pick(draws: Draws, choices: Sequence[T]) -> T:
    return choices[draws.below(len(choices))]


class Scene:
    """What the facts of one document have in common, so that each distracts from the others: wording and forms."""

    def __init__(self, draws: Draws, vocabulary: Vocabulary) -> None:
        self.draws, self.vocabulary = draws, vocabulary
        statement = pick(draws, STATEMENTS)
        before = statement.partition("{v}")[0].rstrip()
        # A third of the questions begin the statement again: the shortest way to learn that looking back pays.
        ask = before if "{k}" in before and draws.below(3) == 0 else _ask(draws)
        self.style = Style(pick(draws, _NOUNS), statement, ask, pick(draws, _ENDS))
        self.key_form, self.value_form = draws.below(KEY_FORMS), draws.below(VALUE_FORMS)
        self._used: set[str] = set()

    def key(self) -> str:
        return self._new(lambda: self.vocabulary.key(self.draws, self.key_form))

    def value(self) -> str:
        return self._new(lambda: self.vocabulary.value(self.draws, self.value_form))

    def word(self) -> str:
        return self._new(lambda: self.vocabulary.word(self.draws))

    def _new(self, draw: Callable[[], str]) -> str:
        while (text := draw()) in self._used:
            pass
        self._used.add(text)
        return text


def _ask(draws: Draws) -> str:
    """A way to ask: one of the short ones, or a question and the beginning of its answer."""
    if draws.below(4) == 0:
        return pick(draws, ASKS)
    where = pick(draws, WHERES)
    question = pick(draws, QUESTIONS).replace("{w}", where)
    lead = pick(draws, LEADS).replace("{w}", where if draws.below(2) else pick(draws, WHERES))
    return f"{question}? {lead}" if draws.below(4) else lead


def lookup(scene: Scene) -> Group:
    """One key, one value."""
    key, value, style = scene.key(), scene.value(), scene.style
    return Group([style.state(key, value)], [(style.question(key), f" {value}{style.end}")])


def values(scene: Scene) -> Group:
    """One key that is given several values: all of them in the order in which they were given."""
    key, style = scene.key(), scene.style
    several = [scene.value() for _ in range(2 + scene.draws.below(3))]
    ask = f"Every {style.noun} given for {key}, in order:"
    return Group([style.state(key, value) for value in several], [(ask, f" {', '.join(several)}.")])


def queries(scene: Scene) -> Group:
    """Several keys asked for together."""
    style = scene.style
    facts = [(scene.key(), scene.value()) for _ in range(2 + scene.draws.below(3))]
    keys = [key for key, _ in facts]
    ask = f"For {', '.join(keys[:-1])} and {keys[-1]}, one {style.noun} each:"
    answer = f" {', '.join(value for _, value in facts)}."
    return Group([style.state(*fact) for fact in facts], [(ask, answer)])


def tracking(scene: Scene) -> Group:
    """A chain of names that stand for one value: the value behind the last, and all names of the chain."""
    names = [scene.word() for _ in range(2 + scene.draws.below(3))]
    value = scene.value()
    steps = [f"From now on {names[0]} holds {value}."]
    steps += [f"From now on {new} holds what {old} holds." for old, new in pairwise(names)]
    questions = [
        (f"What does {names[-1]} hold? In the end {names[-1]} holds", f" {value}."),
        (f"Which names hold {value}? They are", f" {', '.join(names)}."),
    ]
    return Group(steps, [questions[scene.draws.below(2)]])


def count(scene: Scene) -> Group:
    """How often something happened."""
    name, times = scene.word(), 1 + scene.draws.below(6)
    ask = f"How many times was the bell of {name} heard? The number of times is"
    return Group([f"The bell of {name} was heard."] * times, [(ask, f" {times}.")])


def where(scene: Scene) -> Group:
    """Where something was said: a heading before the fact, or the fact that a value belongs to."""
    key, value, style, page = scene.key(), scene.value(), scene.style, scene.value()
    if scene.draws.below(2):
        return Group([style.state(key, value)], [(f"Who has the {style.noun} {value}? It is", f" {key}.")])
    ask = f"On which page does it say something about {key}? Page"
    return Group([f"Page {page}. {style.state(key, value)}"], [(ask, f" {page}.")])


TASKS: dict[str, Callable[[Scene], Group]] = {
    "lookup": lookup,
    "values": values,
    "queries": queries,
    "tracking": tracking,
    "count": count,
    "where": where,
}
"""By name; `quote` is made of the haystack itself (`retrieval.py`)."""
