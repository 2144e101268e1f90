"""Bytes of what would be stored: the table of weight formats, files of whole models, and the compiled kernels.

Open `formats.py` first: it begins with an example, and its tables FORMATS and ROUNDED have a row a format.

formats.py: weights packed, dense, sparse or rounded
artifact.py: the bytes of a model, `labkit.artifact.size`
sell.py: the layout of labkit's sparse kernel
int4.py: linear layers on labkit's int4 kernel
native.py: labkit's C++, compiled
"""

from torch import Tensor

from labkit.bits import to_bits
from labkit.storage.formats import FORMATS, ROUNDED, Format, nbytes

__all__ = ["FORMATS", "ROUNDED", "Format", "nbytes", "pack4"]


def pack4(codes: Tensor) -> Tensor:
    """Return the low four bits of whole numbers, two a byte, the earlier in the lower half: uint8 [ceil(count / 2)]."""
    return to_bits(codes, 4)
