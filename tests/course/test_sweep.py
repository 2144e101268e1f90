import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import commands
import psutil
import pytest
from click.testing import Result
from commands import alive, wait_until

from course import sweep
from labkit.errors import InputError

SMOKE = {"PRESET": "smoke"}
RANGES = {"RATIO": [0.0, 1.0]}

# A run that leaves a mark, says which GPU it got, and waits where the folder holds `hold` until that is gone.
WORK = """
import json, os, pathlib, time
home = pathlib.Path({home!r})
began = time.time()
_ = (home / f"{{RATIO}}-{{SEED}}-{{os.getpid()}}.started").write_text(f"{{os.getpid()}} {{os.getppid()}}")
while (home / f"hold-{{RATIO}}-{{SEED}}").exists():
    time.sleep(0.05)
gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
record = {{"gpu": gpu, "threads": os.environ.get("OMP_NUM_THREADS"), "began": began, "ended": time.time()}}
(pathlib.Path(RESULTS_DIR) / "01").mkdir()
_ = (pathlib.Path(RESULTS_DIR) / "01" / "record.json").write_text(json.dumps(record))
assert RATIO != 0.9, "too much"
"""


@pytest.fixture
def home(empty_course: Path, write_lesson: Callable[..., Path]) -> Path:
    """A course with one lesson; what runs mark lies in it too."""
    write_lesson(empty_course / "notebooks", WORK.format(home=str(empty_course)), ranges=RANGES)
    return empty_course


@pytest.fixture
def lesson(home: Path) -> Path:
    return home / "notebooks" / "01_small.ipynb"


def labkit(home: Path, *arguments: object) -> Result:
    return commands.labkit("sweep", "1", "--out", home / "runs", *arguments)


def started(home: Path, *arguments: object) -> subprocess.Popen:
    return commands.started(home / "notebooks", "sweep", "1", "--out", home / "runs", *arguments)


def results(home: Path) -> dict[str, str]:
    """The result folders and when each was made; hidden ones are runs under way."""
    made = {file.parent.name: json.loads(file.read_text())["created"] for file in home.glob("runs/01_small/*/run.json")}
    return {name: when for name, when in made.items() if not name.startswith(".")}


def marks(home: Path, ratio: float) -> list[list[int]]:
    """Process ids of the kernel and of the process that runs it, for each start of a run at `ratio`."""
    texts = [file.read_text() for file in home.glob(f"{ratio}-*.started")]
    return [[int(word) for word in text.split()] for text in texts if " " in text]


def parent_of_run(home: Path, ratio: float) -> int:
    """The process that called course.run.run for the first run at `ratio`."""
    return psutil.Process(marks(home, ratio)[0][1]).ppid()


def folders(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "runs" / "01_small").iterdir())


# the points


def test_a_grid_is_all_combinations_and_the_whole_of_it_comes_at_the_first_seed(lesson: Path, tmp_path: Path):
    grid = sweep.parse(["RATIO=0.25, 0.75", "DEVICE=auto,cpu"])
    jobs = sweep.plan(lesson, grid, {**SMOKE, "SEED": "7"}, seeds=2, out=tmp_path)
    points = [f"RATIO {ratio}, DEVICE {device}" for ratio in (0.25, 0.75) for device in ("auto", "cpu")]
    assert [job.label for job in jobs] == [f"SEED {seed}, {point}" for seed in (7, 8) for point in points]
    assert jobs[1].parameters == {"PRESET": "smoke", "SEED": 7, "RATIO": 0.25, "DEVICE": "cpu", "RESULTS_DIR": "."}
    assert all(job.source is jobs[0].source for job in jobs)


