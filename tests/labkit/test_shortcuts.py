"""What operators give on the meta device by hand: shapes, strides and types of the results that torch computes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.pruning import shortcuts
from labkit.pruning.abstract import Abstract, to_meta

aten = torch.ops.aten
SIZES = st.lists(st.integers(1, 3), min_size=1, max_size=4)


def rows(*shape):
    return torch.rand(shape) + 0.5


def swapped(*shape):
    """Of this shape, with the first two dimensions in the other order in memory."""
    return rows(shape[1], shape[0], *shape[2:]).transpose(0, 1)


NORM = (rows(3), rows(3), rows(3), rows(3), False, 0.1, 1e-5)
CASES = [
    (aten.relu, (rows(2, 3),)),
    (aten.relu, (rows(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),)),
    (aten.gelu, (swapped(2, 3, 4),)),
    (aten.hardtanh, (rows(2, 3), 0.0, 6.0)),
    (aten.add, (rows(2, 3, 4), 1)),
    (aten.mul, (swapped(2, 3, 4), 0.5)),
    (aten.mul, (swapped(2, 3, 4), rows(3, 1))),
    (aten.add, (rows(2, 3, 1), swapped(2, 3, 4))),
    (aten.add, (rows(2, 3), rows(2, 3).double())),
    (aten.mul, (rows(2, 1, 4), rows(3, 1))),
    (aten.div, (rows(3), 2 + 1j)),
    (aten.addmm, (rows(4), rows(2, 3), rows(3, 4))),
    (aten.addmm, (rows(1, 1), swapped(2, 3), swapped(3, 4))),
    (aten.native_batch_norm, (rows(2, 3, 4, 4), *NORM)),
    (aten.native_batch_norm, (rows(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), *NORM)),
    (aten.native_layer_norm, (rows(2, 5, 4), [4], rows(4), rows(4), 1e-5)),
    (aten.native_layer_norm, (rows(2, 5, 4), [5, 4], None, None, 1e-5)),
    (aten.native_layer_norm, (swapped(2, 5, 4), [4], rows(4), None, 1e-5)),
    (aten._softmax, (rows(2, 3), 1, False)),
    (aten._softmax, (swapped(2, 3), 1, False)),
    (aten.mean.dim, (rows(2, 3, 4, 4), [2, 3])),
    (aten.mean.dim, (swapped(2, 3, 4), [-1], True)),
    (aten.cat, ([rows(2, 3), rows(4, 3)],)),
    (aten.cat, ([rows(2, 3, 4), rows(2, 1, 4), swapped(2, 2, 4)], -2)),
]


def computed_and_by_hand(operator, args):
    expected = operator(*args)
    with Abstract():
        found = operator(*to_meta(args))
    if operator is aten.native_batch_norm:  # the statistics of the batch are empty in evaluation, on the CPU alone
        return [expected[0]], [found[0]]
    return [x if isinstance(x, (tuple, list)) else [x] for x in (expected, found)]


@pytest.mark.parametrize(("operator", "args"), CASES)
def test_a_shortcut_gives_what_torch_computes(operator, args):
    for a, b in zip(*computed_and_by_hand(operator, args), strict=True):
        assert b.device.type == "meta" and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SIZES, st.data())
def test_sums_of_repeated_tensors_have_torchs_strides(shape, data):
    """Strides of dimensions of size 1 mean nothing."""
    parts = [[data.draw(st.sampled_from([1, n])) for n in shape] for _ in range(2)]
    parts[1] = parts[1][data.draw(st.integers(0, len(shape))) :]
    x, y = (torch.rand(part) for part in parts)
    order = data.draw(st.permutations(range(x.dim())))
    x = x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])
    (a,), (b,) = computed_and_by_hand(aten.add, (x, y))
    assert a.shape == b.shape
    assert all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def test_every_shortcut_is_compared():
    names = {operator._schema.name if hasattr(operator, "_schema") else str(operator) for operator, _ in CASES}
    tested = {name.replace("::", ".").split(".")[1] for name in names}
    alike = {"hardswish", "hardsigmoid", "silu", "sigmoid", "tanh", "leaky_relu", "sub", "_safe_softmax"}
    assert set(shortcuts.BY_HAND) == tested | alike


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        (aten.addmm, (rows(4), rows(2, 3), rows(4, 4))),
        (aten.addmm, (rows(5), rows(2, 3), rows(3, 4))),
        (aten.native_batch_norm, (rows(2, 4, 4, 4), *NORM)),
        (aten.native_layer_norm, (rows(2, 5), [4], rows(4), rows(4), 1e-5)),
        (aten.native_layer_norm, (rows(2, 5), [5], rows(4), None, 1e-5)),
        (aten.add, (rows(2, 3), rows(2, 4))),
        (aten.add_, (rows(2, 1), rows(2, 4))),
        (aten.cat, ([rows(2, 3), rows(3, 4)],)),
    ],
)
def test_sizes_that_do_not_fit_are_an_error(operator, args):
    with pytest.raises(RuntimeError), Abstract():
        operator(*to_meta(args))
