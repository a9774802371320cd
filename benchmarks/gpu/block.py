"""One block of the model against a growing cache: eager, compiled, quantized by several recipes, and in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim

from benchmarks.gpu.attention import PACKAGES, Attend, optional
from benchmarks.gpu.floats import COMPILED, NEEDS, attending, compiled_name
from benchmarks.gpu.problems import Sizes
from benchmarks.gpu.recipes import STATIC, ours_name, recipes
from benchmarks.gpu.session import Entry, Session
from fxq import kernels
from fxq.bench import ours
from fxq.bench.cases import LEAST_SQNR, BlockShape
from fxq.bench.contest import Built
from fxq.bench.problems import Problem, block_problem
from fxq.core.ir import QuantGraph, Stage

EAGER, COMPILED_GRAPH = "bf16 eager", compiled_name("", True)
FXQ = "fxq eager"
ALL_OPS = tuple(op.name for op in kernels.OPS)
BF16 = torch.bfloat16
PREFIX = slice(4, 6)
"""Cached keys and values among a block's arguments."""


def compiler(dry: bool) -> str:
    """The backend of torch.compile: a dry run has no time for one that generates code."""
    return "eager" if dry else "inductor"


def mark_growing(tensors: Sequence[Tensor]) -> None:
    """Tell dynamo that the number of cached tokens changes, so that one compilation serves all lengths."""
    for tensor in tensors:
        if tensor.shape[1]:
            torch._dynamo.maybe_mark_dynamic(tensor, 1)


def with_attention(module: fx.GraphModule, attend: Attend) -> fx.GraphModule:
    """An optimized module whose attentions to cache and new tokens run through another function."""

    def joined(q: Tensor, k: list[Tensor], v: list[Tensor]) -> Tensor:
        return attend(q, torch.cat(k, dim=1), torch.cat(v, dim=1)).flatten(2)

    fork = QuantGraph(module, Stage.BOUND).fork().module
    for node in fork.graph.nodes:
        if node.target == kernels.attention.definition:
            node.target = joined
    fork.recompile()
    return fork


def _compiled(problem: Problem, dry: bool, attention: str = "") -> Built:
    model, args = problem.model(BF16), problem.args(BF16)
    mark_growing(args[PREFIX])
    run = torch.compile(model, backend=compiler(dry))

    def call() -> Any:
        with attending(attention):
            return run(*args)

    return Built(call, "inductor")


def _eager(problem: Problem) -> Built:
    model, args = problem.model(BF16), problem.args(BF16)
    return Built(lambda: model(*args), "F.linear")


class Quantized:
    """Optimized blocks by number of rows and recipe, each quantized once and run at every cache length."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        self.sizes, self.device = sizes, device
        self._modules: dict[tuple[int, str], fx.GraphModule] = {}

    def shape(self, rows: int, keys: int) -> BlockShape:
        """Of a call with so many new tokens and keys."""
        grid = self.sizes.grid
        return BlockShape(rows // (grid[0] * grid[1]), grid, keys, self.sizes.config)

    def module(self, rows: int, name: str) -> fx.GraphModule:
        """The optimized block; equal seeds give it the weights of every problem with these rows."""
        if (rows, name) not in self._modules:
            problem = block_problem(self.shape(rows, 2 * rows), self.device)
            shapes = (None,) * PREFIX.start + ({1: Dim.AUTO},) * 2 + (None, None)
            made = ours.optimized(problem.model(BF16), [problem.args(BF16)], recipes()[name], shapes)
            self._modules[rows, name] = made
        return self._modules[rows, name]

    def built(self, rows: int, problem: Problem, recipe: str = STATIC, attention: str = "") -> Built:
        """Every operator compared with its reference on the problem's own values."""
        module, args = self.module(rows, recipe), problem.args(BF16)
        checked = ours.finish(module, args, self.device, lambda: module(*args))
        if not attention:
            return checked
        swapped = with_attention(module, optional(attention))
        return Built(lambda: swapped(*args), attention, refusal=checked.refusal)


def block_entries(blocks: Quantized, rows: int, problem: Problem, dry: bool) -> list[Entry]:
    """Every way to run the block; with a chunk's rows by all recipes and attentions, else by the first of them."""
    count = None if rows == blocks.sizes.rows[0] else 1
    bounds = LEAST_SQNR["block"]
    low, high = bounds["int8"], bounds["bfloat16"]
    build: Callable[..., Built] = partial(blocks.built, rows, problem)
    entries = [
        Entry(EAGER, partial(_eager, problem), "bfloat16", high, graph=False),
        *(
            Entry(ours_name(recipe), partial(build, recipe), bound=low, uses=ALL_OPS)
            for recipe in list(recipes())[:count]
        ),
        Entry(FXQ, build, bound=low, uses=ALL_OPS, graph=False),
        Entry(COMPILED, partial(_compiled, problem, dry), "bfloat16", high, graph=False),
    ]
    for name, package in list(NEEDS.items())[:count]:
        run = partial(_compiled, problem, dry, name)
        entries.append(Entry(compiled_name(name, True), run, "bfloat16", high, needs=package))
    for name, package in PACKAGES.items():
        make = partial(build, attention=name)
        entries.append(Entry(f"fxq and {name}, CUDA graph", make, bound=low, uses=ALL_OPS, needs=package))
    return entries


def run_block(session: Session, sizes: Sizes) -> None:
    """One step per number of rows and keys, a chunk's rows first."""
    blocks, chunk = Quantized(sizes, session.device), sizes.rows[0]

    def work(step: str, rows: int, keys: int) -> dict[str, Any]:
        problem = block_problem(blocks.shape(rows, keys), session.device)

        def reference() -> Tensor:
            return problem.pick(problem.module(*problem.args(torch.float32)))

        entries = block_entries(blocks, rows, problem, session.dry)
        return session.contest(step, reference, entries, (EAGER, COMPILED, COMPILED_GRAPH), problem.pick)

    for rows in sizes.rows:
        for chunks in (sizes.chunks, (sizes.chunks + 1) // 2, 1):
            keys = chunks * chunk
            if keys > rows or rows == chunk:
                session.step("block", f"M{rows} L{keys}", partial(work, rows=rows, keys=keys))
