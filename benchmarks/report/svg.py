"""Charts as SVG, to stand inline in a page: colours come from its style, nothing is scripted.

Drawn 360 units wide, which a telephone shows one to one. Text is escaped by ElementTree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from .charts import Bars, Chart, Plane
from .wording import prefixed, short

WIDTH = 360
LEFT, RIGHT = 84, 54  # room for names and for values beside bars
LINE = 17  # from one mark to the next
Scale = Callable[[float], float]


def draw(chart: Chart, slots: Mapping[str, int]) -> str:
    """An `<svg>` element; `slots`: series -> its number in the `palette`."""
    return tostring(
        _bars(chart, slots) if isinstance(chart, Bars) else _plane(chart, slots), "unicode"
    )


def marker(slot: int) -> str:
    """The shape of a series, for a legend."""
    svg = Element(
        "svg", {"viewBox": "-6 -6 12 12", "class": f"marker c{slot}", "aria-hidden": "true"}
    )
    _shape(svg, 0, 0, slot)
    return tostring(svg, "unicode")


# ---------------------------------------------------------------------------------------------
# The two kinds


def _bars(chart: Bars, slots: Mapping[str, int]) -> Element:
    height = 4 + sum(LINE + 8 + LINE * len(marks) for _, marks in chart.groups) + 44
    bottom = height - 40
    svg = _svg(chart.title, height)
    marks = [mark for _, some in chart.groups for mark in some]
    ends = [end for mark in marks for end in (mark.low, mark.high)] + [1.0] * chart.one
    if chart.dots:
        low, high = min(ends), max(ends)
        room = (high / low) ** 0.06
        low, high = min(low / room, low / 1.1), max(high * room, high * 1.1)
    else:
        low, high = 0.0, max(ends)
    at = scale(low, high, LEFT, WIDTH - RIGHT, chart.dots)
    values = ticks(low, high, chart.dots)
    said = _apart([(at(v), tick(v)) for v in values])
    _x_axis(svg, chart.axis, said, 4, bottom, LEFT, WIDTH - RIGHT)
    if chart.one:
        _line(svg, at(1), 4, at(1), bottom, "one")
    y = 4.0
    for name, some in chart.groups:
        y += LINE
        _text(svg, 0, y - 4, short(name, 62), "group")
        for mark in some:
            group = _mark(svg, f"{mark.series}: {mark.words}", slots[mark.series], mark.hollow)
            middle, x = y + LINE / 2, at(mark.value)
            _text(group, LEFT - 6, middle + 3.5, short(mark.series, 13), "name", "end")
            if not chart.dots:
                width = max(1.0, x - LEFT)
                box = {"x": _f(LEFT), "y": _f(middle - 5), "width": _f(width), "height": "10"}
                SubElement(group, "rect", box | {"class": "bar"})
            _whisker(group, at(mark.low), middle, at(mark.high), middle)
            if chart.dots:
                _shape(group, x, middle, slots[mark.series])
            _text(group, WIDTH, middle + 3.5, mark.label, "value", "end")
            y += LINE
        y += 8
    return svg


def _plane(chart: Plane, slots: Mapping[str, int]) -> Element:
    top, bottom, left, right, height = 22, 226, 50, WIDTH - 12, 266
    svg = _svg(chart.title, height)
    points = [point for _, some in chart.points for point in some]
    corners = [corner for _, some in chart.roofs for corner in some]
    xs = [p.x for p in points] + [x for x, _ in corners]
    ys = [v for p in points for v in (p.low, p.high)] + [y for _, y in corners]
    if chart.linear:
        y_low, y_high, x_low, x_high = 0.0, 1.05 * max(ys), min(xs) - 0.5, max(xs) + 0.5
    else:
        y_low, y_high = min(ys) / 1.25, max(ys) * (1.7 if corners else 1.25)
        room = 1.0 if corners else 1.25
        x_low, x_high = min(xs) / room, max(xs) * room
    at_x = scale(x_low, x_high, left, right, not chart.linear)
    at_y = scale(y_low, y_high, bottom, top, not chart.linear)
    said = [(at_x(x), tick(x)) for x in chart.x_ticks or ticks(x_low, x_high, not chart.linear)]
    _x_axis(svg, chart.x_axis, _apart(said), top, bottom, left, right)
    for value in ticks(y_low, y_high, not chart.linear):
        _line(svg, left, at_y(value), right, at_y(value), "grid")
        _text(svg, left - 6, at_y(value) + 3.5, tick(value), "tick", "end")
    _text(svg, 0, 12, chart.y_axis, "axis")
    for _, some in chart.roofs:
        path = " ".join(f"{_f(at_x(x))},{_f(at_y(y))}" for x, y in some)
        SubElement(svg, "polyline", {"points": path, "class": "roof"})
    names = ["Roofs, from the top:"] * bool(chart.roofs) + [name for name, _ in chart.roofs]
    for i, name in enumerate(reversed(names)):  # in the corner where no point can be
        _text(svg, right, bottom - 6 - 12 * i, name, "roof-name", "end")
    for name, line in chart.points:
        if chart.joined:
            path = " ".join(f"{_f(at_x(p.x))},{_f(at_y(p.y))}" for p in line)
            SubElement(svg, "polyline", {"points": path, "class": f"line c{slots[name]}"})
        for p in line:
            words = f"{name}, {p.name}: {p.y_words} at {p.x_words}"
            group = _mark(svg, words, slots[name], False)
            _whisker(group, at_x(p.x), at_y(p.low), at_x(p.x), at_y(p.high))
            _shape(group, at_x(p.x), at_y(p.y), slots[name])
    return svg


# ---------------------------------------------------------------------------------------------
# Scales


def scale(low: float, high: float, start: float, end: float, log: bool) -> Scale:
    """From a quantity to a place, both ends included."""
    go = math.log10 if log else float
    first, last = go(low), go(high)
    length = (last - first) or 1.0
    return lambda value: start + (end - start) * (go(value) - first) / length


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values from low to high, some three to seven."""
    if not log:
        raw = (high - low) / 5 or 1.0
        power = 10 ** math.floor(math.log10(raw))
        step = next(power * f for f in (1, 2, 5, 10) if power * f >= 0.999 * raw)
        return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [d * 10.0**k for k in decades for d in digits if low <= d * 10.0**k <= high]
        if len(found) >= 3:
            break
    if len(found) < 2:  # so short an axis is as good as linear
        return ticks(low, high, log=False)
    return found[:: math.ceil(len(found) / 7)]


