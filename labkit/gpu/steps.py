"""Everything that needs a GPU, in one command: tests, lessons at `full`, benchmarks, within minutes, and resumable.

Each step is a program of its own with a time limit and a log. A failing step stops no other one; what does not fit
into the time that remains is left for the next call; what is done is not done again while code and GPU stay the same.
Results are packed after every step (labkit.gpu.packing), so that a machine that is taken away takes little with it.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from labkit import needs, paths, store
from labkit.atomic import replacing
from labkit.errors import InputError
from labkit.gpu import packing, trips

SCHEMA = "labkit.gpu/1"
PACKING_S = 15.0  # kept free at the end
GRACE_S = 15.0  # for a step that is told to end, before it is killed
BENCHMARKS = {"gemm": 600.0, "bert": 240.0, "llama": 240.0}  # workloads of benchmarks/nm_gpu.py: limit in seconds
_MARKED = re.compile(r"^@pytest\.mark\.gpu$", re.MULTILINE)
DONE, FAILED, CUT_OFF, LEFT = "done", "failed", "cut off", "left"


@dataclass(frozen=True)
class Step:
    """A program to run: it is begun where at least `least_s` seconds remain, and ended after `limit_s`.

    models: what has to lie in the cache. A report (nvidia-smi, the doctor) is made at every call and cannot fail.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    least_s: float
    models: tuple[str, ...] = ()
    report: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a step ended: done, failed, cut off (its time was over) or left (not begun), after how long, and why."""

    step: str
    state: str
    seconds: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        return f"{self.state:8}{self.step:16}{self.seconds:6.0f} s  {self.note}".rstrip()


@dataclass
class State:
    """What has been done for one state of the code on one machine; `save` writes it whole."""

    key: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path, key: str) -> "State":
        """What `file` holds for `key`; nothing where it is of other code or another GPU, or cannot be read."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["key"] == key:
                return cls(key, {row["step"]: Outcome(**row) for row in kept["steps"]})
        return cls(key)

    def save(self, file: Path) -> None:
        rows = [asdict(one) for one in self.outcomes.values()]
        with replacing(file) as partial:
            partial.write_text(json.dumps({"schema": SCHEMA, "key": self.key, "steps": rows}, indent=1), "utf-8")


# the steps ----------------------------------------------------------------------------------------


