"""PACE against numbers of its authors' code, and against a second way to compute it."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from golden import DATA
from jax.sharding import PartitionSpec as P

from rlrr_jax import change, losses, methods, step, suite, train
from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError
from rlrr_jax.models import exits, vit
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
    return losses.Batch(images=images, labels=labels, **{**plain, **values})


# The authors' code ----------------------------------------------------------------------------


class Recorded:
    """The case of `pace_open.npz` under our names."""

    def __init__(self):
        data = dict(np.load(DATA / "pace_open.npz", allow_pickle=False))
        width, depth, heads, patch, _, classes, _ = map(int, data["config"])
        self.data, self.depth, self.heads = data, depth, heads
        self.model = vit.ViT(width, depth, 2 * width, heads, patch, classes, gelu="exact")
        self.frozen = self.ours(self.under("pretrained/"))
        self.frozen["head"] = jax.tree.map(jnp.zeros_like, self.frozen["head"])

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
    monkeypatch.setattr(losses, "_noise", lambda batch, number, sigma: number)
    monkeypatch.setattr(change, "multipliers", lambda _, number: recorded.noise(number))
    batch = batch_of(jnp.asarray(data["images_nhwc"]), jnp.asarray(data["labels"], jnp.int32))

    def total(adapter):
        params = recorded.merge(adapter)
        forward = lambda images, keys, noise: change.apply(
            recorded.model, recorded.frozen, params, noise, images
        )
        each, values = losses.pace(forward, batch, lam=float(data["lam"]))
        logits = forward(batch.images, None, 0), recorded.model.apply({"params": params}, batch.images)
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
    return {**tree, "head": jax.tree.map(jnp.zeros_like, tree["head"])}


def trained_tree(method, seed=3):
    tree = methods.start(method, jax.random.key(seed), frozen_tree())
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    move = lambda key, x: x + 0.1 * jax.random.normal(key, x.shape)
    return jax.tree.unflatten(structure, [move(k, x) for k, x in zip(keys, leaves)])


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


@pytest.mark.parametrize("name", ["rlrr", pytest.param("lora", marks=pytest.mark.slow)])
def test_loss_and_gradient_are_those_of_weights_of_each_image(name):
    method, frozen = methods.get(name), frozen_tree()
    batch = batch_of(IMAGES[:4], LABELS[:4])

    def ours(trained):
        params = methods.merge(method, frozen, trained)
        forward = lambda images, keys, noise: change.apply(MODEL, frozen, params, noise, images)
        return losses.pace(forward, batch, 0.7, 1.3)[0].mean()

    def plain(trained):
        params = methods.merge(method, frozen, trained)
        _, moved = change.split(frozen, params)
        logits = [
            each_image_its_own_weights(
                frozen, params, change.multipliers(moved, losses._noise(batch, i, 1.3))
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


SHORT = ("rlrr", "ssf", "glora")  # the others with -m slow


@pytest.mark.parametrize(
    "name",
    [x if x in SHORT else pytest.param(x, marks=pytest.mark.slow) for x in methods.METHODS],
)
def test_without_noise_it_is_the_merged_model(name):
    method, frozen = methods.get(name), frozen_tree()
    params = methods.merge(method, frozen, trained_tree(method))
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
    params = methods.merge(method, frozen, trained_tree(method))
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
    return step.Recipe(
        model=MODEL.clone(exits=(1,)) if loss == "exits" else MODEL,
        method=methods.get("lora"),
        batch_size=6,
        num_images=NUMBER,
        image_size=SIZE,
        loss=functools.partial(losses.LOSSES[loss], **losses.fixed(losses.options(loss))),
    )


def hyper(seed=0, lam=0.5, sigma=1.0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        **{"lr": jnp.full(8, 1e-2), "weight_decay": jnp.float32(0), "drop_path": jnp.float32(0.2)},
        **{"noise_key": keys[0], "order_key": keys[1], "flip": jnp.array(True)},
        "loss": {"lam": jnp.float32(lam), "sigma": jnp.float32(sigma)},
    }


def for_loss(loss, hyper):
    """Hyper-parameters of PACE as those of another loss."""
    if loss != "exits":
        return hyper
    lam, sigma = hyper["loss"]["lam"], hyper["loss"]["sigma"]
    return {**hyper, "loss": {"early": lam, "distill": sigma, "graph": lam + sigma}}


def train_two_epochs(loss, devices, hypers):
    r, mesh = recipe(loss), mesh_lib.make_mesh(jax.devices()[:devices], len(hypers), 6)
    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    put = functools.partial(mesh_lib.put, mesh)
    keys = mesh_lib.put_trials(mesh, [jax.random.key(0)] * len(hypers))
    frozen = frozen_tree()
    if loss == "exits":
        width, classes = frozen["head"]["kernel"].shape
        frozen = {**frozen, "head": {**frozen["head"], "exits": exits.empty(1, width, classes)}}
    frozen, hypers = put(P(), frozen), [for_loss(loss, h) for h in hypers]
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


@pytest.mark.parametrize(
    "loss",
    [*(pytest.param(x, marks=pytest.mark.slow) for x in ("pace", "pace_lazy", "exits")), "pace_fast"],
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


def test_fast_pulls_to_zero_first_and_then_to_the_last_epoch():
    """In the first epoch the distance is that of the logits from 0."""
    batch = batch_of(IMAGES[:4], LABELS[:4], remembered=jnp.zeros((4, 5)))
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)))
    _, values = losses.pace_fast(lambda images, keys, noise: logits, batch, 0.5)
    np.testing.assert_allclose(values["distance"], (np.asarray(logits) ** 2).sum(1), rtol=1e-6)
    np.testing.assert_array_equal(values["remember"], logits)
    again = batch._replace(remembered=logits)
    assert losses.pace_fast(lambda *_: logits, again, 0.5)[1]["distance"].max() == 0


def test_exits_are_what_numpy_computes():
    rng = np.random.default_rng(0)
    logits, features = rng.normal(size=(6, 3, 5)), rng.normal(size=(6, 2, 4))
    labels, mask = np.array([0, 1, 0, 0, 1, 2]), np.array([1, 1, 1, 1, 1, 0.0])
    batch = batch_of(IMAGES[:6], jnp.asarray(labels), mask=jnp.asarray(mask, jnp.float32))
    given = jnp.asarray(logits), jnp.asarray(features)
    one = lambda batch: losses.exits(lambda *_, exits: given, batch, 0.5, 2.0, 3.0)
    run = jax.jit(jax.vmap(one, axis_name="data"))
    each, values = run(jax.tree.map(lambda x: x[None], batch))
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i in range(5):
        entropy = [-log[i, place, labels[i]] for place in range(3)]
        last = np.exp(log[i, 2])
        divergence = [(last * (log[i, 2] - log[i, place])).sum() for place in range(2)]
        alike = [j for j in range(5) if labels[j] == labels[i] and j != i]  # image 5 is padding
        distance = np.mean([((features[i] - features[j]) ** 2).mean() for j in alike])
        wanted = entropy[2] + 0.5 * np.mean(entropy[:2]) + 2 * np.mean(divergence) + 3 * distance
        assert float(each[0, i]) == pytest.approx(wanted, rel=1e-5)
        assert float(values["distance"][0, i]) == pytest.approx(distance, rel=1e-5)
        assert values["acc"][0, i] == (logits[i, 2].argmax() == labels[i])
        early = (logits[i, :2].argmax(-1) == labels[i]).mean()
        assert float(values["early_acc"][0, i]) == pytest.approx(early)


def test_exits_are_the_same_on_four_devices():
    """Images of a label lie on several; loss and gradient, as the step sums them."""
    rng = np.random.default_rng(0)
    given = jnp.asarray(rng.normal(size=(8, 3, 5))), jnp.asarray(rng.normal(size=(8, 2, 4)))
    batch = batch_of(jnp.zeros((8, 1)), jnp.asarray([0, 1, 0, 2, 1, 0, 2, 2]), step=jnp.zeros(8))

    def total(given, devices):
        one = lambda given, batch: losses.exits(lambda *_, exits: given, batch)[0]
        cut = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), (given, batch))
        return jax.vmap(one, axis_name="data")(*cut).sum()

    run = jax.jit(jax.value_and_grad(total), static_argnums=1)
    (a, ga), (b, gb) = (run(given, devices) for devices in (1, 4))
    assert float(a) == pytest.approx(float(b), rel=1e-6) and np.abs(ga[1]).max() > 1e-3
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), ga, gb)


def test_the_last_exit_learns_nothing_from_the_others():
    """Distillation goes one way."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 5)))

    def loss(logits, distill):
        forward = lambda *_, exits: (logits, jnp.zeros((4, 2, 3)))
        one = lambda batch: losses.exits(forward, batch, 0.0, distill, 0.0)[0]
        batch = batch_of(IMAGES[:4], LABELS[:4])
        return jax.vmap(one, axis_name="data")(jax.tree.map(lambda x: x[None], batch)).sum()

    run = jax.jit(jax.grad(loss))
    without, grads = (run(logits, distill) for distill in (0.0, 1.0))
    np.testing.assert_allclose(grads[:, 2], without[:, 2], rtol=1e-6)
    assert np.abs(grads[:, :2]).max() > 0.01 and np.abs(without[:, :2]).max() == 0


