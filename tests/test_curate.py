"""A curation from files to committed blocks, without a cluster: counts, provenance, kills, faults, budgets."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from curate_helpers import Serial, prose, recipe_for, rewrite, serial, write_documents, writer, written
from prepare_fakes import ByteTokenizer
from trinity.base.errors import UsageError, UserError
from trinity.base.files import read_json
from trinity.cli import main
from trinity.config.curate import CurateConfig, read_recipe
from trinity.curate.blocks import read_block
from trinity.curate.run import curate
from trinity.curate.summary import chain_holds
from trinity.data.prepare import prepare


@pytest.fixture(autouse=True)
def _serial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trinity.curate.run.cluster", serial)


def stage(found: dict[str, Any], name: str) -> tuple[int, int, dict[str, int]]:
    value = found["stages"][name]
    return value["in"], value["out"], value["drops"]


def test_every_stage_counts_what_it_took_gave_and_dropped(tmp_path: Path) -> None:
    inputs = write_documents(tmp_path / "in.jsonl")
    with writer() as server:
        found = curate(recipe_for(inputs, server.url), tmp_path / "out")
    assert stage(found, "read") == (29, 28, {"not JSON": 1})
    assert stage(found, "normalise") == (28, 28, {})
    assert stage(found, "filter") == (28, 26, {"language ru": 1, "too short": 1})
    assert stage(found, "exact duplicates") == (26, 25, {"exact duplicate": 1})
    assert stage(found, "near duplicates") == (25, 24, {"near duplicate": 1})
    assert stage(found, "rephrase") == (24, 24, {})
    assert stage(found, "validate") == (24, 24, {})
    assert chain_holds(found["stages"])
    assert found["stages"]["exact duplicates"]["examples"]["exact duplicate"] == ["in.jsonl/d24 is in.jsonl/d0"]
    assert found["complete"]
    assert not (tmp_path / "out" / ".work").exists()
    usage = found["use"]
    assert usage["attempts"] == 24
    assert usage["money"] == pytest.approx(usage["completion_tokens"] * 2.0 / 1e6)
    assert 0 < found["word_divergence"] < 0.5


def test_provenance_is_complete_and_the_result_can_be_prepared(tmp_path: Path) -> None:
    inputs = write_documents(tmp_path / "in.jsonl")
    with writer() as server:
        curate(recipe_for(inputs, server.url, label={"keep_sources": True}), tmp_path / "out")
        asked = {body["seed"] for body in server.bodies}
    rows = []
    for path in sorted((tmp_path / "out" / "data").glob("*.parquet")):
        columns = read_block(path)
        rows += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    assert Counter(row["recipe"] for row in rows) == {"source": 24, "encyclopaedia": 24}
    texts = {row["origin_id"]: row["text"] for row in rows if row["recipe"] == "source"}
    for row in rows:
        assert row["origin_source"] == "in.jsonl"
        assert row["origin_hash"]
        assert row["language"]
        if row["recipe"] == "encyclopaedia":
            assert row["id"] == f"in.jsonl/{row['origin_id']}#encyclopaedia-0-0"
            assert row["domain"] == row["origin_domain"] + "-encyclopaedia"
            assert (row["model"], row["endpoint"]) == ("made-up", server.url)
            assert row["seed"] in asked
            assert row["recipe_fingerprint"]
            assert row["style"]
            assert row["text"] == rewrite({"messages": [{"content": "Passage:\n" + texts[row["origin_id"]]}]})
    done = prepare([tmp_path / "out" / "data"], ByteTokenizer(), tmp_path / "shards", val_fraction=0.1)
    assert sum(done.documents.values()) == 48


def test_a_second_call_asks_nothing_and_other_settings_are_refused(tmp_path: Path) -> None:
    inputs = write_documents(tmp_path / "in.jsonl", 6)
    out = tmp_path / "out"
    with writer() as server:
        first = curate(recipe_for(inputs, server.url), out)
        calls = server.calls
        assert curate(recipe_for(inputs, server.url, generate={"retries": 9}), out) == first
        assert server.calls == calls
        with pytest.raises(UserError, match=r"made differently: with filter.min_chars = 200 and not 100; .*--force"):
            curate(recipe_for(inputs, server.url, filter={"min_chars": 100}), out)
        curate(recipe_for(inputs, server.url, filter={"min_chars": 100}), out, force=True)
    (out / "stranger").touch()
    with pytest.raises(UserError, match="stranger, which is no part of a curation"):
        curate(recipe_for(inputs, server.url), out)


def test_kills_at_random_moments_lose_nothing_and_duplicate_nothing(tmp_path: Path) -> None:
    kill_and_compare(tmp_path, "serial", documents=24, kills=2, seed=0)


@pytest.mark.slow
def test_ten_kills_of_a_cluster(tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="needs the extra ray")
    kill_and_compare(tmp_path, "ray", documents=60, kills=10, seed=1)


def kill_and_compare(folder: Path, kind: str, *, documents: int, kills: int, seed: int) -> None:
    """The same command again after SIGKILLs, each at a moment drawn from after so many answers of the writer."""
    inputs = write_documents(folder / "in.jsonl", documents)
    draw = Random(seed)
    with writer(pause=0.01) as server:
        assert run_in_process(inputs, server.url, folder / "whole", kind).wait(120) == 0
        whole, calls = written(folder / "whole"), server.calls
        assert len(whole) == documents
        done = 0
        for _ in range(kills):
            until = server.calls + draw.randrange(1, max(2, 2 * calls // kills))
            process = run_in_process(inputs, server.url, folder / "out", kind)
            deadline = time.monotonic() + 120
            while server.calls < until and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(draw.random() * 0.05)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL) if kind == "serial" else process.kill()
                done += 1
            process.wait(120)
            written(folder / "out")  # no id twice at any moment
        assert run_in_process(inputs, server.url, folder / "out", kind).wait(120) == 0
        assert done >= kills // 2
    assert written(folder / "out") == whole
    assert read_json(folder / "out" / "curated.json")["stages"]["rephrase"]["out"] == documents


def run_in_process(inputs: Path, url: str, out: Path, kind: str) -> subprocess.Popen[bytes]:
    script = Path(__file__).parent / "curate_helpers.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent), *filter(None, sys.path)])}
    return subprocess.Popen(
        [sys.executable, str(script), str(inputs), url, str(out), kind], env=environment, start_new_session=True
    )


def test_an_endpoint_that_fails_for_a_fifth_of_the_calls(tmp_path: Path) -> None:
    """Errors, rubbish, empty texts and hang-ups are asked again; a text that is refused is judged."""
    inputs = write_documents(tmp_path / "in.jsonl", 40)
    kinds = ("error", "rubbish", "empty", "hang up", "refuse")
    with writer(lambda number, body: kinds[number // 5 % 5] if number % 5 == 0 else None) as server:
        found = curate(recipe_for(inputs, server.url, generate={"retries": 6}), tmp_path / "out")
    assert stage(found, "rephrase")[:2] == (40, 40)
    refused = server.faults["refuse"]
    assert refused > 0
    assert stage(found, "validate") == (40, 40 - refused, {"refusal": refused})
    troubles = found["troubles"]
    assert troubles["endpoint error 500"] == server.faults["error"]
    assert troubles["endpoint gave rubbish"] == server.faults["rubbish"]
    assert troubles["endpoint gave an empty text"] == server.faults["empty"]
    assert sum(count for kind, count in troubles.items() if kind.startswith("endpoint broke off")) > 0
    assert chain_holds(found["stages"])


def test_what_fails_in_all_attempts_is_dropped_with_its_reason_and_can_be_retried(tmp_path: Path) -> None:
    inputs = write_documents(tmp_path / "in.jsonl", 20)
    out = tmp_path / "out"

    def misbehave(number: int, body: dict[str, Any]) -> str | None:
        kinds = (None, None, None, None, "error", None, None, "stall", "rubbish", "empty")
        return kinds[body["seed"] % 10]

    with writer(misbehave) as server:
        hard = {"retries": 1, "timeout": 0.3}
        found = curate(recipe_for(inputs, server.url, generate=hard), out)
        expected = Counter(misbehave(0, body) for body in {body["seed"]: body for body in server.bodies}.values())
    names = {
        "error": "endpoint error 500",
        "stall": "endpoint stalled",
        "rubbish": "endpoint gave rubbish",
        "empty": "endpoint gave an empty text",
    }
    drops = {names[kind]: count for kind, count in expected.items() if kind is not None}
    assert stage(found, "rephrase") == (20, expected[None], drops)
    assert found["failed"] == 20 - expected[None] > 0
    kept = written(out)
    with writer() as other:
        again = recipe_for(inputs, server.url, generate=hard)
        assert curate(again, out) == read_json(out / "curated.json")  # not asked again by itself
        port = {"generate": {**hard, "endpoints": [{"url": other.url, "model": "made-up"}]}}
        with pytest.raises(UserError, match="made differently"):
            curate(recipe_for(inputs, other.url, **port), out, retry=True)
    assert kept == written(out)


def test_a_budget_stops_in_good_order_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    inputs = write_documents(tmp_path / "in.jsonl", 20)
    out = tmp_path / "out"
    with writer() as server:
        found = curate(recipe_for(inputs, server.url, budget={"tokens": 5000}), out)
        used = found["use"]["prompt_tokens"] + found["use"]["completion_tokens"]
        assert 0 < used <= 5000
        assert not found["complete"]
        asked, answered, drops = stage(found, "rephrase")
        assert (asked, 0 < answered < 20, drops) == (20, True, {"not asked: the budget is used up": 20 - answered})
        before, calls = written(out), server.calls
        assert len(before) == answered == calls
        found = curate(recipe_for(inputs, server.url, budget={"money": 1.0}), out)
        assert found["complete"]
        assert server.calls == 20  # what was paid for is not asked again
    assert before.items() <= written(out).items()
    assert len(written(out)) == 20


def test_retry_asks_again_what_failed(tmp_path: Path) -> None:
    inputs = write_documents(tmp_path / "in.jsonl", 12)
    out = tmp_path / "out"
    broken = [True]
    with writer(lambda number, body: "error" if broken[0] and body["seed"] % 3 == 0 else None) as server:
        config = recipe_for(inputs, server.url, generate={"retries": 0})
        found = curate(config, out)
        assert found["failed"] > 0
        calls = server.calls
        broken[0] = False
        again = curate(config, out, retry=True)
        assert server.calls == calls + found["failed"]
    assert again["failed"] == 0
    assert len(written(out)) == 12


def test_endpoints_that_are_gone_stop_the_run_and_keep_what_is_done(tmp_path: Path) -> None:
    inputs = write_documents(tmp_path / "in.jsonl", 6)
    config = recipe_for(inputs, "http://127.0.0.1:9/v1", generate={"patience": 0.1})
    with pytest.raises(UserError, match=r"no endpoint could be reached for 0\.1 seconds .*what is done is kept"):
        curate(config, tmp_path / "out")
    assert (tmp_path / "out" / ".work" / "keep.npy").exists()
    with (
        writer(lambda number, body: "unknown") as server,
        pytest.raises(UserError, match=r"answered 404: .*made up"),
    ):
        curate(recipe_for(inputs, server.url), tmp_path / "out2")


def test_without_rephrasing_clean_documents_come_out(tmp_path: Path) -> None:
    inputs = write_documents(tmp_path / "in.jsonl", 6)
    config = CurateConfig.model_validate(
        {"stages": ["normalise", "deduplicate"], "input": {"paths": [str(inputs)], "block_bytes": 2000}}
    )
    found = curate(config, tmp_path / "out")
    assert list(found["stages"]) == ["read", "normalise", "exact duplicates", "near duplicates", "write"]
    assert len(written(tmp_path / "out")) == 8
    assert written(tmp_path / "out")["in.jsonl/d0"] == prose(0)


def test_benchmark_questions_are_kept_out(tmp_path: Path) -> None:
    inputs = write_documents(tmp_path / "in.jsonl", 6)
    question = " ".join(rewrite({"messages": [{"content": "Passage:\n" + prose(3)}]}).split()[20:36])
    (tmp_path / "test.jsonl").write_text(json.dumps({"id": "q1", "question": question}) + "\n")
    with writer() as server:
        found = curate(recipe_for(inputs, server.url, checks={"tests": [str(tmp_path / "test.jsonl")]}), tmp_path / "o")
    assert stage(found, "validate") == (6, 5, {"words of a benchmark": 1})
    assert "in.jsonl/d3#encyclopaedia-0-0" not in written(tmp_path / "o")


CODE = """Task: add numbers, as the passage about the harbour suggests, and explain how it is done.

