"""The workflows: they call the commands that people call, and hand nothing to code that nobody has looked at."""

import pytest
import yaml

from labkit import files

TEXTS = {file.stem: file.read_text("utf-8") for file in (files.ROOT / ".github" / "workflows").glob("*.yml")}
WORKFLOWS = {name: yaml.load(text, Loader=yaml.BaseLoader) for name, text in TEXTS.items()}  # "on" stays a text
STEPS = {name: [step for job in flow["jobs"].values() for step in job["steps"]] for name, flow in WORKFLOWS.items()}


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_it_can_only_read_keeps_no_credentials_and_runs_only_what_people_run_too(name: str):
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    assert "secrets" not in TEXTS[name] and "pull_request_target" not in TEXTS[name]
    assert all("permissions" not in job and job["timeout-minutes"] for job in WORKFLOWS[name]["jobs"].values())
    checkouts = [step for step in STEPS[name] if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts and all(step["with"]["persist-credentials"] == "false" for step in checkouts)
    lines = [line for step in STEPS[name] for line in step.get("run", "").splitlines()]
    assert lines and all(line.startswith(("./lab ", ".ci/run")) for line in lines)


def test_the_cpu_s_checks_are_those_of_the_check_script():
    assert [step["run"] for step in STEPS["cpu"] if "run" in step] == [".ci/run"]
    script = (files.ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "./lab setup" in script and "./lab test" in script


def test_a_pull_request_gets_a_gpu_by_its_label_alone_and_what_it_measures_is_uploaded():
    events = WORKFLOWS["gpu"]["on"]
    assert set(events) == {"workflow_dispatch", "schedule", "pull_request"}
    assert events["pull_request"] == {"types": ["labeled"]}  # not what is pushed after the label
    (job,) = WORKFLOWS["gpu"]["jobs"].values()
    assert job["if"] == "github.event_name != 'pull_request' || github.event.label.name == 'gpu'"
    assert "self-hosted" in job["runs-on"]
    last = STEPS["gpu"][-1]
    assert last["if"] == "always()" and last["with"]["path"].split() == ["runs/gpu/", "data/recorded/"]
