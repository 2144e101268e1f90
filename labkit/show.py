"""What a lesson shows: figures in one style with alt text and their data, tables, numbers with units.

A figure is a picture with its description in the output's metadata, followed by the description in words and the data
as a folded table, because JupyterLab drops the `alt` of an image output. Deliberately no wrapper around matplotlib's
plots.
"""

import base64
import io
import math
import numbers
import sys
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from labkit.errors import InputError

# Okabe and Ito (2008): colours told apart with the common forms of colour blindness; black is left to axes and text.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
SHORTEST_ALT = 30  # characters: below that it names the figure, it does not describe it
WIDTH = 6.8  # inches of a figure as a rule, 653 px at its natural size
TYPE = 12.6  # points: 10 px where a figure of that width is shown 390 px wide, on a phone
DPI = 160  # of what is stored: sharp on a phone and on a screen of double density, at half the bytes of an SVG
BADGE = (
    '<b style="background:#8a4b00;color:#fff;border-radius:3px;padding:1px 5px;font-size:85%;letter-spacing:.04em">'
    "SIMULATED</b>"
)
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))
_SCALED = {"s", "B", "B/s", "FLOP", "FLOP/s", "FLOPs", "J", "W"}
_UNITS = {prefix + base: (scale, base) for base in _SCALED for scale, prefix in (*_PREFIXES, (1e-9, "n"))}
BARE = {"ratio", "fraction"}  # units that go without saying
_WHOLE = {"B", "FLOP", "FLOPs"}  # counted, never a fraction of one

Rows = Sequence[Mapping[str, Any]]


def style(points: float = TYPE) -> None:
    """Set matplotlib to the course's style, for this process; points: the size of all type but titles.

    Ticks of logarithmic axes are plain numbers (30, not 3 x 10^1) below a million.
    """
    import matplotlib
    from cycler import cycler

    matplotlib.rcParams.update({
        "figure.figsize": (WIDTH, 4.0), "figure.dpi": 80, "figure.constrained_layout.use": True,
        "figure.facecolor": "white", "font.size": points, "xtick.labelsize": points, "ytick.labelsize": points,
        "axes.labelsize": points, "legend.fontsize": points, "legend.title_fontsize": points,
        "axes.titlesize": points + 0.8, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.prop_cycle": cycler(color=COLOURS), "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "axes.axisbelow": True, "axes.formatter.min_exponent": 6, "grid.color": "#d9d9d9",
        "grid.linewidth": 0.6, "legend.frameon": False, "legend.handlelength": 1.5, "lines.linewidth": 2.0,
        "lines.markersize": 6,
    })  # fmt: skip


def figure(fig: Any, *, alt: str, table: Rows, caption: str = "", simulated: bool = False) -> None:
    """Show a matplotlib figure, its description and its data, and close it.

    The picture is a PNG, `figsize` inches wide on the screen: JupyterLab shows no SVG of a notebook that it does not
    trust yet. Beside its description its metadata holds the height of its smallest type on a phone.

    alt        tells who cannot see the figure what it shows, in at least 30 characters
    table      its data, one dict a row
    simulated  computed, not measured: it gets a badge
    InputError, and nothing shown, where either is missing or an axis has no label.
    """
    if not isinstance(alt, str) or len(alt.strip()) < SHORTEST_ALT:
        raise InputError(
            f"The figure has no alt text of {SHORTEST_ALT} characters or more; say in alt= what it shows: the axes, "
            "the shape of the curve, the point that matters."
        )
    rows = checked_rows(table)
    _check_labels(fig)
    import matplotlib.pyplot as plt

    heading = caption or fig.get_suptitle() or fig.axes[0].get_title(loc="left") or fig.axes[0].get_title() or "Figure"
    shown = f"{'SIMULATED: ' if simulated else ''}{heading}\n{alt}"
    if in_notebook():  # a script has no screen for the picture: words and data only
        described = {"alt": alt, "width": round(96 * fig.get_figwidth()), "type": round(_type_on_a_phone(fig), 1)}
        picture = base64.b64encode(png(fig)).decode()
        emit(shown, data={"image/png": picture}, metadata={"image/png": described})
    plt.close(fig)
    badge = f"{BADGE} " if simulated else ""
    words = f'<p style="margin:2px 0">{badge}{escape(caption)}</p>' if caption or simulated else ""
    folded = f"{words}<details><summary>Description and data</summary><p>{escape(alt)}</p>{html_table(rows)}</details>"
    emit(shown if in_notebook() else f"{shown}\n{text_table(rows)}", folded)


