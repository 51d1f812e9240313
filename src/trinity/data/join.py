"""Documents of one folder joined into long ones, as a repository reads: files in the order of their paths, each under a
line that names it."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from trinity.base.files import atomic_write
from trinity.data.readers import Document


@dataclass(frozen=True)
class Joined:
    """Several documents as one text."""

    text: str
    source: str
    """Where they came from: the folder."""
    domain: str
    parts: int


def join_documents(
    documents: Iterable[Document], size: Callable[[str], int], most: int, folder_parts: int = 1
) -> Iterator[Joined]:
    """Neighbouring documents of one source joined up to `most` (by `size`, such as tokens); a longer one stays alone.

    Documents come as the reader gives them, sorted by path, so one folder's files are neighbours. The folder is the
    first `folder_parts` parts of a document's path.
    """
    texts: list[str] = []
    place, total = ("", ""), 0

    def flush() -> Iterator[Joined]:
        if texts:
            yield Joined("\n\n".join(texts), place[0], place[1], len(texts))
            texts.clear()

    for document in documents:
        name = PurePosixPath(document.id)
        here = ("/".join(name.parts[:folder_parts]) if len(name.parts) > 1 else document.source, document.domain)
        text = f"=== {name} ===\n{document.text}"
        length = size(text)
        if texts and (here != place or total + length > most):
            yield from flush()
            total = 0
        texts.append(text)
        place, total = here, total + length
    yield from flush()


def write_joined(path: Path, joined: Iterable[Joined]) -> int:
    """Write them as JSON lines that `data prepare` reads; the file appears whole. Returns their number."""
    count = 0
    with atomic_write(path) as file:
        for count, document in enumerate(joined, 1):
            line = {"text": document.text, "domain": document.domain, "source": document.source, "id": str(count)}
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    return count
