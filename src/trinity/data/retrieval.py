"""Training documents that ask for what they said: facts hidden in real text, and questions with answers.

Document n is made by (seed, n, length) alone. Its facts share a wording, so that each distracts from the others; part
of its questions stand inside the text, soon or long after what they ask for, the rest at its end. Only answers bear a
loss: the facts themselves cannot be foreseen, and the text around them is trained on elsewhere.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trinity.base.errors import UserError
from trinity.base.files import atomic_write
from trinity.base.rng import Draws, derive
from trinity.config import RetrievalConfig
from trinity.data.retrieval_texts import INTROS, TASKS, WORD, Group, Scene, Vocabulary, pick
from trinity.data.rows import IGNORE, DocumentStore
from trinity.tokenizer import Tokenizer

QUOTE = "quote"
TASK_NAMES = (*TASKS, QUOTE)
Encode = Callable[[Sequence[str]], list[list[int]]]
LEAST_TOKENS = 160
"""Shorter documents may have no room for a fact and its question."""
_QUOTED = 24  # tokens of a quotation that are to be told
_CUE = 8  # tokens that it begins with
_SAMPLE_RUNS, _SAMPLE_TOKENS = 256, 512


class Hay:
    """Runs of consecutive tokens of a store's documents, a place in the corpus being as likely as any other.

    Only documents of at least `least` tokens are used, if there are any.
    """

    def __init__(self, store: DocumentStore, tokenizer: Tokenizer, least: int = 512) -> None:
        lengths = np.asarray(store.lengths, np.int64)
        docs = np.flatnonzero(lengths > least)
        self._docs = docs if len(docs) else np.flatnonzero(lengths > 1)
        if not len(self._docs):
            raise UserError("there is no document that a haystack could be made of")
        self._store, self._ends = store, np.cumsum(lengths[self._docs] - 1)  # without their eos
        self.fingerprint = store.fingerprint
        ends_V = [
            tokenizer.decode_bytes([token]).rstrip(b" ")[-1:] in (b".", b"\n") for token in range(tokenizer.vocab_size)
        ]
        self._ends_V = np.array(ends_V)
        found = set[str]()
        draws = Draws(derive(0, "words"))
        for _ in range(min(_SAMPLE_RUNS, 4 * len(self._docs))):
            found.update(WORD.findall(tokenizer.decode(self.run(draws, _SAMPLE_TOKENS), skip_special=True)))
        self.words = sorted(found)

    def run(self, draws: Draws, most: int) -> np.ndarray:
        """At most `most` tokens from a random place to the end of its document, int64."""
        place = draws.below(int(self._ends[-1]))
        nth = int(np.searchsorted(self._ends, place, side="right"))
        start = place - (int(self._ends[nth - 1]) if nth else 0)
        doc = int(self._docs[nth])
        stop = min(start + most, int(self._store.lengths[doc]) - 1)
        return np.asarray(self._store.tokens(doc, start, stop), np.int64)

    def text(self, draws: Draws, size: int) -> np.ndarray:
        """Exactly `size` tokens: runs one after the other."""
        runs, left = [np.empty(0, np.int64)], size
        while left:
            runs.append(self.run(draws, left))
            left -= len(runs[-1])
        return np.concatenate(runs)

    def slots(self, text: np.ndarray) -> np.ndarray:
        """Places of a text where something may be put: its start, its end and behind sentences."""
        behind = np.flatnonzero(self._ends_V[text]) + 1
        return np.unique(np.concatenate([[0], behind, [len(text)]]))


@dataclass(frozen=True)
class Document:
    """Tokens int64 [T], the last one eos, and targets int64 [T]: the next token where an answer's token is next."""

    tokens_T: np.ndarray
    targets_T: np.ndarray


@dataclass(frozen=True)
class _Piece:
    """Tokens to be put into the text; those from `answer` on are to be learned."""

    tokens: list[int]
    answer: int
    place: float
    """From 0 to 1: where in the text."""


