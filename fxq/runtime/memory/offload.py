"""Models whose weights are elsewhere: on disk, on another device until they are used, or nowhere yet."""

from __future__ import annotations

from torch import nn

_SHOWN = 3


def absent_weights(model: nn.Module) -> str:
    """What is wrong with a model that has parameters or buffers without values (device ``meta``), and what to do.

    Returns:
        Empty when every tensor has values.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    absent = [name for name, tensor in tensors if tensor.is_meta]
    if not absent:
        return ""
    told = f"{len(absent)} of {len(tensors)} tensors of {type(model).__name__} have no values (device meta)"
    shown = ", ".join(absent[:_SHOWN]) + (", ..." if len(absent) > _SHOWN else "")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        remedy = (
            "the weights are offloaded by accelerate; bring them back with "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True), or load the model without offload "
            "(no device_map, no enable_sequential_cpu_offload)"
        )
    else:
        remedy = (
            "the model was built without weights (init_empty_weights, device='meta') or they are offloaded; load the "
            "weights first, model.load_state_dict(state, assign=True)"
        )
    return f"{told}: {shown}. Probable cause: {remedy}"
