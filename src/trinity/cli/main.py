"""The entry point: arguments in, exit status out, one paragraph for every mistake."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer

from trinity.base.errors import UsageError, UserError
from trinity.base.files import FULL
from trinity.cli.app import app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns 0 done, 1 failed, 2 wrong usage, or 128 + N when signal N ended it.

    Never raises, unless `--debug` is among the arguments.
    """
    # Threads that spin long at a barrier make a step up to fifty times slower when another program wants their core;
    # a short spin keeps most of the speed of an idle machine. Read by the OpenMP runtime when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in own  # taken out here, so that it may stand anywhere
    arguments = [a for i, a in enumerate(arguments) if a != "--debug" or i >= len(own)]
    with _termination_raises():
        return _run(arguments, debug)


def _run(arguments: list[str], debug: bool) -> int:
    try:
        status = app(args=arguments, prog_name="trinity", standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        if debug:
            raise
        return _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except typer.TyperException as error:  # the parser's own: unknown option, missing argument
        if debug:
            raise
        return _usage(error)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except _TerminatedError:
        return _fail("terminated", 128 + signal.SIGTERM)
    except BrokenPipeError:  # the reader of standard output went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as leaving:  # typer's way out of the same
        return 1 if leaving.code else 0
    except ModuleNotFoundError as error:
        if debug or (error.name or "").split(".")[0] == "trinity":
            raise
        return _fail(f"this needs the package {error.name!r}, which is not installed: pip install {error.name}", 1)
    except OSError as error:  # no permission, a disk that fails: not foreseen by the verb, but no bug either
        if debug:
            raise
        if error.errno in FULL:
            return _fail(f"the disk is full{f': {error.filename}' if error.filename else ''}", 1)
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return _fail(f"{what} (this is a bug or an unforeseen condition; --debug shows where)", 1)
    if status == 128 + signal.SIGINT:
        return _interrupted()
    return status if isinstance(status, int) else 0


class _TerminatedError(BaseException):
    """SIGTERM came; a BaseException, so that it undoes what is half done as Ctrl-C does and nobody else catches it."""


@contextmanager
def _termination_raises() -> Iterator[None]:
    """SIGTERM ends the verb as an exception. Training has its own answer: it saves first."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def terminate(*_: object) -> None:
        raise _TerminatedError

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _fail(text: str, status: int) -> int:
    from trinity.base.console import clean, redact

    print(f"trinity: {redact(clean(text))}", file=sys.stderr)
    return status


def _interrupted() -> int:
    print("\ntrinity: interrupted", file=sys.stderr)
    return 130


def _usage(error: typer.TyperException) -> int:
    """The parser's message, with the help that shows what would be right."""
    message = error.format_message().strip()
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "trinity")
    if message.startswith("Usage:"):  # a group without a verb: its help is the answer
        print(message, file=sys.stderr)
        return 2
    message = message.removesuffix(".")
    end = "" if message.endswith(("?", ")")) else ";"
    return _fail(f"{message[0].lower()}{message[1:]}{end} see {path} --help", error.exit_code)
