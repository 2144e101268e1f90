"""Labels: every index of every dimension gets a number, and numbers to be removed together are tied.

`Labels` collects ties, pins (labels that never go, with the reason) and constraints while a model is traced;
`Labels.resolve` finds the classes. Classes of labels become units of channels (`units`). How a tensor carries labels
is told in `spans`, how operators tie them in `rules`.
"""

import itertools
from collections import defaultdict
from typing import NamedTuple

import numpy as np

NO_LABELS = np.zeros(0, dtype=np.int64)


class Edges(NamedTuple):
    """Pairs of labels, or of classes, to be joined: a[i] and b[i]."""

    a: np.ndarray
    b: np.ndarray


NO_EDGES = Edges(NO_LABELS, NO_LABELS)


def components(n: int, a: np.ndarray, b: np.ndarray, parent: np.ndarray | None = None) -> np.ndarray:
    """Find the connected components of a graph, by union-find on whole arrays.

    n: number of nodes.
    a, b: edges a[i] - b[i].
    parent: components of an earlier call, to be joined further by the edges.
    Returns [n], the smallest node in the component of each node.
    """
    parent = np.arange(n) if parent is None else parent
    while True:
        high, low = parent[a], parent[b]
        differing = high != low
        if not differing.any():
            return parent
        a, b = a[differing], b[differing]
        high, low = high[differing], low[differing]
        parent[np.maximum(high, low)] = np.minimum(high, low)  # roots only ever point to smaller ones: no cycles
        while (parent[parent] != parent).any():
            parent = parent[parent]


class _Pin(NamedTuple):
    labels: np.ndarray
    reason: str


class _WholeSlices(NamedTuple):
    """A dimension split in several, `labels` [a, b, ...]: whole slices along a single axis have to stay."""

    labels: np.ndarray


class _EvenPieces(NamedTuple):
    """A dimension cut into pieces: pieces of one size have to keep equally many labels.

    labels: labels of the whole dimension.
    bounds: positions of the cuts, the two ends included; filled further while the model is traced.
    reason: why labels stay for which equal numbers are impossible.
    """

    labels: np.ndarray
    bounds: set[int]
    reason: str

    def pieces_by_size(self) -> dict[int, list[np.ndarray]]:
        pieces: dict[int, list[np.ndarray]] = defaultdict(list)
        inner_bounds = sorted(self.bounds)[1:-1]
        for piece in np.split(self.labels, inner_bounds):
            pieces[len(piece)].append(piece)
        return pieces


class Labels:
    """Ties, pins and constraints of labels, in the order of the operators.

    count: the number of labels.
    pieces: labels of dimensions cut into pieces of several sizes, an array for each size; filled by `resolve`.
    """

    def __init__(self) -> None:
        self.count = 0
        self.pieces: list[np.ndarray] = []
        self._constant = bytearray()
        self._edges: list[Edges] = []
        self._pins: list[_Pin] = []
        self._constraints: list[_WholeSlices | _EvenPieces] = []
        self._cuts: dict[bytes, _EvenPieces] = {}

    def fresh(self, n: int, constant: bool = False) -> np.ndarray:
        """Return `n` new labels.

        constant: True for a dimension of a buffer, or of a tensor made by the forward pass, which follows the channels
        of the tensors beside it.
        """
        self.count += n
        self._constant += bytes([constant]) * n
        return np.arange(self.count - n, self.count)

    def constant(self, labels: np.ndarray) -> bool:
        """Return True if the labels are of a constant (see `fresh`)."""
        return bool(self._constant[labels.flat[0]])

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Let a[i] and b[i] go together; the arrays broadcast."""
        if a is not b:
            a, b = np.broadcast_arrays(a, b)
            self._edges.append(Edges(a.ravel(), b.ravel()))

    def pin(self, labels: np.ndarray, reason: str) -> None:
        """Never remove `labels`; an empty reason is not worth telling (kernel positions, rows of a table)."""
        self._pins.append(_Pin(labels.ravel(), reason))

    def keep_product(self, labels: np.ndarray) -> None:
        """Keep whole slices along a single axis of `labels` [a, b, ...]: a dimension was split in several."""
        self._constraints.append(_WholeSlices(labels))

    def keep_cut(self, labels: np.ndarray, start: int, stop: int, reason: str) -> None:
        """Keep equally many labels in all pieces of a size: the dimension `labels` is cut at `start` and `stop`."""
        key = labels.tobytes()
        if key not in self._cuts:
            self._cuts[key] = _EvenPieces(labels, {0, len(labels)}, reason)
            self._constraints.append(self._cuts[key])
        self._cuts[key].bounds.update((start, stop))

    def resolve(self) -> tuple[np.ndarray, dict[int, str]]:
        """Join the tied labels into classes.

        Returns
          - [count], the class of every label, named by the smallest label of the class;
          - {class: reason} of the classes to stay for good.
        """
        all_edges = [NO_EDGES, *self._edges]
        a = np.concatenate([edges.a for edges in all_edges])
        b = np.concatenate([edges.b for edges in all_edges])
        classes = components(self.count, a, b)
        pinned = np.zeros(self.count, dtype=bool)
        for pin in self._pins:
            pinned[pin.labels] = True
        for constraint in self._constraints:
            if isinstance(constraint, _WholeSlices):
                classes = self._join_slices(constraint, classes, pinned)
            else:
                classes = self._join_pieces(constraint, classes, pinned)
        return classes, self._reasons(classes)

    def _join_slices(self, constraint: _WholeSlices, classes: np.ndarray, pinned: np.ndarray) -> np.ndarray:
        """Return the classes after a constraint of whole slices."""
        fixed = self._fixed(classes, pinned)
        edges = _make_product(classes[constraint.labels], fixed)
        return components(self.count, *edges, parent=classes)

    def _join_pieces(self, cut: _EvenPieces, classes: np.ndarray, pinned: np.ndarray) -> np.ndarray:
        """Return the classes after a cut's constraint; classes without an even join are pinned, in `pinned` too."""
        fixed = self._fixed(classes, pinned)
        pieces = cut.pieces_by_size()
        single = np.concatenate([NO_LABELS, *pieces.pop(1, ())])  # its tensor carries no labels
        steps = [(NO_EDGES, classes[single])]
        for same_size in pieces.values():
            piece_classes = [classes[piece] for piece in same_size]
            steps.append(_make_even(piece_classes, fixed))
        if len(pieces) > 1:
            self.pieces += [np.concatenate(same_size) for same_size in pieces.values()]
        for edges, uneven in steps:
            classes = components(self.count, *edges, parent=classes)
            if len(uneven):
                self._pins.append(_Pin(uneven, cut.reason))
                pinned[uneven] = True
        return classes

    def _fixed(self, classes: np.ndarray, pinned: np.ndarray) -> np.ndarray:
        """Return [count], True for the name of each class with a pinned label."""
        fixed = np.zeros(self.count, dtype=bool)
        fixed[classes[pinned]] = True
        return fixed

    def _reasons(self, classes: np.ndarray) -> dict[int, str]:
        reasons: dict[int, str] = {}
        for labels, reason in self._pins:
            for pinned_class in np.unique(classes[labels]).tolist():
                reasons[pinned_class] = reasons.get(pinned_class) or reason
        return reasons


