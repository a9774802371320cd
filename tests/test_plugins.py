"""Entry points of other distributions; tests/extension installs real ones."""

import dataclasses
from importlib.metadata import EntryPoint

import pytest

from fxq import plugins
from fxq.plugins import EXPORTS, METHODS, MODELS, Plugin, PluginError, fault_of, find, names


@dataclasses.dataclass
class Distribution:
    name: str
    version: str = "1.0"


@dataclasses.dataclass
class Method:
    def apply(self, problem, update):
        """Nothing."""


class NoDataclass:
    def apply(self, problem, update):
        """Nothing."""


def target(model, options):
    """Nothing."""


def entry(name, target, group=METHODS, distribution="theirs"):
    point = EntryPoint(name, f"{__name__}:{target}", group)
    return point._for(Distribution(distribution)) if distribution else point


@pytest.fixture
def installed(monkeypatch):
    """Entry points that are there, in any order."""
    points = []
    monkeypatch.setattr(plugins, "entry_points", lambda group: [p for p in points if p.group == group])
    return points


def test_plugins_are_listed_by_name_and_group_without_an_import(installed):
    nowhere = EntryPoint("A", "a_module_that_is_not_there:A", METHODS)
    installed += [entry("Method", "Method"), nowhere, entry("x", "target", EXPORTS)]
    assert [str(plugin) for plugin in plugins.plugins(METHODS)] == [
        "method 'A' (a_module_that_is_not_there:A) of an unnamed distribution ",
        f"method 'Method' ({__name__}:Method) of theirs 1.0",
    ]
    assert names(METHODS) == ("A", "Method") and names(EXPORTS) == ("x",) and names(MODELS) == ()


def test_a_plugin_gives_what_its_entry_point_names(installed):
    installed += [entry("Method", "Method"), entry("x", "target", EXPORTS)]
    assert find(METHODS, "Method", ()).load() is Method and find(EXPORTS, "x", ()).load() is target


@pytest.mark.parametrize(
    ("group", "name", "target", "fault"),
    [
        (METHODS, "NoDataclass", "NoDataclass", "is no dataclass with apply"),
        (METHODS, "Distribution", "Distribution", "is no dataclass with apply"),
        (METHODS, "target", "target", "is no dataclass with apply"),
        (METHODS, "method", "Method", "is the class Method: recipes write a method's class"),
        (EXPORTS, "x", "Method", "expected a function"),
        (MODELS, "x", "pytestmark", "cannot be imported: AttributeError"),
    ],
)
def test_what_is_not_of_its_group_is_refused_with_the_distribution(installed, group, name, target, fault):
    installed.append(entry(name, target, group))
    (plugin,) = plugins.plugins(group)
    with pytest.raises(PluginError, match=rf"{name!r} \(.*:{target}\) of theirs 1.0 .*{fault}"):
        plugin.load()
    assert fault in fault_of(plugin, ())


def test_the_error_of_an_import_is_told_in_one_line():
    plugin = Plugin(group=MODELS, name="m", target="no_such_module", distribution="d", version="2")
    with pytest.raises(PluginError, match=r"cannot be imported: ModuleNotFoundError: .*no_such_module'$") as caught:
        plugin.load()
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_name_without_a_plugin_is_found_nowhere(installed):
    assert find(METHODS, "MinMax", ("MinMax",)) is None and find(METHODS, "Other", ()) is None


@pytest.mark.parametrize("shipped", [(), ("Method",)])
def test_a_name_has_one_owner(installed, shipped):
    installed += [entry("Method", "Method", distribution=name) for name in ("b", "a")[: 1 if shipped else 2]]
    owners = "fxq itself and by b 1.0" if shipped else "a 1.0 and by b 1.0"
    with pytest.raises(PluginError, match=f"name of method 'Method' is taken by {owners}: uninstall all but one"):
        find(METHODS, "Method", shipped)
    assert f"taken by {owners}" in fault_of(plugins.plugins(METHODS)[0], shipped)
    assert names(METHODS) == ("Method",)


def test_a_plugin_without_a_fault_has_none(installed):
    installed.append(entry("Method", "Method"))
    assert fault_of(plugins.plugins(METHODS)[0], ("MinMax",)) == ""
