"""Every benchmark: its file, its prompt, its examples, its metric."""

import json
from collections.abc import Callable
from typing import Any

from trinity.evals.benchmarks import answers
from trinity.evals.benchmarks.records import Record
from trinity.evals.benchmarks.task import AnswerTask, ChoiceTask, CodeTask, Shots, Source, Task, WordTask, letter_list

_CHOICE = {"question": "text", "choices": "list of texts", "gold": "index of the right one"}
_ANSWER = {"question": "text", "answer": "text"}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def choice_file(name: str, origin: str, **more: str) -> Source:
    return Source(name, {**_CHOICE, **more}, origin, keep=lambda record: len(record["choices"]) > 1)


def letters(record: Record) -> list[str]:
    return [f" {_LETTERS[i]}" for i in range(len(record["choices"]))]


def gold_letter(record: Record) -> str:
    return _LETTERS[record["gold"]]


# Files

HELLASWAG = choice_file("hellaswag_val", "HellaSwag's validation split")
HELLASWAG_1000 = choice_file("hellaswag_val1000", "the first 1 000 of HellaSwag's validation split")
HELLASWAG_TRAIN = choice_file("hellaswag_train", "HellaSwag's training split")
_WINO = {"sentence": "text with _ for the gap", "choices": "list of two texts", "gold": "index of the right one"}
WINOGRANDE = Source("winogrande_val", _WINO, "WinoGrande's validation split")
WINOGRANDE_TRAIN = Source("winogrande_train", _WINO, "WinoGrande's training split")
MMLU = choice_file("mmlu_test", "MMLU's test split", subject="name")
MMLU_DEV = choice_file("mmlu_dev", "MMLU's dev split", subject="name")
MMLU_PRO = choice_file("mmlu_pro_test", "MMLU-Pro's test split", category="name")
MMLU_PRO_WORKED = Source(
    "mmlu_pro_validation",
    {**_CHOICE, "category": "name", "rationale": "worked answer that ends with: The answer is (X)."},
    "MMLU-Pro's validation split, with its worked answers (cot_content)",
)
ARC_CHALLENGE = choice_file("arc_challenge_test", "ARC-Challenge's test split")
ARC_EASY = choice_file("arc_easy_test", "ARC-Easy's test split")
TRIVIAQA = Source(
    "triviaqa_3000", {**_ANSWER, "aliases": "list of texts"}, "questions of TriviaQA's validation split without context"
)
TRIVIAQA_TRAIN = Source("triviaqa_train", TRIVIAQA.fields, "TriviaQA's training split")
BBH = Source("bbh", {**_ANSWER, "task": "name"}, "the 27 tasks of BIG-Bench Hard")
BBH_PROMPTS = Source("bbh_cot_prompts", {"task": "name", "prompt": "text"}, "BIG-Bench Hard's three worked examples")
GPQA = choice_file("gpqa_diamond", "GPQA Diamond, choices already in an order")
SIMPLEQA = Source("simpleqa", _ANSWER, "SimpleQA's questions")
AIME25 = Source("aime25", _ANSWER, "the 30 problems of AIME 2025, answers as integers")
MATH500 = Source("math500", {**_ANSWER, "solution": "text"}, "MATH-500")
_WORKED = {"question": "text", "solution": "text", "answer": "text"}
MINERVA = Source("minerva_shots", _WORKED, "the four worked examples of the Minerva paper")
MATH_TRAIN = Source("math_train4500", _WORKED, "problems of MATH's training split")
_MBPP = {"prompt": "text", "assertion": "tests as assert statements", "entry_point": "name"}
MBPP_PLUS = Source("mbpp_plus", _MBPP, "MBPP+ of EvalPlus")
_HUMANEVAL = {"prompt": "beginning of a function", "test": "text of check(candidate)", "entry_point": "name"}
HUMANEVAL = Source("humaneval", _HUMANEVAL, "HumanEval")
PIQA = choice_file("piqa_val", "PIQA's validation split")
OPENBOOKQA = choice_file("openbookqa_test", "OpenBookQA's test split")
COPA = choice_file("copa_val", "COPA's validation split")
LAMBADA = Source("lambada_1000", {"context": "text", "answer": "its last word"}, "1 000 of LAMBADA's test split")


# Questions


def _with_letters(record: Record) -> str:
    return f"{record['question'].strip()}\n{letter_list(record['choices'])}\nAnswer:"


