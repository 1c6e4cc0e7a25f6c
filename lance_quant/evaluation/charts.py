"""Small SVG charts for the report: strings that take their colours from the page's CSS, light or dark.

line_chart([Line(x=[1, 0.5, 0], y=[0.1, 0.2, 0.3], name="mean")], "timestep", "error")
"""

import math
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

TINY = 1e-300  # a loss of 0 has no logarithm


@dataclass(frozen=True, kw_only=True)
class Line:
    """One polyline; `style` is a CSS class of the page (und, gen, mean, sample, ...), `mark` the index of a dot.

    stroke: "solid" | "dashed" | "level", the last a horizontal line at the only y, with its dot at x.
    """

    x: list[float]
    y: list[float]
    name: str = ""
    style: str = "mean"
    stroke: str = "solid"
    mark: int | None = None


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Pixel box of a plot and its data ranges; `flip` runs x from right to left."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    flip: bool = False

    def place(self, x: float, y: float) -> tuple[float, float]:
        u = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        v = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return self.left + self.width * (1 - u if self.flip else u), self.top + self.height * (1 - v)


def line_chart(lines: list[Line], x_title: str, y_title: str, flip: bool = False) -> Markup:
    """Lines over common axes, y from 0, with a dot at each point of lines of at most 40 points; "" without any."""
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True)]
    if not points:
        return Markup("")
    ticks = nice_ticks(0.0, max(y for _, y in points))
    xs = [x for x, _ in points]
    frame = Frame(left=52, top=14, width=376, height=178, x=(min(xs), max(xs)), y=(0.0, ticks[-1]), flip=flip)
    body = []
    for tick in ticks:
        _, y = frame.place(frame.x[0], tick)
        body.append(f'<line class="grid" x1="{frame.left}" x2="{frame.left + frame.width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text x="{frame.left - 7:g}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    x_ticks = [x for x in nice_ticks(*frame.x) if frame.x[0] - 1e-9 <= x <= frame.x[1] + 1e-9]
    for tick in x_ticks:
        x, _ = frame.place(tick, 0)
        body.append(f'<text x="{x:.1f}" y="{frame.top + frame.height + 17:g}" text-anchor="middle">{tick:.6g}</text>')
    body += [polyline(line, frame, dots=len(line.x) <= 40 and line.style != "sample") for line in lines]
    middle, bottom = frame.left + frame.width / 2, frame.top + frame.height
    body.append(f'<text class="title" x="{middle:g}" y="{bottom + 36:g}" text-anchor="middle">{escape(x_title)}</text>')
    label = escape(f"{y_title} by {x_title}")
    return Markup(f'<svg class="chart" viewBox="0 0 440 232" role="img" aria-label="{label}">{"".join(body)}</svg>')


def loss_panel(title: str, lines: list[Line]) -> Markup:
    """One small multiple: loss over alpha on a log scale, relative to the lowest loss of its style; dots = chosen."""
    lowest = {line.style: min(min(other.y) for other in lines if other.style == line.style) for line in lines}
    logs = [[math.log10(max(y, TINY) / max(lowest[line.style], TINY)) for y in line.y] for line in lines]
    top = max([0.02, *(value for values in logs for value in values)])
    xs = [x for line in lines for x in line.x]
    frame = Frame(left=6, top=24, width=148, height=66, x=(min(xs), max(xs)), y=(0.0, top))
    body = [f'<text class="title" x="6" y="13">{escape(title)}</text>']
    body.append(f'<text x="154" y="13" text-anchor="end">{_times(10**top)}</text>')
    for share in (0, 1):
        y = frame.top + frame.height * share
        body.append(f'<line class="grid" x1="6" x2="154" y1="{y:g}" y2="{y:g}"/>')
    for line, values in zip(lines, logs, strict=True):
        body.append(polyline(replace(line, y=values), frame))
    body.append(f'<text x="6" y="107">{frame.x[0]:g}</text>')
    marked = [line for line in lines if line.mark is not None]
    chosen = ", ".join("none" if line.stroke == "level" else f"{line.x[line.mark]:g}" for line in marked)
    body.append(f'<text x="80" y="107" text-anchor="middle">{"α " + chosen if chosen else ""}</text>')
    body.append(f'<text x="154" y="107" text-anchor="end">{frame.x[1]:g}</text>')
    label = escape(f"{title}: loss over alpha, chosen {chosen}")
    return Markup(f'<svg class="panel" viewBox="0 0 160 113" role="img" aria-label="{label}">{"".join(body)}</svg>')


def polyline(line: Line, frame: Frame, dots: bool = False) -> str:
    places = [frame.place(x, y) for x, y in zip(line.x, line.y, strict=True)]
    ends = [(frame.left, places[0][1]), (frame.left + frame.width, places[0][1])]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (ends if line.stroke == "level" else places))
    marks = places if dots else [places[line.mark]] if line.mark is not None else []
    circles = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3 if not dots else 2.4:g}"/>' for x, y in marks)
    return f'<g class="line {line.style} {line.stroke}"><polyline points="{path}"/>{circles}</g>'


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that enclose low..high."""
    if high <= low:
        high = low + 1.0
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _times(value: float) -> str:
    return f"× {value:.3g}" if value < 1000 else f"× {value:.0e}"
