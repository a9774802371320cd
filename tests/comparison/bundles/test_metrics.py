import math

import numpy as np
import pytest

from fxq import plugins
from fxq.comparison.bundles.metrics import KeptFrames, Metric, find_metrics
from fxq.comparison.methods import ComparisonError
from fxq.plugins import Plugin


def distance(pairs):
    """A metric of a user."""
    return np.mean([np.abs(pair.frames.astype(float) - pair.reference).mean() for pair in pairs])


def frames(value, count=2):
    return np.full((count, 4, 5, 3), value, np.uint8)


def test_a_function_is_found_by_its_name_and_sees_each_pair(tmp_path):
    (metric,) = find_metrics([f"dist={__name__}:distance"])
    assert (metric.name, metric.source) == ("dist", f"{__name__}:distance")
    with KeptFrames(tmp_path / "out") as kept:
        for i, prompt in enumerate(("a cat", "a dog")):
            kept.begin(prompt)
            for version, value in (("full", 100), ("b", 110 + 20 * i)):
                kept.add(version, frames(value))
                kept.add(version, frames(value, 3))
        seen = list(kept.pairs("b", "full"))
        assert [pair.prompt for pair in seen] == ["a cat", "a dog"]
        assert seen[1].frames.shape == (5, 4, 5, 3) and seen[1].frames[0, 0, 0, 0] == 130
        assert metric(kept.pairs("b", "full"), "b") == 20 and metric(kept.pairs("full", "full"), "full") == 0
    assert not list((tmp_path / "out").iterdir()), "frames are gone at the end"


def test_frames_are_gone_after_an_error_too(tmp_path):
    with pytest.raises(KeyError), KeptFrames(tmp_path) as kept:
        kept.begin("a cat")
        kept.add("b", frames(1))
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_plugin_is_found_by_its_name(monkeypatch):
    plugin = Plugin(
        group=plugins.METRICS, name="lpips", target=f"{__name__}:distance", distribution="theirs", version="1.0"
    )
    monkeypatch.setattr(plugins, "plugins", lambda group: (plugin,) if group == plugins.METRICS else ())
    (metric,) = find_metrics(["lpips"])
    assert metric.measure is distance and metric.source.startswith("metric 'lpips'")
    with pytest.raises(ComparisonError, match=r"metric 'fvd': no plug-in has this name \(lpips\); or say fvd="):
        find_metrics(["fvd"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lpips"], r"no plug-in has this name \(none is installed\)"),
        (["a=no_such_module:f"], "No module named 'no_such_module'"),
        ([f"a={__name__}:distance", f"a={__name__}:distance"], "a, a: expected each once"),
    ],
)
def test_what_leads_to_no_metric_is_refused(words, message):
    with pytest.raises(ComparisonError, match=message):
        find_metrics(words)


def test_what_is_no_number_is_refused():
    with pytest.raises(ComparisonError, match=r"metric 'm' \(s\) gave str for b, expected a number"):
        Metric("m", "s", lambda pairs: "high")([], "b")
    assert math.isnan(Metric("m", "s", lambda pairs: None)([], "b"))
