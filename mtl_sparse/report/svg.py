"""Figures as inline SVG for HTML pages: colors that follow light and dark mode, and values that show on hover.

The SVG of a figure depends on the figure alone. Its colors are CSS variables, which `web.document` defines; each point,
bar and cell has a hover target with a <title>.
"""

import html
import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RADIUS, _SCALE = 6, 1.15  # of a hover target, in points; pixels per point in a wide page
_SMALLEST, _PHONE = 1.0, 420  # pixels per point below which text is too small; points that fit a phone
_MOST_POINTS = 200  # hover targets of a line whose points have no texts
_COLOR = re.compile(r"#([0-9a-fA-F]{6})\b")
_FIXED = {"000000": "currentColor", "ffffff": "var(--bg)"}
_REFERENCE = re.compile(r"#([^)\"']+)")


class _Target(NamedTuple):
    """A hover target: its text, and a rectangle in display coordinates, whose sides are 0 for a point."""

    text: str
    left: float
    bottom: float
    width: float = 0.0
    height: float = 0.0


def describe(artist: Any, texts: Sequence[str]) -> Any:
    """Set the text of each point of an artist, to be shown on hover, none for []; return the artist."""
    artist.set_gid("\n".join(text.replace("\n", " ") for text in texts))
    return artist


def inline(figure: "Figure", name: str, alt: str, *, split: bool = False) -> str:
    """Return a figure as SVG elements of an HTML page.

    Args:
      figure: any figure; it is not changed, except for the group ids of its axes.
      name: unique in the page; ids in the SVG begin with it.
      alt: description for screen readers.
      split: whether each column of panels becomes a separate <svg>, which a narrow page can stack, and the legend
        and the title of the figure become text.
    """
    import matplotlib

    for i, axis in enumerate(figure.axes):
        axis.set_gid(f"axes:{i}")
    text, dpi = io.StringIO(), figure.dpi
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.set_dpi(72)
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", facecolor="none", metadata=metadata)
    try:
        return _pieces(_parse(text.getvalue(), name), figure, alt, split)
    finally:
        figure.set_dpi(dpi)


def _parse(text: str, name: str) -> ElementTree.Element:
    """Return the tree of matplotlib's SVG, without namespaces, with ids that are unique in the page."""
    text = re.sub(r"xmlns(:xlink)?=\"[^\"]*\"", "", text[text.index("<svg") :]).replace("xlink:href", "href")
    root = ElementTree.fromstring(_COLOR.sub(_variable, text))
    used = {found for element in root.iter() for key, value in element.items() if key != "id"
            for found in _REFERENCE.findall(value)}  # fmt: skip
    for element in root.iter():
        for key, value in element.items():
            if key == "id" and value not in used:
                if not value.startswith("axes:"):
                    del element.attrib[key]
            elif key == "id":
                element.set(key, f"{name}-{value}")
            elif "#" in value:
                element.set(key, _REFERENCE.sub(rf"#{name}-\1", value))
    return root


def _variable(match: re.Match[str]) -> str:
    color = match[1].lower()
    return _FIXED.get(color, f"var(--c{color})")


def dark(color: str) -> str:
    """Return the counterpart of a color "rrggbb" on a dark page: its hue, dark for pale colors and light for others."""
    import colorsys

    hue, lightness, saturation = colorsys.rgb_to_hls(*(int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)))
    inverted = 0.92 - (0.78 if lightness > 0.8 else 0.6) * lightness
    red, green, blue = colorsys.hls_to_rgb(hue, inverted, saturation)
    return "".join(f"{round(255 * part):02x}" for part in (red, green, blue))


def _pieces(root: ElementTree.Element, figure: "Figure", alt: str, split: bool) -> str:
    """Return the elements of a figure: one <svg>, or one for each column of panels, and the legend."""
    from matplotlib.transforms import Bbox

    (body,) = [element for element in root if element.tag == "g"]
    defs = [element for element in root if element.tag == "defs" and element.find("style") is None]
    groups = {element.get("id"): element for element in body.iter() if (element.get("id") or "").startswith("axes:")}
    columns: dict[int, list[int]] = {}
    for i, axis in enumerate(figure.axes):
        place = axis.get_subplotspec()
        columns.setdefault(place.colspan.start if split and place else 0, []).append(i)
        groups[f"axes:{i}"].append(_targets(axis, figure.bbox.height))
        del groups[f"axes:{i}"].attrib["id"]
    if not split:
        return _svg([body, *defs], Bbox.from_bounds(0, 0, figure.bbox.width, figure.bbox.height), figure, alt)
    found = []
    for number, members in enumerate(columns.values()):
        boxes = [box for i in members if (box := figure.axes[i].get_tightbbox())]
        parts = [groups[f"axes:{i}"] for i in members]
        found.append(_svg([*parts, *([] if number else defs)], Bbox.union(boxes).padded(4), figure, alt))
    return "".join(found) + _legend(figure)


