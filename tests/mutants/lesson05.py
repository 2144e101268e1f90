"""Answers to the exercises of lesson 05: right ones, written differently, and plausible wrong ones."""

import math

import torch


def _mask(weight, n, m, *, dim=1, score=torch.abs, order="first"):
    groups = score(weight).movedim(dim, -1).unflatten(-1, (-1, m))
    if order == "last":
        ranks = m - 1 - groups.flip(-1).argsort(dim=-1, descending=True, stable=True)
        places = ranks[..., :n]
    else:
        places = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    kept = torch.zeros(groups.shape, dtype=torch.bool).scatter_(-1, places, True)
    return kept.flatten(-2).movedim(-1, dim)


def _mask_by_beating(weight, n, m):
    """A weight stays if fewer than n of its group beat it; of equals the earlier one wins."""
    w = weight.abs().transpose(1, -1).unflatten(-1, (-1, m))
    a, b = w[..., :, None], w[..., None, :]
    earlier = torch.ones(m, m).tril(-1).bool()
    beaten = ((b > a) | ((b == a) & earlier)).sum(-1)
    return (beaten < n).flatten(-2).transpose(1, -1)


def _mask_threshold(weight, n, m):
    groups = weight.abs().movedim(1, -1).unflatten(-1, (-1, m))
    edge = groups.kthvalue(m - n + 1, dim=-1, keepdim=True).values
    return (groups >= edge).flatten(-2).movedim(-1, 1)


def _mask_flat(weight, n, m):
    flat = weight.abs().reshape(-1, m)
    places = flat.argsort(dim=-1, descending=True, stable=True)[:, :n]
    return torch.zeros(flat.shape, dtype=torch.bool).scatter_(-1, places, True).view(weight.shape)


def _mask_changes(weight, n, m):
    mask = _mask(weight, n, m)
    weight[~mask] = 0
    return mask


def _places(weight):
    """[out, groups, 2], ascending: where the values stand; a zero fills up."""
    groups = weight.unflatten(1, (-1, 4))
    return groups, (groups == 0).byte().argsort(dim=-1, stable=True)[..., :2].sort(-1).values


def _pack(places, low=0, high=2, second=4):
    nibble = places[..., 0] << low | places[..., 1] << high
    return (nibble[:, ::2] | nibble[:, 1::2] << second).byte()


def _compress(weight):
    groups, places = _places(weight)
    return groups.gather(-1, places).flatten(1), _pack(places)


def _compress_slowly(weight):
    values, packed = [], []
    for row in weight.tolist():
        for at in range(0, len(row), 8):
            byte = 0
            for half in range(2):
                group = row[at + 4 * half : at + 4 * half + 4]
                where = [i for i in range(4) if group[i] != 0]
                where = sorted(where + [i for i in range(4) if i not in where][: 2 - len(where)])
                values += [group[i] for i in where]
                byte += (where[0] + 4 * where[1]) * 16**half
            packed.append(byte)
    rows = len(weight)
    return (
        torch.tensor(values, dtype=weight.dtype).view(rows, -1),
        torch.tensor(packed, dtype=torch.uint8).view(rows, -1),
    )


def _compress_only_nonzeros(weight):
    places = _places(weight)[1]
    return weight[weight != 0].view(len(weight), -1), _pack(places)


def _compress_by_magnitude(weight):
    groups = weight.unflatten(1, (-1, 4))
    places = groups.abs().topk(2, dim=-1).indices
    return groups.gather(-1, places).flatten(1), _pack(places)


def _compress_same_place(weight):
    groups, places = _places(weight)
    places = torch.where(groups.gather(-1, places) == 0, 0, places)
    values = torch.where(places == places.flip(-1), 0, groups.gather(-1, places))
    return values.flatten(1), _pack(places)


def _compress_laid_out(weight, **layout):
    groups, places = _places(weight)
    return groups.gather(-1, places).flatten(1), _pack(places, **layout)


def _compress_a_byte_a_group(weight):
    groups, places = _places(weight)
    return groups.gather(-1, places).flatten(1), (places[..., 0] | places[..., 1] << 2).byte()


def _wanda(weight, inputs, n, m, norm=lambda x: x.norm(dim=0), **how):
    return _mask(weight * norm(inputs.flatten(0, -2)), n, m, **how)


def _wanda_by_energy(weight, inputs, n, m):
    """Squares rank as their roots do."""
    energy = torch.einsum("...i,...i->i", inputs, inputs)
    return _mask_by_beating(weight.square() * energy, n, m)


