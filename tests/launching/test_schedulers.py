"""The job for Slurm does what it says with stand-ins for srun and scontrol; the manifests are what Kubernetes takes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

SCHEMAS = json.loads((Path(__file__).parent / "schemas" / "kubernetes.json").read_text())
KINDS = {
    "Job": "io.k8s.api.batch.v1.Job",
    "Service": "io.k8s.api.core.v1.Service",
    "JobSet": "io.x-k8s.jobset.v1alpha2.JobSet",
}
PODS = ("launch.kubernetes.image=registry/safecl:1", "launch.kubernetes.claim=data", "--via", "kubernetes")


def files_in(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.rglob("launch/*")}


# ---------------------------------------------------------------------------------------------------------------- Slurm


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins: srun notes its arguments and ends as $ENDS says, scontrol notes what is queued again."""
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {
        "sbatch": 'cp "$1" "$NOTES/submitted"',
        "srun": 'printf "%s\\n" "$@" > "$NOTES/srun"; eval "$ENDS"',
        "scontrol": """
            case "$*" in
            *hostnames*) echo node-0;;
            *"show job"*) echo "JobId=7 JobState=${STATE:-RUNNING} Reason=None";;
            *) echo "$@" > "$NOTES/$1";;
            esac""",
    }
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    os.environ |= {"PATH": f"{programs}:{os.environ['PATH']}", "NOTES": str(tmp_path)}
    os.environ |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[0-1]"}

    def run(script: Path, ends: str, **variables: str) -> int:
        return subprocess.run(["bash", script], env=os.environ | {"ENDS": ends} | variables, timeout=30).returncode

    return run


def test_the_batch_script_is_submitted_and_starts_safecl_on_every_node(safecl, config, tmp_path, slurm):
    slow = ("launch.slurm.partition=gpu", "launch.slurm.time=1-00:00:00", "launch.slurm.extra=[--constraint=a100]")
    code, _, _ = safecl("launch", config, "--via", "slurm", "--nodes", "2", *slow)
    script = tmp_path / "run-A_1" / "launch" / "job.sbatch"
    assert code == 0 and (tmp_path / "submitted").read_text() == script.read_text()
    options = [line[8:] for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    for option in ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--partition=gpu", "--requeue"):
        assert option in options
    assert "--time=1-00:00:00" in options and "--constraint=a100" in options
    assert slurm(script, "exit 0") == 0
    words = (tmp_path / "srun").read_text().splitlines()
    assert words[words.index("--rendezvous") + 1] == "node-0:29500"
    assert words[-4:] == ["--", *slow]


@pytest.mark.parametrize(
    ("ends", "code", "again"),
    [
        ("echo 75 > $RUN/exit_code; exit 75", 75, True),  # a node was preempted, rank 0 has saved
        ("trap : USR1; kill -USR1 $PPID; sleep 0.2; exit 75", 75, True),  # the script got it, before the run had begun
        ("exit 75", 75, False),  # one node failed, and its ranks' SIGTERM looks like a stop on another
        ("exit 3", 3, False),
        ("exit 2", 2, False),
        ("exit 1", 1, False),
    ],
)
def test_a_job_that_was_stopped_is_queued_again_and_no_other(safecl, config, tmp_path, slurm, ends, code, again):
    safecl("launch", config, "--via", "slurm")
    run = tmp_path / "run-A_1"
    assert slurm(run / "launch" / "job.sbatch", ends, RUN=str(run)) == code
    assert (tmp_path / "requeue").exists() == again


def test_a_job_that_a_user_has_cancelled_is_not_queued_again(safecl, config, tmp_path, slurm):
    safecl("launch", config, "--via", "slurm")
    run = tmp_path / "run-A_1"
    ends = "trap : USR1; kill -TERM $PPID; sleep 0.2; exit 75"
    assert slurm(run / "launch" / "job.sbatch", ends, RUN=str(run), STATE="CANCELLED") == 75
    assert not (tmp_path / "requeue").exists()


def test_a_sweep_is_an_array_with_a_run_folder_for_every_combination(safecl, config, tmp_path, slurm):
    sweep = ("--sweep", "train.seed=1,2", "--sweep", "train.learning_rate=1e-5,2e-5")
    safecl("launch", config, "--via", "slurm", "train.max_steps=9", *sweep)
    script = tmp_path / "run-A_1" / "launch" / "job.sbatch"
    assert "#SBATCH --array=0-3\n" in script.read_text()
    assert slurm(script, "exit 0", SLURM_ARRAY_TASK_ID="2") == 0
    folder = tmp_path / "run-A_1" / "seed=2_learning_rate=1e-5"
    words = (tmp_path / "srun").read_text().splitlines()
    assert words[-4:] == ["train.max_steps=9", "train.seed=2", "train.learning_rate=1e-5", f"output={folder}"]


@pytest.mark.parametrize(
    ("runtime", "told"),
    [
        (
            "pyxis",
            "srun --wait=120 --container-image=img.sqsh --container-mounts=/data:/data python3 -m safecl",
        ),
        ("apptainer", "srun --wait=120 apptainer exec --nv --bind=/data:/data img.sqsh python3 -m safecl"),
    ],
)
def test_a_container_image_is_optional(safecl, config, runtime, told):
    image = (f"launch.slurm.container_runtime={runtime}", "launch.slurm.container=img.sqsh")
    _, out, _ = safecl(
        "launch", config, "--via", "slurm", *image, "launch.slurm.container_mounts=[/data:/data]", "--dry-run"
    )
    assert told in out


# ----------------------------------------------------------------------------------------------------------- Kubernetes


def manifests(safecl, config, *arguments: object) -> list[dict]:
    code, out, err = safecl("launch", config, *PODS, *arguments, "--dry-run")
    assert code == 0, err
    text = out.partition("apiVersion")[2].partition("\ncommand\n")[0]
    return list(yaml.safe_load_all(f"apiVersion{text}"))


def problems(manifest: dict) -> list[str]:
    schema = SCHEMAS | {"$ref": f"#/$defs/{KINDS[manifest['kind']]}"}
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest)]


