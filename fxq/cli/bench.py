"""The ``bench`` command."""

from __future__ import annotations

import fnmatch
import json
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from functools import partial
from typing import Annotated, Any

import torch
import typer

from fxq.bench import cases
from fxq.bench.contest import Case, run_case
from fxq.bench.layers import model_cases
from fxq.bench.levels import block_case, linear_case, only
from fxq.bench.ours import speed_recipe
from fxq.bench.plot import FORMATS, write_plot
from fxq.bench.report import Report, case_table, layers_table, losing_rules, to_json
from fxq.bench.rollout import rollout_case
from fxq.cli.options.models import make_rollout
from fxq.export import load
from fxq.quantize import quantize
from fxq.runtime import timing
from fxq.runtime.memory.allocator import keep_memory
from fxq.runtime.streams import emit, stderr_console, stdout_console
from fxq.runtime.writable import writable_file


class Level(StrEnum):
    """What is measured."""

    linear = "linear"
    block = "block"
    rollout = "rollout"
    model = "model"


class Allocator(StrEnum):
    """What happens to freed memory."""

    default = "default"
    keep = "keep"


def make_cases(
    level: Level, quick: bool, device: str, threads: int, pattern: str, rows: Sequence[int]
) -> Iterable[Case]:
    """Cases of a level, made one after the other: the inputs of a large one are gone before the next.

    Linears have ``rows``, where there are any, in the place of their own.

    Raises:
        typer.BadParameter: when no case's name matches ``pattern``.
    """
    makers: dict[str, Callable[[], Case]] = {}
    if level is Level.linear:
        shapes = cases.QUICK_LINEARS if quick else cases.linears(rows or cases.LINEAR_ROWS)
        for linear in shapes:
            makers[linear.name] = partial(linear_case, linear, device, threads)
    elif level is Level.block:
        for block in cases.QUICK_BLOCKS if quick else cases.BLOCKS:
            makers[block.name] = partial(block_case, block, device, threads)
    else:
        video = cases.QUICK_ROLLOUT if quick else cases.ROLLOUT
        makers[video.name] = partial(rollout_case, video, device)
    return (makers[name]() for name in _matching(makers, pattern))


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    names = list(names)
    if not (found := fnmatch.filter(names, pattern)):
        raise typer.BadParameter(f"--case {pattern!r} matches no case; there are: {'; '.join(names)}")
    return found


def make_model_cases(
    model: str, bundle: pathlib.Path | None, quick: bool, device: str, pattern: str = "*"
) -> list[Case]:
    """One case per shape of layer of a model quantized by ranges alone, or of a bundle of it.

    Raises:
        typer.BadParameter: when no case's name matches ``pattern``.
    """
    rollout = make_rollout(model, 1, 0)
    if bundle is None:
        module = quantize(rollout.denoiser, rollout, speed_recipe(dual_scale=True), progress=False)
    else:
        module = load(bundle)
    found = {case.name: case for case in model_cases(module, rollout, device)}
    wanted = [found[name] for name in _matching(found, pattern)]
    return wanted[:2] if quick else wanted


def run_level(
    level: Level,
    found: Iterable[Case],
    patterns: list[str],
    settings: dict[str, Any],
    on_step: Callable[[str], None],
) -> Report:
    """Measure cases one after the other with the threads, device and rounds of ``settings``."""
    clock, rounds = timing.clock_for(settings["threads"], settings["device"])[1], settings["rounds"]
    results = []
    for case in found:
        try:
            chosen = only(case, patterns)
        except ValueError as error:
            raise typer.BadParameter(f"--only {error}") from None
        results.append(run_case(chosen, rounds, clock, on_step))
    return Report(level.value, settings, tuple(results))


