"""Verbs that use models: generate, chat."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trinity.base.errors import UsageError, UserError
from trinity.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    note,
    print_json,
    read_text,
)

if TYPE_CHECKING:
    from trinity.infer.documents import Gathered

ModelArgument = Annotated[Path, typer.Argument(help="Model directory, run directory or checkpoint.", metavar="PATH")]
MaxTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens of the answer at most.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 always takes the most probable token.")]
TopP = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="Share of the probability that is sampled from.")
]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Most probable tokens that are sampled from; 0 is all.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="The same seed gives the same text.")]


def generate(
    path: ModelArgument,
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; - reads standard input.", metavar="PROMPT")
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option("--prompt-file", help="File, or folder of text files, before PROMPT; repeat.", metavar="FILE"),
    ] = None,
    max_new_tokens: MaxTokens = 256,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text; it appears as it is generated.

    A long prompt shows how much of it is read.
    """
    import trinity
    from trinity.cli.reading import ReadingView
    from trinity.infer.documents import check_room

    if prompt is None and not prompt_file:
        raise UsageError("nothing to continue: give a PROMPT or --prompt-file FILE")
    gathered = _gather(prompt_file)
    text = "\n\n".join(([gathered.text] if gathered else []) + ([read_text(prompt)] if prompt is not None else []))
    model, tokenizer = trinity.load(path, device=device, dtype=dtype)
    if gathered is not None:
        check_room(gathered, tokenizer, tokenizer.encode(text), model.config.max_positions, max_new_tokens)
    with ReadingView() as view:
        answer = trinity.generate(
            model,
            tokenizer,
            text,
            on_text=None if as_json else _print_now,
            on_prompt=view.show,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )
    if as_json:
        print_json({"prompt": text, "text": answer})
    else:
        print()


def chat(
    path: ModelArgument,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", help="Text file, or folder of text files, to talk about; repeat.", metavar="FILE"),
    ] = None,
    max_new_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Talk to a model, about files too.

    Ctrl-C stops an answer, Ctrl-D ends; /reset forgets the conversation.
    """
    import trinity
    from trinity.cli.reading import ReadingView
    from trinity.infer.chat import ChatSession
    from trinity.infer.sampling import SamplingParams

    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    documents = _gather(file)
    model, tokenizer = trinity.load(path, device=device, dtype=dtype)
    session = ChatSession(model, tokenizer, system=system, documents=documents, params=params)
    if sys.stdin.isatty():
        note("Ctrl-C stops an answer, Ctrl-D ends, /reset forgets the conversation.")
    while (line := _read_line()) is not None:
        if line.strip() == "/reset":
            session.reset()
            continue
        if not line.strip():
            continue
        with ReadingView() as view:
            answer = session.send(line, view.show)
            try:
                for piece in answer:
                    _print_now(piece)
            except UserError as error:
                if not sys.stdin.isatty():  # nobody is there to say it in other words
                    raise
                note(str(error))
            except KeyboardInterrupt:
                answer.close()
        print()
        if session.dropped:
            note(f"(the context is full: the first {session.dropped} messages were left out)")


def _gather(paths: list[Path] | None) -> "Gathered | None":
    """The files that a person named, and a word on what was skipped in folders."""
    from trinity.infer.documents import gather

    if not paths:
        return None
    gathered = gather(paths)
    if gathered.skipped:
        shown = ", ".join(gathered.skipped[:3]) + (", ..." if len(gathered.skipped) > 3 else "")
        note(f"{len(gathered.documents)} files; skipped {len(gathered.skipped)} that are no text or empty: {shown}")
    return gathered


def _print_now(text: str) -> None:
    print(text, end="", flush=True)


def _read_line() -> str | None:
    """The next line of the person; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8: {error}") from None
