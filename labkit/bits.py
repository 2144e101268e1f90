"""Pack whole numbers of few bits into bytes, without gaps, the lowest bit first."""

import torch
import torch.nn.functional as F
from torch import Tensor


def to_bits(numbers: Tensor, width: int) -> Tensor:
    """Pack the low `width` bits of each number into bytes, one number after the other.

    numbers: whole numbers or bool of any shape, read in row-major order. A negative number is stored modulo 2^width. At
        4 bits the earlier of two numbers is in the lower half of a byte.
    width: 1 to 8 bits.

    Returns uint8 [ceil(count * width / 8)]; the bits after the last number are 0.
    """
    octets = numbers.flatten().to(torch.uint8)
    if width == 8:
        return octets
    if width == 4:  # the same bytes as below in a tenth of the time
        is_odd = len(octets) % 2
        halves = F.pad(octets & 15, (0, is_odd))
        low, high = halves.view(-1, 2).unbind(1)
        return low | high << 4
    place = torch.arange(8, dtype=torch.uint8, device=numbers.device)
    shifted = octets[:, None] >> place[:width]
    stream = (shifted & 1).flatten()  # a bit in each entry
    missing = -len(stream) % 8
    octet_bits = F.pad(stream, (0, missing)).view(-1, 8)
    return (octet_bits << place).sum(1, dtype=torch.uint8)


def from_bits(data: Tensor, width: int, count: int) -> Tensor:
    """Unpack the numbers that `to_bits` packed.

    data: uint8 [bytes]; codes of 8 bits may also be int8, in any shape.
    width: bits of a number, 1 to 8.
    count: number of packed numbers.

    Returns uint8 [count]; a negative number comes back as number modulo 2^width.
    """
    if width == 8:
        return data.flatten().view(torch.uint8)[:count]
    if width == 4:
        low, high = data & 15, data >> 4
        return torch.stack([low, high], 1).flatten()[:count]
    missing = -len(data) % width
    chunks = F.pad(data, (0, missing)).view(-1, width)  # 8 numbers fill `width` bytes
    mask = 2**width - 1
    numbers = data.new_empty(len(chunks), 8)
    for index in range(8):
        byte, low = divmod(index * width, 8)
        number = chunks[:, byte] >> low
        if low + width > 8:
            next_byte = chunks[:, byte + 1]
            number = number | next_byte << 8 - low
        numbers[:, index] = number & mask
    return numbers.flatten()[:count]