def bench(
    level: Annotated[Level, typer.Option("--level", "-l", help="linear, block, rollout or model.")] = Level.linear,
    quick: Annotated[bool, typer.Option(help="Small shapes: to see that everything works, not to quote.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every contestant.")] = 1,
    rounds: Annotated[int, typer.Option(min=5, help="Samples of each contestant.")] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    case: Annotated[str, typer.Option(help="Glob of cases, as 'M1560*'.")] = "*",
    only_: Annotated[
        list[str] | None, typer.Option("--only", help="Glob of contestants beside the baselines; repeatable.")
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(min=1, help="For --level linear: rows of the layers in place of 1560 and 4680; repeatable."),
    ] = None,
    allocator: Annotated[
        Allocator, typer.Option(help="keep: freed memory stays in the process, for all contestants.")
    ] = Allocator.default,
    model: Annotated[
        str, typer.Option("--model", "-m", help="For --level model: 'tiny', or package.module:function.")
    ] = "tiny",
    bundle: Annotated[
        pathlib.Path | None, typer.Option(help="For --level model: measure this quantized bundle of the model.")
    ] = None,
    json_path: Annotated[str | None, typer.Option("--json", help="Write everything to this file; - is stdout.")] = None,
    plot: Annotated[pathlib.Path | None, typer.Option(help="Write the picture: .png, .svg or .pdf.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Measure this library against eager and compiled torch and other libraries, checked and interleaved.

    Exit code 1 when a contestant computed something wrong, which gets no ratio, or this library failed.
    """
    if bundle is not None and level is not Level.model:
        raise typer.BadParameter(f"--bundle is for --level model, not {level.value}")
    if rows and (level is not Level.linear or quick):
        raise typer.BadParameter("--rows is for --level linear without --quick")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: this torch sees no GPU")
    if plot is not None and plot.suffix not in FORMATS:
        raise typer.BadParameter(f"--plot {plot}: expected a name that ends in {', '.join(FORMATS)}")
    for given, option in ((None if json_path == "-" else json_path, "--json"), (plot, "--plot")):
        _check_output(given, option)
    if allocator is Allocator.keep and not keep_memory():
        raise typer.BadParameter("--allocator keep: the C library is not glibc; leave it at default")
    settings: dict[str, object] = {
        "command": shlex.join(["fxq", *sys.argv[1:]]),
        "quick": quick,
        "threads": threads,
        "rounds": rounds,
        "device": device,
        "clock": timing.clock_for(threads, device)[0],
        "allocator": allocator.value,
    }
    with timing.settings(threads), stderr_console(quiet).status("") as status:
        found: Iterable[Case]
        if level is Level.model:
            found = make_model_cases(model, bundle, quick, device, case)
        else:
            found = make_cases(level, quick, device, threads, case, rows or ())
        report = run_level(level, found, only_ or [], settings, status.update)
    _show(report, json_path, plot)
    if report.refused:
        raise typer.Exit(1)


def _check_output(path: str | pathlib.Path | None, option: str) -> None:
    """Refuse what cannot be written before anything is measured."""
    if path is None:
        return
    try:
        writable_file(path)
    except OSError as error:
        raise typer.BadParameter(f"{option} {path}: {error}") from error


def _show(report: Report, json_path: str | None, plot: pathlib.Path | None) -> None:
    text = json.dumps(to_json(report), indent=1) + "\n"
    if json_path == "-":
        emit(text.rstrip("\n"))
    else:
        _print(report)
        if json_path is not None:
            path = pathlib.Path(json_path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if plot is not None:
        s = report.settings
        write_plot(report.cases, plot, f"{s['threads']} thread(s), {s['clock']} clock, allocator {s['allocator']}")


def _print(report: Report) -> None:
    console = stdout_console(170)
    if report.level == Level.model:
        console.print(layers_table(report.cases))
        if rules := losing_rules(report.cases):
            console.print("Rules for a recipe file that keep these layers in floating point:\n")
            console.print(rules, markup=False, highlight=False)
    else:
        for case in report.cases:
            console.print(case_table(case))
    s = report.settings
    conditions = f"{s['threads']} thread(s), {s['clock']} clock, {s['rounds']} rounds, allocator {s['allocator']}"
    console.print(f"median (quartiles) of ratios per round; {conditions}", style="dim", highlight=False)
