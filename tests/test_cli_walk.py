"""The command line end to end on real files: the whole path once, then everything that can be wrong with it.

Every mistake must end with one sentence on standard error, its exit status, and all that was there before.
"""

import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trinity.cli import main

WORDS = """
    the sea was calm and old boats lay under a pale sky while men mended nets and spoke of winter storms
""".split()  # noqa: SIM905
TINY = """
    model.vocab_size=512 model.num_layers=4 model.dim=32 model.num_heads=2 model.num_kv_heads=1 model.head_dim=16
    model.ffn_dim=64 model.expert_dim=16 model.num_experts=4 model.window=32 model.max_positions=512
    data.streams=2 data.buffer=4 data.tokenizer=tok runtime.threads=1 checkpoint.every_steps=2
    pretrain.seq_len=64 pretrain.micro_rows=4 pretrain.warmup_steps=1 pretrain.eval_every=100 pretrain.eval_rows=2
    pretrain.batch=[{from_tokens=0,rows=4}] sft.epochs=1 sft.seq_len=64 sft.eval_rows=2
    rl.steps=1 rl.prompts_per_step=2 rl.group=2 rl.max_new_tokens=4 rl.seq_len=96
    eval.niah_lengths=[384] eval.niah_depths=1 eval.niah_keys=1 eval.niah_samples=1 eval.arithmetic_questions=2
""".split()  # noqa: SIM905
SHORT = 'pretrain.phases=[{name="a",tokens=768,weights={prose=0.5,math=0.5}}]'
LONG = 'pretrain.phases=[{name="a",tokens=76800,weights={prose=0.5,math=0.5}}]'
PRETRAIN = ["pretrain", "demo", *TINY, SHORT, "data.shards=shards"]
CHATS = 'sft.conversations=["chats.jsonl"]'
PREPARE = ["data", "prepare", "prose.jsonl=prose", "math.jsonl=math", "--tokenizer", "tok", "--workers", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tok, shards, runs/base, runs/chat and model, made by the command line alone."""
    folder = tmp_path_factory.mktemp("walk")
    draws = random.Random(0)
    prose = [" ".join(draws.choice(WORDS) for _ in range(80)) + f", number {i}." for i in range(60)]
    math = ["\n".join(f"{a} + {i % 10} = {a + i % 10}" for a in draws.sample(range(99), 20)) for i in range(60)]
    for name, texts in (("prose", prose), ("math", math)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    turns = [("user", "assistant", f"What is {i} + 1?", str(i + 1)) for i in range(30)]
    chats = [{"messages": [{"role": u, "content": q}, {"role": a, "content": r}]} for u, a, q, r in turns]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "empty").mkdir()
    (folder / "file").write_text("a file")
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "bad.toml").write_text("x = [")
    (folder / "foreign" / "model").mkdir(parents=True)
    (folder / "foreign" / "model" / "mine").write_text("mine")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["tokenizer", "train", "prose.jsonl", "math.jsonl", "--vocab-size", "300", "--out", "tok"]) == 0
        assert main(["tokenizer", "train", "math.jsonl", "--vocab-size", "280", "--out", "other-tok"]) == 0
        assert main([*PREPARE, "--val-fraction", "0.1", "--no-quality", "--out", "shards"]) == 0
        assert main([*PRETRAIN, "--run-dir", "runs/base"]) == 0
        assert main(["sft", "--from", "runs/base", CHATS, "--run-dir", "runs/chat"]) == 0
        assert main(["export", "runs/chat", "--dtype", "float32", "--out", "model"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def walk(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def state(folder: Path) -> dict[str, str]:
    """Every file with the checksum of its content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def sentence(text: str) -> str:
    """The one sentence of a failure: the last line, and no traceback or talk of a bug before it."""
    *progress, last = text.splitlines()
    assert last.startswith("trinity: "), text
    assert not any(line.startswith("trinity: ") for line in progress), text
    assert "Traceback" not in text
    assert "a bug" not in text
    return last


def test_the_whole_path(walk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "runs/chat", "--shards", "shards", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert list(results) == ["heldout", "positions", "niah", "arithmetic", "arithmetic_chat"]
    assert set(results["heldout"]["domains"]) == {"prose", "math"}
    assert results["arithmetic"]["samples"] == 2  # by the run's settings
    assert main(["eval", "model", "--task", "niah", "--set", "eval.niah_samples=1"]) == 0
    output = capsys.readouterr()
    assert "512 positions" in output.err  # the default lengths are longer: said, not done in silence
    assert "multikey, at 512 tokens" in output.out
    assert main(["rl", "--from", "runs/chat", "--run-dir", "runs/rl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finished"] is True
    assert main(["import", "model", "--out", "runs/imported"]) == 0
    capsys.readouterr()
    assert main(["generate", "runs/imported", "The sea", "--max-new-tokens", "4", "--seed", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "The sea"
    assert main(["generate", "model", "", "--max-new-tokens", "4"]) == 0
    assert main(["checkpoints", "verify", "runs/base", "--json"]) == 0
    assert main(["report", "runs/base"]) == 0
    capsys.readouterr()
    assert main(["tokenizer", "show", "tok", "--text", "The sea | 12"]) == 0
    assert "\\|" in capsys.readouterr().out  # cuts are shown, the text's own bar told apart
    assert main(["data", "inspect", "shards", "--tokenizer", "tok", "--samples", "1"]) == 0
    shown = capsys.readouterr().out
    assert "length in tokens" in shown
    assert "document 0 (" in shown


EVAL, SFT = ["eval", "model"], ["sft", CHATS, "--run-dir", "runs/new"]
MISTAKES = [
    (["tokenizer", "train", "missing", "--out", "new"], 1, "missing"),
    (["tokenizer", "train", "empty", "--out", "new"], 1, "the folder empty"),
    (["tokenizer", "train", "blank.txt", "--out", "new"], 1, "no text"),
    (["tokenizer", "train", "binary.txt", "--out", "new"], 1, "binary.txt: byte 128"),
    (["tokenizer", "train", "prose.jsonl", "--out", "tok"], 1, "--force"),
    (["tokenizer", "train", "prose.jsonl", "--out", "file/new"], 1, "file is a file"),
    (["tokenizer", "train", "prose.jsonl", "--out", "new", "--vocab-size", "9"], 2, "--vocab-size"),
    (["tokenizer", "show", "empty"], 1, "empty/tokenizer.json"),
    ([*PREPARE, "--out", "shards"], 1, "shards was made differently"),
    ([*PREPARE, "--out", "runs/base"], 1, "no part of shards"),
    ([*PREPARE, "--out", "file"], 1, "file is a file"),
    ([*PREPARE], 2, "'--out'; see"),
    (["data", "prepare", "empty", "--tokenizer", "tok", "--out", "new"], 1, "the folder empty"),
    (["data", "prepare", "blank.txt", "--tokenizer", "tok", "--out", "new-shards"], 1, "no document is left"),
    (["data", "prepare", "prose.jsonl", "--tokenizer", "missing", "--out", "new"], 1, "missing"),
    (["data", "inspect", "missing"], 1, "no directory missing"),
    (["data", "inspect", "tok"], 1, "tok is no shard directory"),
    (["data", "inspect", "shards", "--tokenizer", "other-tok"], 1, "made with the tokenizer"),
    ([*PRETRAIN, "optim.moun_lr=1", "--run-dir", "runs/new"], 2, "did you mean 'muon_lr'?"),
    ([*PRETRAIN, "optim.muon_lr=inf", "--run-dir", "runs/new"], 2, "optim.muon_lr = inf"),
    ([*PRETRAIN, "sft.conversations=a.jsonl", "--run-dir", "runs/new"], 2, "brackets"),
    ([*PRETRAIN, SHORT.replace("prose=0.5,math=0.5", ""), "--run-dir", "runs/new"], 2, "weights is empty"),
    ([*PRETRAIN, SHORT.replace("prose", "poems"), "--run-dir", "runs/new"], 2, "'poems'"),
    ([*PRETRAIN, "data.shards=missing", "--run-dir", "runs/new"], 1, "missing/train"),
    ([*PRETRAIN, "data.tokenizer=other-tok", "--run-dir", "runs/new"], 1, "another tokenizer"),
    ([*PRETRAIN, "model.vocab_size=256", "--run-dir", "runs/new"], 2, "model.vocab_size = 256"),
    ([*PRETRAIN, "optim.muon_lr=0.5", "--run-dir", "runs/base"], 1, "optim.muon_lr was 0.02, now 0.5"),
    ([*PRETRAIN, "--run-dir", "file"], 1, "file is a file"),
    ([*PRETRAIN, "--run-dir", "foreign"], 1, "foreign/model"),
    ([*PRETRAIN, "--run-dir", "foreign", "--force"], 1, "foreign/model"),
    ([*PRETRAIN, "data.shards=missing", "--run-dir", "runs/base", "--force"], 1, "missing/train"),
    ([*PRETRAIN, "--from", "tok", "--run-dir", "runs/new"], 1, "tok is neither a model directory"),
    ([*PRETRAIN, "model.dim=64", "--from", "runs/base", "--run-dir", "runs/new"], 1, "dim = 32"),
    (["pretrain", "bad.toml", "--run-dir", "runs/new"], 2, "bad.toml is not valid TOML"),
    ([*SFT, "--from", "missing"], 2, "--from missing"),
    ([*SFT, "--from", "model"], 2, "model has no run.toml"),
    ([*SFT, "--from", "runs/base", "data.tokenizer=other-tok"], 1, "another tokenizer"),
    ([*SFT, "--from", "runs/base", 'sft.conversations=["no.jsonl"]'], 1, "no.jsonl"),
    (["sft", CHATS, "--from", "runs/base", "--run-dir", "runs/base"], 1, "stage 'pretrain', not 'sft'"),
    (["sft", CHATS, "--from", "runs/base", "--run-dir", "runs/base", "--force"], 2, "which --from needs"),
    (["eval", "missing"], 1, "no model at missing"),
    ([*EVAL, "--task", "nih"], 2, "did you mean 'niah'?"),
    ([*EVAL, "--task", "heldout"], 2, "--shards"),
    ([*EVAL, "--set", "optim.muon_lr=1"], 2, "no key 'optim'"),
    ([*EVAL, "--set", "eval.niah_lengths=[4096]"], 2, "512 positions"),
    ([*EVAL, "--set", "eval.niah_lengths=[]"], 2, "eval.niah_lengths is empty"),
    ([*EVAL, "--shards", "missing"], 1, "no directory missing"),
    (["generate", "model", "x", "--device", "tpu"], 2, "cpu, cuda"),
    (["generate", "model", "x", "--device", "cuda:99"], 2, "not there"),
    (["generate", "model", "x", "--dtype", "int8"], 2, "int8"),
    (["generate", "model", "x " * 600], 1, "512 positions"),
    (["generate", "model/config.json", "x"], 1, "model/config.json is a file"),
    (["export", "runs/base", "--out", "model"], 1, "--force"),
    (["export", "runs/base", "--out", "runs/chat", "--force"], 1, "no part of a model"),
    (["export", "runs/base", "--out", "file/new"], 1, "file is a file"),
    (["import", "tok", "--out", "new"], 1, "tok is neither"),
    (["import", "model", "--out", "tok", "--force"], 1, "no part of a model"),
    (["report", "empty"], 1, "empty is not a run directory"),
    (["checkpoints", "verify", "empty"], 1, "empty has no checkpoints"),
    (["demo", "--run-dir", "file"], 1, "file is a file"),
]


@pytest.mark.parametrize(("arguments", "status", "words"), MISTAKES)
def test_a_mistake_gets_one_sentence_and_costs_nothing(
    arguments: list[str], status: int, words: str, walk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(walk)
    assert main(arguments) == status
    output = capsys.readouterr()
    assert output.out == ""
    assert words in sentence(output.err)
    after = state(walk)
    assert {name: after.get(name) for name in before} == before
    for name in ("new", "runs/new", "new-shards"):
        shutil.rmtree(walk / name, ignore_errors=True)


def test_a_damaged_shard_is_found_on_first_use(walk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("shards", "hurt")
    flip(Path("hurt/train/tokens-000000.bin"), 5000)
    for arguments in (
        [*PRETRAIN, "data.shards=hurt", "--run-dir", "runs/hurt"],
        ["data", "verify", "hurt"],
        ["data", "inspect", "hurt", "--tokenizer", "tok"],
    ):
        assert main(arguments) == 1
        assert "hurt/train/tokens-000000.bin is damaged between byte 0 and byte" in sentence(capsys.readouterr().err)
    shutil.rmtree("hurt/val")  # a split that is gone is damage too
    shutil.copy("shards/train/tokens-000000.bin", "hurt/train/tokens-000000.bin")
    assert main(["data", "verify", "hurt"]) == 1
    assert "hurt/val" in sentence(capsys.readouterr().err)
    assert main([*PREPARE, "--val-fraction", "0.1", "--no-quality", "--out", "hurt"]) == 1
    assert "--force" in sentence(capsys.readouterr().err)
    shutil.copytree("shards/val", "hurt/val")
    assert main([*PRETRAIN, "data.shards=hurt", "--run-dir", "runs/hurt"]) == 0  # mended, the run goes on


def test_a_truncated_model_is_refused(walk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("model", "cut")
    os.truncate("cut/model.safetensors", 100_000)
    for verb in (["generate", "cut", "x"], ["eval", "cut"], ["export", "cut", "--out", "new"], ["chat", "cut"]):
        assert main(verb) == 1
        assert "cut/model.safetensors is not a whole safetensors file" in sentence(capsys.readouterr().err)
    for name, text in (("config.json", "[]"), ("tokenizer_config.json", "[]")):
        shutil.rmtree("cut")
        shutil.copytree("model", "cut")
        Path("cut", name).write_text(text)
        assert main(["generate", "cut", "x"]) == 1
        assert f"cut/{name}" in sentence(capsys.readouterr().err)


def test_damaged_checkpoints(walk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("runs/base", "runs/torn")
    shutil.rmtree("runs/torn/model")
    older, newest = sorted(Path("runs/torn/checkpoints").iterdir())
    os.truncate(newest / "model.safetensors", 5000)
    assert main(["checkpoints", "ls", "runs/torn"]) == 0
    assert "incomplete" in capsys.readouterr().out
    assert main(["checkpoints", "verify", "runs/torn"]) == 1
    assert newest.name in sentence(capsys.readouterr().err)
    assert main(["generate", "runs/torn", "x"]) == 1
    assert f"{newest}/model.safetensors is damaged" in sentence(capsys.readouterr().err)
    assert main([*PRETRAIN, "--run-dir", "runs/torn"]) == 0  # goes back to the older one, and says so
    assert f"{newest}/model.safetensors has 5000 bytes" in capsys.readouterr().err
    assert main(["checkpoints", "verify", "runs/torn"]) == 0
    for folder in (older, newest):
        os.truncate(folder / "model.safetensors", 5000)
    before = state(Path("runs/torn"))
    capsys.readouterr()
    assert main([*PRETRAIN, "--run-dir", "runs/torn"]) == 1
    assert "checkpoint" in sentence(capsys.readouterr().err)
    after = state(Path("runs/torn"))
    assert {n: after[n] for n in before if n != "events.jsonl"} == {n: before[n] for n in before if n != "events.jsonl"}


def test_a_first_attempt_that_did_nothing_does_not_bind(walk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "prepare", "prose.jsonl", "--tokenizer", "tok", "--out", "again", "--no-quality"]
    assert main([*arguments, "--text-column", "body"]) == 1
    assert "the fields are text" in sentence(capsys.readouterr().err)
    assert main(arguments) == 0


def chat(monkeypatch: pytest.MonkeyPatch, said: bytes) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said), encoding="utf-8"))
    return main(["chat", "model", "--max-new-tokens", "3", "--seed", "1"])


def test_chat_reads_a_pipe_to_its_end(
    walk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, b"") == 0
    assert capsys.readouterr().out == ""
    assert chat(monkeypatch, b"hello\n\n/reset\nhello") == 0
    assert capsys.readouterr().err == ""
    assert chat(monkeypatch, b"\xff\n") == 1
    assert "not UTF-8" in sentence(capsys.readouterr().err)
    assert chat(monkeypatch, b"x " * 2000 + b"\n") == 1
    assert "too long" in sentence(capsys.readouterr().err)


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """No file may grow beyond `most` bytes: to a writer that is a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("arguments", "most", "words"),
    [
        ([*PREPARE, "--no-quality", "--out", "full"], 3000, "the disk is full: full/"),
        (["export", "runs/base", "--out", "full"], 50_000, "model.safetensors could not be written"),
        (
            ["tokenizer", "train", "prose.jsonl", "--vocab-size", "300", "--out", "full"],
            3000,
            "the disk is full: full/",
        ),
        ([*PRETRAIN, "--run-dir", "full"], 20_000, "the checkpoint of step 0 could not be written"),
    ],
)
def test_a_full_disk(
    arguments: list[str], most: int, words: str, walk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_files(most):
        assert main(arguments) == 1
    assert words in sentence(capsys.readouterr().err)
    assert not list(walk.rglob("*.partial"))
    if arguments[0] != "tokenizer":
        assert main(arguments) == 0  # with room again, the same command succeeds
    shutil.rmtree("full", ignore_errors=True)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_goes_on(number: signal.Signals, status: int, walk: Path) -> None:
    run = Path(f"runs/{number.name}")
    arguments = [*PRETRAIN, LONG, "--run-dir", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        [sys.executable, "-m", "trinity", *arguments], stderr=subprocess.PIPE, text=True, env=environment
    )
    give_up = time.monotonic() + 60
    while not (run / "checkpoints" / "step-00000002").exists() and time.monotonic() < give_up:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors
    assert main(["checkpoints", "verify", str(run)]) == 0
    stopped = json.loads((run / "events.jsonl").read_text().splitlines()[-1])
    assert stopped["event"] == "stop"
    assert stopped["checkpoint"] == stopped["step"]


def test_help_is_there_at_once() -> None:
    """Less than 0.3 s, in seconds of CPU: those of a clock would measure what else the machine does."""

    def seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "trinity", "--help"], capture_output=True, check=True)
        after = os.times()
        return after.children_user - before.children_user + after.children_system - before.children_system

    assert min(seconds() for _ in range(8)) < 0.3
