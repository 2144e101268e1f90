"""Right answers to the exercises of lesson 05, written otherwise than the worked ones."""

import torch


def nm_mask_by_beating(weight, n, m):
    """A weight stays if fewer than n of its group beat it; of equals the earlier one wins."""
    w = weight.abs().transpose(1, -1).unflatten(-1, (-1, m))
    a, b = w[..., :, None], w[..., None, :]
    earlier = torch.ones(m, m).tril(-1).bool()
    beaten = ((b > a) | ((b == a) & earlier)).sum(-1)
    return (beaten < n).flatten(-2).transpose(1, -1)


def compress_in_a_loop(weight):
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


def wanda_mask_by_energy(weight, inputs, n, m):
    """Squares rank as their roots do."""
    energy = torch.einsum("...i,...i->i", inputs, inputs)
    return nm_mask_by_beating(weight.square() * energy, n, m)


def stored_share_in_whole_bits(n, m, bits):
    return n * (bits + (m - 1).bit_length()) / (m * bits)


class RefinedByChoice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, keep, decay):
        ctx.save_for_backward(weight, keep)
        ctx.decay = decay
        return weight * keep.to(weight.dtype)

    @staticmethod
    def backward(ctx, gradient):
        weight, keep = ctx.saved_tensors
        return torch.where(keep, gradient, gradient + ctx.decay * weight), None, None


RIGHT = {
    "05.1": nm_mask_by_beating,
    "05.2": compress_in_a_loop,
    "05.3": stored_share_in_whole_bits,
    "05.4": RefinedByChoice,
    "05.5": wanda_mask_by_energy,
}
