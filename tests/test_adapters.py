"""Adapters on their backbone, on the wrong one, damaged, several at once, added."""

import json
import re
import socket
import tracemalloc

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from marks import quick

from rlrr_jax import adapters, combine, files, models
from rlrr_jax.data import cache, store
from rlrr_jax.errors import UserError
from rlrr_jax.methods import base
from rlrr_jax.weights import names


@pytest.fixture(scope="module")
def paths(tuned_runs):
    return {
        f"{task} {method}": tuned_runs / task / method / "seed0" / "adapter.safetensors"
        for task, method in [
            ("digits", "rlrr"),
            ("digits", "lora"),
            ("digits", "ssf"),
            ("hearts", "rlrr"),
        ]
    }


def accuracy(tuned, task):
    images, labels = store.load_split(task, "test", tuned.card["image_size"])
    return (np.asarray(tuned.logits(images)).argmax(-1) == labels).mean()


def test_several_adapters_on_one_frozen_tree_answer_as_their_runs_did(paths):
    backbone = adapters.backbone(paths["digits rlrr"])
    before = jax.tree.map(np.array, backbone.frozen)
    for name, path in paths.items():
        tuned = adapters.load(path, backbone)
        row = files.read_json(path.parent / "result.json")
        found = accuracy(tuned, name.split()[0])  # in another batch: one may fall on a tie
        assert found == pytest.approx(row["test_acc_final"], abs=1.01 / row["num_test"])
        assert tuned.card["accuracy"]["test_acc"] == row["test_acc_final"] > 0.3
    jax.tree.map(np.testing.assert_array_equal, backbone.frozen, before)


def test_the_card_says_what_it_belongs_to(paths):
    card = adapters.read(paths["hearts rlrr"]).card
    assert (card["format"], card["method"], card["method_kwargs"]) == (1, "rlrr", {})
    assert (card["backbone"], card["model"], card["gelu"]) == ("bundled", "bundled", "tanh")
    assert card["backbone_sha256"] == names.fetch("bundled")[1]
    assert (card["image_size"], card["value_range"], card["task"]) == (32, [-1, 1], "hearts")
    assert card["classes"][:3] == ["0°", "22.5°", "45°"] and len(card["classes"]) == 16
    assert card["config"]["epochs"] == 2 and set(card["versions"]) == {"rlrr_jax", "jax", "flax"}
    assert adapters.read(paths["digits rlrr"]).card["classes"] == list("0123456789")


def rewrite(path, out, change=lambda flat: flat, **card):
    """A copy of an adapter with other arrays or another card; a value of None leaves a key out."""
    with safetensors.safe_open(path, "numpy") as file:
        old = json.loads(file.metadata()["rlrr_jax"])
    new = {k: v for k, v in {**old, **card}.items() if v is not None}
    flat = change(safetensors.numpy.load_file(path))
    safetensors.numpy.save_file(flat, out, {"rlrr_jax": json.dumps(new)})
    return out


def without(flat):
    return {k: v for k, v in flat.items() if "query/scale_in" not in k}


def with_nan(flat):
    return {k: v * np.nan if k.endswith("key/shift") else v for k, v in flat.items()}


BAD = {
    "another format": (dict(format=2), "has format 2, this version of rlrr_jax reads 1"),
    "no classes": (dict(classes=None), "the card of {} lacks classes: export it again"),
    "another formula": (dict(formula="W"), "{} is of another version of method rlrr (trained as 'W'"),
    "unknown method": (
        dict(method="rlr"),
        "of another version of method rlr (unknown method 'rlr': did",
    ),
    "unknown option": (dict(method_kwargs={"x": 1}), "unknown option of method 'rlrr' 'x'"),
    "another rank": (dict(method_kwargs={"rank": 2}), "is no adapter of method rlrr on bundled (wrong"),
    "other classes": (
        dict(classes=["a"]),
        "head/bias is ((10,), 'float32') instead of ((1,), 'float32')",
    ),
    "no config": (dict(config={}), "is of another version of method rlrr"),
    "another size": (
        dict(image_size=10**30),
        "is of another version of method rlrr (its images have 32",
    ),
    "numbers as classes": (dict(classes=[1, 2]), "(its classes are no names)"),
    "no accuracy": (dict(accuracy=3), "its accuracy is no dict)"),
}


