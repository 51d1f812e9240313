"""Kinds of questions: choices by log-likelihood, a word to be foretold, and answers that are generated.

A task turns a record of its file into requests, and the model's replies into a score between 0 and 1. Prompts and
metrics follow the public evaluation harness where it has the task, so that figures compare.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

from trinity.base.errors import UserError
from trinity.evals.benchmarks.records import Record
from trinity.evals.language_model import LanguageModel, Likelihood, Prompt

Score = dict[str, float]
"""By metric."""


_AT_ONCE = 16  # programs handed over at a time; the runner runs as many as it has room for


class CodeRunner(Protocol):
    """Runs programs that a model wrote, isolated from the machine and the network; from several threads at once."""

    def passes(self, program: str, *, seconds: float) -> bool:
        """Whether the program runs to its end, its tests included, and ends with status 0 within `seconds`."""
        ...


@dataclass(frozen=True)
class Source:
    """A local file that a task reads."""

    name: str
    """Of the file, without `.jsonl.gz`."""
    fields: dict[str, str]
    origin: str
    """Where the public data come from, for the message when the file is missing."""
    keep: Callable[[Record], bool] = lambda record: True


@dataclass(frozen=True)
class Shots:
    """Worked examples before the question."""

    count: int
    sources: tuple[Source, ...]
    """The first that is there is used; the task's own file serves too, the question itself left out."""
    group: str = ""
    """Field in which examples and question must agree, such as the subject."""
    each: int = 1
    """Worked examples in one record."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    name: str
    source: Source
    shots: Shots | None = None
    metric: str
    """Of the headline figure."""
    group: str = ""
    """Field by which results are also given."""
    chat: bool = False
    """The question is a user's turn."""

    @abstractmethod
    def example(self, record: Record) -> str:
        """A worked example: question and answer."""

    def header(self, record: Record) -> str:
        """What stands before the examples."""
        return ""

    def context(self, record: Record, shots: Sequence[Record]) -> str:
        """Everything before the question's own text."""
        return self.header(record) + "".join(self.example(shot) + "\n\n" for shot in shots)

    @abstractmethod
    def evaluate(self, model: LanguageModel, questions: Sequence[tuple[Record, Sequence[Record]]]) -> list[Score]:
        """Scores of (record, its examples)."""

    def chance(self, record: Record) -> float:
        """Score to be expected of a model that knows nothing."""
        return 0.0


def _letters(count: int) -> list[str]:
    return [chr(ord("A") + i) for i in range(count)]


def letter_list(choices: Sequence[str], form: str = "{}. {}") -> str:
    return "\n".join(form.format(letter, text.strip()) for letter, text in zip(_letters(26), choices, strict=False))


@dataclass(frozen=True, kw_only=True)
class ChoiceTask(Task):
    """The choice whose text is most probable after the question.

    question: text before the choice. choices: the continuations (by default " " and each of the record's choices).
    contexts: for tasks in which the choices differ before a common end (WinoGrande): the record's beginnings.
    """

    question: Callable[[Record], str]
    choices: Callable[[Record], Sequence[str]] = lambda record: [f" {choice}" for choice in record["choices"]]
    before: Callable[[Record], str] | None = None
    contexts: Callable[[Record], Sequence[str]] | None = None
    metric: str = "acc"

    def header(self, record: Record) -> str:
        return self.before(record) if self.before is not None else ""

    def example(self, record: Record) -> str:
        gold = record["gold"]
        start = self.contexts(record)[gold] if self.contexts is not None else self.question(record)
        return f"{start}{self.choices(record)[gold]}"

    def pairs(self, record: Record, shots: Sequence[Record]) -> list[tuple[str, str]]:
        """(context, continuation) of each choice."""
        before, choices = self.context(record, shots), self.choices(record)
        if self.contexts is not None:
            return [(before + start, end) for start, end in zip(self.contexts(record), choices, strict=True)]
        return [(before + self.question(record), choice) for choice in choices]

    def evaluate(self, model: LanguageModel, questions: Sequence[tuple[Record, Sequence[Record]]]) -> list[Score]:
        several = [self.pairs(record, shots) for record, shots in questions]
        found = iter(model.loglikelihood([pair for pairs in several for pair in pairs]))
        scores = []
        for (record, _), pairs in zip(questions, several, strict=True):
            scores.append(self.score(record, pairs, [next(found) for _ in pairs]))
        return scores

    def score(self, record: Record, pairs: Sequence[tuple[str, str]], found: Sequence[Likelihood]) -> Score:
        """acc: the highest log-likelihood; acc_norm: the highest for each character of the choice."""
        gold = record["gold"]
        plain = [one.logprob for one in found]
        # Characters of the choice as it stands in the record: the blank before it counts for nothing.
        long = [one.logprob / max(1, len(end.strip())) for one, (_, end) in zip(found, pairs, strict=True)]
        return {"acc": float(plain.index(max(plain)) == gold), "acc_norm": float(long.index(max(long)) == gold)}

    def chance(self, record: Record) -> float:
        return 1 / len(self.choices(record))


