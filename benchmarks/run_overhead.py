"""What a run costs beside papermill alone: the same trivial notebook, in turn, as wall seconds.

    python benchmarks/run_overhead.py                  8 rounds
    python benchmarks/run_overhead.py --rounds 20

"papermill" is `python -m papermill`; "run.run" is called in a process that is there already, as for each point of a
sweep; "labkit run" is the whole command in a fresh process, which also writes the report. Differences are taken in each
round, so that what the machine does meanwhile hits both; the median has its exact 95 % interval. Wants an idle machine.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook
from tqdm import tqdm

from course import run
from labkit import files, stats

COMMAND = "import sys, pathlib, course.cli as c; c.files.NOTEBOOKS = pathlib.Path(sys.argv.pop(1)); c.main()"


def ways(folder: Path) -> dict[str, Callable[[], object]]:
    """Three calls that execute one notebook with one parameter, and leave what they made in `folder`."""
    lessons = folder / "notebooks"
    lessons.mkdir()
    (lessons / "claims.toml").write_bytes((files.NOTEBOOKS / "claims.toml").read_bytes())
    parameters = new_code_cell('PRESET = "smoke"\nSEED = 0\nRESULTS_DIR = "."', metadata={"tags": ["parameters"]})
    notebook = lessons / "01_trivial.ipynb"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=[parameters, new_code_cell("SEED + 1")], metadata=kernel), notebook)
    alone = [sys.executable, "-m", "papermill", notebook, folder / "alone.ipynb", "-p", "SEED", "1"]
    whole = [sys.executable, "-c", COMMAND, lessons, "run", "01", "--preset", "smoke", "-p", "SEED", "1"]

    def quietly(command: list, *more: object) -> None:
        subprocess.run([*map(str, command), *map(str, more)], check=True, capture_output=True, cwd=folder)

    def warm() -> None:
        result = run.run(run.prepare(notebook, {"PRESET": "smoke", "SEED": 1}, folder / "runs"))
        assert result.error is None, result.error

    return {
        "papermill": lambda: quietly(alone, "--no-progress-bar"),
        "run.run": warm,
        "labkit run": lambda: quietly(whole, "--out", folder / "runs"),
    }


def measure(calls: Mapping[str, Callable[[], object]], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Seconds of each call by name: each once a round, in random order; a first round is not counted."""
    rng, seconds = random.Random(seed), {name: [] for name in calls}
    for count in tqdm(range(-1, rounds), unit="round", disable=None):
        for name in rng.sample(list(calls), len(calls)):
            began = time.perf_counter()
            calls[name]()
            if count >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def overhead(seconds: Mapping[str, list[float]], name: str) -> tuple[float, float, float]:
    """Median of `name` less papermill over the rounds, in s, and its 95 % interval."""
    return stats.median_ci([a - b for a, b in zip(seconds[name], seconds["papermill"], strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(ways(Path(folder)), rounds)
    for name, values in seconds.items():
        middle, low, high = stats.median_ci(values)
        line = f"{name:12} {middle:6.2f} s [{low:.2f}, {high:.2f}]"
        if name != "papermill":
            more, least, most = overhead(seconds, name)
            ratio = stats.paired_ratio(values, seconds["papermill"])
            line += f"   {more:+.2f} s [{least:+.2f}, {most:+.2f}]   {ratio[0]:.2f}x [{ratio[1]:.2f}, {ratio[2]:.2f}]"
        print(line)


if __name__ == "__main__":
    main()
