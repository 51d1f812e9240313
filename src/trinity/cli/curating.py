"""The verb of data curation."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trinity.base.errors import UserError
from trinity.cli.options import ForceOption, JsonOption, check_output, print_json, print_rows

if TYPE_CHECKING:
    from trinity.rl.sandbox.pool import Sandbox


def make_sandbox() -> "Sandbox":
    """What runs the programs of code recipes: the standard library alone."""
    import atexit

    from trinity.rl.sandbox.pool import Sandbox

    made = Sandbox()
    atexit.register(made.close)
    return made


def curate(
    recipe: Annotated[Path, typer.Argument(help="Recipe file.", metavar="RECIPE.toml")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings on top of the recipe's.", metavar="key=value")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Directory to write.", metavar="DIR")] = Path("curated"),
    retry: Annotated[bool, typer.Option("--retry", help="Ask again what failed in all its attempts.")] = False,
    force: ForceOption = False,
    show: Annotated[bool, typer.Option("--show", help="Print the resolved recipe; start nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Clean, deduplicate, rephrase, judge and label documents on Ray; the same command goes on after a stop."""
    from trinity.config.curate import read_recipe

    config = read_recipe(recipe, tuple(settings or ()))
    if show:
        print_json(config.model_dump(mode="json"))
        return
    check_output(out)
    from trinity.base.console import Console
    from trinity.curate.run import Progress
    from trinity.curate.run import curate as run
    from trinity.report.curation import write_curation

    with Console().progress("Curating", total=None, unit="blocks") as view:

        def on_progress(p: Progress) -> None:
            view.expect(p.blocks)
            view.set(p.done, p.step)

        found = run(config, out, retry=retry, force=force, progress=on_progress, make_runner=make_sandbox)
    page = write_curation(out)
    if as_json:
        print_json({key: value for key, value in found.items() if key not in ("samples", "plan")})
        return
    rows = []
    for stage, value in found["stages"].items():
        drops = ", ".join(f"{reason} {count:,}" for reason, count in list(value["drops"].items())[:6])
        rows.append((stage, value["in"], value["out"], value["tokens_in"], value["tokens_out"], drops))
    print_rows(("stage", "in", "out", "tokens in", "tokens out", "dropped"), rows)
    use = found["use"]
    print(
        f"\n{out / 'data'}: {found['documents']:,} documents, {found['tokens']:,} tokens ({found['tokens_by']}); "
        f"asked {use['attempts']:,} times, {use['prompt_tokens']:,} + {use['completion_tokens']:,} tokens, "
        f"cost {use['money']:.4f}; {page}"
    )
    if found["stopped"]:
        raise UserError(f"{found['stopped']}; raise the budget and run the same command to go on")
