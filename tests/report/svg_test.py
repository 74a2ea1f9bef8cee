"""Figures as inline SVG: hover targets where the data are, colors as variables, the same text each time."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from mtl_sparse.report import plots, svg


def drawn(*, split=False, name="one"):
    """Return a figure with a line, bars and points with intervals, in two panels, as SVG elements."""
    figure = plots.new_figure(figsize=(8, 3))
    left, right = figure.subplots(1, 2)
    left.plot([1, 2, 4], [0.5, np.nan, 0.25], label="loss & more", color="#20639b")
    left.axhline(0.3, label="baseline")
    left.set_xlabel("step")
    bars = right.bar([0, 1], [3, 5], label="groups")
    right.set_xticks([0, 1], ["stem", "<b>layer</b>"])
    svg.describe(right.errorbar([0.5], [4.0], [1.0], fmt="o", label="x").lines[0], ["a row: 4 ± 1"])
    assert len(bars) == 2
    figure.legend(loc="outside lower center")
    return svg.inline(figure, name, "a figure", split=split)


def elements(text):
    return ElementTree.fromstring(f"<page>{text}</page>")


def tips(text):
    return [title.text for title in elements(text).iter("title")]


def test_points_bars_and_described_artists_have_hover_texts():
    assert tips(drawn()) == [
        "loss & more: 0.5 (step 1)",
        "loss & more: 0.25 (step 4)",
        "stem, groups: 3",
        "<b>layer</b>, groups: 5",
        "a row: 4 ± 1",
    ], "no target where a value is missing, and none for the baseline"


def test_hover_targets_lie_on_the_data():
    figure = plots.new_figure(figsize=(4, 3))
    axis = figure.subplots()
    (line,) = axis.plot([0, 10], [5, 7], "o", label="points", color="#123456")
    root = elements(svg.inline(figure, "one", ""))
    markers = [(float(use.get("x")), float(use.get("y"))) for use in root.iter("use") if "#123456" in str(use.attrib)
               or "c123456" in (use.get("style") or "")]  # fmt: skip
    circles = [(float(circle.get("cx")), float(circle.get("cy"))) for circle in root.iter("circle")]
    assert len(circles) == len(markers) == 2 and line.get_gid() is None
    np.testing.assert_allclose(circles, markers, atol=0.1)


def test_cells_of_an_image_have_their_row_and_column():
    figure = plots.new_figure()
    axis = figure.subplots()
    axis.imshow([[1.0, np.nan], [3.0, 4.0]])
    axis.set_xticks([0, 1], ["stem", "layer1"])
    axis.set_yticks([0, 1], ["dense", "target 0.7"])
    text = svg.inline(figure, "one", "")
    assert tips(text) == ["dense, stem: 1", "target 0.7, stem: 3", "target 0.7, layer1: 4"]


def test_a_point_beyond_the_axis_is_shown_at_its_end():
    figure = plots.new_figure(figsize=(4, 3))
    axis = figure.subplots()
    axis.plot([0, 1], [0, 100], "o", label="points")
    axis.set_ylim(-1, 1)
    _, beyond = elements(svg.inline(figure, "one", "")).iter("circle")
    assert float(beyond.get("cy")) == pytest.approx(figure.bbox.height * 72 / figure.dpi - _top(axis), abs=0.1)


def _top(axis):
    figure = axis.figure
    return axis.get_position().y1 * figure.get_figheight() * 72


def test_the_same_figure_is_the_same_text():
    assert drawn() == drawn()
    assert "http" not in drawn() and "xmlns" not in drawn()


def test_colors_are_variables():
    text = drawn()
    assert "var(--c20639b)" in text and "currentColor" in text
    assert not re.findall(r"(?:fill|stroke): ?#[0-9a-f]{6}", text)


def test_ids_are_unique_in_a_page_and_all_references_are_found():
    root = elements(drawn(name="one") + drawn(name="two", split=True))
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids)) and ids
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', ElementTree.tostring(root, encoding="unicode")))
    assert used and used <= set(ids)


def test_panels_are_separate_if_they_can_be_stacked():
    whole, parts = elements(drawn()), elements(drawn(split=True))
    assert len(list(whole.iter("svg"))) == 1
    left, right = parts.iter("svg")
    assert [len(list(panel.iter("title"))) for panel in (left, right)] == [2, 3]
    assert "step" in "".join(left.itertext()) and "step" not in "".join(right.itertext())
    (legend,) = parts.iter("p")
    assert [entry.tail for entry in legend.iter("i")] == ["loss & more", "baseline", "groups", "x"]
    assert legend.find("span/i").get("style") == "background:var(--c20639b)", "the color of the line"
    width = [float(panel.get("viewBox").split()[2]) for panel in (left, right)]
    assert all(width_ < 8 * 72 / 2 + 20 for width_ in width)


def test_colors_keep_their_contrast_on_a_dark_page():
    def lightness(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        return (max(parts) + min(parts)) / 2

    for color in (*plots.COLORS, "#9aa5b1", "#2c3e50", "#000000"):
        assert lightness(svg.dark(color.removeprefix("#"))) > 0.5, "lines and text are light"
    assert lightness(svg.dark("d5dbe3")) < 0.4, "areas behind them are dark"
    red, green, blue = (int(svg.dark("20639b")[i : i + 2], 16) for i in (0, 2, 4))
    assert red < green < blue, "of the same hue"


def test_long_lines_have_a_limited_number_of_targets():
    figure = plots.new_figure()
    figure.subplots().plot(np.arange(5000), np.arange(5000), label="line")
    found = tips(svg.inline(figure, "one", ""))
    assert len(found) == 200 and found[0].endswith("0 (x 0)") and found[-1].endswith("4999 (x 4999)")
