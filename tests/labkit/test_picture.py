"""The drawn residual block says what the trace found."""

import matplotlib
import pytest
import torch

from labkit import models, show
from labkit.errors import InputError
from labkit.pruning import coupling, picture

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def groups():
    return coupling.trace(models.resnet20(pretrained=False), torch.zeros(1, 1, 28, 28))


def block(stage: int, number: int) -> list[str]:
    return [f"stage{stage}.{number}.{name}" for name in ("conv1", "bn1", "conv2", "bn2")]


def test_summands_and_reader_share_a_group(groups):
    shortcut = ["stage2.0.shortcut.0", "stage2.0.shortcut.1"]
    fig, rows = picture.residual(groups, "stage1.2.bn2", block(2, 0), shortcut, "stage2.1.conv1")
    at = {row["module"]: row for row in rows}
    assert at["stage2.0.bn2"]["rows in group"] == at["stage2.0.shortcut.1"]["rows in group"]
    assert at["stage2.1.conv1"]["columns in group"] == at["stage2.0.bn2"]["rows in group"]
    assert at["stage2.0.conv1"]["columns in group"] == at["stage1.2.bn2"]["rows in group"]
    assert at["stage2.0.conv1"]["rows in group"] != at["stage2.0.conv2"]["rows in group"]
    show.figure(fig, alt="the block, drawn with its couplings", table=rows)


def test_an_identity_shortcut_is_one_arrow(groups):
    with_shortcut, _ = picture.residual(groups, "bn", block(1, 0), ["stage1.1.bn2"], "stage1.1.conv1")
    without, _ = picture.residual(groups, "bn", block(1, 0), [], "stage1.1.conv1")
    arrows = [len(fig.axes[0].texts) - len(fig.axes[0].patches) // 2 for fig in (without, with_shortcut)]
    assert arrows == [1 + 3 + 2 + 1 + 1, 2 + 3 + 2 + 1 + 1]  # in, along, into the sum, out, and the plus itself


def test_a_module_without_a_group_is_refused(groups):
    with pytest.raises(InputError, match="No group holds a weight of 'relu'"):
        picture.residual(groups, "relu", block(1, 0), [], "stage1.1.conv1")