def _subject(record: Record) -> str:
    name = record["subject"].replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {name}.\n\n"


def _gap(record: Record) -> tuple[str, str]:
    start, _, end = record["sentence"].partition("_")
    return start, end


def _pro_question(record: Record) -> str:
    return (
        f"Question:\n{record['question']}\nOptions:\n{letter_list(record['choices'])}\n"
        "Answer: Let's think step by step."
    )


def _pro_header(record: Record) -> str:
    return (
        f"The following are multiple choice questions (with answers) about {record['category']}. Think step by step "
        'and then finish your answer with "the answer is (X)" where X is the correct letter choice.\n\n'
    )


def _pro_worked(record: Record) -> str:
    text = record["rationale"].strip()
    for opening in ("A: Let's think step by step.", "Answer: Let's think step by step.", "Let's think step by step."):
        text = text.removeprefix(opening).strip()
    return f" {text}"


def _is_letter(text: str, record: Record) -> bool:
    return answers.chosen_letter(text, len(record["choices"])) == gold_letter(record)


def _gpqa_question(record: Record) -> str:
    return f"Question: {record['question'].strip()}\nChoices:\n{letter_list(record['choices'], '({}) {}')}\nAnswer:"


def _bbh_question(record: Record) -> str:
    if "prompt" in record:  # three worked examples in one record, below a line for crawlers
        return record["prompt"].split("-----", 1)[-1].strip()
    return f"Q: {record['question']}\nA: Let's think step by step.\n"


def _bbh_right(text: str, record: Record) -> bool:
    return answers.after_phrase(text) == record["answer"].strip()


def _minerva_question(record: Record) -> str:
    return f"Problem:\n{record['question']}\n\nSolution:"


def _minerva_worked(record: Record) -> str:
    solution = record["solution"].split("Final Answer:")[0].strip()
    return f" {solution}\nFinal Answer: The final answer is ${record['answer']}$. I hope it is correct."


def _math_right(text: str, record: Record) -> bool:
    return answers.equal_math(answers.final_answer(text), str(record["answer"]))


def _aliases(record: Record) -> list[str]:
    aliases = record["aliases"]
    return [record["answer"], *(json.loads(aliases) if isinstance(aliases, str) else aliases)]


def _chat_choice(record: Record) -> str:
    return (
        f"{record['question'].strip()}\n\n{letter_list(record['choices'], '({}) {}')}\n\n"
        'Think step by step, then finish with "The answer is (X)", where X is the letter of the right choice.'
    )


def _mbpp_program(text: str, record: Record) -> str:
    code = text
    if "```" in code:
        code = code.split("```python")[-1] if "```python" in code else code.split("```", 1)[1]
        code = code.split("```")[0]
    return f"{code}\n\nimport math\n\n{record['assertion']}\n"  # some of the tests use it


def _humaneval_program(text: str, record: Record) -> str:
    return f"{record['prompt']}{text}\n\n{record['test']}\n\ncheck({record['entry_point']})\n"


def _chat_letters(name: str, source: Source, group: str = "") -> AnswerTask:
    return AnswerTask(
        name=name,
        source=source,
        question=_chat_choice,
        answer=lambda record: f"The answer is ({gold_letter(record)}).",
        right=_is_letter,
        chat=True,
        max_new_tokens=4096,
        group=group,
    )


def _continuation(name: str, source: Source, question: Callable[[Record], str], metric: str, **more: Any) -> ChoiceTask:
    return ChoiceTask(name=name, source=source, question=question, metric=metric, **more)


def _asked(record: Record) -> str:
    return f"Question: {record['question']}\nAnswer:"


