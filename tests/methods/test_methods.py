"""What holds for every method: merged equals its own definition, counts, starts, names refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax.traverse_util import flatten_dict
from float64 import double, in_float64
from marks import quick
from methods.direct import DIRECT
from models.test_vit import SMALL
from trees import apply, folded, images, moved, random_tree, started, zero_head

from rlrr_jax import methods, models, step
from rlrr_jax.models import vit
from rlrr_jax.recipe import Hyper, Recipe
from rlrr_jax.runtime import mesh as mesh_lib

MODEL = vit.ViT(**{**SMALL, "depth": 2})
LABELS = jnp.array([0, 3, 6, 1, 2])
SOME = ("rlrr", "linear", "lora", "ssf", "fact", "last")  # the others with -m slow
EVERY = [
    (name, {}) if name in SOME else pytest.param(name, {}, marks=pytest.mark.slow)
    for name in methods.METHODS
]
OPTIONS = [
    ("rlrr", dict(rank=3)),
    ("rlrr", dict(with_weight=False)),
    ("rlrr", dict(with_weight=False, rank=2, init="normal")),
    ("rlrr", dict(sides="left")),
    ("rlrr", dict(sides="right", shift=False)),
    ("rlrr", dict(residual=False)),
    ("rlrr", dict(residual=False, rank=2)),
    ("rlrr", dict(residual=False, sides="right")),
    ("rlrr", dict(where="mha")),
    ("rlrr", dict(where="ffn+patch")),
    ("rlrr", dict(layers=2, init="uniform")),
    ("last", dict(blocks=2)),
    ("lora", dict(rank=3, alpha=6, targets="key+Dense_0+Dense_1+out")),
    ("dora", dict(rank=3, alpha=6, targets="Dense_1+value")),
    ("vera", dict(rank=5, targets="query+Dense_0+Dense_1", projection_seed=3)),
    ("fact", dict(kind="tk", rank=4, scale=0.5)),
    ("arc", dict(bottleneck=3, where="mlp")),
    ("repadapter", dict(hidden=6, groups=2, scale=0.5, where="attention")),
    ("apla", dict(columns=5, column_seed=2)),
    ("hta", dict(rank=0, targets="value+out")),
    ("glora", dict(a="vector", b="low", c="vector", d="scalar", e="vector", rank=2)),
    ("glora", dict(a="scalar", b="vector", c="none", d="none", e="scalar", targets="query+Dense_1")),
    ("glora", dict(a="none", b="scalar", c="low", d="vector", rank=3)),
    ("oft", dict(block=4, targets="out+Dense_1")),
    ("pissa", dict(rank=3, targets="key+Dense_0")),
    ("hira", dict(rank=3, targets="query+Dense_1")),
]
QUICK = (0,)  # of the options; the others with -m slow
OPTIONS = [
    case if i in QUICK else pytest.param(*case, marks=pytest.mark.slow)
    for i, case in enumerate(OPTIONS)
]
CASES = pytest.mark.parametrize(
    ("name", "options"), EVERY + OPTIONS, ids=lambda x: x if isinstance(x, str) else f"{x or ''}"
)
# Leaves of the merged tree that a method may change, by endings; the head always.
CHANGES = {
    "linear": (),
    "bitfit": ("bias",),
    "norm": ("Norm_0/scale", "Norm_0/bias", "Norm_1/scale", "Norm_1/bias", "_norm/scale", "_norm/bias"),
    "lora": ("query/kernel", "value/kernel"),
    "dora": ("query/kernel", "value/kernel"),
    "vera": ("query/kernel", "value/kernel"),
    "fact": tuple(f"{n}/kernel" for n in ("query", "key", "value", "out", "Dense_0", "Dense_1")),
    "arc": tuple(f"{n}/{k}" for n in ("query", "key", "value", "Dense_0") for k in ("kernel", "bias")),
    "apla": ("out/kernel", "out/bias"),
    "hta": tuple(f"{n}/kernel" for n in ("query", "key", "value", "out")),
}
CHANGES["repadapter"], CHANGES["pissa"], CHANGES["oft"] = (
    CHANGES["arc"],
    CHANGES["lora"],
    CHANGES["fact"],
)
CHANGES["hira"] = CHANGES["fact"]
CHANGES["glora"] = tuple(x.replace("kernel", k) for x in CHANGES["fact"] for k in ("kernel", "bias"))
CHANGES["gps"] = ("kernel", "embedding/bias", *(k.replace("kernel", "bias") for k in CHANGES["fact"]))
CHANGES["difffit"] = ("bias", *CHANGES["norm"], "out/kernel", "Dense_1/kernel")
# Merging at the start changes nothing, except for these.
NOT_IDENTITY = ("rlrr", "ssf")
COUNTS = {  # on ViT-B/16
    "rlrr": 288_768,  # published
    "linear": 0,
    "full": 85_797_888,  # published as 85.8M
    "bitfit": 102_912,  # published as 0.10M
    "norm": 25 * 2 * 768,
    "last": 12 * 768**2 + 13 * 768 + 2 * 768,  # a block (7,087,872) and the final LayerNorm
    "ssf": 205_824,  # published as 0.24M with a mean head of 0.04M
    "lora": 294_912,  # published as 0.29M
    "dora": 294_912 + 24 * 768,
    "vera": 24_576,  # published as 24.6K
    "fact": 2 * 768 * 16 + 144 * 16**2,  # the paper's formula 2 d r + 12 L r^2
    "arc": 96_432,  # published as 0.13M with a mean head of 0.04M
    "repadapter": 239_808,  # published as 0.22M: 221,184 without its biases
    "apla": 12 * 768 * 769,
    # Factors of A and C (rank 4) and D of 6 Dense layers a block.
    "glora": 12
    * (4 * (4 * 2 * 768 + 4 * 769 + 768) + 4 * 3840 + 4 * 769 + 3072 + 4 * 3840 + 4 * 3073 + 768),
    "difffit": 102_912 + 25 * 768 + 24,
    "oft": 12 * (5 * 96 + 384) * 28,
    "gps": 2 * 83_712,  # an entry and a bias of each output: published as 0.21M with a mean head
    "pissa": 294_912,  # as LoRA: what it started from is not trained
    "knn": 0,
    "hira": 12 * 32 * (4 * 2 * 768 + 2 * 3840),
    "hta": 184_320,  # published as 0.22M with a mean head of 0.04M
}


def b16(size=224):
    model = models.build("B/16", 100)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def b16_shapes(name, **options):
    """Of the trained tree of a method on ViT-B/16."""
    start = functools.partial(methods.start, methods.get(name, **options))
    return jax.eval_shape(start, jax.random.key(0), b16())


@pytest.fixture(scope="module")
def frozen():
    return zero_head(random_tree(MODEL, 48))


def loss_of(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean(), logits


@jax.jit
def plain_gradient(params):
    """Logits and gradient of the ViT's own weights; compiled once for all methods."""
    model = MODEL.clone(dtype=jnp.float64)
    loss = lambda params: loss_of(model.apply({"params": params}, images()))
    (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return logits, grads


@CASES
@in_float64
def test_merged_equals_the_methods_own_definition(name, options, frozen):
    """Logits and gradients."""
    method = methods.get(name, **options)
    frozen = double(frozen)
    trainable = moved(double(started(method, frozen)))
    merge = lambda t: methods.merge(method, frozen, t)
    params = jax.jit(merge)(trainable)
    assert {x.dtype for x in jax.tree.leaves((trainable, params))} == {jnp.dtype("float64")}
    ours, grads = plain_gradient(params)
    (grads,) = jax.jit(lambda t, g: jax.vjp(merge, t)[1](g))(trainable, grads)

    def direct(trainable):
        params = {**frozen, "head": trainable["head"]}
        if name == "full":
            params |= {key: trainable["adapter"][key] for key in ("cls", "pos_embedding")}
        around = DIRECT[name](frozen, trainable["adapter"], **options)
        return loss_of(reference.forward(params, images(), 4, "tanh", around))

    (_, theirs), other_grads = jax.jit(jax.value_and_grad(direct, has_aux=True))(trainable)
    assert float(jnp.abs(ours).max()) > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)
    grads, other_grads = (flatten_dict(tree, sep="/") for tree in (grads, other_grads))
    for leaf, grad in grads.items():
        np.testing.assert_allclose(grad, other_grads[leaf], rtol=0, atol=1e-10, err_msg=leaf)
        # Softmax does not see what all keys share.
        no_gradient = leaf.endswith(("key/shift", "key/bias", "key/e")) or "/fixed/" in leaf
        assert no_gradient or np.abs(grad).max() > 0, leaf


