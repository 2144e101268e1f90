"""`labkit gpu` with stand-ins for its steps, on a machine that says it has a GPU: no result here is one of a GPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from labkit import lessons, needs, paths, store
from labkit.cli import main
from labkit.gpu import packing, steps
from labkit.gpu.steps import CUT_OFF, DONE, FAILED, LEFT, State, Step

SLEEPER = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(98765)'])"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No time kept for packing, little patience with a step, and no records of this machine."""
    monkeypatch.setattr(steps, "PACKING_S", 0.0)
    monkeypatch.setattr(steps, "GRACE_S", 2.0)
    monkeypatch.setattr(paths, "RECORDED", tmp_path / "recorded")


def step(name: str, code: str, limit_s: float = 60.0, least_s: float = 1.0, **more) -> Step:
    return Step(name, (sys.executable, "-c", code), limit_s, least_s, **more)


def counting(name: str, file: Path, then: str = "") -> Step:
    return step(name, f"open({str(file)!r}, 'a').write('x'); {then}")


def run(todo: list[Step], out: Path, minutes: float = 5.0, key: str = "k") -> dict[str, steps.Outcome]:
    """Outcomes by step, as a new call would have them."""
    state = State.load(out / "state.json", key)
    return {one.step: one for one in steps.run(todo, out, minutes, state=state, say=lambda line: None)}


def below(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


# the budget ----------------------------------------------------------------------------------------


def test_a_failing_step_stops_no_other_one(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    found = run([step("bad", "print('so it goes'); 1 / 0"), step("good", "print('fine')")], tmp_path)
    assert {name: one.state for name, one in found.items()} == {"bad": FAILED, "good": DONE}
    assert found["bad"].note == "ZeroDivisionError: division by zero"
    assert "so it goes" in (tmp_path / "logs" / "bad.log").read_text()
    assert steps.exit_code(list(found.values())) == 1


def test_a_program_that_is_not_there_is_a_failure_and_of_a_report_none(tmp_path: Path):
    there = Step("tool", ("no-such-program",), 9, 1)
    report = Step("report", ("no-such-program",), 9, 1, report=True)
    found = run([there, report], tmp_path)
    assert (found["tool"].state, found["report"].state) == (FAILED, DONE)
    assert found["tool"].note == "no-such-program: No such file or directory"


def test_what_is_done_is_not_done_again_and_what_failed_is(tmp_path: Path):
    todo = [counting("good", tmp_path / "good"), counting("bad", tmp_path / "bad", "1 / 0")]
    todo.append(Step("report", counting("", tmp_path / "report").command, 9, 1, report=True))
    run(todo, tmp_path)
    again = run(todo, tmp_path)
    assert [len((tmp_path / name).read_text()) for name in ("good", "bad", "report")] == [1, 2, 2]
    assert (again["good"].state, again["good"].note) == (DONE, "by an earlier call")


def test_other_code_or_another_gpu_begins_anew(tmp_path: Path):
    todo = [counting("good", tmp_path / "good")]
    run(todo, tmp_path, key="one")
    run(todo, tmp_path, key="two")
    assert (tmp_path / "good").read_text() == "xx"


def test_a_state_that_cannot_be_read_is_none(tmp_path: Path):
    (tmp_path / "state.json").write_text("{cut off")
    assert State.load(tmp_path / "state.json", "k").outcomes == {}


def test_what_does_not_fit_is_said_and_left_and_smaller_steps_go_on(tmp_path: Path):
    found = run([step("long", "1", least_s=3600), step("short", "1")], tmp_path, minutes=1)
    assert found["long"].state == LEFT and found["short"].state == DONE
    assert found["long"].note.startswith("needs 3600 s, ") and found["long"].note.endswith(" s remain")
    assert steps.exit_code(list(found.values())) == 3


def test_a_step_that_is_too_slow_is_cut_off_with_all_that_it_started(tmp_path: Path):
    before = set(below(os.getpid()))
    found = run([step("slow", SLEEPER, limit_s=1.5)], tmp_path)
    assert found["slow"].state == CUT_OFF and found["slow"].seconds < 8
    assert set(below(os.getpid())) <= before
    assert not any("sleep(98765)" in " ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"]))


def test_what_was_cut_off_is_tried_again_only_with_more_time(tmp_path: Path):
    slow = step("slow", "import time; time.sleep(3)")
    assert run([slow], tmp_path, minutes=1.5 / 60)["slow"].state == CUT_OFF
    short = run([slow], tmp_path, minutes=1.6 / 60)["slow"]
    assert short.state == LEFT and short.note.startswith("needs ")
    assert run([slow], tmp_path, minutes=1)["slow"].state == DONE