def _legend(figure: "Figure") -> str:
    """Return the legends and the title of a figure as text."""
    from matplotlib.colors import to_hex

    entries = [f"<span>{html.escape(text.get_text())}</span>" for text in figure.texts]
    for legend in figure.legends:
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
            line: Any = handle.lines[0] if isinstance(handle, tuple) and hasattr(handle, "lines") else handle
            color = line.get_color() if hasattr(line, "get_color") else line.get_facecolor()
            color = _COLOR.sub(_variable, to_hex(color))
            entries.append(f'<span><i style="background:{color}"></i>{html.escape(text.get_text())}</span>')
    return f'<p class="classes">{"".join(entries)}</p>' if entries else ""


def _svg(elements, box, figure: "Figure", alt: str) -> str:
    left, top = max(box.x0, 0), max(figure.bbox.height - box.y1, 0)
    fixed = box.width > _PHONE
    svg = ElementTree.Element(
        "svg",
        {
            "role": "img",
            "aria-label": alt,
            "viewBox": f"{left:.1f} {top:.1f} {box.width:.1f} {box.height:.1f}",
            "style": f"width:{_SCALE * box.width:.0f}px;min-width:{_SMALLEST * box.width if fixed else 0:.0f}px",
        },
    )
    svg.extend(elements)
    return ElementTree.tostring(svg, encoding="unicode")


def _targets(axis: "Axes", height: float) -> ElementTree.Element:
    """Return the group of the hover targets of an axis."""
    group = ElementTree.Element("g", {"class": "hits"})
    for one in _found(axis):
        y = height - one.bottom
        if one.width:
            box = {"x": one.left, "y": y - one.height, "width": one.width, "height": one.height}
            element = ElementTree.SubElement(group, "rect", {key: f"{value:.1f}" for key, value in box.items()})
        else:
            place = {"cx": f"{one.left:.1f}", "cy": f"{y:.1f}", "r": str(_RADIUS)}
            element = ElementTree.SubElement(group, "circle", place)
        ElementTree.SubElement(element, "title").text = one.text
    return group


def _found(axis: "Axes") -> Iterator[_Target]:
    from matplotlib.container import BarContainer, ErrorbarContainer

    for image in axis.images:
        yield from _of_image(axis, image)
    inside = set()
    for container in axis.containers:
        if isinstance(container, BarContainer):
            yield from _of_bars(axis, container)
        elif isinstance(container, ErrorbarContainer):
            line, caps, _ = container.lines
            inside |= {id(cap) for cap in caps}
            if line is not None:
                inside.add(id(line))
                yield from _of_line(axis, line, str(container.get_label()))
    for line in axis.lines:
        if id(line) not in inside and line.get_transform() == axis.transData:
            yield from _of_line(axis, line, str(line.get_label()))


def _of_line(axis: "Axes", line, label: str) -> Iterator[_Target]:
    points, texts = np.asarray(line.get_xydata(), float), line.get_gid()
    if texts == "" or (texts is None and label.startswith("_")):
        return
    given = texts.split("\n") if texts is not None else None
    chosen = np.arange(len(points))
    if given is None and len(points) > _MOST_POINTS:
        chosen = np.unique(np.linspace(0, len(points) - 1, _MOST_POINTS).round().astype(int))
    places = axis.transData.transform(points) if len(points) else points
    shared = axis.get_shared_x_axes().get_siblings(axis)
    name = next((one.get_xlabel() for one in (axis, *shared) if one.get_xlabel()), "x")
    for i in chosen:
        if np.isfinite(places[i]).all():
            x, y = points[i]
            text = given[i] if given else f"{label}: {y:.4g} ({name} {x:.6g})"
            (left, bottom), (right, top) = axis.bbox.min, axis.bbox.max  # a point beyond the axis is shown at its end
            yield _Target(text, min(max(places[i][0], left), right), min(max(places[i][1], bottom), top))


def _of_bars(axis: "Axes", bars) -> Iterator[_Target]:
    gid = bars.get_gid() if hasattr(bars, "get_gid") else None
    names = [tick.get_text() for tick in axis.get_xticklabels()]
    for i, bar in enumerate(bars):
        box = bar.get_window_extent()
        name = f"{names[i]}, " if len(names) == len(bars) and names[i] else ""
        text = gid.split("\n")[i] if gid else f"{name}{bars.get_label()}: {bar.get_height():.6g}"
        yield _Target(text, box.x0, box.y0, max(box.width, 1), max(box.height, 1))


def _of_image(axis: "Axes", image) -> Iterator[_Target]:
    values = np.ma.filled(np.ma.asarray(image.get_array()), np.nan)
    columns, rows = ([tick.get_text() for tick in ticks] for ticks in (axis.get_xticklabels(), axis.get_yticklabels()))
    if values.shape != (len(rows), len(columns)):
        return
    for (row, column), value in np.ndenumerate(values):
        corners = axis.transData.transform([(column - 0.5, row - 0.5), (column + 0.5, row + 0.5)])
        (left, bottom), (right, top) = corners.min(0), corners.max(0)
        if np.isfinite(value):
            text = f"{rows[row]}, {columns[column]}: {value:.4g}"
            yield _Target(text, left, bottom, right - left, top - bottom)
