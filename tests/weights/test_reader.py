"""Every public layout gives the same tree; what does not fit is refused by name."""

import hashlib
import io
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
import scipy.ndimage
from flax.traverse_util import flatten_dict
from models.test_vit import SMALL
from trees import random_tree

from rlrr_jax.errors import UserError
from rlrr_jax.models import vit
from rlrr_jax.weights import names, reader

MODEL = vit.ViT(**SMALL)
SIZE = 48  # 6 x 6 patches


@pytest.fixture(scope="module")
def tree():
    return jax.tree.map(np.asarray, random_tree(MODEL, SIZE))


def scanned(tree, prefix=""):
    return {prefix + k: v for k, v in flatten_dict(tree, sep="/").items()}


def numbered(tree, prefix=""):
    out = {}
    for name, value in scanned(tree).items():
        if "encoderblock/" in name:
            for i, part in enumerate(value):
                out[prefix + name.replace("encoderblock", f"encoderblock_{i}")] = part
        else:
            out[prefix + name] = value
    return out


def original(tree, prefix="", position="Transformer/posembed_input/pos_embedding"):
    """The layout of 2020: other module numbers, and a class-token row in the position embedding."""
    out = {}
    for name, value in numbered(tree).items():
        name = name.replace("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1")
        name = name.replace("LayerNorm_1", "LayerNorm_2").replace("MlpBlock_0", "MlpBlock_3")
        out[prefix + name] = value
    row = np.full((1, 1, SMALL["width"]), 0.25, np.float32)
    out[prefix + "cls"] = out[prefix + "cls"] - row
    out[prefix + position] = np.concatenate([row, out.pop(prefix + "pos_embedding")], 1)
    return out


LAYOUTS = {
    "original": original,
    "original, old position": lambda t: original(t, position="Transformer/pos_embedding"),
    "original, opt/target": lambda t: original(t, "opt/target/") | {"opt/state/step": np.int64(3)},
    "original, pre_logits": lambda t: original(t) | {"pre_logits/kernel": np.ones((2, 2), np.float32)},
    "numbered": numbered,
    "numbered, params": lambda t: numbered(t, "params/") | {"opt/0/count": np.int32(7)},
    "scanned": scanned,
    "scanned, params": lambda t: scanned(t, "params/"),
    "without a head": lambda t: {k: v for k, v in scanned(t).items() if not k.startswith("head")},
}


def load(path, size=SIZE, **kwargs):
    return reader.load(str(path), model=MODEL, image_size=size, **kwargs)


def assert_is(loaded, tree, atol=1e-6):
    expected = {**tree, "head": jax.tree.map(np.zeros_like, tree["head"])}
    loaded, expected = flatten_dict(loaded, sep="/"), flatten_dict(expected, sep="/")
    assert loaded.keys() == expected.keys()
    for name, value in loaded.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tree, tmp_path):
    np.savez(tmp_path / "w.npz", **LAYOUTS[layout](tree))
    assert_is(load(tmp_path / "w.npz"), tree)


@pytest.mark.parametrize(("dtype", "atol"), [(np.float16, 2e-3), (ml_dtypes.bfloat16, 2e-2)])
def test_half_precision_files(dtype, atol, tree, tmp_path):
    np.savez(tmp_path / "w.npz", **{k: v.astype(dtype) for k, v in scanned(tree).items()})
    assert_is(load(tmp_path / "w.npz"), tree, atol)


def test_subtree(tree, tmp_path):
    other = jax.tree.map(lambda x: x + 1, tree)
    np.savez(tmp_path / "w.npz", **scanned(tree, "ema/net/"), **scanned(other, "raw/net/"))
    assert_is(load(f"{tmp_path}/w.npz:ema/net"), tree)
    assert_is(load(f"{tmp_path}/w.npz:raw"), other)
    with pytest.raises(UserError, match="several trees of weights: write .*ema/net or .*raw/net"):
        load(tmp_path / "w.npz")
    with pytest.raises(UserError, match="no array 'emma/embedding/kernel'"):
        load(f"{tmp_path}/w.npz:emma")


