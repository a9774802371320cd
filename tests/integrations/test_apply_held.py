"""Models whose code holds its linears in more places than their attributes."""

import copy
import dataclasses
import functools
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import fxq
from fxq.integrations.swap import ApplyError, QuantizedLinear, apply
from tests.toys import QUICK, relative_error, rows

X = rows(5, 96)


class Model(nn.Module):
    """Two linears; ``hold`` keeps them elsewhere and ``run`` uses what it kept."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.a, self.b = nn.Linear(96, 96), nn.Linear(96, 96)
        self.hold()
        self.eval()

    def hold(self):
        pass

    def run(self, x):
        return self.b(self.a(x))

    def forward(self, x):
        return self.run(x)


class InList(Model):
    def hold(self):
        self.order = [self.a, self.b]

    def run(self, x):
        return self.order[1](self.order[0](x))


class InNestedContainers(Model):
    def hold(self):
        self.table = {"first": (self.a,), "second": [{"it": self.b}]}

    def run(self, x):
        return self.table["second"][0]["it"](self.table["first"][0](x))


@dataclasses.dataclass
class Pair:
    first: nn.Module
    second: nn.Module


class InDataclass(Model):
    def hold(self):
        self.pair = Pair(self.a, self.b)

    def run(self, x):
        return self.pair.second(self.pair.first(x))


class UnderAnotherName(Model):
    def hold(self):
        object.__setattr__(self, "hidden", self.a)

    def run(self, x):
        return self.b(self.hidden(x))


class RegisteredTwice(Model):
    def hold(self):
        self.again, self.all = self.a, nn.ModuleList([self.a, self.b])

    def run(self, x):
        return self.all[1](self.again(x)) + self.a(x)


class BoundMethods(Model):
    def hold(self):
        self.first, self.second = self.a.forward, self.b.__call__

    def run(self, x):
        return self.second(self.first(x))


class PartialCalls(Model):
    def hold(self):
        self.first = functools.partial(nn.Linear.forward, self.a)

    def run(self, x):
        return self.b(self.first(x))


class ReadsWeights(Model):
    def run(self, x):
        return F.linear(F.linear(x, self.a.weight, self.a.bias), self.b.weight, self.b.bias)


class OwnForward(Model):
    """An instance whose forward was replaced, as hooks of other libraries do."""

    def hold(self):
        self.a.forward = functools.partial(scaled, self.a.forward)


def scaled(forward, x):
    return 2 * forward(x)


class Adapter(nn.Module):
    """The structure of a LoRA layer of peft."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(96, 32, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(32, 96, bias=False)})

    def forward(self, x):
        down, up = self.lora_A["default"], self.lora_B["default"]
        return self.base_layer(x) + 0.5 * up(down(x.to(down.weight.dtype)))


class WithAdapter(Model):
    def hold(self):
        self.a = Adapter(self.a)


class Closure(Model):
    def hold(self):
        self.run = lambda x: self.b(self.a(x))


class WeakReference(Model):
    def hold(self):
        self.first = weakref.ref(self.a)

    def run(self, x):
        return self.b(self.first()(x))


class ClosureOverForward(Model):
    def hold(self):
        forward = self.a.forward
        self.a.forward = lambda x: 2 * forward(x)


FOLLOWED = (InList, InNestedContainers, InDataclass, UnderAnotherName, RegisteredTwice, BoundMethods, PartialCalls)
FOLLOWED += (ReadsWeights, OwnForward, WithAdapter)
NOT_COPIED = (Closure, WeakReference, ClosureOverForward)


def quantize(model, rules=None, x=X):
    rules = rules or (fxq.Rule("*", fxq.Scheme()),)
    return fxq.quantize(
        model, [x], fxq.Recipe(name="r", rules=rules, methods=QUICK, weighting="uniform"), progress=False
    )


@pytest.mark.parametrize("cls", [*FOLLOWED, *NOT_COPIED], ids=lambda cls: cls.__name__)
def test_in_place_every_holder_computes_with_integers(cls):
    model = cls()
    quantized, floats = quantize(model), model(X)
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    assert apply(model, quantized, in_place=True) is model
    assert all(type(linear) is QuantizedLinear for linear in linears)
    assert relative_error(quantized, model, X) < 1e-6
    assert (model(X) - floats).norm() > 1e-3 * floats.norm()


@pytest.mark.parametrize("cls", FOLLOWED, ids=lambda cls: cls.__name__)
def test_in_a_copy_every_holder_computes_with_integers_and_the_model_with_floats(cls):
    model = cls()
    quantized, floats = quantize(model), model(X)
    copied = apply(model, quantized)
    assert relative_error(quantized, copied, X) < 1e-6
    assert torch.equal(model(X), floats)
    assert not [m for m in copied.modules() if type(m) is nn.Linear]


@pytest.mark.parametrize("cls", NOT_COPIED, ids=lambda cls: cls.__name__)
def test_a_copy_that_would_run_the_models_floats_is_refused(cls):
    model = cls()
    with pytest.raises(ApplyError, match=r"copy still reaches a float linear .* through .*: use in_place=True"):
        apply(model, quantize(model))


class WeightUnderAnotherName(Model):
    def hold(self):
        self.kernel = self.a.weight

    def run(self, x):
        return self.b(F.linear(x, self.kernel, self.a.bias))


