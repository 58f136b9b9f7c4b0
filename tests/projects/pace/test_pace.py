"""PACE against numbers of its authors' code, and against a second way to compute it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from golden import DATA
from jax.sharding import PartitionSpec as P
from marks import quick
from trees import folded, moved, started, zero_head

from rlrr_jax import losses, methods, models, step, suite, train
from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError
from rlrr_jax.models import swin, vit
from rlrr_jax.projects.pace import change
from rlrr_jax.projects.pace import losses as pace
from rlrr_jax.recipe import Batch, Hyper, Recipe
from rlrr_jax.runtime import mesh as mesh_lib
from rlrr_jax.runtime.stop import Stop, Stopped

LAYERS = {"attn.proj": "out", "mlp.fc1": "Dense_0", "mlp.fc2": "Dense_1"}
BLOCK = "Transformer/encoderblock"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_0"
PATHS = {"attn.proj": f"{ATTENTION}/out", "mlp.fc1": f"{BLOCK}/MlpBlock_0/Dense_0"}
PATHS["mlp.fc2"] = f"{BLOCK}/MlpBlock_0/Dense_1"


def batch_of(images, labels, **values):
    b = len(labels)
    plain = dict(targets=None, mask=jnp.ones(b), keys=jax.random.split(jax.random.key(1), b))
    plain |= dict(slots=jnp.arange(b), numbers=jnp.arange(b), step=jnp.int32(0))
    return Batch(images=images, labels=labels, **{**plain, **values})


# The authors' code ----------------------------------------------------------------------------


class Recorded:
    """The case of `pace_open.npz` under our names."""

    def __init__(self):
        data = dict(np.load(DATA / "pace_open.npz", allow_pickle=False))
        width, depth, heads, patch, _, classes, _ = map(int, data["config"])
        self.data, self.depth, self.heads = data, depth, heads
        self.model = vit.ViT(width, depth, 2 * width, heads, patch, classes, gelu="exact")
        self.frozen = self.ours(self.under("pretrained/"))
        self.frozen = zero_head(self.frozen)

    def under(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.data.items() if k.startswith(prefix)}

    def ours(self, flat):
        """Weights of timm's names as our tree, differentiable."""
        stack = lambda name: jnp.stack([flat[f"blocks.{i}.{name}"] for i in range(self.depth)])
        heads = lambda x: x.reshape(*x.shape[:-1], self.heads, -1)
        width = flat["norm.weight"].size
        qkv, bias = stack("attn.qkv.weight").swapaxes(1, 2), stack("attn.qkv.bias")
        out = {
            "cls": flat["cls_token"] + flat["pos_embed"][:, :1],
            "pos_embedding": flat["pos_embed"][:, 1:],
            "embedding/kernel": flat["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
            "embedding/bias": flat["patch_embed.proj.bias"],
            "head/kernel": flat["head.weight"].T,
            "head/bias": flat["head.bias"],
        }
        for i, name in enumerate(("query", "key", "value")):
            part = slice(i * width, (i + 1) * width)
            out[f"{ATTENTION}/{name}/kernel"] = heads(qkv[..., part])
            out[f"{ATTENTION}/{name}/bias"] = heads(bias[..., part])
        for theirs, ours in PATHS.items():
            out[f"{ours}/kernel"] = stack(f"{theirs}.weight").swapaxes(1, 2)
            out[f"{ours}/bias"] = stack(f"{theirs}.bias")
        kernel = out[f"{ATTENTION}/out/kernel"]
        out[f"{ATTENTION}/out/kernel"] = kernel.reshape(self.depth, self.heads, -1, width)
        norms = {f"{BLOCK}/LayerNorm_0": "norm1", f"{BLOCK}/LayerNorm_1": "norm2"}
        for ours, theirs in norms.items():
            out[f"{ours}/scale"], out[f"{ours}/bias"] = (
                stack(f"{theirs}.{x}") for x in ("weight", "bias")
            )
        out["Transformer/encoder_norm/scale"] = flat["norm.weight"]
        out["Transformer/encoder_norm/bias"] = flat["norm.bias"]
        return unflatten_dict({name: jnp.asarray(x) for name, x in out.items()}, sep="/")

    def merge(self, adapter):
        """W' = W (1 + down up), b' = b (1 + delta_b) + W p, with the adapter of the authors."""
        flat = {**self.under("pretrained/")}
        for i in range(self.depth):
            for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
                name = f"blocks.{i}.{layer}"
                get = lambda leaf, name=name: adapter[f"{name}.delta_{leaf}"]
                weight, bias = flat[f"{name}.weight"], flat[f"{name}.bias"]
                prompt = (get("prompt_down") @ get("prompt_up"))[:, 0]
                flat[f"{name}.weight"] = weight * (1 + get("W_down") @ get("W_up"))
                flat[f"{name}.bias"] = bias * (1 + get("b")) + weight @ prompt
        return self.ours({**flat, **{k: adapter[k] for k in ("head.weight", "head.bias")}})

    def noise(self, number):
        """The recorded multipliers of a pass, as `change.multipliers` makes them."""
        b = len(self.data["labels"])
        rows = slice(number * b, (number + 1) * b)
        out = {"head/z": self.data["noise/head"][rows]}
        stack = lambda name: jnp.stack(
            [jnp.ones_like(self.data[f"noise/blocks.1.{name}"][rows])]  # the first block has none
            + [self.data[f"noise/blocks.{i}.{name}"][rows] for i in range(1, self.depth)]
        )
        qkv = stack("attn.qkv").reshape(self.depth, b, 3, self.heads, -1)
        for i, name in enumerate(("query", "key", "value")):
            out[f"{ATTENTION}/{name}/z"] = qkv[:, :, i]
        out |= {f"{ours}/z": stack(theirs) for theirs, ours in PATHS.items()}
        return unflatten_dict(out, sep="/")


def test_the_authors_losses_and_gradients(monkeypatch):
    recorded = Recorded()
    data = recorded.data
    monkeypatch.setattr(pace, "_noise", lambda batch, number, sigma: number)
    monkeypatch.setattr(change, "multipliers", lambda _, number: recorded.noise(number))
    batch = batch_of(jnp.asarray(data["images_nhwc"]), jnp.asarray(data["labels"], jnp.int32))

    def total(adapter):
        params = recorded.merge(adapter)
        net = losses.Net(recorded.model, None, recorded.frozen, params, {})
        each, values = pace.pace(net, batch, lam=float(data["lam"]))
        logits = pace._forward(net, batch, 0), recorded.model.apply({"params": params}, batch.images)
        return each.mean(), (values, logits)

    init = {name: jnp.asarray(x) for name, x in recorded.under("init/").items()}
    with jax.default_matmul_precision("highest"):
        (loss, (values, logits)), grads = jax.value_and_grad(total, has_aux=True)(init)
    assert abs(float(loss) - float(data["total_loss"])) < 1e-5
    assert abs(float(values["distance"].mean()) - float(data["pace_loss"])) < 1e-5
    np.testing.assert_allclose(logits[0], data["logits_1"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits[1], data["logits_merged"], rtol=0, atol=1e-5)
    assert grads.keys() == recorded.under("grad/").keys() and len(grads) == 62
    for name, theirs in recorded.under("grad/").items():
        np.testing.assert_allclose(
            grads[name], theirs, rtol=0, atol=1e-5 * np.abs(theirs).max(), err_msg=name
        )


def test_noise_falls_with_depth_as_the_authors_schedule():
    data = np.load(DATA / "pace_open.npz")
    np.testing.assert_allclose(change.sigmas(3, float(data["sigma"])), data["sigmas"], rtol=1e-6)


# A second way ---------------------------------------------------------------------------------

MODEL = vit.ViT(24, 3, 48, 3, 4, 5)
SIZE, NUMBER = 8, 22


@functools.cache
def frozen_tree():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32) for x in leaves]
    tree = jax.tree.unflatten(structure, drawn)
    return zero_head(tree)