```python
def add(a, b):
    return a + b
```

```python
assert add(1, 2) == 3
assert add(0, 0) == 0
assert add(-1, 1) == 0
```
"""


class Trusting:
    """Stands in for a sandbox: runs this test's own programs in the process."""

    def passes(self, program: str, *, seconds: float) -> bool:
        assert seconds == 10.0
        try:
            exec(program, {})
        except Exception:
            return False
        return True


def test_code_needs_a_sandbox_and_is_judged_by_its_tests(tmp_path: Path) -> None:
    inputs = write_documents(tmp_path / "in.jsonl", 6)

    def answer(body: dict[str, Any]) -> str:
        return CODE.replace("== 3", "== 4") if body["seed"] % 2 else CODE

    with writer(answer=answer) as server:
        config = recipe_for(inputs, server.url, rephrase=[{"recipe": "code"}])
        with pytest.raises(UserError, match=r"the recipe code runs programs .* needs a sandbox"):
            curate(config, tmp_path / "out")
        found = curate(config, tmp_path / "out", make_runner=Trusting)
        odd = sum(body["seed"] % 2 for body in server.bodies)
        assert server.calls == 6
    assert stage(found, "validate") == (6, 6 - odd, {"the tests fail": odd} if odd else {})


def test_the_verb_runs_reports_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "in.jsonl", 6)
    with writer(lambda number, body: "refuse" if number == 2 else None) as server:
        Path("recipe.toml").write_text(
            f'[input]\npaths = ["in.jsonl"]\n[[rephrase]]\nrecipe = "list"\n[[rephrase]]\nrecipe = "encyclopaedia"\n'
            f'[generate]\nbackend = "endpoint"\n[[generate.endpoints]]\nurl = "{server.url}"\nmodel = "m"\n'
        )
        assert main(["curate", "recipe.toml", "--out", "out"]) == 0
    shown = capsys.readouterr().out
    assert "validate" in shown
    assert "too few points" in shown
    page = Path("out/report.html").read_text()
    for words in ("Domain shift", "too few points", "refusal", "encyclopaedia", prose(0)[:40]):
        assert words in page
    assert "<script" not in page
    assert main(["report", "out"]) == 0
    assert main(["curate", "recipe.toml", "generate.backnd=vllm", "--out", "out"]) == 2
    assert "did you mean 'backend'?" in capsys.readouterr().err
    assert main(["curate", "recipe.toml", "--show"]) == 0