def _wanda_by_row(weight, inputs, n, m):
    scores = weight.abs() * inputs.flatten(0, -2).norm(dim=0)
    places = scores.argsort(dim=1, descending=True)[:, : weight.shape[1] * n // m]
    return torch.zeros(weight.shape, dtype=torch.bool).scatter_(1, places, True)


def _estimator(passed, saved=lambda w, keep: w, forward=lambda w, keep: w.masked_fill(~keep, 0.0)):
    """An autograd.Function whose backward pass hands on passed(gradient, saved(w, keep), keep, decay)."""

    class Estimator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight, keep, decay):
            ctx.save_for_backward(saved(weight, keep), keep)
            ctx.decay = decay
            return forward(weight, keep)

        @staticmethod
        def backward(ctx, gradient):
            return passed(gradient, *ctx.saved_tensors, ctx.decay), None, None

    return Estimator


def _refined(gradient, w, keep, decay):
    return gradient + decay * w.masked_fill(keep, 0.0)


RIGHT = {
    "05.1": (_mask, _mask_by_beating),
    "05.2": (_compress, _compress_slowly),
    "05.3": (
        lambda n, m, bits: n / m + n * math.ceil(math.log2(m)) / (m * bits),
        lambda n, m, bits: n * (bits + (m - 1).bit_length()) / (m * bits),
    ),
    "05.4": (
        _estimator(_refined),
        _estimator(
            lambda g, w, keep, decay: torch.where(keep, g, g + decay * w), forward=lambda w, keep: w * keep.to(w.dtype)
        ),
    ),
    "05.5": (_wanda, _wanda_by_energy),
}

WRONG = {
    "05.1": {
        "a threshold, so ties go together": _mask_threshold,
        "n of m removed": lambda w, n, m: ~_mask(w, n, m),
        "grouped along the memory": _mask_flat,
        "grouped along the outputs": lambda w, n, m: _mask(w, n, m, dim=0),
        "signed values": lambda w, n, m: _mask(w, n, m, score=lambda x: x),
        "of equals the last": lambda w, n, m: _mask(w, n, m, order="last"),
        "the weight is zeroed too": _mask_changes,
        "floats, not bools": lambda w, n, m: _mask(w, n, m).float(),
    },
    "05.2": {
        "only what is not zero": _compress_only_nonzeros,
        "largest first": _compress_by_magnitude,
        "two values at one place": _compress_same_place,
        "second place in the low bits": lambda w: _compress_laid_out(w, low=2, high=0),
        "a byte a group": _compress_a_byte_a_group,
        "values widened": lambda w: (_compress(w)[0].double(), _compress(w)[1]),
        "magnitudes": lambda w: (_compress(w)[0].abs(), _compress(w)[1]),
        "places of eight bytes": lambda w: (_compress(w)[0], _compress(w)[1].long()),
    },
    "05.3": {
        "places forgotten": lambda n, m, bits: n / m,
        "a bitmask": lambda n, m, bits: n / m + 1 / bits,
        "two bits, whatever m": lambda n, m, bits: n / m + 2 * n / (m * bits),
        "bits of m itself": lambda n, m, bits: n * (bits + m.bit_length()) / (m * bits),
        "as few bits as the patterns need": lambda n, m, bits: n / m + math.log2(math.comb(m, n)) / (m * bits),
        "n removed": lambda n, m, bits: (m - n) * (bits + (m - 1).bit_length()) / (m * bits),
        "one place a group": lambda n, m, bits: (n * bits + (m - 1).bit_length()) / (m * bits),
        "bytes for bits": lambda n, m, bits: n * (bits * 8 + (m - 1).bit_length()) / (m * bits * 8),
    },
    "05.4": {
        "the draft of the lesson": _estimator(
            lambda g, w, keep, decay: keep * (g + decay * w), saved=lambda w, keep: w * keep
        ),
        "the true gradient": _estimator(lambda g, w, keep, decay: keep * g + decay * w.masked_fill(keep, 0.0)),
        "the pruned weight saved": _estimator(_refined, saved=lambda w, keep: w * keep),
        "the pull on what is kept": _estimator(lambda g, w, keep, decay: g + decay * w * keep),
        "the pull on everything": _estimator(lambda g, w, keep, decay: g + decay * w),
        "pushed away from zero": _estimator(lambda g, w, keep, decay: g - decay * w.masked_fill(keep, 0.0)),
        "no pull": _estimator(lambda g, w, keep, decay: g),
        "the dense weight used": _estimator(_refined, forward=lambda w, keep: w.clone()),
    },
    "05.5": {
        "magnitude alone": lambda w, x, n, m: _mask(w, n, m),
        "mean magnitude of the input": lambda *a: _wanda(*a, norm=lambda x: x.abs().mean(0)),
        "squares without the root": lambda *a: _wanda(*a, norm=lambda x: x.square().sum(0)),
        "largest input": lambda *a: _wanda(*a, norm=lambda x: x.abs().amax(0)),
        "only the first sequence": lambda w, x, n, m: _wanda(w, x[:1] if x.dim() == 3 else x, n, m),
        "signed weights": lambda *a: _wanda(*a, score=lambda s: s),
        "ranked over the row": _wanda_by_row,
        "removed where kept": lambda *a: ~_wanda(*a),
    },
}
