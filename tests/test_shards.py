"""Token shards: what is written is read, and no damaged byte is ever read."""

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.base.errors import UserError
from trinity.data import shards as shards_module
from trinity.data.blocks import BLOCK_BYTES, CheckedFile, record_of, write_blocks
from trinity.data.shard_writer import TokenDocument, write_shards
from trinity.data.shards import Shards, token_dtype


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


ABOUT = {"tokenizer_fingerprint": "f", "vocab_size": 257, "eos_id": 256}
names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=5)
documents = st.lists(
    st.builds(
        TokenDocument,
        tokens=st.lists(st.integers(0, 256), min_size=1, max_size=30).map(lambda ids: np.array(ids, np.int64)),
        domain=names,
        source=names,
        id=names,
        num_bytes=st.integers(0, 1 << 40),
    ),
    max_size=12,
)


def make(directory: Path, lengths: list[int], **changes: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 257, n) for n in lengths]
    domains = ["prose", "code"]
    write_shards(
        directory,
        [TokenDocument(t, domains[i % 2], "src", str(i)) for i, t in enumerate(tokens)],
        **{**ABOUT, **changes},
    )
    return tokens


@settings(deadline=None, max_examples=40)
@given(documents, st.integers(1, 60))
def test_round_trip(docs, file_tokens):
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, docs, file_tokens=file_tokens, **ABOUT)
        shards = Shards.open(folder)
        assert shards.num_documents == len(docs)
        assert shards.num_tokens == sum(d.tokens.size for d in docs)
        assert shards.lengths.dtype == np.int64
        assert shards.lengths.tolist() == [d.tokens.size for d in docs]
        assert shards.num_bytes.tolist() == [d.num_bytes for d in docs]
        assert [shards.domains[i] for i in shards.domain_ids] == [d.domain for d in docs]
        for number, doc in enumerate(docs):
            assert np.array_equal(shards.tokens(number), doc.tokens)
            half = doc.tokens.size // 2
            assert np.array_equal(shards.tokens(number, half), doc.tokens[half:])
            about = shards.describe(number)
            assert (about["domain"], about["source"], about["id"]) == (doc.domain, doc.source, doc.id)
        shards.verify()


def test_the_fingerprint_is_of_the_content(tmp_path):
    make(tmp_path / "a", [5, 9, 70])
    make(tmp_path / "b", [5, 9, 70], file_tokens=6)
    make(tmp_path / "c", [5, 9, 71])
    one, split, other = (Shards.open(tmp_path / name) for name in "abc")
    assert len(split.manifest["tokens"]) == 2
    assert one.fingerprint == split.fingerprint != other.fingerprint


def test_wide_vocabularies_take_four_bytes(tmp_path):
    assert [token_dtype(n).itemsize for n in (1, 65536, 65537)] == [2, 2, 4]
    write_shards(tmp_path, [TokenDocument(np.array([70000, 3]), "d")], **{**ABOUT, "vocab_size": 200_000})
    assert Shards.open(tmp_path).tokens(0).tolist() == [70000, 3]


def test_tokens_are_read_only_views(tmp_path):
    make(tmp_path, [50])
    shards = Shards.open(tmp_path)
    view = shards.tokens(0, 3, 9)
    assert np.shares_memory(view, shards.tokens(0))
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_it_pickles_as_its_directory(tmp_path):
    make(tmp_path, [50])
    again = pickle.loads(pickle.dumps(Shards.open(tmp_path)))
    assert np.array_equal(again.tokens(0), Shards.open(tmp_path).tokens(0))


def test_maps_are_released_and_opened_again(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "OPEN_MAPS", 2)
    tokens = make(tmp_path, [10] * 8, file_tokens=10)
    shards = Shards.open(tmp_path)
    held = shards.tokens(0)
    for doc in [*range(8), *range(8)]:
        assert np.array_equal(shards.tokens(doc), tokens[doc])
    assert sum(file._map is not None for file in shards._files) == 2
    assert np.array_equal(held, tokens[0])


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def test_a_flipped_byte_is_found_on_first_use_and_only_there(tmp_path):
    per_block = BLOCK_BYTES // 2
    tokens = make(tmp_path, [per_block, per_block, per_block])
    flip(tmp_path / "tokens-000000.bin", BLOCK_BYTES + 77)
    shards = Shards.open(tmp_path)
    assert np.array_equal(shards.tokens(0), tokens[0])
    assert np.array_equal(shards.tokens(2), tokens[2])
    for _ in range(2):  # not only the first time
        with pytest.raises(
            UserError, match=rf"tokens-000000.bin is damaged between byte {BLOCK_BYTES} and .*crc32 .*expected"
        ):
            shards.tokens(1, 9, 10)
    with pytest.raises(UserError, match="damaged"):
        shards.verify()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_flipped_byte_of_any_file_is_found(data):
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), [5, 9, 70], file_tokens=6)
        path = data.draw(
            st.sampled_from(sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.stat().st_size))
        )
        flip(path, data.draw(st.integers(0, path.stat().st_size - 1)))
        with pytest.raises(UserError):
            Shards.open(folder).verify()


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3 * BLOCK_BYTES), st.data())
def test_blocks_do_not_depend_on_how_they_were_written(size, data):
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=6)))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("whole", "cut")]
        for path, places in zip(paths, ([], cuts), strict=True):
            with write_blocks(path) as file:
                for piece in np.split(content, places):
                    file.write(piece)
        one, two = (record_of(path, Path(folder)) for path in paths)
        assert one[1:] == two[1:]
        assert np.array_equal(CheckedFile(Path(folder), two, "u1").whole(), content)


@pytest.mark.parametrize("name", ["tokens-000000.bin", "documents/lengths.bin"])
def test_a_truncated_or_missing_file_is_named_at_opening(tmp_path, name):
    make(tmp_path, [50, 60])
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=rf"{path.name} has \d+ bytes where the manifest says"):
        Shards.open(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} is missing"):
        Shards.open(tmp_path)


def test_wrong_directories_are_explained(tmp_path):
    with pytest.raises(UserError, match="is no shard directory"):
        Shards.open(tmp_path)
    make(tmp_path / "train", [3])
    with pytest.raises(UserError, match="holds two shard directories"):
        Shards.open(tmp_path)


def test_every_failure_is_listed(tmp_path):
    make(tmp_path, [BLOCK_BYTES])
    for offset in (1, BLOCK_BYTES + 1):
        flip(tmp_path / "tokens-000000.bin", offset)
    flip(tmp_path / "documents/lengths.bin", 0)
    assert len(list(Shards.open(tmp_path).failures())) == 3


def test_an_empty_directory_of_shards(tmp_path):
    make(tmp_path, [])
    shards = Shards.open(tmp_path)
    assert shards.num_documents == shards.lengths.size == 0
    assert shards.domains == []
    shards.verify()
