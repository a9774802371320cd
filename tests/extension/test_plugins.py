import dataclasses
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import fxq
from fxq import plugins
from fxq.cli import app
from fxq.cli.options.models import make_rollout
from fxq.core.config import RecipeError
from fxq.export.interop import find_target
from fxq.planning.doctor import check_plugins
from fxq.presets import PRESETS
from fxq.recipes import recipe_from_json, recipe_to_json
from tests.toys import recipe, rows, toy

METHOD = """
import dataclasses
from fxq.passes.methods.ranges import MinMax

@dataclasses.dataclass(frozen=True)
class Theirs(MinMax):
    '''MinMax by another name.'''

    strength: float = 0.5
"""
BROKEN = "import a_module_that_is_not_there\n"


def written(*methods):
    return {"name": "r", "rules": [{"pattern": "*", "scheme": {}}], "methods": list(methods), "weighting": "uniform"}


def test_a_plugin_is_imported_when_its_name_is_asked_for_and_not_before(outside):
    outside.install("one_method", METHOD, methods={"Theirs": "Theirs"})
    outside.install("one_target", "def build(model, options): ...", exports={"theirs": "build"})
    assert [str(plugin) for plugin in plugins.plugins(plugins.METHODS)] == [
        "method 'Theirs' (one_method:Theirs) of one-method 1.0"
    ]
    recipe_from_json(written({"method": "MinMax"}))
    with pytest.raises(RecipeError, match=r"unknown method 'Ada'; known: MinMax, RangeSearch, .*, Theirs"):
        recipe_from_json(written({"method": "Ada"}))
    assert not outside.imported("one_method")
    found = recipe_from_json(written({"method": "Theirs", "strength": 0.25}))
    assert outside.imported("one_method") and not outside.imported("one_target")
    assert found.methods[0].strength == 0.25
    assert recipe_from_json(json.loads(json.dumps(recipe_to_json(found)))) == found
    with pytest.raises(RecipeError, match=r"methods\[0\]: unknown key 'strenght'; did you mean 'strength'"):
        recipe_from_json(written({"method": "Theirs", "strenght": 1}))


def test_importing_fxq_imports_no_plugin_and_reads_no_metadata_of_any(outside):
    outside.install("one_method", "raise SystemExit('imported')", methods={"Theirs": "Theirs"})
    code = (
        "import importlib.metadata as m; m.entry_points = lambda **k: exit('looked' if 'fxq' in str(k) else 0)\n"
        f"import sys; sys.path.insert(0, {str(outside.folder)!r}); import fxq; assert 'one_method' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("group", "ask"),
    [
        ("methods", lambda: recipe_from_json(written({"method": "Theirs"}))),
        ("exports", lambda: find_target("Theirs")),
        ("models", lambda: make_rollout("Theirs", 1, 0)),
    ],
)
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (BROKEN, "cannot be imported: ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("def other(): ...", "cannot be imported: AttributeError: module 'faulty' has no attribute 'Theirs'"),
        ("Theirs = 5", "is no dataclass with apply|is 5, expected a function"),
    ],
    ids=["import", "attribute", "kind"],
)
def test_a_plugin_with_a_fault_is_told_with_its_distribution_when_asked_for(outside, group, ask, source, message):
    outside.install("faulty", source, version="3.1", **{group: {"Theirs": "Theirs"}})
    with pytest.raises(ValueError, match=rf"'Theirs' \(faulty:Theirs\) of faulty 3.1 ({message})"):
        ask()
    ((plugin, fault),) = check_plugins()
    assert (plugin.distribution, plugin.version) == ("faulty", "3.1") and "faulty 3.1" in fault


def test_a_method_has_the_name_of_its_class(outside):
    outside.install("one_method", METHOD, methods={"theirs": "Theirs"})
    with pytest.raises(RecipeError, match="is the class Theirs: recipes write a method's class"):
        recipe_from_json(written({"method": "theirs"}))


@pytest.mark.parametrize(
    ("group", "name", "ask"),
    [
        ("methods", "MinMax", lambda: recipe_from_json(written({"method": "MinMax"}))),
        ("exports", "comfy", lambda: find_target("comfy")),
        ("exports", "onnx", lambda: find_target("onnx")),
        ("models", "tiny", lambda: make_rollout("tiny", 1, 0)),
        ("models", "longlive", lambda: make_rollout("longlive", 1, 0)),
    ],
)
def test_a_shipped_name_cannot_be_taken(outside, group, name, ask):
    outside.install("squatter", METHOD, **{group: {name: "Theirs"}})
    with pytest.raises(ValueError, match=f"'{name}' is taken by fxq itself and by squatter 1.0: uninstall all but one"):
        ask()
    assert not outside.imported("squatter")
    assert PRESETS["w8a8"] == fxq.recipes.get_recipe("w8a8")
    assert ["taken by fxq itself" in fault for _, fault in check_plugins()] == [True]


def test_two_plugins_cannot_have_one_name(outside):
    for module in ("one_method", "two_method"):
        outside.install(module, METHOD, methods={"Theirs": "Theirs"})
    with pytest.raises(RecipeError, match=r"'Theirs' is taken by one-method 1\.0 and by two-method 1\.0"):
        recipe_from_json(written({"method": "Theirs"}))
    assert not outside.imported("one_method") and not outside.imported("two_method")


def test_doctor_lists_plugins_with_distribution_version_and_fault(outside, monkeypatch):
    monkeypatch.setattr("fxq.kernels.OPS", ())
    outside.install("one_method", METHOD, version="2.5", methods={"Theirs": "Theirs"})
    outside.install("faulty", BROKEN, models={"robot": "rollout"})
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["plugins"]
    assert [(p["group"], p["name"], p["distribution"], p["version"]) for p in told] == [
        ("fxq.methods", "Theirs", "one-method", "2.5"),
        ("fxq.models", "robot", "faulty", "1.0"),
    ]
    assert told[0]["error"] == "" and "No module named 'a_module_that_is_not_there'" in told[1]["error"]
    text = CliRunner().invoke(app, ["doctor"]).stdout
    assert "one-method" in text and "2.5" in text and "a_module_that_is_not_there" in text


def test_a_bundle_with_a_plugins_method_loads_without_it_and_shows_it_as_data(outside, tmp_path):
    outside.install("one_method", METHOD, methods={"Theirs": "Theirs"})
    (method,) = recipe_from_json(written({"method": "Theirs", "strength": 0.125})).methods
    chosen = dataclasses.replace(recipe(), methods=(method,))
    bundle = fxq.save(fxq.quantize(toy(), [rows(5, 96)], chosen, progress=False), tmp_path / "bundle")
    outside.forget()
    (outside.folder / "one_method.py").write_text("raise SystemExit('code of a plug-in ran')")
    loaded = fxq.load(bundle)
    told = fxq.summary(loaded).facts["recipe"]["methods"]
    assert told[0]["method"] == "Theirs" and told[0]["strength"] == 0.125
    assert fxq.read_receipt(bundle).recipe["methods"] == told
    for command in (("inspect", str(bundle)), ("verify", str(bundle))):
        done = CliRunner().invoke(app, command)
        assert "blocks.0.up" in done.output and not isinstance(done.exception, Exception), done.output
    fxq.optimize(loaded)
    fxq.apply(toy(), loaded)
    assert not outside.imported("one_method")
