"""A fork's subtly wrong methods and losses: each is one sentence before any work."""

import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flags import xla_flags
from named import register

from rlrr_jax import config as config_lib
from rlrr_jax import losses, methods, models
from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError
from rlrr_jax.methods import base, last
from rlrr_jax.methods.rlrr import method as rlrr

ROOT = pathlib.Path(__file__).parents[1]

DEFAULTS = dict(lr=1e-2, weight_decay=0.0, drop_path=0.0)
SHAPES = models.shapes(models.build("bundled", 2), 32)
keep = lambda frozen, adapter: frozen
none = lambda adapter: jax.tree.map(lambda x: False, adapter)
zero = lambda: jnp.zeros(())


def counting():
    box = [0.0]

    def merge(frozen, adapter):
        box[0] += 1
        return base.change_dense(
            frozen, base.DENSE, lambda n, k, b: (k * (1 + box[0] * adapter["g"]), b)
        )

    return merge


def random_merge(frozen, adapter):
    noise = np.float32(np.random.normal(size=3))
    return base.change_dense(frozen, base.DENSE, lambda n, k, b: (k + noise.sum() * adapter["g"], b))


WRONG = {
    "a key with a slash": (
        lambda k, f: {"a/b": zero()},
        keep,
        "the key 'a/b' must be a text without '/'",
    ),
    "a number": (lambda k, f: {0: zero()}, keep, "the key 0 must be a text"),
    "an empty key": (lambda k, f: {"a": {"": zero()}}, keep, "the key '' in a must be a text"),
    "None": (
        lambda k, f: {"g": zero(), "b": None},
        keep,
        "b is None: init must return dicts of arrays",
    ),
    "a list": (lambda k, f: {"g": [zero()]}, keep, "g is a list: init must return dicts of arrays"),
    "int32": (
        lambda k, f: {"g": jnp.zeros(3, jnp.int32)},
        keep,
        r"g is int32\[3\]: init must return float32",
    ),
    "bfloat16": (
        lambda k, f: {"g": jnp.zeros((), jnp.bfloat16)},
        keep,
        r"g is bfloat16\[\]: init must",
    ),
    "as large as a head": (
        *(lambda k, f: {"g": jnp.zeros(f["head"]["bias"].shape)}, keep),
        "g depends on the number of classes: leave the head out of init",
    ),
    "a random start": (
        *(lambda k, f: {"g": jnp.asarray(np.random.normal(size=3), jnp.float32)}, keep),
        "init gives two results for one input",
    ),
    "a random merge": (
        lambda k, f: {"g": zero()},
        random_merge,
        "merge gives two results for one input",
    ),
    "a counting merge": (
        lambda k, f: {"g": zero()},
        counting(),
        "merge gives two results for one input",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_methods(what):
    init, merge, message = WRONG[what]
    with pytest.raises(UserError, match=f"method 'mine' breaks its contract: .*{message}"):
        methods.check("mine", base.Method(init, merge, none, DEFAULTS), SHAPES)


def test_a_scalar_is_read_back(tmp_path):
    from rlrr_jax import adapters

    tree = {"adapter": {"g": np.float32(0.5)}, "head": {"kernel": np.zeros((2, 2), np.float32)}}
    path = tmp_path / "a.safetensors"
    adapters.write(path, adapters.Adapter(tree, {}))
    import safetensors.numpy

    assert safetensors.numpy.load_file(path)["g"].shape == ()
    methods.check("mine", base.Method(lambda k, f: {"g": zero()}, keep, none, DEFAULTS), SHAPES)


def test_defaults_are_whole():
    with pytest.raises(UserError, match="its DEFAULTS have no drop_path, weight_decay: add them"):
        methods.check("mine", base.Method(lambda k, f: {"g": zero()}, keep, none, dict(lr=1.0)), SHAPES)


@pytest.mark.parametrize("name", ["my/gain", ".hidden", "a\\b", "x" * 101])
def test_names_that_are_no_folder(name, monkeypatch):
    module = types.SimpleNamespace(
        FORMULA="x",
        DEFAULTS=DEFAULTS,
        method=lambda: base.Method(lambda k, f: {}, keep, none, DEFAULTS),
    )
    register(monkeypatch, "method", name, module.method)
    with pytest.raises(UserError, match="the method .* must have a name of at most 100 letters"):
        config_lib.resolve(vtab.get_config(f"digits,method={name}"))


# Losses ---------------------------------------------------------------------------------------


def deciding(net, batch, amount=0.0):
    logits = net(batch.images, batch.keys)
    each = losses.cross_entropies(logits, batch)
    if amount > 0:
        each = each * amount
    return each, {"acc": losses.correct(logits, batch.labels, each)}


def required(net, batch, amount):
    return losses.cross_entropy(net, batch)


def counted(net, batch):
    logits = net(batch.images, batch.keys)
    each = losses.cross_entropies(logits, batch)
    return (logits.argmax(-1) != batch.labels).astype(jnp.int32), {
        "acc": losses.correct(logits, batch.labels, each)
    }


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (deciding, "decides by a number that is traced.*use jnp.where or jax.lax.cond"),
        (required, "option 'amount' of loss 'mine' has no default: give it one"),
        (counted, "returns int32, which has no gradient: return float32"),
    ],
)
def test_losses(loss, message, monkeypatch):
    register(monkeypatch, "loss", "mine", loss)
    with pytest.raises(UserError, match=message):
        net = models.build("bundled", 2), methods.get("linear"), SHAPES
        losses.check_contract("mine", losses.check("mine", {}), net, (32, 32))


