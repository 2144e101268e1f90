"""Answers to the exercises of lesson 02: right ones, written differently, and plausible wrong ones."""

import math

import torch
import torch.nn.functional as F

from labkit.pruning import sparse, unstructured
from labkit.storage.formats import FORMATS


def _mask_sort(weight, sparsity):
    k = math.floor(weight.numel() * sparsity + 0.5)
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[weight.abs().flatten().argsort(stable=True)[:k]] = False
    return mask.view(weight.shape)


def _mask_ranks(weight, sparsity):
    flat = weight.abs().reshape(-1).tolist()
    order = sorted(range(len(flat)), key=lambda i: flat[i], reverse=True)
    kept = set(order[: len(flat) - math.floor(len(flat) * sparsity + 0.5)])
    return torch.tensor([i in kept for i in range(len(flat))]).reshape(weight.shape)


def _mask_threshold(weight, sparsity):
    k = round(weight.numel() * sparsity)
    return weight.abs() > weight.abs().flatten().kthvalue(max(k, 1)).values


def _mask_changes(weight, sparsity):
    mask = _mask_sort(weight, sparsity)
    weight[~mask] = 0
    return mask


def _mask_signed(weight, sparsity):
    k = math.floor(weight.numel() * sparsity + 0.5)
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[weight.flatten().argsort(stable=True)[:k]] = False
    return mask.view(weight.shape)


def _mask_by_row(weight, sparsity):
    return torch.stack([_mask_sort(row, sparsity) for row in weight])


def _mask_integer_one(weight, sparsity):
    return _mask_sort(weight, sparsity / weight.numel() if isinstance(sparsity, int) else sparsity)


def _obs(w, hessian):
    inverse = torch.linalg.inv(hessian)
    q = int((w**2 / inverse.diagonal()).argmin())
    return q, w - w[q] / inverse[q, q] * inverse[:, q]


def _obs_by_least_squares(w, hessian):
    best = None
    for q in range(len(w)):
        others = [i for i in range(len(w)) if i != q]
        new = torch.zeros_like(w)
        target = hessian[others] @ w
        new[others] = torch.linalg.solve(hessian[others][:, others], target)
        cost = (new - w) @ hessian @ (new - w)
        if best is None or cost < best[0]:
            best = (cost, q, new)
    return best[1], best[2]


def _obs_without_update(w, hessian):
    q, _ = _obs(w, hessian)
    new = w.clone()
    new[q] = 0
    return q, new


def _obs_sign(w, hessian):
    inverse = torch.linalg.inv(hessian)
    q, _ = _obs(w, hessian)
    new = w + w[q] / inverse[q, q] * inverse[:, q]
    new[q] = 0
    return q, new


def _obd(w, hessian):
    q = int((w**2 * hessian.diagonal()).argmin())
    inverse = torch.linalg.inv(hessian)
    return q, w - w[q] / inverse[q, q] * inverse[:, q]


def _smallest(w, hessian):
    q = int(w.abs().argmin())
    inverse = torch.linalg.inv(hessian)
    return q, w - w[q] / inverse[q, q] * inverse[:, q]


def _obs_hessian_column(w, hessian):
    q, _ = _obs(w, hessian)
    return q, w - w[q] / hessian[q, q] * hessian[:, q]


def _obs_in_place(w, hessian):
    q, new = _obs(w, hessian)
    w.copy_(new)
    return q, w


def _stored(rows, columns, nonzeros, value_bytes, index=4, pointers=1, coordinates=2, coordinate=8):
    cells = rows * columns
    return {
        "dense": cells * value_bytes,
        "bitmask": math.ceil(cells / 8) + nonzeros * value_bytes,
        "csr": nonzeros * (value_bytes + index) + index * (rows + pointers),
        "coo": nonzeros * (value_bytes + coordinates * coordinate),
    }


def _stored_listed(rows, columns, nonzeros, value_bytes):
    values = [value_bytes] * nonzeros
    return {
        "coo": sum(values) + 16 * len(values),
        "csr": sum(values) + 4 * len(values) + 4 * rows + 4,
        "bitmask": sum(values) + (rows * columns + 7) // 8,
        "dense": rows * columns * value_bytes,
    }


def _csr(weight, index=torch.int32):
    nonzero = weight != 0
    starts = F.pad(nonzero.sum(1).cumsum(0), (1, 0)).to(index)
    return weight[nonzero], nonzero.nonzero()[:, 1].to(index), starts


def _csr_listed(weight):
    values, columns, starts = [], [], [0]
    for row in weight:
        for column, value in enumerate(row):
            if value != 0:
                values.append(value)
                columns.append(column)
        starts.append(len(values))
    stacked = torch.stack(values) if values else weight.new_zeros(0)
    return stacked, torch.tensor(columns, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32)