@pytest.mark.parametrize("name", quick(methods.METHODS, "rlrr", "lora", "fact"))
def test_merging_gives_a_plain_tree_under_jit_vmap_and_eval_shape(name, frozen):
    method = methods.get(name)
    start, merge = (functools.partial(f, method) for f in (methods.start, methods.merge))
    keys = jax.random.split(jax.random.key(0), 2)
    trained = jax.jit(jax.vmap(start, (0, None)))(keys, frozen)
    shapes = jax.eval_shape(start, keys[0], frozen)
    assert jax.tree.map(lambda x: x.shape[1:], trained) == jax.tree.map(lambda x: x.shape, shapes)
    trained = moved(trained)
    both = jax.jit(jax.vmap(merge, (None, 0)))(frozen, trained)
    for i in (0, 1):
        one = folded(method, frozen, jax.tree.map(lambda x: x[i], trained))
        assert jax.tree.structure(one) == jax.tree.structure(frozen)
        for a, b, c in zip(*map(jax.tree.leaves, (one, frozen, both)), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            np.testing.assert_allclose(a, c[i], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", methods.METHODS)
def test_start(name, frozen):
    """Most start at the identity, and all with a zero head."""
    method = methods.get(name)
    merged = folded(method, frozen, started(method, frozen))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(merged["head"]))
    assert method.DEFAULTS.keys() == {"lr", "weight_decay", "drop_path"}
    near = 5e-7 if name == "dora" else 1e-7  # DoRA divides by lengths and multiplies with them
    same = jax.tree.leaves(jax.tree.map(lambda a, b: np.allclose(a, b, 0, near), merged, frozen))
    assert all(same) == (name not in NOT_IDENTITY)
    head = random_tree(MODEL, 48)["head"]
    ours, theirs = (apply(MODEL, {**tree, "head": head}, images()) for tree in (merged, frozen))
    assert np.allclose(ours, theirs, 0, 1e-6) == (name not in NOT_IDENTITY)


@pytest.mark.parametrize("name", [name for name in CHANGES if name in methods.METHODS])
def test_only_its_own_leaves_change(name, frozen):
    method = methods.get(name)
    merged = folded(method, frozen, moved(started(method, frozen)))
    ours, theirs = (flatten_dict(jax.tree.map(np.asarray, x), sep="/") for x in (merged, frozen))
    changed = {key for key in ours if (ours[key] != theirs[key]).any()}
    may = {key for key in ours if key.startswith("head/") or key.endswith(CHANGES[name] or "-")}
    assert changed == may


@pytest.mark.parametrize("name", methods.METHODS)
def test_counts(name):
    shapes = b16_shapes(name)
    assert methods.trainable_count(shapes) == COUNTS[name]
    assert methods.head_count(shapes) == 76_900


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("rlrr", dict(rank=2), 288_768 + 165_888),
        ("fact", dict(kind="tk", rank=16), 30_976),
        ("hta", dict(rank=0), 110_592),
        ("hta", dict(rank=2), 258_048),
        ("arc", dict(where="attention"), 48_216),
        ("apla", dict(columns=8), 73_824),
        ("last", dict(blocks=2), 2 * 7_087_872 + 1_536),
    ],
)
def test_counts_of_options(name, options, count):
    shapes = b16_shapes(name, **options)
    assert methods.trainable_count(shapes) == count


