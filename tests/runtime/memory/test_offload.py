import pytest
import torch
from torch import nn

import fxq
from fxq.capture.trace import TraceError
from fxq.integrations.swap import ApplyError
from fxq.runtime.memory.offload import absent_weights
from tests.toys import recipe, relative_error, rows, toy

accelerate = pytest.importorskip("accelerate")
X = rows(6, 96)


def quantize(model):
    return fxq.quantize(model, [X], recipe(), progress=False)


def offloaded_to_cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def offloaded_to_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


def dispatched(model, folder):
    places = {name: "disk" if name == "blocks.0.up" else "cpu" for name in ("blocks.0.up", "blocks.0.down", "head")}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


OFFLOADS = [offloaded_to_cpu, offloaded_to_disk, dispatched]
USES = {
    "quantize": lambda model, bundle: quantize(model),
    "apply": lambda model, bundle: fxq.apply(model, bundle),
    "apply in place": lambda model, bundle: fxq.apply(model, bundle, in_place=True),
    "bind": lambda model, bundle: fxq.bind(model, bundle),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_weights_are_named_as_such_and_the_advice_works(offload, use, tmp_path):
    bundle = quantize(toy())
    model = offload(toy(), tmp_path)
    assert relative_error(toy(), model, X) == 0
    with pytest.raises((TraceError, ApplyError), match=r"blocks\.0\.up\.weight.* offloaded .*remove_hook_from_module"):
        use(model, bundle)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert not absent_weights(model)
    use(model, bundle)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("make", [lambda: toy().to("meta"), lambda: nn.Sequential(toy().to("meta"))])
def test_a_model_without_weights_is_refused_with_what_to_load(make, use):
    with pytest.raises((TraceError, ApplyError), match=r"have no values \(device meta\).*load the weights first"):
        use(make(), quantize(toy()))


def test_the_advice_for_a_model_without_weights_works():
    with torch.device("meta"):
        model = toy()
    model.load_state_dict(toy().state_dict(), assign=True)
    assert relative_error(toy(), model, X) == 0
    assert relative_error(quantize(toy()), quantize(model), X) == 0


def test_hooks_of_accelerate_that_only_place_inputs_change_nothing():
    for in_place in (False, True):
        model = toy()
        bundle = quantize(model)
        for module in model.modules():
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True))
        assert relative_error(bundle, fxq.apply(model, bundle, in_place=in_place), X) < 1e-6
