"""Numbers of few bits in bytes, one after the other, the lowest bit first."""

import torch
import torch.nn.functional as F
from torch import Tensor


def to_bits(numbers: Tensor, width: int) -> Tensor:
    """uint8 [ceil(count width / 8)]: `width` bits of each number, one after the other, lowest first."""
    place = torch.arange(8, dtype=torch.uint8, device=numbers.device)
    stream = (numbers.flatten().to(torch.uint8)[:, None] >> place[:width] & 1).flatten()
    return (F.pad(stream, (0, -len(stream) % 8)).view(-1, 8) << place).sum(1, dtype=torch.uint8)


def from_bits(data: Tensor, width: int, count: int) -> Tensor:
    """uint8 [count]: the numbers that `to_bits` was given, 8 of them in each `width` bytes."""
    data = F.pad(data, (0, -len(data) % width)).view(-1, width)
    numbers = data.new_empty(len(data), 8)
    for i in range(8):
        byte, low = divmod(i * width, 8)
        number = data[:, byte] >> low
        if low + width > 8:
            number = number | data[:, byte + 1] << 8 - low
        numbers[:, i] = number & 2**width - 1
    return numbers.flatten()[:count]


def pack4(codes: Tensor) -> Tensor:
    """uint8 [ceil(count / 2)]: the low four bits of two codes a byte, the earlier below; after an odd count zeros."""
    low, high = F.pad(codes.flatten() & 15, (0, codes.numel() % 2)).to(torch.uint8).view(-1, 2).unbind(1)
    return low | high << 4


def unpack4(data: Tensor, count: int) -> Tensor:
    """uint8 [count]: the codes 0..15 that `pack4` was given; signed ones come back as code modulo 16."""
    return torch.stack([data & 15, data >> 4], 1).flatten()[:count]
