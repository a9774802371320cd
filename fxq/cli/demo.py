"""The ``demo`` command."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
import sys
from typing import Annotated

import typer

from fxq.cli.options.common import JsonOption, QuietOption, SeedOption, emit_json
from fxq.demo.run import DemoSettings, run_demo
from fxq.demo.store import Finished
from fxq.export import save
from fxq.export.bundle import check_bundle_place
from fxq.report.html import write_report
from fxq.report.tables import ablation_table, comparison_lines, main_table, report_to_json
from fxq.runtime.streams import stdout_console
from fxq.runtime.writable import writable_file

UNFINISHED = "unfinished"
"""Folder of what a run has made so far."""


def demo(
    out: Annotated[
        pathlib.Path, typer.Option(help="Folder for report.html, report.json and the bundles.")
    ] = pathlib.Path("out/demo"),
    videos: Annotated[int, typer.Option(min=8, help="Unseen videos to evaluate on.")] = 64,
    calibration_videos: Annotated[int, typer.Option(min=1, help="Videos to calibrate on.")] = 16,
    iterations: Annotated[int, typer.Option(min=1, help="Iterations of Q-ARVD a layer.")] = 500,
    ablation: Annotated[
        bool, typer.Option(help="Quantize with the parts of Q-ARVD alone at W4A8 too: five of fourteen runs.")
    ] = True,
    seed: SeedOption = 1,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize the shipped model at W8A8, W4A8 and W4A6 with MinMax, Q-ARVD and the presets, and measure everything.

    A run that was killed goes on with what it had quantized when it is started again with the same options.
    """
    settings = DemoSettings(
        calibration_videos=calibration_videos,
        evaluation_videos=videos,
        iterations=iterations,
        seed=seed,
        ablation_bits="w4a8" if ablation else "",
    )
    writable_file(out / "report.html")
    for bits in settings.bits:
        check_bundle_place(out / bits)
    command = shlex.join(["fxq", *sys.argv[1:]])
    finished = Finished(out / UNFINISHED, dataclasses.asdict(settings))
    report, modules = run_demo(settings, command, progress=not quiet, finished=finished)
    page = write_report(report, out / "report.html")
    data = report_to_json(report)
    (out / "report.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    for bits, module in modules.items():
        save(module, out / bits)
    finished.clear()
    if as_json:
        emit_json(data)
        return
    console = stdout_console()
    console.print(main_table(report))
    if report.ablation:
        console.print(ablation_table(report))
    for line in comparison_lines(report):
        console.print(line)
    console.print(
        f"report: {page}   bundles: {', '.join(str(out / bits) for bits in modules)}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