@dataclass(frozen=True, kw_only=True)
class WordTask(Task):
    """Whether the text's end is what the most probable tokens give (LAMBADA)."""

    question: Callable[[Record], str]
    answer: Callable[[Record], str]
    metric: str = "acc"

    def example(self, record: Record) -> str:
        return self.question(record) + self.answer(record)

    def evaluate(self, model: LanguageModel, questions: Sequence[tuple[Record, Sequence[Record]]]) -> list[Score]:
        pairs = [
            (self.context(record, shots) + self.question(record), self.answer(record)) for record, shots in questions
        ]
        return [{"acc": float(one.greedy), "logprob": one.logprob} for one in model.loglikelihood(pairs)]


@dataclass(frozen=True, kw_only=True)
class AnswerTask(Task):
    """A generated answer, right or wrong by `right(text, record)`."""

    question: Callable[[Record], str]
    answer: Callable[[Record], str]
    """As a worked example gives it, after the question's text."""
    right: Callable[[str, Record], bool]
    until: tuple[str, ...] = ()
    max_new_tokens: int = 256
    before: Callable[[Record], str] | None = None
    metric: str = "exact_match"

    def header(self, record: Record) -> str:
        return self.before(record) if self.before is not None else ""

    def example(self, record: Record) -> str:
        return self.question(record) + self.answer(record)

    def prompt(self, model: LanguageModel, record: Record, shots: Sequence[Record]) -> Prompt:
        if not self.chat:
            text = self.context(record, shots) + self.question(record)
            return Prompt(text, self.until, self.max_new_tokens)
        messages: list[dict[str, str]] = []
        for shot in shots:
            messages.append({"role": "user", "content": self.question(shot)})
            messages.append({"role": "assistant", "content": self.answer(shot).strip()})
        messages.append({"role": "user", "content": self.header(record) + self.question(record)})
        return Prompt(model.render_chat(messages), self.until, self.max_new_tokens, chat=True)

    def evaluate(self, model: LanguageModel, questions: Sequence[tuple[Record, Sequence[Record]]]) -> list[Score]:
        texts = model.generate([self.prompt(model, record, shots) for record, shots in questions])
        return [
            {self.metric: float(self.right(text, record))} for text, (record, _) in zip(texts, questions, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class CodeTask(AnswerTask):
    """A generated program, right when the program with the record's tests ends well inside the sandbox."""

    program: Callable[[str, Record], str]
    """(generated text, record) -> the program to run, tests included."""
    seconds: float = 30.0
    metric: str = "pass@1"
    right: Callable[[str, Record], bool] = field(default=lambda text, record: False, repr=False)
    runner: CodeRunner | None = None

    def evaluate(self, model: LanguageModel, questions: Sequence[tuple[Record, Sequence[Record]]]) -> list[Score]:
        if self.runner is None:
            raise UserError(no_sandbox(self.name))
        texts = model.generate([self.prompt(model, record, shots) for record, shots in questions])
        programs = [self.program(text, record) for text, (record, _) in zip(texts, questions, strict=True)]
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            passed = list(threads.map(partial(self.runner.passes, seconds=self.seconds), programs))
        return [{self.metric: float(one)} for one in passed]


def no_sandbox(name: str, reason: str = "") -> str:
    why = reason or "none is there"
    return f"{name} runs programs that the model wrote, which needs a sandbox: {why}; leave this task out"


Kind = Literal["choice", "word", "answer", "code"]


def kind(task: Task) -> Kind:
    if isinstance(task, ChoiceTask):
        return "choice"
    if isinstance(task, WordTask):
        return "word"
    return "code" if isinstance(task, CodeTask) else "answer"
