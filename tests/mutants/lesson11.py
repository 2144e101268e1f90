"""Right answers to the exercises of lesson 11, written otherwise than the worked ones."""

import torch


class KeptInOneTensor:
    """Memory for keys and values together, with room for more."""

    def __init__(self, layers):
        self.length = 0
        self.memory = [None] * layers  # [2, B, Hkv, capacity, D]
        self.filled = [0] * layers

    def positions(self, new):
        return torch.arange(self.length, self.length + new)[None]

    def advance(self, new):
        self.length += new

    def attend(self, layer, q, k, v):
        both, start = torch.stack([k, v]), self.length
        end = start + k.shape[2]
        memory = both.new_zeros(*both.shape[:3], 2 * end, both.shape[4])
        if self.memory[layer] is not None:
            memory[:, :, :, :start] = self.memory[layer][:, :, :, :start]
        memory[:, :, :, start:end] = both
        self.memory[layer], self.filled[layer] = memory, end
        keys, values = memory[:, :, :, :end].repeat_interleave(q.shape[1] // k.shape[1], 2)
        places = torch.arange(end)
        scores = (q @ keys.mT / q.shape[-1] ** 0.5).masked_fill(places > places[start:, None], -torch.inf)
        return scores.softmax(-1) @ values

    def crop(self, length):
        self.length = length
        self.filled = [min(tokens, length) for tokens in self.filled]

    @property
    def bytes(self):
        of_token = [0 if x is None else x[:, :, :, :1].nbytes for x in self.memory]
        return sum(size * tokens for size, tokens in zip(of_token, self.filled, strict=True))


def merge_by_cases(a, b):
    m = torch.where(a[0] > b[0], a[0], b[0])
    f, g = (torch.where(x[0] == -torch.inf, 0.0, (x[0] - m).exp()) for x in (a, b))
    return [m, f * a[1] + g * b[1], f * a[2] + g * b[2]]


def law_by_stack(rule, p, q, steps=64):
    cases = [(x, (i + 0.5) / steps) for x in q.nonzero().flatten().tolist() for i in range(steps)]
    weights = torch.stack([q[x] / steps for x, _ in cases])
    return weights @ torch.stack([rule(p, q, x, u) for x, u in cases])


def accept_by_product(p, q, guess, u):
    if q[guess] * u >= p[guess]:
        return torch.relu(p - q) / torch.relu(p - q).sum()
    return torch.eye(len(p), dtype=p.dtype)[guess]


RIGHT = {
    "11.1": KeptInOneTensor,
    "11.2": merge_by_cases,
    "11.3": law_by_stack,
    "11.4": accept_by_product,
}
