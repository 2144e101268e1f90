"""Output of a lesson: figures in one style with alt text and data, tables, numbers with units.

A figure is a picture with its description in the output's metadata, followed by the description in words and the data
as a folded table, because JupyterLab drops the `alt` of an image output. Lessons draw with matplotlib itself.
"""

import base64
import io
import math
import numbers
import sys
from collections.abc import Mapping, Sequence
from html import escape
from itertools import product
from typing import Any

from labkit.errors import InputError
from labkit.on_demand import names_on_demand

# Okabe and Ito (2008): colours told apart with the common forms of colour blindness; black is left to axes and text.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
SHORTEST_ALT = 30  # characters: a shorter text names the figure instead of describing the figure
WIDTH = 6.8  # inches of a figure as a rule, 653 px at its natural size
TYPE = 12.6  # points: 10 px where a figure of that width is shown 390 px wide, on a phone
PHONE_PX = 390  # width of a figure on a phone
SCREEN_PX_PER_INCH = 96
DPI = 160  # of the stored picture: sharp on a phone and on a screen of double density, at half the bytes of an SVG
_BADGE = "background:#8a4b00;color:#fff;border-radius:3px;padding:1px 5px;font-size:85%;letter-spacing:.04em"
BADGE = f'<b style="{_BADGE}">SIMULATED</b>'
COMPUTED = f'<b style="{_BADGE}">COMPUTED</b>'  # bounds: neither measured nor simulated

_PREFIXES = (
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
    (1.0, ""),
    (1e-3, "m"),
    (1e-6, "µ"),
)
_NANO = (1e-9, "n")
_SCALED = {"s", "B", "B/s", "FLOP", "FLOP/s", "FLOPs", "J", "W"}  # units that take a prefix
_PREFIXED = product((*_PREFIXES, _NANO), _SCALED)
_UNITS = {prefix + base: (scale, base) for (scale, prefix), base in _PREFIXED}
BARE = {"ratio", "fraction"}  # units that go without saying
_WHOLE = {"B", "FLOP", "FLOPs"}  # counted in whole numbers
_NOT_FINITE = {text: float(text) for text in ("nan", "inf", "-inf")}  # as a record spells them

Rows = Sequence[Mapping[str, Any]]

_PLOTS = {"lines": "labkit.plots"}
_WORDS = dict.fromkeys(
    ("apart", "change", "covers", "defined", "further_digits", "interval", "is_open", "span", "speed", "told"),
    "labkit.words",
)
__getattr__ = names_on_demand(__name__, _PLOTS | _WORDS)


# --- figures ----------------------------------------------------------------------------------------------------------


def style(points: float = TYPE) -> None:
    """Set matplotlib to the course's style, for this process.

    points: size of all text but titles. Ticks of logarithmic axes are plain numbers (30, not 3 x 10^1) below a million.
    """
    import matplotlib
    from cycler import cycler

    matplotlib.rcParams.update(
        {
            "figure.figsize": (WIDTH, 4.0),
            "figure.dpi": 80,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "font.size": points,
            "xtick.labelsize": points,
            "ytick.labelsize": points,
            "axes.labelsize": points,
            "legend.fontsize": points,
            "legend.title_fontsize": points,
            "axes.titlesize": points + 0.8,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.prop_cycle": cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.formatter.min_exponent": 6,
            "grid.color": "#d9d9d9",
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "legend.handlelength": 1.5,
            "lines.linewidth": 2.0,
            "lines.markersize": 6,
        }
    )


def figure(fig: Any, *, alt: str, table: Rows, caption: str = "", simulated: bool = False, instead: str = "") -> None:
    """Show a matplotlib figure with its description and its data, and close it.

    The picture is a PNG, `figsize` inches wide on the screen: JupyterLab shows no SVG of a notebook without trust. The
    picture's metadata holds the description, and the height of the smallest text on a phone.

    fig: a matplotlib Figure, whose axes all have labels.
    alt: description for readers who cannot see the figure, at least 30 characters.
    table: the figure's data, a dict per row.
    caption: title; empty takes the figure's own title.
    simulated: True if the data are computed, not measured; such a figure gets a badge.
    instead: text that takes the place of `alt` and `caption`, together with the names of the axes; the picture is then
        a draft for ordinary screens.
    Raises InputError, and shows nothing, without description or data, or if an axis has no label.
    """
    if not isinstance(alt, str) or len(alt.strip()) < SHORTEST_ALT:
        raise InputError(
            f"The figure has no alt text of {SHORTEST_ALT} characters or more; say in alt= what it shows: the axes, "
            "the shape of the curve, the point that matters."
        )
    rows = checked_rows(table)
    _check_labels(fig)
    import matplotlib.pyplot as plt

    if instead:
        alt, caption = f"{instead}. {_axes_in_words(fig)}", ""
    heading = caption or _title(fig)
    simulated_word = "SIMULATED: " if simulated else ""
    text = f"{simulated_word}{heading}\n{alt}"
    if in_notebook():  # a script has no screen for the picture: words and data only
        described = {
            "alt": alt,
            "width": round(SCREEN_PX_PER_INCH * fig.get_figwidth()),
            "type": round(_type_on_a_phone(fig), 1),
        }
        picture = base64.b64encode(png(fig, SCREEN_PX_PER_INCH if instead else DPI)).decode()
        emit(text, data={"image/png": picture}, metadata={"image/png": described})
    plt.close(fig)
    html = _folded_data(rows, alt, caption, simulated)
    emit(text if in_notebook() else f"{text}\n{text_table(rows)}", html)


