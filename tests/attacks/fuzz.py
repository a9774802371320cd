"""A fuzzer of bundles: ``python -m tests.attacks.fuzz --minutes 10 --seed 1``.

Mutants of real bundles go through everything that reads one. Each runs in a worker process with limits of time and
memory; what ends the worker, takes longer than ten seconds or more memory than four times the files and 200 MB, raises
anything but an error of fxq, or computes something else while ``verify`` passes is a finding. A finding is named by its
number; ``--only NUMBER`` runs it again.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from typing import Any

SECONDS = 10
SPARE_BYTES = 200 << 20
TIMES = 4


def _status(field: str) -> int:
    text = pathlib.Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(field))) << 10


class Worker:
    """Makes mutants by number and runs them; lives in a process of its own."""

    def __init__(self, folder: pathlib.Path, seed: int) -> None:
        from tests.attacks import corpus

        self.folder, self.seed = folder, seed
        self.bases = [corpus.make(name, folder) for name in corpus.MAKERS]
        self.scratch = folder / "mutant"

    def run(self, number: int) -> dict[str, Any]:
        """One mutant: how it was made, how far it got, and what is wrong."""
        from tests.attacks.mutants import mutate

        source = random.Random(f"{self.seed}/{number}")
        base = source.choice(self.bases)
        program = source.random() < 0.1
        shutil.rmtree(self.scratch, ignore_errors=True)
        shutil.copytree(self.folder / f"{base.name}-program" if program else base.folder, self.scratch)
        way, sealed = mutate(self.scratch, source, [other.folder for other in self.bases])
        size = sum(file.stat().st_size for file in self.scratch.iterdir())
        report: dict[str, Any] = {"number": number, "base": base.name, "way": way, "sealed": sealed, "problems": []}
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before, started = _status("VmRSS"), time.process_time()
        report["end"] = self._stages(base, program, sealed, source, report["problems"])
        report["seconds"] = time.process_time() - started
        report["bytes"] = _status("VmHWM") - before
        if report["bytes"] > TIMES * size + SPARE_BYTES:
            report["problems"].append(f"memory: {report['bytes'] >> 20} MB for {size >> 10} KB of files")
        if report["seconds"] > SECONDS:
            report["problems"].append(f"time: {report['seconds']:.1f} seconds for {size >> 10} KB of files")
        return report

    def _stages(self, base: Any, program: bool, sealed: bool, source: random.Random, problems: list[str]) -> str:
        import fxq
        from fxq.export import verify_bundle
        from fxq.export.program import load_program

        def attempt(stage: str, call: Any) -> Any:
            try:
                return call()
            except Exception as error:  # every error is judged here
                if not type(error).__module__.startswith("fxq"):
                    last = traceback.extract_tb(error.__traceback__)[-1]
                    place = f"{pathlib.Path(last.filename).name}:{last.lineno}"
                    problems.append(f"{stage}: {type(error).__name__} at {place}: {str(error)[:300]}")
                return None

        if program:
            attempt("load_program", lambda: load_program(self.scratch))
            for file in self.scratch.glob("program.*"):
                file.unlink()
        module = attempt("load", lambda: fxq.load(self.scratch))
        verdict = None
        if module is not None or source.random() < 0.3:  # what load refuses, the others read with it
            verdict = attempt("verify", lambda: verify_bundle(self.scratch))
            attempt("inspect", lambda: _inspect(self.scratch))
        if verdict is not None and verdict.ok and module is None:
            problems.append("verify passes what load refuses")
        if module is None:
            return "refused"
        differs = attempt("call", lambda: _difference(base, module))
        limit = 0.02 if sealed else 1e-6
        if verdict is not None and verdict.ok and differs is not None and not differs <= limit:
            problems.append(f"silent: the outputs differ by {differs:.3g} of their norm and verify passes")
        attempt("summary", lambda: fxq.summary(module).to_json())
        if source.random() < 0.5:
            fast = attempt("optimize", lambda: fxq.optimize(module))
            if fast is not None:
                attempt("call of the optimized", lambda: _difference(base, fast))
        else:
            attempt("apply", lambda: fxq.apply(base.model, module))
            attempt("bind", lambda: fxq.bind(base.model, module))
        if source.random() < 0.4:
            self._exports(module, source, attempt)
        return "verified" if verdict is not None and verdict.ok else "loaded"

    def _exports(self, module: Any, source: random.Random, attempt: Any) -> None:
        import fxq
        from fxq.export.interop import Options, export_bundle

        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            attempt("save", lambda: fxq.save(module, pathlib.Path(out) / "b"))
            target = source.choice(["comfy", "compressed-tensors", "vllm-omni", "lightx2v", "diffusers-torchao"])
            options = Options(float_dtype=None, widen=True, base_config={})
            attempt(target, lambda: export_bundle(self.scratch, target, pathlib.Path(out) / "e", options))
            if source.random() < 0.02:
                attempt("export_program", lambda: fxq.export_program(module, pathlib.Path(out) / "p"))
                attempt("export_onnx", lambda: fxq.export_onnx(module, pathlib.Path(out) / "m.onnx"))


def _inspect(folder: pathlib.Path) -> None:
    from fxq.cli.quantize import _inspect_bundle

    with contextlib.redirect_stdout(io.StringIO()):
        _inspect_bundle(folder, False)


def _difference(base: Any, module: Any) -> float:
    """Largest relative difference from what the original bundle computes and leaves in its inputs."""
    from tests.attacks.corpus import called

    outputs = called(module, base.args, base.kwargs)
    if [(t.shape, t.dtype) for t in outputs] != [(t.shape, t.dtype) for t in base.outputs]:
        return float("inf")
    pairs = zip(outputs, base.outputs, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)) for a, b in pairs)


def work(folder: pathlib.Path, seed: int) -> None:
    """The worker: numbers on stdin, reports on stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    warnings.simplefilter("ignore")
    worker = Worker(folder, seed)
    room = _status("VmSize") + (4 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.run(int(line))), file=out, flush=True)


