"""Files of a person in front of a question: one book, a few files, or a folder of sources with their names."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from trinity.base.errors import UserError
from trinity.tokenizer import Tokenizer

LEFT_OUT = ("__pycache__", "node_modules")
"""Folders of a repository in which nobody wrote anything; hidden ones are left out too."""


class Document(NamedTuple):
    """A text and the name under which the model sees it."""

    name: str
    text: str


class Gathered(NamedTuple):
    """What was found under the paths that a person named."""

    documents: list[Document]
    skipped: list[str]
    """Files of folders that are no text, or empty."""

    @property
    def text(self) -> str:
        """One prompt: a single file as it is, several each under its name."""
        if len(self.documents) == 1:
            return self.documents[0].text
        return "\n\n".join(named(document) for document in self.documents)


def named(document: Document) -> str:
    """A document between lines that tell its name."""
    return f'<file name="{document.name}">\n{document.text.rstrip()}\n</file>'


def gather(paths: Iterable[Path]) -> Gathered:
    """The texts of files, and of folders all the text files below, in the order of their names.

    A file that is named must be text; in a folder what is not is skipped. Raises UserError for a path that is not
    there, cannot be read, is empty or is not UTF-8, and for a folder without text.
    """
    documents: list[Document] = []
    skipped: list[str] = []
    for path in paths:
        if not path.is_dir():
            documents.append(Document(path.name, read_document(path)))
            continue
        before = len(documents)
        for file in _files(path):
            name = f"{path.resolve().name}/{file.relative_to(path).as_posix()}"
            try:
                documents.append(Document(name, read_document(file)))
            except UserError:
                skipped.append(name)
        if len(documents) == before:
            raise UserError(f"{path} has no text files: {len(skipped)} files were looked at")
    return Gathered(documents, skipped)


def read_document(path: Path) -> str:
    """The text of a file. Raises UserError when it cannot be read, is empty, or is not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not text: byte {error.start} is not UTF-8 ({error.reason}); convert it to UTF-8 text first"
        ) from None
    if "\0" in text:
        raise UserError(f"{path} is not text: byte {data.index(0)} is zero; convert it to UTF-8 text first")
    if not text.strip():
        raise UserError(f"{path} is empty: there is nothing to read in it")
    return text


def check_room(gathered: Gathered, tokenizer: Tokenizer, prompt: Sequence[int], positions: int, answer: int) -> None:
    """Raises UserError, with what would fit, when `prompt`, made of the documents and what surrounds them, and an
    answer of `answer` tokens need more than the model's positions."""
    if len(prompt) + answer <= positions:
        return
    told = (
        f"the prompt has {len(prompt)} tokens and the answer may have {answer}, "
        f"but the model has {positions} positions; "
    )
    documents = gathered.documents
    ids = [tokenizer.encode(document.text) for document in documents]
    room = positions - answer - max(0, len(prompt) - sum(map(len, ids)))
    if room < 1:
        raise UserError(f"{told}the answer leaves no room: lower --max-new-tokens")
    if len(documents) == 1:
        share = len(tokenizer.decode(ids[0][:room]))
        fits = f"the first {share} of {len(documents[0].text)} characters of {documents[0].name} would fit"
        raise UserError(f"{told}{fits}")
    whole, used = 0, 0
    while used + len(ids[whole]) <= room:
        used += len(ids[whole])
        whole += 1
    largest = max(range(len(ids)), key=lambda i: len(ids[i]))
    fits = f"the first {whole} of {len(documents)} files would fit"
    raise UserError(f"{told}{fits}; the largest is {documents[largest].name} with {len(ids[largest])} tokens")


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder by their names, without hidden ones and without following links to folders."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in LEFT_OUT)
        for name in sorted(files):
            file = Path(place, name)
            if not name.startswith(".") and file.is_file():  # no pipes and sockets, which would be read for ever
                yield file
