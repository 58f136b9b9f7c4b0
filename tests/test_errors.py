"""What a user can put right is one sentence; a fork's own mistake keeps its traceback."""

import os
import pathlib
import subprocess
import sys

import pytest
from flags import xla_flags
from marks import quick
from squeeze import squeeze

from rlrr_jax import methods, models
from rlrr_jax.errors import UserError, out_of_memory

ROOT = pathlib.Path(__file__).parents[1]
METHOD = """
import types
import jax.numpy as jnp
from rlrr_jax import lookup
from rlrr_jax.methods import base

DEFAULTS = dict(lr=1.0, weight_decay=0.0, drop_path=0.0)

def method():
    def init(key, frozen):
        {init}
        return {{"a": jnp.zeros(2)}}
    def merge(frozen, adapter):
        {merge}
        return frozen
    return base.Method(init, merge, {decay}, DEFAULTS)
"""
COMMAND = """
import sys
module = types.ModuleType("fork", "Fork: of a test.")
module.method, module.FORMULA = method, "W"
sys.modules["fork"], lookup.NAMES["method"]["fork"] = module, "fork:method"
sys.argv = ["main", "--config=configs/vtab.py:digits,method=fork", "--workdir={workdir}"]
from rlrr_jax import main
main.run()
"""
WRONG = {  # what a fork wrote, and what it is told
    "init": (dict(init="a, b = 1, 2, 3"), "ValueError: too many values to unpack"),
    "merge": (dict(merge="frozen['no such layer']"), "KeyError: 'no such layer'"),
    "OSError": (dict(init="open('missing-file-of-a-fork')"), None),
}
BROKEN = {  # contracts
    "leaf": (
        dict(merge="frozen = {**frozen, 'cls': frozen['cls'][0]}"),
        "merge returns cls as float32[1, 96] instead of float32[1, 1, 96]",
    ),
    "dtype": (
        dict(merge="frozen = {**frozen, 'cls': frozen['cls'].astype(jnp.bfloat16)}"),
        "merge returns cls as bfloat16[1, 1, 96] instead of float32[1, 1, 96]",
    ),
    "extra": (
        dict(merge="frozen = {**frozen, 'adapter': frozen['cls']}"),
        "merge returns adapter, which the model does not have",
    ),
    "missing": (
        dict(merge="frozen = {k: v for k, v in frozen.items() if k != 'cls'}"),
        "merge returns no cls, which the model has",
    ),
    "head": (dict(init="return {'head': jnp.zeros(2)}"), "init must return a dict without 'head'"),
    "no dict": (dict(init="return [jnp.zeros(2)]"), "init must return a dict without 'head'"),
    "decay": (dict(decay="lambda tree: True"), "decay must return True or False for each leaf"),
}


def run(workdir, init="pass", merge="pass", decay="base.decay_of('kernel')", **environment):
    code = METHOD.format(init=init, merge=merge, decay=decay) + COMMAND.format(workdir=workdir)
    extra = {"XLA_FLAGS": xla_flags(), **environment}
    return subprocess.run(
        [sys.executable, "-c", code],
        **dict(cwd=ROOT, env={**os.environ, **extra}, capture_output=True, text=True),
    )


@pytest.mark.parametrize("what", quick(WRONG, "init", "OSError"))
def test_a_forks_own_mistake_keeps_its_traceback(what, tmp_path):
    changes, last = WRONG[what]
    done = run(tmp_path, **changes, RLRR_JAX_TRACEBACK="1")
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert ("in init" if "init" in changes else "in merge") in done.stderr
    if last:
        assert last in done.stderr and "please report the lines above" in done.stderr
        assert "error: " not in done.stderr.splitlines()[-1]
    else:  # the disk's errors are one sentence; RLRR_JAX_TRACEBACK=1 shows where
        where = "error: cannot use missing-file-of-a-fork (No such file"
        assert done.stderr.splitlines()[-1].startswith(where)
        assert len(run(tmp_path, **changes).stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_contract_is_named(what):
    changes, message = BROKEN[what]
    names = {}
    good = dict(init="pass", merge="pass", decay="base.decay_of('kernel')")
    exec(METHOD.format(**{**good, **changes}), names)
    frozen = models.shapes(models.build("bundled", 2), 32)
    with pytest.raises(UserError) as e:
        methods.check("fork", names["method"](), frozen)
    assert str(e.value).startswith(f"method 'fork' breaks its contract: {message}")
    exec(METHOD.format(**good), names)
    assert methods.check("fork", names["method"](), frozen).keys() == {"a"}


def test_a_broken_contract_is_one_sentence_before_any_work(tmp_path):
    done = run(tmp_path / "w", **BROKEN["leaf"][0])
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: method 'fork' breaks its contract: merge")
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_a_good_fork_is_trained(tmp_path):
    done = run(tmp_path, init="jnp.ones(())")
    assert done.returncode == 0 and "| digits | fork " in squeeze(done.stdout), done.stderr


def test_a_mistake_in_a_configuration_file_keeps_its_traceback(tmp_path):
    (tmp_path / "mine.py").write_text("def get_config(arg=None):\n    return undefined_name\n")
    command = [sys.executable, "-m", "rlrr_jax.main", f"--config={tmp_path}/mine.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "undefined_name" in done.stderr and "mine.py" in done.stderr
    assert "please report the lines above" in done.stderr


def test_memory_that_does_not_suffice_is_one_sentence():
    error = type("JaxRuntimeError", (RuntimeError,), {})
    for text, wanted in (
        (
            "INTERNAL: Out of memory allocating 26726483908 bytes.",
            "an array of 26726483908 bytes: lower",
        ),
        ("RESOURCE_EXHAUSTED: Failed to allocate 2.5GiB for x", "an array of 2.5GiB: lower"),
    ):
        assert wanted in out_of_memory(error(text))
    assert out_of_memory(error("INVALID_ARGUMENT: shapes")) is None
    assert out_of_memory(error("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem")) is None
    assert out_of_memory(ValueError("Out of memory allocating 5 bytes")) is None  # a fork's own
