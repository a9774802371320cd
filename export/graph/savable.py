"""Whether a graph can be written into a bundle and read again, found out before any work is done on it."""

from __future__ import annotations

import json
import re

from torch import fx

from fxq.core.ir import get_tensor
from fxq.core.places import quoted_place
from fxq.export.graph.foreign import allowing_all
from fxq.export.graph.graph_json import GraphFormatError, graph_from_json, graph_to_json


def check_savable(module: fx.GraphModule) -> None:
    """Write the graph as JSON and read it again; tensors are looked at by name only.

    Raises:
        GraphFormatError: naming the node that has no place in a bundle and the line of the model that made it.
    """
    tensors = {str(n.target): get_tensor(module, str(n.target)) for n in module.graph.find_nodes(op="get_attr")}
    try:
        with allowing_all():
            graph_from_json(json.loads(json.dumps(graph_to_json(module))), tensors)
    except GraphFormatError as error:
        raise GraphFormatError(f"{error}{_where(module, str(error))}") from error


def _where(module: fx.GraphModule, text: str) -> str:
    """The place of the node that a message names."""
    named = re.match(r"node (\w+)", text)
    node = next((n for n in module.graph.nodes if named and n.name == named[1]), None)
    return f", at {found}" if node is not None and (found := quoted_place(node.stack_trace or "")) else ""