def refused(tmp_path: Path, text: str) -> str:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        curate(read_recipe(path), tmp_path / "out")
    return str(caught.value)


HEAD = '[input]\npaths = ["x"]\n[generate]\nmodel = "m"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            HEAD + '[[rephrase]]\nrecipe = "list"\nlanguag = "fr"\n',
            "rephrase.0 has no key 'languag'; .* did you mean 'language'",
        ),
        (HEAD + '[[rephrase]]\nrecipe = "lists"\n', "there is no recipe 'lists': .*did you mean 'list'"),
        (HEAD + '[[rephrase]]\nrecipe = "translate"\n', "rephrase.0.language is not set"),
        (HEAD + '[[rephrase]]\nrecipe = "list"\nlanguage = "fr"\n', "asks for none"),
        (HEAD, r"the stage rephrase needs at least one \[\[rephrase\]\]"),
        ('stages = ["filtr"]\n' + HEAD, "did you mean 'filter'"),
        (HEAD + '[duplicates]\nbands = 7\n[[rephrase]]\nrecipe = "list"\n', "128 is no multiple of bands = 7"),
        (HEAD + 'backend = "endpoint"\n[[rephrase]]\nrecipe = "list"\n', "needs at least one .*generate.endpoints"),
        (HEAD + '[run]\nray = "auto"\n[[rephrase]]\nrecipe = "list"\n', "reached from this machine alone"),
        (HEAD + 'backend = "vllm"\n[budget]\ntokens = 5\n[[rephrase]]\nrecipe = "list"\n', "leave .budget. out"),
    ],
)
def test_wrong_recipes_are_refused_with_what_is_allowed(tmp_path: Path, text: str, words: str) -> None:
    import re

    assert re.search(words, refused(tmp_path, text))