@pytest.mark.parametrize("name", methods.METHODS)
def test_decay(name, frozen):
    """The head's kernel decays, its bias does not; nor do biases, shifts of outputs and norms."""
    method = methods.get(name)
    decay = methods.decay(
        method, jax.eval_shape(functools.partial(methods.start, method), jax.random.key(0), frozen)
    )
    assert decay["head"] == {"kernel": True, "bias": False}
    names = {"/".join(k) for k, v in flatten_dict(decay).items() if v and k[0] != "head"}
    if name in ("linear", "knn", "bitfit", "norm", "ssf", "difffit", "oft", "gps"):
        assert not names
    elif name in ("full", "last", "apla"):
        assert names and all(n.endswith("kernel") for n in names)
    else:
        assert names


SHORT = ("bitfit",)  # the others with -m slow
TRAINED = [
    name if name in SHORT else pytest.param(name, marks=pytest.mark.slow)
    for name in methods.METHODS
    if name not in ("linear", "rlrr", "full")  # which test_step.py and whole runs train
]


@pytest.mark.parametrize("name", TRAINED)
def test_trains_in_the_common_step(name, frozen):
    """Two trials at once: eight steps on one batch lower the loss, and each is as if alone."""
    recipe = Recipe(MODEL, methods.get(name), batch_size=6, num_images=6, image_size=48)
    mesh = mesh_lib.make_mesh(jax.devices()[:1], 2)
    rng = np.random.default_rng(0)
    data = {"images": rng.integers(0, 256, (6, 48, 48, 3), np.uint8), "labels": np.arange(6) % 3}
    data["labels"] = data["labels"].astype(np.int32)
    lrs = (1e-2, 3e-3)
    hyper = [
        Hyper(
            lr=jnp.array([lr] * 9),
            weight_decay=jnp.array(1e-4),
            drop_path=jnp.array(0.1),
            flip=jnp.array(False),
            noise_key=jax.random.key(1),
            order_key=jax.random.key(2),
        )
        for lr in lrs
    ]
    keys = jax.random.split(jax.random.key(0), 2)
    start = step.map_start(recipe, mesh)
    train = step.map_train_steps(recipe, mesh)
    losses = []
    for trials in ([0, 1], [0], [1]):
        state, metrics = start(keys[jnp.array(trials)], frozen)
        owned = jax.tree.map(lambda *x: jnp.stack(x), *[hyper[i] for i in trials])
        losses.append([])
        for epoch in range(9):
            state, metrics = train(frozen, data, state, metrics, owned, (epoch, 0, 1))
            losses[-1].append(np.asarray(metrics["loss"])[:, 0])
    both, *alone = (np.array(x) for x in losses)
    np.testing.assert_allclose(both, np.concatenate(alone, 1), rtol=0, atol=1e-3)
    assert (both[-1] < both[0] - 0.01).all(), both


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown method 'rlr': did you mean 'rlrr'"):
        methods.get("rlr")
    with pytest.raises(ValueError, match="unknown option of method 'rlrr' 'inti': did you mean 'init'"):
        methods.get("rlrr", inti="paper")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rlrr", dict(init="zeros"), "unknown init 'zeros' of method 'rlrr': use paper, scaled"),
        ("rlrr", dict(sides="up"), "use both, left, right"),
        ("rlrr", dict(rank=0), "option rank=0 must be a whole number greater than 0"),
        ("rlrr", dict(rank=2, sides="left"), "rank=2 needs both sides"),
        ("rlrr", dict(with_weight=False, residual=False), "needs both sides and the residual"),
        ("rlrr", dict(where="mlp"), "unknown place of method 'rlrr' 'mlp'.* joined by .: mha, ffn"),
        ("rlrr", dict(residual="false"), "option residual=false must be True or False"),
        ("lora", dict(alpha="x"), "option alpha=x must be a number"),
        ("fact", dict(scale="x"), "option scale=x must be a number"),
        ("rlrr", dict(layers=0), "option layers=0 must be"),
        ("lora", dict(targets="query+vlue"), "'vlue': did you mean 'value'"),
        ("lora", dict(rank="eight"), "option rank=eight must be a whole number"),
        ("fact", dict(kind="tp"), "unknown kind 'tp' of method 'fact': use tt or tk"),
        ("repadapter", dict(hidden=5), "hidden=5 is not divisible by groups=2"),
        ("hta", dict(targets="Dense_0"), "unknown target of method 'hta' 'Dense_0'"),
        ("glora", dict(c="scalar"), "unknown c 'scalar' of method 'glora': use low, vector, none"),
        ("oft", dict(block=0), "option block=0 must be a whole number"),
        ("lora", dict(rank_dropout=1), "option rank_dropout=1 must be at least 0 and less than 1"),
        ("rlrr", dict(rank_dropout=0.5), "rank_dropout needs a rank above 1"),
    ],
)
def test_impossible_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        methods.get(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rlrr", dict(layers=4), "option layers=4 is more than the 2 blocks of the model"),
        ("last", dict(blocks=4), "option blocks=4 is more than the 2 blocks of the model"),
        ("oft", dict(block=5), "option block=5 does not divide the 32 inputs of query"),
        ("apla", dict(columns=33), "option columns=33 is more than the model's width 32"),
    ],
)
def test_options_that_do_not_fit_the_model(name, options, message, frozen):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(methods.get(name, **options).init, jax.random.key(0), frozen)