def test_lazy_takes_half_the_images_in_every_second_step():
    seen = []

    def forward(images, keys, noise):
        seen.append(images.shape)
        return images.reshape(len(images), -1)[:, :5] * 3

    def run(number, b=5):
        batch = batch_of(IMAGES[:b], LABELS[:b], step=jnp.int32(number))
        one = jax.vmap(lambda x: losses.pace_lazy(forward, x._replace(step=number)), axis_name="data")
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


# Options --------------------------------------------------------------------------------------


def test_options_are_checked_before_any_work():
    assert losses.check("pace", {"lam": 2}) == {"lam": 2.0, "sigma": 1.0}
    assert losses.fixed(losses.check("pace_lazy", {"every": 4})) == {"every": 4}
    for name, given, message in (
        ("pace", {"lamda": 1.0}, "unknown option of loss 'pace' 'lamda': did you mean 'lam'"),
        ("pace", {"lam": -1.0}, "config.loss_kwargs.lam=-1.0 must be a number like 1.0"),
        ("pace", {"sigma": "x"}, "config.loss_kwargs.sigma=x must be a number"),
        ("pace", {"lam": math.nan}, "config.loss_kwargs.lam=nan must be a number like 1.0"),
        ("pace_lazy", {"every": 0}, "config.loss_kwargs.every=0 must be at least 1"),
        ("pace_lazy", {"every": 1.5}, "config.loss_kwargs.every=1.5 must be a number like 2"),
        ("cross_entropy", {"lam": 1.0}, "unknown option of loss 'cross_entropy' 'lam'"),
    ):
        with pytest.raises(UserError, match=message):
            losses.check(name, given)


