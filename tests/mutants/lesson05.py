"""Right answers to the exercises of lesson 05, written otherwise than the worked ones."""

import torch


def nm_mask_by_beating(weight, n, m):
    """A weight stays if fewer than n of its group beat it; of equals the earlier one wins."""
    w = weight.abs().transpose(1, -1).unflatten(-1, (-1, m))
    a, b = w[..., :, None], w[..., None, :]
    earlier = torch.ones(m, m).tril(-1).bool()
    beaten = ((b > a) | ((b == a) & earlier)).sum(-1)
    return (beaten < n).flatten(-2).transpose(1, -1)


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


def sparsegpt_24_group_by_group(weight, u):
    """Each group of four is finished before the columns behind it are updated, all at once."""
    w = weight.clone()
    scale = u / u.diagonal()[:, None]
    for start in range(0, w.shape[1], 4):
        stop = start + 4
        removed = ~nm_mask_by_beating(w[:, start:stop] / u.diagonal()[start:stop], 2, 4)
        for j in range(start, stop):
            gone = w[:, j] * removed[:, j - start]
            w[:, j + 1 : stop] -= torch.outer(gone, scale[j, j + 1 : stop])
        gone = w[:, start:stop] * removed
        w[:, stop:] -= gone @ scale[start:stop, stop:]
        w[:, start:stop] *= ~removed
    return w


RIGHT = {
    "05.1": nm_mask_by_beating,
    "05.2": stored_share_in_whole_bits,
    "05.3": RefinedByChoice,
    "05.4": sparsegpt_24_group_by_group,
}