def tick(value: float) -> str:
    """A round value without digits that say nothing: 32, 0.5, 1,024, 100 G."""
    by, prefix = prefixed(value) if value >= 1e6 else (1, "")
    return f"{value / by:,.10g} {prefix}".strip()


def _apart(said: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Without the words that would run into those before them."""
    kept: list[tuple[float, str]] = []
    for x, words in said:
        near = kept and x - kept[-1][0] < 3.2 * (len(words) + len(kept[-1][1])) + 4
        kept.append((x, "" if near else words))
    return kept


# ---------------------------------------------------------------------------------------------
# Pieces


def _svg(title: str, height: float) -> Element:
    box = f"0 0 {WIDTH} {_f(height)}"
    return Element("svg", {"viewBox": box, "class": "chart", "role": "img", "aria-label": title})


def _x_axis(
    svg: Element,
    label: str,
    said: Sequence[tuple[float, str]],
    top: float,
    bottom: float,
    left: float,
    right: float,
) -> None:
    for x, words in said:
        _line(svg, x, top, x, bottom, "grid")
        _text(svg, x, bottom + 14, words, "tick", "middle")
    _line(svg, left, bottom, right, bottom, "base")
    _text(svg, (left + right) / 2, bottom + 32, label, "axis", "middle")


def _mark(svg: Element, words: str, slot: int, hollow: bool) -> Element:
    group = SubElement(svg, "g", {"class": f"mark c{slot}" + " hollow" * hollow})
    SubElement(group, "title").text = words
    return group


def _whisker(svg: Element, x1: float, y1: float, x2: float, y2: float) -> None:
    if math.hypot(x2 - x1, y2 - y1) > 0.5:
        _line(svg, x1, y1, x2, y2, "whisker")


def _line(svg: Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
    ends = {"x1": _f(x1), "y1": _f(y1), "x2": _f(x2), "y2": _f(y2)}
    SubElement(svg, "line", ends | {"class": kind})


def _text(svg: Element, x: float, y: float, words: str, kind: str, anchor: str = "start") -> None:
    place = {"x": _f(x), "y": _f(y), "class": kind, "text-anchor": anchor}
    SubElement(svg, "text", place).text = words


def _shape(svg: Element, x: float, y: float, slot: int) -> None:
    paths = (
        "M-4,0 a4,4 0 1,0 8,0 a4,4 0 1,0 -8,0 z",
        "M-3.5,-3.5 h7 v7 h-7 z",
        "M0,-4.5 L4.3,3.5 H-4.3 z",
        "M0,-4.8 L4.8,0 L0,4.8 L-4.8,0 z",
        "M0,4.5 L4.3,-3.5 H-4.3 z",
        "M-1.5,-4.5 h3 v3 h3 v3 h-3 v3 h-3 v-3 h-3 v-3 h3 z",
        "M-4,-4 L0,-1.5 L4,-4 L1.5,0 L4,4 L0,1.5 L-4,4 L-1.5,0 z",
    )
    place = {"d": paths[slot % len(paths)], "transform": f"translate({_f(x)} {_f(y)})"}
    SubElement(svg, "path", place | {"class": "shape"})


def _f(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
