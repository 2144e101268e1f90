import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from click.testing import CliRunner, Result

from course import executors, runs, sweep
from course.cli import main
from labkit import files
from labkit.errors import DataError, InputError

SMOKE = {"PRESET": "smoke"}
RANGES = {"RATIO": [0, 1]}
COMMAND = "import sys, pathlib, course.cli as c; c.files.NOTEBOOKS = pathlib.Path(sys.argv.pop(1)); c.main()"

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
def home(tmp_path: Path, write_lesson: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course with one lesson; what runs mark lies in it too."""
    write_lesson(tmp_path / "notebooks", WORK.format(home=str(tmp_path)), ranges=RANGES)
    (tmp_path / "notebooks" / "claims.toml").write_text((files.NOTEBOOKS / "claims.toml").read_text())
    monkeypatch.setattr(files, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.delenv("LABKIT_PRESET", raising=False)
    return tmp_path


@pytest.fixture
def lesson(home: Path) -> Path:
    return home / "notebooks" / "01_small.ipynb"


def labkit(home: Path, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["sweep", "1", "--out", str(home / "runs"), *map(str, arguments)])


def started(home: Path, *arguments: object) -> subprocess.Popen:
    """The command in a process of its own, in the foreground of nothing, as a shell would start it."""
    command = [sys.executable, "-c", COMMAND, home / "notebooks", "sweep", "1", "--out", home / "runs", *arguments]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"still waiting after {seconds} s"
        time.sleep(0.05)


def kept(home: Path) -> dict[str, str]:
    """The result folders and when each was made; hidden ones are runs under way."""
    made = {file.parent.name: json.loads(file.read_text())["created"] for file in home.glob("runs/01_small/*/run.json")}
    return {name: when for name, when in made.items() if not name.startswith(".")}


def marks(home: Path, ratio: float) -> list[list[int]]:
    """Process ids of the kernel and of the process that runs it, for each start of a run at `ratio`."""
    texts = [file.read_text() for file in home.glob(f"{ratio}-*.started")]
    return [[int(word) for word in text.split()] for text in texts if " " in text]


def parent_of_run(home: Path, ratio: float) -> int:
    """The process that called course.runs.run for the first run at `ratio`."""
    return psutil.Process(marks(home, ratio)[0][1]).ppid()


def left(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "runs" / "01_small").iterdir())


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# the points


def test_a_grid_is_all_combinations_and_the_whole_of_it_comes_at_the_first_seed(lesson: Path, tmp_path: Path):
    grid = sweep.parse(["RATIO=0.25, 0.75", "DEVICE=auto,cpu"])
    jobs = sweep.plan(lesson, grid, {**SMOKE, "SEED": "7"}, seeds=2, out=tmp_path)
    points = [(7, 0.25, "auto"), (7, 0.25, "cpu"), (7, 0.75, "auto"), (7, 0.75, "cpu")]
    assert [tuple(job.point.values()) for job in jobs] == points + [(8, *rest) for _, *rest in points]
    assert jobs[1].given == {"PRESET": "smoke", "SEED": 7, "RATIO": 0.25, "DEVICE": "cpu"}


def test_a_damaged_lesson_is_told_in_one_sentence(lesson: Path, tmp_path: Path):
    lesson.write_text("{")
    with pytest.raises(DataError, match=r"cannot be read \(it is damaged, or no notebook\)"):
        sweep.plan(lesson, {"RATIO": [0.3]}, {}, out=tmp_path)


def test_commas_inside_brackets_part_no_values():
    assert sweep.parse(["A=[1,2],[3]", "B=x"]) == {"A": ["[1,2]", "[3]"], "B": ["x"]}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "There is nothing to sweep over; give -g NAME=VALUE,VALUE or --seeds N."),
        (("-g", "RATIO"), "'RATIO' is no part of a grid; give NAME=VALUE,VALUE, such as RATIO=0.3,0.5."),
        (("-g", "RATIO="), "RATIO has an empty value in 'RATIO='; give NAME=VALUE,VALUE, such as RATIO=0.3,0.5."),
        (("-g", "RATIO=0.3,,1"), "RATIO has an empty value in 'RATIO=0.3,,1'; give NAME=VALUE"),
        (("-g", "RATIO=0.3", "-g", "RATIO=0.5"), "RATIO is in the grid twice; give all of its values at once"),
        (("-g", "RATIO=0.3,0.30"), "RATIO has the value 0.3 twice; each point of a grid is run once."),
        (("-g", "RATIOS=0.3,0.5"), "This lesson has no parameter RATIOS; did you mean RATIO?"),
        (("-g", "RATIO=0.3,half"), "RATIO cannot be 'half'; give a finite number, like its default 0.5."),
        (("-g", "RATIO=0.3,1.5"), "RATIO cannot be 1.5; give a number from 0 to 1."),
        (("-g", "RATIO=0.3", "-p", "RATIO", "0.5"), "RATIO is in the grid and given for all points too; give it once."),
        (("--seeds", "2", "--preset", "smoke", "-p", "PRESET", "full"), "PRESET is given twice, as smoke and as full"),
        (("-g", "PRESET=smoke,full", "--preset", "class"), "PRESET is in the grid and given for all points too"),
        (("-g", "SEED=1,2", "--seeds", "2"), "SEED is in the grid, and --seeds sets it too; give one of them."),
        (("-g", "RATIO=0.3", "-p", "SEEED", "1"), "This lesson has no parameter SEEED; did you mean SEED?"),
        (("-g", "RESULTS_DIR=a,b"), "RESULTS_DIR is set for each run; choose the folder of all results with --out."),
        (
            ("-g", "DEVICE=cpu,cuda:1"),
            "DEVICE cannot be cuda:1 in a sweep, which hands out the GPUs itself",
        ),
        (("--seeds", "2", "--on", "ray"), "A sweep cannot run on 'ray'; give local, dask://host:port or slurm."),
        (
            ("--seeds", "2", "--on", "dask://"),
            "A sweep cannot run on 'dask://'; give local, dask://host:port or slurm.",
        ),
        (("--seeds", "2", "--on", "dask://h:1", "--workers", "2"), "A Dask cluster has the workers that were started"),
        (("--seeds", "2", "--on", "dask://127.0.0.1:9"), "There is no Dask scheduler at tcp://127.0.0.1:9; start one"),
        (("--seeds", "2", "--on", "slurm"), "Slurm has to know what to reserve; give -p DEVICE cuda for a GPU a run"),
        (
            ("--seeds", "2", "--on", "slurm", "-p", "DEVICE", "cpu"),
            "There is no Slurm on this machine (no sbatch); sweep from a login node",
        ),
        (("--seeds", "2", "--workers", "9999"), "cores to run on; give --workers at most"),
    ],
)
def test_a_mistake_gets_one_sentence_before_anything_runs(home: Path, monkeypatch, options: tuple, sentence: str):
    monkeypatch.setattr(executors, "CONNECT_SECONDS", 1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    result = labkit(home, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr and result.stderr.count("\n") == 1
    assert not (home / "runs").exists()


@pytest.mark.parametrize("place", ["local", "slurm"])
def test_a_place_for_results_that_cannot_be_written_is_refused_once(home: Path, monkeypatch, place: str):
    monkeypatch.setattr(executors.shutil, "which", lambda name: name)
    (home / "runs").write_text("a file")
    result = labkit(home, "--seeds", 2, "-p", "DEVICE", "cpu", "--on", place)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"Results cannot be written to {home / 'runs'} (File exists); choose another --out." in result.stderr


def test_what_answers_but_is_no_scheduler_is_told_like_nobody(home: Path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            with server.accept()[0] as caller:
                caller.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                time.sleep(0.5)

        threading.Thread(target=answer).start()
        result = labkit(home, "--seeds", 2, "--on", f"dask://127.0.0.1:{port}")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1) and "There is no Dask scheduler at" in result.stderr


def test_what_is_not_installed_is_said_with_the_way_to_install_it(home: Path, monkeypatch):
    for module in ("distributed", "submitit"):
        monkeypatch.setitem(sys.modules, module, None)
    for place, name in (("dask://h:1", "Dask"), ("slurm", "submitit")):
        said = labkit(home, "--seeds", 2, "-p", "DEVICE", "cpu", "--on", place).stderr
        assert said.startswith(f"Error: {name} is not installed here; install it with:") and "[cluster]" in said


def test_the_forecast_counts_what_is_left_and_takes_the_time_of_earlier_runs(lesson: Path, tmp_path: Path):
    jobs = sweep.plan(lesson, {"RATIO": [0.1, 0.2, 0.3, 0.4]}, SMOKE, out=tmp_path)
    assert sweep.forecast(jobs, 0, 2) == "01_small: 4 points (4 RATIO); 4 to run, 2 at once: at most 3 min"
    failure = {"name": "ValueError", "message": "no", "cell": 4, "section": "Its work"}
    for seconds, error in ((5, None), (7, None), (600, failure)):
        folder = tmp_path / "01_small" / f"smoke-{seconds}"
        folder.mkdir(parents=True)
        facts = {"lesson": "01_small", "parameters": {}, "peak_memory": 1, "seconds": seconds, "error": error}
        (folder / "run.json").write_text(json.dumps(facts))
    assert sweep.forecast(jobs, 1, 2) == "01_small: 4 points (4 RATIO), 1 of them done; 3 to run, 2 at once: about 12 s"
    assert sweep.forecast(jobs, 4, 2) == "01_small: 4 points (4 RATIO), 4 of them done"


def test_what_a_machine_left_when_it_went_down_is_cleared_and_a_run_under_way_is_not(tmp_path: Path):
    for name, age in (
        (".smoke-old", 700),
        (".smoke-new", 500),
        (".full-slow", 700),
        (".slurm-log", 700),
        ("smoke-1", 700),
    ):
        (tmp_path / name).mkdir()
        for path in (tmp_path / name / "01_small.ipynb", tmp_path / name):
            path.touch()
            os.utime(path, (time.time() - age, time.time() - age))
    sweep._clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".full-slow", ".slurm-log", ".smoke-new", "smoke-1"]


# devices


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_gpu_is_handed_to_one_run_at_a_time(tmp_path: Path, monkeypatch, device: str):
    monkeypatch.setattr(executors, "_visible_gpus", lambda: ["4", "GPU-5e"])
    busy, seen, lock = set(), [], threading.Lock()

    def fake_run(job: int, *, env: dict[str, str], stop: threading.Event) -> int:
        gpu = env["CUDA_VISIBLE_DEVICES"]
        with lock:
            assert gpu not in busy
            busy.add(gpu)
            seen.append(gpu)
        time.sleep(0.01)
        with lock:
            busy.remove(gpu)
        return job

    with executors.local(None, device, tmp_path) as place:
        futures = [place.executor.submit(fake_run, number) for number in range(20)]
        assert [future.result() for future in futures] == list(range(20))
    assert set(seen) == {"4", "GPU-5e"} and (place.at_once, place.notes) == (2, [])


def test_two_sweeps_of_one_machine_share_no_gpu(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(executors, "_visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(executors.tempfile, "tempdir", str(tmp_path))
    with executors.local(1, "auto", tmp_path) as first, executors.local(None, "auto", tmp_path) as second:
        assert (first.at_once, second.at_once) == (1, 1)
        used = [place.executor.submit(lambda job, env, stop: env, 1).result() for place in (first, second)]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in used] == ["0", "1"]
    with (
        executors.local(None, "auto", tmp_path),
        pytest.raises(InputError, match="Another sweep has all GPUs"),
        executors.local(None, "auto", tmp_path),
    ):
        pass


def test_more_workers_than_gpus_and_a_gpu_that_is_not_there_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(executors, "_visible_gpus", lambda: ["0"])
    with pytest.raises(InputError, match="There are 1 GPUs, and no two runs share one; give --workers at most 1"):
        executors.local(2, "auto", tmp_path).__enter__()
    monkeypatch.setattr(executors, "_visible_gpus", list)
    with pytest.raises(InputError, match="torch sees no GPU on this machine"):
        executors.local(None, "cuda", tmp_path).__enter__()


def test_runs_at_once_on_one_cpu_share_its_cores_and_are_said_to_blur_clocks(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("labkit.machine.threads", lambda: 8)
    with executors.local(2, "cpu", tmp_path) as place:
        assert place.executor.submit(lambda job, env, stop: env, 1).result() == {"OMP_NUM_THREADS": "4"}
    assert place.notes[0].startswith("2 runs at once share the cores of one machine: what a clock measured is not")
    with executors.local(None, "cpu", tmp_path) as alone:
        assert alone.executor.submit(lambda job, env, stop: env, 1).result() == {}
    assert (alone.at_once, alone.notes) == (1, [])


def card(**differs: object) -> dict[str, object]:
    plain = {"host": "tcp://a", "nthreads": 1, "gpus": 0, "visible": "", "cuda": False, "machine": "m"}
    return {**plain, **differs}


@pytest.mark.parametrize(
    ("cards", "device", "asks"),
    [
        ([card(), card()], "auto", {}),
        ([card(gpus=1, visible="0"), card(gpus=1, visible="1")], "auto", {"GPU": 1}),
        ([card(gpus=1, visible="0"), card(gpus=1, visible="0", host="tcp://b")], "cuda", {"GPU": 1}),
        ([card(gpus=1, visible="0"), card()], "auto", {"GPU": 1}),
        ([card(cuda=True, nthreads=4)], "cpu", {}),
        ([card()], "cuda", "No worker of tcp://s offers a GPU to count"),
        ([card(cuda=True, nthreads=4)], "auto", "No worker of tcp://s offers a GPU to count"),
        ([card(gpus=2, visible="0,1")], "auto", "A worker of tcp://s offers GPUs without one of its own"),
        ([card(gpus=1)], "auto", "A worker of tcp://s offers GPUs without one of its own"),
        ([card(gpus=1, visible="0")] * 2, "auto", "Two workers of tcp://s share GPU 0 of tcp://a"),
    ],
)
def test_a_cluster_gives_one_gpu_to_a_run_or_says_at_once_why_not(cards: list, device: str, asks: dict | str):
    if isinstance(asks, dict):
        assert executors._resources(cards, device, "tcp://s") == asks
        return
    with pytest.raises(InputError, match=re.escape(asks)):
        executors._resources(cards, device, "tcp://s")


def test_runs_that_share_a_host_or_differ_in_machine_are_noted():
    assert executors._cluster_notes([card(), card(host="tcp://b")], on_gpus=False) == []
    shared, _ = executors._cluster_notes([card(machine="n"), card()], on_gpus=False)[::-1]
    assert shared.startswith("2 runs at once share the cores of one machine")
    assert executors._cluster_notes([card(), card()], on_gpus=True) == []


# on this machine


def test_a_failed_point_does_not_end_a_sweep_and_only_it_is_run_again(home: Path):
    options = ("-g", "RATIO=0.9,0.25", "--preset", "smoke")
    first = labkit(home, *options)
    assert first.exit_code == 1
    assert "2 points: 1 run, 0 there before, 1 failed" in first.stdout
    assert "failed  RATIO 0.9: AssertionError in cell 4 (Its work): too much\n        see " in first.stdout
    assert first.stdout.splitlines()[-1].startswith("report  file://") and (home / "runs" / "report.html").exists()
    before = kept(home)
    again = labkit(home, *options)
    assert again.exit_code == 1 and "1 of them done; 1 to run" in again.stdout
    assert "2 points: 0 run, 1 there before, 1 failed" in again.stdout
    assert [len(marks(home, ratio)) for ratio in (0.25, 0.9)] == [1, 2]
    assert {name: when for name, when in kept(home).items() if not name.endswith("failed")}.items() <= before.items()


def test_ctrl_c_keeps_what_is_done_ends_what_runs_and_the_same_command_goes_on(home: Path):
    (home / "hold-0.5-0").touch()
    options = ("-g", "RATIO=0.25,0.5", "--preset", "smoke")
    with started(home, *options) as process:
        wait_until(lambda: marks(home, 0.5))
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert "interrupted; finished runs are kept, and the same command goes on from them" in said
    wait_until(lambda: not any(map(alive, marks(home, 0.5)[0])), 10)
    before = kept(home)
    assert left(home) == list(before) and len(before) == 1
    (home / "hold-0.5-0").unlink()
    again = labkit(home, *options)
    assert again.exit_code == 0 and "2 points: 1 run, 1 there before, 0 failed" in again.stdout
    assert len(kept(home)) == 2 and kept(home).items() >= before.items()


def test_a_run_whose_process_is_killed_is_run_again_and_two_of_one_point_leave_one_result(lesson: Path, home: Path):
    (home / "hold-0.5-0").touch()
    [job] = sweep.plan(lesson, {"SEED": [0]}, SMOKE, out=home / "runs")
    with executors.local(2, "cpu", home / "runs") as place:
        both = [place.executor.submit(sweep.one, job) for _ in range(2)]
        wait_until(lambda: len(marks(home, 0.5)) == 2)
        os.kill(marks(home, 0.5)[0][1], signal.SIGKILL)
        wait_until(lambda: len(marks(home, 0.5)) == 3)
        (home / "hold-0.5-0").unlink()
        assert [future.result().failure for future in both] == ["", ""]
    assert left(home) == list(kept(home)) and len(kept(home)) == 1


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
        options = ("--nthreads", 1, "--resources", "GPU=1", "--no-nanny", "--local-directory", folder)
        return dask("worker", address, *options, CUDA_VISIBLE_DEVICES=gpu)

    made = SimpleNamespace(address=address.replace("tcp", "dask"), scheduler=scheduler, workers=[], add=add_worker)
    yield made
    for process in (*made.workers, scheduler):
        process.kill()
        process.wait()


def test_a_cluster_that_cannot_do_the_runs_says_so_at_once(home: Path, cluster: SimpleNamespace, monkeypatch):
    without = labkit(home, "--seeds", 2, "--on", cluster.address)
    assert without.exit_code == 2 and "has no worker; start one: CUDA_VISIBLE_DEVICES=0 dask worker" in without.stderr
    cluster.workers += [cluster.add("0"), cluster.add("1")]
    from distributed import Client

    with Client(cluster.address.replace("dask", "tcp"), set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
    monkeypatch.setattr(runs, "code_version", lambda: "another")
    other = labkit(home, "--seeds", 2, "--on", cluster.address)
    assert other.exit_code == 2 and "has another version of labkit; bring the same code to all" in other.stderr
    assert kept(home) == {}


def test_what_is_killed_of_a_cluster_loses_no_finished_run(home: Path, cluster: SimpleNamespace):
    """First a worker and the client, then the scheduler; the same command goes on from what was done."""

    def options(ratios: str) -> tuple[str, ...]:
        return ("-g", f"RATIO={ratios}", "--preset", "smoke", "--on", cluster.address)

    hold = {ratio: home / f"hold-{ratio}-0" for ratio in (0.2, 0.3, 0.4)}
    for file in hold.values():
        file.touch()
    with started(home, *options("0.1,0.2,0.3")) as client:
        wait_until(lambda: kept(home) and marks(home, 0.2) and marks(home, 0.3))
        before = kept(home)
        [worker] = [one for one in cluster.workers if one.pid == parent_of_run(home, 0.2)]
        worker.kill()
        wait_until(lambda: not any(map(alive, marks(home, 0.2)[0])), 10)
        client.kill()
    hold[0.2].unlink()
    hold[0.3].unlink()
    again = labkit(home, *options("0.1,0.2,0.3"))
    assert again.exit_code == 0 and "3 points" in again.stdout and " 0 failed" in again.stdout
    assert len(kept(home)) == 3 and kept(home).items() >= before.items() and len(marks(home, 0.1)) == 1
    assert_one_run_a_gpu(home)

    before = kept(home)
    with started(home, *options("0.1,0.2,0.3,0.4")) as client:
        wait_until(lambda: marks(home, 0.4))
        cluster.scheduler.kill()
        said = client.communicate(timeout=40)[1]
    assert client.returncode == 2 and "Traceback" not in said
    assert "is gone; start it and its workers again, then give the same command" in said
    hold[0.4].unlink()  # a worker that lost its scheduler finishes its run, or it ends with the worker
    wait_until(lambda: left(home) == sorted(kept(home)), 40)
    assert kept(home).items() >= before.items()


def assert_one_run_a_gpu(home: Path) -> None:
    records = [json.loads(file.read_text()) for file in home.glob("runs/01_small/[!.]*/record.json")]
    assert {one["gpu"] for one in records} <= {"0", "1"} and {one["threads"] for one in records} == {"1"}
    for gpu in ("0", "1"):
        spans = sorted((one["began"], one["ended"]) for one in records if one["gpu"] == gpu)
        assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(spans))


# through a queue


def test_a_job_that_is_lost_is_queued_again(lesson: Path, home: Path):
    pytest.importorskip("submitit")
    jobs = sweep.plan(lesson, {"SEED": [0]}, SMOKE, out=home / "runs")
    killed = []

    def kill_the_first() -> bool:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "submitit.core._submit" in process.cmdline():
                    process.kill()
                    killed.append(process)
                    break
        return bool(killed)

    with executors.slurm(2, "cpu", home / "runs", cluster="local") as place:
        killer = threading.Thread(target=wait_until, args=[kill_the_first])
        killer.start()
        [outcome] = sweep.run(jobs, place)
        killer.join()
    assert (outcome.failure, len(kept(home)), len(killed)) == ("", 1, 1)
    assert not list((home / "runs").glob(".slurm*"))