# Newer methods --------------------------------------------------------------------------------


def kernels(tree):
    return {
        key: x for key, x in flatten_dict(tree, sep="/").items() if key.endswith(("kernel", "bias"))
    }


def test_glora_contains_rlrr_lora_and_prompts(frozen):
    """The same factors under other names give the same weights."""
    rlrr = methods.get("rlrr", where="mha+ffn")
    glora = methods.get("glora", a="low", c="none", d="none", e="vector", rank=1)
    ours = moved(jax.jit(rlrr.init)(jax.random.key(0), frozen))
    flat, as_glora = flatten_dict(ours, sep="/"), {}
    for path, x in flat.items():
        *_, name, leaf = path.split("/")
        node = as_glora.setdefault(name, {"a": {}})
        if leaf == "shift":
            node["e"] = x.reshape(len(x), -1)
        else:
            side, axes = ("down", (len(x), -1, 1)) if leaf == "scale_in" else ("up", (len(x), 1, -1))
            node["a"][side] = x.reshape(axes)
    expected = kernels(jax.jit(rlrr.merge)(frozen, ours))
    for key, x in kernels(jax.jit(glora.merge)(frozen, as_glora)).items():
        np.testing.assert_allclose(x, expected[key], rtol=0, atol=1e-6, err_msg=key)
    lora = methods.get("lora", rank=3)
    tree = moved(jax.jit(lora.init)(jax.random.key(1), frozen))
    only_b = methods.get("glora", a="none", b="low", c="none", d="none", rank=3, targets="query+value")
    same = {name: {"b": node} for name, node in tree.items()}
    expected = kernels(jax.jit(lora.merge)(frozen, tree))
    for key, x in kernels(jax.jit(only_b.merge)(frozen, same)).items():
        np.testing.assert_allclose(x, expected[key], rtol=0, atol=1e-6, err_msg=key)


