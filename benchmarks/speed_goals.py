"""Goals of speed beside their peers, each over five fresh processes, as the table in benchmarks/README.md.

    python benchmarks/speed_goals.py --folder DIR                  measures and records all, and writes the table
    python benchmarks/speed_goals.py --folder DIR --parts sparse   some parts; those recorded before stay
    python benchmarks/speed_goals.py --table                       the table alone, of the records that are there

A part is a benchmark of this folder, run five times on one thread; its rows lie in DIR, and the same command goes on
where it stopped. A ratio is the peer's time over labkit's: the median of the processes, with their range. The record of
a chip is data/recorded/<chip>/speed_goals.json, and a chip without a record has empty cells. Wants an idle machine, and
timm, Torch-Pruning and DeepSparse for the peers: deepsparse_mlp.py says how to install the last, for which
`--deepsparse` names the Python of its own environment.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from labkit import files, machine
from labkit.lesson.origin import origin

HERE = Path(__file__).parent
README = HERE / "README.md"
RECORD = "speed_goals.json"
PROCESSES = 5
WIDTH, LAYERS = 2048, 4  # of the sparse network
DENSE = {(64, 0.5): 2.0, (64, 0.8): 4.3, (64, 0.9): 8.0, (64, 0.95): 13.0, (1, 0.9): 7.0}  # goals by (batch, sparsity)
AT_LEAST_AS_FAST = 1.0
INTEGERS = 0.98

Ratios = dict[tuple[str, str], float | None]  # {(row, peer): the peer's time over labkit's, None if one has no result}


class Part(NamedTuple):
    """A benchmark that measures some goals.

    title: heading of the part's table.
    command: the script and its options, but for `file_option` and the file of a process.
    ratios: reads the file.
    least: the goal of (row, peer).
    """

    title: str
    command: tuple[str, ...]
    file_option: str
    ratios: Callable[[Path], Ratios]
    least: Callable[[str, str], float | None]


# --- the parts --------------------------------------------------------------------------------------------------------


def sparse_row(batch: int, sparsity: float) -> str:
    return f"batch {batch}, {sparsity:.0%} zeros"


def sparse_ratios(path: Path) -> Ratios:
    """Dense torch over labkit's kernel, and each engine over it by way of dense torch in the same process."""
    speedups = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        speedups[row["batch"], row["sparsity"], row["engine"]] = row["speed-up"]
    ratios = {}
    for (batch, sparsity, engine), speedup in speedups.items():
        row = sparse_row(batch, sparsity)
        ours = speedups[batch, sparsity, "labkit kernel"]
        if engine == "labkit kernel":
            ratios[row, "dense torch"] = ours
        else:
            ratios[row, engine] = ours / speedup
    return ratios


def sparse_least(row: str, peer: str) -> float | None:
    if peer != "dense torch":
        return AT_LEAST_AS_FAST
    goals = {sparse_row(*case): least for case, least in DENSE.items()}
    return goals.get(row)


