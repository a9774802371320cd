"""A captured graph without what later steps cannot hold: regions with graphs of their own, and complex constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from fxq.core.ir import example_value, get_tensor, inherit_meta, put_tensor

_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_BODY = {torch.ops.higher_order.wrap_with_set_grad_enabled: 1, _AUTOCAST: 4}
"""Position of the region's graph among the arguments; its inputs follow."""


def without_autocast(program: ExportedProgram) -> ExportedProgram:
    """The program with the casts that its enabled autocast regions make as nodes; the same one if it has none.

    ``aten.linear`` stays and reads its weight through a cast.
    """
    graphs = [m for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)]
    regions = [node for m in graphs for node in m.graph.find_nodes(op="call_function", target=_AUTOCAST)]
    return program.run_decompositions({}) if any(node.args[2] for node in regions) else program


def inline_regions(module: fx.GraphModule) -> None:
    """Put the nodes of regions into the graph.

    Inference has no gradients, and a region where autocast is disabled computes as it is written.
    """
    while regions := [node for node in module.graph.nodes if node.target in _BODY]:
        for region in regions:
            _inline(module, region)


def _inline(module: fx.GraphModule, region: fx.Node) -> None:
    graph, body = module.graph, _BODY[region.target]  # type: ignore[index]
    source, operands = region.args[body], region.args[body + 1 :]
    assert isinstance(source, fx.Node)
    inner = module.get_submodule(str(source.target))
    assert isinstance(inner, fx.GraphModule)
    values: dict[fx.Node, Any] = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
    with graph.inserting_before(region):
        for node in inner.graph.nodes:
            if node.op in ("call_function", "get_attr"):
                values[node] = graph.node_copy(node, values.__getitem__)
                if node.op == "get_attr":
                    values[node].target = f"{source.target}.{node.target}"
    results: Any = fx.map_arg(inner.graph.output_node().args[0], values.__getitem__)
    for user in list(region.users):
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(region)


def complex_as_real(module: fx.GraphModule) -> None:
    """Hold complex constants as real ones [..., 2] under the same names, viewed as complex where they are read.

    Files of tensors have no complex numbers.
    """
    readers = [n for n in module.graph.find_nodes(op="get_attr") if get_tensor(module, str(n.target)).is_complex()]
    for name in {str(node.target) for node in readers}:
        put_tensor(module, name, torch.view_as_real(get_tensor(module, name).detach().resolve_conj()))
    for node in readers:
        value = example_value(node)
        with module.graph.inserting_after(node):
            viewed = module.graph.call_function(torch.ops.aten.view_as_complex.default, (node,))
        node.replace_all_uses_with(viewed, delete_user_cb=lambda user, new=viewed: user is not new)
        inherit_meta(viewed, node, value)
        inherit_meta(node, node, None if value is None else torch.view_as_real(value))
