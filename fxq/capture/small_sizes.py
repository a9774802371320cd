"""Sizes 0 and 1: torch.export assumes that they do not occur, so a model's branch on them leaves no condition.

Where the model's code compares a size, both are tried: they are allowed if the model then computes what the graph does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import sympy
from torch import Tensor

from fxq.calls.conditions import Expression, evaluator, holds
from fxq.capture.guards import Assumptions

_ASSUMED = 2
"""The least size that torch.export assumes by itself."""


def final_conditions(
    assumed: Assumptions, leaves: Sequence[object], agrees: Callable[[list[object]], bool]
) -> list[Expression]:
    """Conditions of calls for which the graph is right.

    Args:
        assumed: what torch.export assumed.
        leaves: flat inputs of the example.
        agrees: whether model and graph compute the same for flat inputs.
    """
    trial = _Trial(assumed, leaves, agrees, list(assumed.conditions))
    bounds: list[Expression] = []
    for symbol, place in assumed.symbols.items():
        low = assumed.lows.get(symbol)
        if low == _ASSUMED and symbol in assumed.compared:
            bounds += trial.bound(symbol)
        elif low is not None and low < _ASSUMED and isinstance(place, list) and place[0] == "value":
            bounds.append([">=", place, low])
    return bounds + list({str(c): c for c in trial.conditions}.values())


@dataclasses.dataclass
class _Trial:
    """Tries sizes on model and graph; ``conditions`` that break at a size that is right are lifted for it."""

    assumed: Assumptions
    leaves: Sequence[object]
    agrees: Callable[[list[object]], bool]
    conditions: list[Expression]
    tried: dict[tuple[int, tuple[str, ...]], bool] = dataclasses.field(default_factory=dict)

    def bound(self, symbol: str) -> list[Expression]:
        """Conditions on the sizes below 2 of a symbol: alone, or together with the sizes that equal it in the example.

        Keys and values have one length, which only their product with others would tell.
        """
        place, choices = self.assumed.symbols[symbol], list[Expression]()
        for size in (0, 1):
            if self._fits((symbol,), size):
                choices.append(["==", place, size])
                continue
            group = self._equals(symbol)
            if len(group) > 1 and self._fits(group, size):
                choices.append(["and", *(["==", self.assumed.symbols[name], size] for name in group)])
        if choices == [["==", place, 0], ["==", place, 1]]:
            return []
        enough: Expression = [">=", place, _ASSUMED]
        return [["or", enough, *choices] if choices else enough]

    def _equals(self, symbol: str) -> tuple[str, ...]:
        hints = _hints(self.assumed, self.leaves)
        return tuple(name for name in self.assumed.symbols if hints[name] == hints[symbol])

    def _fits(self, symbols: tuple[str, ...], size: int) -> bool:
        """Whether model and graph agree when these have the size."""
        if (key := (size, symbols)) not in self.tried:
            changed = _resized(self.assumed, self.leaves, dict.fromkeys(symbols, size))
            self.tried[key] = changed is not None and self.agrees(changed)
            if changed is not None and self.tried[key]:
                self.conditions = [self._lifted(c, symbols, size, changed) for c in self.conditions]
        return self.tried[key]

    def _lifted(self, condition: Expression, symbols: tuple[str, ...], size: int, leaves: list[object]) -> Expression:
        if holds(evaluator(condition), leaves):
            return condition
        places = [self.assumed.symbols[name] for name in symbols]
        small = [["==", place, size] for place in places]
        return ["or", ["and", *small] if len(small) > 1 else small[0], condition]


def _hints(assumed: Assumptions, leaves: Sequence[object]) -> dict[str, int]:
    """Values of the symbols in the example."""
    return {name: int(evaluator(place)(leaves)) for name, place in assumed.symbols.items()}


def _resized(assumed: Assumptions, leaves: Sequence[object], sizes: dict[str, int]) -> list[object] | None:
    """The example with other free sizes; None where a tensor would have to become larger."""
    hints = _hints(assumed, leaves) | sizes
    changed: list[object] = []
    for leaf, shape in zip(leaves, assumed.shapes, strict=True):
        if isinstance(leaf, Tensor) and shape is not None:
            for dim, expression in enumerate(shape):
                wanted = _number(expression, hints)
                if wanted is None or not 0 <= wanted <= leaf.shape[dim]:
                    return None
                leaf = leaf.narrow(dim, 0, wanted)
            leaf = leaf.clone()
        elif shape is not None:
            leaf = _number(shape[0], hints)
        changed.append(leaf)
    return changed


def _number(expression: sympy.Expr | int, hints: dict[str, int]) -> int | None:
    if isinstance(expression, int):
        return expression
    values = {symbol: sympy.Integer(hints[str(symbol)]) for symbol in expression.free_symbols if str(symbol) in hints}
    value = expression.xreplace(values)
    return int(value) if value.is_Integer else None
