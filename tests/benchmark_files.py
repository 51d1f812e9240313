"""Made-up benchmark files in the forms that the tasks read, and models that know or know nothing."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from trinity.evals.benchmarks.definitions import TASKS, gold_letter
from trinity.evals.benchmarks.run import Ready
from trinity.evals.benchmarks.task import AnswerTask, ChoiceTask, WordTask
from trinity.evals.language_model import Likelihood, Prompt

WORDS = """
    sea boat net wind storm sky old calm winter morning harbour rope salt stone light wave gull sand tide
""".split()  # noqa: SIM905


def phrase(draws: Random, count: int) -> str:
    return " ".join(draws.choice(WORDS) for _ in range(count))


def record(name: str, number: int, draws: Random) -> dict[str, Any]:
    """A record of the file `name`; which choice is right is drawn, so that nothing but knowledge tells it."""
    own = {"id": f"{name}-{number}"}
    if name == "bbh_cot_prompts":
        return {
            "task": f"task_{number}",
            "prompt": "a line for crawlers\n-----\nDo it.\n\nQ: x\nA: So the answer is y.",
        }
    if name.startswith("winogrande"):
        return {
            **own,
            "sentence": f"{phrase(draws, 4)} _ {phrase(draws, 5)}.",
            "choices": ["boat", "gull"],
            "gold": draws.randrange(2),
        }
    if name == "lambada_1000":
        return {**own, "context": phrase(draws, 12), "answer": draws.choice(WORDS)}
    if name == "mbpp_plus":
        return {
            "task_id": f"Mbpp/{number}",
            "prompt": f'"""\nReturn {number}.\n"""',
            "entry_point": "f",
            "canonical_solution": f"def f():\n    return {number}",
            "assertion": f"assert f() == {number}",
        }
    if name == "humaneval":
        return {
            "task_id": f"HumanEval/{number}",
            "prompt": f"def f{number}():\n",
            "entry_point": f"f{number}",
            "canonical_solution": f"    return {number}\n",
            "test": f"def check(candidate):\n    assert candidate() == {number}\n",
        }
    if name in ("bbh", "triviaqa_3000", "simpleqa", "aime25", "math500", "math_train4500"):
        answer = str(number * 7) if name in ("aime25", "math500", "math_train4500") else phrase(draws, 2)
        more = {"task": f"task_{number % 2}", "aliases": [answer, "other"], "subject": "algebra"}
        return {
            **own,
            **more,
            "question": f"{phrase(draws, 8)} {number}",
            "answer": answer,
            "solution": f"It is {answer}.",
        }
    count = 2 if name in ("copa_val", "piqa_val") else 10 if name.startswith("mmlu_pro") else 4
    gold = draws.randrange(count)
    return {
        **own,
        "question": f"{phrase(draws, 8)} {number}",
        "choices": [phrase(draws, draws.randrange(1, 5)) for _ in range(count)],
        "gold": gold,
        "subject": f"subject_{number % 2}",
        "category": f"category_{number % 2}",
        "rationale": f"A: Let's think step by step. So it is. The answer is ({'ABCDEFGHIJ'[gold]}).",
    }


def write_files(folder: Path, count: int = 12) -> None:
    """Every task's file and those of its examples, the last named source of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS.values():
        for source in (task.source, *(task.shots.sources[-1:] if task.shots else ())):
            draws = Random(source.name)
            lines = [json.dumps(record(source.name, number, draws)) for number in range(count)]
            (folder / f"{source.name}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))


class Oracle:
    """Knows the answers of the questions that it is shown."""

    name = "oracle"

    def __init__(self, ready: Sequence[Ready]) -> None:
        self.right: set[tuple[str, str]] = set()
        self.replies: dict[str, str] = {}
        self.asked = 0
        for one in ready:
            for record in one.records:
                shots, task = one.examples(record), one.task
                if isinstance(task, ChoiceTask):
                    self.right.add(task.pairs(record, shots)[record["gold"]])
                elif isinstance(task, WordTask):
                    self.right.add((task.context(record, shots) + task.question(record), task.answer(record)))
                elif isinstance(task, AnswerTask):
                    by_letter = task.name.startswith("mmlu_pro")
                    reply = f" The answer is ({gold_letter(record)})." if by_letter else task.answer(record)
                    self.replies[task.prompt(self, record, shots).text] = reply

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        self.asked += len(pairs)
        return [Likelihood(0.0, True) if pair in self.right else Likelihood(-99.0, False) for pair in pairs]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        return [0.0 for _ in texts]

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        self.asked += len(prompts)
        return [self.replies[prompt.text] for prompt in prompts]

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        return json.dumps(list(messages))


class Trusted:
    """Runs the tests' own programs; no sandbox."""

    def passes(self, program: str, *, seconds: float) -> bool:
        try:
            exec(program, {})
        except Exception:
            return False
        return True