def lines(path: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def integer_ratios(path: Path) -> Ratios:
    return {(row["network"], "faster of float32 and bfloat16"): row["pays"][0] for row in lines(path) if "pays" in row}


def pruning_ratios(path: Path) -> Ratios:
    return {(row["network"], "Torch-Pruning"): row.get("ratio") for row in lines(path)}


SPARSE_OPTIONS = ("--width", str(WIDTH), "--layers", str(LAYERS), "--budget", "1.5")
PARTS = {
    "sparse": Part(
        f"Sparse kernel: {LAYERS} layers of {WIDTH} x {WIDTH}",
        ("deepsparse_mlp.py", *SPARSE_OPTIONS),
        "--json",
        sparse_ratios,
        sparse_least,
    ),
    "integers": Part(
        'Integers where they pay: `integer.convert(where="pays")` at batch 1',
        ("int8_where_it_pays.py", "--budget", "1.5"),
        "--results",
        integer_ratios,
        lambda row, peer: INTEGERS,
    ),
    "pruning": Part(
        "Half of the channels cut: `channels.prune` with its proof, beside a cut without a proof",
        ("prune_and_prove.py",),
        "--results",
        pruning_ratios,
        lambda row, peer: AT_LEAST_AS_FAST,
    ),
}


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(name: str, folder: Path, python: str, processes: int) -> list[dict[str, Any]]:
    """Run a part in as many processes as are missing in `folder`, and return the rows of its record."""
    part = PARTS[name]
    ratios: dict[tuple[str, str], list[float | None]] = {}
    for number in tqdm(range(processes), desc=name, unit="process"):
        path = folder / f"{name}-{number}.json"
        finished = folder / f"{name}-{number}.finished"
        if not finished.exists():
            run(part, path, python)
            finished.touch()
        for key, ratio in part.ratios(path).items():
            ratios.setdefault(key, []).append(ratio)
    return [recorded_row(name, *key, values) for key, values in ratios.items()]


def run(part: Part, path: Path, python: str) -> None:
    script, *options = part.command
    command = [python, str(HERE / script), *options, part.file_option, str(path)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def recorded_row(part: str, row: str, peer: str, ratios: list[float | None]) -> dict[str, Any]:
    """A row of the record: "ratio" is the median; without it where labkit or the peer gave no result in a process."""
    recorded = {"part": part, "row": row, "peer": peer, "least": PARTS[part].least(row, peer), "processes": len(ratios)}
    if None in ratios:
        return recorded
    ends = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return recorded | {name: round(end, 3) for name, end in ends.items()}


def record(rows: list[dict[str, Any]], parts: list[str]) -> None:
    """Write the rows of some parts into this chip's record; the rows of all other parts stay."""
    here = machine.fingerprint("cpu")
    path = files.RECORDED / here.slug / RECORD
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    stay = [row for row in before if row["part"] not in parts]
    text = json.dumps({"machine": here.label, "torch": here.torch, **origin(), "rows": stay + rows}, indent=1)
    files.write_text(path, text + "\n")


# --- the table --------------------------------------------------------------------------------------------------------


def records() -> dict[str, Mapping[str, Any]]:
    """The records, {machine: record}; a chip on which lessons were recorded and no goal has None."""
    of_machine = {}
    for folder in sorted(files.RECORDED.iterdir()):
        path = folder / RECORD
        if path.exists():
            of_machine[folder.name] = json.loads(path.read_text(encoding="utf-8"))
        elif any(folder.glob("[0-9][0-9].json")):
            of_machine[folder.name] = {"rows": []}
    return of_machine


def cell(row: Mapping[str, Any]) -> str:
    if "ratio" not in row:
        return "no model that runs within a minute"
    verdict = "" if row["least"] is None or row["ratio"] >= row["least"] else " (missed)"
    if row["processes"] == 1:
        return f"{row['ratio']:.2f}, one process{verdict}"
    ends = f"{row['low']:.2f} to {row['high']:.2f}"
    if row["processes"] != PROCESSES:
        ends += f", {row['processes']} processes"
    return f"{row['ratio']:.2f} ({ends}){verdict}"


def table(name: str, by_machine: Mapping[str, Mapping[str, Any]]) -> str:
    """A part's table in Markdown: a row for each measured thing and peer, a column for each machine."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for chip, record_of_chip in by_machine.items():
        for row in record_of_chip["rows"]:
            if row["part"] != name:
                continue
            goal = "" if row["least"] is None else f"{row['least']:g}"
            start = {"measured": row["row"], "peer": row["peer"], "goal": goal}
            cells = rows.setdefault((row["row"], row["peer"]), start)
            cells[chip] = cell(row)
    if not rows:
        return "Not recorded yet.\n"
    columns = ["measured", "peer", "goal", *by_machine]
    lines = [columns, ["---"] * len(columns)]
    for cells in rows.values():
        lines.append([cells.get(column, "") for column in columns])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def readme() -> str:
    by_machine = records()
    text = [
        "# Goals of speed, beside their peers\n",
        "Written by `python benchmarks/speed_goals.py`, which says how each part is measured. A ratio is the peer's\n"
        "time over labkit's: the median of five processes on one thread, with their range, unless a cell says\n"
        "otherwise. An empty cell was not measured.\n",
    ]
    for name, part in PARTS.items():
        text += [f"## {part.title}\n", table(name, by_machine)]
    text.append("## Machines\n")
    for chip, record_of_chip in by_machine.items():
        if record_of_chip["rows"]:
            date = record_of_chip["created"][:10]
            text.append(f"- `{chip}`: {record_of_chip['machine']}, torch {record_of_chip['torch']}, {date}")
        else:
            text.append(f"- `{chip}`: not measured yet")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keeps the rows of finished processes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--deepsparse", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        if options.folder is None:
            parser.error("name a folder for the rows: --folder DIR")
        options.folder.mkdir(parents=True, exist_ok=True)
        for name in options.parts:
            python = options.deepsparse if name == "sparse" else sys.executable
            record(measure(name, options.folder, python, options.processes), [name])
    files.write_text(README, readme())


if __name__ == "__main__":
    main()