def _title(fig: Any) -> str:
    first = fig.axes[0]
    return fig.get_suptitle() or first.get_title(loc="left") or first.get_title() or "Figure"


def _axes_in_words(fig: Any) -> str:
    axes = [f"{ax.get_ylabel() or 'unnamed'} against {ax.get_xlabel() or 'unnamed'}" for ax in fig.axes]
    return f"Drawn: {'; '.join(axes)}."


def _folded_data(rows: Rows, alt: str, caption: str, simulated: bool) -> str:
    badge = f"{BADGE} " if simulated else ""
    words = ""
    if caption or simulated:
        words = f'<p style="margin:2px 0">{badge}{escape(caption)}</p>'
    data = f"<p>{escape(alt)}</p>{html_table(rows)}"
    return f"{words}<details><summary>Description and data</summary>{data}</details>"


def png(fig: Any, dpi: int = DPI) -> bytes:
    """Return the figure as PNG with a palette: drawings have few colours, and a palette takes a third of the bytes."""
    from PIL import Image

    full, small = io.BytesIO(), io.BytesIO()
    fig.savefig(full, format="png", dpi=dpi, metadata={"Software": None})
    picture = Image.open(full).convert("RGB")
    with_palette = picture.quantize(32, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    with_palette.save(small, "png", optimize=True)
    return small.getvalue()


def _type_on_a_phone(fig: Any) -> float:
    """Return the height in pixels of the smallest text of a figure that is PHONE_PX wide."""
    from matplotlib.text import Text

    points = []
    for text in fig.findobj(Text):
        if text.get_visible() and text.get_text().strip():
            points.append(text.get_fontsize())
    inches = min(points) / 72
    return inches * PHONE_PX / fig.get_figwidth()


def _check_labels(fig: Any) -> None:
    if not fig.axes:
        raise InputError("The figure has no axes; draw something on it before showing it.")
    for number, ax in enumerate(fig.axes, start=1):
        missing = [name for name in ("x", "y") if not _is_labelled(fig, ax, name)]
        if ax.get_label() == "<colorbar>" and len(missing) < 2:
            continue  # a colour bar measures along one side only
        if missing:
            axis = missing[0]
            title = ax.get_title(loc="left") or ax.get_title()
            where = f"axes {number} ({title})" if title else f"axes {number}"
            raise InputError(
                f"The {axis} axis of {where} has no label; call ax.set_{axis}label(...) with the quantity and its unit."
            )


def _is_labelled(fig: Any, ax: Any, name: str) -> bool:
    """Return True if the axis `name` ("x" or "y") has a label of its own or the figure's, or needs no label.

    An axis that is hidden or has no tick labels (a shared axis, an image) needs no label.
    """
    axis = getattr(ax, f"{name}axis")
    if axis.get_label_text().strip():
        return True
    is_visible = ax.get_visible() and ax.axison and axis.get_visible()
    if not is_visible:
        return True
    sides = {"x": ("labelbottom", "labeltop"), "y": ("labelleft", "labelright")}[name]
    ticks = axis.get_tick_params()
    has_tick_labels = any(ticks.get(side) for side in sides)
    if not has_tick_labels or len(axis.get_ticklocs()) == 0:
        return True
    label_of_figure = getattr(fig, f"get_sup{name}label")()
    return bool(label_of_figure.strip())


# --- tables -----------------------------------------------------------------------------------------------------------


def table(rows: Rows, *, caption: str = "", simulated: bool = False) -> None:
    """Show rows as a table.

    rows: a dict per row.
    caption, simulated: as in `figure`.
    Raises InputError for anything but a list of dicts.
    """
    rows = checked_rows(rows)
    words = ["SIMULATED"] if simulated else []
    if caption:
        words.append(caption)
    text = text_table(rows)
    if words:
        text = f"{' '.join(words)}\n{text}"
    emit(text, html_table(rows, caption=caption, badge=BADGE if simulated else ""))


def wide(rows: Rows, x: str, y: str, *, by: Sequence[str]) -> list[dict[str, Any]]:
    """Reshape rows for reading: a row for each combination of the columns `by`, a column for each value of `x`.

    rows: a dict per row.
    x: column whose values become columns.
    y: column of the values to print.
    """
    table: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[column] for column in by)
        line = table.setdefault(key, dict(zip(by, key, strict=True)))
        line[f"{x} {row[x]}"] = row[y]
    return list(table.values())


