"""Peak memory of this process."""

import re
import sys
from pathlib import Path


def peak_memory() -> int:
    """Return the peak resident bytes of this process.

    On Linux the kernel's VmHWM is read, since ru_maxrss includes the memory of the parent at the start.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    except (OSError, TypeError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