def lines(ax: Any, rows: Rows, x: str, y: str, *, by: str, baseline: str | None = None, **style: Any) -> None:
    """Draw column `y` against `x` into a matplotlib axis, one line for each value of `by`, with its legend's label.

    Where rows have the columns low and high they become error bars. baseline: the value of `by` that the others have to
    beat; its line is black and dashed. style: passed to matplotlib.
    """
    import matplotlib

    colours = len(matplotlib.rcParams["axes.prop_cycle"])
    for number, name in enumerate(dict.fromkeys(row[by] for row in rows)):
        group = [row for row in rows if row[by] == name]
        look = {"linestyle": ("-", "-.", ":")[number // colours % 3]}  # colours come round again
        if name == baseline:
            look = {"color": "black", "linestyle": "--"}
        if all("low" in row and "high" in row for row in group):
            look["yerr"] = [[row[y] - row["low"] for row in group], [row["high"] - row[y] for row in group]]
        look |= {"marker": "o", "markersize": 3, "capsize": 2, **style}
        ax.errorbar([row[x] for row in group], [row[y] for row in group], label=str(name), **look)


def curves(
    panels: Mapping[str, Rows],
    x: str,
    y: str,
    *,
    by: str,
    baseline: str | None = None,
    reference: float | None = None,
    height: float = 3.4,
    **axes: Any,
) -> Any:
    """A figure with one panel for each title in `panels`, two side by side, each drawn by `lines`, and one key below.

    reference: where a dotted line across every panel stands, such as the limit or the unchanged model. height: inches
    of a panel. axes: for matplotlib's Axes.set, such as ylabel, yscale, ylim; the axes are named after the columns
    unless it says otherwise.
    """
    import matplotlib.pyplot as plt

    across = min(len(panels), 2)
    down = math.ceil(len(panels) / across)
    fig, grid = plt.subplots(down, across, figsize=(WIDTH, height * down), sharey=True, squeeze=False)
    for ax in grid.flat[len(panels) :]:
        ax.remove()
    for number, (title, rows) in enumerate(panels.items()):
        ax = grid.flat[number]
        lines(ax, rows, x, y, by=by, baseline=baseline)
        if reference is not None:
            ax.axhline(reference, linestyle=":", linewidth=1.2, color="grey")
        ax.set(**{"xlabel": x, "ylabel": y, "title": title, **axes})
        if number % across:
            ax.set_ylabel("")
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > 1:
        columns = max(1, int(WIDTH / (0.7 + 0.1 * max(map(len, labels)))))
        fig.set_figheight(height * down + 0.25 * (1 + math.ceil(len(labels) / columns)))
        fig.legend(handles, labels, loc="outside lower left", ncols=columns, title=by, alignment="left")
    return fig


def wide(rows: Rows, x: str, y: str, *, by: Sequence[str]) -> list[dict[str, Any]]:
    """Rows for a table that a reader can take in: one for each combination of `by`, a column for each value of `x`."""
    table: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        line = table.setdefault(tuple(row[column] for column in by), {column: row[column] for column in by})
        line[f"{x} {row[x]}"] = row[y]
    return list(table.values())


def table(rows: Rows, *, caption: str = "", simulated: bool = False) -> None:
    """Show rows (one dict a row) as a table; InputError for anything else."""
    rows = checked_rows(rows)
    title = " ".join(filter(None, ["SIMULATED" * simulated, caption]))
    text = "\n".join(filter(None, [title, text_table(rows)]))
    emit(text, html_table(rows, caption=caption, simulated=simulated))


def quantity(value: Any, unit: str = "") -> str:
    """A value as a reader wants it: 0.00123 s -> '1.23 ms', 16e9 B -> '16 GB', 3 x -> '3.00x', 12345 -> '12,345'."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    unit = "" if unit in BARE else unit
    if not math.isfinite(value):
        return f"{value} {unit}".strip()
    if unit in _SCALED:
        smallest = 1.0 if unit in _WHOLE else 0.0
        scale, prefix = next(
            (pair for pair in _PREFIXES if abs(value) >= pair[0] >= smallest), (1.0, "") if smallest else (1e-9, "n")
        )
        if value == 0:
            scale, prefix = 1.0, ""
        return f"{_digits(value / scale)} {prefix}{unit}"
    if unit in ("x", "×"):
        return f"{value:.2f}x" if abs(value) < 100 else f"{value:,.0f}x"
    if unit == "%":
        return f"{_digits(value)} %"
    return f"{_digits(value)} {unit}".strip()


def interval(ci95: Sequence[float] | None, unit: str = "") -> str:
    """A 95 % interval as '1.10 ms to 1.30 ms', or '' where there is none."""
    return "" if ci95 is None else f"{quantity(ci95[0], unit)} to {quantity(ci95[1], unit)}"


def factor(unit: str, target: str) -> float | None:
    """What a value in `unit` is multiplied by to be in `target` (s -> ms: 1000); None where they do not compare."""
    unit, target = (name.replace("×", "x").replace("us", "µs") for name in (unit, target))
    if unit == target or not unit or not target:
        return 1.0
    (scale, base), (target_scale, target_base) = (_UNITS.get(name, (1.0, name)) for name in (unit, target))
    return scale / target_scale if base == target_base else None


def facts(title: str, values: Mapping[str, str]) -> None:
    """Show a small card: a title, and a line for each name and value."""
    width = max(map(len, values))
    text = "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in values.items())])
    lines = "".join(
        f'<tr><th scope="row" align="left" style="text-align:left;padding:1px 12px 1px 0;font-weight:normal">'
        f'<i>{escape(name)}</i></th><td align="left" style="text-align:left;padding:1px 0">{escape(value)}</td></tr>'
        for name, value in values.items()
    )
    card = "border-left:4px solid #0072B2;padding:2px 0 2px 12px;margin:4px 0"
    emit(text, f'<div style="{card}"><b>{escape(title)}</b><table style="margin:2px 0">{lines}</table></div>')


def html_table(rows: Rows, *, caption: str = "", simulated: bool = False) -> str:
    """Rows as plain HTML: legible where styles are stripped (GitHub), in light and in dark."""
    columns = _columns(rows)
    right = {c for c in columns if all(row.get(c) is None or number(row[c]) is not None for row in rows)}

    def cells(tag: str, texts: Sequence[str]) -> str:
        aligns = (' align="right"' if column in right else ' style="text-align:left"' for column in columns)
        return "".join(f"<{tag}{align}>{escape(text)}</{tag}>" for align, text in zip(aligns, texts, strict=True))

    body = "".join(f"<tr>{cells('td', [quantity(row.get(c)) for c in columns])}</tr>" for row in rows)
    label = f"{BADGE} " * simulated + escape(caption)
    title = f'<caption style="caption-side:top;text-align:left;font-weight:bold;padding:4px 10px">{label}</caption>'
    return (
        f'<table style="border-collapse:collapse;margin:4px 0">{title if label else ""}'
        f"<thead><tr>{cells('th', [str(c) for c in columns])}</tr></thead><tbody>{body}</tbody></table>"
    )


def text_table(rows: Rows) -> str:
    """Rows as aligned text, for terminals and text/plain."""
    columns = _columns(rows)
    lines = [[str(column) for column in columns], *([quantity(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, parts)) for parts in zip(*lines, strict=True)]
    padded = (zip(line, widths, strict=True) for line in lines)
    return "\n".join("  ".join(part.ljust(width) for part, width in line).rstrip() for line in padded)


def png(fig: Any) -> bytes:
    """The figure as PNG with a palette: a third of the bytes, as drawings have few colours."""
    from PIL import Image

    full, small = io.BytesIO(), io.BytesIO()
    fig.savefig(full, format="png", dpi=DPI, metadata={"Software": None})
    picture = Image.open(full).convert("RGB")
    picture.quantize(32, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


def emit(
    text: str,
    html: str | None = None,
    *,
    data: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Show in a notebook as HTML (and whatever MIME types `data` adds), anywhere else as printed text."""
    if not in_notebook():
        print(text)
        return
    from IPython.display import display

    bundle = {**(data or {}), **({"text/html": html} if html else {}), "text/plain": text}
    display(bundle, metadata=metadata, raw=True)


def in_notebook() -> bool:
    """Whether outputs go to a Jupyter kernel (an IPython terminal shows text)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def checked_rows(rows: Any) -> list[dict[str, Any]]:
    """`rows` as a list of dicts; InputError where it is empty or anything else."""
    listed = list(rows) if isinstance(rows, list | tuple) else []
    if not listed or not all(isinstance(row, Mapping) and row for row in listed):
        raise InputError("The table has to be a non-empty list of dicts, one a row, like [{'batch': 1, 'ms': 2.5}].")
    return [dict(row) for row in listed]


def _type_on_a_phone(fig: Any) -> float:
    """The pixels of the smallest letters where the figure is shown 390 px wide."""
    from matplotlib.text import Text

    points = [text.get_fontsize() for text in fig.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return min(points) / 72 * 390 / fig.get_figwidth()


def _check_labels(fig: Any) -> None:
    if not fig.axes:
        raise InputError("The figure has no axes; draw something on it before showing it.")
    for number, ax in enumerate(fig.axes, start=1):
        missing = [name for name in ("x", "y") if not _is_labelled(fig, ax, name)]
        if ax.get_label() == "<colorbar>" and len(missing) < 2:
            continue  # a colour bar measures along one side only
        if missing:
            title = ax.get_title(loc="left") or ax.get_title()
            where = f"axes {number}" + (f" ({title})" if title else "")
            raise InputError(
                f"The {missing[0]} axis of {where} has no label; call ax.set_{missing[0]}label(...) with the quantity "
                "and its unit."
            )


def _is_labelled(fig: Any, ax: Any, name: str) -> bool:
    """Labelled itself or by the figure, or nothing to label: hidden, or without tick labels (shared, an image)."""
    axis = getattr(ax, f"{name}axis")
    if axis.get_label_text().strip() or not (ax.get_visible() and ax.axison and axis.get_visible()):
        return True
    shown = {"x": ("labelbottom", "labeltop"), "y": ("labelleft", "labelright")}[name]
    without_ticks = not any(axis.get_tick_params().get(side) for side in shown) or len(axis.get_ticklocs()) == 0
    return without_ticks or bool(getattr(fig, f"get_sup{name}label")().strip())


def _columns(rows: Rows) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def number(value: Any) -> float | int | None:
    """A number of Python, numpy or torch as a plain one; None for anything else, a bool included."""
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _digits(value: float) -> str:
    """Whole numbers in full, others to three significant digits, powers of ten only beyond reading."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    if not 1e-4 <= abs(value) < 1e15:
        return f"{value:.2e}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"
