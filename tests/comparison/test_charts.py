import dataclasses
import re

import numpy as np
import pytest
from matplotlib import rc_context

from fxq.comparison.charts import as_svg, drift, front, geometric, method_looks, pareto, side_by_side
from fxq.report.charts import NARROW, STYLE, VARIABLES, WIDE
from tests.comparison.example import PLAN, made_up


@pytest.fixture
def results(tmp_path, monkeypatch):
    return made_up(monkeypatch, tmp_path)


def texts(svg):
    return re.findall(r"<text[^>]*>(.*?)</text>", svg)


def test_the_front_is_what_no_other_point_is_better_than_in_both():
    points = [(0.3, 5.0), (0.5, 1.0), (0.3, 4.0), (0.4, 4.5), (0.6, 1.0), (0.45, 2.0)]
    assert front(points) == [(0.3, 4.0), (0.45, 2.0), (0.5, 1.0)]
    assert front([(0.5, 1.0)]) == [(0.5, 1.0)]


def test_points_of_one_size_are_drawn_apart_and_others_where_they_are():
    assert side_by_side([0.5, 0.3, 0.5, 0.9], near=0.05, step=0.02) == pytest.approx([0.49, 0.3, 0.51, 0.9])
    assert side_by_side([], 0.1, 0.1) == []


def test_geometric_means_lie_in_their_intervals():
    errors = np.random.default_rng(0).lognormal(0, 1, (40, 3))
    mean, low, high = geometric(errors)
    assert mean == pytest.approx(np.exp(np.log(errors).mean(0)))
    assert (low < mean).all() and (mean < high).all()
    assert geometric(np.zeros(3))[0] > 0


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("draw", [pareto, drift])
def test_drawings_name_every_method_and_width_and_label_their_axes(draw, width, results):
    svg = as_svg(draw, results, width, "a drawing")
    shown = texts(svg)
    for name in (*method_looks(results.rows), "W8A8", "W4A8"):
        assert any(name in text for text in shown), name
    labels = {pareto: ("bytes of linears / bf16; equal sizes side by side", "teacher-forced error"), drift: ("chunk",)}
    assert all(label in shown for label in labels[draw])
    assert "#fe0" not in svg and 'aria-label="a drawing"' in svg


def test_every_method_has_a_colour_of_the_page(results):
    looks = method_looks(results.rows)
    assert len(set(looks.values())) == 3 and {look.colour for look in looks.values()} <= set(VARIABLES)
    row = results.rows[0]
    many = [dataclasses.replace(row, variant=dataclasses.replace(row.variant, method=str(i))) for i in range(13)]
    assert len(set(method_looks(many).values())) == 13


def test_longer_videos_than_trained_are_marked(tmp_path, monkeypatch):
    results = made_up(monkeypatch, tmp_path, dataclasses.replace(PLAN, methods=("minmax", "nearest")))
    assert not any("longer than trained" in text for text in texts(as_svg(drift, results, WIDE, "x")))
    longer = dataclasses.replace(results, trained=5)
    assert any("longer than trained" in text for text in texts(as_svg(drift, longer, WIDE, "x")))


@pytest.mark.parametrize("draw", [pareto, drift])
def test_no_text_of_a_drawing_lies_on_another(draw, results):
    with rc_context(STYLE):
        figure = draw(results, WIDE, lambda colour: colour)
        figure.draw_without_rendering()
        found = [text for legend in figure.legends for text in legend.get_texts()]
        for axes in figure.axes:
            found += [axes.xaxis.label, axes.title, axes._left_title]
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = [(text.get_text(), text.get_window_extent()) for text in found if text.get_text()]
    assert len(boxes) > 20
    for i, (a, first) in enumerate(boxes):
        for b, second in boxes[i + 1 :]:
            assert not first.overlaps(second), (a, b)