def test_save_and_load(tree, tmp_path):
    reader.save(tmp_path / "w.npz", tree)
    assert_is(load(tmp_path / "w.npz"), tree, atol=0)


# Position embedding: the class-token row and the resize.


def with_position(tree, rows, cls=True):
    flat = scanned(tree)
    position = np.random.default_rng(0).normal(size=(1, rows, SMALL["width"])).astype(np.float32)
    flat["pos_embedding"] = position
    if not cls:
        del flat["cls"]
    return flat, position


@pytest.mark.parametrize(("rows", "row"), [(16, False), (17, True), (64, False), (65, True)])
def test_position_is_resized_by_linear_zoom(rows, row, tree, tmp_path):
    flat, position = with_position(tree, rows)
    np.savez(tmp_path / "w.npz", **flat)
    loaded = load(tmp_path / "w.npz")
    side = int((rows - row) ** 0.5)
    square = position[0, row:].reshape(side, side, -1)
    expected = scipy.ndimage.zoom(square, (6 / side, 6 / side, 1), order=1).reshape(1, 36, -1)
    np.testing.assert_allclose(loaded["pos_embedding"], expected, rtol=0, atol=1e-6)
    moved = position[:, :1] if row else 0
    np.testing.assert_allclose(loaded["cls"], tree["cls"] + moved, rtol=0, atol=1e-6)


def test_position_that_fits_is_taken_as_it_is(tree, tmp_path):
    flat, position = with_position(tree, 36)
    np.savez(tmp_path / "w.npz", **flat)
    loaded = load(tmp_path / "w.npz")
    np.testing.assert_array_equal(loaded["pos_embedding"], position)
    np.testing.assert_array_equal(loaded["cls"], tree["cls"])


