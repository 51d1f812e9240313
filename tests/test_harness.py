"""Our scores are those of the public evaluation harness's own `hf` model on an exported checkpoint.

The harness brings some forty packages (datasets, scikit-learn, sacrebleu ...), so it is the extra `eval` and no part of
`dev`: these tests are skipped without it.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra eval: pip install 'trinity-moe[eval]'")
pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="the harness's hf model needs accelerate")

from benchmark_files import Trusted, write_files
from stage_fixtures import noise, tiny_config, write_inputs
from trinity.evals.benchmarks.definitions import TASKS
from trinity.evals.benchmarks.run import Ready, entries, prepare
from trinity.evals.benchmarks.task import AnswerTask, ChoiceTask, WordTask
from trinity.evals.language_model import NativeModel, Prompt
from trinity.export.afmoe import export_afmoe
from trinity.infer.load import load
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
# Types of question: letters and texts as choices, a common end, a last word, a whole text, a generated answer.
SCORED = ["mmlu", "gpqa_diamond", "hellaswag", "arc_challenge", "winogrande", "copa", "piqa", "lambada"]
GENERATED = ["triviaqa", "bbh", "math500", "mmlu_pro"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bench` with files, and `model`, a public model directory."""
    folder = tmp_path_factory.mktemp("harness")
    write_inputs(folder)
    write_files(folder / "bench", 8)
    # No padding of the vocabulary: our engine never samples it, the harness's model may.
    size = Tokenizer.load(folder / "tokenizer").vocab_size
    config = tiny_config(folder, model={"max_positions": 1024, "vocab_size": size}).model
    model = Transformer(config)
    model.init_weights(11)
    with torch.no_grad():  # larger weights than at the start, so that log-likelihoods differ
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    export_afmoe(model, config, Tokenizer.load(folder / "tokenizer"), folder / "model", dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Any, Any]:
    """(ours inside the harness, the harness's own)."""
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    from trinity.evals.harness import HarnessModel

    model, tokenizer = load(folder / "model", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=4, max_length=1024)
    return HarnessModel(NativeModel(model, tokenizer, batch_tokens=3000, name="ours")), theirs


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def ready(folder: Path, name: str) -> Ready:
    ((one,), _) = prepare(entries(None, [name]), folder / "bench", Trusted())
    return one


@pytest.mark.parametrize("name", SCORED)
def test_log_likelihoods_are_the_same(folder: Path, both: tuple[Any, Any], name: str) -> None:
    one = ready(folder, name)
    pairs: list[tuple[str, str]] = []
    for record in one.records:
        shots = one.examples(record)
        if isinstance(one.task, ChoiceTask):
            pairs += one.task.pairs(record, shots)
        else:
            assert isinstance(one.task, WordTask)
            pairs.append((one.task.question(record), one.task.answer(record)))
    ours, theirs = (model.loglikelihood(instances("loglikelihood", list(pairs))) for model in both)
    assert len({round(logprob, 3) for logprob, _ in ours}) > 1
    for (logprob, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert logprob == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert greedy == expected_greedy


def test_whole_texts_are_the_same(both: tuple[Any, Any]) -> None:
    texts = [(noise(number, 12 * (number + 1)),) for number in range(6)]  # the last ones exceed the positions
    ours, theirs = (model.loglikelihood_rolling(instances("loglikelihood_rolling", list(texts))) for model in both)
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", GENERATED)
def test_generated_answers_are_the_same(folder: Path, both: tuple[Any, Any], name: str) -> None:
    one = ready(folder, name)
    assert isinstance(one.task, AnswerTask)
    asked = []
    for record in one.records[:4]:
        prompt: Prompt = one.task.prompt(both[0].model, record, one.examples(record))
        asked.append((prompt.text, {"until": list(prompt.until), "max_gen_toks": 24, "do_sample": False}))
    ours, theirs = (model.generate_until(instances("generate_until", list(asked))) for model in both)
    assert ours == theirs


def test_the_harness_s_evaluator_takes_our_model(folder: Path, both: tuple[Any, Any]) -> None:
    """A task of the harness over a local file gives our own score and log-likelihoods."""
    import lm_eval  # pyright: ignore[reportMissingImports]

    one = ready(folder, "arc_challenge")
    task = {
        "task": "local_arc",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "bench" / "arc_challenge_test.jsonl.gz")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    found = lm_eval.simple_evaluate(model=both[0], tasks=[task], bootstrap_iters=0)["results"]["local_arc"]
    scores = one.task.evaluate(both[0].model, [(record, []) for record in one.records])
    for metric in ("acc", "acc_norm"):
        assert found[f"{metric},none"] == pytest.approx(sum(score[metric] for score in scores) / len(scores))


def test_every_kind_of_task_is_compared() -> None:
    assert len(SCORED) + len(GENERATED) >= 6
    assert {type(TASKS[name]) for name in SCORED + GENERATED} == {ChoiceTask, WordTask, AnswerTask}