def wide(forward, batch):
    losses, values = losses_of(forward, batch)
    return losses[:, None], values


def losses_of(forward, batch):
    return losses.cross_entropy(forward, batch)


MISFITS = {
    "two axes": (
        wide,
        r"must return losses of shape \(2,\) for 2 images, not \(2, 1\): return one for",
    ),
    "a mean": (lambda f, b: (losses_of(f, b)[0].mean(), losses_of(f, b)[1]), r"losses .* not \(\)"),
    "a value of the batch": (
        lambda f, b: (losses_of(f, b)[0], {"acc": losses_of(f, b)[0].mean()}),
        r"must return acc of shape \(2,\)",
    ),
    "no accuracy": (lambda f, b: (losses_of(f, b)[0], {}), "must return the value 'acc'"),
    "a value called loss": (
        lambda f, b: (losses_of(f, b)[0], {"acc": losses_of(f, b)[0], "loss": losses_of(f, b)[0]}),
        "and none of name 'loss'",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_loss_that_returns_something_else_is_refused(what, monkeypatch):
    loss, message = MISFITS[what]
    monkeypatch.setitem(losses.LOSSES, what, loss)
    with pytest.raises(UserError, match=message):
        losses.check_contract(what, {}, 2)


def test_a_loss_is_checked_with_the_options_and_classes_of_the_run(monkeypatch):
    def loss(forward, batch, k=0):
        logits = forward(batch.images, batch.keys)
        top = jax.lax.top_k(logits, k)[0].sum(-1)
        return top, {"acc": top}

    monkeypatch.setitem(losses.LOSSES, "top", loss)
    losses.check_contract("top", losses.check("top", {"k": 5}), 100)
    with pytest.raises(ValueError, match="top_k"):  # a fork's own mistake
        losses.check_contract("top", {"k": 5}, 2)


def test_options_of_other_kinds_and_signs(monkeypatch):
    def loss(forward, batch, margin=0.0, weights=(1.0, 2.0), name=None):
        return losses.cross_entropy(forward, batch)

    monkeypatch.setitem(losses.LOSSES, "margin", loss)
    given = {"margin": -0.5, "weights": (3, 1)}
    assert losses.check("margin", given) == {"margin": -0.5, "weights": (3, 1), "name": None}