def trained_tree(method, seed=3):
    return moved(started(method, frozen_tree(), seed), seed=seed)


def each_image_its_own_weights(frozen, params, z):
    """Logits of images of which each has its own merged weights, W0 + dW Z."""
    base, moved = change.split(frozen, params)
    flat, noise = flatten_dict(moved, sep="/"), flatten_dict(z, sep="/")

    def one(image, noise):
        own = dict(flatten_dict(base, sep="/"))
        for name, x in flat.items():
            factor = noise[f"{name.rpartition('/')[0]}/z"]
            outputs = factor.ndim - 1 if name.startswith("Transformer") else factor.ndim
            lead = factor.shape[: factor.ndim - outputs]
            factor = factor.reshape(*lead, *(1,) * (x.ndim - factor.ndim), *factor.shape[len(lead) :])
            own[name] = own[name] + x * factor
        return MODEL.apply({"params": unflatten_dict(own, sep="/")}, image[None])[0]

    axes = {name: 1 if name.startswith("Transformer") else 0 for name in noise}
    return jax.vmap(one, (0, axes))(IMAGES[:4], noise)


RNG = np.random.default_rng(1)
IMAGES = jnp.asarray(RNG.uniform(-1, 1, (NUMBER, SIZE, SIZE, 3)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, 5, NUMBER), jnp.int32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rlrr", pytest.param("lora", marks=pytest.mark.slow)])
def test_loss_and_gradient_are_those_of_weights_of_each_image(name):
    method, frozen = methods.get(name), frozen_tree()
    batch = batch_of(IMAGES[:4], LABELS[:4])

    def ours(trained):
        params = methods.merge(method, frozen, trained)
        net = losses.Net(MODEL, method, frozen, params, trained)
        return pace.pace(net, batch, 0.7, 1.3)[0].mean()

    def plain(trained):
        params = methods.merge(method, frozen, trained)
        _, moved = change.split(frozen, params)
        logits = [
            each_image_its_own_weights(
                frozen, params, change.multipliers(moved, pace._noise(batch, i, 1.3))
            )
            for i in range(2)
        ]
        each = optax.softmax_cross_entropy_with_integer_labels(logits[0], LABELS[:4])
        return (each + 0.7 * ((logits[0] - logits[1]) ** 2).sum(-1)).mean()

    trained = trained_tree(method)
    with jax.default_matmul_precision("highest"):
        (a, ga), (b, gb) = (jax.jit(jax.value_and_grad(f))(trained) for f in (ours, plain))
    assert abs(float(a) - float(b)) < 1e-5 * abs(float(b))
    for x, y in zip(*map(jax.tree.leaves, (ga, gb)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * float(jnp.abs(y).max()) + 1e-6)


@pytest.mark.parametrize("name", quick(methods.METHODS, "rlrr"))
def test_without_noise_it_is_the_merged_model(name):
    method, frozen = methods.get(name), frozen_tree()
    params = folded(method, frozen, trained_tree(method))
    noise = change.Noise(jax.random.split(jax.random.key(0), 4), 0.0)
    with jax.default_matmul_precision("highest"):
        ours = change.apply(MODEL, frozen, params, noise, IMAGES[:4])
        merged = MODEL.apply({"params": params}, IMAGES[:4])
    np.testing.assert_allclose(ours, merged, rtol=1e-5, atol=1e-5)
    noisy = change.apply(MODEL, frozen, params, noise._replace(sigma=1.0), IMAGES[:4])
    assert np.abs(np.asarray(noisy) - merged).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(unroll=3), dict(remat=True)], ids=str)
