"""Readers: every format gives the same documents, and every kind of bad input is named."""

import gzip
import itertools
import json
import sys
import tempfile
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.base.errors import UsageError, UserError
from trinity.data.corpus import Input, cut_file, list_files, read_documents
from trinity.data.filters import cuts, is_held_out, judge
from trinity.data.readers import Columns, Drop, read_piece

texts = st.lists(st.text(st.characters(exclude_categories=("Cs",))), max_size=20)


def write(path: Path, records: list[dict]) -> Path:
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :]))
    elif path.name.endswith(".zst"):
        half = len(data) // 2
        path.write_bytes(zstandard.compress(data[:half]) + zstandard.compress(data[half:]))
    elif path.name.endswith(".parquet"):
        schema = pa.schema([(name, pa.string()) for name in ("text", "domain", "source", "id")])
        pq.write_table(pa.Table.from_pylist(records, schema), path, row_group_size=3)
    else:
        path.write_bytes(data)
    return path


@settings(deadline=None, max_examples=30)
@given(texts, st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"]), st.integers(1, 200))
def test_every_format_and_every_cut_gives_every_document_once(contents, name, piece_bytes):
    records = [{"text": text, "domain": "d", "source": "s", "id": str(i)} for i, text in enumerate(contents)]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, name), records)
        if path.stat().st_size == 0:
            return
        (file,) = list_files([Input(str(path))]).files
        for limit in (None, piece_bytes):
            found = [d for piece in cut_file(file, limit) for d in read_piece(piece)]
            assert [d._asdict() for d in found] == records


def test_folders_are_read_in_order_with_origins_inside_them(tmp_path):
    root = tmp_path / "data"
    (root / "b" / ".git").mkdir(parents=True)
    (root / "b" / ".git" / "x.txt").write_text("hidden")
    (root / "b" / "y.py").write_text("pass")
    (root / "z.md").write_text("\ufefftitle")
    (root / "a.bin").write_bytes(b"\0")
    write(root / "c.jsonl", [{"text": "one"}, {"text": "two", "domain": "special", "id": 7}])
    found = list(read_documents([root]))
    assert [tuple(d) for d in found] == [
        ("one", "text", "data/c.jsonl", "0"),
        ("two", "special", "data/c.jsonl", "7"),
        ("title", "text", "data", "z.md"),
        ("pass", "code", "data", "b/y.py"),
    ]
    assert list_files([Input(str(root))]).passed_over == 1
    assert {d.domain for d in read_documents([f"{root}=mine"])} == {"mine"}
    assert {d.domain for d in read_documents([root], domain="all")} == {"all"}


def test_inputs_name_their_domain(tmp_path):
    (tmp_path / "a=b.txt").write_text("x")
    assert Input.parse(tmp_path / "a=b.txt") == Input(str(tmp_path / "a=b.txt"))
    assert Input.parse("p/q=math") == Input("p/q", "math")
    with pytest.raises(UsageError, match="path=domain"):
        Input.parse("p/q=")


def test_columns_can_be_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"body": "x", "lang": "en"}])
    assert next(read_documents([path], columns=Columns(text="body", domain="lang"))).domain == "en"
    with pytest.raises(UserError, match=r"a.jsonl, line 1: there is no field 'text'; the fields are body, lang"):
        list(read_documents([path]))
    table = write(tmp_path / "a.parquet", [{"text": "x"}])
    with pytest.raises(UserError, match="no column 'body'; the columns are text, domain, source, id"):
        list(read_documents([table], columns=Columns(text="body")))
    pq.write_table(pa.table({"text": [1]}), table)
    with pytest.raises(UserError, match="holds int64, not text"):
        list(read_documents([table]))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("keep", [0.5, 0.98])
def test_truncated_files_are_named(tmp_path, name, keep):
    path = write(tmp_path / name, [{"text": f"text number {i} {hash(str(i))}"} for i in range(200)])
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match=rf"{name} (is cut off|is not a sound)"):
        list(read_documents([path]))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_files_of_another_kind_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is no such thing at all")
    with pytest.raises(UserError, match=f"{name} is not a sound"):
        list(read_documents([tmp_path / name]))


def test_a_damaged_page_of_a_table_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", [{"text": f"text number {i}"} for i in range(200)])
    data = bytearray(path.read_bytes())
    data[100:1000] = b"\xff" * 900
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet is damaged in row group \d+, row"):
        list(read_documents([path]))