class RetrievalDocuments:
    """Documents by number; `settings.tasks` are weights of the tasks."""

    def __init__(self, tokenizer: Tokenizer, hay: Hay, settings: RetrievalConfig, seed: int) -> None:
        self._tokenizer, self._hay, self._settings, self._seed = tokenizer, hay, settings, seed
        self._vocabulary = Vocabulary(hay.words)
        self._tasks = list(settings.tasks)
        self._shares = np.cumsum(list(settings.tasks.values()))

    @property
    def fingerprint(self) -> str:
        """Changes with whatever changes a document."""
        settings = self._settings.model_dump(mode="json")
        parts = [self._tokenizer.fingerprint, self._hay.fingerprint, self._seed, settings]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def document(self, number: int, length: int) -> Document:
        """Document `number` of exactly `length` >= LEAST_TOKENS tokens."""
        assert length >= LEAST_TOKENS, length
        draws = Draws(derive(self._seed, "retrieval", number, length))
        encode = self._encoder()
        intro = encode([pick(draws, INTROS)])[0]
        low, high = self._settings.density
        density = low * (high / low) ** (draws.below(1001) / 1000)
        budget, room = round(density * length), length - len(intro) - 1
        scene = Scene(draws, self._vocabulary)
        kept = self._task(draws)
        pieces: list[_Piece] = []
        quotes: list[float] = []
        used, misses = 0, 0
        while misses < 8 and (used < budget or not (pieces or quotes)):
            task = kept if draws.below(4) else self._task(draws)  # mostly one kind, so that facts distract
            if task == QUOTE:
                quotes.append(draws.below(1001) / 1000)
                cost = len(_quote_words(encode)) + _CUE + _QUOTED
                new: list[_Piece] = []
            else:
                new = self._placed(draws, encode, TASKS[task](scene))
                cost = sum(len(piece.tokens) for piece in new)
            if used + cost > room:
                if task == QUOTE:
                    quotes.pop()
                misses += 1
                scene = Scene(draws, self._vocabulary) if not pieces else scene  # another one may be shorter
                continue
            pieces += new
            used += cost
        if room - used < 2 * (_CUE + _QUOTED):  # too little text to quote from
            used, quotes = sum(len(piece.tokens) for piece in pieces), []
        text = self._hay.text(draws, room - used)
        slots = self._hay.slots(text)
        for depth in quotes:
            piece, start = self._quote(draws, encode, text, depth)
            pieces.append(piece)
            slots = slots[(slots <= start) | (slots >= start + _CUE + _QUOTED)]  # nothing comes between
        return self._assemble(intro, text, slots, pieces)

    def _task(self, draws: Draws) -> str:
        at = draws.below(1 << 30) / (1 << 30) * self._shares[-1]
        return self._tasks[int(np.searchsorted(self._shares, at, side="right"))]

    def _encoder(self) -> Encode:
        known: dict[str, list[int]] = {}

        def encode(texts: Sequence[str]) -> list[list[int]]:
            missing = [text for text in dict.fromkeys(texts) if text not in known]
            for text, ids in zip(missing, self._tokenizer.encode_batch(missing) if missing else [], strict=True):
                known[text] = ids.tolist()
            return [known[text] for text in texts]

        return encode

    def _placed(self, draws: Draws, encode: Encode, group: Group) -> list[_Piece]:
        """The group's pieces: statements in order at random places, questions behind the last of them."""
        lead, tail = (" ", "") if draws.below(2) else ("\n", "\n")
        statements = encode([f"{lead}{text}{tail}" for text in group.statements])
        places = sorted(draws.below(10**6) / 10**6 for _ in statements)
        pieces = [_Piece(ids, len(ids), place) for ids, place in zip(statements, places, strict=True)]
        for question, answer in group.questions:
            asked, told = encode([f"\n{question}", answer])
            last = places[-1]
            place = 1.0 if draws.below(2) else last + (1 - last) * draws.below(10**6) / 10**6
            pieces.append(_Piece(asked + told, len(asked), place))
        return pieces

    def _quote(self, draws: Draws, encode: Encode, text: np.ndarray, depth: float) -> tuple[_Piece, int]:
        """A question for what the text said after some of its words, and where these are."""
        size, words = _CUE + _QUOTED, _quote_words(encode)
        start = round(depth * (len(text) - size))
        after = (start + size) / len(text)
        place = 1.0 if draws.below(2) else after + (1 - after) * draws.below(10**6) / 10**6
        passage = text[start : start + size].tolist()
        return _Piece(words + passage, len(words) + _CUE, place), start

    def _assemble(self, intro: list[int], text: np.ndarray, slots: np.ndarray, pieces: Sequence[_Piece]) -> Document:
        wanted = np.array([piece.place for piece in pieces])
        # The slot at or behind the place; both ends stay ends, and a question never comes before what it asks for,
        # because equal slots keep the order of places.
        nth = np.minimum(np.searchsorted(slots, wanted * len(text)), len(slots) - 1)
        parts, learned, at = [np.asarray(intro, np.int64)], [np.zeros(len(intro), bool)], 0
        for index in sorted(range(len(pieces)), key=lambda index: (nth[index], wanted[index], index)):
            piece, slot = pieces[index], int(slots[nth[index]])
            parts += [text[at:slot], np.asarray(piece.tokens, np.int64)]
            mask = np.zeros(len(piece.tokens), bool)
            mask[piece.answer :] = True
            learned += [np.zeros(slot - at, bool), mask]
            at = slot
        parts.append(text[at:])
        learned.append(np.zeros(len(text) - at, bool))
        tokens = np.concatenate([*parts, [self._tokenizer.eos_id]])
        learned = np.concatenate(learned)
        targets = np.full(len(tokens), IGNORE, np.int64)
        wanted_T = np.flatnonzero(learned)
        targets[wanted_T - 1] = tokens[wanted_T]
        return Document(tokens, targets)


def write_documents(
    path: Path,
    documents: RetrievalDocuments,
    tokenizer: Tokenizer,
    count: int,
    length: int,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Documents 0 to count - 1 of `length` tokens as JSON lines that `data prepare` reads; the file appears whole.

    `answers` are their answers in order, as text.
    """
    with atomic_write(path) as file:
        for number in range(count):
            made = documents.document(number, length)
            learned = made.targets_T != IGNORE
            starts = np.flatnonzero(learned & ~np.append([False], learned[:-1]))
            stops = np.flatnonzero(~learned & np.append([False], learned[:-1]))
            line = {
                "text": tokenizer.decode(made.tokens_T[:-1]),
                "domain": "retrieval",
                "source": documents.fingerprint[:16],
                "id": str(number),
                "answers": [
                    tokenizer.decode(made.tokens_T[start + 1 : stop + 1])
                    for start, stop in zip(starts, stops, strict=True)
                ],
            }
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            progress(number + 1)


def _quote_words(encode: Encode) -> list[int]:
    return encode(["\nThe text has a passage that goes on as follows: "])[0]