def test_noise_is_the_same_however_the_blocks_are_run(options):
    method, frozen = methods.get("rlrr"), frozen_tree()
    params = folded(method, frozen, trained_tree(method))
    noise = change.Noise(jax.random.split(jax.random.key(0), 4), 0.7)

    def gradient(model):
        loss = lambda x: change.apply(model, frozen, x, noise, IMAGES[:4]).sum()
        return jax.jit(jax.value_and_grad(loss))(params)

    with jax.default_matmul_precision("highest"):
        (a, ga), (b, gb) = gradient(MODEL), gradient(MODEL.clone(**options))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for x, y in zip(*map(jax.tree.leaves, (ga, gb)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * float(jnp.abs(y).max()) + 1e-6)


# In the step ----------------------------------------------------------------------------------


def recipe(loss):
    return Recipe(
        model=MODEL,
        method=methods.get("lora"),
        batch_size=6,
        num_images=NUMBER,
        image_size=SIZE,
        loss=losses.get(loss, losses.fixed(losses.options(loss)), contract(loss)),
    )


@functools.cache
def contract(loss):
    net = MODEL, methods.get("lora"), frozen_tree()
    return losses.check_contract(loss, losses.options(loss), net, (SIZE, SIZE))


def hyper(seed=0, lam=0.5, sigma=1.0):
    keys = jax.random.split(jax.random.key(seed), 2)
    rates = {"lr": jnp.full(8, 1e-2), "weight_decay": jnp.float32(0), "drop_path": jnp.float32(0.2)}
    own = {"lam": jnp.float32(lam), "sigma": jnp.float32(sigma)}
    return Hyper(**rates, noise_key=keys[0], order_key=keys[1], flip=jnp.array(True), loss=own)


def train_two_epochs(loss, devices, hypers):
    r, mesh = recipe(loss), mesh_lib.make_mesh(jax.devices()[:devices], len(hypers), 6)
    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    put = functools.partial(mesh_lib.put, mesh)
    keys = mesh_lib.put_trials(mesh, [jax.random.key(0)] * len(hypers))
    frozen = frozen_tree()
    frozen = put(P(), frozen)
    state, metrics = step.map_start(r, mesh)(keys, frozen)
    images = jnp.round((IMAGES + 1) * 127.5).astype(jnp.uint8)
    data, out = put(P(), {"images": images, "labels": LABELS}), []
    steps = step.map_train_steps(r, mesh)
    for epoch in range(2):
        now = [put(P(), jnp.int32(i)) for i in (epoch, 0, r.steps)]
        state, metrics = steps(
            frozen, data, state, metrics, put(P("trial"), stack(*hypers)), tuple(now)
        )
        out.append(jax.tree.map(np.asarray, metrics))
    return jax.tree.map(np.asarray, state), out


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("pace", "pace_lazy")), "pace_fast"]
)
def test_one_device_equals_four_and_trials_equal_single_runs(loss):
    hypers = [hyper(), hyper(1, lam=0.1, sigma=0.4)]
    alone = [train_two_epochs(loss, 1, [h]) for h in hypers]
    assert np.abs(alone[0][1][1]["loss"] - alone[1][1][1]["loss"]).max() > 1e-3
    for devices, together in ((4, [hypers[0]]), (1, hypers), (4, hypers)):
        state, metrics = train_two_epochs(loss, devices, together)
        for i in range(len(together)):
            for ours, single in zip(metrics, alone[i][1]):
                for name in ours:
                    np.testing.assert_allclose(ours[name][i], single[name][0], rtol=2e-3, atol=2e-4)
            if loss == "pace_fast":
                table = alone[i][0]["remembered"][0]
                assert np.abs(table).min(1).max() > 0 and table.shape == (NUMBER, 5)
                np.testing.assert_allclose(state["remembered"][i], table, rtol=0, atol=2e-3)