def steps(out: Path) -> list[Step]:
    """All steps in order: what this machine is, the tests, the lessons, their stable cells, the benchmarks."""
    from labkit.session import BUDGETS  # imports torch

    labkit, pytest = (sys.executable, "-m", "labkit.cli"), (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
    tests = sorted((paths.ROOT / "tests").glob("test_*.py"))
    with_gpu = [str(file) for file in tests if _MARKED.search(file.read_text(encoding="utf-8"))]
    found = [
        Step("nvidia-smi", ("nvidia-smi",), 30, 5, report=True),
        Step("doctor", (*labkit, "doctor"), 60, 10, report=True),
        Step("tests", (*pytest, "-m", "gpu", f"--junitxml={out / 'tests.xml'}", *with_gpu), 600, 60),
    ]
    lessons, full, smoke = needs.every(), BUDGETS["full"].seconds, BUDGETS["smoke"].seconds
    for one in lessons:
        run = ("run", one.lesson, "--preset", "full", "--device", "cuda", "--record", "--out", str(out / "runs"))
        found.append(Step(f"lesson {one.lesson}", (*labkit, *run), 1.5 * full, full / 3, one.models))
    for one in lessons:
        chosen = f"(stable_cells or learner) and {one.lesson}_"
        said = f"--junitxml={out / f'stable-{one.lesson}.xml'}"
        command = (*pytest, str(paths.ROOT / "tests" / "test_notebooks.py"), "-k", chosen, said)
        found.append(Step(f"stable cells {one.lesson}", command, 4 * smoke, smoke, one.models))
    for workload, limit in BENCHMARKS.items():
        command = (sys.executable, str(paths.ROOT / "benchmarks" / "nm_gpu.py"), "--workloads", workload)
        told = ("--budget", "1", "--json", str(out / f"2-4-{workload}.json"))
        found.append(Step(f"2:4 {workload}", (*command, *told), limit, limit / 3))
    return found


def require_gpu() -> None:
    """InputError where torch sees no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            f"torch {torch.__version__} sees no CUDA device here, and nothing was run; `labkit doctor` says why, "
            "`labkit gpu --plan` what would run."
        )


def key() -> str:
    """What results depend on: labkit, lessons, tests and benchmarks as they stand, and the machine."""
    from labkit.fingerprint import fingerprint

    digest = hashlib.sha256(fingerprint().slug.encode())
    for folder, pattern in (("labkit", "**/*.py"), ("notebooks", "*.ipynb"), ("tests", "*.py"), ("benchmarks", "*.py")):
        for file in sorted((paths.ROOT / folder).glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


# running them -------------------------------------------------------------------------------------


def run(
    todo: Sequence[Step],
    out: Path,
    minutes: float,
    *,
    state: State,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run what is not done yet and fits into `minutes`; the outcomes of all steps, in order.

    After every step the state is saved and the results are packed into `out`. KeyboardInterrupt ends the step under way
    and all that it started; what was done before stays done.
    """
    ends = time.monotonic() + 60 * minutes - PACKING_S
    outcomes = []
    for step in todo:
        before = state.outcomes.get(step.name)
        if before and before.state == DONE and not step.report:
            outcomes.append(Outcome(step.name, DONE, before.seconds, "by an earlier call"))
            continue
        remaining = ends - time.monotonic()
        if reason := _obstacle(step, before, remaining):
            outcomes.append(Outcome(step.name, LEFT, 0.0, reason))
            say(str(outcomes[-1]))
            continue
        say(f"{'begins':8}{step.name}, {min(step.limit_s, remaining):.0f} s at most")
        outcome = _run_one(step, out, min(step.limit_s, remaining), say)
        say(str(outcome))
        outcomes.append(outcome)
        state.outcomes[step.name] = outcome
        state.save(out / "state.json")
        pack(out)
    return outcomes


def plan(todo: Sequence[Step], state: State, seconds: float) -> Iterator[str]:
    """A line a step: its limit, and whether it is done, would run, or what is in its way."""
    for step in todo:
        before = state.outcomes.get(step.name)
        done = before and before.state == DONE and not step.report
        says = "done" if done else _obstacle(step, before, seconds) or "would run"
        yield f"{step.name:16} at most {step.limit_s:5.0f} s  {says}"
    yield f"{'together':16} at most {sum(step.limit_s for step in todo):5.0f} s, in as many calls as it takes"


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """1 where a step failed, 3 where some are left or were cut off, else 0."""
    states = {one.state for one in outcomes}
    return 1 if FAILED in states else 3 if states & {LEFT, CUT_OFF} else 0


def _obstacle(step: Step, before: Outcome | None, remaining: float) -> str:
    """Why a step is not begun now; "" where nothing is in its way."""
    if lacking := [name for name in step.models if not store.is_ready(name)]:
        return f"needs {', '.join(lacking)}, not in the cache yet"
    least = step.least_s
    if before and before.state == CUT_OFF:  # it would only be cut off again
        least = max(least, min(step.limit_s, before.seconds + 1))
    return f"needs {least:.0f} s, {max(remaining, 0):.0f} s remain" if remaining < least else ""


def _run_one(step: Step, out: Path, seconds: float, say: Callable[[str], None]) -> Outcome:
    """One step in a session of its own, its output in a log; cut off or interrupted, nothing that it started stays."""
    log = out / "logs" / f"{step.name.replace(' ', '-').replace(':', '')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with open(log, "wb") as sink:
        in_order = {**os.environ, "PYTHONUNBUFFERED": "1"}  # else what was printed comes after the error that ended it
        try:
            child = subprocess.Popen(
                step.command,
                cwd=paths.ROOT,
                env=in_order,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(step.name, DONE if step.report else FAILED, 0.0, f"{step.command[0]}: {error.strerror}")
        try:
            ended = _wait(
                child, began + seconds, lambda: say(f"        {time.monotonic() - began:4.0f} s  {_last(log)}")
            )
        finally:
            _end(child)
    took = round(time.monotonic() - began, 1)
    if step.report:
        say(log.read_text(encoding="utf-8", errors="replace").rstrip())
        return Outcome(step.name, DONE, took)
    if not ended:
        return Outcome(step.name, CUT_OFF, took, f"after {seconds:.0f} s: {_last(log)}")
    return Outcome(step.name, FAILED if child.returncode else DONE, took, _last(log) if child.returncode else "")


def _wait(child: subprocess.Popen, until: float, still: Callable[[], None]) -> bool:
    """Whether it ended in time; a sign of life every half minute."""
    while (remaining := until - time.monotonic()) > 0:
        with suppress(subprocess.TimeoutExpired):
            child.wait(min(30.0, remaining))
            return True
        if remaining > 30:
            still()
    return False


def _end(child: subprocess.Popen) -> None:
    """Ask the process to end, give it time to put things in order, then kill it and all that it started."""
    with suppress(psutil.NoSuchProcess):
        tree = psutil.Process(child.pid).children(recursive=True)
        if child.poll() is None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_S)
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    if child.poll() is None:
        child.kill()
    child.wait()


def _last(log: Path) -> str:
    """The last line of a log that says something."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip()[:160] for line in reversed(lines) if line.strip(" =-_")), "")


# what comes back ----------------------------------------------------------------------------------


def pack(out: Path) -> packing.Packed:
    """The results so far as results-1.zip, ... in `out`."""
    return packing.pack(results(out), out)


def packed(out: Path) -> Iterator[str]:
    """What pack(out) gives, in words."""
    made = pack(out)
    for part in made.parts:
        yield f"packed  {part}  {part.stat().st_size / 1e6:.1f} MB"
    yield from (f"left out  {reason}" for reason in made.left_out)


def results(out: Path) -> Iterator[tuple[str, Path]]:
    """What has to come back, the most important first: records, state and test results, notebooks, logs.

    A record is the newest of its lesson in `out` (data/recorded/ may be laid anew between calls), under the name that
    it has in data/recorded/.
    """
    records: dict[str, Path] = {}
    for file in sorted(out.glob("runs/*/full-*/record.json"), key=lambda file: file.stat().st_mtime):
        if not file.parent.name.endswith("-failed"):
            kept = json.loads(file.read_text(encoding="utf-8"))
            records[f"recorded/{kept['machine']['slug']}/{kept['lesson']}.json"] = file
    yield from sorted(records.items())
    top = [*out.glob("state.json"), *sorted(out.glob("*.xml")), *sorted(out.glob("2-4-*.json"))]
    runs = [*sorted(out.glob("runs/*/*/run.json")), *sorted(out.glob("runs/*/*/*.ipynb"))]
    logs = [*sorted(out.glob("runs/*/*/log.txt")), *sorted(out.glob("logs/*.log"))]
    yield from ((f"gpu/{file.relative_to(out).as_posix()}", file) for file in [*top, *runs, *logs])


def take(folder: Path, out: Path) -> list[Path]:
    """Put results that were packed on another machine, or by an earlier call, into their places; the files written.

    Records go to data/recorded/, the rest to `out`. All parts are checked before anything is written.
    """
    found = [packing.unpack(part) for part in sorted(folder.glob("results-*.zip"))]
    places = {"recorded": paths.RECORDED, "gpu": out}
    written = []
    for name, contents in (item for part in found for item in part.items()):
        head, _, rest = name.partition("/")
        if head in places:
            written.append(places[head] / rest)
            with replacing(written[-1]) as partial:
                partial.write_bytes(contents)
    return written


def environment() -> None:
    """Make this process's labkit and the packages that were brought what every step imports."""
    trips.activate()
    known = [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    if str(paths.ROOT) not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(paths.ROOT), *known])
