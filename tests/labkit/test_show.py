"""What a lesson shows: no figure without words and data, tables and numbers that read well with and without styles."""

import base64
import html
import io
import math
import re
from collections.abc import Iterator
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import pytest
from PIL import Image
from refusals import check_refusal

from labkit import show

ALT = "Latency against batch from 1 to 4: it rises with the square root."
ROWS = [{"batch": 1, "latency": 1.0}, {"batch": 4, "latency": 2.0}]


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with matplotlib.rc_context():
        show.style()
        yield
    plt.close("all")


@pytest.fixture
def figure():
    fig, ax = plt.subplots()
    ax.plot([1, 4], [1, 2])
    ax.set(xlabel="batch", ylabel="latency (ms)")
    return fig


@pytest.fixture
def notebook(monkeypatch) -> list[tuple[dict, dict]]:
    """The outputs (data, metadata) that a notebook would get."""
    outputs: list[tuple[dict, dict]] = []
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel="some kernel"))
    monkeypatch.setattr(
        "IPython.display.display", lambda data, metadata=None, raw=False: outputs.append((data, metadata))
    )
    return outputs


def size_of(png: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(png))).size


def cells(text: str) -> list[str]:
    """The words of each th and td."""
    return [html.unescape(words) for words in re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", text)]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.00123, "s", "1.23 ms"),
        (3e-9, "s", "3 ns"),
        (0.0, "s", "0 s"),
        (16e9, "B", "16 GB"),
        (0.5, "B", "0.500 B"),
        (989.4e12, "FLOP/s", "989 TFLOP/s"),
        (3, "x", "3.00x"),
        (250.4, "x", "250x"),
        (12345, "", "12,345"),
        (0.04217, "", "0.0422"),
        (1.5e-7, "", "1.50e-07"),
        (0.4, "fraction", "0.400"),
        (93.21, "%", "93.2 %"),
        (None, "s", "–"),
        (float("inf"), "s", "∞"),
        ("-inf", "x", "-∞"),  # as a record spells an infinite number
        (float("nan"), "ms", "undefined"),
        (True, "", "True"),
    ],
)
def test_quantity_reads_as_a_person_writes_it(value, unit, text):
    assert show.quantity(value, unit) == text


@pytest.mark.parametrize(
    ("value", "ci95", "unit", "texts"),
    [
        (0.0413, (0.04126, 0.04134), "s", ("41.30 ms", "95% CI 41.26, 41.34")),  # four digits at most
        (0.042, (0.038, 0.046), "s", ("42 ms", "95% CI 38, 46")),  # two at least
        (1.234e-6, (0.0, float("inf")), "s", ("1.2 µs", "no interval")),
        (1234.5, (1234.4, 1234.6), "s", ("1234 s", "95% CI 1234, 1235")),
        (1.75, (1.6, 2.0), "x", ("1.8x", "95% CI 1.6, 2.0")),
        (2.0, (2.0, 2.0), "x", ("2.000x", "95% CI 2.000 at both ends")),
        (1.05, (1.04999, 1.05001), "x", ("1.05000x", "95% CI 1.04999, 1.05001")),  # ends that differ differ in print
    ],
)
def test_an_estimate_has_no_digit_that_its_interval_does_not_support(value, ci95, unit, texts):
    assert show.estimate(value, ci95, unit) == texts


@pytest.mark.parametrize(
    ("unit", "wanted", "factor"),
    [
        ("s", "ms", 1000),
        ("B", "GB", 1e-9),
        ("GFLOP/s", "TFLOP/s", 1e-3),
        ("x", "×", 1),
        ("tokens/s", "tokens/s", 1),
        ("s", "B", None),
        ("tokens/s", "s", None),
    ],
)
def test_factor_converts_between_units_of_one_kind(unit, wanted, factor):
    assert show.factor(unit, wanted) == (factor if factor is None else pytest.approx(factor))


