"""What is asked: the passages of a document, times the rewrites that it goes through."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trinity.config.curate import CurateConfig, RephraseConfig
from trinity.curate.blocks import block_path, read_block
from trinity.curate.clean import is_taken
from trinity.curate.duplicates import kept_rows
from trinity.curate.recipes import load_recipe

_PARAGRAPH = re.compile(r"\n\s*\n")
_SENTENCE = re.compile(r"(?<=[.!?\u3002\uff01\uff1f])\s+|(?<=[\u3002\uff01\uff1f])|\n")


@dataclass(frozen=True)
class Source:
    """A kept document of a block."""

    text: str
    domain: str
    source: str
    id: str
    language: str
    hash: bytes
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.source}/{self.id}"


@dataclass(frozen=True)
class Request:
    """One rewrite of one passage. The key names everything that the answer depends on but the model."""

    key: str
    source: Source
    rewrite: int
    """Which of the recipe's [[rephrase]]."""
    passage: str
    number: int
    """Of the passage in the document."""
    style: str
    seed: int

    def body(self, config: CurateConfig) -> dict[str, Any]:
        """What a server is asked, without the model's name."""
        settings = config.rephrase[self.rewrite]
        recipe = load_recipe(settings.recipe)
        return {
            "messages": recipe.messages(self.passage, self.style, settings.language or ""),
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": self.seed,
        }


def kept_sources(work: Path, block: int) -> list[Source]:
    """The documents of a block that no filter dropped and that are no duplicates, in order."""
    names = ["text", "domain", "source", "id", "language", "hash", "tokens"]
    columns = read_block(block_path(work / "clean", block), names)
    return [Source(**{name: columns[name][row] for name in names}) for row in kept_rows(work, block).tolist()]


def requests_of(sources: Sequence[Source], config: CurateConfig) -> Iterator[Request]:
    """All requests of some documents, in a fixed order."""
    for source in sources:
        for number, settings in enumerate(config.rephrase):
            if settings.domains and source.domain not in settings.domains:
                continue
            if not is_taken(_digest(source, number), settings.share):
                continue
            yield from _of_document(source, number, settings, config.generate.seed)


def _digest(source: Source, rewrite: int) -> bytes:
    return hashlib.blake2b(source.hash + rewrite.to_bytes(4, "big"), digest_size=16).digest()


def _of_document(source: Source, rewrite: int, settings: RephraseConfig, seed: int) -> Iterator[Request]:
    recipe = load_recipe(settings.recipe)
    sampling = (settings.language, settings.max_tokens, settings.temperature, settings.top_p, seed)
    for number, passage in cut_passages(source.text, settings.passage_chars, settings.max_passages):
        parts = json.dumps([source.name, source.hash.hex(), recipe.fingerprint, rewrite, number, *sampling])
        digest = hashlib.blake2b((parts + passage).encode(), digest_size=16).digest()
        pick = int.from_bytes(digest[8:], "big")
        style = recipe.styles[pick % len(recipe.styles)] if recipe.styles else ""
        yield Request(digest.hex(), source, rewrite, passage, number, style, pick % 2**31)


def cut_passages(text: str, size: int, most: int) -> list[tuple[int, str]]:
    """(number, passage) of passages of about `size` characters, cut between paragraphs, else sentences, else anywhere.

    Of more than `most`, as many are taken at even distances.
    """
    passages: list[str] = []
    current = ""
    for part in _parts(text, size):
        if current and len(current) + len(part) > size:
            passages.append(current)
            current = ""
        current += part
    if current.strip():
        if passages and len(current) < size // 4 and len(passages[-1]) + len(current) <= size + size // 4:
            passages[-1] += current
        else:
            passages.append(current)
    numbers = range(len(passages))
    if len(passages) > most:
        numbers = np.linspace(0, len(passages) - 1, most).round().astype(int).tolist()
    return [(number, passages[number].strip()) for number in numbers if passages[number].strip()]


def _parts(text: str, size: int) -> Iterator[str]:
    """The text in pieces of at most `size` characters; together they are the text."""
    for paragraph in _pieces(text, _PARAGRAPH):
        if len(paragraph) <= size:
            yield paragraph
            continue
        for sentence in _pieces(paragraph, _SENTENCE):
            for start in range(0, len(sentence), size):
                yield sentence[start : start + size]


def _pieces(text: str, border: re.Pattern[str]) -> Iterator[str]:
    start = 0
    for match in border.finditer(text):
        if match.end() > start:
            yield text[start : match.end()]
            start = match.end()
    if start < len(text):
        yield text[start:]