def test_strange_configurations_in_a_card_are_one_sentence(paths, tmp_path):
    config = adapters.read(paths["digits rlrr"]).card["config"]
    strange = [{k: v for k, v in config.items() if k != name} for name in config]
    strange += [
        {**config, k: v} for k, v in {"image_size": 10**30, "dtype": "x", "precision": "x"}.items()
    ]
    model, given = config["model"], config["pretrained"]
    strange += [{**config, "model": {**model, **m}} for m in ({"gelu": "foo"}, {"variant": "B16"})]
    strange += [{**config, "pretrained": {**given, "mean": [0, 0]}}, {**config, "crop": "resmall"}]
    refused = []
    for other in strange:
        path = rewrite(paths["digits rlrr"], tmp_path / "bad.safetensors", config=other)
        try:
            adapters.read(path)
            refused.append(False)
        except UserError as e:  # and nothing else
            assert "is of another version of method rlrr (" in str(e) and "\n" not in str(e)
            refused.append(True)
    needed = {"crop", "dtype", "eval_batch_size", "image_size", "model", "precision", "pretrained"}
    assert {name for name, no in zip(config, refused) if no} >= needed and all(refused[-7:]), refused


@pytest.mark.parametrize("what", BAD)
def test_bad_cards_are_one_sentence(what, paths, tmp_path):
    card, message = BAD[what]
    path = rewrite(paths["digits rlrr"], tmp_path / "bad.safetensors", **card)
    with pytest.raises(UserError, match=re.escape(message.format(path))) as e:
        adapters.read(path)
    assert "\n" not in str(e.value)


def test_a_missing_leaf_a_nan_and_damaged_files_are_one_sentence(paths, tmp_path):
    good, bad = paths["digits rlrr"], tmp_path / "bad.safetensors"
    with pytest.raises(UserError, match=r"\(missing: Transformer/.*/query/scale_in\): export it again"):
        adapters.read(rewrite(good, bad, without))
    with pytest.raises(UserError, match="key/shift is not finite"):
        adapters.read(rewrite(good, bad, with_nan))
    with pytest.raises(UserError, match=r"\(unknown: extra\)"):
        adapters.read(rewrite(good, bad, lambda flat: {**flat, "extra": np.ones(2, np.float32)}))
    safetensors.numpy.save_file({"a": np.ones(2)}, bad)
    with pytest.raises(UserError, match="was not written by rlrr_jax: it has no card"):
        adapters.read(bad)
    for length in (0, 7, 100, len(good.read_bytes()) - 1):
        bad.write_bytes(good.read_bytes()[:length])
        with pytest.raises(UserError, match="is no readable .safetensors file"):
            adapters.read(bad)
    with pytest.raises(UserError, match="there is no adapter .*/nothing: give an adapter.safetensors"):
        adapters.read(tmp_path / "nothing")


def test_another_backbone_is_refused(paths, tmp_path):
    arrays = dict(np.load(names.BUNDLED))
    arrays["params/cls"] = arrays["params/cls"] + np.float16(1)
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(UserError) as e:
        adapters.load(paths["digits rlrr"], weights=str(tmp_path / "other.npz"))
    digest = names.fetch("bundled")[1][:12]
    assert (
        f"is not the backbone of this adapter of digits, which was trained on bundled (SHA-256 {digest}"
        in str(e.value)
    )
    backbone = adapters.backbone(paths["digits rlrr"])._replace(sha256="0" * 64)
    with pytest.raises(UserError, match="this backbone .* is not the backbone of this adapter"):
        adapters.load(paths["digits rlrr"], backbone)
    with pytest.raises(UserError, match="there is no weight file .*--weights names another place"):
        adapters.load(paths["digits rlrr"], weights=str(tmp_path / "missing.npz"))


def test_another_tree_of_the_same_file_or_other_pixels_are_refused(paths, tmp_path):
    """The file's SHA-256 does not tell which of its trees was read, or how."""
    good = paths["digits rlrr"]
    card = adapters.read(good).card
    backbone = adapters.backbone(good)
    for key, value in {"subtree": "ema", "mean": [0, 0, 0], "image_size": 64, "grid": [4, 4]}.items():
        other = backbone._replace(how={**backbone.how, key: value})
        with pytest.raises(UserError, match=f"this backbone was read with {key}="):
            adapters.load(good, other)
    arrays = dict(np.load(names.BUNDLED))
    arrays |= {k.replace("params/", "ema/", 1): v + np.float16(1) for k, v in arrays.items()}
    np.savez(tmp_path / "two.npz", **arrays)
    config = {**card["config"], "pretrained": {**card["config"]["pretrained"], "name": "two.npz:ema"}}
    marks = dict(backbone_sha256=names.fetch(str(tmp_path / "two.npz"))[1], config=config)
    path = rewrite(good, tmp_path / "ema.safetensors", **marks)
    found = adapters.backbone(path, weights=str(tmp_path / "two.npz"))
    np.testing.assert_array_equal(found.frozen["cls"], np.float32(arrays["ema/cls"]))
    with pytest.raises(UserError, match="two.npz:x was read with subtree=x, this adapter"):
        adapters.backbone(path, weights=f"{tmp_path}/two.npz:x")
    same = adapters.backbone(good, weights=f"{names.BUNDLED}:params")  # found by itself, too
    assert same.how == backbone.how


