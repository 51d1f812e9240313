"""Files in front of a question: what is read, what is refused with what would fit, and the line of progress."""

import io
import os
import sys
from pathlib import Path

import pytest
import torch

from test_export import SMALL, random_model
from test_load import TEXT
from trinity.base.console import Console
from trinity.base.errors import UserError
from trinity.cli import main
from trinity.cli.reading import ReadingView
from trinity.config import TokenizerConfig
from trinity.export.afmoe import export_afmoe
from trinity.infer.chat import ChatSession
from trinity.infer.documents import Document, Gathered, gather, read_document
from trinity.infer.generate import generate
from trinity.infer.load import load
from trinity.infer.sampling import SamplingParams
from trinity.tokenizer import Tokenizer, train_tokenizer

POSITIONS = 600


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT, "<|im_start|>user assistant system"] * 20, TokenizerConfig(vocab_size=290))


@pytest.fixture(scope="module")
def model_dir(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model(SMALL.model_copy(update={"max_positions": POSITIONS}))
    out = tmp_path_factory.mktemp("documents") / "model"
    export_afmoe(model, model.config, tokenizer, out, dtype=torch.float32)
    return out


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repo"
    for name, data in {
        "b.py": b"print('b')\n\n",
        "a/long.txt": b"\xef\xbb\xbfthe cat",
        "a/picture.png": b"\x89PNG\r\n",
        "a/zeros": b"text\0text",
        "empty.txt": b" \n",
        ".git/config": b"secret",
        "node_modules/x.js": b"x",
        ".env": b"KEY=1",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder)
    return folder


def test_a_folder_is_its_text_files_with_their_names(repository: Path) -> None:
    gathered = gather([repository])
    assert gathered.documents == [Document("repo/b.py", "print('b')\n\n"), Document("repo/a/long.txt", "the cat")]
    assert gathered.skipped == ["repo/empty.txt", "repo/a/picture.png", "repo/a/zeros"]
    assert gathered.text == (
        '<file name="repo/b.py">\nprint(\'b\')\n</file>\n\n<file name="repo/a/long.txt">\nthe cat\n</file>'
    )
    assert gather([repository / "b.py"]).text == "print('b')\n\n"  # alone it needs no name


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is empty"),
        (b"\n \t", "is empty"),
        (b"abc\xff", "byte 3 is not UTF-8"),
        (b"ab\0c", "byte 2 is zero"),
    ],
)
def test_what_is_no_text_is_refused(data: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "f.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_document(path)
    with pytest.raises(UserError, match=words):
        gather([path])


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\xff")
    with pytest.raises(UserError, match="no text files: 1 files were looked at"):
        gather([tmp_path])


def test_what_does_not_fit_is_told_with_what_would(model_dir: Path, tokenizer: Tokenizer) -> None:
    model, _ = load(model_dir, device="cpu")
    params = SamplingParams(max_new_tokens=50, temperature=0.0)
    book = "the cat sat on the mat. " * 400
    with pytest.raises(UserError, match=r"600 positions; the first (\d+) of 9600 characters of book.txt would") as told:
        ChatSession(model, tokenizer, documents=Gathered([Document("book.txt", book)], []), params=params)
    share = int(str(told.value).split("the first ")[1].split()[0])
    fitting = Gathered([Document("book.txt", book[:share])], [])
    session = ChatSession(model, tokenizer, documents=fitting, params=params)
    list(session.send("?"))
    assert session.dropped == 0
    # Not much is given away: a tenth more does not fit.
    with pytest.raises(UserError, match="would fit"):
        ChatSession(
            model,
            tokenizer,
            documents=Gathered([Document("book.txt", book[: share + share // 10])], []),
            params=params,
        )
    files = [Document(f"{i}.txt", "the cat sat on the mat. " * count) for i, count in enumerate((4, 5, 300, 2))]
    with pytest.raises(UserError, match=r"the first 2 of 4 files would fit; the largest is 2.txt with \d+ tokens"):
        ChatSession(model, tokenizer, documents=Gathered(files, []), params=params)


def test_documents_stay_when_the_oldest_turns_go(model_dir: Path, tokenizer: Tokenizer) -> None:
    model, _ = load(model_dir, device="cpu")
    document = Document("d.txt", "the dog sat. " * 20)
    session = ChatSession(
        model,
        tokenizer,
        system="Be brief.",
        documents=Gathered([document], []),
        params=SamplingParams(max_new_tokens=100, temperature=0.0),
    )
    seen: list[tuple[int, int]] = []
    for _ in range(5):
        list(session.send("the cat sat on the mat", lambda done, total: seen.append((done, total))))
    assert session.dropped > 0
    assert session.messages[0]["content"] == f"Be brief.\n\n{document.text}"
    assert sum(done == total for done, total in seen) == 5
    session.reset()
    assert session.messages == [{"role": "system", "content": f"Be brief.\n\n{document.text}"}]


def test_the_prompt_is_told_in_chunks(model_dir: Path) -> None:
    model, tokenizer = load(model_dir, device="cpu")
    seen: list[tuple[int, int]] = []
    prompts = ["the cat " * 40, "the mat"]
    generate(model, tokenizer, prompts, on_prompt=lambda *amount: seen.append(amount), max_new_tokens=2)
    total = sum(len(tokenizer.encode(prompt)) for prompt in prompts)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_progress_tells_tokens_and_rate_and_ends_before_the_answer() -> None:
    stream = io.StringIO()
    with ReadingView(Console(stream, interactive=False, log_interval=0.0), long=100) as view:
        view.show(10, 50)  # short: not worth a line
        assert stream.getvalue() == ""
        view.show(40, 200)
        assert "Reading 40/200 tokens" in stream.getvalue()
        assert "tok/s" in stream.getvalue()
        view.show(200, 200)
        assert "done in" in stream.getvalue()


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(arguments)
    told = capsys.readouterr()
    return status, told.out, told.err


def test_generate_takes_files(
    model_dir: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load(model_dir, device="cpu")
    common = ["--max-new-tokens", "8", "--temperature", "0", "--device", "cpu"]
    (tmp_path / "d.txt").write_text("the cat sat")
    file = ["--prompt-file", str(tmp_path / "d.txt")]
    for arguments, prompt in ((file, "the cat sat"), (["on the mat", *file], "the cat sat\n\non the mat")):
        status, out, err = run(["generate", str(model_dir), *arguments, *common], capsys)
        assert (status, err) == (0, "")
        assert out.rstrip("\n") == generate(model, tokenizer, prompt, max_new_tokens=8, temperature=0).rstrip("\n")
    status, _, err = run(["generate", str(model_dir), "--prompt-file", str(repository), *common], capsys)
    assert status == 0
    assert "2 files; skipped 3 that are no text or empty: repo/empty.txt, repo/a/picture.png, repo/a/zeros" in err
    status, out, err = run(["generate", str(model_dir)], capsys)
    assert (status, out) == (2, "")
    assert "--prompt-file" in err
    (tmp_path / "book.txt").write_text("the cat sat. " * 500)
    status, out, err = run(["generate", str(model_dir), "--prompt-file", str(tmp_path / "book.txt"), *common], capsys)
    assert (status, out) == (1, "")
    assert "characters of book.txt would fit" in err
    assert err.count("\n") == 1


def test_chat_takes_files(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d.txt").write_text("the cat sat on the mat")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Who sat?\n")))
    arguments = ["chat", str(model_dir), "--max-new-tokens", "8", "--temperature", "0", "--device", "cpu"]
    status, out, err = run([*arguments, "--file", str(tmp_path / "d.txt")], capsys)
    assert (status, err) == (0, "")
    model, tokenizer = load(model_dir, device="cpu")
    session = ChatSession(
        model,
        tokenizer,
        documents=gather([tmp_path / "d.txt"]),
        params=SamplingParams(max_new_tokens=8, temperature=0.0),
    )
    assert out == "".join(session.send("Who sat?")) + "\n"
    status, out, err = run([*arguments, "--file", str(tmp_path / "missing.txt")], capsys)
    assert (status, out) == (1, "")
    assert "missing.txt cannot be read" in err
