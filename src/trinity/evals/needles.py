"""The material of needle-in-a-haystack texts: keys, values, wordings and haystacks of the evaluation.

Tasks and wordings are RULER's (arXiv 2404.06654, appendix B). Every word of a key, every value and every document of a
haystack is of the evaluation's half (`data/halves.py`); training documents (`data/retrieval.py`) are of the other one.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trinity.base.errors import UserError
from trinity.base.rng import Draws
from trinity.data.halves import Half, half_of

Encode = Callable[[Sequence[str]], list[np.ndarray]]
"""Texts -> ids of each (`Tokenizer.encode_batch`)."""


@dataclass(frozen=True)
class Wording:
    """How needles are stated and asked for. `needle` and `ask` hold {key}, `needle` also {value}.

    The answer follows `ask` after one space; `intro` opens the text.
    """

    intro: str
    needle: str
    ask: str


_INTRO = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards.\n"
)
_NEEDLE = "One of the special magic numbers for {key} is: {value}."
ONE = Wording(
    _INTRO,
    _NEEDLE,
    "\nWhat is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is:",
)
"""One number asked for (niah_single, niah_multikey)."""
SEVERAL = Wording(
    _INTRO,
    _NEEDLE,
    "\nWhat are all the special magic numbers for {key} mentioned in the provided text? "
    "The special magic numbers for {key} mentioned in the provided text are:",
)
"""Several numbers asked for, of one key (niah_multivalue) or of several (niah_multiquery)."""
TRACKING = Wording(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n",
    "VAR {key} = {value}",
    "\nQuestion: Find all variables that are assigned the value {key} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, {count} variables are assigned the value {key}, they are:",
)
"""Variable tracking: names that stand for one value, directly or through others."""

_ADJECTIVES = """
    able amber ancient bitter blue bold brave brief bright brisk broad calm clean clever cold coral crisp curly dark
    deep dense dry dusty eager early easy empty exact faint fair fancy fast fierce fine firm flat fresh frosty
    gentle giant glad golden grand gray green happy hasty heavy hollow honest humble icy idle jolly keen kind large
    late lazy light little lively local lone loud loyal lucky mellow merry mild misty modest narrow neat noble odd
    old olive open orange pale patient plain polite proud purple quick quiet rapid rare red rich rigid ripe rough
    round royal rural rusty salty sandy scarlet sharp shiny short shy silent silver simple sleepy slim slow small
    smart smooth soft solid sour spare steady steep stiff still strange strict strong sunny sweet swift tall tame
    tender thick thin tidy tiny tough urban vast violet warm wary weary wet white wide wild windy wise witty wooden
    worthy yellow young
""".split()  # noqa: SIM905
_NOUNS = """
    acorn anchor apple arrow badge banjo barn basin basket beach beacon bell bench berry bird board boat bottle
    branch bread brick bridge brook broom bucket cabin cable camel candle canoe canyon carpet castle cedar chain
    chair cherry circle cliff clock cloud coach coin comet copper cotton cradle crane creek crown curtain daisy
    desert donkey door dragon drum eagle engine falcon feather fence ferry field finger flag flame flute forest fork
    fountain fox garden gate glove goose grape guitar hammer harbor hawk helmet hill horn horse island ivory jacket
    jungle kettle kite ladder lake lamp lantern leaf lemon lion lizard lobby magnet mango maple marble meadow mirror
    monkey moon mountain mouse needle nest oak ocean onion orchard otter oven owl oyster paddle palace panda paper
    parrot pebble pencil pepper piano pigeon pillow pine planet plum pond pony potato prairie puzzle rabbit raven
    ribbon river robin rocket rope rose saddle sailor shadow sheep shell shovel silk spider spoon spring squirrel
    stable star stone storm sugar table temple thunder tiger timber torch tower train tulip tunnel turtle valley
    village violin wagon walnut water whale wheat wheel willow window winter wizard wolf zebra
""".split()  # noqa: SIM905
_VERBS = """
    crosses follows guards hides holds leaves meets passes reaches remembers sees touches turns visits watches
