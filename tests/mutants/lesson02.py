"""Answers to the exercises of lesson 02: right ones, written differently, and plausible wrong ones."""

import math

import torch


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


RIGHT = {
    "02.1": (_mask_sort, _mask_ranks),
    "02.2": (_obs, _obs_by_least_squares),
    "02.3": (_stored, _stored_listed),
}

WRONG = {
    "02.1": {
        "a threshold, so ties go together": _mask_threshold,
        "truncated count": lambda w, s: _mask_sort(w, int(w.numel() * s) / w.numel()),
        "removed where kept": lambda w, s: ~_mask_sort(w, s),
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
}
