"""Templates of this package and the manner in which the reports write numbers.

render("report.md.j2", {"found": ...})
"""

from pathlib import Path

import jinja2

TEMPLATES = Path(__file__).parent / "templates"
SITES = {
    "qkv": "input of q, k, v",
    "o": "input of o",
    "gate_up": "input of gate, up",
    "down": "input of down",
}


def render(template: str, view: dict) -> str:
    """A template of this package with `view`; HTML is escaped, a missing name is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {filter.__name__: filter for filter in (number, size, amount, cell, *KINDS.values())}
    environment.filters |= {"names": SITES.get}
    return environment.get_template(template).render(view)


def cell(text: str) -> str:
    """Text for one cell of a Markdown table."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def number(value: float, kind: str) -> str:
    """A score as text, in the manner of its `Score.kind`."""
    return KINDS[kind](value)


def percent(value: float) -> str:
    """100 % is kept for exactly 1."""
    return "100 %" if value == 1 else f"{min(100 * value, 99.9):.1f} %"


def ratio(value: float) -> str:
    return f"{value:.3f}"


def small(value: float) -> str:
    return "0" if value == 0 else f"{value:.4f}" if value >= 0.001 else f"{value:.1e}"


def plain(value: float) -> str:
    return f"{value:.4f}" if value < 100 else f"{value:.4g}"


def decibel(value: float) -> str:
    return f"{value:.1f} dB"


def size(count: float) -> str:
    """Bytes in decimal units, as model hubs count them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} bytes"


def amount(count: float) -> str:
    """A count of parameters."""
    for unit, scale in (("B", 1e9), ("M", 1e6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:,.0f}"


KINDS = {"percent": percent, "ratio": ratio, "small": small, "plain": plain, "decibel": decibel}
