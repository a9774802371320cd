import copy

import pytest
import torch
from torch import nn

import fxq
from fxq.calls.fixed_dtypes import DtypeError
from tests.toys import recipe, rows, toy

CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.float16),
    "to a dtype": lambda m: m.to(torch.bfloat16),
    "to a device and dtype": lambda m: m.to("cpu", torch.float64),
    "to a tensor": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    "inside a module": lambda m: nn.Sequential(m).half(),
}


@pytest.fixture(scope="module", params=[False, True], ids=["static", "per token"])
def forms(request, tmp_path_factory):
    """The same quantized graph fresh, copied, loaded and optimized."""
    quantized = fxq.quantize(toy(), [rows(6, 96)], recipe(per_token=request.param), progress=False)
    loaded = fxq.load(fxq.save(quantized, tmp_path_factory.mktemp("fixed") / "bundle"))
    return [quantized, copy.deepcopy(quantized), loaded, copy.deepcopy(loaded), fxq.optimize(quantized)]


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_quantized_graph_cannot_be_cast_and_stays_what_it_was(forms, cast):
    for module in forms:
        want, state = module(rows(5, 96)), copy.deepcopy(module.state_dict())
        with pytest.raises(DtypeError, match=r"cannot be cast from torch\.\w+ to .* Cast the float model"):
            cast(module)
        torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)
        assert torch.equal(module(rows(5, 96)), want)


def test_what_changes_no_dtype_works(forms):
    for module in forms:
        want = module(rows(5, 96))
        module.float().to("cpu").to(torch.float32).eval().requires_grad_(False)
        assert torch.equal(module(rows(5, 96)), want)
        assert {tensor.device.type for tensor in copy.deepcopy(module).to("meta").state_dict().values()} == {"meta"}


def test_the_advice_of_the_error_works():
    model, x = toy(), rows(5, 96).bfloat16()
    applied = fxq.apply(model, fxq.quantize(model, [rows(6, 96)], recipe(), progress=False)).bfloat16()
    quantized = fxq.quantize(toy().bfloat16(), [rows(6, 96).bfloat16()], recipe(), progress=False)
    for module in (applied, quantized):
        got = module(x)
        assert got.dtype == torch.bfloat16
        assert (got.float() - model(x.float())).norm() < 0.05 * model(x.float()).norm()
