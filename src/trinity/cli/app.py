"""All verbs in the order of the pipeline."""

from typing import Annotated

import typer

from trinity.cli import (
    cluster,
    corpus,
    curating,
    exchange,
    making,
    models,
    rehearsing,
    runs,
    serving,
    training,
    vocabulary,
)
from trinity.cli.options import example

app = typer.Typer(
    name="trinity",
    help="Train, extend, tune, evaluate and use Trinity sparse mixture-of-experts language models.",
    epilog="Every verb explains itself: trinity VERB --help. "
    "Exit status: 0 done, 1 failed, 2 wrong usage, 128 + N when signal N ended it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
tokenizer_app = typer.Typer(
    help="Train a tokenizer; show how it cuts a text.", no_args_is_help=True, rich_markup_mode=None
)
data_app = typer.Typer(
    help="Prepare, inspect and verify shards of tokens.", no_args_is_help=True, rich_markup_mode=None
)
checkpoints_app = typer.Typer(help="List and verify a run's checkpoints.", no_args_is_help=True, rich_markup_mode=None)


def _version(wanted: bool) -> None:
    if wanted:
        from trinity import __version__

        print(f"trinity {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of a failure; may stand anywhere.")
    ] = False,
) -> None:
    del version, debug  # both are acted upon before a verb runs


app.command("demo", epilog=example("trinity demo --run-dir demo"))(runs.demo)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.command(
    "curate", epilog=example("trinity curate recipe.toml --out curated", "trinity data prepare curated/data ...")
)(curating.curate)
app.command(
    "pretrain", epilog=example("trinity pretrain nano data.shards=shards data.tokenizer=tok --run-dir runs/nano")
)(training.pretrain)
app.command("extend", epilog=example("trinity extend --from runs/nano extend.seq_len=65536 --run-dir runs/nano-64k"))(
    training.extend
)
app.command(
    "sft", epilog=example("trinity sft --from runs/nano-64k sft.conversations='[\"chat.jsonl\"]' --run-dir runs/chat")
)(training.sft)
app.command("rl", epilog=example("trinity rl --from runs/chat rl.steps=200 --run-dir runs/rl"))(training.rl)
app.command("eval", epilog=example("trinity eval runs/rl --task niah --task arithmetic --json"))(runs.evaluate)
app.command(
    "generate",
    epilog=example(
        "trinity generate runs/rl 'The sea' --max-new-tokens 64 --temperature 0",
        "trinity generate my-model --prompt-file book.txt 'In short:' --max-new-tokens 300",
    ),
)(models.generate)
app.command(
    "chat", epilog=example("trinity chat runs/rl --system 'Answer briefly.'", "trinity chat my-model --file book.txt")
)(models.chat)
app.command("serve", epilog=example("trinity serve my-model --port 8000"))(serving.serve)
app.command(
    "export",
    epilog=example(
        "trinity export runs/rl --out my-model --dtype bfloat16",
        "trinity export runs/rl --out my-model.gguf --format gguf",
    ),
)(exchange.export)
app.command("import", epilog=example("trinity import Trinity-Nano-Base --out runs/base"))(exchange.import_model)
app.command("rehearse", epilog=example("trinity rehearse large parallel.replicate=8 parallel.expert=8 --ranks 2048"))(
    rehearsing.rehearse
)
app.command("report", epilog=example("trinity report runs/nano"))(runs.report)
app.add_typer(checkpoints_app, name="checkpoints")
app.command("doctor", epilog=example("trinity doctor --path runs", "torchrun --nproc-per-node 8 -m trinity doctor"))(
    cluster.doctor
)

tokenizer_app.command("train", epilog=example("trinity tokenizer train books/ code/ --vocab-size 32000 --out tok"))(
    vocabulary.train_tokenizer
)
tokenizer_app.command("show", epilog=example("trinity tokenizer show tok --text 'In 1234567 words'"))(
    vocabulary.show_tokenizer
)
data_app.command(
    "prepare", epilog=example("trinity data prepare books/=prose code/=code --tokenizer tok --out shards")
)(corpus.prepare)
data_app.command("inspect", epilog=example("trinity data inspect shards"))(corpus.inspect)
data_app.command(
    "overlap", epilog=example("trinity data overlap chats.jsonl corpus/ --test bench/gsm8k_test.jsonl.gz")
)(corpus.overlap)
data_app.command(
    "traces",
    epilog=example(
        "trinity data traces sessions.jsonl --out chats.jsonl", "trinity data traces --generate 1000 --out chats.jsonl"
    ),
)(making.traces)
data_app.command(
    "retrieval", epilog=example("trinity data retrieval --tokenizer tok --shards shards --out retrieval.jsonl")
)(making.retrieval)
data_app.command("join", epilog=example("trinity data join code/ --out repositories.jsonl --tokens 65536"))(making.join)
data_app.command("verify", epilog=example("trinity data verify shards"))(corpus.verify)
checkpoints_app.command("ls", epilog=example("trinity checkpoints ls runs/nano"))(runs.list_checkpoints)
checkpoints_app.command("verify", epilog=example("trinity checkpoints verify runs/nano"))(runs.verify_checkpoints)
