"""The machine: fingerprint, measured ceilings, and a catalogue of accelerators to compare with.

Look for the code in
- `fingerprint.py`: the facts behind a result, and the device, threads and memory of the process;
- `roofs.py`: the catalogue DEVICES, and the class of measured ceilings;
- `ceilings.py`: measuring the ceilings and the bandwidth of the caches.
"""

from labkit.on_demand import names_on_demand
from labkit.timing.fingerprint import (
    FEATURES,
    Gpu,
    Machine,
    fingerprint,
    memory_bytes,
    on_threads,
    threads,
    torch_device,
)
from labkit.timing.roofs import DEVICES, Ceilings, Device

__all__ = [
    "DEVICES",
    "FEATURES",
    "Ceilings",
    "Device",
    "Gpu",
    "Machine",
    "fingerprint",
    "memory_bytes",
    "on_threads",
    "threads",
    "torch_device",
]

__getattr__ = names_on_demand(  # measuring is loaded by the lessons that measure ceilings
    __name__,
    {"ceilings": "labkit.timing.ceilings", "bandwidth_sweep": "labkit.timing.ceilings"},
)
