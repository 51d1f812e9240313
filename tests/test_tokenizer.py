"""Training, round trips, the files that others read, and that text never becomes a special token."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from trinity.base.errors import UsageError, UserError
from trinity.config import TokenizerConfig
from trinity.tokenizer import Tokenizer, train_tokenizer
from trinity.tokenizer.report import compare, compression, show_splits
from trinity.tokenizer.train import MAX_TOKEN_BYTES, sample

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It counted 1234567 sheep, then 89 more.\n\n" * 20,
    "def add(a, b):\n    return a + b  # 3.14159\n" * 20,
    "\u4e2d\u6587\u6587\u672c\u3067\u3059\u3002 \uc548\ub155\ud558\uc138\uc694 na\u00efve caf\u00e9\u0301 <|im_end|>"
    * 20,
    " ".join(str(number) for number in range(100, 400)) * 2,
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
SPECIAL += ["<tool_response>", "</tool_response>"]
texts = st.one_of(st.text(), st.lists(st.sampled_from([*SPECIAL, *" \n1aX\u4e2d", "12", "the "])).map("".join))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CORPUS, TokenizerConfig(vocab_size=500))


@pytest.fixture(scope="module")
def directory(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def reference(directory: Path):
    return AutoTokenizer.from_pretrained(directory)


def test_vocabulary_and_special_tokens(tokenizer: Tokenizer):
    assert [tokenizer.special_id(token) for token in SPECIAL] == list(range(500, 509))
    assert tokenizer.vocab_size == 509
    assert tokenizer.eos_id == tokenizer.pad_id == 500
    assert tokenizer.stop_ids == [500, 502]
    with pytest.raises(UserError, match="no special token <x>"):
        tokenizer.special_id("<x>")


@given(texts)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_text_round_trips_and_is_never_special(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < 500
    assert tokenizer.encode_bytes(text.encode()) == ids


@given(
    st.one_of(
        st.binary(max_size=200), st.lists(st.sampled_from([b"\xe4\xb8", b"\xff", b"ab", b"\xed\xa0\x80"])).map(b"".join)
    )
)
def test_bytes_round_trip(tokenizer: Tokenizer, data: bytes):
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode("utf-8", "replace")


def test_special_tokens_on_request(tokenizer: Tokenizer):
    text = "".join(SPECIAL) + "x"
    ids = tokenizer.encode(text, special=True)
    assert ids[:9] == list(range(500, 509))
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special=True) == text.replace("<|endoftext|><|im_start|><|im_end|>", "")
    with pytest.raises(UserError, match="id 509 is not"):
        tokenizer.decode([509])


def test_lone_surrogates_are_refused(tokenizer: Tokenizer):
    with pytest.raises(UserError, match=r"text 1 holds the lone surrogate U\+D800 at character 2"):
        tokenizer.encode_batch(["fine", "ab\ud800"])


def test_batches_equal_single_texts(tokenizer: Tokenizer):
    batch = tokenizer.encode_batch([*CORPUS, ""])
    assert all(ids.dtype == np.uint32 for ids in batch)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in [*CORPUS, ""]]
    assert tokenizer.encode_batch([]) == []


def test_long_texts_are_encoded_in_parts(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    whole = tokenizer.encode("".join(CORPUS))
    monkeypatch.setattr("trinity.tokenizer.tokenizer.PART_CHARACTERS", 50)
    assert tokenizer.encode("".join(CORPUS)) == whole
    sizes: list[int] = []
    inner = tokenizer._encode

    def counted(backend: tokenizers.Tokenizer, parts: Sequence[str]) -> list[tokenizers.Encoding]:
        sizes.extend(map(len, parts))
        return inner(backend, parts)

    monkeypatch.setattr(tokenizer, "_encode", counted)
    tokenizer.encode_batch(["".join(CORPUS[:2])])
    assert len(sizes) > 25
    assert max(sizes) < 200


@given(texts)
def test_saved_files_give_transformers_the_same_ids(tokenizer: Tokenizer, reference, text: str):
    ids = tokenizer.encode(text, special=True)
    assert reference(text)["input_ids"] == ids
    assert reference.decode(ids) == text


def test_saved_files(tokenizer: Tokenizer, directory: Path, reference, tmp_path: Path):
    assert {path.name for path in directory.iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"
    }  # fmt: skip
    assert (reference.eos_token_id, reference.pad_token_id, reference.bos_token_id) == (500, 500, None)
    again = Tokenizer.load(directory)
    assert again.fingerprint == tokenizer.fingerprint
    again.save(tmp_path, model_max_length=4096)
    assert (tmp_path / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 4096
    Tokenizer.load(tmp_path).save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 4096


def test_loading_names_what_is_wrong(directory: Path, tmp_path: Path):
    with pytest.raises(UserError, match="not a tokenizer directory"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json: .*cannot be read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default", "template": ""}]}')
    with pytest.raises(UserError, match="several chat templates"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    spec = json.loads((directory / "tokenizer.json").read_text())
    del spec["model"]["vocab"]["!"]
    spec["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="lacks byte 0x21"):
        Tokenizer.load(tmp_path)


def test_model_vocabulary_must_cover_the_tokenizer(tokenizer: Tokenizer):
    tokenizer.check_model_vocab(512)
    with pytest.raises(UsageError, match=r"model.vocab_size = 508 is smaller than the tokenizer's 509"):
        tokenizer.check_model_vocab(508)


def test_training_depends_on_the_texts_alone(tokenizer: Tokenizer, tmp_path: Path):
    code = (
        "import sys, json; from trinity.config import TokenizerConfig; from trinity.tokenizer import train_tokenizer\n"
        "print(train_tokenizer(json.load(sys.stdin), TokenizerConfig(vocab_size=500)).fingerprint)"
    )
    for threads in ("1", "3"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(CORPUS),
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            text=True,
            capture_output=True,
            check=True,
        )
        assert run.stdout.strip() == tokenizer.fingerprint


def test_training_survives_endless_words():
    endless = ["a" * 300_000, "-" * 300_000, "\u4e2d" * 100_000, "7" * 300_000, " " * 300_000 + "x"]
    tokenizer = train_tokenizer(endless, TokenizerConfig(vocab_size=600))
    longest = max(len(tokenizer.decode_bytes([i])) for i in range(tokenizer.eos_id))
    assert 32 <= longest <= MAX_TOKEN_BYTES
    for text in endless:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_refuses_what_cannot_work():
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([""], TokenizerConfig(vocab_size=500))
    with pytest.raises(UsageError, match="vocab_size = 255"):
        train_tokenizer(["x"], TokenizerConfig(vocab_size=255))


def test_progress_reports_bytes():
    seen: list[int] = []
    train_tokenizer(["abc", "d\u00e9"], TokenizerConfig(vocab_size=256), seen.append)
    assert seen == [3, 6]


@given(st.lists(st.text(st.sampled_from("a\u00e9\u4e2d"), max_size=20)), st.integers(1, 60))
def test_sample_is_capped_and_whole_when_it_fits(documents: list[str], cap: int):
    total = sum(len(text.encode()) for text in documents)
    taken = list(sample(documents, cap))
    assert sum(len(text.encode()) for text in taken) <= cap
    if total <= cap:
        assert "".join(taken) == "".join(documents)
        assert list(sample(iter(documents), cap)) == documents
    else:
        with pytest.raises(UserError, match="total_bytes"):
            list(sample(iter(documents), cap))
        assert list(sample(iter(documents), cap, total)) == taken


def test_sample_is_spread_over_the_stream():
    documents = [f"{number:04d}" * (1 + number % 7) for number in range(1000)]
    total = sum(map(len, documents))
    taken = [int(text[:4]) for text in sample(documents, total // 10)]
    for quarter in range(4):
        size = sum(len(documents[n]) for n in taken if n // 250 == quarter)
        assert size == pytest.approx(total / 40, rel=0.1)


def test_measures(tokenizer: Tokenizer):
    rows = compression(tokenizer, {"english": CORPUS[:1], "code": CORPUS[1:2]})
    assert rows["all"].bytes == sum(len(text.encode()) for text in CORPUS[:2])
    assert rows["english"].bytes_per_token > 2
    both = compare(CORPUS, {"english": CORPUS[:1]}, vocab_size=400)
    assert set(both) == {"trinity", "cl100k", "deepseek-v3"}
    assert all(rows["english"].bytes == len(CORPUS[0]) for rows in both.values())


def test_splits_are_shown(tokenizer: Tokenizer):
    assert show_splits("1234567 a|b\n\n x") == "1|234|567|\u00b7a|\\|b|\\n\\n|\u00b7x"
    assert show_splits("\u0e01", tokenizer) == "<E0>|<B8>|<81>"
