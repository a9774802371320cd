"""Commands that say what to expect before anything is quantized."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any

import typer

from fxq.cli.options.common import JsonOption, emit_json
from fxq.planning.doctor import diagnose
from fxq.planning.gpus import GIB, PlanningError, find_gpu
from fxq.planning.plan import make_plan
from fxq.planning.report import plan_to_json
from fxq.planning.tables import plan_tables
from fxq.planning.workloads import SPATIAL_STRIDE, Workload, find_workload
from fxq.runtime.streams import stdout_console


def plan(
    model: Annotated[
        str, typer.Argument(help="self-forcing, causal-forcing, longlive, krea-14b or a causal Wan config.json.")
    ],
    gpu: Annotated[str, typer.Option("--gpu", help="As 4090, A6000, L40S, H200.")],
    minutes: Annotated[float, typer.Option("--minutes", help="Length of the video.")] = 1.0,
    window: Annotated[
        int | None, typer.Option(min=1, help="Latent frames of the windowed caches; the model's by default.")
    ] = None,
    sink: Annotated[int | None, typer.Option(min=0, help="Of these, frames from the start that stay.")] = None,
    frames_per_chunk: Annotated[int | None, typer.Option(min=1, help="Latent frames generated together.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising calls per chunk.")] = None,
    size: Annotated[str, typer.Option(help="Height x width of the video in pixels.")] = "480x832",
    other_gib: Annotated[
        float, typer.Option(min=0, help="Memory that other things take: text encoder, VAE, other programs.")
    ] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Estimate from shapes alone what fits a GPU at which minute and how fast it may be. Nothing is loaded or run."""
    try:
        given = {"frames_per_chunk": frames_per_chunk, "steps": steps, "sink": sink, "latent": _latent(size)}
        chosen = {name: value for name, value in given.items() if value is not None}
        workload = _workload(model, chosen, window)
        result = make_plan(workload, find_gpu(gpu), minutes, window, int(other_gib * GIB))
    except PlanningError as error:
        raise typer.BadParameter(str(error)) from None
    if as_json:
        emit_json(plan_to_json(result))
        return
    for part in plan_tables(result):
        stdout_console(highlight=False).print(part)


def _workload(model: str, chosen: dict[str, Any], window: int | None) -> Workload:
    workload = find_workload(model)
    if window is not None and workload.window != -1:
        chosen["window"] = window
    return dataclasses.replace(workload, **chosen)


def _latent(size: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", size)
    if found is None or any(int(side) % SPATIAL_STRIDE for side in found.groups()):
        raise PlanningError(f"size {size!r}: expected as 480x832, both multiples of {SPATIAL_STRIDE}")
    return int(found[1]) // SPATIAL_STRIDE, int(found[2]) // SPATIAL_STRIDE


def doctor(as_json: JsonOption = False) -> None:
    """Show what this machine can do and check every operator on it. Exit code 1 when one is wrong."""
    diagnosis = diagnose()
    if as_json:
        emit_json(diagnosis.to_json())
    else:
        stdout_console(highlight=False).print(diagnosis)
    if not diagnosis.ok:
        raise typer.Exit(1)
