"""ResNets against torchvision, timm, and BiT's definitions written with NumPy-like operations here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from rlrr_jax import methods, models
from rlrr_jax.errors import UserError
from rlrr_jax.models import resnet
from rlrr_jax.weights import preprocessing, reader, resnet_layouts

TINY = resnet.ResNet((1, 1), True, False, 1, 3)  # one bottleneck in each of two stages
BIT = TINY.clone(bit=True)
HOW = reader.How(mean=preprocessing.HALF, std=preprocessing.HALF, resize="bicubic")


def random_tree(model, size=32):
    random = np.random.default_rng(0)

    def value(path, x):
        start = random.normal(1 if path[-1].key == "scale" else 0, 0.1, x.shape)
        return jnp.array(start, jnp.float32)

    return jax.tree_util.tree_map_with_path(value, models.shapes(model, size))


def pictures(size=32, number=2):
    return np.random.default_rng(1).uniform(-1, 1, (number, size, size, 3)).astype(np.float32)


def logits(model, tree, images):
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda p, x: model.apply({"params": p}, x))(tree, images))


# Values with a 100-way head: RLRR of rank 1 and 10, and all (supplement G, table 12).
PAPER = {"resnet18": (74_809, 286_390, 11_227_812), "resnet50": (269_497, 850_870, 23_712_932)}


@pytest.mark.parametrize("variant", PAPER)
def test_counts_are_the_papers(variant):
    shapes = models.shapes(models.build(variant, 100), 224)
    head = sum(x.size for x in jax.tree.leaves(shapes["head"]))
    ranks = [methods.check("rlrr", methods.get("rlrr", rank=rank), shapes) for rank in (1, 10)]
    counts = [methods.trainable_count({"adapter": adapter}) + head for adapter in ranks]
    assert (*counts, sum(x.size for x in jax.tree.leaves(shapes))) == PAPER[variant]
    flat = flatten_dict(ranks[0], sep="/")
    assert {key.rpartition("/")[2] for key in flat} == {"scale_in", "scale_out"}  # no shift, no norm


@pytest.mark.parametrize("rank", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_convolution_is_rescaled_as_the_matrix_of_the_paper(rank):
    """`RLRR_ResNet.py`: kernel [O, I, k, k] as a matrix of (O, row) by (I, column)."""
    tree = random_tree(TINY)
    method = methods.get("rlrr", rank=rank)
    adapter = jax.jit(method.init)(jax.random.key(0), tree)
    merged = jax.jit(method.merge)(tree, adapter)
    for name in ("conv_root", "stage_1_unit_0/conv2"):
        path = name.split("/")
        kernel, node, ours = tree, adapter, merged
        for key in path:
            kernel, node, ours = kernel[key], node[key], ours[key]
        kernel = np.asarray(kernel["kernel"], np.float64)
        k, _, inputs, outputs = kernel.shape
        matrix = kernel.transpose(3, 0, 2, 1).reshape(outputs * k, inputs * k)
        column = np.asarray(node["scale_in"], np.float64).reshape(inputs * k, rank)
        line = np.asarray(node["scale_out"], np.float64).reshape(rank, outputs * k)
        wanted = (matrix * (1 + (column @ line).T)).reshape(outputs, k, inputs, k)
        np.testing.assert_allclose(ours["kernel"], wanted.transpose(1, 3, 2, 0), atol=1e-5)
        assert np.abs(column).max() <= np.sqrt(6 / (inputs * k))
        assert np.abs(line).max() <= np.sqrt(6 / rank)


@pytest.mark.parametrize("model", [TINY, BIT], ids=["resnet", "bit"])
def test_a_tuned_model_is_the_plain_one_on_merged_weights_and_zero_changes_nothing(model):
    tree = random_tree(model)
    zero = methods.get("rlrr", init="identity")
    same = jax.jit(zero.merge)(tree, jax.jit(zero.init)(jax.random.key(0), tree))
    jax.tree.map(np.testing.assert_array_equal, same, tree)
    method = methods.get("rlrr")
    merged = jax.jit(method.merge)(tree, jax.jit(method.init)(jax.random.key(0), tree))
    assert np.abs(logits(model, merged, pictures()) - logits(model, tree, pictures())).max() > 1e-3


@pytest.mark.parametrize("model", [TINY, BIT], ids=["resnet", "bit"])
def test_names_come_back(model, tmp_path):
    tree, path = random_tree(model), tmp_path / "x.safetensors"
    safetensors.numpy.save_file(resnet_layouts.to_timm(tree), path)
    again = reader.load(path, model=model, image_size=32, how=HOW, head=True)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, again, jax.tree.map(np.asarray, tree))


@pytest.mark.parametrize(
    ("size", "stride"), [pytest.param(7, 2, marks=pytest.mark.slow), (3, 1), (1, 2)]
)
def test_convolution_by_matmul_is_xlas(size, stride):
    x = jax.random.normal(jax.random.key(0), (2, 9, 12, 5))
    kernel = jax.random.normal(jax.random.key(1), (size, size, 5, 4))
    for argument in (0, 1):
        ours, xlas = (
            jax.value_and_grad(lambda *a, f=f: jnp.sin(f(*a, stride)).sum(), argument)(x, kernel)
            for f in (resnet.by_matmul, resnet.by_xla)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, xlas)


def test_files_of_another_kind_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(resnet_layouts.to_timm(random_tree(TINY)), path)
    with pytest.raises(UserError, match=r"no array 'stem.conv.weight'.*check config.model"):
        reader.load(path, model=BIT, image_size=32, how=HOW)
    state = resnet_layouts.to_timm(random_tree(TINY))
    del state["bn1.running_mean"]
    safetensors.numpy.save_file(state, path)
    with pytest.raises(UserError, match="the BatchNorm bn_root is not whole"):
        reader.load(path, model=TINY, image_size=32, how=HOW)
    del state["bn1.running_var"]
    safetensors.numpy.save_file(state, path)
    with pytest.raises(UserError, match="bn_root is no BatchNorm .*another ResNet"):
        reader.load(path, model=TINY, image_size=32, how=HOW)
    imagenet = reader.How(
        mean=preprocessing.IMAGENET[0], std=preprocessing.IMAGENET[1], resize="bicubic"
    )
    with pytest.raises(UserError, match=r"build the model with mean=\(0.485, .*std="):
        reader.load(path, model=TINY, image_size=32, how=imagenet)
    with pytest.raises(UserError, match="no ResNet of BiT"):
        reader.load("bundled", model=BIT, image_size=32, how=HOW)
    with pytest.raises(UserError, match="too small: set config.image_size to 32"):
        models.check_size(TINY, 16)


def bit_names(tree):
    """A tree by the names of the public BiT files."""
    out = {}
    for key, value in flatten_dict(tree, sep="/").items():
        value, (*unit, layer, leaf) = np.asarray(value), key.split("/")
        leaf = {"scale": "gamma", "bias": "beta"}.get(leaf, leaf)
        if unit:
            stage, number = unit[0].split("_")[1::2]
            unit = f"block{int(stage) + 1}/unit{int(number) + 1:02d}/"
            inner = "a/proj" if layer == "conv_proj" else "abc"[int(layer[-1]) - 1]
            kind = "group_norm" if layer.startswith("gn") else "standardized_conv2d"
            out[f"resnet/{unit}{inner}/{kind}/{leaf}"] = value
        elif layer == "head":
            leaf = key.split("/")[-1]
            out[f"resnet/head/conv2d/{leaf}"] = value[None, None] if leaf == "kernel" else value
        else:
            name = {"conv_root": "root_block/standardized_conv2d", "gn_head": "group_norm"}[layer]
            out[f"resnet/{name}/{leaf}"] = value
    return out


def test_bit_is_big_visions(tmp_path):
    """BiT's forward pass from the names of its files, as models/bit_paper.py of big_vision has it."""
    tree = random_tree(BIT)
    flat = bit_names(tree)
    path = tmp_path / "BiT-M-R50x1.npz"
    np.savez(path, **flat)
    read = reader.load(path, model=BIT, image_size=32, how=HOW, head=True)
    jax.tree.map(np.testing.assert_array_equal, read, jax.tree.map(np.asarray, tree))

    def conv(x, name, stride=1):
        w = flat[f"resnet/{name}standardized_conv2d/kernel"].astype(np.float64)
        w = w - w.mean((0, 1, 2))[None, None, None]
        w = w / np.sqrt((w**2).mean((0, 1, 2)) + 1e-10)[None, None, None]
        k, pad = len(w), len(w) // 2
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        side = (x.shape[1] - k) // stride + 1
        rows = [[x[:, i * stride : i * stride + k, j * stride : j * stride + k] for j in range(side)]
                for i in range(side)]  # fmt: skip
        return np.einsum("ijbhwc,hwco->bijo", np.array(rows), w)

    def norm(x, name):
        grouped = x.reshape(len(x), -1, 32, x.shape[-1] // 32)
        mean, var = (f((1, 3))[:, None, :, None] for f in (
            lambda axes: grouped.mean(axes), lambda axes: grouped.var(axes)))  # fmt: skip
        y = ((grouped - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
        gamma, beta = (flat[f"resnet/{name}group_norm/{leaf}"] for leaf in ("gamma", "beta"))
        return np.maximum(y * gamma[None, None, None] + beta[None, None, None], 0)

    x = conv(pictures().astype(np.float64), "root_block/", 2)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    side = (x.shape[1] - 3) // 2 + 1
    x = np.array([[x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2)) for j in range(side)]
                  for i in range(side)]).transpose(2, 0, 1, 3)  # fmt: skip
    for block, stride in ((1, 1), (2, 2)):
        name = f"block{block}/unit01/"
        y = norm(x, f"{name}a/")
        shortcut = conv(y, f"{name}a/proj/", stride)
        y = norm(conv(y, f"{name}a/"), f"{name}b/")
        y = norm(conv(y, f"{name}b/", stride), f"{name}c/")
        x = conv(y, f"{name}c/") + shortcut
    x = norm(x, "").mean((1, 2))
    wanted = x @ flat["resnet/head/conv2d/kernel"][0, 0] + flat["resnet/head/conv2d/bias"][None]
    np.testing.assert_allclose(logits(BIT, tree, pictures()), wanted, rtol=1e-4, atol=1e-4)


def test_pixels_are_normalised_in_the_model():
    tree, (mean, std) = random_tree(TINY), preprocessing.IMAGENET
    x = np.random.default_rng(2).random((2, 32, 32, 3)).astype(np.float32)
    wanted = logits(TINY, tree, 2 * ((x - np.array(mean, np.float32)[None, None, None])
                                     / np.array(std, np.float32)[None, None, None]) * 0.5)  # fmt: skip
    ours = logits(TINY.clone(mean=mean, std=std), tree, 2 * x - 1)
    # TINY's own mean and std of 0.5 turn its input y into y again.
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["sample", "element"])
def test_drop_path_goes_with_the_image(mode):
    model, tree = TINY.clone(drop_path_mode=mode), random_tree(TINY)
    apply = jax.jit(lambda *inputs: model.apply({"params": tree}, *inputs))
    keys, images = jax.random.split(jax.random.key(3), 2), pictures()
    both, turned = apply(images, 0.5, keys), apply(images[::-1], 0.5, keys[::-1])
    np.testing.assert_allclose(both, turned[::-1], atol=1e-4)
    plain = logits(model, tree, images)
    assert np.abs(both - plain).max() > 1e-3
    np.testing.assert_allclose(apply(images, 0.0, keys), plain, atol=1e-4)