@pytest.mark.parametrize("alt", ["A plot", None, " " * 60])
def test_a_figure_without_alt_text_is_refused(figure, alt):
    check_refusal("no alt text of 30 characters or more", lambda: show.figure(figure, alt=alt, table=ROWS))
    assert plt.fignum_exists(figure.number)


@pytest.mark.parametrize("table", [[], [1, 2], [{}], {"batch": 1}])
def test_a_figure_without_its_data_is_refused(figure, table):
    check_refusal("non-empty list of dicts", lambda: show.figure(figure, alt=ALT, table=table))
    assert plt.fignum_exists(figure.number)


def test_an_axis_without_a_label_is_named():
    fig, (left, right) = plt.subplots(1, 2)
    left.set(xlabel="batch", ylabel="latency (ms)")
    right.set(xlabel="batch")
    right.set_title("prefill")
    words = "The y axis of axes 2 (prefill) has no label; call ax.set_ylabel"
    check_refusal(words, lambda: show.figure(fig, alt=ALT, table=ROWS))


def test_axes_that_have_nothing_to_label_pass(capsys):
    fig, axes = plt.subplots(2, 2, sharex=True, sharey=True)
    for ax in axes[1]:
        ax.set_xlabel("batch")
    fig.supylabel("latency (ms)")
    show.figure(fig, alt=ALT, table=ROWS)

    fig, (picture, plot) = plt.subplots(1, 2)
    image = picture.imshow([[1, 2], [3, 4]])
    picture.axis("off")
    fig.colorbar(image, ax=picture, label="weight")
    plot.set(xlabel="batch", ylabel="latency (ms)")
    plot.twinx().set_ylabel("throughput (requests/s)")
    show.figure(fig, alt=ALT, table=ROWS)
    assert capsys.readouterr().out.count(ALT) == 2


def test_a_figure_carries_its_description_and_data(figure, notebook):
    show.figure(figure, alt=ALT, table=ROWS, caption="Latency <ms>", simulated=True)
    assert not plt.fignum_exists(figure.number)
    (picture, metadata), (folded, _) = notebook
    assert metadata == {"image/png": {"alt": ALT, "width": 653, "type": 10.0}}
    assert size_of(picture["image/png"]) == (1088, 640)
    assert ALT in picture["text/plain"] and "SIMULATED" in picture["text/plain"]
    assert all(part in folded["text/html"] for part in ("<details>", ALT, "Latency &lt;ms&gt;", "SIMULATED"))
    assert cells(folded["text/html"]) == ["batch", "latency", "1", "1", "4", "2"]


def test_the_same_figure_gives_the_same_bytes(notebook):
    for _ in range(2):
        fig, ax = plt.subplots()
        ax.imshow([[1, 2], [3, 4]], clip_on=True)
        ax.fill_between([0, 1], [0.3, 1], hatch="/")
        ax.set(xlabel="batch", ylabel="latency (ms)")
        show.figure(fig, alt=ALT, table=ROWS)
    assert notebook[0][0] == notebook[2][0]


def test_type_is_ten_pixels_high_on_a_phone_unless_it_is_set_smaller(notebook):
    for size in (None, 9):
        fig, ax = plt.subplots(figsize=(show.WIDTH, 3.4))
        ax.plot([1, 2], [3, 4])
        ax.set(xlabel="batch", ylabel="latency (ms)", yscale="log", ylim=(1, 40))
        ax.set_title("small", fontsize=size)
        show.figure(fig, alt=ALT, table=ROWS)
    sizes = [metadata["image/png"]["type"] for _, metadata in notebook[::2]]
    assert sizes == [10.0, pytest.approx(9 / 72 * 390 / 6.8, abs=0.1)]


@pytest.mark.parametrize(("limits", "ticks"), [((20, 400), "30 100 300"), ((2e-3, 2e5), "0.01 100 10000")])
def test_ticks_of_a_logarithmic_axis_are_plain_numbers(limits, ticks):
    ax = plt.subplots()[1]
    ax.set(yscale="log", ylim=limits)
    words = [tick.get_text() for tick in [*ax.get_yticklabels(), *ax.get_yticklabels(minor=True)]]
    assert set(ticks.split()) <= set(re.findall(r"mathdefault\{(.*?)\}", " ".join(words)))


