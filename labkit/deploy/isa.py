"""The same function with fewer of the CPU's instructions: oneDNN and OpenVINO, capped at one step after another.

A cap has to be set before the library is loaded, so each rung of the ladder runs in a new process (ONEDNN_MAX_CPU_ISA,
see oneDNN's page "CPU Dispatcher Control"). Libraries beside oneDNN, such as MKL's float32 products or ONNX Runtime,
ignore the cap: a baseline for the rest.
"""

import marshal
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from typing import Any

import torch

from labkit.errors import InputError, LabError, check_choice
from labkit.files import child_environment
from labkit.timing.machine import fingerprint

RUNGS = {  # of x86, each with all rungs before: name of the cap, and the feature that the CPU has to have
    "AVX2": "avx2",
    "AVX512_CORE": "avx512",
    "AVX512_CORE_VNNI": "vnni",
    "AVX512_CORE_BF16": "bf16",
    "AVX512_CORE_AMX": "amx",
}

_CHILD = """
import builtins, marshal, pickle, sys, types
code, defaults, args, path = pickle.load(sys.stdin.buffer)
function = types.FunctionType(marshal.loads(code), {"__builtins__": builtins}, "function", defaults)
result = function(*args)
with open(path, "wb") as file:
    pickle.dump(result, file)
"""


def ladder(
    function: Callable[..., Any], *args: Any, names: Collection[str] = tuple(RUNGS), timeout_s: float = 300
) -> dict[str, Any]:
    """Call `function(*args)` on each rung of this CPU, the lowest first, and return the results by rung.

    function, args: see `apart`.
    names: names of the rungs to climb, rows of RUNGS. A rung takes a process, and seconds to import torch.
    timeout_s: limit of a rung, in seconds.
    Raises InputError also on a CPU that is no x86.
    """
    for name in names:
        check_choice(name, RUNGS, "rung")
    has_rung = rungs()
    if not any(has_rung.values()):
        raise InputError("This CPU has no AVX2: the rungs are those of x86, so leave the ladder out here.")
    results = {}
    for name, is_here in has_rung.items():
        if is_here and name in names:
            results[name] = apart(function, *args, timeout_s=timeout_s, ONEDNN_MAX_CPU_ISA=name)
    return results


def rungs() -> dict[str, bool]:
    """Tell for each rung if this CPU has it and all rungs below."""
    features = fingerprint("cpu").features
    table = {}
    has_all = True
    for name, feature in RUNGS.items():
        has_all = has_all and feature in features
        table[name] = has_all
    return table


def apart(function: Callable[..., Any], *args: Any, timeout_s: float = 300, **environment: str) -> Any:
    """Call `function(*args)` in a new process with these environment variables, and return the result.

    function: a function of a module or a notebook. Only the code of its body is sent: the body imports the modules
        that it uses, and closes over no variable. args and the result are pickled.
    timeout_s: seconds until the process is stopped.
    The process has as many threads as torch here.
    Raises InputError for a function that needs more than its body, LabError with the last line of the process's error
    if the function fails.
    """
    process_name = " ".join(environment.values()) or "The process"
    code = _body(function)
    environment = child_environment(**environment, OMP_NUM_THREADS=str(torch.get_num_threads()))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "result")
        try:
            sent = pickle.dumps((code, function.__defaults__, args, path))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(f"The arguments cannot be sent to a process ({error}): give what pickles.") from None
        try:
            child = subprocess.run(
                [sys.executable, "-c", _CHILD],
                input=sent,
                env=environment,
                capture_output=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"{process_name} took more than {timeout_s:g} s: make the work smaller.") from None
        if child.returncode:
            lines = child.stderr.decode(errors="replace").strip().splitlines()
            last = lines[-1] if lines else "no word of why"
            raise LabError(f"{process_name} ended with code {child.returncode}: {last}")
        with open(path, "rb") as file:
            return pickle.load(file)


def _body(function: Callable[..., Any]) -> bytes:
    """Return the marshalled code of a function."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_freevars:
        around = "a function" if code is None else f"what it closes over ({', '.join(code.co_freevars)})"
        raise InputError(f"{function!r} cannot be sent to a process without {around}: give it as arguments.")
    return marshal.dumps(code)