def _make_product(classes: np.ndarray, fixed: np.ndarray) -> Edges:
    """Return edges to make every set of classes a set of whole slices along a single axis.

    If the operators leave the axis open, the last axis is taken: a channel shuffle's channels in a group. Their number
    follows from the input if the number of groups is a constant.

    classes: [a, b, ...], of the labels of a dimension split in several.
    fixed: [labels], True at the name of each class that never goes.
    """
    if fixed[classes].all():
        return NO_EDGES
    for axis in range(classes.ndim):
        slices = np.moveaxis(classes, axis, 0)
        slices = slices.reshape(len(slices), -1)
        if (slices == slices[:, :1]).all():
            return NO_EDGES
    rows = classes.reshape(-1, classes.shape[-1])
    first_row = np.broadcast_to(rows[:1], rows.shape)
    return Edges(first_row.ravel(), rows.ravel())


# --- equally many in every piece ------------------------------------------------------------------------------------

Counts = tuple[int, ...]  # of the labels of a class in each piece


def _make_even(pieces: list[np.ndarray], fixed: np.ndarray) -> tuple[Edges, np.ndarray]:
    """Join classes until each has equally many labels in every piece.

    A class in a single piece is joined with a like class of every further piece, in order; of two pieces, mirror images
    are joined; the remaining classes are joined into a single class.

    pieces: the classes of the labels in each piece; the pieces have equal sizes.
    fixed: [labels], True at the name of each class that never goes.
    Returns the edges, and the classes without an even join.
    """
    uneven = _uneven_classes(pieces, fixed)
    waiting: dict[Counts, list[int]] = defaultdict(list)
    for uneven_class, counts in uneven.items():
        waiting[counts].append(uneven_class)
    bundles: list[list[int]] = []
    for counts in list(waiting):
        bundles += _take_bundles(waiting, _partners(counts))
    rest = list(itertools.chain.from_iterable(waiting.values()))
    stuck = NO_LABELS
    if rest:
        total = np.sum([uneven[c] for c in rest], axis=0)
        if (total == total[0]).all():
            bundles.append(rest)
        else:
            stuck = np.array(rest)
    return _joined(bundles), stuck


def _joined(bundles: list[list[int]]) -> Edges:
    """Return edges between the classes of each bundle."""
    a: list[int] = []
    b: list[int] = []
    for first, *further in bundles:
        a += [first] * len(further)
        b += further
    return Edges(np.array(a, dtype=np.int64), np.array(b, dtype=np.int64))


def _uneven_classes(pieces: list[np.ndarray], fixed: np.ndarray) -> dict[int, Counts]:
    """Return free classes with more labels in some piece than in the next, and the counts by piece."""
    classes, positions = np.unique(np.concatenate(pieces), return_inverse=True)
    sizes = [len(piece) for piece in pieces]
    piece_numbers = np.repeat(np.arange(len(pieces)), sizes)
    counts = np.zeros((len(classes), len(pieces)), dtype=np.int64)
    np.add.at(counts, (positions, piece_numbers), 1)
    differs = (counts != counts[:, :1]).any(1)
    uneven = ~fixed[classes] & differs
    rows = zip(classes[uneven].tolist(), counts[uneven].tolist(), strict=True)
    return {uneven_class: tuple(row) for uneven_class, row in rows}


def _partners(counts: Counts) -> list[Counts]:
    """Return the counts of classes to join with a class of `counts` to an even class; empty without a simple choice."""
    if len(counts) == 2:
        return [counts, counts[::-1]]
    if sum(count > 0 for count in counts) > 1:
        return []
    partners = []
    for piece in range(len(counts)):
        partner = [0] * len(counts)
        partner[piece] = max(counts)
        partners.append(tuple(partner))
    return partners


def _take_bundles(waiting: dict[Counts, list[int]], partners: list[Counts]) -> list[list[int]]:
    """Take as many bundles out of `waiting` as possible, each with a class for each of `partners`."""
    candidates = [list(waiting.get(counts, ())) for counts in partners]
    bundles = [list(bundle) for bundle in zip(*candidates, strict=False)]
    for bundle in bundles:
        for counts, bundled_class in zip(partners, bundle, strict=True):
            waiting[counts].remove(bundled_class)
    return bundles