def test_fast_pulls_to_zero_first_and_then_to_the_last_epoch(monkeypatch):
    """In the first epoch the distance is that of the logits from 0."""
    batch = batch_of(IMAGES[:4], LABELS[:4], remembered=jnp.zeros((4, 5)))
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)))
    monkeypatch.setattr(pace, "_forward", lambda *_: logits)
    _, values = pace.pace_fast(None, batch, 0.5)
    np.testing.assert_allclose(values["distance"], (np.asarray(logits) ** 2).sum(1), rtol=1e-6)
    np.testing.assert_array_equal(values["remember"], logits)
    again = batch._replace(remembered=logits)
    assert pace.pace_fast(None, again, 0.5)[1]["distance"].max() == 0


def test_lazy_takes_half_the_images_in_every_second_step(monkeypatch):
    seen = []

    def forward(net, batch, noise):
        seen.append(batch.images.shape)
        return batch.images.reshape(len(batch.images), -1)[:, :5] * 3

    monkeypatch.setattr(pace, "_forward", forward)

    def run(number, b=5):
        batch = batch_of(IMAGES[:b], LABELS[:b], step=jnp.int32(number))
        one = jax.vmap(lambda x: pace.pace_lazy(None, x._replace(step=number)), axis_name="data")
        out = one(jax.tree.map(lambda x: x[None], batch))
        return jax.tree.map(lambda x: np.asarray(x[0]), out)

    (half, values), (whole, _) = run(0), run(1)
    assert seen == [(3, 8, 8, 3), (3, 8, 8, 3), (5, 8, 8, 3)] * 2 or (3, 8, 8, 3) in seen
    each = optax.softmax_cross_entropy_with_integer_labels(
        IMAGES[:5].reshape(5, -1)[:, :5] * 3, LABELS[:5]
    )
    np.testing.assert_allclose(whole, each, rtol=1e-5)
    np.testing.assert_allclose(half[[0, 2, 4]], each[::2] * 5 / 3, rtol=1e-5)
    assert (half[[1, 3]] == 0).all() and values["acc"].shape == (5,)
    np.testing.assert_allclose(half.sum() / 5, each[::2].mean(), rtol=1e-5)