def test_the_stand_in_has_the_graphs_interface() -> None:
    from trinity.curate.graph import Graph

    for name in ("each", "ask", "purse"):
        wanted = getattr(Graph, name).__code__
        assert getattr(Serial, name).__code__.co_varnames[: wanted.co_argcount][:3] == wanted.co_varnames[:3]


def test_engines_need_vllm_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    inputs = write_documents(tmp_path / "in.jsonl", 4)
    settings = {"backend": "vllm", "model": "m", "endpoints": []}
    with pytest.raises(UserError, match=r"backend vllm needs vLLM and ray\.data\.llm on every node"):
        curate(recipe_for(inputs, "http://x/v1", generate=settings), tmp_path / "out")


def test_answers_of_engines_are_journaled_with_what_went_wrong(tmp_path: Path) -> None:
    from trinity.curate.answers import read_answers
    from trinity.curate.engines import _after, _before, _keeper

    body = {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 5,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 7,
    }
    row = {"block": 3, "key": "k", "body": json.dumps(body)}
    asked = _before(row)
    assert asked["messages"] == body["messages"]
    assert asked["sampling_params"] == {"max_tokens": 5, "temperature": 0.0, "top_p": 1.0, "seed": 7}
    good = _after({**row, "generated_text": "The sea.", "num_generated_tokens": 3, "num_input_tokens": 9})
    cut = _after({**row, "key": "l", "generated_text": "The", "num_generated_tokens": 5, "num_input_tokens": 9})
    bad = _after({**row, "key": "m", "block": 4, "__inference_error__": "prompt too long"})
    batch = {name: [one[name] for one in (good, cut, bad)] for name in good}
    kept = _keeper(str(Path.cwd()), tmp_path, "/models/writer")(batch)
    assert kept["result"] == ["3"]
    answers = read_answers(tmp_path, 3)
    assert (answers["k"].text, answers["k"].finish, answers["l"].finish) == ("The sea.", "stop", "length")
    assert (answers["k"].prompt_tokens, answers["k"].completion_tokens, answers["k"].model) == (9, 3, "writer")
    bare = {
        "block": [5],
        "key": ["n"],
        "__inference_error__": ["gone"],
        "text": [None],
        "prompt_tokens": [float("nan")],
    }
    assert _keeper(str(Path.cwd()), tmp_path, "w")(bare)["result"] == ["1"]  # as rows of failures come
    assert read_answers(tmp_path, 5)["n"].failure == "engine error"
    failed = read_answers(tmp_path, 4)["m"]
    assert (failed.failure, failed.troubles) == ("engine error", {"engine error: prompt too long": 1})