@pytest.mark.parametrize("kind", ["Job", "JobSet"])
def test_the_manifests_satisfy_the_official_schemas(safecl, config, kind):
    more = (f"launch.kubernetes.kind={kind}", "launch.kubernetes.cpus=8", "launch.environment={NCCL_DEBUG: INFO}")
    found = manifests(safecl, config, "--nodes", "4", "--max-restarts", "2", *more)
    assert [each["kind"] for each in found] == (["Service", "Job"] if kind == "Job" else ["JobSet"])
    assert [problems(each) for each in found] == [[]] * len(found)
    assert problems(found[-1] | {"spec": found[-1]["spec"] | {"completionMod": "Indexed"}})  # the schema bites


def test_the_users_own_variables_do_not_travel_to_the_pods_and_the_launch_says_so(safecl, config):
    os.environ["NCCL_DEBUG"] = "INFO"
    _, out, _ = safecl("launch", config, *PODS, "--dry-run")
    assert "yours, left here" in out and "NCCL_DEBUG=INFO" in out and "yours, kept" not in out


def test_the_pods_meet_at_the_first_one_and_exit_codes_keep_their_meaning(safecl, config):
    service, job = manifests(safecl, config, "--nodes", "4", "--max-restarts", "2")
    assert service["spec"]["clusterIP"] == "None" and service["metadata"]["name"] == "run-a-1"
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (
        "Indexed",
        4,
        4,
        8,
    )
    rules = {rule["action"]: rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"][:2]}
    assert rules == {"Ignore": [75], "FailJob": [2, 3]}
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    words = container["command"]
    assert pod["subdomain"] == "run-a-1" and words[words.index("--rendezvous") + 1] == "run-a-1-0.run-a-1:29500"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}} in pod["volumes"]
    (job_set,) = manifests(safecl, config, "--nodes", "4", "launch.kubernetes.kind=JobSet")
    inner = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "run-a-1-node-0-0.run-a-1:29500" in inner["containers"][0]["command"] and "subdomain" not in inner


def test_the_examples_in_launch_templates_are_what_is_written(monkeypatch):
    import runpy

    folder = Path(__file__).parents[2] / "launch" / "templates"
    examples = runpy.run_path(str(folder / "render.py"))["examples"]()
    assert {name: (folder / name).read_text() for name in examples} == examples
