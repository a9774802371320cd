"""Every kernel on a CUDA machine: checked, then measured alone, in a block and in a rollout; docs/gpu_benchmark.md.

python -m benchmarks.gpu --out out/gpu.json
python -m benchmarks.gpu --dry

A worker process does the work and keeps a journal. When a kernel kills it or hangs, this process starts another that
goes on behind the culprit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.tables import bars, tables

SECTIONS = ("checks", "gemm", "fused", "bandwidth", "attention", "block", "rollout")
BUDGET = 430.0
"""Seconds; :data:`GRACE` more and the worker is ended, so that all is over in 8 minutes."""
GRACE = 35.0
SILENCE = 75.0
"""Seconds without a line in the journal after which a step counts as hanging; the rollout's one step takes longer."""
STARTS = 8


def watch(worker: subprocess.Popen[bytes], journal: pathlib.Path, end: float) -> str:
    """Wait for the worker; the reason when it was ended or died, or ""."""
    while worker.poll() is None:
        time.sleep(0.2)
        now = time.time()
        touched = journal.stat().st_mtime if journal.exists() else now
        in_rollout = '"rollout/' in _last_line(journal)
        silent = now - touched > SILENCE and not in_rollout
        if now > end or silent:
            worker.kill()
            worker.wait()
            return "ended: out of time" if now > end else f"ended: nothing happened for {SILENCE:.0f} s"
    return "" if worker.returncode == 0 else f"the process died with exit code {worker.returncode}"


def _last_line(path: pathlib.Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return lines[-1] if lines else ""


def worker_command(path: pathlib.Path, args: argparse.Namespace) -> list[str]:
    """How the worker is started, now being the begin of the run."""
    command = [sys.executable, "-m", "benchmarks.gpu.worker", "--journal", str(path), "--began", str(time.time())]
    command += ["--budget", str(args.budget), "--sections", *args.sections]
    return [*command, "--dry"] if args.dry else command


def drive(path: pathlib.Path, command: list[str], end: float) -> Journal:
    """Start workers until one reaches the end, the time ``end`` has come, or one died without having done anything."""
    before = 0
    for _ in range(STARTS):
        path.touch()
        with subprocess.Popen(command, cwd=pathlib.Path(__file__).parents[2]) as worker:
            why = watch(worker, path, end)
        journal = Journal(path)
        if not why:
            return journal
        journal.bury(why)
        print(f"worker: {why}", file=sys.stderr)
        written = len(journal.lines) - len(journal.of("died"))
        if time.time() > end or written == before:
            break
        before = written
    return Journal(path)


def collect(journal: Journal, args: argparse.Namespace, seconds: float) -> dict[str, object]:
    """Everything as JSON; ``complete`` says whether a worker reached the end."""
    steps = [{key: line[key] for key in ("step", "took", "data")} for line in journal.of("done")]
    return {
        "dry": args.dry,
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        **journal.facts,
        "complete": bool(journal.of("end")),
        "deaths": [line["why"] for line in journal.of("died")],
        "skipped": [{"step": line["step"], "why": line["why"]} for line in journal.of("skip")],
        "bars": [] if args.dry else bars(steps),
        "steps": steps,
    }


def main() -> int:
    """Run, print, write.

    Returns:
        1 when a check failed, a contestant of this library was wrong or died, or a step was lost.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = pathlib.Path(os.environ.get("OUT", "out"))
    parser.add_argument("--out", type=pathlib.Path, default=folder / "gpu.json", help="default: $OUT/gpu.json")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all sections together")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--dry", action="store_true", help="the whole control flow on a CPU, small, without numbers")
    args = parser.parse_args()
    if "checks" not in args.sections:
        args.sections.insert(0, "checks")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    path = args.out.with_suffix(".jsonl").resolve()
    path.unlink(missing_ok=True)
    began = time.time()
    journal = drive(path, worker_command(path, args), began + args.budget + GRACE)
    result = collect(journal, args, time.time() - began)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text, right = tables(result)
    args.out.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