def test_commas_inside_brackets_part_no_values():
    assert sweep.parse(["A=[1,2],[3]", "B=x"]) == {"A": ["[1,2]", "[3]"], "B": ["x"]}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "There is nothing to sweep over; give -g NAME=VALUE,VALUE or --seeds N."),
        (("-g", "RATIO"), "'RATIO' is no part of a grid; give NAME=VALUE,VALUE, such as RATIO=0.3,0.5."),
        (("-g", "RATIO=0.3,,1"), "RATIO has an empty value in 'RATIO=0.3,,1'; give NAME=VALUE"),
        (("-g", "RATIO=0.3", "-g", "RATIO=0.5"), "RATIO is in the grid twice; give all of its values at once"),
        (("-g", "RATIO=0.3,0.30"), "The grid has the point RATIO 0.30 twice; each point is run once."),
        (("-g", "RATIOS=0.3,0.5"), "This lesson has no parameter RATIOS; did you mean RATIO?"),
        (("-g", "RATIO=0.3,1.5"), "RATIO cannot be 1.5; give a number from 0.0 to 1.0."),
        (("-g", "RATIO=0.3", "-p", "RATIO", "0.5"), "RATIO is in the grid and given for all points too; give it once."),
        (("-g", "PRESET=smoke,full", "--preset", "class"), "PRESET is in the grid and given for all points too"),
        (("-g", "SEED=1,2", "--seeds", "2"), "SEED is in the grid, and --seeds sets it too; give one of them."),
        (
            ("--seeds", "2", "-p", "SEED", "4294967295"),
            "SEED cannot be 4294967296; give a whole number from 0 to 42949",
        ),
        (("-g", "DEVICE=cpu,cuda:99"), "The device cuda:99 is not there"),
        (("--seeds", "2", "--on", "ray"), "A sweep cannot run on 'ray'; give local or dask://host:port."),
        (("--seeds", "2", "--on", "dask://"), "A sweep cannot run on 'dask://'; give local or dask://host:port."),
        (("--seeds", "2", "--on", "dask://h:1", "--workers", "2"), "A Dask cluster has the workers that were started"),
        (("--seeds", "2", "--on", "dask://127.0.0.1:9"), "There is no Dask scheduler at tcp://127.0.0.1:9; start one"),
        (("--seeds", "2", "--workers", "9999"), "cores to run on; give --workers at most"),
    ],
)
def test_a_mistake_gets_one_sentence_before_anything_runs(home: Path, monkeypatch, options: tuple, sentence: str):
    monkeypatch.setattr(sweep, "CONNECT_SECONDS", 1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    result = labkit(home, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr and result.stderr.count("\n") == 1
    assert not list(home.glob("runs/*"))


def test_results_that_cannot_be_written_are_refused_once(home: Path):
    (home / "runs").write_text("a file")
    result = labkit(home, "--seeds", 2)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"Results cannot be written to {home / 'runs'} (File exists); choose another --out." in result.stderr


def test_a_dask_that_is_not_installed_is_said_with_the_way_to_install_it(home: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    said = labkit(home, "--seeds", 2, "--on", "dask://h:1").stderr
    assert said.strip() == "Error: Dask is not installed: ./lab setup --with cluster."


def test_each_gpu_is_handed_to_one_run_at_a_time(lesson: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sweep, "_visible_gpus", lambda: ["4", "GPU-5e"])
    monkeypatch.setattr(sweep, "run_point", lambda job, env, stop: time.sleep(0.01) or (time.monotonic(), env))
    jobs = sweep.plan(lesson, {"SEED": range(20)}, SMOKE, out=tmp_path)
    with sweep.workers("local", jobs, None) as (submit, _, at_once):
        ends = [future.result() for future in [submit(job) for job in jobs]]
    by_gpu = {gpu: sorted(end for end, env in ends if env["CUDA_VISIBLE_DEVICES"] == gpu) for gpu in ("4", "GPU-5e")}
    assert at_once == 2 and sum(map(len, by_gpu.values())) == 20
    assert all(later - earlier >= 0.01 for times in by_gpu.values() for earlier, later in itertools.pairwise(times))


@pytest.mark.parametrize(
    ("gpus", "count", "device", "sentence"),
    [
        (["0"], 2, "auto", "There are 1 GPUs, and no two runs share one; give --workers at most 1"),
        ([], None, "cuda", "torch sees no GPU on this machine"),
    ],
)
def test_gpus_that_are_not_there_are_refused(lesson, tmp_path: Path, monkeypatch, gpus, count, device, sentence: str):
    monkeypatch.setattr(sweep, "_visible_gpus", lambda: gpus)
    jobs = [replace(job, device=device) for job in sweep.plan(lesson, {"SEED": [0]}, SMOKE, out=tmp_path)]
    with pytest.raises(InputError, match=sentence), sweep.workers("local", jobs, count):
        pass


@pytest.mark.parametrize(("count", "share"), [(None, {}), (2, {"OMP_NUM_THREADS": "4"})])
def test_runs_at_once_on_one_cpu_share_its_cores(lesson: Path, tmp_path: Path, monkeypatch, count, share):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("labkit.machine.threads", lambda: 8)
    jobs = sweep.plan(lesson, {"SEED": [0]}, {**SMOKE, "DEVICE": "cpu"}, out=tmp_path)
    assert sweep._environments(jobs, count) == [share] * (count or 1)


# on this machine


@pytest.mark.slow
def test_neither_a_failed_point_nor_ctrl_c_loses_what_is_done_and_the_same_command_goes_on(home: Path):
    (home / "hold-0.5-0").touch()
    options = ("-g", "RATIO=0.9,0.25,0.5", "--preset", "smoke")
    with started(home, *options) as process:
        wait_until(lambda: marks(home, 0.5))
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert "interrupted; finished runs are kept, and the same command goes on from them" in said
    wait_until(lambda: not any(map(alive, marks(home, 0.5)[0])), 10)
    before = results(home)
    assert folders(home) == sorted(before) and [name.endswith("-failed") for name in sorted(before)].count(True) == 1
    assert len(before) == 2
    (home / "hold-0.5-0").unlink()
    again = labkit(home, *options)
    assert again.exit_code == 1 and "before  " in again.stdout
    assert "3 points: 1 run, 1 there before, 1 failed" in again.stdout
    assert "failed  RATIO 0.9: AssertionError in cell 4 (Its work): too much\n        see " in again.stdout
    assert again.stdout.splitlines()[-1].startswith("report  file://") and (home / "runs" / "report.html").exists()
    good = {name: when for name, when in before.items() if not name.endswith("-failed")}
    assert results(home).items() >= good.items() and len(results(home)) == 3
    assert [len(marks(home, ratio)) for ratio in (0.25, 0.9, 0.5)] == [1, 2, 2]


@pytest.mark.slow
def test_a_run_whose_process_is_killed_is_run_again_and_two_of_one_point_leave_one_result(lesson: Path, home: Path):
    (home / "hold-0.5-0").touch()
    jobs = sweep.plan(lesson, {"SEED": [0]}, {**SMOKE, "DEVICE": "cpu"}, out=home / "runs") * 2
    with sweep.workers("local", jobs, 2) as (submit, _, _):
        both = [submit(job) for job in jobs]
        wait_until(lambda: len(marks(home, 0.5)) == 2)
        os.kill(marks(home, 0.5)[0][1], signal.SIGKILL)
        wait_until(lambda: len(marks(home, 0.5)) == 3)
        (home / "hold-0.5-0").unlink()
        assert [future.result().failure for future in both] == ["", ""]
    assert folders(home) == list(results(home)) and len(results(home)) == 1


# on a Dask cluster


def dask(part: str, *arguments: object, **env: str) -> subprocess.Popen:
    command = [sys.executable, "-m", f"distributed.cli.dask_{part}", *map(str, arguments), "--no-dashboard"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, **quiet)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A scheduler and two workers as processes, each worker with a GPU of its own by name."""
    pytest.importorskip("distributed")
    folder = tmp_path_factory.mktemp("dask")
    scheduler = dask("scheduler", "--host", "127.0.0.1", "--port", 0, "--scheduler-file", folder / "scheduler.json")
    wait_until((folder / "scheduler.json").exists)
    wait_until(lambda: (folder / "scheduler.json").read_text().endswith("}"))
    address = json.loads((folder / "scheduler.json").read_text())["address"]

    def add_worker(gpu: str) -> subprocess.Popen:
        options = ("--nthreads", 1, "--no-nanny", "--local-directory", folder)
        return dask("worker", address, *options, CUDA_VISIBLE_DEVICES=gpu)

    workers = [add_worker("0"), add_worker("1")]
    made = SimpleNamespace(address=address.replace("tcp", "dask"), scheduler=scheduler, workers=workers)
    yield made
    for process in (*made.workers, scheduler):
        process.kill()
        process.wait()


@pytest.mark.slow
def test_what_is_killed_of_a_cluster_loses_no_finished_run(home: Path, cluster: SimpleNamespace):
    """First a worker and the client, then the scheduler; the same command goes on from what was done."""

    def options(ratios: str) -> tuple[str, ...]:
        return ("-g", f"RATIO={ratios}", "--preset", "smoke", "--on", cluster.address)

    hold = {ratio: home / f"hold-{ratio}-0" for ratio in (0.2, 0.3, 0.4)}
    for file in hold.values():
        file.touch()
    with started(home, *options("0.1,0.2,0.3")) as client:
        wait_until(lambda: results(home) and marks(home, 0.2) and marks(home, 0.3))
        before = results(home)
        [worker] = [process for process in cluster.workers if process.pid == parent_of_run(home, 0.2)]
        worker.kill()
        wait_until(lambda: not any(map(alive, marks(home, 0.2)[0])), 10)
        client.kill()
    hold[0.2].unlink()
    hold[0.3].unlink()
    again = labkit(home, *options("0.1,0.2,0.3"))
    assert again.exit_code == 0 and "3 points" in again.stdout and " 0 failed" in again.stdout
    assert len(results(home)) == 3 and results(home).items() >= before.items() and len(marks(home, 0.1)) == 1
    assert_one_run_a_gpu(home)

    before = results(home)
    with started(home, *options("0.1,0.2,0.3,0.4")) as client:
        wait_until(lambda: marks(home, 0.4))
        cluster.scheduler.kill()
        said = client.communicate(timeout=40)[1]
    assert client.returncode == 2 and "Traceback" not in said
    assert "is gone; start it and its workers again, then give the same command" in said
    hold[0.4].unlink()  # a worker that lost its scheduler finishes its run, or it ends with the worker
    wait_until(lambda: folders(home) == sorted(results(home)), 40)
    assert results(home).items() >= before.items()


def assert_one_run_a_gpu(home: Path) -> None:
    records = [json.loads(file.read_text()) for file in home.glob("runs/01_small/[!.]*/record.json")]
    assert {row["gpu"] for row in records} <= {"0", "1"} and {row["threads"] for row in records} == {"1"}
    for gpu in ("0", "1"):
        spans = sorted((row["began"], row["ended"]) for row in records if row["gpu"] == gpu)
        assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(spans))