def test_oft_keeps_lengths_and_angles_of_kernels(frozen):
    method = methods.get("oft", block=8)
    merged = jax.jit(method.merge)(frozen, moved(jax.jit(method.init)(jax.random.key(0), frozen)))
    attention = lambda tree: tree["Transformer"]["encoderblock"]["MultiHeadDotProductAttention_0"]
    ours, theirs = (
        np.asarray(attention(t)["query"]["kernel"]).reshape(2, 32, -1) for t in (merged, frozen)
    )
    gram = lambda x: np.einsum("lio,lip->lop", x, x)
    np.testing.assert_allclose(gram(ours), gram(theirs), rtol=0, atol=2e-5)
    assert np.abs(ours - theirs).max() > 0.01


def test_pissa_starts_at_the_largest_singular_vectors(frozen):
    method = methods.get("pissa", rank=4)
    adapter = jax.jit(method.init)(jax.random.key(0), frozen)
    attention = frozen["Transformer"]["encoderblock"]["MultiHeadDotProductAttention_0"]
    for block in range(3):
        kernel = np.asarray(attention["query"]["kernel"][block]).reshape(32, -1)
        u, s, v = np.linalg.svd(kernel.astype(np.float64))
        ours = adapter["query"]["down"][block] @ adapter["query"]["up"][block]
        np.testing.assert_allclose(ours, (u[:, :4] * s[:4]) @ v[:4], rtol=0, atol=1e-5)


def test_what_is_fixed_stays_in_training(frozen):
    """Weight decay, the optimiser and noise leave it alone, whatever else is trained."""
    method = methods.get("pissa", rank=2)
    recipe = Recipe(MODEL, method, batch_size=6, num_images=6, image_size=48)
    mesh = mesh_lib.make_mesh(jax.devices()[:1], 1)
    rng = np.random.default_rng(0)
    data = {
        "images": rng.integers(0, 256, (6, 48, 48, 3), np.uint8),
        "labels": np.arange(6, dtype=np.int32),
    }
    values = dict(lr=jnp.full(9, 1e-2), weight_decay=jnp.array(0.5), drop_path=jnp.array(0.1))
    keys = {"noise_key": jax.random.key(1), "order_key": jax.random.key(2)}
    hyper = Hyper(**values, **keys, flip=jnp.array(False))
    state, metrics = step.map_start(recipe, mesh)(jax.random.split(jax.random.key(0), 1), frozen)
    before = jax.tree.map(np.array, state["trainable"]["adapter"])
    hyper = jax.tree.map(lambda x: x[None], hyper)
    state, _ = step.map_train_steps(recipe, mesh)(frozen, data, state, metrics, hyper, (0, 0, 1))
    after = state["trainable"]["adapter"]
    jax.tree.map(np.testing.assert_array_equal, before["fixed"], after["fixed"])
    assert (before["query"]["down"] != np.asarray(after["query"]["down"])).all()


