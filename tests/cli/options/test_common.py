from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from fxq.cli.options.common import expanding


def pair(low: Annotated[int, typer.Option(help="The least.")] = 1, high: int = 9) -> tuple[int, int]:
    return low, high


def limit(at_most: int = 5) -> int:
    return at_most


@expanding("bounds", pair)
@expanding("most", limit)
def command(name: str, bounds: tuple[int, int], most: int, loud: bool = False) -> None:
    """Say it."""
    print(name, *bounds, most, loud)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["x"], "x 1 9 5 False"),
        (["x", "--low", "3", "--at-most", "2", "--loud"], "x 3 9 2 True"),
    ],
)
def test_a_command_has_its_own_options_and_those_of_its_groups(words, said):
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and done.stdout.strip() == said, done.output


def test_help_shows_all_of_them_and_no_group():
    app = typer.Typer()
    app.command()(command)
    told = CliRunner().invoke(app, ["--help"]).stdout
    assert "Say it." in told and "The least." in told and "--at-most" in told and "--bounds" not in told