def test_a_step_waits_for_its_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "is_ready", lambda name: name != "smollm2")
    todo = [step("lesson", "1", models=("minilm", "smollm2"))]
    assert run(todo, tmp_path)["lesson"].note == "needs smollm2, not in the cache yet"
    assert any("needs smollm2" in line for line in steps.plan(todo, State("k"), 600))
    monkeypatch.setattr(store, "is_ready", lambda name: True)
    assert run(todo, tmp_path)["lesson"].state == DONE


# interrupted ---------------------------------------------------------------------------------------

DRIVER = """
import sys
from pathlib import Path
from labkit import paths
from labkit.gpu import steps
out = Path(sys.argv[1])
paths.RECORDED = out / "recorded"
first = steps.Step("first", (sys.executable, "-c", f"open({str(out / 'first')!r}, 'a').write('x')"), 60, 1)
second = steps.Step("second", (sys.executable, "-c", sys.argv[2]), 60, 1)
state = steps.State.load(out / "state.json", "k")
steps.run([first, second], out, 5, state=state)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_call_that_is_ended_goes_on_where_it_was(tmp_path: Path, how: signal.Signals):
    begun = tmp_path / "begun"
    slow = f"open({str(begun)!r}, 'w'); import time; time.sleep(999)"
    with subprocess.Popen([sys.executable, "-c", DRIVER, tmp_path, slow], stderr=subprocess.DEVNULL) as child:
        until = time.monotonic() + 60
        while not begun.exists():
            assert time.monotonic() < until and child.poll() is None
            time.sleep(0.05)
        under_way = below(child.pid)
        child.send_signal(how)
        child.wait(30)
    if how == signal.SIGINT:
        assert psutil.wait_procs(under_way, timeout=5)[1] == []
    for orphan in under_way:  # a killed program can end nothing
        if orphan.is_running():
            orphan.kill()
    assert packing.unpack(tmp_path / "results-1.zip")["gpu/state.json"]
    ran = subprocess.run([sys.executable, "-c", DRIVER, tmp_path, "1"], timeout=60, capture_output=True)
    kept = json.loads((tmp_path / "state.json").read_text())["steps"]
    assert ran.returncode == 0 and [one["state"] for one in kept] == [DONE, DONE]
    assert (tmp_path / "first").read_text() == "x"


# the steps themselves ------------------------------------------------------------------------------


def test_every_lesson_runs_at_full_and_is_recorded_before_the_rest(tmp_path: Path):
    found = steps.steps(tmp_path)
    names = [one.name for one in found]
    numbers = [lesson.stem[:2] for lesson in lessons.all_lessons()]
    wanted = ["nvidia-smi", "doctor", "tests", *(f"lesson {n}" for n in numbers)]
    wanted += [*(f"stable cells {n}" for n in numbers), "2:4 gemm", "2:4 bert", "2:4 llama"]
    assert names == wanted
    for one in found:
        assert one.least_s <= one.limit_s
        if one.name.startswith("lesson"):
            assert {"--preset", "full", "--device", "cuda", "--record"} <= set(one.command)


def test_every_file_with_a_gpu_test_is_run(tmp_path: Path):
    given = {Path(word).name for word in steps.steps(tmp_path)[2].command if word.endswith(".py")}
    found = [
        file for file in (paths.ROOT / "tests").glob("*.py") if "@pytest.mark.gpu" in file.read_text().splitlines()
    ]
    assert given == {file.name for file in found} and len(given) > 5


def test_stable_cells_are_those_of_the_notebook_tests(tmp_path: Path):
    one = next(one for one in steps.steps(tmp_path) if one.name == "stable cells 02")
    ran = subprocess.run([*one.command, "--collect-only", "-q"], cwd=paths.ROOT, capture_output=True, text=True)
    collected = [line.partition("::")[2] for line in ran.stdout.splitlines() if "::" in line]
    assert sorted(collected) == [
        "test_stable_cells_print_what_is_stored[02_unstructured_pruning]",
        "test_the_learner_s_copy_stops_only_at_the_exercises[02_unstructured_pruning]",
    ]


def test_the_benchmark_takes_these_options(tmp_path: Path):
    program = (paths.ROOT / "benchmarks" / "nm_gpu.py").read_text(encoding="utf-8")
    for one in steps.steps(tmp_path)[-3:]:
        assert one.command[1] == str(paths.ROOT / "benchmarks" / "nm_gpu.py")
        options = [word for word in one.command if word.startswith("--")]
        assert options == ["--workloads", "--budget", "--json"] and all(f'"{word}"' in program for word in options)
    workloads = re.search(r"^WORKLOADS = \{(.+)\}$", program, re.MULTILINE)[1]
    assert set(re.findall(r'"(\w+)":', workloads)) == set(steps.BENCHMARKS)


# what a lesson needs -------------------------------------------------------------------------------


def test_needs_are_read_from_the_lessons():
    found = {one.lesson: one for one in needs.every()}
    assert found["01"].models == ("minilm", "efficientnet_lite0", "smollm2")
    assert found["02"].models == ("minilm",) and found["02"].compiler and not found["02"].gpu
    assert found["05"].gpu and not found["01"].gpu
    committed = {one.partition("/")[0] for one in found["03"].entries if "/" in one}
    assert committed == {"fashion-mnist", "photos", "checkpoints"}


# the command ---------------------------------------------------------------------------------------


def command(*arguments: object):
    return CliRunner().invoke(main, ["gpu", *map(str, arguments)])


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine that says it has a GPU (it has none), with these steps."""

    def pretend(*todo: Step) -> None:
        monkeypatch.setattr(steps, "require_gpu", lambda: None)
        monkeypatch.setattr(steps, "steps", lambda out: list(todo))
        monkeypatch.setattr(steps, "key", lambda: "pretended")

    return pretend


