"""Labels: every index of every dimension gets a number, and numbers that must be removed together are tied.

`Labels` collects ties, pins (never removed, and why) and constraints while a model is traced, and `resolve` finds the
classes. A tensor carries its labels in spans. Nothing here knows an operator; see `rules`.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

Edges = tuple[np.ndarray, np.ndarray]


def components(n: int, a: np.ndarray, b: np.ndarray, parent: np.ndarray | None = None) -> np.ndarray:
    """The smallest number in the connected component of each of `n` nodes, edges a[i] - b[i]. Union-find in arrays.

    parent: components of an earlier call, which the edges join further.
    """
    parent = np.arange(n) if parent is None else parent
    while True:
        high, low = parent[a], parent[b]
        differing = high != low
        if not differing.any():
            return parent
        a, b, high, low = a[differing], b[differing], high[differing], low[differing]
        parent[np.maximum(high, low)] = np.minimum(high, low)  # roots only ever point to smaller ones: no cycles
        while (parent[parent] != parent).any():
            parent = parent[parent]


class Labels:
    """Ties and pins of labels, in the order in which the operators brought them."""

    def __init__(self) -> None:
        self.count = 0
        self._constant = bytearray()
        self._edges: list[Edges] = []
        self._pins: list[tuple[np.ndarray, str]] = []
        self._constraints: list[tuple[str, Sequence[np.ndarray], str]] = []
        self._cuts: dict[bytes, set[int]] = {}
        self.pieces: list[np.ndarray] = []  # labels of what is cut into pieces of several sizes, by their size

    def fresh(self, n: int, constant: bool = False) -> np.ndarray:
        """n new labels. constant: of a buffer or of what the pass makes, which follow the channels of others."""
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
        """A dimension was split in several, `labels` [a, b, ...]: what stays must be whole slices along one axis."""
        self._constraints.append(("product", [labels], ""))

    def keep_cut(self, labels: np.ndarray, start: int, stop: int, reason: str) -> None:
        """A dimension is cut at two places: as many labels must stay in each of its pieces that have one size."""
        bounds = self._cuts.setdefault(labels.tobytes(), {0, len(labels)})
        if len(bounds) == 2:
            self._constraints.append(("cut", [labels], reason))
        bounds |= {start, stop}

    def resolve(self) -> tuple[np.ndarray, dict[int, str]]:
        """(class of every label, {class that is pinned: reason}); a class is named by its smallest label."""
        empty = np.zeros(0, dtype=np.int64)
        a, b = (np.concatenate([empty, *(edge[side] for edge in self._edges)]) for side in (0, 1))
        classes = components(self.count, a, b)
        pinned = np.zeros(self.count, dtype=bool)
        for labels, _ in self._pins:
            pinned[labels] = True
        for kind, pieces, reason in self._constraints:
            fixed = np.zeros(self.count, dtype=bool)
            fixed[classes[pinned]] = True
            if kind == "product":
                steps = [(_make_product(classes[pieces[0]], fixed), empty)]
            else:
                alike: dict[int, list[np.ndarray]] = {}
                for piece in np.split(pieces[0], sorted(self._cuts[pieces[0].tobytes()])[1:-1]):
                    alike.setdefault(len(piece), []).append(piece)
                single = np.concatenate([empty, *alike.pop(1, ())])  # its tensor carries no labels
                steps = [(None, classes[single])]
                steps += [_make_even([classes[piece] for piece in same], fixed) for same in alike.values()]
                self.pieces += [np.concatenate(same) for same in alike.values()] if len(alike) > 1 else []
            for edges, stuck in steps:
                if edges is not None:
                    classes = components(self.count, *edges, parent=classes)
                if len(stuck):
                    self._pins.append((stuck, reason))
                    pinned[stuck] = True
        reasons: dict[int, str] = {}
        for labels, reason in self._pins:
            for root in np.unique(classes[labels]).tolist():
                reasons[root] = reasons.get(root) or reason
        return classes, reasons


def _make_product(classes: np.ndarray, fixed: np.ndarray) -> Edges | None:
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


def _make_even(pieces: list[np.ndarray], fixed: np.ndarray) -> tuple[Edges | None, np.ndarray]:
    """(edges that join classes until each has as many labels in every piece, classes for which that fails).

    Classes that lie in one piece only are joined with their like in the others, in order; of two pieces, mirror images
    are joined; the rest is joined into one.
    """
    classes, positions = np.unique(np.concatenate(pieces), return_inverse=True)
    counts = np.zeros((len(classes), len(pieces)), dtype=np.int64)
    where = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    np.add.at(counts, (positions, where), 1)
    uneven = ~fixed[classes] & (counts != counts[:, :1]).any(1)
    stuck = np.zeros(0, dtype=np.int64)
    if not uneven.any():
        return None, stuck
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
    rest = [(label, count) for count, labels in waiting.items() for label in labels]
    if rest:
        total = np.sum([count for _, count in rest], axis=0)
        if (total == total[0]).all():
            bundles.append([label for label, _ in rest])
        else:
            stuck = np.array([label for label, _ in rest])
    a = [bundle[0] for bundle in bundles for _ in bundle[1:]]
    b = [label for bundle in bundles for label in bundle[1:]]
    return (np.array(a, dtype=np.int64), np.array(b, dtype=np.int64)), stuck


# --- what a tensor carries --------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """Labels of the dimensions `dims` (rising), one axis each; dimensions without a span never change size.

    A convolution's output [N, C, H, W] has one span on dimension 1. A Linear's output [N, L, 768] viewed as
    [N, L, 12, 64] has one on dimensions 2 and 3: whether heads or positions inside the heads may go is still open.
    """

    dims: tuple[int, ...]
    labels: np.ndarray


Spans = tuple[Span, ...]


class Side(NamedTuple):
    """An operand on the dimensions of a result: its spans, and the dimensions on which it is not just repeated."""

    spans: Spans
    present: frozenset[int]


def span_at(spans: Iterable[Span], dim: int) -> Span | None:
    return next((span for span in spans if dim in span.dims), None)


def fix(labels: Labels, spans: Spans, dims: Iterable[int], reason: str) -> Spans:
    """`spans` after `dims` may no longer shrink.

    A span that has other dimensions lives on there: its labels are tied along the fixed ones (the 64 of each head).
    """
    dims = frozenset(dims)
    result = []
    for span in spans:
        axes = tuple(i for i, dim in enumerate(span.dims) if dim in dims)
        if not axes:
            result.append(span)
        elif len(axes) == len(span.dims):
            labels.pin(span.labels, reason)
        else:
            first = span.labels[tuple(slice(0, 1) if i in axes else slice(None) for i in range(span.labels.ndim))]
            labels.tie(first, span.labels)
            result.append(Span(tuple(dim for dim in span.dims if dim not in dims), first.squeeze(axes)))
    return tuple(result)


def combine(labels: Labels, sides: Sequence[Side], reason: str) -> Spans:
    """The spans of an elementwise result: labels at the same place are tied, a fixed dimension fixes the others."""
    spans = [side.spans for side in sides]
    while conflict := _conflict(labels, spans, sides):
        side, dim = conflict
        spans[side] = fix(labels, spans[side], (dim,), reason)
    result: dict[tuple[int, ...], Span] = {}
    for span in (span for side in spans for span in side):
        other = result.setdefault(span.dims, span)
        labels.tie(other.labels, span.labels)
        if labels.constant(other.labels):
            result[span.dims] = span
    return tuple(result.values())


def _conflict(labels: Labels, spans: Sequence[Spans], sides: Sequence[Side]) -> tuple[int, int] | None:
    """(side, dimension) that has to be fixed before the spans of all sides fit on each other.

    Of a span of several dimensions and one of fewer, what both have stays. A constant's span decides nothing: heads
    stay prunable though a table of rotary positions is multiplied to the positions inside them.
    """
    pairs = ((i, span, j) for i, side in enumerate(spans) for span in side for j in range(len(sides)) if i != j)
    for i, span, j in pairs:
        for dim in span.dims:
            if dim not in sides[j].present:
                continue
            match = span_at(spans[j], dim)
            if match is None:
                return i, dim
            if differing := set(span.dims) ^ set(match.dims):
                if len(span.dims) > 1 and labels.constant(match.labels) > labels.constant(span.labels):
                    return i, dim
                if len(match.dims) > 1 and labels.constant(span.labels) > labels.constant(match.labels):
                    return j, dim
                last = max(differing)
                return (i, last) if last in span.dims else (j, last)
    return None


def moved(spans: Spans, where: Sequence[int | None]) -> Spans:
    """Spans with dimension d renamed where[d]; None drops an axis, which must be of length 1."""
    result = []
    for span in spans:
        axes = [i for i, dim in enumerate(span.dims) if where[dim] is not None]
        array = span.labels.squeeze(tuple(i for i in range(len(span.dims)) if i not in axes))
        dims = [where[span.dims[i]] for i in axes]
        order = np.argsort(dims)
        if dims:
            result.append(Span(tuple(dims[i] for i in order), array.transpose(order)))
    return tuple(result)


def without(spans: Spans, dims: Iterable[int], before: int, after: int) -> Spans:
    """Spans of a tensor of `before` dimensions after `dims`, which carry none, are dropped, if they are (`after`)."""
    if before == after:
        return spans
    stay = [d for d in range(before) if d not in set(dims)]
    return moved(spans, [stay.index(d) if d in stay else None for d in range(before)])


def shown(spans: Spans, shape: Sequence[int]) -> Spans:
    """Spans of a part of a tensor: dimensions of size 1 carry no labels, and an empty part has none at all."""
    result = []
    for span in spans:
        dims = tuple(d for d in span.dims if shape[d] > 1)
        if dims and span.labels.size:
            result.append(Span(dims, span.labels.squeeze(tuple(i for i, d in enumerate(span.dims) if shape[d] == 1))))
    return tuple(result)


def reshaped(labels: Labels, spans: Spans, old: Sequence[int], new: Sequence[int]) -> Spans:
    """Spans of a tensor of shape `old` viewed in shape `new`; the order of the elements stays."""
    runs = _runs(old, new)
    run_of = {dim: n for n, (dims, _) in enumerate(runs) for dim in dims}

    def runs_of(span: Span) -> set[int]:
        return {run_of[dim] for dim in span.dims}

    result = []
    spans = sorted(spans, key=lambda span: (labels.constant(span.labels), span.dims))
    for i, span in enumerate(spans):
        if any(runs_of(span) & runs_of(other) for other in spans[:i]):  # repeated for each of another span's entries
            labels.pin(span.labels, "" if labels.constant(span.labels) else "is joined with another dimension")
            continue
        touched = sorted(runs_of(span))
        if all(len(runs[n][0]) == len(runs[n][1]) == 1 for n in touched):
            result.append(Span(tuple(runs[n][1][0] for n in touched), span.labels))
            continue
        before, after = ([dim for n in touched for dim in runs[n][side]] for side in (0, 1))
        array = span.labels.reshape([old[dim] if dim in span.dims else 1 for dim in before])
        array = np.broadcast_to(array, [old[dim] for dim in before]).reshape([new[dim] for dim in after])
        same = tuple(i for i in range(array.ndim) if (array == array.take([0], i)).all())
        array = array[tuple(slice(0, 1) if i in same else slice(None) for i in range(array.ndim))].squeeze(same)
        result.append(Span(tuple(dim for i, dim in enumerate(after) if i not in same), array))
        if array.ndim > 1:
            labels.keep_product(array)
    return tuple(result)


def _runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions of `old` and of `new` that hold the same elements."""
    runs = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b, size_a, size_b = [], [], 1, 1
        if i < len(old):
            a, size_a, i = [i], old[i], i + 1
        if j < len(new):
            b, size_b, j = [j], new[j], j + 1
        while size_a != size_b:
            if size_a < size_b:
                a, size_a, i = [*a, i], size_a * old[i], i + 1
            else:
                b, size_b, j = [*b, j], size_b * new[j], j + 1
        runs.append((a, b))
    return runs