def test_grid_says_what_an_oblong_position_is(tree, tmp_path):
    flat, position = with_position(tree, 4 * 9 + 1)
    np.savez(tmp_path / "w.npz", **flat)
    loaded = load(tmp_path / "w.npz", how=reader.How(grid=(4, 9)))
    zoom = scipy.ndimage.zoom(position[0, 1:].reshape(4, 9, -1), (6 / 4, 6 / 9, 1), order=1)
    np.testing.assert_allclose(loaded["pos_embedding"], zoom.reshape(1, 36, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rows", "grid"), [(18, None), (20, (4, 4)), (37, (5, 7))])
def test_position_that_does_not_fit_names_its_rows(rows, grid, tree, tmp_path):
    flat, _ = with_position(tree, rows)
    np.savez(tmp_path / "w.npz", **flat)
    with pytest.raises(UserError, match=f"has {rows} rows.*config.pretrained.grid"):
        load(tmp_path / "w.npz", how=reader.How(grid=grid))


@pytest.mark.parametrize(
    ("rows", "size"),  # n - 1 = h * w of the images, and n is a square: no row is the class token's
    [(16, (24, 40)), (49, (48, 64)), (196, (104, 120)), (16, (40, 24))],
)
def test_a_square_is_never_a_class_row_and_an_oblong(rows, size, tree, tmp_path):
    flat, position = with_position(tree, rows)
    np.savez(tmp_path / "w.npz", **flat)
    h, w = (side // SMALL["patch_size"] for side in size)
    assert rows - 1 == h * w
    loaded, side = load(tmp_path / "w.npz", size), int(rows**0.5)
    square = position.reshape(side, side, -1)
    zoom = scipy.ndimage.zoom(square, (h / side, w / side, 1), order=1).reshape(1, h * w, -1)
    np.testing.assert_allclose(loaded["pos_embedding"], zoom, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(loaded["cls"], tree["cls"])


def test_an_oblong_of_the_images_is_asked_for(tree, tmp_path):
    """15 rows are 3 x 5 or 5 x 3, whatever the images are."""
    flat, position = with_position(tree, 15)
    np.savez(tmp_path / "w.npz", **flat)
    with pytest.raises(UserError, match="has 15 rows, which is not a square: give its shape as"):
        load(tmp_path / "w.npz", (24, 40))
    loaded = load(tmp_path / "w.npz", (24, 40), how=reader.How(grid=(3, 5)))
    np.testing.assert_array_equal(loaded["pos_embedding"], position)


# What is refused.


def test_missing_unknown_and_mis_shaped_names_are_all_listed(tree, tmp_path):
    flat = numbered(tree)
    del flat["Transformer/encoderblock_1/LayerNorm_0/scale"]
    flat["Transformer/encoderblock_7/LayerNorm_0/scale"] = np.ones(32, np.float32)
    flat["embedding/bias"] = np.ones(31, np.float32)
    np.savez(tmp_path / "w.npz", **flat)
    with pytest.raises(UserError) as error:
        load(tmp_path / "w.npz")
    text = str(error.value)
    assert "missing: Transformer/encoderblock_1/LayerNorm_0/scale;" in text
    assert "unknown: Transformer/encoderblock_7/LayerNorm_0/scale;" in text
    assert "wrong shape: embedding/bias is (31,) instead of (32,)" in text


def test_another_variant_is_named(tree, tmp_path):
    flat = {
        f"Transformer/encoderblock_{i}/LayerNorm_0/scale": np.ones(192, np.float32) for i in range(12)
    }
    flat["embedding/kernel"] = np.ones((16, 16, 3, 192), np.float32)
    flat["pos_embedding"] = np.ones((1, 4, 192), np.float32)
    np.savez(tmp_path / "w.npz", **flat)
    wide = "a width of 192 and patches of 16 pixels, the model 32 and 8: set config.model.variant=Ti/16"
    with pytest.raises(UserError, match=wide):
        load(tmp_path / "w.npz")


@pytest.mark.parametrize("shape", [(), (192,), (192, 192), (1, 1, 1024, 192)], ids=str)
def test_other_embeddings_are_of_no_variant(shape, tree, tmp_path):
    flat = numbered(tree) | {"embedding/kernel": np.ones(shape, np.float32)}
    np.savez(tmp_path / "w.npz", **flat)
    with pytest.raises(UserError, match="wrong shape: embedding/kernel is"):
        load(tmp_path / "w.npz")


def test_of_many_differences_the_first_are_said():
    wanted = {f"array{i}": (1,) for i in range(9)}
    (text,) = reader.differences({}, wanted)
    assert text == "missing: array0, array1, array2, array3, array4 (and 4 more)"


def test_missing_file():
    with pytest.raises(UserError, match="there is no weight file /nowhere/w.npz"):
        load("/nowhere/w.npz")


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file(part, tree, tmp_path):
    np.savez(tmp_path / "w.npz", **scanned(tree))
    data = (tmp_path / "w.npz").read_bytes()
    (tmp_path / "w.npz").write_bytes(data[: int(len(data) * part)])
    with pytest.raises(UserError, match="w.npz (is no readable|holds pickled)"):
        load(tmp_path / "w.npz")


def test_flipped_byte_in_an_array(tree, tmp_path):
    np.savez(tmp_path / "w.npz", **scanned(tree))
    data = bytearray((tmp_path / "w.npz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "w.npz").write_bytes(data)
    with pytest.raises(UserError, match="w.npz is no readable .npz file"):
        load(tmp_path / "w.npz")


class Trap:
    def __reduce__(self):
        return (open, ("/tmp/rlrr_jax_trap", "w"))


def test_pickle_is_not_opened(tree, tmp_path):
    flat = scanned(tree) | {"cls": np.array([Trap()], dtype=object)}
    np.savez(tmp_path / "w.npz", **flat)
    with pytest.raises(UserError, match="a pickle can run code"):
        load(tmp_path / "w.npz")
    import os

    assert not os.path.exists("/tmp/rlrr_jax_trap")


def test_a_file_far_larger_than_the_model_is_not_unpacked(tree, tmp_path):
    np.savez_compressed(tmp_path / "w.npz", **scanned(tree))
    with (
        zipfile.ZipFile(tmp_path / "w.npz", "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("bomb.npy", "w", force_zip64=True) as member,
    ):
        for _ in range(1100):
            member.write(bytes(2**20))
    assert (tmp_path / "w.npz").stat().st_size < 10e6
    with pytest.raises(UserError, match="w.npz unpacks to 1.2 GB, far more than the model needs"):
        load(tmp_path / "w.npz")


def test_an_array_that_claims_to_be_huge(tree, tmp_path):
    """Its header asks for a petabyte that is not there."""
    np.savez(tmp_path / "w.npz", **scanned(tree))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (2**48,)}
    )
    with zipfile.ZipFile(tmp_path / "w.npz", "a") as archive:
        archive.writestr("huge.npy", header.getvalue())
    with pytest.raises(UserError, match="w.npz is no readable .npz file"):
        load(tmp_path / "w.npz")


def test_an_array_file_is_no_archive(tmp_path):
    with open(tmp_path / "w.npz", "wb") as f:
        np.save(f, np.ones(3))
    with pytest.raises(UserError, match="w.npz is no readable .npz file"):
        load(tmp_path / "w.npz")


def test_integer_and_infinite_weights(tree, tmp_path):
    for bad in (tree["cls"].astype(np.int32), tree["cls"] * np.nan):
        np.savez(tmp_path / "w.npz", **scanned(tree) | {"cls": bad})
        with pytest.raises(UserError, match="cls in .* is not made of finite floating-point numbers"):
            load(tmp_path / "w.npz")


def test_size_that_the_patch_does_not_divide(tree, tmp_path):
    np.savez(tmp_path / "w.npz", **scanned(tree))
    with pytest.raises(UserError, match="image size 50 is not divisible by the patch size 8.* 48"):
        load(tmp_path / "w.npz", size=50)


# Names.


def test_names_resolve_to_public_addresses():
    base = "https://storage.googleapis.com/vit_models/"
    assert names.address("ViT-B_16") == base + "imagenet21k/ViT-B_16.npz"
    assert names.address("imagenet21k/ViT-H_14.npz") == base + "imagenet21k/ViT-H_14.npz"
    assert names.address("howto-i21k-Ti/16") == (
        base + "augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0.npz"
    )
    assert names.address("gs://bucket/x.npz") == "gs://bucket/x.npz"
    assert names.default_name("L/16") == "imagenet21k/ViT-L_16"
    assert names.default_name("S/16").startswith("augreg/S_16-i21k-300ep-lr_0.001-aug_light1")
    assert names.default_name("B/4") is None


def test_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'ViT-B_16'"):
        names.address("ViT-B16")


def test_bundled_weights_and_their_digest():
    path, digest = names.fetch("bundled")
    assert digest == hashlib.sha256(open(path, "rb").read()).hexdigest()
    assert names.BUNDLED.stat().st_size < 1_500_000


def test_the_first_blocks_of_a_deeper_file_or_of_one_with_no_more(tree, tmp_path):
    """What `config.model.depth` reads, also from an export of its own."""
    reader.save(tmp_path / "whole.npz", tree)
    read = lambda name, cut: reader.load(
        tmp_path / name, model=MODEL.clone(depth=2), image_size=SIZE, how=reader.How(whole=cut and 3)
    )
    first = read("whole.npz", True)
    blocks = jax.tree.map(lambda x: x[:2], tree["Transformer"]["encoderblock"])
    jax.tree.map(np.testing.assert_array_equal, first["Transformer"]["encoderblock"], blocks)
    reader.save(tmp_path / "first.npz", first)
    jax.tree.map(np.testing.assert_array_equal, read("first.npz", True), first)
    with pytest.raises(UserError, match="encoderblock_2/LayerNorm_0/bias"):
        read("whole.npz", None)