def _csr_by_column(weight):
    values, rows, _ = _csr(weight.t())
    return values, rows, _csr(weight)[2]


def _csr_flat(weight):
    values, _, starts = _csr(weight)
    return values, weight.flatten().nonzero().squeeze(1).int(), starts


def _csr_rows(weight):
    values, _, starts = _csr(weight)
    return values, (weight != 0).nonzero()[:, 0].int(), starts


def _sides(layer, x, format):
    dense = unstructured.make_permanent(layer)
    fast = sparse.convert(dense, format=format, batch_size=len(x))
    return lambda: dense(x), lambda: fast(x)


def _sides_by_hand(layer, x, format):
    weight = layer.weight.detach().clone()
    fast = sparse.SparseLinear(weight, layer.bias, format)
    return (lambda: F.linear(x, weight, layer.bias)), (lambda: fast(x))


def _sides_masked(layer, x, format):
    masked = unstructured.prune(layer, unstructured.sparsity(layer))
    return (lambda: masked(x)), _sides(layer, x, format)[1]


def _sides_bf16(layer, x, format):
    fast = sparse.convert(layer, format="kernel-bf16")
    rounded = layer.weight.detach().bfloat16().float()
    return _sides(layer, x, format)[0], lambda: fast(x) if format == "kernel" else F.linear(x, rounded, layer.bias)


def _sides_in_the_call(layer, x, format):
    return _sides(layer, x, format)[0], lambda: sparse.convert(layer, format=format)(x)


def _sides_computed_before(layer, x, format):
    done = [call() for call in _sides(layer, x, format)]
    return lambda: done[0], lambda: done[1]


def _sides_without_bias(layer, x, format):
    weight = layer.weight.detach().clone()
    fast = sparse.SparseLinear(weight, None, format)
    return lambda: x @ weight.t(), lambda: fast(x)


RIGHT = {
    "02.1": (_mask_sort, _mask_ranks),
    "02.2": (_obs, _obs_by_least_squares),
    "02.3": (_stored, _stored_listed),
    "02.4": (_csr, _csr_listed),
    "02.5": (_sides, _sides_by_hand),
}

WRONG = {
    "02.1": {
        "a threshold, so ties go together": _mask_threshold,
        "truncated count": lambda w, s: _mask_sort(w, int(w.numel() * s) / w.numel()),
        "a half goes to the even number": lambda w, s: _mask_sort(w, round(w.numel() * s) / w.numel()),
        "the weight is zeroed too": _mask_changes,
        "signed values": _mask_signed,
        "row by row": _mask_by_row,
        "1 means one weight": _mask_integer_one,
        "floats, not bools": lambda w, s: _mask_sort(w, s).float(),
    },
    "02.2": {
        "no update": _obs_without_update,
        "update with the wrong sign": _obs_sign,
        "chosen by OBD": _obd,
        "chosen by magnitude": _smallest,
        "column of H, not of its inverse": _obs_hessian_column,
        "w changed in place": _obs_in_place,
        "only the row": lambda w, h: _obs(w, h)[1],
    },
    "02.3": {
        "64-bit column numbers": lambda *a: _stored(*a, index=8),
        "no last row pointer": lambda *a: _stored(*a, pointers=0),
        "one coordinate": lambda *a: _stored(*a, coordinates=1),
        "32-bit coordinates": lambda *a: _stored(*a, coordinate=4),
        "a byte a flag": lambda r, c, n, s: {**_stored(r, c, n, s), "bitmask": r * c + n * s},
        "bits cut off": lambda r, c, n, s: {**_stored(r, c, n, s), "bitmask": r * c // 8 + n * s},
        "values of four bytes": lambda r, c, n, s: _stored(r, c, n, 4),
        "only the smallest": lambda *a: min(_stored(*a).values()),
    },
    "02.4": {
        "64-bit positions": lambda w: _csr(w, torch.int64),
        "no end of the last row": lambda w: (*_csr(w)[:2], _csr(w)[2][:-1]),
        "where rows end, without the 0": lambda w: (*_csr(w)[:2], _csr(w)[2][1:]),
        "row numbers for columns": _csr_rows,
        "places in the flattened weight": _csr_flat,
        "column by column": _csr_by_column,
        "values in float32": lambda w: (_csr(w)[0].float(), *_csr(w)[1:]),
        "a dict": FORMATS["csr"].pack,
    },
    "02.5": {
        "the dense side masks at each call": _sides_masked,
        "the sparse side in another type": _sides_bf16,
        "converted within the call": _sides_in_the_call,
        "both sides dense": lambda layer, x, format: (_sides(layer, x, format)[0],) * 2,
        "computed before the call": _sides_computed_before,
        "the bias left out": _sides_without_bias,
        "the outputs, not functions": lambda *a: tuple(call() for call in _sides(*a)),
    },
}