def facts(title: str, values: Mapping[str, str]) -> None:
    """Show a small card: a title, then a line for each name and value."""
    width = max(map(len, values))
    text_lines = [title]
    html_rows = []
    to_the_left = "text-align:left"
    for name, value in values.items():
        text_lines.append(f"  {name:{width}}  {value}")
        head_style = f"{to_the_left};padding:1px 12px 1px 0;font-weight:normal"
        head = f'<th scope="row" align="left" style="{head_style}"><i>{escape(name)}</i></th>'
        html_rows.append(f'<tr>{head}<td align="left" style="{to_the_left};padding:1px 0">{escape(value)}</td></tr>')
    card = "border-left:4px solid #0072B2;padding:2px 0 2px 12px;margin:4px 0"
    body = f'<table style="margin:2px 0">{"".join(html_rows)}</table>'
    emit("\n".join(text_lines), f'<div style="{card}"><b>{escape(title)}</b>{body}</div>')


def html_table(rows: Rows, *, caption: str = "", badge: str = "") -> str:
    """Return rows as plain HTML, legible without styles (GitHub), in light and in dark; numbers are aligned right.

    caption: title.
    badge: BADGE, COMPUTED or nothing, before the caption.
    """
    columns = _columns(rows)
    aligns = [_alignment(rows, column) for column in columns]
    head = _cells("th", aligns, [str(column) for column in columns])
    body = ""
    for row in rows:
        texts = [quantity(row.get(column)) for column in columns]
        body += f"<tr>{_cells('td', aligns, texts)}</tr>"
    label = f"{badge} {escape(caption)}" if badge else escape(caption)
    title = f'<caption style="caption-side:top;text-align:left;font-weight:bold;padding:4px 10px">{label}</caption>'
    return (
        f'<table style="border-collapse:collapse;margin:4px 0">{title if label else ""}'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _alignment(rows: Rows, column: str) -> str:
    values = [row.get(column) for row in rows]
    are_numbers = all(value is None or number(value) is not None for value in values)
    return ' align="right"' if are_numbers else ' style="text-align:left"'


def _cells(tag: str, aligns: Sequence[str], texts: Sequence[str]) -> str:
    cells = ""
    for align, text in zip(aligns, texts, strict=True):
        cells += f"<{tag}{align}>{escape(text)}</{tag}>"
    return cells


def text_table(rows: Rows) -> str:
    """Return rows as aligned text, for terminals and text/plain."""
    columns = _columns(rows)
    table = [[str(column) for column in columns]]
    for row in rows:
        table.append([quantity(row.get(column)) for column in columns])
    widths = [max(map(len, texts)) for texts in zip(*table, strict=True)]
    padded_lines = []
    for texts in table:
        padded = [text.ljust(width) for text, width in zip(texts, widths, strict=True)]
        padded_lines.append("  ".join(padded).rstrip())
    return "\n".join(padded_lines)


def checked_rows(rows: Any) -> list[dict[str, Any]]:
    """Return `rows` as a list of dicts; raise InputError for an empty list and for anything else."""
    listed = list(rows) if isinstance(rows, list | tuple) else []
    are_dicts = all(isinstance(row, Mapping) and row for row in listed)
    if not listed or not are_dicts:
        raise InputError("The table has to be a non-empty list of dicts, one a row, like [{'batch': 1, 'ms': 2.5}].")
    return [dict(row) for row in listed]


def _columns(rows: Rows) -> list[str]:
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    return list(columns)


# --- numbers ----------------------------------------------------------------------------------------------------------


def quantity(value: Any, unit: str = "", more: int = 0) -> str:
    """Print a value for a reader: 0.00123 s -> '1.23 ms', 16e9 B -> '16 GB', 3 x -> '3.00x', 12345 -> '12,345'.

    value: a number. None becomes a dash, and any other value its own text.
    unit: "s", "B", "FLOP/s" and the like get a prefix; "x" is a ratio; "ratio" and "fraction" are not printed.
    more: digits to print beyond the usual.
    """
    if value is None:
        return "–"
    value = _NOT_FINITE.get(value, value) if isinstance(value, str) else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    unit = "" if unit in BARE else unit
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if unit in _SCALED:
        scale, prefix = _scale(value, unit)
        return f"{_digits(value / scale, more)} {prefix}{unit}"
    if unit in ("x", "×"):
        decimals = (2 if abs(value) < 100 else 0) + more
        return f"{value:,.{decimals}f}x"
    return f"{_digits(value, more)} {unit}".strip()


def estimate(value: float, ci95: Sequence[float], unit: str) -> tuple[str, str]:
    """Print an estimate and its 95 % interval without digits that the interval does not support.

    The two ends differ in print if they differ at all.

    value: above 0.
    ci95: (low, high); an infinite `high` stands for "no interval".
    unit: "s", which gets a prefix, or "x", a ratio.
    Returns the number with its unit, and the interval in the same unit: ('41.4 ms', '95% CI 41.2, 41.6').
    """
    scale, prefix = (1.0, "") if unit == "x" else _scale(value, unit, largest=1.0)
    scaled = value / scale
    low, high = (bound / scale for bound in ci95)
    decimals = supported_decimals(scaled, (high - low) / 2)
    while low < high and _rounded(low, decimals) == _rounded(high, decimals):
        decimals += 1
    suffix = "x" if unit == "x" else f" {prefix}{unit}"
    interval = "no interval"
    if math.isfinite(high):
        ends = f"{_rounded(low, decimals)}, {_rounded(high, decimals)}"
        if low == high:
            ends = f"{_rounded(low, decimals)} at both ends"
        interval = f"95% CI {ends}"
    return f"{_rounded(scaled, decimals)}{suffix}", interval


def counted(number: int, noun: str) -> str:
    """Print a number of things: '1 sample', '2 samples'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def factor(unit: str, target: str) -> float | None:
    """Return the factor from a unit to another (s -> ms: 1000); None for units of two kinds."""
    unit, target = _usual_spelling(unit), _usual_spelling(target)
    if unit == target or not unit or not target:
        return 1.0
    scale, base = _UNITS.get(unit, (1.0, unit))
    target_scale, target_base = _UNITS.get(target, (1.0, target))
    return scale / target_scale if base == target_base else None


def _usual_spelling(unit: str) -> str:
    return unit.replace("×", "x").replace("us", "µs")


def number(value: Any) -> float | int | None:
    """Return a number of Python, numpy or torch as a plain number; None for anything else, a bool included."""
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _scale(value: float, unit: str, largest: float = math.inf) -> tuple[float, str]:
    """Choose the SI prefix of a value: (scale, prefix), no scale above `largest`, none below 1 for whole numbers."""
    if value == 0:
        return 1.0, ""
    smallest = 1.0 if unit in _WHOLE else 0.0
    for scale, prefix in _PREFIXES:
        if smallest <= scale <= min(largest, abs(value)):
            return scale, prefix
    return (1.0, "") if unit in _WHOLE else _NANO


def _digits(value: float, more: int = 0) -> str:
    """Print whole numbers in full, others to three (and `more`) significant digits, powers of ten beyond reading."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    if not 1e-4 <= abs(value) < 1e15:
        return f"{value:.{2 + more}e}"
    decimals = max(0, 2 + more - _magnitude(value))
    return f"{value:,.{decimals}f}"


def supported_decimals(value: float, half_width: float) -> int:
    """Return the decimals to print: two to four significant digits, the last rounded by less than `half_width`."""
    two_digits = 1 - _magnitude(value)
    four_digits = two_digits + 2
    if not math.isfinite(half_width):
        return two_digits
    supported = math.ceil(-math.log10(2 * half_width)) if half_width > 0 else four_digits
    return min(max(two_digits, supported), four_digits)


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def _rounded(value: float, decimals: int) -> str:
    return f"{round(value, decimals):.{max(0, decimals)}f}"


# --- where the output goes --------------------------------------------------------------------------------------------


def emit(
    text: str,
    html: str | None = None,
    *,
    data: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Show an output in a notebook as HTML, anywhere else as printed text.

    text: text for terminals, and for readers of a notebook without HTML.
    data: further contents of the notebook's output, by MIME type.
    metadata: metadata of the notebook's output.
    """
    if not in_notebook():
        print(text)
        return
    from IPython.display import display

    bundle = dict(data or {})
    if html:
        bundle["text/html"] = html
    bundle["text/plain"] = text
    display(bundle, metadata=metadata, raw=True)


def in_notebook() -> bool:
    """Return True if outputs go to a Jupyter kernel; an IPython terminal shows text."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")
