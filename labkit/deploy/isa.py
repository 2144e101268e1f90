"""The same function with fewer of the CPU's instructions: oneDNN and OpenVINO, capped at one step after another.

A cap has to be set before the library is loaded, so that each rung is a process of its own (ONEDNN_MAX_CPU_ISA, see
oneDNN's page "CPU Dispatcher Control"). What does not ask oneDNN, such as MKL's float32 products or ONNX Runtime, goes
on as before: a baseline for the rest.
"""

import marshal
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from labkit.errors import InputError, LabError
from labkit.files import child_environment
from labkit.timing.machine import fingerprint

RUNGS = {  # of x86, each with all before it: the cap's name, and the feature that the CPU has to have
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


def ladder(function: Callable[..., Any], *args: Any, timeout_s: float = 300) -> dict[str, Any]:
    """What `function(*args)` returns on each rung that this CPU has, by the rung's name, the lowest first.

    See `apart` for function and args. timeout_s: for a rung. Raises InputError on a CPU that is no x86 as well.
    """
    possible = rungs()
    if not any(possible.values()):
        raise InputError("This CPU has no AVX2: the rungs are those of x86, so leave the ladder out here.")
    return {
        name: apart(function, *args, timeout_s=timeout_s, ONEDNN_MAX_CPU_ISA=name)
        for name, has in possible.items()
        if has
    }


def rungs() -> dict[str, bool]:
    """Whether this CPU has a rung and all below it."""
    features, has, table = fingerprint("cpu").features, True, {}
    for name, feature in RUNGS.items():
        has = has and feature in features
        table[name] = has
    return table


def apart(function: Callable[..., Any], *args: Any, timeout_s: float = 300, **environment: str) -> Any:
    """What `function(*args)` returns in a process of its own, with these variables of the environment.

    function: of a module or a notebook. It is sent without what stands around it: it imports in its body what it uses,
        and closes over nothing. args and result are pickled. It gets as many threads as torch has here.
    Raises InputError for a function that needs more than its body, LabError where it fails, with its last line.
    """
    code, name = getattr(function, "__code__", None), " ".join(environment.values()) or "The process"
    if code is None or code.co_freevars:
        around = "a function" if code is None else f"what it closes over ({', '.join(code.co_freevars)})"
        raise InputError(f"{function!r} cannot be sent to a process without {around}: give it as arguments.")
    environment = child_environment(**environment, OMP_NUM_THREADS=str(torch.get_num_threads()))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "result")
        try:
            sent = pickle.dumps((marshal.dumps(code), function.__defaults__, args, path))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(f"The arguments cannot be sent to a process ({error}): give what pickles.") from None
        try:
            child = subprocess.run(
                [sys.executable, "-c", _CHILD], input=sent, env=environment, capture_output=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"{name} took more than {timeout_s:g} s: make the work smaller.") from None
        if child.returncode:
            last = child.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no word of why"]
            raise LabError(f"{name} ended with code {child.returncode}: {last[0]}")
        with open(path, "rb") as file:
            return pickle.load(file)
