"""What the launch scripts would do, word for word."""

import os
import pathlib
import shutil
import subprocess
import tarfile
import time

import pytest
import yaml

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
        "srun --label --kill-on-bad-exit=0 --chdir CLONE CLONE/venv-cuda13/bin/python -m rlrr_jax.main "
        "--distributed=auto --config configs/vtab.py:all --workdir=gs://bucket/run ",
        "on exit code 75: scontrol requeue $SLURM_JOB_ID",
    ]
    text = (ROOT / "launch/slurm.sbatch").read_text()
    assert "#SBATCH --requeue" in text and "#SBATCH --signal=TERM@120" in text


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        (dict(TASK_ID="1", TASK_MIN="1", TASK_COUNT="8"), "1/8"),
        (dict(TASK_ID="7", TASK_MIN="0", TASK_COUNT="8"), "8/8"),
        (dict(TASK_ID="3", TASK_MIN="3", TASK_COUNT="1", PARTS="8"), "3/8"),
    ],
)
def test_an_array_of_slurm(variables, part):
    job = {key if key == "PARTS" else f"SLURM_ARRAY_{key}": x for key, x in variables.items()}
    code, lines, err = run("bash", "launch/slurm.sbatch", *ARGUMENTS, DRY_RUN="1", **job)
    assert (code, err) == (0, "")
    assert f" --distributed=auto --part={part} --config configs/vtab.py:all " in lines[0]


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        (dict(TASK_ID="0", TASK_MIN="0", TASK_COUNT="8", PARTS="8"), "0 of 8"),
        (dict(TASK_ID="15", TASK_MIN="1", TASK_COUNT="8", TASK_STEP="2"), "15 of 8"),
        (dict(TASK_ID="3", TASK_MIN="1", TASK_COUNT="8", TASK_STEP="2"), "3 of 8"),
    ],
)
def test_an_array_that_does_not_count_its_parts(variables, part):
    job = {key if key == "PARTS" else f"SLURM_ARRAY_{key}": x for key, x in variables.items()}
    code, lines, err = run("bash", "launch/slurm.sbatch", *ARGUMENTS, DRY_RUN="1", **job)
    assert (code, lines) == (1, [])
    assert err == (
        f"error: the array has no part {part}: write --array=1-8, and with PARTS=8 numbers of these\n"
    )


PARTS = [
    ("cuda13", {}, ["env CUDA_VISIBLE_DEVICES=0", "env CUDA_VISIBLE_DEVICES=1"]),
    (
        "cuda13",
        {"CUDA_VISIBLE_DEVICES": "4,6,7"},
        ["env CUDA_VISIBLE_DEVICES=4", "env CUDA_VISIBLE_DEVICES=6"],
    ),
    (
        "tpu",
        {},
        [
            f"env TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS=1,1,1 TPU_VISIBLE_CHIPS={i}"
            for i in range(2)
        ],
    ),
]


@pytest.mark.parametrize(("accelerator", "environment", "places"), PARTS)
def test_local_parts(accelerator, environment, places):
    code, lines, err = run(
        *("launch/local.sh", "--dry-run", "--parts", "2", accelerator, *ARGUMENTS), **environment
    )
    assert (code, err) == (0, "")
    assert [line.replace("\\", "") for line in lines[2:]] == [
        f"{place} CLONE/venv-{accelerator}/bin/python -m rlrr_jax.main --part={i + 1}/2 --config "
        f"configs/vtab.py:all --workdir=gs://bucket/run "
        for i, place in enumerate(places)
    ]


def test_local_parts_that_cannot_be():
    code, _, err = run("launch/local.sh", "--parts", "0", "cpu")
    assert code == 1 and err == "error: --parts 0 is no number of processes: write --parts 8\n"
    code, _, err = run(
        "launch/local.sh", "--dry-run", "--parts", "2", "cuda13", CUDA_VISIBLE_DEVICES="5"
    )
    assert code == 1
    assert err == "error: --parts 2 are more than the GPUs of CUDA_VISIBLE_DEVICES=5\n"


# What a process of a part does in these: python's place is taken by a script.
CODES = [((0, 0), 0), ((0, 75), 75), ((75, 3), 3), ((1, 75), 1), ((1, 0), 1)]


@pytest.fixture
def stand_in(tmp_path):
    """A clone with the script alone, and what it starts instead of rlrr_jax; `cpu` needs taskset."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch/local.sh", tmp_path / "launch")
    python = tmp_path / "venv-cpu/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("""#!/usr/bin/env bash
[ "$1" = -c ] && exit 0
printf 'bar\\rline of %s on %s cores\\n' "$3" "$(nproc)"
case $3 in --part=1/*) code=$ONE ;; *) code=$TWO ;; esac
trap 'echo stopped; exit 75' TERM
if [ "$code" = wait ]; then touch "$READY"; while :; do sleep 0.1; done; fi
exit "$code"
""")
    python.chmod(0o755)
    return tmp_path


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two cores")
@pytest.mark.parametrize(("codes", "worst"), CODES)
def test_parts_prefix_their_lines_and_the_worst_code_is_the_end(stand_in, codes, worst):
    one, two = map(str, codes)
    done = run(str(stand_in / "launch/local.sh"), "--parts", "2", "cpu", ONE=one, TWO=two)
    each = len(os.sched_getaffinity(0)) // 2
    assert done[0] == worst
    assert sorted(done[1]) == [
        text
        for i in (1, 2)
        for text in (f"[{i}/2] bar", f"[{i}/2] line of --part={i}/2 on {each} cores")
    ]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two cores")
def test_a_signal_goes_on_to_the_parts(stand_in):
    ready = stand_in / "ready"
    process = subprocess.Popen(
        [stand_in / "launch/local.sh", "--parts", "2", "cpu"],
        env={**os.environ, "ONE": "wait", "TWO": "0", "READY": str(ready)},
        **dict(stdout=subprocess.PIPE, text=True),
    )
    while not ready.exists():
        time.sleep(0.02)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and "[1/2] stopped" in out and "[2/2] stopped" not in out


def test_the_job_of_kubernetes_counts_from_one():
    job = yaml.safe_load((ROOT / "launch/k8s.yaml").read_text())
    assert job["spec"]["completionMode"] == "Indexed"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert str(job["spec"]["completions"]) == container["env"][0]["value"]
    command = [*container["command"], "--config=x", "--workdir=a b"]
    command[2] = command[2].replace("exec python", "exec printf '%s|'")
    done = subprocess.run(
        command, env={**os.environ, "JOB_COMPLETION_INDEX": "7", "PARTS": "8"}, capture_output=True
    )
    assert done.stdout.decode() == "-m|rlrr_jax.main|--part=8/8|--config=x|--workdir=a b|"


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
