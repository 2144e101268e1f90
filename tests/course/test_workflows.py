"""The workflows: they call the commands that people call, and hand nothing to code that nobody has looked at."""

import math
import re
import subprocess
import tomllib

import pytest
import yaml
from pretend import library

from course import notebooks, reference, run
from labkit import files
from labkit.lesson import session

TEXTS = {file.stem: file.read_text("utf-8") for file in (files.ROOT / ".github" / "workflows").glob("*.yml")}
WORKFLOWS = {name: yaml.load(text, Loader=yaml.BaseLoader) for name, text in TEXTS.items()}  # "on" stays a text
JOBS = {name: flow["jobs"] for name, flow in WORKFLOWS.items()}
STEPS = {name: [step for job in jobs.values() for step in job["steps"]] for name, jobs in JOBS.items()}
PINNED = re.compile(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")
MAY_WRITE = {  # the only jobs with more than reading, which run no code of the repository
    ("pages", "deploy"): {"pages": "write", "id-token": "write"},
    ("release", "attest"): {"id-token": "write", "attestations": "write"},
    ("release", "publish"): {"id-token": "write"},
}


def commands(job: dict) -> list[str]:
    return [line for step in job["steps"] for line in step.get("run", "").splitlines()]


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_it_can_only_read_keeps_no_credentials_and_runs_only_what_people_run_too(name: str):
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    assert "secrets" not in TEXTS[name] and "pull_request_target" not in TEXTS[name]
    for title, job in JOBS[name].items():
        assert job["timeout-minutes"]
        assert job.get("permissions") == MAY_WRITE.get((name, title))
        assert "permissions" not in job or not commands(job)
        checkouts = [step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@")]
        assert bool(checkouts) == bool(commands(job))
        assert all(step["with"]["persist-credentials"] == "false" for step in checkouts)
    lines = [line for job in JOBS[name].values() for line in commands(job)]
    assert lines and all(line.startswith(("./lab ", ".ci/")) for line in lines)


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_actions_are_pinned_by_commit_with_their_version_beside_it(name: str):
    uses = [line.strip().removeprefix("- ") for line in TEXTS[name].splitlines() if "uses:" in line]
    assert [line for line in uses if not PINNED.fullmatch(line)] == []
    assert len({line.split("@")[0] for line in uses}) == len(set(uses))  # one version of each


def test_the_container_s_image_has_an_exact_version():
    assert re.search(r'"image": "python:3\.\d+\.\d+-\w+"', (files.ROOT / ".devcontainer/devcontainer.json").read_text())


def test_the_cpu_s_checks_are_those_of_the_check_script():
    jobs = JOBS["cpu"]
    assert commands(jobs["test"]) == [".ci/run"]
    script = (files.ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "./lab setup" in script and "./lab test" in script
    project = tomllib.loads((files.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    least, beyond = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups()
    assert jobs["test"]["strategy"]["matrix"]["python"] == [f"3.{least}", f"3.{int(beyond) - 1}"]


def test_the_tests_also_run_where_they_are_likely_to_differ():
    jobs = JOBS["cpu"]
    assert commands(jobs["oldest"]) == [".ci/oldest"]
    assert "--resolution lowest-direct" in (files.ROOT / ".ci" / "oldest").read_text(encoding="utf-8")
    assert jobs["locked"]["env"] == {"PIP_CONSTRAINT": "constraints.txt"}
    assert jobs["plain-cpu"]["env"] == {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    }
    assert commands(jobs["plain-cpu"])[-1] == "./lab test"
    folder = jobs["odd-folder"]["defaults"]["run"]["working-directory"]
    assert set("' ü") <= set(folder)
    assert [step["with"].get("path") for step in jobs["odd-folder"]["steps"] if "checkout" in step.get("uses", "")] == [
        folder
    ]
    assert commands(jobs["odd-folder"]) == ["./lab run", "./lab test"]


def test_a_pull_request_gets_a_gpu_by_its_label_alone_and_what_it_measures_is_uploaded():
    events = WORKFLOWS["gpu"]["on"]
    assert set(events) == {"workflow_dispatch", "schedule", "pull_request"}
    assert events["pull_request"] == {"types": ["labeled"]}  # not what is pushed after the label
    for job in JOBS["gpu"].values():
        assert "github.event_name != 'pull_request' || github.event.label.name == 'gpu'" in job["if"]
        assert "self-hosted" in job["runs-on"]
        assert job["steps"][-1]["if"] == "always()"  # what is measured counts even if the job runs out of time
    assert JOBS["gpu"]["rest"]["if"].startswith("!cancelled() && ")
    folder = "${{ env.FOLDER }}"
    uploaded = {title: job["steps"][-1]["with"]["path"].splitlines() for title, job in JOBS["gpu"].items()}
    assert uploaded == {
        "lesson": [f"{folder}/runs/gpu/runs/${{{{ matrix.lesson }}}}_*", f"{folder}/data/recorded/"],
        "rest": [f"{folder}/runs/gpu/", f"{folder}/data/recorded/"],
    }


def test_a_pull_request_leaves_nothing_to_later_runs_on_the_same_machine():
    folder = "${{ env.FOLDER }}"
    assert WORKFLOWS["gpu"]["env"] == {
        "FOLDER": "${{ github.event_name == 'pull_request' && 'pull-request' || 'main' }}"
    }
    for job in JOBS["gpu"].values():
        assert job["defaults"] == {"run": {"working-directory": folder}}
        (checkout,) = [step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@")]
        assert checkout["with"]["path"] == folder


def test_each_lesson_with_work_for_a_gpu_is_a_job_that_can_finish_and_goes_on_where_it_stopped():
    job = JOBS["gpu"]["lesson"]
    with_a_gpu = [path.stem[:2] for path in notebooks.all_lessons() if run.takes_device(path, "cuda")]
    assert job["strategy"]["matrix"]["lesson"] == with_a_gpu
    assert job["strategy"]["fail-fast"] == "false"
    minutes = reference.RECORDED_RUNS * session.BUDGETS["class"].seconds / 60
    assert int(job["timeout-minutes"]) > minutes
    assert "--preset class --device cuda --record --resume" in commands(job)[-1]
    assert commands(JOBS["gpu"]["rest"])[-1] == "./lab gpu"
    # What is finished is ignored by git, and cleaned otherwise; only a pull request's first lesson begins anew.
    clean = [step["with"]["clean"] for step in STEPS["gpu"] if step.get("uses", "").startswith("actions/checkout@")]
    first = job["strategy"]["matrix"]["lesson"][0]
    assert clean == [f"${{{{ github.event_name == 'pull_request' && matrix.lesson == '{first}' }}}}", "false"]


def test_how_long_a_gpu_takes_is_told_in_the_workflow_in_the_help_and_to_contributors():
    lessons = JOBS["gpu"]["lesson"]["strategy"]["matrix"]["lesson"]
    seconds = reference.RECORDED_RUNS * len(lessons) * session.BUDGETS["class"].seconds
    hours = math.ceil(seconds / 3600)
    for place in (".github/workflows/gpu.yml", "course/help.txt", "CONTRIBUTING.md"):
        text = " ".join((files.ROOT / place).read_text(encoding="utf-8").replace("#", "").split())
        assert f"{hours} hours at most" in text, place


def test_lessons_run_on_a_pretend_gpu_with_the_torch_that_it_was_tested_with():
    job = JOBS["pretend"]["lessons"]
    assert commands(job)[-1] == ".ci/pretend --lessons" and job["env"] == {"PIP_CONSTRAINT": "constraints.txt"}
    locked = (files.ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert any(f"\ntorch=={version}." in locked for version in library.TESTED)


def test_a_tag_is_checked_built_attested_with_its_bill_of_materials_and_published_as_it_was_built():
    assert WORKFLOWS["release"]["on"] == {"push": {"tags": ["v*"]}}
    jobs = JOBS["release"]
    assert commands(jobs["build"]) == [".ci/run", ".ci/package"]
    assert jobs["build"]["steps"][-1]["with"]["path"].split() == ["dist/", "build/sbom.json"]
    assert (jobs["attest"]["needs"], jobs["publish"]["needs"]) == ("build", "attest")
    attested = [step["with"] for step in jobs["attest"]["steps"] if "attest@" in step["uses"]]
    assert attested == [{"subject-path": "dist/*"}, {"subject-path": "dist/*", "sbom-path": "build/sbom.json"}]
    assert "password" not in TEXTS["release"] and "token:" not in TEXTS["release"].replace("id-token:", "")


def test_another_tag_than_the_version_is_refused_before_anything_is_built():
    done = subprocess.run(
        [files.ROOT / ".ci" / "package"],
        env={"PATH": "/usr/bin:/bin", "GITHUB_REF_NAME": "v999.0"}, capture_output=True, text=True,
    )  # fmt: skip
    project = tomllib.loads((files.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (done.returncode, done.stderr) == (2, f"v999.0 is not v{project['version']}\n")


def test_the_site_is_published_from_the_command_that_builds_it():
    assert commands(JOBS["pages"]["build"]) == ["./lab site --no-serve"]
    assert JOBS["pages"]["build"]["steps"][-1]["with"] == {"path": "build/site"}


def test_one_version_is_stated_everywhere():
    project = tomllib.loads((files.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = yaml.safe_load((files.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == project["version"]
    assert f"\n## {project['version']}" in (files.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
