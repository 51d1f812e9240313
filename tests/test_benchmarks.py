"""The benchmarks: who knows the answers scores 1, who knows nothing scores at chance, and files, settings and stops
are dealt with before, during and after."""

import gzip
import json
import math
from pathlib import Path
from unittest.mock import Mock

import pytest

from benchmark_files import Oracle, Trusted, write_files
from sandbox_helpers import small_sandbox
from stage_fixtures import tiny_config, write_inputs
from trinity.base.errors import UsageError, UserError
from trinity.cli import main
from trinity.evals.benchmarks import answers, run
from trinity.evals.benchmarks.definitions import TASKS
from trinity.evals.benchmarks.run import entries, prepare, summarize, table
from trinity.evals.benchmarks.suites import SUITES
from trinity.evals.benchmarks.task import ChoiceTask, kind
from trinity.evals.language_model import NativeModel
from trinity.export.afmoe import export_afmoe
from trinity.model.transformer import Transformer
from trinity.rl.sandbox import pool
from trinity.rl.sandbox.limits import Limits
from trinity.rl.sandbox.worker import MissingLayerError
from trinity.tokenizer import Tokenizer

CHOICES = [name for name, task in TASKS.items() if isinstance(task, ChoiceTask)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_files(folder)
    return folder


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> NativeModel:
    folder = tmp_path_factory.mktemp("model")
    write_inputs(folder)
    model = Transformer(tiny_config(folder, model={"max_positions": 1024}).model)
    model.init_weights(3)
    return NativeModel(model, Tokenizer.load(folder / "tokenizer"), name="random")


def test_an_oracle_scores_one_on_every_task(data: Path, tmp_path: Path) -> None:
    ready, missing = prepare(entries(None, list(TASKS)), data, Trusted())
    assert not missing
    oracle = Oracle(ready)
    outcome = run.run(oracle, ready, tmp_path)
    for name, result in outcome["results"].items():
        assert result[result["metric"]]["value"] == 1.0, name
        assert result["samples"] == 12
    assert {kind(TASKS[name]) for name in outcome["results"]} == {"choice", "word", "answer", "code"}


def test_an_oracle_with_a_wrong_answer_does_not(data: Path, tmp_path: Path) -> None:
    ready, _ = prepare(entries(None, list(TASKS)), data, Trusted())
    oracle = Oracle(ready)
    oracle.right.clear()
    oracle.replies = dict.fromkeys(oracle.replies, "The answer is nothing at all")
    outcome = run.run(oracle, ready, tmp_path)
    for name, result in outcome["results"].items():
        # All choices alike: the first one is taken.
        most = 0.9 if name in CHOICES else 0.0
        assert result[result["metric"]]["value"] <= most, name


@pytest.mark.parametrize("name", CHOICES)
def test_random_weights_score_at_chance(name: str, random_model: NativeModel, tmp_path: Path) -> None:
    write_files(tmp_path / "data", 80)
    ready, _ = prepare(entries(None, [name]), tmp_path / "data")
    result = run.run(random_model, ready, tmp_path / "out")["results"][name]
    chance = result["chance"]
    error = math.sqrt(chance * (1 - chance) / result["samples"])
    assert abs(result[result["metric"]]["value"] - chance) < 3.5 * error
    assert 0.02 <= chance <= 0.5


def test_suites_have_the_report_s_tasks_and_figures() -> None:
    base = {entry.task: entry.reported for entry in SUITES["trinity-base"].entries}
    assert base == {
        "mbpp_plus": 88.62,
        "math500": 65.20,
        "hellaswag": 90.11,
        "winogrande": 80.82,
        "mmlu": 82.58,
        "mmlu_pro": 66.02,
        "triviaqa": 83.30,
        "arc_challenge": 65.44,
        "bbh": 65.70,
        "gpqa_diamond": 43.94,
    }
    shots = {name: task.shots.count if task.shots else 0 for name, task in TASKS.items()}
    assert [shots[n] for n in ("hellaswag", "winogrande", "mmlu", "mmlu_pro", "triviaqa", "gpqa_diamond")] == [5] * 6
    assert shots["arc_challenge"] == 0
    assert {entry.task for suite in SUITES.values() for entry in suite.entries} <= set(TASKS)


def test_prompts_of_the_known_forms(data: Path) -> None:
    ready = {one.task.name: one for one in prepare(entries(None, ["mmlu", "winogrande", "arc_easy", "bbh"]), data)[0]}

    def first(name: str) -> list[tuple[str, str]]:
        one = ready[name]
        assert isinstance(one.task, ChoiceTask)
        return one.task.pairs(one.records[0], one.examples(one.records[0]))

    context, letter = first("mmlu")[1]
    assert context.startswith("The following are multiple choice questions (with answers) about subject 0.\n\n")
    assert context.count("\nAnswer:") == 6
    assert context.endswith("\nAnswer:")
    assert letter == " B"
    (one, end), (other, same) = first("winogrande")
    assert end == same
    assert one.removesuffix("boat") == other.removesuffix("gull")
    assert first("arc_easy")[0][0].startswith("Question: ")
    bbh = ready["bbh"]
    shots = bbh.examples(bbh.records[0])
    prompt = bbh.task.context(bbh.records[0], shots)
    assert prompt == "Do it.\n\nQ: x\nA: So the answer is y.\n\n"
    assert summarize(bbh, [{"number": 0, "group": "task_0", "exact_match": 1.0}])["shots"] == 3


def test_a_question_is_never_its_own_example(data: Path) -> None:
    ready, _ = prepare(entries(None, ["hellaswag", "triviaqa", "gpqa_diamond"]), data)
    for one in ready:
        for record in one.records:
            shots = one.examples(record)
            assert len(shots) == 5
            assert record not in shots


def test_an_interrupted_suite_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CHUNK", 5)
    ready, _ = prepare(entries(None, ["copa", "arc_easy"]), data)
    whole = run.run(Oracle(ready), ready, tmp_path / "whole")

    class Stops(Oracle):
        def loglikelihood(self, pairs):
            if self.asked > 40:
                raise KeyboardInterrupt
            return super().loglikelihood(pairs)

    with pytest.raises(KeyboardInterrupt):
        run.run(Stops(ready), ready, tmp_path / "cut")
    with (tmp_path / "cut" / "arc_easy.jsonl").open("a") as file:
        file.write('{"number": 5, "gr')  # killed while it wrote
    again = Oracle(ready)
    assert run.run(again, ready, tmp_path / "cut") == whole
    assert 0 < again.asked < 12 * 6
    unasked = Oracle(ready)
    run.run(unasked, ready, tmp_path / "cut")
    assert unasked.asked == 0
    assert json.loads((tmp_path / "cut" / "results.json").read_text()) == whole


def test_answers_of_another_model_or_to_other_questions_are_not_mixed(data: Path, tmp_path: Path) -> None:
    ready, _ = prepare(entries(None, ["copa"]), data)
    run.run(Oracle(ready), ready, tmp_path, about={"weights": "a"})
    with pytest.raises(UserError, match="answers of another model"):
        run.run(Oracle(ready), ready, tmp_path, about={"weights": "b"})
    fewer, _ = prepare(entries(None, ["copa"], limit=3), data)
    with pytest.raises(UserError, match="other questions of copa"):
        run.run(Oracle(fewer), fewer, tmp_path, about={"weights": "a"})


def test_missing_files_are_named_with_their_place_before_anything_runs(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        prepare(entries("trinity-base"), tmp_path)
    said = str(error.value)
    assert "10 of 10 benchmarks cannot run" in said
    assert f"there is no {tmp_path}/gpqa_diamond.jsonl.gz: put GPQA Diamond" in said
    assert "mbpp_plus runs programs that the model wrote, which needs a sandbox" in said
    (data_less := tmp_path / "part").mkdir()
    for name in ("mmlu_test", "copa_val"):
        (data_less / f"{name}.jsonl.gz").write_bytes((data / f"{name}.jsonl.gz").read_bytes())
    ready, missing = prepare(entries(None, ["mmlu", "copa"]), data_less, skip_missing=True)
    assert [one.task.name for one in ready] == ["copa"]
    assert "mmlu_dev.jsonl.gz: put MMLU's dev split there" in missing["mmlu"]
    outcome = run.run(Oracle(ready), ready, tmp_path / "out", missing=missing)
    assert ("mmlu", "-", "not run", "", "", "", "") in table(outcome)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no questions"),
        (b'{"question": "x"}\n', "line 1 has no field 'choices'"),
        (b'{"question": "x", "choices": ["a", "b"], "gold": 0}\n{"quest', "line 2 is not JSON"),
        (b"[1, 2]\n", "line 1 has no field"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "copa_val.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=says):
        prepare(entries(None, ["copa"]), tmp_path)


def test_a_truncated_gzip_is_named(tmp_path: Path) -> None:
    (tmp_path / "copa_val.jsonl.gz").write_bytes(gzip.compress(b"{}" * 5000)[:-12])
    with pytest.raises(UserError, match="cannot be read"):
        prepare(entries(None, ["copa"]), tmp_path)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'trinity-base'"):
        entries("trinity-bas")
    with pytest.raises(UsageError, match="did you mean 'winogrande'"):
        entries(None, ["winogrand"])


def test_the_command_line_checks_before_it_loads_a_model(data: Path, tmp_path: Path, capsys) -> None:
    assert main(["eval", "nowhere", "--suite", "quick", "--out", str(tmp_path / "o")]) == 2
    assert "--data DIR" in capsys.readouterr().err
    assert main(["eval", "nowhere", "--suite", "quick", "--data", str(data)]) == 2
    assert main(["eval", "nowhere", "--limit", "3"]) == 2
    assert main(["eval", "nowhere", "--bench", "copa", "--data", str(data), "--out", str(tmp_path / "o")]) == 1
    assert "there is no model at nowhere" in capsys.readouterr().err


def test_programs_run_in_the_sandbox_or_not_at_all(data: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    arguments = ["--suite", "trinity-base", "--data", str(data), "--out", str(tmp_path / "o")]
    missing = MissingLayerError("user namespace", "not permitted")
    monkeypatch.setattr(pool, "Sandbox", Mock(side_effect=missing))
    assert main(["eval", "nowhere", *arguments]) == 1
    said = capsys.readouterr().err
    assert "mbpp_plus runs programs that the model wrote, which needs a sandbox: " in said
    assert "the layer 'user namespace' is missing (not permitted)" in said
    monkeypatch.undo()
    with small_sandbox(Limits(seconds=30.0)) as sandbox:
        ready, gone = prepare(entries(None, ["mbpp_plus", "humaneval"]), data, sandbox)
        assert not gone
        outcome = run.run(Oracle(ready), ready, tmp_path / "right")["results"]
        assert [outcome[name]["pass@1"]["value"] for name in ("mbpp_plus", "humaneval")] == [1.0, 1.0]
        wrong = Oracle(ready)
        wrong.replies = dict.fromkeys(wrong.replies, "    import os\n    os._exit(0)\nimport os\nos._exit(0)\n")
        outcome = run.run(wrong, ready, tmp_path / "wrong")["results"]
        assert [outcome[name]["pass@1"]["value"] for name in ("mbpp_plus", "humaneval")] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("So the answer is (C).", "C"),
        ("The answer is B", "B"),
        ("answer: d", "D"),
        ("First (A) seems right. The answer is (B). No, the answer is (D).", "D"),
        (r"Thus \boxed{B}", "B"),
        ("C", "C"),
        ("I do not know", None),
        ("The answer is (J).", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert answers.chosen_letter(text, 4) == letter


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (r"\frac{1}{2}", "1/2", True),
        (r"\dfrac12", r"\frac{1}{2}", True),
        ("0.5", r"\frac{1}{2}", True),
        ("1,000", "1000", True),
        ("x=5", "5", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True),
        (r"90^\circ", "90", True),
        (r"\text{Evelyn}", "Evelyn", True),
        ("(1,234)", "(1234)", True),
        ("12", "21", False),
        ("-5", "5", False),
        (r"\frac{1}{3}", "0.333", False),
        ("", "", False),
    ],
)
def test_equal_expressions(one: str, other: str, equal: bool) -> None:
    assert answers.equal_math(one, other) is equal
    assert answers.equal_math(other, one) is equal


def test_final_answers() -> None:
    assert answers.final_answer(r"so \boxed{\frac{1}{2}} and done") == r"\frac{1}{2}"
    assert answers.final_answer("Final Answer: The final answer is $[2,5)$. I hope it is correct.") == "[2,5)"
    assert answers.final_answer("It is 12, then 1,024.") == "1,024"
    assert answers.after_phrase("Hence. So the answer is valid.") == "valid"
    assert answers.matches_any(" The Beatles\nQuestion", ["Beatles"])
    assert not answers.matches_any(" Beatles fans", ["Beatles"])
    assert answers.contains_any("It was Paris, in 1900.", ["paris"])
    assert not answers.contains_any("It was Parisian.", ["Paris"])


def test_the_command_line_scores_a_saved_model(data: Path, random_model: NativeModel, tmp_path: Path, capsys) -> None:
    model = random_model.model
    export_afmoe(model, model.config, random_model.tokenizer, tmp_path / "model")
    arguments = ["eval", str(tmp_path / "model"), "--bench", "copa", "--bench", "triviaqa", "--limit", "4"]
    arguments += ["--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert (found["copa"]["samples"], found["copa"]["chance"]) == (4, 0.5)
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "4 of 4 answers are there already" in captured.err
    assert captured.out.splitlines()[0].startswith("benchmark  metric")
    capsys.readouterr()
    assert main([*arguments[:-6], "--limit", "3", *arguments[-6:]]) == 1
    assert "other questions of copa" in capsys.readouterr().err
