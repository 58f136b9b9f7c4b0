"""What the launch scripts would do, word for word."""

import os
import pathlib
import subprocess

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
    assert (code, err) == (0, "")
    tpu = "gcloud compute tpus tpu-vm"
    at = "--zone us-central1-a"
    assert lines[0] == (
        f"{tpu} create mine {at} --accelerator-type v5litepod-16 --version v2-alpha-tpuv5-lite --spot "
    )
    assert lines.pop(1).replace("\\", "") == (
        f"{tpu} ssh mine {at} --worker all --command rm -rf rlrr_jax "
    )
    assert lines[1] == f"{tpu} scp --recurse CLONE mine:rlrr_jax {at} --worker all "
    assert lines[2].startswith(f"{tpu} ssh mine {at} --worker all --command cd")
    plain = lines[3].replace("\\", "")
    assert plain.startswith(
        f"{tpu} ssh mine {at} --worker all --command cd rlrr_jax && venv-tpu/bin/python -m "
        f"rlrr_jax.main --distributed=on --config configs/vtab.py:all --workdir=gs://bucket/run"
    )
    assert lines[4] == "mkdir -p CLONE/runs "
    assert lines[5] == "gcloud storage cp --recursive gs://bucket/run CLONE/runs/ "


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
