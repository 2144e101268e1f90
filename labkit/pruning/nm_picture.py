"""How hardware multiplies a 2:4 row, drawn: the values that are stored, their two-bit places, the inputs these select.

For lesson 05. It draws what `nm.compress` returns, so that the picture cannot differ from the format.
"""

from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from labkit.pruning.nm import compress, mask
from labkit.show import COLOURS

WEIGHTS, VALUES, PLACES, INPUTS = 4.5, 2.9, 2.15, 0.5  # heights of the four rows of boxes


def selection(weight: Tensor, inputs: Tensor) -> tuple[Figure, list[dict[str, Any]]]:
    """The figure of one row `weight` [in] pruned to 2:4 beside `inputs` [in], and its data, one row a stored value."""
    import matplotlib.pyplot as plt

    kept = mask(weight)
    packed = compress(weight * kept)
    places = [byte >> shift & 3 for byte in packed.metadata.tolist() for shift in (0, 2, 4, 6)]
    fig, ax = plt.subplots(figsize=(8.2, 3.6))
    for i, (w, stays) in enumerate(zip(weight.tolist(), kept.tolist(), strict=True)):
        _box(ax, i, WEIGHTS, f"{w:g}", COLOURS[i // 4] if stays else None)
    rows, selected = [], set()
    for k, value in enumerate(packed.values.flatten().tolist()):
        place = places[k]
        group, x = k // 2, k // 2 * 4 + k % 2 + 1  # a group's two values stand in the middle of its four columns
        read = 4 * group + place
        selected.add(read)
        _box(ax, x, VALUES, f"{value:g}", COLOURS[group])
        _box(ax, x, PLACES, f"{place:02b}", COLOURS[group])
        ax.annotate(
            "", (read, INPUTS + 0.4), (x, PLACES - 0.4), arrowprops={"arrowstyle": "-|>", "color": COLOURS[group]}
        )
        row = {"group": group, "value": value, "place": place, "bits": f"{place:02b}"}
        rows.append({**row, "reads": f"x{read}", "product": value * float(inputs[read])})
    for i, value in enumerate(inputs.tolist()):
        _box(ax, i, INPUTS, f"{value:g}", COLOURS[i // 4] if i in selected else None)
    for y, words in (
        (WEIGHTS, "weights,\nas trained"), (VALUES, "values"), (PLACES, "places,\n2 bits each"), (INPUTS, "inputs x"),
    ):  # fmt: skip
        ax.text(-1.0, y, words, ha="right", va="center")
    for start in range(0, len(weight), 4):
        ax.text(start + 1.5, WEIGHTS + 0.62, f"group {start // 4}", ha="center", color="dimgrey", fontsize=9)
    ax.set(xlim=(-2.6, len(weight) - 0.4), ylim=(0.0, WEIGHTS + 0.9))
    ax.set_axis_off()
    return fig, rows


def _box(ax: Any, x: float, y: float, text: str, colour: str | None) -> None:
    """One number in a box; white and grey where it takes no part."""
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((x - 0.4, y - 0.3), 0.8, 0.6, facecolor="white", edgecolor="grey"))
    if colour:
        ax.add_patch(Rectangle((x - 0.4, y - 0.3), 0.8, 0.6, facecolor=colour, alpha=0.4, linewidth=0))
    ax.text(x, y, text, ha="center", va="center", color="black" if colour else "grey")