WORK = ("rlrr", "linear", "knn", "full", "bitfit", "norm", "ssf")


@pytest.mark.parametrize("name", methods.METHODS)
def test_methods_work_or_say_why_not(name):
    shapes = models.shapes(TINY, 32)
    if name in WORK:
        methods.check(name, methods.get(name), shapes)
        return
    with pytest.raises(UserError, match=f"method '{name}' does not fit this model: it "):
        methods.check(name, methods.get(name), shapes)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["resnet18", "resnet50", "bit_50x1"])
@pytest.mark.parametrize("size", [224, 160])
def test_logits_are_timms_and_torchvisions_where_they_are_installed(variant, size, tmp_path):
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    if variant.startswith("bit"):
        theirs = timm.create_model("resnetv2_50x1_bit", num_classes=7)
    else:
        theirs = getattr(torchvision.models, variant)(num_classes=7)
    for name, p in [*theirs.named_parameters(), *theirs.named_buffers()]:
        if name.endswith("running_var"):
            torch.nn.init.uniform_(p, 0.5, 1.5)
        elif p.is_floating_point() and p.ndim == 1:
            torch.nn.init.normal_(p, float(name.endswith("weight")), 0.1)
    torch.nn.init.normal_(theirs.get_submodule("fc" if hasattr(theirs, "fc") else "head.fc").weight)
    for module in theirs.modules():  # timm's 1e-8 is seen in the fifth digit
        if type(module).__name__ == "StdConv2d":
            module.eps = 1e-10
    theirs.eval()
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({k: v.numpy() for k, v in theirs.state_dict().items()}, path)
    images = pictures(size)

    def run():  # in float64: PyTorch's float32 is 2e-5 from it for BiT, ours 8e-6
        with torch.no_grad():
            return theirs.double()(torch.from_numpy(images).double().permute(0, 3, 1, 2)).numpy()

    wanted = run()
    model = models.build(variant, 7)
    tree = reader.load(path, model=model, image_size=size, how=HOW, head=True)
    ours = logits(model, tree, images)
    assert np.linalg.norm(ours - wanted) < 1e-5 * np.linalg.norm(wanted)
    rlrr = methods.get("rlrr", init="damped")
    tuned = {**rlrr.merge(tree, rlrr.init(jax.random.key(1), tree)), "head": tree["head"]}
    state = {k: torch.from_numpy(np.array(v)) for k, v in resnet_layouts.to_timm(tuned).items()}
    theirs.load_state_dict(state, strict=True)
    wanted = run()
    ours = logits(model, tuned, images)
    assert np.linalg.norm(ours - wanted) < 1e-5 * np.linalg.norm(wanted)
