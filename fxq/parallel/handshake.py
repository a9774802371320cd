"""What the ranks of a quantization make sure of before they work: the same recipe, model, data and versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from fxq.calibration.agreement import describe, describe_data, describe_model, environment_facts, flat_facts
from fxq.calibration.calibrate import Batch
from fxq.core.config import Recipe
from fxq.core.ir import LayerPlan
from fxq.core.pipeline import Pass
from fxq.recipes import recipe_to_json
from fxq.runtime.workers import Workers
from fxq.version import __version__


def shake_hands(
    workers: Workers, recipe: Recipe, model: object, data: object, first: Batch | None, passes: Sequence[Pass] = ()
) -> None:
    """Compare the calls of all ranks; nothing is done by one process alone.

    Args:
        workers: the ranks.
        recipe: what each is to do.
        model: what each has; of every tensor only a few elements are compared.
        data: calibration data: a rollout, a sequence or any iterable.
        first: the first batch of data that can only be iterated.
        passes: the user's own, compared by name.

    Raises:
        fxq.runtime.workers.WorkerError: naming a rank and what differs there.
    """
    if workers.size == 1:
        return
    facts = {
        "version": environment_facts(__version__),
        "recipe": flat_facts(recipe_to_json(recipe)),
        "model": describe_model(model),
        "calibration data": describe_data(data),
        "passes": {str(i): step.name for i, step in enumerate(passes)},
    }
    if first is not None:
        facts["calibration data"]["first batch"] = describe([list(first.args), dict(first.kwargs)])
    workers.agree(facts)
    workers.compare_threads()


def compare_plans(workers: Workers, plans: Mapping[str, LayerPlan]) -> None:
    """Compare what the ranks are about to do with each layer: outlier channels follow from all of a weight.

    Raises:
        fxq.runtime.workers.WorkerError: naming a rank and a layer.
    """
    if workers.size > 1:
        told = {name: json.dumps(plan.to_json(), sort_keys=True, default=str) for name, plan in plans.items()}
        digests = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in told.items()}
        workers.agree({"plan of layers": digests})
