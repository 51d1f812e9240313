"""Needles for a model that transformers runs: its answers are those of our engine on the same checkpoint."""

import json

import pytest
import torch

from stage_fixtures import tiny_config, write_inputs
from trinity.base.errors import UserError
from trinity.cli.main import main
from trinity.config import EvalConfig
from trinity.evals import niah
from trinity.evals.foreign import evaluate_foreign
from trinity.evals.generation import greedy
from trinity.export.afmoe import export_afmoe
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    write_inputs(folder)
    config = tiny_config(folder)
    model = Transformer(config.model)
    model.init_weights(0)
    with torch.no_grad():  # sharper, so that answers differ
        model.head.weight.mul_(4)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    export_afmoe(model, config.model, tokenizer, folder / "model", dtype="float32")
    return folder / "model", model, tokenizer


def test_answers_are_those_of_our_engine(exported, monkeypatch):
    path, model, tokenizer = exported
    seen = {}

    def remember(name):
        def evaluate(complete, tokenizer, asked):
            seen[name] = complete([q.tokens for q in asked], 6)
            return niah.score_record(asked, seen[name])

        return evaluate

    settings = EvalConfig(niah_lengths=(400,), niah_depths=2, niah_keys=2, niah_samples=2)
    asked = niah.questions(tokenizer, settings)
    remember("ours")(greedy(model, tokenizer), tokenizer, asked)
    monkeypatch.setattr(niah, "evaluate", remember("theirs"))
    overrides = ["eval.niah_lengths=[400]", "eval.niah_depths=2", "eval.niah_keys=2", "eval.niah_samples=2"]
    record = evaluate_foreign(path, overrides=overrides, device="cpu", dtype="float32", on_note=print)
    assert seen["theirs"] == seen["ours"]
    assert len(set(seen["ours"])) > 1
    assert record["samples"] == 4


def test_the_suite_of_needles_on_the_command_line(exported, capsys):
    path = str(exported[0])
    common = ["--set", "eval.niah_samples=1", "--set", "eval.niah_depths=1", "--set", "eval.niah_keys=1"]
    command = [
        "eval",
        path,
        "--suite",
        "niah",
        "--device",
        "cpu",
        "--json",
        *common,
        "--set",
        "eval.niah_lengths=[500]",
    ]
    found = []
    for more in ([], ["--transformers"]):
        assert main([*command, *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["niah"])
    assert found[0] == found[1]
    assert list(found[0]["tasks"]) == ["multikey", "single", "multivalue", "multiquery", "tracking"]
    assert main(["eval", path, "--task", "niah", "--transformers"]) == 2
    assert main(["eval", path, "--suite", "niah", "--task", "niah"]) == 2


def test_a_directory_without_a_model_is_refused(exported, tmp_path):
    exported[2].save(tmp_path)
    with pytest.raises(UserError, match="transformers cannot load"):
        evaluate_foreign(tmp_path, on_note=print)
