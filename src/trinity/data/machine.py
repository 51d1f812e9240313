"""A small corpus from the Python installation itself: a demonstration needs no download.

`code` is sources of the standard library and of installed packages, `prose` is the language reference's topics,
docstrings (parsed, never imported) and package descriptions, `math` is generated arithmetic. Documents are chosen by
the hash of their path inside the library, so that neither the order of a directory nor its place matters; another
Python version is another corpus and has another fingerprint.
"""

import ast
import hashlib
import importlib.metadata
import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from trinity.base.errors import UserError
from trinity.base.files import atomic_write
from trinity.data import arithmetic
from trinity.data.readers import Document

SHARES = {"prose": 0.4, "code": 0.4, "math": 0.2}
PACKAGES = ("numpy", "pydantic", "rich", "typer", "click", "jinja2", "markdown_it", "safetensors", "tokenizers")
"""Packages that an installation of this one is likely to have; the absent ones are left out."""
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "_vendor", "pip"}
MAX_FILE_BYTES = 300_000
MAX_ARITHMETIC_LINES = 2000
MIN_DOCSTRING_CHARS = 40
LONG_DOCSTRING_CHARS = 400


@dataclass(frozen=True)
class Gathered:
    """The corpus on disk."""

    files: list[Path]
    """One JSON-lines file for each domain."""
    fingerprint: str
    """sha256 of all the texts in order."""
    num_bytes: dict[str, int]
    """UTF-8 bytes of text by domain."""


def gather(out_dir: Path | str, max_bytes: int = 6_000_000, seed: int = 0) -> Gathered:
    """Write `prose.jsonl`, `code.jsonl` and `math.jsonl` of together about `max_bytes` bytes of text.

    Deterministic on one installation; `seed` moves the choice of files and the arithmetic. Raises UserError when the
    installation has no library sources.
    """
    sources = _sources(seed)
    if not sources:
        raise UserError("this Python installation has no library sources to make a corpus of; name your own texts")
    # Every second file is code; the docstrings come from the others, so that no sentence is in two domains.
    makers = {
        "prose": _prose(sources[1::2]),
        "code": _code(sources[0::2]),
        "math": _math(Random(seed)),
    }
    digest = hashlib.sha256()
    files, num_bytes = [], {}
    for domain, share in SHARES.items():
        path = Path(out_dir) / f"{domain}.jsonl"
        total = 0
        with atomic_write(path, "w") as file:
            for document in _up_to(makers[domain], int(max_bytes * share)):
                file.write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")
                data = document.text.encode()
                digest.update(hashlib.sha256(domain.encode() + b"\0" + data).digest())
                total += len(data)
        files.append(path)
        num_bytes[domain] = total
    return Gathered(files, digest.hexdigest(), num_bytes)


def _up_to(documents: Iterable[Document], limit: int) -> Iterator[Document]:
    """Distinct documents until the limit; one that does not fit is passed over for smaller ones, a few times."""
    seen: set[str] = set()
    total = misfits = 0
    for document in documents:
        size = len(document.text.encode())
        if document.text in seen:
            continue
        if total + size > limit:
            misfits += 1
            if misfits > 20:
                return
            continue
        seen.add(document.text)
        total += size
        yield document


def _sources(seed: int) -> list[tuple[str, Path]]:
    """(name inside the library, path) of Python files, in an order that depends on names and seed only."""
    found: list[tuple[str, Path]] = []
    library = Path(sysconfig.get_paths()["stdlib"])
    found += ((f"stdlib/{name}", path) for name, path in _python_files(library))
    for folder in sorted({sysconfig.get_paths()[key] for key in ("purelib", "platlib")}):
        for package in PACKAGES:
            root = Path(folder, package)
            found += ((f"{package}/{name}", path) for name, path in _python_files(root))
    return sorted(found, key=lambda one: hashlib.sha256(f"{seed} {one[0]}".encode()).digest())


def _python_files(root: Path) -> Iterator[tuple[str, Path]]:
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        if not LEFT_OUT & set(inside.parts[:-1]) and 0 < path.stat().st_size <= MAX_FILE_BYTES:
            yield inside.as_posix(), path


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # an old file in another encoding
        return None


def _code(sources: Iterable[tuple[str, Path]]) -> Iterator[Document]:
    for name, path in sources:
        source = _read(path)
        if source is not None:
            yield Document(source, "code", name.partition("/")[0], name)


def _prose(sources: Iterable[tuple[str, Path]]) -> Iterator[Document]:
    """Topics and descriptions first: they are the better prose; then docstrings as far as needed."""
    from pydoc_data.topics import topics

    for name, content in sorted(topics.items()):
        yield Document(content, "prose", "topics", name)
    yield from _descriptions()
    for name, path in sources:
        for where, docstring in _docstrings(path):
            yield Document(docstring, "prose", "docstrings", f"{name}:{where}")


def _descriptions() -> Iterator[Document]:
    """The long descriptions of the installed packages."""
    texts = {}
    for distribution in importlib.metadata.distributions():
        about = distribution.read_text("METADATA") or ""
        name = distribution.metadata["Name"]
        content = about.partition("\n\n")[2].strip()
        if name and len(content) >= MIN_DOCSTRING_CHARS:
            texts[name] = content
    for name, content in sorted(texts.items()):
        yield Document(content, "prose", "descriptions", name)


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """(line, docstring) of a file's modules, classes and functions; the short ones together as one text."""
    source = _read(path)
    if source is None or '"""' not in source:  # parsing is the slow part
        return
    try:
        tree = ast.parse(source)
    except SyntaxError:  # templates and samples of broken code
        return
    nodes: list[ast.AST] = [tree]
    short: list[str] = []
    for node in nodes:  # grows on the way: definitions only, since a walk of every expression takes longer than parsing
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            nodes.extend(node.body)
            docstring = ast.get_docstring(node) or ""
            if len(docstring) >= LONG_DOCSTRING_CHARS:
                yield str(getattr(node, "lineno", 1)), docstring
            elif len(docstring) >= MIN_DOCSTRING_CHARS:
                short.append(docstring)
    if short:
        yield "short", "\n\n".join(short)


def _math(rng: Random) -> Iterator[Document]:
    """Arithmetic without end: mostly small numbers and short texts, some very long."""
    number = 0
    while True:
        lines = min(MAX_ARITHMETIC_LINES, int(4 * rng.paretovariate(0.9)))
        max_number = rng.choice((9, 9, 20, 99, 999, 99_999, 10**9))
        yield Document(arithmetic.text(rng, lines, max_number), "math", "arithmetic", str(number))
        number += 1