def test_outside_a_notebook_a_figure_is_words_and_data(figure, capsys):
    show.figure(figure, alt=ALT, table=ROWS, caption="Latency")
    assert capsys.readouterr().out == f"Latency\n{ALT}\nbatch  latency\n1      1\n4      2\n"


def test_a_table_puts_numbers_right_and_says_what_is_missing(notebook):
    rows = [{"name": "a<b", "time": 1.5}, {"name": "c", "time": None, "bytes": 12345}]
    show.table(rows, caption="Sizes", simulated=True)
    text = notebook[0][0]["text/html"]
    assert cells(text) == ["name", "time", "bytes", "a<b", "1.50", "–", "c", "–", "12,345"]
    assert '<td align="right"' in text and "SIMULATED" in text and "<caption" in text
    assert notebook[0][0]["text/plain"].startswith("SIMULATED Sizes\nname  time  bytes")


@pytest.mark.slow
def test_a_notebook_shows_the_picture_with_its_alt_text_once():
    """Executed by a real kernel: one picture with alt metadata, one folded table, no second copy at the cell's end."""
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    code = f"""
import matplotlib.pyplot as plt
from labkit import show
show.style()
fig, ax = plt.subplots()
ax.set(xlabel="batch", ylabel="latency (ms)")
show.figure(fig, alt={ALT!r}, table={ROWS!r})"""
    notebook = NotebookClient(new_notebook(cells=[new_code_cell(code)]), kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    assert [sorted(one.data) for one in outputs] == [["image/png", "text/plain"], ["text/html", "text/plain"]]
    assert outputs[0].metadata["image/png"]["alt"] == ALT


def test_lines_draws_one_for_each_group_with_its_bars():
    rows = [
        {"sparsity": x, "accuracy": y, "low": y - 1, "high": y + 2, "criterion": name}
        for name in ("magnitude", "random")
        for x, y in ((0.5, 90.0), (0.9, 70.0))
    ]
    ax = plt.subplots()[1]
    show.lines(ax, rows, "sparsity", "accuracy", by="criterion")
    first, second = ax.containers
    assert [first.get_label(), second.get_label()] == ["magnitude", "random"]
    assert first[0].get_xydata().tolist() == [[0.5, 90.0], [0.9, 70.0]]
    bars = first[2][0].get_segments()
    assert [segment[:, 1].tolist() for segment in bars] == [[89.0, 92.0], [69.0, 72.0]]
    assert first[0].get_linestyle() == second[0].get_linestyle() == "-"


@pytest.mark.parametrize("ends", [(0.0, math.inf), (-math.inf, math.inf)])
def test_lines_draws_no_bar_for_an_interval_that_excludes_nothing(ends: tuple[float, float]):
    low, high = ends
    rows = [
        {"tokens": 1, "ratio": 1.3, "low": low, "high": high, "method": "wanda"},
        {"tokens": 2, "ratio": 1.2, "low": 1.1, "high": 1.4, "method": "wanda"},
    ]
    ax = plt.subplots()[1]
    show.lines(ax, rows, "tokens", "ratio", by="method")
    without, with_bar = ax.containers[0][2][0].get_segments()
    assert len(without) == 0
    assert with_bar[:, 1].tolist() == pytest.approx([1.1, 1.4])
    assert ax.get_ylim()[0] > 1


def test_wide_has_a_row_for_each_combination_and_a_column_for_each_x():
    rows = [{"sparsity": s, "kernel": k, "batch": 1, "speed-up": s * len(k)} for k in ("csr", "kernel") for s in (1, 2)]
    assert show.wide(rows, "sparsity", "speed-up", by=("kernel", "batch")) == [
        {"kernel": "csr", "batch": 1, "sparsity 1": 3, "sparsity 2": 6},
        {"kernel": "kernel", "batch": 1, "sparsity 1": 6, "sparsity 2": 12},
    ]
