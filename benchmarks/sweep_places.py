"""A sweep on this machine, and the same one on a Dask cluster that loses a worker and the client: are the rows equal?

    python benchmarks/sweep_places.py --out DIR                       lesson 03, 3 x 3 x 3 runs in each place
    python benchmarks/sweep_places.py --out DIR --ratios 0.5 --seeds 1        3 runs in each, a few minutes

Both sweeps do two runs at once, with one thread each: sums are rounded by how threads cut them. The Dask workers are
processes of this machine. After a third of the runs one worker is killed, after two thirds the client, both by SIGKILL;
then the same command is given again. Rows that a clock decided are counted and left out. Exit code 1 where a
row differs or a finished run was done again.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
from distributed import Client, LocalCluster

from course import results

LESSON = "03"
LABKIT = "from course.cli import main; main()"
WORKERS = 2
SIDES = (" here", " there")


def command(options: argparse.Namespace, out: Path, *where: str) -> list[str]:
    """The sweep as a user gives it, its results in `out`."""
    grid = ("-g", f"RATIO={options.ratios}", "-g", f"CRITERION={options.criteria}", "--seeds", options.seeds)
    return [*(sys.executable, "-c", LABKIT, "sweep", LESSON), *grid, "--preset", "smoke", "--out", str(out), *where]


def finished(out: Path) -> dict[str, str]:
    """When each result in `out` was made, by the name of its folder."""
    made = {file.parent.name: json.loads(file.read_text())["created"] for file in out.glob("*/*/run.json")}
    return {name: when for name, when in made.items() if not name.startswith(".")}


def through_kills(sweep: list[str], out: Path, runs: int, cluster: LocalCluster) -> dict[str, str]:
    """Kill a worker, then the client of `sweep`; the results that were there when the client died."""
    with Client(cluster.scheduler_address, set_as_default=False) as client, subprocess.Popen(sweep) as process:
        worker_killed = False
        while process.poll() is None and (done := len(finished(out))) < 2 * runs // 3:
            if not worker_killed and done >= runs // 3:
                os.kill(min(client.run(os.getpid).values()), signal.SIGKILL)
                worker_killed = True
                print(f"killed a worker after {done} runs")
            time.sleep(1)
        assert process.poll() is None and worker_killed, "the sweep ended before it could be killed"
        process.kill()
        print(f"killed the client after {done} runs")
        return finished(out)


def compare(local: Path, dask: Path) -> bool:
    """Print how many rows there are in both places and which differ; whether none does."""
    tables = [results.rows([folder]) for folder in (local, dask)]
    steady = [table[~table["clock"]] for table in tables]
    keys = [name for name in tables[0] if name not in ("value", "low", "high", "text")]
    both = pd.merge(*steady, on=keys, how="outer", indicator=True, suffixes=SIDES, validate="one_to_one")
    same = both["_merge"] == "both"
    for name in ("value", "low", "high", "text"):
        here, there = (both[name + side] for side in SIDES)
        same &= (here == there) | (here.isna() & there.isna())
    print(f"{len(tables[0])} and {len(tables[1])} rows; {len(both)} that no clock decided, {same.sum()} of them equal")
    if not same.all():
        print(both[~same].to_string())
    return bool(same.all()) and len(both) > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder for the results of both sweeps")
    parser.add_argument("--ratios", default="0.3,0.5,0.7")
    parser.add_argument("--criteria", default="l1,l2,fpgm")
    parser.add_argument("--seeds", default="3")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} is there already; choose a new folder, as what is done is not run again")
    local, dask = options.out / "local", options.out / "dask"
    os.environ["OMP_NUM_THREADS"] = "1"

    began = time.perf_counter()
    subprocess.run(command(options, local, "--workers", str(WORKERS)), check=True)
    print(f"local: {time.perf_counter() - began:.0f} s")
    with LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None) as cluster:
        sweep = command(options, dask, "--on", cluster.scheduler_address)
        before = through_kills(sweep, dask, len(finished(local)), cluster)
        subprocess.run(sweep, check=True)
    again = [name for name, when in before.items() if finished(dask).get(name) != when]
    print(f"done again: {len(again)} of the {len(before)} runs that had ended when the client was killed")
    sys.exit(not compare(local, dask) or bool(again))


if __name__ == "__main__":
    main()
