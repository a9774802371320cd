"""Memory, time and size of quantizing models of true size with ``fxq quantize``, each job in a process of its own.

python -m benchmarks.size --folder /tmp/size                 # 1.3B: all jobs, and one that is killed and run again
python -m benchmarks.size --folder /tmp/size --large         # 14B as well: 60 GB of disk
python -m benchmarks.size --folder /tmp/size --only '1.3b w?a8'  # some jobs
python -m benchmarks.size --table                            # the table of docs/size.md, from the stored result

Stored rows of jobs that are not run stay in the result. Weights are random (``benchmarks.synthetic``), so nothing is
said about quality here.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fnmatch
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.synthetic import SIZES, write_checkpoint, write_prompts
from fxq.environment import environment
from fxq.export import read_manifest
from fxq.export.files import sha256
from fxq.models.families import FAMILIES
from fxq.planning.memory import meta_model

RESULT = pathlib.Path("benchmarks/results/size.json")
SMALL = ("--frames", "3", "--height", "16", "--width", "16")
DATA = ("--videos", "1")
TARGETS = {"w8": (0.52, 1.95), "w4": (0.29, 3.4)}
"""By bits: block linears over bf16 at most, and how much smaller the whole file is at least."""
ROOM = {"1.3b": 8e9, "14b": 60e9}
"""Bytes of disk for the weights, the checkpoint files and the bundle."""
LIMITS = {"1.3b": 3e9, "14b": 20e9}
"""Bytes of memory that a job may take."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of ``fxq quantize``."""

    size: str
    recipe: str
    data: bool = False

    @property
    def name(self) -> str:
        """Unique among the jobs."""
        return f"{self.size} {self.recipe}"


JOBS = (
    Job("1.3b", "w8a8-dynamic"),
    Job("1.3b", "w4a8-dynamic"),
    Job("1.3b", "w8a8", data=True),
    Job("1.3b", "w4a8", data=True),
    Job("14b", "w8a8-dynamic"),
    Job("14b", "w4a8-dynamic"),
)


def command_of(job: Job, folder: pathlib.Path, weights: pathlib.Path, spill: bool = True) -> list[str]:
    """The command line of a job; ``spill`` gives it a checkpoint directory."""
    parts = ["quantize", "--model", SIZES[job.size].family, "--checkpoint", str(weights), "--recipe", job.recipe]
    parts += [*SMALL, "--out", str(folder / "bundle"), "--quiet"]
    if job.data:
        parts += [*DATA, "--prompts", str(folder / "prompts.safetensors")]
    if spill:
        parts += ["--checkpoint-dir", str(folder / "layers")]
    return [sys.executable, "-m", "fxq", *parts]


def run(command: Sequence[str], kill_when: pathlib.Path | None = None, files: int = 0) -> dict[str, Any]:
    """Run a command and measure it.

    Args:
        command: the command line.
        kill_when: folder; once it holds ``files`` finished layers the process gets SIGKILL.
        files: see ``kill_when``.

    Returns:
        Seconds, peak memory in bytes, exit code, and the last lines that it wrote.
    """
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            peak = max(peak, _peak_bytes(process.pid))
            if kill_when is not None and len(list(kill_when.glob("*.safetensors"))) >= files:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.05)
        errors.seek(0)
        told = errors.read()
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": peak,
        "exit_code": process.returncode,
        "told": told.strip().splitlines()[-12:],
    }


def _peak_bytes(pid: int) -> int:
    """Most memory of another process since its program started; ``ru_maxrss`` would count this one's as well."""
    try:
        text = pathlib.Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM:")), 0)


def folder_bytes(folder: pathlib.Path) -> int:
    """Bytes that a folder's files take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def sizes(bundle: pathlib.Path, size: str) -> dict[str, Any]:
    """Bytes of a bundle's weight file and of its quantized block linears, beside those of the model in bf16."""
    manifest, model = read_manifest(bundle), meta_model(FAMILIES[SIZES[size].family].config)
    widths = {"uint8": 1, "int8": 1, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2}
    stored = {n: widths[e.dtype] * _count(e.shape) for n, e in manifest.tensors.items()}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    blocks = {n: e for n, e in manifest.layers.items() if n.startswith("blocks.") and e.plan["scheme"] is not None}
    own = sum(stored[name] for entry in blocks.values() for name in entry.tensors)
    names = [f"{layer}.{part}" for layer in blocks for part in ("weight", "bias")]
    bf16 = 2 * sum(_count(shapes[name]) for name in names if name in shapes)
    whole = 2 * sum(map(_count, shapes.values()))
    file = (bundle / "model.safetensors").stat().st_size
    return {
        "file_bytes": file,
        "bf16_file_bytes": whole,
        "times_smaller": whole / file,
        "block_bytes": own,
        "bf16_block_bytes": bf16,
        "block_ratio": own / bf16,
        "layers": len(manifest.layers),
        "quantized_layers": sum(entry.plan["scheme"] is not None for entry in manifest.layers.values()),
        "dual_scale_layers": sum(bool(entry.plan["outliers"]) for entry in manifest.layers.values()),
        "weights_sha256": manifest.files["model.safetensors"],
    }