def test_single_bad_documents_are_counted_or_refused(tmp_path):
    lines = [b'{"text": "good"}', b"{broken", b'{"text": null}', b'{"text": 5}', b'{"text": "\xff"}', b"[1]"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\r\n".join([*lines, b'{"text": "\\ud800"}', b"", b'{"text": "last"}']))
    drops: list[Drop] = []
    assert [d.text for d in read_documents([path], on_drop=drops.append)] == ["good", "last"]
    reasons = ["not JSON", "no text", "no text", "not UTF-8", "not JSON", "not UTF-8"]
    assert [drop.reason for drop in drops] == reasons
    assert drops[0].where == f"{path}, line 2"
    with pytest.raises(UserError, match="line 2: the line is not JSON"):
        list(read_documents([path]))
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match=r"b\.txt: byte 3 is not UTF-8"):
        list(read_documents([tmp_path / "b.txt"]))


def test_bad_utf8_in_a_table_drops_its_row_only(tmp_path):
    values = pa.array([b"one", b"\xff\xfe", b"two"]).cast(pa.binary())
    column = pa.Array.from_buffers(pa.string(), 3, values.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    drops: list[Drop] = []
    assert [d.text for d in read_documents([tmp_path / "a.parquet"], on_drop=drops.append)] == ["one", "two"]
    assert [(drop.reason, drop.where) for drop in drops] == [("not UTF-8", f"{tmp_path / 'a.parquet'}, row 1")]


def test_useless_paths_are_explained(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "photo.png").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    for name, words in (
        ("empty.txt", "is empty"),
        ("photo.png", r"is of no known type \(\.txt, "),
        ("folder", "holds no file of a known type"),
        ("missing", "there is no file or folder"),
    ):
        with pytest.raises(UserError, match=words):
            list(read_documents([tmp_path / name]))


def test_data_sets_of_the_hub(monkeypatch):
    rows = [{"text": str(i)} for i in range(10)]

    class Data(list):
        num_rows = 10
        data = types.SimpleNamespace(nbytes=100)

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return Data(rows)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    (file,) = list_files([Input("hf://owner/name/en:validation")]).files
    pieces = list(cut_file(file, 30))
    assert len(pieces) == 4
    assert [d.text for piece in pieces for d in read_piece(piece)] == [str(i) for i in range(10)]
    assert set(asked) == {("owner/name", "en", "validation")}
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets"):
        list_files([Input("hf://owner/name")])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a normal sentence", None),
        (" \n\t", "empty"),
        ("abc", "too short"),
        ("x" * 101, "too long"),
        ("ab\ufffd" * 20, "broken characters"),
        ("ab\x00\x01" * 20, "control characters"),
    ],
)
def test_the_filters(text, reason):
    assert judge(text, 5 if text == "abc" else 1, 100, True) == reason
    if reason in ("broken characters", "control characters"):
        assert judge(text, 1, 100, False) is None


def test_repetition_is_dropped_and_prose_and_code_are_not():
    assert judge("buy now! " * 5000, 1, None, True) == "repetition"
    assert judge(Path(json.__file__).read_text(), 1, None, True) is None
    assert judge("\n".join(f"{i} {i * i}" for i in range(3000)), 1, None, True) is None


@given(st.text(alphabet="ab \n\té", max_size=300), st.integers(4, 40))
def test_cutting_keeps_every_character_and_breaks_between_words(text, limit):
    ends = cuts(text, limit)
    pieces = [text[start:stop] for start, stop in itertools.pairwise([0, *ends])]
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces) or text == ""
    for left, right in itertools.pairwise(pieces):
        window = left[limit // 2 :]
        if "\n" in window.rstrip("\n"):
            continue
        if left[-1] not in "\n" and not right.startswith(" "):  # a hard cut: there was no better place
            assert not any(a not in " \n\t" and b == " " for a, b in itertools.pairwise(window))


def test_held_out_shares():
    hashes = [i.to_bytes(8, "big") + (i * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "big") for i in range(2000)]
    assert 0.08 < sum(is_held_out(h, 0.1) for h in hashes) / 2000 < 0.12
    assert not any(is_held_out(h, 0.0) for h in hashes)
