"""Line charts and histograms as self-contained SVG text: no plotting library, no script, no remote resource.

Used by reports, by notebook views and by the figures of the documentation. A style sheet inside the picture follows the
light or dark setting of the reader, so that one file serves both.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from pretrain.utils.files import check_output, write_shown

__all__ = [
    "PICTURES",
    "Plot",
    "Series",
    "curve_svg",
    "histogram_svg",
    "matrix_svg",
    "nice_ticks",
    "thin",
]

Point = tuple[float, float]

PICTURES = (".svg",)  # endings of the files that a picture is written to

# Left, top, right, bottom margin in pixels, for the title, the legend and the labels of the axes.
_MARGIN = (58.0, 34.0, 16.0, 42.0)
_STYLE = """
.pc{font:12px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
.pc .bg{fill:#fff}.pc text{fill:#52514e}.pc .title{fill:#0b0b0b;font-weight:600;font-size:13px}
.pc .grid{stroke:#e4e3df;stroke-width:1}.pc .axis{stroke:#b5b4ae;stroke-width:1}
.pc .ref{stroke:#85847e;stroke-width:1.2;stroke-dasharray:5 4}
.pc .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.pc .band{stroke:none;opacity:.16}.pc .dot{stroke:#fff;stroke-width:1.5}.pc .hit{fill:transparent}
.pc .s0{stroke:#2a6fd6}.pc .f0{fill:#2a6fd6}.pc .s1{stroke:#d9480f}.pc .f1{fill:#d9480f}
.pc .s2{stroke:#0f8a63}.pc .f2{fill:#0f8a63}.pc .s3{stroke:#8047c4}.pc .f3{fill:#8047c4}
@media (prefers-color-scheme:dark){
.pc .bg{fill:#16181d}.pc text{fill:#b9bdc6}.pc .title{fill:#f2f3f5}
.pc .grid{stroke:#2b2f37}.pc .axis{stroke:#4a505b}.pc .ref{stroke:#8c929d}.pc .dot{stroke:#16181d}
.pc .s0{stroke:#6ea8fe}.pc .f0{fill:#6ea8fe}.pc .s1{stroke:#ff9554}.pc .f1{fill:#ff9554}
.pc .s2{stroke:#4cc99b}.pc .f2{fill:#4cc99b}.pc .s3{stroke:#b78cf0}.pc .f3{fill:#b78cf0}}
""".replace("\n", "")


@dataclass(frozen=True)
class Plot:
    """A chart, which a notebook shows.

    Args:
        svg: the picture as SVG text.
    """

    svg: str

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the picture as an .svg file, atomically, and return its path.

        Raises:
            ConfigError: the name ends in another format.
            DataError: the file cannot be written.
        """
        target = Path(path)
        check_output(target, PICTURES)
        write_shown(target, self.svg, "picture")
        return target

    def __repr__(self) -> str:
        return "Plot(shown in a notebook; save('plot.svg') writes it)"

    def _repr_svg_(self) -> str:
        return self.svg


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Args:
        label: name in the legend.
        points: (x, y) pairs in any order; pairs that are not finite are omitted and leave a gap.
        dots: mark every point (for few, important values) instead of drawing a band of the raw values.
        whiskers: (x, low, high) of vertical error bars.
        joined: connect the points by a line; not for values of separate things.
    """

    label: str
    points: Sequence[Point]
    dots: bool = False
    whiskers: Sequence[tuple[float, float, float]] = ()
    joined: bool = True

    def finite(self) -> list[Point]:
        """Return the finite points in the order of x."""
        return sorted((x, y) for x, y in self.points if math.isfinite(x) and math.isfinite(y))


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers that cover [low, high], in steps of 1, 2, 2.5 or 5 times a power of ten.

    Args:
        low: smallest value to show.
        high: largest value to show; the interval is widened if it equals ``low``.
        count: approximate number of steps.
    """
    scale = max(abs(low), abs(high))
    if high - low <= scale * 1e-9 or scale < 1e-100:
        pad = scale * 0.05 if scale > 1e-100 else 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def thin(points: Sequence[Point], limit: int) -> list[tuple[float, float, float, float]]:
    """Merge neighbouring points into at most ``limit`` groups: (x, mean, lowest, highest) of each.

    The mean preserves the level of the line and the extremes keep spikes visible, however long the run was.
    """
    size = max(1, math.ceil(len(points) / limit))
    merged = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        ys = [y for _, y in group]
        merged.append((group[-1][0], sum(ys) / len(ys), min(ys), max(ys)))
    return merged


def curve_svg(
    series: Iterable[Series | tuple[str, Sequence[Point]]],
    *,
    title: str = "",
    x_label: str = "step",
    y_label: str = "",
    references: Mapping[str, float] | None = None,
    width: int = 720,
    height: int = 320,
    zero: bool = False,
    log_x: bool = False,
) -> str:
    """Draw lines over a common x axis and return the SVG text.

    Args:
        series: the lines, the most important first; plain ``(label, points)`` pairs are accepted.
        title: printed above the chart and read by screen readers.
        x_label: label of the horizontal axis.
        y_label: label of the vertical axis.
        references: horizontal dashed lines, name -> y (such as a baseline).
        width: width of the chart in pixels; it scales to its container.
        height: height of the chart in pixels.
        zero: include zero in the vertical axis.
        log_x: use a logarithmic horizontal axis; points with x <= 0 are omitted.
    """
    drawn = [one if isinstance(one, Series) else Series(one[0], one[1]) for one in series]
    lines = [(index, one, one.finite()) for index, one in enumerate(drawn)]
    if log_x:
        lines = [(i, one, [p for p in points if p[0] > 0]) for i, one, points in lines]
    lines = [item for item in lines if item[2]]
    kept = {name: y for name, y in (references or {}).items() if math.isfinite(y)}
    if not lines:
        body = [_text(width / 2, height / 2, "nothing to draw yet", "middle")]
    else:
        named = [(index % 4, one.label) for index, one, _ in lines if one.label]
        # A legend that does not fit beside the title stands below it.
        below = 14 + 8 * len(title) + _legend_width(named) > width and bool(title)
        frame = _Frame.around(lines, kept, width, height, zero, log_x, 18 * below)
        body = [frame.axes(x_label, y_label)]
        body += [frame.reference(name, y, lines) for name, y in kept.items()]
        body += [frame.line(index % 4, one, points) for index, one, points in lines]
        body.append(_legend(named, width, 21 + 18 * below))
    return _picture(title, y_label or "curve", width, height, body)


def histogram_svg(
    counts: Sequence[int], bin_width: int, x_label: str, *, open_end: bool, limit: int | None = None
) -> str:
    """Draw a histogram of whole numbers and return the SVG text.

    Args:
        counts: number of values in each bin, of which the first begins at 0; at least one is not 0.
        bin_width: width of a bin.
        x_label: label of the horizontal axis.
        open_end: whether the last bin includes all larger values.
        limit: a vertical line after this value; bins beyond it have another colour.
    """
    end, (left, top, right, bottom) = bin_width * len(counts), (58.0, 16.0, 864.0, 148.0)
    ticks = [tick for tick in nice_ticks(0, end, 8) if tick <= (0.85 * end if open_end else end)]
    scales = (nice_ticks(0, max(counts), count) for count in (4, 3, 2, 1))
    whole = next(scale for scale in scales if all(map(float.is_integer, scale)))
    frame = _Frame(0, end, whole, (left, top, right, bottom), x_ticks=ticks)
    body = [frame.axes(x_label, "")]
    step = (right - left) / len(counts)
    for k, count in enumerate(counts):
        if not count:
            continue
        first, y = k * bin_width, min(frame.y(count), bottom - 1.5)
        span = f"{first:,}" if bin_width == 1 else f"{first:,} to {first + bin_width - 1:,}"
        if open_end and k == len(counts) - 1:
            span = f"{first:,} or more"
        colour = "f0" if limit is None or first <= limit else "f1"
        body.append(
            f'<rect class="{colour}" x="{left + k * step + 0.5:.1f}" y="{y:.1f}" width="{max(1.0, step - 1):.1f}" '
            f'height="{bottom - y:.1f}"><title>{span}: {count:,}</title></rect>'
        )
    if open_end:
        body.append(_text(right, bottom + 17, f"{end - bin_width:,} or more", "end"))
    if limit is not None and limit < end:
        at = frame.x(limit + 1)
        body.append(_line("ref", at, top, at, bottom))
        side, anchor = (-6, "end") if at > right * 0.8 else (6, "start")
        body.append(_text(at + side, top + 10, f"limit {limit:,}", anchor))
    return _picture("", x_label, 880, 190, body)


def matrix_svg(
    labels: Sequence[str], counts: Sequence[Sequence[int]], *, title: str, across: str, down: str
) -> str:
    """Draw a square matrix of counts and return the SVG text; a cell is as strong as its share of the row.

    Args:
        labels: names of the C rows and columns.
        counts: (C, C) counts; those on the diagonal have another colour than the others.
        title: printed above the matrix.
        across: label of the horizontal axis.
        down: label of the vertical axis.
    """
    size = max(12.0, min(56.0, 640 / len(labels)))
    names = [name if len(name) <= 20 else name[:19] + "…" for name in labels]
    longest = max(map(len, names))
    left, top = 44 + 6.6 * longest, 58 + (4.8 * longest if longest * 6.6 > size else 8)
    width, height = (
        round(left + size * len(labels) + 16 + 4.8 * longest),
        round(top + size * len(labels) + 16),
    )
    body = [
        _text(left + size * len(labels) / 2, 42, across, "middle"),
        _vertical(top + size * len(labels) / 2, down),
    ]
    for i, name in enumerate(names):
        middle = (i + 0.5) * size
        body.append(_text(left - 8, top + middle + 4, name, "end"))
        turned = " rotate(-45)" if longest * 6.6 > size else ""
        anchor = "start" if turned else "middle"
        place = f"translate({left + middle:.1f} {top - 7:.1f}){turned}"
        body.append(f'<text transform="{place}" text-anchor="{anchor}">{escape(name)}</text>')
        total = max(1, sum(counts[i]))
        for k, count in enumerate(counts[i]):
            share = count / total
            words = escape(f"{labels[i]} as {labels[k]}: {count:,}, {share:.1%} of its row")
            x, y = left + k * size, top + i * size
            body.append(
                f'<rect class="{"f0" if i == k else "f1"}" x="{x:.1f}" y="{y:.1f}" width="{size - 1:.1f}" '
                f'height="{size - 1:.1f}" fill-opacity="{0.04 + 0.66 * share:.2f}"><title>{words}</title></rect>'
            )
            if size >= 24 and count:
                body.append(_text(x + size / 2, y + size / 2 + 4, f"{count:,}", "middle"))
    return _picture(title, title, width, height, body)


def _vertical(middle: float, text: str) -> str:
    """Return text along the left edge, from bottom to top."""
    return f'<text transform="translate(14 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(text)}</text>'


def _picture(title: str, label: str, width: int, height: int, body: Iterable[str]) -> str:
    caption = f'<text class="title" x="14" y="21">{escape(title)}</text>' if title else ""
    return (
        f'<svg class="pc" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title or label)}" style="max-width:100%;height:auto" '
        f'width="{width}" height="{height}"><style>{_STYLE}</style>'
        f'<rect class="bg" width="{width}" height="{height}" rx="8"/>{caption}{"".join(body)}</svg>'
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


@dataclass(frozen=True)
class _Frame:
    """The plotting area and its scales."""

    x0: float
    x1: float
    y_ticks: list[float]
    box: tuple[float, float, float, float]
    log_x: bool = False
    x_ticks: Sequence[float] = ()

    @classmethod
    def around(
        cls,
        lines: Sequence[tuple[int, Series, list[Point]]],
        references: Mapping[str, float],
        width: int,
        height: int,
        zero: bool,
        log_x: bool = False,
        extra_top: int = 0,
    ) -> _Frame:
        """Choose scales that show all points, error bars and references, below ``extra_top`` pixels."""
        xs = [x for _, _, points in lines for x, _ in points]
        ys = [y for _, _, points in lines for _, y in points] + list(references.values())
        ys += [
            y for _, one, _ in lines for bar in one.whiskers for y in bar[1:] if math.isfinite(y)
        ]
        low, high = min(ys), max(ys)
        if zero:
            low = min(0.0, low)
        left, top, right, bottom = _MARGIN
        top += extra_top
        x0, x1 = min(xs), max(xs)
        if x0 == x1:
            x0, x1 = (x0 / 2, x1 * 2) if log_x else (x0 - 0.5, x1 + 0.5)
        count = max(2, int((height - top - bottom) / 38))
        box = (left, top, width - right, height - bottom)
        return cls(x0, x1, nice_ticks(low, high, count), box, log_x, _x_ticks(xs, x0, x1, log_x))

    def x(self, value: float) -> float:
        left, _, right, _ = self.box
        at, x0, x1 = (math.log(v) if self.log_x else v for v in (value, self.x0, self.x1))
        return left + (at - x0) / (x1 - x0) * (right - left)

    def y(self, value: float) -> float:
        _, top, _, bottom = self.box
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return bottom - (value - low) / (high - low) * (bottom - top)

    def axes(self, x_label: str, y_label: str) -> str:
        left, top, right, bottom = self.box
        parts = []
        digits = _digits(self.y_ticks)
        for tick in self.y_ticks:
            at = self.y(tick)
            parts.append(_line("grid", left, at, right, at))
            parts.append(_text(left - 8, at + 4, _number(tick, digits), "end"))
        digits = _digits(self.x_ticks)
        for tick in self.x_ticks:
            parts.append(_text(self.x(tick), bottom + 17, _number(tick, digits), "middle"))
        parts.append(_line("axis", left, bottom, right, bottom))
        parts.append(_text((left + right) / 2, bottom + 34, x_label, "middle"))
        if y_label:
            parts.append(_vertical((top + bottom) / 2, y_label))
        return "".join(parts)

    def reference(
        self, name: str, value: float, lines: Sequence[tuple[int, Series, list[Point]]]
    ) -> str:
        """Draw a dashed line; its label stands at that end, above or below, where the fewest curves cross it."""
        left, _, right, _ = self.box
        at, text = self.y(value), f"{name} {value:.4g}"
        wide = _CHARACTER * len(text)
        places = [(x, y) for x in (right - 4 - wide, left + 4) for y in (at - 5, at + 14)]

        def crossed(place: tuple[float, float]) -> int:
            x, y = place
            return sum(
                y - 12 <= height <= y + 3
                for _, _, points in lines
                for height in self._heights(points, x, x + wide)
            )

        x, y = min(places, key=crossed)
        end = x > left + 4
        label = _text(x + wide if end else x, y, text, "end" if end else "start")
        return _line("ref", left, at, right, at) + label

    def _heights(self, points: Sequence[Point], start: float, end: float) -> list[float]:
        """Return the heights of a curve at positions from ``start`` to ``end``, four pixels apart."""
        if len(points) < 2:
            return [self.y(y) for x, y in points if start <= self.x(x) <= end]
        xs, ys = zip(*((self.x(x), self.y(y)) for x, y in points), strict=True)
        found, k, x = [], 0, max(start, xs[0])
        while x <= min(end, xs[-1]):
            while k < len(xs) - 2 and xs[k + 1] < x:
                k += 1
            step = xs[k + 1] - xs[k]
            share = (x - xs[k]) / step if step else 0.0
            found.append(ys[k] + share * (ys[k + 1] - ys[k]))
            x += 4.0
        return found

    def line(self, colour: int, one: Series, points: list[Point]) -> str:
        groups = thin(points, 400)
        parts = []
        if not one.dots and len(groups) < len(points):
            over = [f"{self.x(x):.1f},{self.y(high):.1f}" for x, _, _, high in groups]
            under = [f"{self.x(x):.1f},{self.y(low):.1f}" for x, _, low, _ in reversed(groups)]
            parts.append(f'<polygon class="band f{colour}" points="{" ".join(over + under)}"/>')
        for piece in _pieces(one, groups) if one.joined else ():
            path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y, _, _ in piece)
            parts.append(f'<polyline class="line s{colour}" points="{path}"/>')
        for x, low, high in one.whiskers:
            if all(map(math.isfinite, (x, low, high))) and (x > 0 or not self.log_x):
                at, bottom, top = self.x(x), self.y(low), self.y(high)
                stroke = f"M{at - 4:.1f} {top:.1f}h8m-4 0V{bottom:.1f}m-4 0h8"
                parts.append(f'<path class="line whisker s{colour}" d="{stroke}"/>')
        for x, y, _, _ in thin(points, 60):
            spot = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}"'
            if one.dots or len(groups) == 1:
                parts.append(f'<circle class="dot f{colour}" {spot} r="3.5"/>')
            words = escape(f"{one.label} {y:.4g} at {_plain(x)}".strip())
            parts.append(f'<circle class="hit" {spot} r="7"><title>{words}</title></circle>')
        return "".join(parts)


def _x_ticks(xs: Sequence[float], x0: float, x1: float, log_x: bool) -> list[float]:
    """Return round numbers; on a logarithmic axis the values themselves if there are few, else powers of ten."""
    if not log_x:
        ticks = [tick for tick in nice_ticks(x0, x1, 6) if x0 <= tick <= x1]
        whole = all(float(x).is_integer() for x in xs)
        return [tick for tick in ticks if not whole or tick.is_integer()]
    own = sorted(set(xs))
    powers = range(math.ceil(math.log10(x0) - 1e-9), math.floor(math.log10(x1) + 1e-9) + 1)
    return own if len(own) <= 8 or len(powers) < 2 else [10.0**power for power in powers]


def _pieces(
    one: Series, groups: list[tuple[float, float, float, float]]
) -> list[list[tuple[float, float, float, float]]]:
    """Split the line where a value is not finite, so that it shows a gap and not a connecting line."""
    holes = sorted(x for x, y in one.points if math.isfinite(x) and not math.isfinite(y))
    pieces: list[list[tuple[float, float, float, float]]] = [[]]
    at = 0
    for group in groups:
        crossed = False
        while at < len(holes) and holes[at] < group[0]:
            crossed, at = True, at + 1
        if crossed and pieces[-1]:
            pieces.append([])
        pieces[-1].append(group)
    return pieces


_CHARACTER, _GAP = 6.6, 32  # pixels of a character of the legend, and between two of its labels


def _legend_width(names: Sequence[tuple[int, str]]) -> float:
    return 16 + sum(_CHARACTER * len(label) + _GAP for _, label in names)


def _legend(names: Sequence[tuple[int, str]], width: int, y: int) -> str:
    parts, right = [], float(width - 16)
    for colour, label in reversed(names):
        right -= _CHARACTER * len(label)
        parts.append(f'<text x="{right:.1f}" y="{y}">{escape(label)}</text>')
        parts.append(
            f'<rect class="f{colour}" x="{right - 16:.1f}" y="{y - 5.5}" width="11" height="4" rx="2"/>'
        )
        right -= _GAP
    return "".join(parts)


def _digits(ticks: Sequence[float]) -> int:
    """Return the number of decimals that distinguishes neighbouring ticks."""
    steps = [b - a for a, b in itertools.pairwise(ticks) if b > a]
    if not steps:
        return 0 if all(float(tick).is_integer() for tick in ticks) else 2
    step = min(steps)
    quarter = abs(step / 10.0 ** math.floor(math.log10(step)) - 2.5) < 1e-6  # 2.5, 0.25, ...
    return max(0, min(9, math.ceil(-math.log10(step) - 1e-9) + quarter))


def _number(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    if digits > 5:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.{digits}f}"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"
