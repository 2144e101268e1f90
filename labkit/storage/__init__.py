"""Bytes of what would be stored: the table of weight formats, files of whole models, and the compiled kernels.

FORMATS and ROUNDED list the formats; `labkit.artifact.size` gives the bytes of a model.
"""

from labkit.bits import pack4
from labkit.storage.formats import FORMATS, ROUNDED, Format, nbytes

__all__ = ["FORMATS", "ROUNDED", "Format", "nbytes", "pack4"]