# Combined -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(paths):
    return [adapters.read(paths["digits rlrr"]), adapters.read(paths["hearts rlrr"])]


def path(name):
    """Where a Dense of the bundled model is in its tree."""
    return base.dense(models.shapes(models.build("bundled", 2), 32))[name].path


def dense(adapter, name="query"):
    """Scales [L, in], [L, out] and shift [L, out] of a Dense."""
    node = base.subtree(adapter.trainable["adapter"], path(name))
    return [np.asarray(node[k]).reshape(len(node[k]), -1) for k in ("scale_in", "scale_out", "shift")]


@pytest.mark.parametrize("way", quick(["scales", "products"], "products"))
def test_combined_kernels_are_the_papers(way, two):
    """Supplement H, written out for each Dense; norms move by the weighted change."""
    weights = [0.7, 0.4]
    both = combine.combine(two, weights, way, head=1)
    backbone = adapters.backbone(two[0])
    params = adapters.merged(both, backbone.frozen)
    for name in base.DENSE[:-1]:
        (in0, out0, shift0), (in1, out1, shift1) = (dense(a, name) for a in two)
        if way == "scales":
            left, right = (weights[0] * x + weights[1] * y for x, y in ((in0, in1), (out0, out1)))
            product = left[:, :, None] * right[:, None]
        else:
            pairs = (in0, out0), (in1, out1)
            product = sum(w * i[:, :, None] * o[:, None] for w, (i, o) in zip(weights, pairs))
        node = base.subtree(backbone.frozen, path(name))
        kernel = np.asarray(node["kernel"]).reshape(product.shape)
        found = base.subtree(params, path(name))
        np.testing.assert_allclose(
            np.asarray(found["kernel"]).reshape(product.shape),
            kernel * (1 + product),
            rtol=1e-5,
            atol=1e-6,
        )
        shift = 0.7 * shift0 + 0.4 * shift1
        np.testing.assert_allclose(
            np.asarray(found["bias"]).reshape(shift.shape),
            np.asarray(node["bias"]).reshape(shift.shape) + shift,
            rtol=1e-5,
            atol=1e-6,
        )
    norm = lambda tree: tree["Transformer"]["encoder_norm"]["scale"]
    change = sum(w * (np.asarray(norm(a.trainable["adapter"])) - 1) for w, a in zip(weights, two))
    np.testing.assert_allclose(norm(params), norm(backbone.frozen) * (1 + change), rtol=1e-5)
    assert both.card["task"] == "hearts" and params["head"]["kernel"].shape[1] == 16


def test_combining_one_is_itself_and_no_weight_is_the_backbone(two):
    for way in ("scales", "products"):
        one = combine.combine(two[:1], [1.0], way)
        flat = flatten_dict(adapters.load(one).params, sep="/")
        for key, value in flatten_dict(adapters.load(two[0]).params, sep="/").items():
            np.testing.assert_allclose(flat[key], value, rtol=1e-5, atol=1e-6)
        none = combine.combine(two, [0.0, 0.0], way)
        frozen = flatten_dict(adapters.backbone(two[0]).frozen, sep="/")
        for key, value in flatten_dict(adapters.load(none).params, sep="/").items():
            if not key.startswith("head/"):
                np.testing.assert_allclose(value, frozen[key], rtol=1e-5, atol=1e-6)


