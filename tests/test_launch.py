"""What the launch scripts would do, word for word."""

import os
import pathlib
import shutil
import subprocess
import tarfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(*command, **environment):
    out = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    return out.returncode, out.stdout.replace(str(ROOT), "CLONE").splitlines(), out.stderr


ARGUMENTS = ("--config", "configs/vtab.py:all", "--workdir=gs://bucket/run")


def test_local():
    code, lines, err = run("launch/local.sh", "--dry-run", "cuda13", *ARGUMENTS)
    assert (code, err) == (0, "")
    assert lines == [
        "python3 -m venv CLONE/venv-cuda13 ",
        r"CLONE/venv-cuda13/bin/pip install -q -e CLONE\[cuda13\] ",
        "exec CLONE/venv-cuda13/bin/python -m rlrr_jax.main --config configs/vtab.py:all "
        "--workdir=gs://bucket/run ",
    ]


def test_local_with_an_unknown_accelerator():
    code, _, err = run("launch/local.sh", "gpu", *ARGUMENTS)
    assert code == 1 and err == "error: unknown accelerator 'gpu': write cpu, cuda13 or tpu\n"


def test_tpu_pod():
    where = dict(TPU_NAME="mine", ZONE="us-central1-a", SPOT="1")
    code, lines, err = run("launch/tpu_pod.sh", "--dry-run", *ARGUMENTS, **where)
    assert code == 0 and (not err or err.startswith("note: what is committed is sent, and not these:"))
    tpu = "gcloud compute tpus tpu-vm"
    at = "--zone us-central1-a"
    assert lines[0] == (
        f"{tpu} create mine {at} --accelerator-type v5litepod-16 --version v2-alpha-tpuv5-lite --spot "
    )
    archive = lines.pop(1).removeprefix("git -C CLONE archive --format tar.gz --output ").split()[0]
    assert lines[1] == f"{tpu} scp {archive} mine:rlrr_jax.tar.gz {at} --worker all "
    assert lines[2].startswith(rf"{tpu} ssh mine {at} --worker all --command rm\ -rf\ rlrr_jax\ \&\&")
    plain = lines[3].replace("\\", "")
    assert plain.startswith(
        f"{tpu} ssh mine {at} --worker all --command cd rlrr_jax && venv-tpu/bin/python -m "
        f"rlrr_jax.main --distributed=on --config configs/vtab.py:all --workdir=gs://bucket/run"
    )
    assert lines[4] == "mkdir -p CLONE/runs "
    assert lines[5] == "gcloud storage cp --recursive gs://bucket/run CLONE/runs/ "


@pytest.mark.parametrize(
    ("state", "does"),
    [
        *(("READY", None), ("STOPPED", "start"), ("PREEMPTED", "delete"), ("TERMINATED", "delete")),
        *((state, "error") for state in ("CREATING", "MAINTENANCE", "REPAIRING", "STARTING", "HIDDEN")),
    ],
)
def test_tpu_pod_deletes_only_what_is_gone(state, does, tmp_path):
    """With a stand-in for gcloud that keeps what it was asked, and what it was sent."""
    gcloud = f"""echo "$@" >> {tmp_path}/asked
case "$*" in *describe*) echo {state} ;; *scp*) cp "$5" {tmp_path}/sent.tar.gz ;; esac"""
    (tmp_path / "gcloud").write_text(f"#!/usr/bin/env bash\n{gcloud}\n")
    (tmp_path / "gcloud").chmod(0o755)
    clone = tmp_path / "clone"
    git = lambda *args: subprocess.run(["git", "-C", clone, *args], check=True, capture_output=True)
    clone.mkdir()
    git("init")
    shutil.copytree(ROOT / "launch", clone / "launch")
    git("add", ".")
    git("-c", "user.name=x", "-c", "user.email=x@x", "commit", "-m", "x")
    (clone / "secret.txt").write_text("x")
    (clone / "runs").mkdir()
    path = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", TPU_NAME="mine", ZONE="z")
    code, _, err = run("bash", str(clone / "launch/tpu_pod.sh"), *ARGUMENTS, **path)
    asked = (tmp_path / "asked").read_text().splitlines()
    verbs = [line.split()[3] for line in asked if line.startswith("compute")]
    if does == "error":
        assert code == 1 and f"the TPU mine is {state}: wait until it is READY" in err
        assert verbs == ["describe"]
        return
    created = ["create"] if does == "delete" else []
    assert verbs == ["describe", *([does] if does else []), *created, "scp", "ssh", "ssh"]
    assert "note: what is committed is sent, and not these:\n?? secret.txt" in err
    with tarfile.open(tmp_path / "sent.tar.gz") as sent:
        names = sent.getnames()
    assert "launch/tpu_pod.sh" in names and not [n for n in names if "secret" in n or ".git" in n]


def test_tpu_pod_needs_a_shared_workdir_and_a_name():
    code, _, err = run("launch/tpu_pod.sh", "--dry-run", *ARGUMENTS[:2], TPU_NAME="t", ZONE="z")
    assert code == 1 and "the workers share no disk: add --workdir=gs://BUCKET/FOLDER" in err
    code, _, err = run("launch/tpu_pod.sh", "--dry-run", *ARGUMENTS)
    assert code != 0 and "set TPU_NAME to the name of the TPU" in err


def test_slurm():
    code, lines, err = run("bash", "launch/slurm.sbatch", *ARGUMENTS, DRY_RUN="1")
    assert (code, err) == (0, "")
    assert lines == [
        "srun --kill-on-bad-exit=0 --chdir CLONE CLONE/venv-cuda13/bin/python -m rlrr_jax.main "
        "--distributed=auto --config configs/vtab.py:all --workdir=gs://bucket/run ",
        "on exit code 75: scontrol requeue $SLURM_JOB_ID",
    ]
    text = (ROOT / "launch/slurm.sbatch").read_text()
    assert "#SBATCH --requeue" in text and "#SBATCH --signal=TERM@120" in text


def test_slurm_requeues_what_was_stopped(tmp_path):
    """With stand-ins for srun and scontrol."""
    for name, text in (("srun", "exit $CODE"), ("scontrol", "echo scontrol $@")):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    job = dict(PATH=path, SLURM_JOB_ID="7")
    assert run("bash", "launch/slurm.sbatch", CODE="75", **job)[:2] == (0, ["scontrol requeue 7"])
    assert run("bash", "launch/slurm.sbatch", CODE="1", **job)[:2] == (1, [])
    assert run("bash", "launch/slurm.sbatch", CODE="0", **job)[:2] == (0, [])