def left(folder):
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = safetensors.numpy.load_file(folder / "adapter.safetensors")
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines], {
        k: v.tobytes() for k, v in trained.items()
    }


@pytest.mark.slow
def test_the_table_of_fast_is_in_the_checkpoint(tmp_path, monkeypatch):
    """A run that was stopped in its second epoch ends with the same bits."""
    config = vtab.get_config("digits,method=lora")
    config.update(epochs=2, loss="pace_fast", checkpoint_seconds=0.0, protocol="fast", average=0.9)
    suite.run(config, tmp_path / "whole")
    stop, seen = Stop(), []

    def add(self, images, seconds):
        seen.append(images)
        stop.asked = len(seen) == 34
        self.images, self.seconds = self.images + images, self.seconds + seconds

    monkeypatch.setattr(train.Clock, "steps", lambda self, images: 1)
    monkeypatch.setattr(train.Clock, "add", add)
    with pytest.raises(Stopped):
        suite.run(config, tmp_path / "stopped", stop)
    monkeypatch.undo()
    suite.run(config, tmp_path / "stopped")
    folder = "digits/lora/seed0"
    whole = left(tmp_path / "whole" / folder)
    assert whole == left(tmp_path / "stopped" / folder)
    assert whole[0][0]["train_distance"] > 0


@pytest.mark.slow
def test_pace_has_noise_on_a_projection_without_a_bias():
    model = models.build("bundled", 2, projection=8)
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)), jnp.float32)
    frozen = model.init(jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda x: x * 1.01, frozen)
    keys = jax.random.split(jax.random.key(1), 2)
    with jax.default_matmul_precision("highest"):
        plain = model.apply({"params": params}, images)
        same = change.apply(model, frozen, params, change.Noise(keys, 0.0), images)
    np.testing.assert_allclose(same, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["resnet18", "bundled"])
def test_where_nothing_is_changed_it_is_refused(variant):
    """Convolutions, and a method that adds to the tree."""
    model, method = models.build(variant, 2), methods.get("rlrr" if "resnet" in variant else "moppa")
    net = model, method, models.shapes(model, 32)
    with pytest.raises(UserError, match="this method changes none of this model: take another loss"):
        losses.check_contract("pace", losses.options("pace"), net, (32, 32))


TINY_SWIN = swin.Swin(8, (2, 2), (1, 2), 4, 4, num_classes=3)


@pytest.mark.parametrize(
    ("model", "side"),
    [(models.build("bundled", 5, pool="map"), 32), (TINY_SWIN, 32)],
    ids=["map", "swin"],
)
@pytest.mark.slow
def test_other_models_without_noise_are_merged(model, side):
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, side, side, 3)), jnp.float32)
    frozen = jax.jit(model.init)(jax.random.key(0), images)["params"]
    params = {**jax.tree.map(lambda x: x * 1.01, frozen), "head": frozen["head"]}
    params["head"] = jax.tree.map(lambda x: x + 0.1, frozen["head"])
    keys = jax.random.split(jax.random.key(1), 2)
    noisy = jax.jit(lambda s: change.apply(model, frozen, params, change.Noise(keys, s), images))
    plain = jax.jit(model.apply)({"params": params}, images)
    np.testing.assert_allclose(noisy(0.0), plain, rtol=1e-4, atol=1e-4)
    assert jnp.abs(noisy(5.0) - plain).max() > 1e-3


@pytest.mark.slow
def test_noise_of_a_map_head_is_of_each_output():
    model = models.build("bundled", 2, class_token=False, pool="map")
    shapes = models.shapes(model, 32)
    frozen = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    _, changed = change.split(frozen, jax.tree.map(lambda x: 1.1 * x, frozen))
    noise = change.multipliers(changed, change.Noise(jax.random.split(jax.random.key(0), 2), 1.0))
    (attention,) = [v for k, v in noise["MAPHead_0"].items() if "Attention" in k]
    assert attention["query"]["z"].shape == (2, 3, 32)  # images, heads, width of a head
