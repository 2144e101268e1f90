"""The picture of a 2:4 row says what the format stores: its products sum to the pruned row's."""

import matplotlib.pyplot as plt
import pytest
import torch

from labkit.pruning import nm, nm_picture


@pytest.mark.parametrize("width", [4, 8, 12])
def test_the_selected_products_are_those_of_the_pruned_row(width: int):
    generator = torch.Generator().manual_seed(width)
    weight, inputs = (torch.randint(-9, 10, (width,), generator=generator).float() for _ in range(2))
    fig, rows = nm_picture.selection(weight, inputs)
    plt.close(fig)
    assert len(rows) == width // 2
    assert sum(row["product"] for row in rows) == float((weight * nm.mask(weight)) @ inputs)
    assert [row["reads"] for row in rows] == [f"x{4 * row['group'] + int(row['bits'], 2)}" for row in rows]