def _count(shape: Sequence[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def no_room(job: Job, folder: pathlib.Path) -> str:
    """Why the disk is too small for a job, or ""; files of earlier runs count as room."""
    free = shutil.disk_usage(folder).free + folder_bytes(folder)
    if free >= ROOM[job.size]:
        return ""
    return f"{folder} has {free / 1e9:.0f} GB left, {job.name} needs about {ROOM[job.size] / 1e9:.0f} GB"


def verdicts(job: Job, row: Mapping[str, Any]) -> dict[str, bool]:
    """Whether a finished job keeps the targets."""
    ratio, smaller = TARGETS[job.recipe[:2]]
    return {
        "memory": row["peak_bytes"] < LIMITS[job.size],
        "block_ratio": row["block_ratio"] <= ratio,
        "times_smaller": row["times_smaller"] >= smaller,
    }


def measure(job: Job, folder: pathlib.Path, weights: pathlib.Path, spill: bool = True) -> dict[str, Any]:
    """Run a job from nothing and take its measures; its bundle stays in ``folder``."""
    _clear(folder)
    command = command_of(job, folder, weights, spill)
    row: dict[str, Any] = {"job": job.name, "checkpoint_dir": spill, "command": _shown(command, folder, weights)}
    row |= run(command)
    if row["exit_code"] == 0:
        row |= sizes(folder / "bundle", job.size)
        row["checkpoint_dir_bytes"] = folder_bytes(folder / "layers") if spill else 0
        row["targets"] = verdicts(job, row)
    return row


def measure_killed(job: Job, folder: pathlib.Path, weights: pathlib.Path, layers: int) -> dict[str, Any]:
    """Kill a job once ``layers`` of its files are there, run it again, and compare with an undisturbed bundle."""
    wanted = {path.name: sha256(path) for path in (folder / "bundle").iterdir()}
    _clear(folder)
    command = command_of(job, folder, weights)
    first = run(command, folder / "layers", layers)
    left = len(list((folder / "layers").glob("*.safetensors")))
    second = run(command)
    found = {path.name: sha256(path) for path in (folder / "bundle").iterdir()} if not second["exit_code"] else {}
    return {
        "job": f"{job.name}, killed and run again",
        "command": _shown(command, folder, weights),
        "killed_exit_code": first["exit_code"],
        "killed_after_seconds": first["seconds"],
        "files_left": left,
        "rerun": second,
        "same_weights": found.get("model.safetensors") == wanted["model.safetensors"],
        "same_files": sorted(name for name in found if found[name] == wanted.get(name)),
    }


def _shown(command: Sequence[str], folder: pathlib.Path, weights: pathlib.Path) -> str:
    text = shlex.join(["fxq", *command[3:]])
    return text.replace(str(weights), weights.name).replace(f"{folder}/", "")


def _clear(folder: pathlib.Path) -> None:
    for name in ("bundle", "layers"):
        shutil.rmtree(folder / name, ignore_errors=True)


def table(result: Mapping[str, Any]) -> str:
    """The measured jobs as a Markdown table."""
    lines = [
        "| job | checkpoint dir | peak memory | time | its files | weight file | bf16 | smaller | block linears |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["jobs"]:
        if row.get("exit_code") != 0:
            continue
        spilled = f"{row['checkpoint_dir_bytes'] / 1e9:.1f} GB" if row["checkpoint_dir"] else "-"
        lines.append(
            f"| {row['job']} | {'yes' if row['checkpoint_dir'] else 'no'} | {row['peak_bytes'] / 1e9:.2f} GB "
            f"| {row['seconds'] / 60:.1f} min | {spilled} | {row['file_bytes'] / 1e9:.2f} GB "
            f"| {row['bf16_file_bytes'] / 1e9:.2f} GB | {row['times_smaller']:.2f}x | {row['block_ratio']:.3f}x |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and write JSON, or print the stored table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, help="where weights, bundles and checkpoint files go")
    parser.add_argument("--large", action="store_true", help="14B as well")
    parser.add_argument("--only", help="jobs whose name fits this glob")
    parser.add_argument("--table", action="store_true", help="print the table of the stored result")
    parser.add_argument("--out", type=pathlib.Path, default=RESULT)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.out.read_text(encoding="utf-8"))))
        return
    if args.folder is None:
        parser.error("--folder is needed to measure")
    chosen = [job for job in JOBS if fnmatch.fnmatch(job.name, args.only or "*") and (args.large or job.size != "14b")]
    result: dict[str, Any] = {"jobs": _other_rows(args.out, chosen)}
    write_prompts(args.folder)
    for job in chosen:
        if reason := no_room(job, args.folder):
            _note(result, {"job": job.name, "skipped": reason}, args.out)
            continue
        weights = write_checkpoint(job.size, args.folder)
        _note(result, measure(job, args.folder, weights), args.out)
        if job.name == "1.3b w8a8-dynamic" and result["jobs"][-1]["exit_code"] == 0:
            _note(result, measure_killed(job, args.folder, weights, layers=60), args.out)
            _note(result, measure(job, args.folder, weights, spill=False), args.out)
    _clear(args.folder)


def _other_rows(out: pathlib.Path, chosen: Sequence[Job]) -> list[dict[str, Any]]:
    """Rows of a stored result that the chosen jobs do not replace."""
    if not out.exists():
        return []
    names = {job.name for job in chosen}
    stored: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["jobs"]
    return [row for row in stored if row["job"].split(",")[0] not in names]


def _note(result: dict[str, Any], row: dict[str, Any], out: pathlib.Path) -> None:
    """Add a row with how it was made, print it and write all rows in the order of their jobs.

    A run that stops keeps what it has.
    """
    row |= {
        "run": shlex.join(["python", "-m", "benchmarks.size", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "environment": environment() | {"memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")},
    }
    names = [job.name for job in JOBS]
    result["jobs"] = sorted((*result["jobs"], row), key=lambda row: names.index(row["job"].split(",")[0]))
    print(json.dumps(row, indent=1), flush=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