@pytest.mark.parametrize(("name", "factor"), [("lora", "down"), ("rlrr", "scale_in")])
def test_dropout_of_ranks(name, factor, frozen):
    """Each layer's ranks are dropped on their own at the rate, the rest enlarged; merged has all."""
    method = methods.get(name, rank=4, rank_dropout=0.25)
    adapter = moved(jax.jit(method.init)(jax.random.key(0), frozen))
    before, seen = flatten_dict(adapter, sep="/"), []
    for number in range(60):
        dropped = flatten_dict(method.drop(jax.random.key(number), adapter), sep="/")
        for path, x in before.items():
            if not path.endswith(factor):
                np.testing.assert_array_equal(dropped[path], x)
                continue
            ratio = np.asarray(dropped[path] / x).reshape(len(x), -1, 4)
            assert ((ratio == 0) == (ratio[:, :1] == 0)).all()  # whole ranks
            np.testing.assert_allclose(ratio[ratio != 0], 4 / 3, rtol=1e-5)
            seen.append(ratio[:, 0] == 0)
    seen = np.concatenate(seen)
    assert abs(seen.mean() - 0.25) < 0.02 and len({tuple(x) for x in seen}) > 8
    trained = {"adapter": adapter, "head": frozen["head"]}
    plain, noisy = (methods.merge(method, frozen, trained, key) for key in (None, jax.random.key(0)))
    expected = method.merge(frozen, adapter)["Transformer"]
    jax.tree.map(np.testing.assert_array_equal, plain["Transformer"], expected)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), noisy["Transformer"], expected)
    assert not all(jax.tree.leaves(same))


def test_scales_of_ranks_are_those_of_mlae(frozen):
    """One of 1 is LoRA; each rank's outer product is times its own, and dropped with it."""
    method = methods.get("lora", rank=4, rank_dropout=0.5, rank_scale=1.0)
    adapter = moved(jax.jit(method.init)(jax.random.key(0), frozen))
    plain = {name: {k: node[k] for k in ("down", "up")} for name, node in adapter.items()}
    scaled = {name: {**node, "scale": jnp.ones_like(node["scale"])} for name, node in adapter.items()}
    same = jax.jit(methods.get("lora", rank=4).merge)(frozen, plain)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(method.merge)(frozen, scaled), same)
    kernel = lambda tree: attention(tree)["query"]["kernel"]
    attention = lambda tree: tree["Transformer"]["encoderblock"]["MultiHeadDotProductAttention_0"]
    change = kernel(jax.jit(method.merge)(frozen, adapter)) - kernel(frozen)
    node = jax.tree.map(lambda x: np.asarray(x, np.float64), adapter["query"])
    terms = [
        node["scale"][:, k, None, None] * node["down"][:, :, k, None] * node["up"][:, None, k]
        for k in range(4)
    ]
    np.testing.assert_allclose(change.reshape(terms[0].shape), sum(terms), rtol=1e-3, atol=1e-6)
    quarter = methods.get("lora", rank_scale=0.25)
    starts = jax.jit(quarter.init)(jax.random.key(0), frozen)["value"]["scale"]
    assert starts.shape == (len(node["down"]), 8) and (starts == 0.25).all()
    assert not method.decay(adapter)["query"]["scale"]


def test_the_command_lists_every_method(monkeypatch, capsys):
    """Those of projects, too, whose defaults are not numbers alone."""
    from rlrr_jax import lookup
    from rlrr_jax.methods import __main__ as command

    monkeypatch.setattr("sys.argv", ["methods", "--model=bundled"])
    command.main()
    said = capsys.readouterr().out
    for name in lookup.names("method"):
        assert f"\n{name}: " in f"\n{said}"
    assert "18,240 values and the head on bundled; lr 0.003, weight_decay 5e-05, drop_path 0.1" in said
