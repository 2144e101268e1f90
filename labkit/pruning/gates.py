"""Gates on heads: a number for each head that multiplies its context vector, given or learned.

A gate of 0 is a removed head, 1 leaves it. Learned gates follow Voita et al. 2019 (Analyzing Multi-Head Self-Attention,
section 5) with the hard concrete distribution of Louizos et al. 2018 (Learning Sparse Neural Networks through L0
Regularization), or a plain L1 penalty. The model's weights are frozen here.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

PENALTIES = ("hard_concrete", "l1")


@contextlib.contextmanager
def gated(model: nn.Module, gates: Tensor) -> Iterator[None]:
    """Inside, the context of head h of layer l is multiplied by gates[l, h]; gates: [layers, heads]. Exact at 0."""
    raise NotImplementedError


def learn_gates(
    model: nn.Module,
    batches: Iterable,
    *,
    penalty: str = "hard_concrete",
    strength: float = 0.02,
    epochs: int = 1,
    lr: float = 0.1,
    loss_fn: Callable | None = None,
    seed: int = 0,
    label: str = "",
) -> Tensor:
    """Gates in [0, 1] that keep the task loss low while few are open, [layers, heads] float64; the model is frozen.

    Minimises mean loss + strength * sum of gates. penalty: "hard_concrete" samples each gate as clip(sigmoid((log u -
    log(1 - u) + a) / b) (r - l) + l, 0, 1) and penalises the chance that it is open (Louizos et al. 2018, equations 10
    to 12); what is returned is the gate without noise. "l1" trains the numbers themselves and penalises |z|.
    batches: read `epochs` times. lr: of Adam. The same seed gives the same gates.
    """
    raise NotImplementedError