# Models as weights make them ---------------------------------------------------------------------


def test_the_last_blocks_of_a_model_that_pools_before_its_norm():
    model = models.build("bundled", 2, fc_norm=True, class_token=False, pool="avg")
    shapes = models.shapes(model, 32)
    assert "encoder_norm" not in shapes["Transformer"]
    adapter = methods.check("last", last.method(2), shapes)
    assert set(adapter) == {"last", "fc_norm"}


def test_rank_dropout_masks_ranks_and_no_channels():
    model = models.build("resnet18", 2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    frozen = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    method = rlrr(rank=3, rank_dropout=0.5)
    adapter = jax.tree.map(jnp.ones_like, method.init(jax.random.key(0), frozen))
    dropped = method.drop(jax.random.key(1), adapter)
    for path, x in jax.tree_util.tree_leaves_with_path(dropped):
        if path[-1].key == "scale_in":
            ranks = np.asarray(x).reshape(-1, x.shape[-1])
            assert (ranks == ranks[:1]).all() and set(np.unique(ranks)) <= {0.0, 2.0}


@pytest.mark.slow
def test_sensitivity_is_of_what_the_head_gets():
    """A Swin has no class token: its first token is a corner."""
    from rlrr_jax.models import head_inputs

    model = models.build("bundled", 2, class_token=False, pool="avg")
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)), jnp.float32)
    params = model.init(jax.random.key(0), images)["params"]
    _, kept = model.apply({"params": params}, images, mutable=["intermediates"])
    mean = kept["intermediates"]["encoded"][0].mean(1)
    np.testing.assert_allclose(head_inputs(model, params, images), mean, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_damaged_compiled_programs_are_replaced(tmp_path):
    def run(workdir):
        words = "-m rlrr_jax.main --config=configs/vtab.py:digits,method=lora --config.epochs=1".split()
        environment = {
            **os.environ,
            "XLA_FLAGS": xla_flags(),
            "RLRR_JAX_CACHE": str(tmp_path / "cache"),
        }
        command = [sys.executable, *words, f"--workdir={tmp_path / workdir}"]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "were damaged" not in run("a")
    entries = list((tmp_path / "cache/compiled").glob("*-cache"))
    assert entries
    for path in entries:
        path.write_bytes(path.read_bytes()[:100])
    assert "in " + str(tmp_path / "cache/compiled") + " were damaged: compiled again" in run("b")
    assert "were damaged" not in run("c")
