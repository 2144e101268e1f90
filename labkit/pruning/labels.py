"""Labels: every index of every dimension gets a number, and numbers that must be removed together are tied.

`Labels` only collects while a model is traced: ties, pins (never removed, and why), and two kinds of constraints that a
reshape or a split brings along. `resolve` then finds the classes. Nothing here knows an operator; see `rules`.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np


def components(n: int, a: np.ndarray, b: np.ndarray, parent: np.ndarray | None = None) -> np.ndarray:
    """The smallest number in the connected component of each of `n` nodes, edges a[i] - b[i]. Union-find in arrays.

    parent: components found before, which the edges join further.
    """
    parent = np.arange(n) if parent is None else parent
    while True:
        high, low = parent[a], parent[b]
        open_ = high != low
        if not open_.any():
            return parent
        a, b, high, low = a[open_], b[open_], high[open_], low[open_]
        parent[np.maximum(high, low)] = np.minimum(high, low)  # roots only ever point to smaller ones: no cycles
        while (parent[parent] != parent).any():
            parent = parent[parent]


class Labels:
    """Ties and pins of labels, in the order in which the operators brought them."""

    def __init__(self) -> None:
        self.count = 0
        self._constant = bytearray()
        self._edges: list[tuple[np.ndarray, np.ndarray]] = []
        self._pins: list[tuple[np.ndarray, str]] = []
        self._constraints: list[tuple[str, Sequence[np.ndarray], str]] = []

    def fresh(self, n: int, constant: bool = False) -> np.ndarray:
        """n new labels. constant: of a buffer, which follows the channels of others and has none of its own."""
        self.count += n
        self._constant += bytes([constant]) * n
        return np.arange(self.count - n, self.count)

    def constant(self, labels: np.ndarray) -> bool:
        return bool(self._constant[labels.flat[0]])

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """a[i] and b[i] go together; the two broadcast."""
        if a is not b:
            a, b = np.broadcast_arrays(a, b)
            self._edges.append((a.ravel(), b.ravel()))

    def pin(self, labels: np.ndarray, reason: str) -> None:
        """None of these is ever removed; an empty reason is not worth telling (kernel positions, rows of a table)."""
        self._pins.append((labels.ravel(), reason))

    def keep_product(self, labels: np.ndarray) -> None:
        """A dimension was split in several, `labels` [a, b, ...]: what is kept must be whole slices along one axis."""
        self._constraints.append(("product", [labels], ""))

    def keep_even(self, pieces: Sequence[np.ndarray], reason: str) -> None:
        """A dimension was cut into pieces of one size: as many labels must be kept in each."""
        self._constraints.append(("even", list(pieces), reason))

    def resolve(self) -> tuple[np.ndarray, dict[int, str]]:
        """(class of every label, {class that is pinned: reason}); a class is named by its smallest label."""
        empty = np.zeros(0, dtype=np.int64)
        a = np.concatenate([empty, *(edge[0] for edge in self._edges)])
        b = np.concatenate([empty, *(edge[1] for edge in self._edges)])
        found = components(self.count, a, b)
        pinned = np.zeros(self.count, dtype=bool)
        for labels, _ in self._pins:
            pinned[labels] = True
        for kind, pieces, reason in self._constraints:
            fixed = np.zeros(self.count, dtype=bool)
            fixed[found[pinned]] = True
            if kind == "product":
                joined, stuck = _make_product(found[pieces[0]], fixed), None
            else:
                joined, stuck = _make_even([found[piece] for piece in pieces], fixed)
            if joined is not None:
                found = components(self.count, *joined, parent=found)
            if stuck is not None and len(stuck):
                self._pins.append((stuck, reason))
                pinned[stuck] = True
        reasons: dict[int, str] = {}
        for labels, reason in self._pins:
            for root in np.unique(found[labels]).tolist():
                reasons[root] = reasons.get(root) or reason
        return found, reasons


def _make_product(classes: np.ndarray, fixed: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Edges that make every set of classes a set of whole slices along one axis; None if it is so already.

    If the other operators leave the axis open, it is the last one: a channel shuffle's channels in a group, whose
    number follows from the input where the number of groups is a constant.
    """
    if fixed[classes].all():
        return None
    for axis in range(classes.ndim):
        slices = np.moveaxis(classes, axis, 0).reshape(classes.shape[axis], -1)
        if (slices == slices[:, :1]).all():
            return None
    rows = classes.reshape(-1, classes.shape[-1])
    return np.broadcast_to(rows[:1], rows.shape).ravel(), rows.ravel()


def _make_even(pieces: list[np.ndarray], fixed: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray] | None, np.ndarray]:
    """(edges that join classes until each has as many labels in every piece, classes for which that fails).

    Classes that lie in one piece only are joined with their like in the others, in order; of two pieces, mirror images
    are joined; what is left is joined into one.
    """
    classes, positions = np.unique(np.concatenate(pieces), return_inverse=True)
    counts = np.zeros((len(classes), len(pieces)), dtype=np.int64)
    where = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    np.add.at(counts, (positions, where), 1)
    uneven = ~fixed[classes] & (counts != counts[:, :1]).any(1)
    if not uneven.any():
        return None, np.zeros(0, dtype=np.int64)
    waiting: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for label, count in zip(classes[uneven].tolist(), counts[uneven].tolist(), strict=True):
        waiting[tuple(count)].append(label)
    bundles: list[list[int]] = []
    for count in list(waiting):
        if len(pieces) == 2:
            partners = [count, count[::-1]]
        elif sum(c > 0 for c in count) == 1:
            partners = [tuple(max(count) if i == j else 0 for i in range(len(pieces))) for j in range(len(pieces))]
        else:
            continue
        for bundle in zip(*(list(waiting.get(p, ())) for p in partners), strict=False):
            bundles.append(list(bundle))
            for partner, label in zip(partners, bundle, strict=True):
                waiting[partner].remove(label)
    left = [(label, count) for count, labels in waiting.items() for label in labels]
    stuck = np.zeros(0, dtype=np.int64)
    if left:
        total = np.sum([count for _, count in left], axis=0)
        if (total == total[0]).all():
            bundles.append([label for label, _ in left])
        else:
            stuck = np.array([label for label, _ in left])
    a = [bundle[0] for bundle in bundles for _ in bundle[1:]]
    b = [label for bundle in bundles for label in bundle[1:]]
    return (np.array(a, dtype=np.int64), np.array(b, dtype=np.int64)), stuck
