"""python -m pretend.trials FOLDER SEED NUMBER: plant faults in the copy of labkit in FOLDER, and see which are seen.

For each fault it prints a line of JSON: fault, seen_by (the name of a call, or null), complaint. A fault that raises on
the CPU of a machine without a GPU is one that any test shows: it does not count, and another is drawn. A trial is a
fork of this process, which has imported what takes long and has no device; the fork installs the device if need be.
"""

import importlib
import json
import os
import random
import resource
import sys
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers.models.bert.modeling_bert
import transformers.models.llama.modeling_llama  # noqa: F401

from pretend import device, faults

CPU_SECONDS = 900  # of a fork at most
FROM_COPY = ("labkit", "families", "networks")  # modules, and those of this folder that import them


def main(folder: Path, seed: int, number: int) -> None:
    """Print a line for each fault; the kinds take turns, and the seed draws the places."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.dont_write_bytecode = True
    parted = in_child(lambda: survey(folder))
    draw = random.Random(seed)
    for turn in range(number):
        kind = sorted(parted)[turn % len(parted)]
        fault, names = drawn(parted[kind], draw)
        seen_by, complaint = trial(fault, names)
        print(json.dumps({"fault": str(fault), "seen_by": seen_by, "complaint": complaint}), flush=True)


def survey(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """List all possible faults by kind, each with the calls that reach it."""
    device.install()
    calls, _ = imported(folder)
    rows: dict[faults.Fault, list[str]] = defaultdict(list)
    for name, call in calls.CALLS.items():
        torch.manual_seed(0)
        reached = faults.reached_by(lambda call=call: call(calls.Device("cuda")), folder / "labkit")
        for file in sorted({file for file, _ in reached.lines}):
            for fault in faults.possible(file, reached):
                rows[fault].append(name)
    parted = defaultdict(list)
    for fault, names in rows.items():
        parted[fault.kind].append({"fault": vars(fault), "calls": names})
    return parted


def drawn(rows: list[dict[str, Any]], draw: random.Random) -> tuple[faults.Fault, list[str]]:
    """Draw a fault that does not raise on the CPU, with its calls; what was drawn leaves `rows`."""
    while True:
        row = rows.pop(draw.randrange(len(rows)))
        fault = faults.Fault(**row["fault"])
        if not raises_on_cpu(fault, row["calls"]):
            return fault, row["calls"]


def raises_on_cpu(fault: faults.Fault, names: list[str]) -> bool:
    """Say if one of the calls raises with the fault on the CPU, on a machine without a device."""
    with planted(fault):
        return in_child(lambda: any_call_raises(fault, names))


def trial(fault: faults.Fault, names: list[str]) -> tuple[str | None, str]:
    """Return the first call that shows the fault on the device, and its complaint; (None, "") if none does."""
    with planted(fault):
        return in_child(lambda: first_complaint(fault, names))


@contextmanager
def planted(fault: faults.Fault) -> Iterator[None]:
    file = Path(fault.file)
    source = file.read_text(encoding="utf-8")
    file.write_text(fault.plant(source), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(source, encoding="utf-8")


def any_call_raises(fault: faults.Fault, names: list[str]) -> bool:
    calls, _ = imported(copy_of(fault))
    for name in names:
        torch.manual_seed(0)
        try:
            calls.CALLS[name](calls.Device("cpu"))
        except Exception:
            return True
    return False


def first_complaint(fault: faults.Fault, names: list[str]) -> tuple[str | None, str]:
    device.install()
    calls, tests = imported(copy_of(fault))
    for name in names:
        try:
            complaint = tests.complaint(name, calls.CALLS[name])
        except Exception as error:
            complaint = f"{type(error).__name__}: {error}"
        if complaint:
            return name, complaint[:200]
    return None, ""


def copy_of(fault: faults.Fault) -> Path:
    """Return the folder whose labkit has the fault."""
    return next(parent.parent for parent in Path(fault.file).parents if parent.name == "labkit")


def imported(folder: Path) -> tuple[ModuleType, ModuleType]:
    """Import labkit from a folder, and the calls with it, in place of the labkit that compiled the device."""
    for name in list(sys.modules):
        if name.partition(".")[0] in FROM_COPY:
            del sys.modules[name]
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("labkit")]
    sys.path.insert(0, str(folder))
    return importlib.import_module("pretend.calls"), importlib.import_module("pretend.test_calls")


def in_child(work: Callable[[], Any]) -> Any:
    """Do work in a fork, and return its result by way of JSON; RuntimeError if the fork ends without."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        try:
            with os.fdopen(writer, "w") as pipe:
                json.dump(work(), pipe)
        except Exception:
            traceback.print_exc()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError("A trial ended without a result.")
    return json.loads(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
