"""N:M weights as they are stored: the kept values, and for each its place in the group in as few bits as m needs.

The layout of 2:4 is that of the 2-bit indices in NVIDIA's sparse tensor cores (Mishra et al. 2021), without their
reordering for a card. Nothing computes with it here; `semi_structured` hands dense 2:4 weights to torch's kernels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.errors import InputError
from labkit.pruning.nm_pattern import check_pattern, is_nm


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight of n:m as stored; made by `compress`, read by `decompress`.

    values [groups, n]: group after group, each along the input dimension (for a convolution the kernel positions of an
        output channel one after the other), in the weight's dtype. What is kept comes in its order in the group; a
        group with fewer than n nonzeros is filled up with its first zeros.
    metadata uint8 [ceil(groups n b / 8)]: the place of each value in its group, b = ceil(log2 m) bits each (2 for
        m = 4), one after the other from the lowest bit of the first byte.
    shape, n, m: of the weight and its pattern.
    """

    values: Tensor
    metadata: Tensor
    shape: tuple[int, ...]
    n: int
    m: int

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata: of 2:4 in fp16 56.25 % of the dense weight, in int8 62.5 %, in fp32 53.1 %."""
        return self.values.nbytes + self.metadata.nbytes


def index_bits(m: int) -> int:
    """Bits that name one of m places: 2 for m = 4, 3 for m = 8."""
    return (m - 1).bit_length()


def compress(weight: Tensor, n: int = 2, m: int = 4) -> Packed:
    """`weight` ([out, in], [C_out, C_in, *kernel] or one row [in]) as values and metadata; `is_nm` must hold for it.

    Value for value what comes back from `decompress`, NaN included; a -0.0 that is not kept comes back as 0.0.
    """
    check_pattern(n, m)
    if not is_nm(weight, n, m):
        raise InputError(
            f"The weight {list(weight.shape)} is not {n}:{m} along its input dimension: multiply it with "
            f"mask(weight, {n}, {m}) first, or store it dense."
        )
    rows = weight.detach() if weight.dim() == 1 else weight.detach().movedim(1, -1)
    groups = rows.reshape(-1, m)  # [groups, m]
    # The nonzeros first, then zeros, each in order: a stable sort by "is zero". Then those n in the group's order.
    places = (groups == 0).byte().argsort(dim=1, stable=True)[:, :n].sort(dim=1).values  # [groups, n]
    values = _movable(groups).gather(1, places).view(weight.dtype)
    return Packed(values, _to_bits(places, index_bits(m)), tuple(weight.shape), n, m)


def decompress(packed: Packed) -> Tensor:
    """The dense weight of `packed`, contiguous, on the device of its values."""
    values, m = packed.values, packed.m
    places = _from_bits(packed.metadata, index_bits(m), values.numel()).view(values.shape)  # [groups, n]
    if (places >= m).any():
        raise InputError(f"The metadata names a place that a group of {m} does not have: it belongs to another weight.")
    movable = _movable(values)
    groups = movable.new_zeros(len(values), m).scatter_(1, places, movable).view(values.dtype)
    if len(packed.shape) == 1:
        return groups.view(packed.shape)
    first, width, *kernel = packed.shape
    return groups.view(first, *kernel, width).movedim(-1, 1).contiguous()


def _movable(x: Tensor) -> Tensor:
    """torch moves no float8 about, but it does move their bytes."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def _to_bits(places: Tensor, bits: int) -> Tensor:
    """`bits` bits of each place, lowest first, packed into bytes from their lowest bit."""
    stream = (places.flatten()[:, None] >> torch.arange(bits, device=places.device) & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (stream << torch.arange(8, device=places.device)).sum(1).to(torch.uint8)


def _from_bits(metadata: Tensor, bits: int, count: int) -> Tensor:
    stream = (metadata[:, None].long() >> torch.arange(8, device=metadata.device) & 1).flatten()[: count * bits]
    return (stream.view(count, bits) << torch.arange(bits, device=metadata.device)).sum(1)
