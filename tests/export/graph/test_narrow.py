"""Weights of fewer bits than their integers: in files they have their own."""

import pytest
import torch
from safetensors import safe_open

import fxq
from fxq import kernels
from fxq.core.config import Scheme
from fxq.core.ir import LayerPlan
from fxq.export import bundle
from fxq.export.bundle import BundleError
from fxq.export.contract import verify_bundle
from fxq.export.graph.narrow import MULTIPLIER, NarrowError, packed_tensors, unpacked_tensors
from fxq.passes.methods.descent import CoordinateDescent
from fxq.passes.methods.gptq import GPTQ
from fxq.passes.methods.grid import expanded
from fxq.passes.methods.ranges import RangeSearch
from tests.attacks.corpus import edit_tensors
from tests.toys import recipe, rows, toy

METHODS = (RangeSearch(), GPTQ(), CoordinateDescent())
SCHEMES = {
    "w5": {"bits": 5, "dual_scale": False},
    "w7 per token": {"bits": 7, "per_token": True},
    "groups": {"bits": 4, "weight_group": 32},
    "groups per token": {"bits": 4, "weight_group": 32, "per_token": True, "asymmetric": True},
}


def plan(bits, group=0, inputs=96, outputs=5):
    scheme = Scheme(weight_bits=bits, weight_group=group)
    return LayerPlan(layer="a.b", in_features=inputs, out_features=outputs, scheme=scheme)


def codes_of(plan, seed=0):
    """Random integers of a plan, every one of its range among them."""
    random, bits = torch.Generator().manual_seed(seed), plan.quantization.weight_bits
    shape = plan.out_features, plan.in_features
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=random, dtype=torch.int8)
    if plan.quantization.weight_group:
        factors = torch.randint(1, 16, (shape[0], shape[1] // 32), generator=random, dtype=torch.int8)
        codes = codes * expanded(factors)
    return codes


@pytest.mark.parametrize(
    ("bits", "group", "inputs"), [(5, 0, 96), (6, 0, 37), (7, 0, 8), (7, 0, 17), (4, 32, 96), (4, 32, 64)]
)
def test_what_is_packed_is_unpacked_to_the_same_integers(bits, group, inputs):
    layer = plan(bits, group, inputs)
    codes, other = codes_of(layer), torch.ones(3)
    packed = packed_tensors([layer], {"a.b.weight": codes, "c": other})
    assert sum(t.nbytes for name, t in packed.items() if name != "c") == layer.quantization.weight_bytes(5, inputs)
    assert packed["c"] is other and (f"a.b.{MULTIPLIER}" in packed) == bool(group)
    back = unpacked_tensors([layer], packed)
    assert set(back) == {"a.b.weight", "c"}
    assert back["a.b.weight"].dtype == torch.int8 and torch.equal(back["a.b.weight"], codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_of_their_own_width_stay_as_they_are(bits):
    layer, tensors = plan(bits), {"a.b.weight": torch.zeros(5, 96 * bits // 8, dtype=torch.uint8)}
    assert not layer.quantization.is_narrow and layer.quantization.weight_bytes(5, 96) == 5 * 96 * bits // 8
    assert packed_tensors([layer], tensors) == tensors == unpacked_tensors([layer], tensors)


def test_integers_without_a_common_multiplier_are_refused():
    codes = torch.zeros(5, 96, dtype=torch.int8)
    codes[2, :2] = torch.tensor([100, 99])
    with pytest.raises(NarrowError, match=r"layer a.b: its integers are not all of 4 bits times a multiplier"):
        packed_tensors([plan(4, 32)], {"a.b.weight": codes})
    with pytest.raises(NarrowError, match=r"layer a.b: its integers are not all of 6 bits$"):
        packed_tensors([plan(6)], {"a.b.weight": codes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("a.b.weight_multiplier"), "weight_multiplier is missing, expected torch.uint8 .5, 2."),
        (lambda t: t.update({"a.b.weight": t["a.b.weight"][:, :3]}), r"weight is torch.uint8 .5, 3, 12., expected"),
        (lambda t: t.update({"a.b.weight": t["a.b.weight"].to(torch.int8)}), r"weight is torch.int8"),
        (lambda t: t["a.b.weight_multiplier"].zero_(), "a multiplier is 0, expected 1..15"),
    ],
)
def test_tensors_of_another_form_are_refused(change, message):
    layer = plan(4, 32)
    packed = packed_tensors([layer], {"a.b.weight": codes_of(layer)})
    change(packed)
    with pytest.raises(NarrowError, match=f"layer a.b: .*{message}"):
        unpacked_tensors([layer], packed)


@pytest.fixture(scope="module", params=SCHEMES)
def quantized(request):
    chosen = recipe(methods=METHODS, **SCHEMES[request.param])
    return fxq.quantize(toy(), [fxq.Batch((rows(300, 96),), {})], chosen, progress=False)


def test_a_bundle_comes_back_bit_for_bit_and_is_as_small_as_its_bits(quantized, tmp_path):
    fxq.save(quantized, tmp_path / "bundle")
    assert verify_bundle(tmp_path / "bundle").ok
    loaded = fxq.load(tmp_path / "bundle")
    x = rows(7, 96, seed=1)
    assert torch.equal(loaded(x), quantized(x))
    fxq.save(loaded, tmp_path / "again")
    first, second = (tmp_path / name / "model.safetensors" for name in ("bundle", "again"))
    assert first.read_bytes() == second.read_bytes()
    layers = fxq.summary(quantized).quantized
    with safe_open(first, "pt") as file:
        names = list(file.keys())
        for row in layers:
            own = [file.get_tensor(name) for name in names if name.rpartition(".")[0] == row.layer]
            assert sum(t.nbytes for t in own) == row.bytes


def test_optimized_it_computes_the_same(quantized):
    x, fast = rows(9, 96, seed=1), fxq.optimize(quantized)
    fused = kernels.activation_quantize_per_token, kernels.activation_quantize_per_token_asymmetric
    if any(fast.graph.find_nodes(op="call_function", target=op.definition) for op in fused):
        # The activation is that of the kernel, in whose last bits the scales of tokens differ from those of torch's.
        torch.testing.assert_close(fast(x), quantized(x), rtol=0, atol=1e-5)
    else:
        assert torch.equal(fast(x), quantized(x))


def test_loading_holds_the_file_form_of_one_layer_at_a_time(quantized, tmp_path, monkeypatch):
    fxq.save(quantized, tmp_path / "bundle")
    taken = []
    real = bundle.unpacked_tensors
    monkeypatch.setattr(
        bundle, "unpacked_tensors", lambda plans, given: taken.append(sorted(given)) or real(plans, given)
    )
    fxq.load(tmp_path / "bundle")
    layers = [row.layer for row in fxq.summary(quantized).quantized]
    assert [{name.rpartition(".")[0] for name in names} for names in taken] == [{layer} for layer in layers]
    assert all(name.endswith((".weight", MULTIPLIER)) for names in taken for name in names)


def test_a_lie_about_the_groups_is_found(quantized, tmp_path):
    fxq.save(quantized, tmp_path / "bundle")
    name = "blocks.0.down.weight"
    edit_tensors(tmp_path / "bundle", lambda tensors: tensors.update({name: tensors[name][:, :-1].clone()}))
    with pytest.raises(BundleError, match=r"layer blocks.0.down: weight is torch.uint8"):
        fxq.load(tmp_path / "bundle")