""".split()  # noqa: SIM905
_PLACES = (
    "above the roof",
    "after the rain",
    "at noon",
    "before dawn",
    "behind the wall",
    "beside the road",
    "by the water",
    "during the feast",
    "in the dark",
    "in the square",
    "near the market",
    "on the way home",
    "over the hill",
    "past the gate",
    "under the bridge",
    "without a word",
)


_OF_HALF = {
    (half, name): [word for word in words if half_of(word) is half]
    for half in Half
    for name, words in (("adjectives", _ADJECTIVES), ("nouns", _NOUNS))
}


def draw_keys(draws: Draws, num_keys: int, half: Half) -> list[str]:
    """Different keys (adjective-noun), both words of one half."""
    keys: list[str] = []
    adjectives, nouns = (_OF_HALF[half, words] for words in ("adjectives", "nouns"))
    while len(keys) < num_keys:
        key = f"{_pick(draws, adjectives)}-{_pick(draws, nouns)}"
        if key not in keys:
            keys.append(key)
    return keys


def draw_names(draws: Draws, num_names: int, half: Half) -> list[str]:
    """Different names of variables, five capital letters, of one half."""
    names: list[str] = []
    while len(names) < num_names:
        name = "".join(chr(ord("A") + draws.below(26)) for _ in range(5))
        if half_of(name) is half and name not in names:
            names.append(name)
    return names


def draw_values(draws: Draws, num_values: int, half: Half, digits: int) -> list[str]:
    """Different numbers of `digits` digits (no leading zero) of one half."""
    values: list[str] = []
    while len(values) < num_values:
        value = str(10 ** (digits - 1) + draws.below(9 * 10 ** (digits - 1)))
        if half_of(value) is half and value not in values:
            values.append(value)
    return values


class Haystack:
    """Endless sentences of one half: of given documents, drawn at random and read from their start, or of generated
    noise.

    A document belongs to the half of its whole text's hash. Raises UserError when no document of this half is given.
    """

    def __init__(self, half: Half, documents: Sequence[str] | None = None):
        self.half = half
        self._encoded: dict[int, list[list[int]]] = {}
        self._documents: list[str] | None = None
        if documents is not None:
            self._documents = [text for text in documents if half_of(text) is half and text.strip()]
            if not self._documents:
                raise UserError(
                    f"none of the {len(documents)} documents given for haystacks falls into the {half.name.lower()} "
                    "half; give more documents, or none to use generated noise"
                )

    @classmethod
    def of(cls, half: Half, documents: Sequence[str]) -> "Haystack":
        """Documents of the half, or noise when none of those given belongs to it; `kind` tells which."""
        own = [text for text in documents if half_of(text) is half and text.strip()]
        return cls(half, own or None)

    @property
    def kind(self) -> str:
        return "noise" if self._documents is None else "documents"

    def pieces(self, draws: Draws, encode: Encode) -> Iterator[list[int]]:
        """`sentences`, each with a space before it, as tokens; a document is encoded once for each `Haystack`."""
        if self._documents is None:
            for sentence in self.sentences(draws):
                yield encode([f" {sentence}"])[0].tolist()
        else:
            while True:
                number = draws.below(len(self._documents))
                if number not in self._encoded:
                    texts = [f" {sentence}" for sentence in split_sentences(self._documents[number])]
                    self._encoded[number] = [ids.tolist() for ids in encode(texts)]
                yield from self._encoded[number]

    def sentences(self, draws: Draws) -> Iterator[str]:
        while True:
            if self._documents is None:
                sentence = _noise(draws)
                if half_of(sentence) is self.half:
                    yield sentence
            else:
                yield from split_sentences(self._documents[draws.below(len(self._documents))])


def split_sentences(text: str) -> list[str]:
    """Pieces between sentence ends, white space at their borders dropped."""
    return [piece.strip() for piece in re.split(r"(?<=[.!?])\s+|\n+", text) if piece.strip()]


def _noise(draws: Draws) -> str:
    first, second = _pick(draws, _NOUNS), _pick(draws, _NOUNS)
    return f"The {_pick(draws, _ADJECTIVES)} {first} {_pick(draws, _VERBS)} the {second} {_pick(draws, _PLACES)}."


def _pick(draws: Draws, words: Sequence[str]) -> str:
    return words[draws.below(len(words))]
