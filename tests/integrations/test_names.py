import pytest

from fxq.integrations.names import NamesError, Renaming, renaming, weights_of

LAYERS = ("blocks.0.up", "blocks.1.up", "mixer")
KEPT = ("head",)


def model(prefix="", tools=("",)):
    parameters = [f"{prefix}{name}.weight" for name in (*LAYERS[:2], *KEPT)] + [f"{prefix}mixer", f"{prefix}head.bias"]
    return [name.replace("blocks.", f"blocks.{tool}", 1) for name in parameters for tool in tools]


@pytest.mark.parametrize("tool", ["", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
@pytest.mark.parametrize("prefix", ["", "model.", "generator.model.", "0.", "module.", "_orig_mod."])
def test_layers_are_found_behind_wrappers_and_tools(prefix, tool):
    parameters = [tool + name for name in model(prefix, (tool,))]
    change = renaming(LAYERS, KEPT, parameters)
    found = weights_of(LAYERS, change, parameters)
    assert list(found) == list(LAYERS) and set(found.values()) <= set(parameters)
    assert [name.endswith(".weight") for name in found.values()] == [True, True, False]


def test_layers_of_a_wrapped_model_are_found_without_the_wrapper_and_in_another_one():
    wrapped = [f"generator.model.{layer}" for layer in LAYERS]
    kept = [f"generator.model.{name}" for name in KEPT]
    assert renaming(wrapped, kept, model()) == Renaming("generator.model.", "")
    assert renaming(wrapped, kept, model("module.")) == Renaming("generator.model.", "module.")
    assert renaming(wrapped, kept, model("model.")) == Renaming("generator.", "")


def test_names_as_they_are_come_first():
    assert renaming(LAYERS, KEPT, [*model(), *model("copy.")]) == Renaming()


def test_what_fits_twice_is_refused():
    with pytest.raises(NamesError, match="several parts of the model have the layers' names: 'a', 'b'; give the part"):
        renaming(LAYERS, KEPT, [*model("a."), *model("b.")])


def test_other_names_do_not_fit():
    assert renaming(LAYERS, KEPT, [name.replace("blocks", "layers") for name in model()]) is None
    assert renaming(LAYERS, KEPT, model()[:1]) is None
    assert renaming(LAYERS[:2], KEPT, [f"layers.{i}.up.weight" for i in range(2)]) is None