class Process:
    """A worker process."""

    def __init__(self, seed: int) -> None:
        self.folder = tempfile.mkdtemp(prefix="fxq-fuzz-")
        command = [sys.executable, "-m", "tests.attacks.fuzz", "--work", self.folder, "--seed", str(seed)]
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
        )
        if not self._answer(600):
            raise RuntimeError("the worker does not start; run it alone with --work FOLDER")

    def _answer(self, seconds: float) -> str:
        assert self.child.stdout is not None
        ready, _, _ = select.select([self.child.stdout], [], [], seconds)
        return self.child.stdout.readline() if ready else ""

    def run(self, number: int, seconds: float) -> dict[str, Any]:
        """The report of one mutant; a worker that dies or takes too long gives none and is at its end."""
        assert self.child.stdin is not None
        self.child.stdin.write(f"{number}\n")
        if line := self._answer(seconds):
            return dict(json.loads(line))
        code = self.child.poll() if self.child.poll() is not None else self._late()
        problem = f"hang: no end within {seconds:g} seconds" if code is None else f"crash: exit status {code}"
        self.close()
        return {"number": number, "end": "lost", "seconds": seconds, "bytes": 0, "problems": [problem]}

    def _late(self) -> int | None:
        try:
            return self.child.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """End the worker and remove its files."""
        self.child.kill()
        self.child.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def campaign(
    minutes: float, seed: int, first: int = 0, most: int = sys.maxsize, patience: float = SECONDS
) -> dict[str, Any]:
    """Run mutants for some time.

    Args:
        minutes: how long.
        seed: of all mutants.
        first: number of the first.
        most: end after so many.
        patience: seconds before a mutant counts as hanging.

    Returns:
        ``mutants``, ``ends`` (how far they got), ``findings``, ``slowest`` seconds, ``largest`` bytes, ``seconds``.
    """
    worker, started = Process(seed), time.monotonic()
    ends: collections.Counter[str] = collections.Counter()
    findings, slowest, largest, number = [], 0.0, 0, first
    while time.monotonic() - started < 60 * minutes and number < first + most:
        report = worker.run(number, patience)
        ends[report["end"]] += 1
        slowest, largest = max(slowest, report["seconds"]), max(largest, report["bytes"])
        if report["problems"]:
            findings.append(report)
            print(json.dumps(report), flush=True)
        if worker.child.poll() is not None:
            worker = Process(seed)
        number += 1
        if number % 1000 == 0:
            print(f"{number - first} mutants, {dict(ends)}", flush=True)
    worker.close()
    seconds = round(time.monotonic() - started, 1)
    return {
        "mutants": number - first,
        "ends": dict(ends),
        "findings": findings,
        "slowest": round(slowest, 2),
        "largest": largest,
        "seconds": seconds,
    }


def main() -> int:
    """Command line; the exit status is 1 when there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--only", type=int, help="run this mutant alone, in this process")
    parser.add_argument("--patience", type=float, default=SECONDS, help="seconds before a mutant counts as hanging")
    parser.add_argument("--work", type=pathlib.Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work is not None:
        work(given.work, given.seed)
        return 0
    if given.only is not None:
        with tempfile.TemporaryDirectory(prefix="fxq-fuzz-") as folder:
            report = Worker(pathlib.Path(folder), given.seed).run(given.only)
        print(json.dumps(report, indent=1))
        return bool(report["problems"])
    result = campaign(given.minutes, given.seed, given.first, patience=given.patience)
    print(json.dumps({key: value for key, value in result.items() if key != "findings"}))
    print(f"{len(result['findings'])} findings", flush=True)
    return bool(result["findings"])


if __name__ == "__main__":
    raise SystemExit(main())