class WeightInClosure(Model):
    def hold(self):
        weight = self.a.weight
        self.norm = lambda: weight.norm()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("cls", "place"), [(WeightUnderAnotherName, "kernel"), (WeightInClosure, "norm's variable weight")]
)
def test_a_weight_that_other_code_holds_is_refused_by_its_place(cls, place, in_place):
    model = cls()
    quantized = quantize(model)
    with pytest.raises(ApplyError, match=f"its weight is also held as {place}, where code would go on reading floats"):
        apply(model, quantized, in_place=in_place)
    assert type(model.a) is nn.Linear


class Embedding(Model):
    def hold(self):
        self.words = nn.Embedding(96, 96)
        self.words.weight = self.a.weight


def test_an_embedding_with_the_same_weight_goes_on_in_floats_with_a_warning():
    model = Embedding()
    with pytest.warns(UserWarning, match=r"words\.weight is the same weight and stays in floats"):
        applied = apply(model, quantize(model))
    assert torch.equal(applied.words(torch.tensor([3])), model.words(torch.tensor([3])))


class Encoder(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        torch.manual_seed(4)
        layer = nn.TransformerEncoderLayer(96, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers) if layers else layer
        self.eval()

    def forward(self, x):
        return self.encoder(x)


@pytest.mark.parametrize("layers", [0, 2])
def test_an_encoder_of_torch_leaves_its_fast_path_or_is_refused(layers):
    model, x = Encoder(layers), rows(2, 5, 96)
    with pytest.raises(ApplyError, match=r"self_attn\.in_proj_weight is a parameter that other code reads"):
        apply(model, quantize(model, x=x))
    kept = (fxq.Rule("*self_attn*", None, "read by attention"), fxq.Rule("*", fxq.Scheme()))
    quantized = quantize(model, kept, x)
    assert relative_error(quantized, model, x) > 1e-3
    for in_place in (False, True):
        assert relative_error(quantized, apply(model, quantized, in_place=in_place), x) < 2e-3


def test_hooks_stay_and_backward_hooks_are_warned_of():
    model, seen = Model(), []
    quantized = quantize(model)
    model.a.register_forward_pre_hook(lambda module, args: seen.append(("pre", type(module).__name__)))
    model.a.register_forward_hook(lambda module, args, out: 0.5 * out)
    model.b.register_forward_hook(lambda module, args, kwargs, out: seen.append("b"), with_kwargs=True)
    want = model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = apply(model, quantized)
    model.a.register_full_backward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="backward hooks of a will not be called"):
        apply(model, quantized, in_place=True)
    for applied in (copied, model):
        seen.clear()
        with torch.no_grad():
            got = applied(X)
        assert seen == [("pre", "QuantizedLinear"), "b"]
        assert 0 < (got - want).norm() < 0.1 * want.norm()


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.a)


def normalized(model):
    nn.utils.spectral_norm(model.a)


def pruned(model):
    prune.l1_unstructured(model.a, "weight", 0.5)


def adapted(model):
    model.a = Adapter(model.a)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (parametrized, "remove_parametrizations first"),
        (normalized, "remove_spectral_norm first"),
        (pruned, r"prune\.remove"),
        (adapted, "merge or unload the adapter first"),
    ],
)
def test_a_linear_that_was_wrapped_after_calibration_is_refused_with_what_to_undo(change, remedy):
    model = Model()
    quantized = quantize(model)
    change(model)
    with pytest.raises(ApplyError, match=f"no parameter for 1 of 2 layers of the bundle: a; a: .*{remedy}"):
        apply(model, quantized)


@pytest.mark.parametrize("change", [parametrized, normalized, pruned])
def test_a_linear_whose_weight_is_computed_stays_in_floats_by_name(change):
    model = Model()
    change(model)
    quantized = quantize(model)
    assert [row.layer for row in fxq.summary(quantized).quantized] == ["b"]
    assert relative_error(quantized, apply(model, quantized), X) < 1e-6


def test_a_model_that_was_compiled_before_computes_with_integers():
    torch._dynamo.reset()
    model = InList()
    quantized = quantize(model)
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    apply(model, quantized, in_place=True)
    assert relative_error(quantized, compiled, X) < 1e-6
    torch._dynamo.reset()


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args):
        return self.model(*args)


WRAPS = {
    "wrapper": Wrapper,
    "two": lambda m: Wrapper(nn.ModuleDict({"generator": m})["generator"]),
    "sequential": nn.Sequential,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "compiled part": lambda m: setattr(m, "a", torch.compile(m.a, backend="eager")) or m,
    "data parallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("order", ["bare then wrapped", "wrapped then bare"])
def test_names_are_matched_through_wrappers(wrap, order):
    bare = Model()
    wrapped = wrap(Model()).eval()
    first, second = (bare, wrapped) if order == "bare then wrapped" else (wrapped, bare)
    quantized = quantize(first)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        applied = apply(second, quantized, in_place=True)
    assert relative_error(quantized, applied, X) < 1e-6
    assert sum(isinstance(module, QuantizedLinear) for module in applied.modules()) == 2


def test_two_models_with_the_layers_names_are_ambiguous():
    both = nn.ModuleDict({"generator": Model(), "generator_ema": Model()})
    quantized = quantize(Model())
    with pytest.raises(ApplyError, match=r"several parts .*: 'generator', 'generator_ema'; give the part itself"):
        apply(both, quantized)
    apply(both.generator, quantized, in_place=True)
    assert isinstance(both.generator.a, QuantizedLinear) and type(both.generator_ema.a) is nn.Linear


def test_the_copy_of_a_model_with_other_code_around_is_one_of_its_own():
    model = InList()
    quantized = quantize(model)
    first = apply(model, quantized)
    second = copy.deepcopy(first)
    assert second.order[0] is second.a and second.a is not first.a
