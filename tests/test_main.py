"""The command as a user types it: wrong input ends in one sentence, nothing else."""

import os
import pathlib
import subprocess
import sys

import forked
import numpy as np
import pytest
from flags import xla_flags

from rlrr_jax.weights import names

ROOT = pathlib.Path(__file__).parents[1]


def main(*args, **environment):
    """Runs the program; stdout, stderr and exit code."""
    command = [sys.executable, "-m", "rlrr_jax.main", *map(str, args)]
    environment = {**os.environ, "XLA_FLAGS": xla_flags(), **environment}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


class Trap:
    def __reduce__(self):
        return (print, ("the pickle was run",))


def weight_files(folder):
    """Four kinds of bad weights."""
    good = dict(np.load(names.BUNDLED))
    data = names.BUNDLED.read_bytes()
    (folder / "truncated.npz").write_bytes(data[: len(data) // 2])
    np.savez(folder / "shape.npz", **{**good, "params/cls": np.zeros((1, 1, 95), np.float16)})
    np.savez(folder / "pickle.npz", **{**good, "params/cls": np.array([Trap()], dtype=object)})


CONFIG = "--config=configs/vtab.py"
WEIGHTS = "--config.pretrained.name={folder}/"
WRONG = {
    "no config": ([], "add --config configs/vtab.py"),
    "no such config": (["--config=configs/vtabb.py"], "did you mean 'configs/vtab.py'?"),
    "flag": ([CONFIG, "--wrokdir=x"], "Did you mean: workdir"),
    "key": ([CONFIG, "--config.lrr=1"], "unknown key 'lrr' in a --config flag: did you mean 'lr'?"),
    "nested key": ([CONFIG, "--config.model.varaint=B/16"], "did you mean 'variant'?"),
    "value": ([CONFIG, "--config.lr=high"], "flag --config.lr=high: 'high' is no number"),
    "part of an epoch": (
        [CONFIG, "--config.epochs=1.5"],
        "--config.epochs=1.5: '1.5' is no whole number",
    ),
    "a key alone": (
        ["--config.lr=1"],
        "--config.lr is a key of no configuration: add --config configs",
    ),
    "a negative value": ([CONFIG, "--config.lr", "-0.5"], "config.lr=-0.5 must be greater than 0"),
    "two configs": ([CONFIG, CONFIG], "--config is there twice: give one"),
    "misspelt group": (
        [CONFIG, "--confg.lr=1"],
        "unknown flag '--confg.lr': did you mean '--config.lr'?",
    ),
    "negative": ([CONFIG, "--config.epochs=0"], "config.epochs=0 must be greater than 0"),
    "choice": ([CONFIG, "--config.protocol=offical"], "did you mean 'official'?"),
    "task": ([f"{CONFIG}:cifra"], "unknown task 'cifra': did you mean 'cifar'?"),
    "method": ([f"{CONFIG}:hearts,method=rlr"], "unknown method 'rlr': did you mean 'rlrr'?"),
    "option": ([f"{CONFIG}:hearts,inti=damped"], "'inti': did you mean 'init'?"),
    "variant": ([CONFIG, "--config.model.variant=B16"], "unknown model variant 'B16'"),
    "weights": ([CONFIG, "--config.pretrained.name=ViT-B16"], "did you mean 'ViT-B_16'?"),
    "missing": ([CONFIG, WEIGHTS + "missing.npz"], "there is no weight file"),
    "truncated": ([CONFIG, WEIGHTS + "truncated.npz"], "is no readable .npz file"),
    "shape": ([CONFIG, WEIGHTS + "shape.npz"], "wrong shape: cls is (1, 1, 95) instead of (1, 1, 96)"),
    "pickle": ([CONFIG, WEIGHTS + "pickle.npz"], "a pickle can run code"),
    "bare word": ([f"{CONFIG}:digits", "cifar"], "'cifar' belongs to no flag"),
    "option as key": ([CONFIG, "--config.method_kwargs.init=damped"], "written vtab.py:init=damped"),
    "size": ([CONFIG, "--config.image_size=50"], "not divisible by the patch size 8"),
    "dataset": (
        [f"{CONFIG}:cifar", "--config.data.dir={folder}"],
        "there is no prepared tfds dataset at",
    ),
    "workdir": ([CONFIG, "--workdir=/proc/rlrr"], "cannot use /proc/rlrr"),
    "devices": ([CONFIG, "--config.num_devices=64"], "this machine has 1 cpu device(s)"),
    "drop path": ([CONFIG, "--config.drop_path=1.5"], "config.drop_path=1.5 must be at least 0"),
    "the last flag": ([CONFIG, "--config.lr=None", "--config.lr=-1"], "config.lr=-1.0 must be greater"),
    "None at last": (
        [CONFIG, "--config.lr=-1", "--config.lr=None", "--config.epochs=0"],
        "config.epochs=0 must be greater",
    ),
    "weight decay": ([CONFIG, "--config.weight_decay=-1"], "must be finite and not negative"),
    "learning rate": ([CONFIG, "--config.lr=nan"], "config.lr=nan must be greater than 0 and finite"),
    "batch size": ([CONFIG, "--config.batch_size=-3"], "config.batch_size=-3 must be greater than 0"),
    "seeds": ([CONFIG, "--config.seeds=(1,1)"], "must be different whole numbers"),
    "runs": ([CONFIG, "--config.runs=({'rnk':1},)"], "unknown option of method linear 'rnk'"),
    "grid": ([CONFIG, "--config.grid.lr=(0.1,)"], "only searched by config.protocol=vtab"),
    "pretrained grid": ([CONFIG, "--config.pretrained.grid=(4,)"], "must be two whole numbers"),
    "optimizer": ([CONFIG, "--config.optimizer=sgd"], "unknown value of config.optimizer 'sgd'"),
    "schedule": ([CONFIG, "--config.schedule=linear"], "did you mean 'cosine'? Known: bigvision"),
    "steps": ([CONFIG, "--config.schedule=bigvision"], "needs config.total_steps"),
    "two lengths": ([CONFIG, "--config.total_steps=9", "--config.epochs=1"], "exclude each other"),
    "crop": ([CONFIG, "--config.crop=center"], "unknown value of config.crop 'center'"),
    "crop size": ([CONFIG, "--config.crop=resmall"], "needs config.crop_from of at least"),
    "attention": ([CONFIG, "--config.model.attention=cudnn"], "needs a GPU and bfloat16"),
    "dtype": ([CONFIG, "--config.dtype=float16"], "unknown value of config.dtype 'float16'"),
    "source": ([CONFIG, "--config.data.source=web"], "unknown value of config.data.source 'web'"),
    "pixels": ([CONFIG, "--config.data.variant=jpeg57"], "did you mean 'jpeg75'?"),
    "rank": ([f"{CONFIG}:hearts,method=lora,rank=0"], "option rank=0 must be a whole number"),
    "targets": ([f"{CONFIG}:hearts,method=lora,targets=vlue"], "did you mean 'value'?"),
    "switch": ([f"{CONFIG}:hearts,method=rlrr,residual=false"], "must be True or False"),
    "layers": ([f"{CONFIG}:hearts,method=rlrr,layers=9"], "more than the 6 blocks of the model"),
    "ablation": (["--config=configs/ablations.py:table7"], "one of the tables table6"),
    "budgets": (["--config=configs/transfer.py:cifar10_full,dtd"], "different numbers of steps"),
    "distributed": ([CONFIG, "--distributed=maybe"], "should be one of <auto|on|off>"),
    "timeout": ([CONFIG, "--distributed_timeout=0"], "0 is not a positive integer"),
    "workdir is a file": ([CONFIG, "--workdir={folder}/shape.npz"], "cannot use"),
    "diverging": (
        [f"{CONFIG}:digits,method=rlrr", "--config.lr=1e30", "--config.model.depth=1"],
        "is not finite at step 2 of epoch 1, learning rate 9.90393e+29: lower config.lr",
    ),
}


FOLDERS = []


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    FOLDERS.append(folder)
    weight_files(folder)

    commands = []
    for case, (args, _) in WRONG.items():
        args = [a.replace("{folder}", str(folder)) for a in args]
        if not any("workdir" in a for a in args):
            args.append(f"--workdir={folder}/{case}")
        commands.append(["rlrr_jax.main", *args])
    return dict(zip(WRONG, forked.ask(commands)))


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence(case, answers):
    answer = answers[case]
    assert answer.returncode == 1
    lines = answer.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ") and WRONG[case][1] in lines[-1], lines
    assert len(lines) == 1 or all("img/s" in line for line in lines[:-1]), lines
    assert "Traceback" not in answer.stdout and "pickle was run" not in answer.stdout


def test_a_process_of_its_own_answers_the_same(answers):
    answer = main(*WRONG["key"][0])
    assert (answer.returncode, answer.stderr) == (1, answers["key"].stderr)


def test_none_of_them_left_a_result(answers):
    folder = next(iter(FOLDERS))
    assert not list(folder.rglob("result*.json")) and not list(folder.rglob("adapter*"))


@pytest.mark.slow
def test_the_second_start_compiles_nothing(tmp_path):
    """Every program of a second run comes from the cache of the first: it adds none."""
    command = [f"{CONFIG}:digits,method=linear", "--config.epochs=1", "--config.num_devices=1"]
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    kept = []
    for name in "ab":
        answer = main(*command, f"--workdir={tmp_path}/{name}", **environment)
        assert answer.returncode == 0, answer.stderr
        kept.append({p.name for p in (tmp_path / "cache").iterdir() if p.name.endswith("-cache")})
    assert kept[0] == kept[1] and any("train_steps" in name for name in kept[0])


@pytest.mark.slow
def test_programs_are_cached_below_home_by_default(tmp_path):
    environment = {"HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [f"{CONFIG}:digits,method=linear", "--config.epochs=1", "--config.num_devices=1"]
    assert main(*command, f"--workdir={tmp_path}/run", **environment).returncode == 0
    assert list((tmp_path / ".cache/rlrr_jax/compiled").glob("*-cache"))


def test_platform_that_is_not_there():
    answer = main(CONFIG, JAX_PLATFORMS="cuda")
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert "error: JAX finds no device of JAX_PLATFORMS=cuda" in answer.stderr


def test_import_needs_no_tensorflow_accelerator_or_dataset_library():
    code = (
        "import sys, rlrr_jax.main; import jax._src.xla_bridge as b; "
        "assert not b._backends, 'a backend was started'; "
        "assert not {'tensorflow', 'tensorflow_datasets', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