def test_without_a_gpu_it_is_one_sentence_and_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = command("--out", tmp_path / "out")
    assert result.exit_code == 2 and result.stdout == "" and not (tmp_path / "out").exists()
    assert "sees no CUDA device here, and nothing was run" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_plan_needs_no_gpu(tmp_path: Path):
    result = command("--plan", "--out", tmp_path)
    assert result.exit_code == 0 and "lesson 05" in result.stdout and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("code", "least_s", "exit_code"), [("1", 1, 0), ("1 / 0", 1, 1), ("1", 9999, 3)])
def test_the_exit_code_says_how_it_went(tmp_path: Path, as_if_on_a_gpu, code: str, least_s: float, exit_code: int):
    as_if_on_a_gpu(step("only", code, least_s=least_s), step("other", "1"))
    result = command("--out", tmp_path)
    assert result.exit_code == exit_code, result.output
    assert "packed" in result.stdout and (tmp_path / "results-1.zip").exists()


def test_packages_that_are_missing_are_named(tmp_path: Path, as_if_on_a_gpu, monkeypatch: pytest.MonkeyPatch):
    from labkit.gpu import wheels

    as_if_on_a_gpu(step("only", "1"))
    has = {name: version for name, version in wheels.here().items() if name != "papermill"}
    monkeypatch.setattr(wheels, "here", lambda: has)
    result = command("--out", tmp_path)
    assert result.exit_code == 2 and "These packages are missing here: papermill>=2.6; run ./lab setup" in result.stderr


def write_run(out: Path, name: str, machine: str, time_s: float) -> str:
    """A finished run of lesson 01 as `labkit run` leaves it, and its record's text."""
    text = json.dumps({"lesson": "01", "machine": {"slug": machine}, "seconds": time_s})
    folder = out / "runs" / "01_small" / name
    folder.mkdir(parents=True)
    for file, contents in {"record.json": text, "run.json": "{}", "01_small.ipynb": "{}"}.items():
        (folder / file).write_text(contents)
        os.utime(folder / file, (time_s, time_s))
    return text


def test_records_come_first_and_only_the_newest_whole_one(tmp_path: Path):
    write_run(tmp_path, "full-aaaaaaaa", "some-gpu", 1000)
    newest = write_run(tmp_path, "full-bbbbbbbb", "some-gpu", 3000)
    write_run(tmp_path, "full-cccccccc-failed", "some-gpu", 4000)
    write_run(tmp_path, "smoke-dddddddd", "some-gpu", 5000)
    (tmp_path / "state.json").write_text("{}")
    found = list(steps.results(tmp_path))
    assert [name for name, _ in found][:2] == ["recorded/some-gpu/01.json", "gpu/state.json"]
    assert found[0][1].read_text() == newest
    assert "gpu/runs/01_small/full-cccccccc-failed/01_small.ipynb" in dict(found)


def test_results_come_home_and_a_fresh_machine_goes_on_from_them(tmp_path: Path, as_if_on_a_gpu, monkeypatch):
    there, home, fresh = tmp_path / "there", tmp_path / "home", tmp_path / "fresh"
    record = write_run(there, "full-aaaaaaaa", "some-gpu", 1000)
    as_if_on_a_gpu(counting("only", tmp_path / "ran"))
    assert command("--out", there).exit_code == 0
    monkeypatch.setattr("labkit.readme.update", lambda: [])
    assert command("take", there, "--out", home).exit_code == 0
    assert (paths.RECORDED / "some-gpu" / "01.json").read_text() == record
    assert (home / "state.json").read_text() == (there / "state.json").read_text()
    assert command("--bring", there, "--out", fresh).exit_code == 0
    assert (tmp_path / "ran").read_text() == "x"
