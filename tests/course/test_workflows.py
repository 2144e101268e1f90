"""The workflows: they parse, call the commands that people call, and hand nothing to code that nobody has looked at."""

from pathlib import Path

import pytest
import yaml

from labkit import files

WORKFLOWS = {file.stem: file for file in sorted((files.ROOT / ".github" / "workflows").glob("*.yml"))}


def read(file: Path) -> dict:
    return yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # "on" stays a text


def every_step(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_there_is_one_for_the_cpu_and_one_for_the_gpu():
    assert set(WORKFLOWS) == {"cpu", "gpu"}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_it_can_only_read_and_keeps_no_credentials(name: str):
    workflow, text = read(WORKFLOWS[name]), WORKFLOWS[name].read_text(encoding="utf-8")
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets" not in text and "pull_request_target" not in text
    assert all("permissions" not in job and job["timeout-minutes"] for job in workflow["jobs"].values())
    checkouts = [step for step in every_step(workflow) if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts and all(step["with"]["persist-credentials"] == "false" for step in checkouts)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_it_runs_only_what_people_run_too(name: str):
    lines = [line for step in every_step(read(WORKFLOWS[name])) for line in step.get("run", "").splitlines()]
    assert lines and all(line.startswith(("./lab ", ".ci/run")) for line in lines)


def test_the_cpu_s_checks_are_those_of_the_check_script():
    assert [step["run"] for step in every_step(read(WORKFLOWS["cpu"])) if "run" in step] == [".ci/run"]
    script = (files.ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "./lab setup" in script and "./lab test" in script


def test_a_pull_request_gets_a_gpu_by_its_label_alone():
    workflow = read(WORKFLOWS["gpu"])
    assert set(workflow["on"]) == {"workflow_dispatch", "schedule", "pull_request"}
    assert workflow["on"]["pull_request"] == {"types": ["labeled"]}  # not what is pushed after the label
    (job,) = workflow["jobs"].values()
    assert job["if"] == "github.event_name != 'pull_request' || github.event.label.name == 'gpu'"
    assert "self-hosted" in job["runs-on"]


def test_what_the_gpu_found_is_uploaded_even_after_a_failure():
    last = every_step(read(WORKFLOWS["gpu"]))[-1]
    assert last["if"] == "always()" and last["with"]["path"].split() == ["runs/gpu/", "data/recorded/"]