def test_combined_adapters_are_written_and_combined_again(two, tmp_path):
    both = combine.combine(two, way="products")
    adapters.write(tmp_path / "both.safetensors", both)
    again = adapters.read(tmp_path / "both.safetensors")
    assert again.card["method_kwargs"] == {"rank": 2} and again.card["combined"]["way"] == "products"
    four = combine.combine([again, again], [0.5, 0.5], "products")
    assert four.card["method_kwargs"] == {"rank": 4}
    a, b = (adapters.load(x).params for x in (again, four))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def test_what_does_not_combine_is_said(two, paths):
    lora = adapters.read(paths["digits lora"])
    other = two[0]._replace(card={**two[0].card, "backbone_sha256": "0"})
    given = {**two[0].card["config"]["pretrained"], "mean": [0, 0, 0]}
    config = {**two[0].card["config"], "pretrained": given}
    elsewhere = two[0]._replace(card={**two[0].card, "config": config})
    for args, message in [
        (([two[0], lora],), "only adapters of rlrr are combined, not of lora"),
        ((two, [1]), "2 adapters need as many weights, not 1"),
        ((two, None, "sum"), "by way='scales' or 'products', not 'sum'"),
        (([two[0], other],), "another backbone_sha256"),
        (([two[0], elsewhere],), "another mean"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            combine.combine(*args)
    assert combine.combine(two).card["combined"]["way"] == "scales"  # which do fit together


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)], ids=["floats", "one"]
)
def test_other_arrays_than_images_are_refused(images, tuned_runs):
    tuned = adapters.load(tuned_runs / "digits/rlrr/seed0/adapter.safetensors")
    with pytest.raises(UserError, match=r"images must be uint8 \[B, h, w, 3\], not "):
        tuned.logits(images)


def test_nothing_and_numbers_that_are_none_are_not_combined(tuned_runs):
    one = adapters.read(tuned_runs / "digits/rlrr/seed0/adapter.safetensors")
    with pytest.raises(UserError, match="at least one adapter is combined"):
        combine.combine([])
    with pytest.raises(UserError, match="with finite weights, not "):
        combine.combine([one], weights=[float("nan")])
    with pytest.raises(UserError, match="there is no adapter 5 of 1 to take the head of"):
        combine.combine([one], head=5)


# Somebody else's card -------------------------------------------------------------------------


def foreign(path, tmp_path, name, sha256="0" * 64):
    """An adapter whose card names other weights."""
    good = adapters.read(path)
    config = json.loads(json.dumps(good.card["config"]))
    config["pretrained"] |= {"name": name, "cache_dir": str(tmp_path / "theirs")}
    config["data"]["cache_dir"] = str(tmp_path / "theirs")
    card = {**good.card, "config": config, "backbone": name, "backbone_sha256": sha256}
    return adapters.Adapter(good.trainable, card)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "http://127.0.0.1:9/../../../../x.npz",
            "https://127.0.0.1:9/%2e%2e/x.npz",
            "gs://b/../x.npz",
        ),
        *(
            "s3://b/x.npz",
            "hf:me/birds",
            "hf:../../x",
            "hf:me/birds@../../x",
            "ftp://127.0.0.1:9/x.npz",
        ),
        *("file:///etc/passwd.npz", "imagenet21k/ViT-B_16", "augreg/../../x/y", "/nowhere/x.npz"),
        *("https://x.org/w.pth", "\x00.npz", "a\nb.npz"),
    ],
)
def test_a_card_fetches_nothing(name, paths, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(socket.socket, "connect", lambda *args: called.append(args))
    monkeypatch.setenv("RLRR_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with pytest.raises(UserError) as e:
        adapters.backbone(foreign(paths["digits rlrr"], tmp_path, name))
    assert not called and not [p for p in tmp_path.rglob("*") if p.is_file()], e.value
    if name.startswith(("https://127", "hf:me/birds@m", "imagenet21k")):
        assert "is not on this machine: add --fetch to download it from there" in str(e.value)
    if name.startswith(("http://", "gs://", "s3://")):
        assert "is not on this machine: copy it to this machine" in str(e.value)


def test_a_card_opens_no_folder_for_decoded_images(tmp_path):
    assert not cache.is_ours(str(tmp_path)) and not cache.is_ours(None)
    (tmp_path / "images").mkdir()
    assert not cache.is_ours(str(tmp_path))
    (tmp_path / "images" / "CACHEDIR.TAG").write_text(cache.TAG_TEXT)
    assert cache.is_ours(str(tmp_path))


def test_huge_arrays_of_a_strange_adapter_are_not_read(paths, tmp_path):
    good = adapters.read(paths["digits rlrr"])
    big = {**adapters.flattened(good.trainable), "x": np.zeros((1 << 12, 1 << 12), np.float32)}
    meta = {"rlrr_jax": json.dumps(good.card)}
    safetensors.numpy.save_file(
        {k: np.asarray(v) for k, v in big.items()}, tmp_path / "a.safetensors", meta
    )
    tracemalloc.start()
    with pytest.raises(UserError, match="unknown: x"):
        adapters.read(tmp_path / "a.safetensors")
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()
