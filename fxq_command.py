"""The script ``fxq``: lists the commands and answers mistakes at once, and loads torch and a command when one runs.

It lies beside the package because importing anything below ``fxq`` loads all of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import runpy
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
import typer.core
import typer.main

COMMANDS = {
    "demo": ("fxq.cli.demo", "Quantize the shipped model at W8A8, W4A8 and W4A6 with MinMax, Q-ARVD and the presets, "
             "and measure everything."),
    "quantize": ("fxq.cli.quantize", "Quantize a model and write a bundle. Under torchrun the ranks share the work."),
    "inspect": ("fxq.cli.quantize", "Show a bundle's layers, or what a recipe would do to a model: plan, outliers, "
                "thresholds. Needs no data."),
    "sensitivity": ("fxq.cli.quantize", "Measure how much an error in each chunk costs the whole video. Under torchrun "
                    "the ranks share the videos."),
    "generate": ("fxq.cli.generate", "Generate a video with the shipped model or a published one, in full precision or "
                 "from a bundle."),
    "verify": ("fxq.cli.export", "Check a bundle: hashes, schema, layers, one call, the kernels that run. Exit code 1 "
               "on any failure."),
    "export": ("fxq.cli.export", "Write a bundle in the format of another runtime and say what that costs per layer."),
    "play": ("fxq.cli.play", "Watch a model stream in a browser on this machine, beside a bundle of it from the same "
             "noise."),
    "card": ("fxq.cli.hub", "Write the model card of a bundle or an exported folder, as Markdown with the hub's "
             "metadata."),
    "push": ("fxq.cli.hub", "Upload a bundle or an exported folder to the hub of Hugging Face, with a model card."),
    "cache": ("fxq.cli.cache", "Compare codecs of the key-value cache on a model's own rollouts, and choose one per "
              "layer within --bits."),
    "compare": ("fxq.cli.compare", "Quantize one model by several methods at several widths and measure all of them "
                "side by side."),
    "recipe": ("fxq.cli.recipe", "Show recipes: the presets, or what a recipe file comes to."),
    "plan": ("fxq.cli.plan", "Estimate from shapes alone what fits a GPU at which minute and how fast it may be. "
             "Nothing is loaded or run."),
    "doctor": ("fxq.cli.plan", "Show what this machine can do and check every operator on it. Exit code 1 when one is "
               "wrong."),
    "bench": ("fxq.cli.bench", "Measure this library against eager and compiled torch and other libraries, checked "
              "and interleaved."),
}  # fmt: skip
"""Module of each command, which holds a function of the command's name, and the first paragraph of its help."""

_NAME = "Quantize autoregressive video diffusion models: real int8 and int4, measured."


class _Commands(typer.core.TyperGroup):
    """A group that loads the command that was asked for, and none to list them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, given, rest = super().resolve_command(ctx, args)
        return name, given if name is None else command(name), rest


def load(name: str) -> Callable[..., None] | typer.Typer:
    """The function of a command, or the group of several."""
    loaded: Callable[..., None] | typer.Typer = getattr(importlib.import_module(COMMANDS[name][0]), name)
    return loaded


def command(name: str) -> Any:
    """A command with its options, as click has it."""
    loaded = load(name)
    if isinstance(loaded, typer.Typer):
        return typer.main.get_group(loaded)
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(name)(loaded)
    return typer.main.get_command(alone)


def version() -> str:
    """The version of the package that would be loaded."""
    found = importlib.util.find_spec("fxq")
    assert found is not None and found.origin is not None
    return str(runpy.run_path(str(pathlib.Path(found.origin).with_name("version.py")))["__version__"])


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fxq {version()}")
        raise typer.Exit


app = typer.Typer(cls=_Commands, help=_NAME, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Options of all commands."""


def _not_loaded() -> None:
    """Stands for a command in lists."""


for _name, (_, _help) in COMMANDS.items():
    app.command(_name, help=_help)(_not_loaded)


def main() -> None:
    """Run the command that was asked for; lists, the version and mistakes need no library."""
    if not (sys.argv[1:2] and sys.argv[1] in COMMANDS):
        app()
        return
    try:
        cli = importlib.import_module("fxq.cli")
    except ValueError as error:
        if not str(error).startswith("FXQ_"):  # an environment variable that the package does not take
            raise
        sys.exit(f"refused: {error}")
    cli.main()


if __name__ == "__main__":
    main()
