"""The process that holds the GPU: runs what the journal does not have yet. Started by benchmarks.gpu."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import torch
from torch._inductor import config as inductor

from benchmarks.gpu.attention import run_attention
from benchmarks.gpu.bandwidth import run_bandwidth
from benchmarks.gpu.block import run_block
from benchmarks.gpu.checks import run_checks
from benchmarks.gpu.gemm import run_epilogues, run_gemm
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.problems import DRY, WAN
from benchmarks.gpu.rollout import run_rollout
from benchmarks.gpu.session import Session
from fxq.bench.report import versions
from fxq.environment import environment
from fxq.runtime import timing

SECTIONS = {
    "checks": run_checks,
    "gemm": run_gemm,
    "fused": run_epilogues,
    "bandwidth": run_bandwidth,
    "attention": run_attention,
    "block": run_block,
    "rollout": run_rollout,
}
SHARES = {"checks": 75, "gemm": 105, "fused": 10, "bandwidth": 20, "attention": 15, "block": 75, "rollout": 160}
"""Seconds of each section; what one leaves, the next ones have."""


def deadlines(budget: float) -> dict[str, float]:
    """Seconds after the start from which no step of a section begins, for a whole run of ``budget`` seconds.

    The last section's step is one long one: it may begin until its share is left.
    """
    total, passed, found = sum(SHARES.values()), 0.0, {}
    for name, share in SHARES.items():
        passed += share * budget / total
        found[name] = passed
    found["rollout"] = budget - 0.7 * SHARES["rollout"] * budget / total
    return found


def machine(device: str) -> dict[str, Any]:
    """Versions and hardware."""
    facts: dict[str, Any] = {"environment": environment(), "versions": versions(), "cuda": torch.version.cuda}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["capability"] = f"sm_{properties.major}{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
    return facts


def main() -> None:
    """Run the sections in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--journal", type=pathlib.Path, required=True)
    parser.add_argument("--began", type=float, required=True)
    parser.add_argument("--budget", type=float, required=True)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS))
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    device, sizes = ("cpu", DRY) if args.dry else ("cuda", WAN)
    if not args.dry and not torch.cuda.is_available():
        parser.error("this torch sees no GPU: run on a CUDA machine, or with --dry")
    journal = Journal(args.journal)
    if "environment" not in journal.facts:
        journal.write("facts", **machine(device))
    session = Session(device, args.dry, 2 if args.dry else 7, journal, args.began, args.budget, deadlines(args.budget))
    with timing.settings(1 if args.dry else torch.get_num_threads()), inductor.patch(freezing=False):
        for name, run in SECTIONS.items():
            if name in args.sections:
                run(session, sizes)
    journal.write("end")


if __name__ == "__main__":
    main()