def _own_question(record: Record) -> str:
    return record["question"]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _continuation("hellaswag", HELLASWAG, _own_question, "acc_norm", shots=Shots(5, (HELLASWAG_TRAIN, HELLASWAG))),
        _continuation(
            "hellaswag_1000",
            HELLASWAG_1000,
            _own_question,
            "acc_norm",
            shots=Shots(5, (HELLASWAG_TRAIN, HELLASWAG_1000)),
        ),
        ChoiceTask(
            name="winogrande",
            source=WINOGRANDE,
            question=lambda record: _gap(record)[0],
            contexts=lambda record: [_gap(record)[0] + choice for choice in record["choices"]],
            choices=lambda record: [f" {_gap(record)[1].strip()}"] * 2,
            shots=Shots(5, (WINOGRANDE_TRAIN, WINOGRANDE)),
        ),
        _continuation(
            "mmlu",
            MMLU,
            _with_letters,
            "acc",
            choices=letters,
            before=_subject,
            shots=Shots(5, (MMLU_DEV,), "subject"),
            group="subject",
        ),
        AnswerTask(
            name="mmlu_pro",
            source=MMLU_PRO,
            shots=Shots(5, (MMLU_PRO_WORKED,), "category"),
            before=_pro_header,
            question=_pro_question,
            answer=_pro_worked,
            right=_is_letter,
            until=("Question:",),
            max_new_tokens=2048,
            group="category",
        ),
        _continuation(
            "mmlu_pro_direct",
            MMLU_PRO,
            _with_letters,
            "acc",
            choices=letters,
            shots=Shots(5, (MMLU_PRO,), "category"),
            group="category",
        ),
        _continuation("arc_challenge", ARC_CHALLENGE, _asked, "acc_norm"),
        _continuation("arc_easy", ARC_EASY, _asked, "acc_norm"),
        AnswerTask(
            name="triviaqa",
            source=TRIVIAQA,
            shots=Shots(5, (TRIVIAQA_TRAIN, TRIVIAQA)),
            question=_asked,
            answer=lambda record: f" {record['answer']}",
            right=lambda text, record: answers.matches_any(text, _aliases(record)),
            until=("\n", ".", ","),
            max_new_tokens=32,
        ),
        AnswerTask(
            name="bbh",
            source=BBH,
            shots=Shots(1, (BBH_PROMPTS,), "task", each=3),
            question=_bbh_question,
            answer=lambda record: "" if "prompt" in record else f"So the answer is {record['answer']}.",
            right=_bbh_right,
            until=("\n\nQ:", "\nQ:"),
            max_new_tokens=1024,
            group="task",
        ),
        _continuation(
            "gpqa_diamond",
            GPQA,
            _gpqa_question,
            "acc",
            choices=lambda record: [f" ({_LETTERS[i]})" for i in range(len(record["choices"]))],
            shots=Shots(5, (GPQA,)),
        ),
        AnswerTask(
            name="math500",
            source=MATH500,
            shots=Shots(4, (MINERVA, MATH_TRAIN)),
            question=_minerva_question,
            answer=_minerva_worked,
            right=_math_right,
            until=("Problem:",),
            max_new_tokens=1024,
            group="subject",
        ),
        CodeTask(
            name="mbpp_plus",
            source=MBPP_PLUS,
            question=lambda record: f"{record['prompt'].strip()}\n",
            answer=lambda record: record.get("canonical_solution", ""),
            program=_mbpp_program,
            until=("\nassert", '\n"""', "\nclass Test", "\nif __name__", "\nprint("),
            max_new_tokens=768,
        ),
        CodeTask(
            name="humaneval",
            source=HUMANEVAL,
            question=lambda record: record["prompt"],
            answer=lambda record: record.get("canonical_solution", ""),
            program=_humaneval_program,
            until=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
            max_new_tokens=768,
        ),
        _chat_letters("mmlu_chat", MMLU, "subject"),
        _chat_letters("mmlu_pro_chat", MMLU_PRO, "category"),
        _chat_letters("gpqa_diamond_chat", GPQA),
        AnswerTask(
            name="simpleqa",
            source=SIMPLEQA,
            question=lambda record: f"{record['question'].strip()} Answer in a few words.",
            answer=lambda record: record["answer"],
            right=lambda text, record: answers.contains_any(text, [record["answer"]]),
            chat=True,
            max_new_tokens=128,
            metric="contains",
        ),
        AnswerTask(
            name="aime25",
            source=AIME25,
            question=lambda record: f"{record['question'].strip()}\n\nGive the final answer in \\boxed{{}}.",
            answer=lambda record: f"\\boxed{{{record['answer']}}}",
            right=_math_right,
            chat=True,
            max_new_tokens=32768,
        ),
        _continuation("piqa", PIQA, _asked, "acc_norm"),
        _continuation("openbookqa", OPENBOOKQA, _own_question, "acc_norm"),
        _continuation("copa", COPA, _own_question, "acc"),
        WordTask(
            name="lambada",
            source=LAMBADA,
            question=lambda record: record["context"],
            answer=lambda record: f" {record['answer']}",
        ),
    )
}
