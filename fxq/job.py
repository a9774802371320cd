"""The steps between a traced graph and a lowered one, with what they share: recipe, progress, ranks, folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor

from fxq import kernels
from fxq.cache.codecs.klt import FIT_TOKENS
from fxq.cache.policy import CachePolicy
from fxq.cache.settings import policy_to_json
from fxq.cache.store import Memories
from fxq.cache.tables import below, from_tensors, learned, to_tensors
from fxq.calibration.attention_errors import AttentionErrors
from fxq.calibration.calibrate import calibrate
from fxq.calibration.collect import CalibrationError, Collector
from fxq.calibration.rollout import Rollout
from fxq.calibration.sensitivity import ChunkSensitivity, chunk_sensitivity
from fxq.core.config import Recipe
from fxq.core.interpret import sparing_call
from fxq.core.ir import QuantGraph, Stage
from fxq.core.method import LearningMethod, SolvingMethod
from fxq.core.pipeline import Pass, run_passes
from fxq.core.rows import Weighting
from fxq.passes import ApplyMethods, ChooseWidths
from fxq.passes.line import line
from fxq.passes.pack_cache import cached_layers
from fxq.passes.quantize_attention import QuantizeAttention
from fxq.passes.share_inputs import input_groups
from fxq.recipes import recipe_to_json
from fxq.runtime.checkpoint import Checkpoint
from fxq.runtime.progress import Progress
from fxq.runtime.workers import Workers

ERRORS = "attention errors"
"""What calibration measured of attentions, among what was found of a graph until the pass that reads it."""

ForwardLoop = Callable[[Callable[..., Any]], None]


def needs_data(recipe: Recipe) -> str:
    """The first rule whose input scales are measured on data; empty when there is none."""
    static = [rule.pattern for rule in recipe.rules if rule.scheme is not None and not rule.scheme.per_token]
    return static[0] if static else ""


def measuring(recipe: Recipe) -> str:
    """The first transform that follows from calibration data; empty when there is none."""
    found = [type(step).__name__ for step in recipe.transforms if step.needs >= Stage.CALIBRATED and step.learns]
    return found[0] if found else ""


def uses_data(recipe: Recipe) -> bool:
    """Whether calibration data change what is made: input scales or a budget need them, or methods learn from them."""
    learns = any(isinstance(method, LearningMethod | SolvingMethod) for method in recipe.methods)
    schemes = [rule.scheme for rule in recipe.rules if rule.scheme is not None]
    needed = bool(needs_data(recipe)) or recipe.budget is not None or bool(measuring(recipe))
    needed = needed or recipe.attention is not None
    needed = needed or (recipe.cache is not None and recipe.cache.needs_tables)
    return needed or (learns and any(scheme.reconstruct for scheme in schemes))


@dataclasses.dataclass(frozen=True)
class Job:
    """One quantization.

    ``workers`` share its calibration, sensitivities and layers; with a ``folder`` finished pieces are files there, and
    what is large lies in files instead of memory. ``label`` is put before the names of steps. ``passes`` are a user's
    own, see :func:`fxq.passes.line.line`.
    """

    recipe: Recipe
    bar: Progress
    workers: Workers = dataclasses.field(default_factory=Workers)
    folder: pathlib.Path | None = None
    label: str = ""
    passes: tuple[Pass, ...] = ()

    def line(self, *, first_only: bool = False) -> tuple[Pass, ...]:
        """Every pass of the job in order, with all of the recipe's methods or only the first.

        Raises:
            PassError: when one of a user's passes has no place.
        """
        methods = self.methods(first_only=first_only)
        return line(self.recipe, methods if first_only else self.chooser(methods), self.passes)

    def plan(self, graph: QuantGraph) -> None:
        """Take a TRACED graph to PLANNED."""
        graph.workers = self.workers
        run_passes(graph, (step for step in self.line() if step.needs < Stage.CALIBRATED))

    def calibrate(
        self, graph: QuantGraph, loader: Iterable[object] | Rollout | None, forward_loop: ForwardLoop | None = None
    ) -> str:
        """Collect statistics and move a PLANNED graph to CALIBRATED; returns the calibration hash, empty without data.

        Raises:
            CalibrationError: as :func:`fxq.calibration.calibrate.calibrate`; or when there is no data and a layer needs
                some.
        """
        if loader is None and forward_loop is None:
            graph.adopt({})
            return ""
        recipe = self.recipe
        groups = input_groups(graph.module) if recipe.share_inputs else []
        leaders = {site.layer: first.layer for first, *others in groups for site in others}
        all_rows = recipe.all_rows and any(isinstance(method, SolvingMethod) for method in recipe.methods)
        collector = Collector(recipe.rows_per_call, recipe.max_rows, recipe.seed, leaders, self.folder, all_rows)
        if recipe.attention is not None:
            collector.attention = AttentionErrors(kernels.ATTENTIONS[recipe.attention.scheme])
        with self.bar.step(f"{self.label}calibrate") as on_progress:
            gradients = recipe.chunk_weighting is Weighting.GRADIENT
            data = calibrate(graph, loader, forward_loop, collector, on_progress, self.workers, gradients)
        if collector.attention is not None:
            graph.found[ERRORS] = collector.attention.found()
        return data

    def weigh_chunks(
        self, graph: QuantGraph, loader: Iterable[object] | Rollout | None, alpha: Tensor | None, data: str
    ) -> Tensor | None:
        """Set a CALIBRATED graph's chunk weights, measuring sensitivity when the recipe needs it and can have it.

        It can for a rollout. Other loaders name chunks by :class:`fxq.Batch`; without a measured sensitivity their
        chunks weigh the same.

        Args:
            graph: the graph.
            loader: what it was calibrated on.
            alpha: sensitivities measured before.
            data: the calibration hash.

        Raises:
            CalibrationError: when the given sensitivity is of another number of chunks.
        """
        weighting = self.recipe.chunk_weighting
        if isinstance(loader, Rollout):
            chunks = max(loader.units(c, d) for c, d in loader.batches)
            if alpha is None and chunks > 1 and weighting.needs_sensitivity:
                alpha = self.measure(graph, loader, data).alpha
        else:
            chunks = 1 + max((int(s.chunks.max()) for s in graph.statistics.values()), default=0)
        if alpha is not None and len(alpha) < chunks:
            raise CalibrationError(f"sensitivity has {len(alpha)} chunks, the calibration data {chunks}")
        if alpha is None and weighting.needs_sensitivity:
            weighting = Weighting.UNIFORM
        graph.chunk_weights = weighting.of_chunks(alpha, chunks)
        return alpha

    def measure(self, graph: QuantGraph, rollout: Rollout, data: str) -> ChunkSensitivity:
        """Sensitivity of a CALIBRATED graph under the recipe's first method (initialised, not reconstructed).

        Args:
            graph: the graph; a fork of it is quantized.
            rollout: prompts and noise.
            data: the calibration hash; finished batches of an earlier run on the same data are not measured again.
        """
        fork = self.initialised(graph)
        own = [repr(step) for step in self.passes]
        settings = json.dumps(
            [data, recipe_to_json(self.recipe), len(rollout.batches), *([own] if own else [])], sort_keys=True
        )
        key = hashlib.sha256(settings.encode()).hexdigest()
        checkpoint = None if self.folder is None else Checkpoint(self.folder)

        def finished(batch: int, run: Callable[[], Tensor]) -> Tensor:
            if checkpoint is None:
                return run()
            name = f"sensitivity-{batch}"
            if (known := checkpoint.read(name, key)) is not None:
                return known["mse"]
            return checkpoint.write(name, key, {"mse": run()})["mse"]

        with self.bar.step(f"{self.label}sensitivity") as on_progress:
            modules = sparing_call(fork.module), sparing_call(graph.module)
            return chunk_sensitivity(rollout, *modules, on_progress, self.workers, finished)

    def cache_tables(
        self, graph: QuantGraph, loader: Iterable[object] | Rollout | None, policy: CachePolicy, data: str
    ) -> Memories | None:
        """What a cache's codecs learn from the rollouts of the float model; None where they need nothing.

        Args:
            graph: of the model.
            loader: the rollouts.
            policy: of the cache.
            data: the calibration hash; batches that an earlier run on the same data has looked at are not run again.

        Raises:
            CalibrationError: when the loader drives nothing with such a cache.
        """
        if not policy.needs_tables:
            return None
        if not isinstance(loader, Rollout):
            raise CalibrationError("the codecs of the cache learn from rollouts: give a fxq.Rollout as calib_loader")
        key = hashlib.sha256(json.dumps([data, policy_to_json(policy)], sort_keys=True).encode()).hexdigest()
        checkpoint = None if self.folder is None else Checkpoint(self.folder)
        batches, found = loader.batches, dict[str, Tensor]()
        owners = self.workers.owners([float(draws.batch) for _, draws in batches])
        most = -(-FIT_TOKENS // len(batches))
        with self.bar.step(f"{self.label}cache tables") as on_progress:
            for i, (condition, draws) in enumerate(batches):
                on_progress(i, len(batches))
                if owners[i] != self.workers.rank:
                    continue
                name = f"cache-{i}"
                tokens = None if checkpoint is None else checkpoint.read(name, key)
                if tokens is None:
                    tokens = loader.cached_tokens(condition, draws, policy, most)
                    tokens = tokens if checkpoint is None else checkpoint.write(name, key, tokens)
                found |= {f"{i}/{place}": tensor for place, tensor in tokens.items()}
            whole = {name: tensor for part in self.workers.gather(found) for name, tensor in part.items()}
            samples = [below(whole, f"{i}/") for i in range(len(batches))]
            layers = sum(1 for _ in cached_layers(graph))
            mine = to_tensors(learned(policy, samples, layers)) if self.workers.first else None
            return from_tensors(self.workers.share(mine, 0), layers)

    def methods(self, *, first_only: bool = False) -> ApplyMethods:
        """The pass that applies the recipe's methods, or only the first of them."""
        recipe = self.recipe
        return ApplyMethods(
            recipe.methods[:1] if first_only else recipe.methods,
            recipe.chunk_weighting,
            recipe.seed,
            None if self.folder is None else Checkpoint(self.folder / "initial" if first_only else self.folder),
            None,
            recipe.share_inputs,
        )

    def chooser(self, methods: ApplyMethods) -> ApplyMethods | ChooseWidths:
        """The pass that chooses integers, and widths where the recipe has a budget."""
        return methods if self.recipe.budget is None else ChooseWidths(methods, self.recipe.budget)

    def choose_integers(self, graph: QuantGraph) -> None:
        """Run the recipe's methods on a CALIBRATED graph."""
        with self.bar.step(f"{self.label}choose integers") as on_layer:
            methods = dataclasses.replace(self.methods(), on_layer=lambda _, done, total: on_layer(done, total))
            steps = line(self.recipe, self.chooser(methods), self.passes)
            run_passes(graph, (step for step in steps if step.needs == step.gives == Stage.CALIBRATED))

    def initialised(self, graph: QuantGraph) -> QuantGraph:
        """A fork of a CALIBRATED graph, LOWERED with the recipe's first method alone."""
        steps = self.line(first_only=True)
        lowering = (step for step in steps if step.needs >= Stage.CALIBRATED and step.gives <= Stage.LOWERED)
        return run_passes(graph.fork(), lowering)

    def rewrite(self, graph: QuantGraph) -> None:
        """Take a CALIBRATED graph whose integers are chosen to FROZEN."""
        run_passes(graph, (step for step in self.line() if step.gives >= Stage.LOWERED))
        if self.recipe.attention is not None:
            run_passes(
                graph, (QuantizeAttention(self.recipe.attention, cast(dict[str, float], graph.found.pop(ERRORS, {}))),)
            )
