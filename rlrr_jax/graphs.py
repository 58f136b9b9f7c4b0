"""A tuned model as one graph, pixels in and shares out: StableHLO, ONNX, or a SavedModel of TensorFlow.

The graph takes uint8 pixels [batch, height, width, 3] of any batch, in RGB, as `predict` decodes
images, and gives what `predict` shows: probabilities of classes or labels, or values. Normalising is
inside. It computes in float32, and is read back and compared before it is kept.
"""

import functools
import importlib
import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.extend
import jax.numpy as jnp
import numpy as np

import rlrr_jax
from rlrr_jax import adapters, backend, cards, files, sides
from rlrr_jax.data import crops, resize
from rlrr_jax.errors import UserError, first_line

TOLERANCE = 1e-4  # of shares; a graph that differs more is not kept
LARGEST = 1.9e9  # bytes of the weights of an ONNX file
PLATFORMS = ("cpu", "cuda", "tpu")  # of StableHLO
NAME = "model.json"  # what a graph takes and gives, beside it or in its header


class Graph(NamedTuple):
    """A format of graphs.

    Attributes:
      files: what a folder of it has, the graph first; () is a file.
      needs: module -> how it is installed.
      write: function `(path, function of images, tree, about)`.
      call: function `(path) -> function of images`.
    """

    files: tuple[str, ...]
    needs: dict[str, str]
    write: Callable
    call: Callable


def shares_of(tuned: adapters.Tuned) -> Callable:
    """A function `(params, images uint8 [b, H, W, 3]) -> shares [b, C]` of a model, in float32."""
    model = tuned.model.clone(dtype=jnp.float32)
    pixels = cards.pixels(tuned.card)
    shares = {
        "class": functools.partial(jax.nn.softmax, axis=-1),
        "labels": jax.nn.sigmoid,
        "value": lambda x: x,
    }[cards.answers(tuned.card)["kind"]]

    def function(params: Any, images: jax.Array) -> jax.Array:
        # Forms that any device takes well, not those of this machine.
        with jax.default_matmul_precision("highest"), backend.compiling_for("tpu"):
            logits = model.apply({"params": params}, resize.normalize(images, *pixels))
            return shares(logits)

    return function


def about(adapter: adapters.Adapter) -> dict[str, Any]:
    """What a graph takes and gives, as plain values."""
    card, run = adapter.card, adapter.run
    size, crop_from = cards.pixels(card)
    return {
        "classes": card["classes"],
        **cards.answers(card),
        "image_size": list(sides.pair(crop_from or size)),
        "shorter_side": run.crop_from if crops.by_host(run.crop) else None,
        "task": card["task"],
        "method": card["method"],
        "backbone": card["backbone"],
        "versions": {"jax": jax.__version__, "rlrr_jax": rlrr_jax.__version__},
        "trained_with": card["versions"],
    }


def made(name: str, adapter: adapters.Adapter, tuned: adapters.Tuned, path: pathlib.Path) -> float:
    """Writes a graph and reads it back; the largest difference of its shares from the model's.

    Args:
      name: of the format, see `FORMATS`.
      adapter: the `Adapter`.
      tuned: the model that it makes.
      path: where the graph goes, a file or a folder.
    """
    graph, function, said = FORMATS[name], shares_of(tuned), about(adapter)
    several = [_noise(number, said["image_size"]) for number in (1, 3)]  # batches, so that any will do
    try:
        graph.write(path, function, tuned.params, said)
        call = graph.call(path)
        found = [call(images) for images in several]
    except (UserError, OSError, MemoryError):
        raise
    except Exception as e:  # of a converter or a runtime that does not know all operations
        if name == "stablehlo":  # which is JAX's own
            raise
        raise UserError(
            f"--to {name} cannot write {adapter.card['model']} with what is installed "
            f"({type(e).__name__}: {first_line(e)}): take --to stablehlo"
        ) from e
    expected, worst = jax.jit(function), 0.0
    for images, shares in zip(several, found):
        wanted = np.asarray(expected(tuned.params, images))
        scale = max(1.0, float(abs(wanted).max()))  # of values
        worst = max(worst, float(abs(shares - wanted).max()) / scale)
    return worst


def check(name: str) -> None:
    """UserError unless what a format needs is installed."""
    for module, way in FORMATS[name].needs.items():
        logging.getLogger(module).setLevel(logging.ERROR)  # it warns of plugins that nothing here needs
        try:
            importlib.import_module(module)
        except ImportError as e:
            raise UserError(f"--to {name} needs {module}: {way}") from e


def _noise(number: int, size: list[int]) -> np.ndarray:
    """Images uint8 [number, H, W, 3], coarse and fine."""
    random = np.random.default_rng(number)
    fine = random.integers(0, 256, (number, *size, 3))
    coarse = np.kron(random.integers(0, 256, (number, 4, 4, 3)), np.ones((1, -(-size[0] // 4), 1, 1)))
    coarse = np.repeat(coarse, -(-size[1] // 4), 2)[:, : size[0], : size[1]]
    return np.uint8((fine + 3 * coarse) / 4)


def _batched(size: list[int]) -> jax.ShapeDtypeStruct:
    """Images of a batch of any size."""
    (batch,) = jax.export.symbolic_shape("batch")
    return jax.ShapeDtypeStruct((batch, *size, 3), jnp.uint8)


# StableHLO ------------------------------------------------------------------------------------

LOADER = """\
# The classes of image files: python load.py IMAGES...; needs jax, flatbuffers, numpy and Pillow.
import json, pathlib, sys
import jax, jax.export, numpy as np
from PIL import Image, ImageOps

here = pathlib.Path(__file__).parent
about = json.loads((here / "model.json").read_text())
model = jax.export.deserialize(bytearray((here / "model.stablehlo").read_bytes()))
height, width = about["image_size"]


def pixels(path):
    image = ImageOps.exif_transpose(Image.open(path))
    if image.has_transparency_data:  # is laid on white
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    if about["shorter_side"]:  # the middle of the image, nearly as rlrr_jax cuts it
        scale = about["shorter_side"] / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
        return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


for path in sys.argv[1:]:
    (shares,) = np.asarray(model.call(pixels(path)[None]))
    if about["kind"] == "value":
        print(path, shares[0])
        continue
    above = shares == shares.max() if about["kind"] == "class" else shares > about["thresholds"]
    print(path, *(f"{about['classes'][i]} {shares[i]:.4f}" for i in np.flatnonzero(above)))
"""


def _write_stablehlo(path: pathlib.Path, function: Callable, params: Any, said: dict) -> None:
    fixed = jax.jit(functools.partial(function, params))
    exported = jax.export.export(fixed, platforms=PLATFORMS)(_batched(said["image_size"]))
    path.mkdir()
    (path / "model.stablehlo").write_bytes(exported.serialize())
    version = exported.calling_convention_version
    files.write_json(path / NAME, {**said, "platforms": PLATFORMS, "calling_convention": version})
    (path / "load.py").write_text(LOADER)


def _call_stablehlo(path: pathlib.Path) -> Callable:
    again = jax.export.deserialize(bytearray((path / "model.stablehlo").read_bytes()))
    return lambda images: np.asarray(again.call(images))


# ONNX -----------------------------------------------------------------------------------------

OPSET = 21  # which onnxruntime 1.18 and later reads


def _write_onnx(path: pathlib.Path, function: Callable, params: Any, said: dict) -> None:
    import jax2onnx

    if (size := sum(x.size * 4 for x in jax.tree.leaves(params))) > LARGEST:
        raise UserError(
            f"the weights take {size / 1e9:.1f} GB, and an ONNX file holds 2: take --to stablehlo"
        )
    images = _batched(said["image_size"])
    # Traced before jax2onnx puts its own layers in place of flax's, which no scan over depth can take.
    traced = jax.make_jaxpr(functools.partial(function, params))(images)
    again = lambda x: _evaluated(traced, x)
    how: dict = dict(model_name="rlrr_jax", opset=OPSET, return_mode="proto")
    names: dict = dict(input_names=["images"], output_names=["shares"])
    model: Any = jax2onnx.to_onnx(again, [images], **how, **names)
    del model.graph.value_info[:]  # shapes between layers, some of which are wrong: readers infer them
    entry = model.metadata_props.add()
    entry.key, entry.value = "rlrr_jax", json.dumps(said, sort_keys=True)
    path.write_bytes(model.SerializeToString())


def _evaluated(traced: Any, images: jax.Array) -> Any:
    """What a traced function gives, with pooling as maxima of slices, which jax2onnx writes rightly."""
    known = dict(zip(traced.jaxpr.constvars, traced.consts))
    known |= dict(zip(traced.jaxpr.invars, [images]))
    value = lambda x: x.val if isinstance(x, jax.extend.core.Literal) else known[x]
    for eqn in traced.jaxpr.eqns:
        given = map(value, eqn.invars)
        if eqn.primitive.name == "reduce_window_max":
            found = [_pooled(*given, **eqn.params)]
        else:
            bound: Any = eqn.primitive.get_bind_params(eqn.params)  # with functions before jax 0.10
            functions, how = bound if isinstance(bound, tuple) else ((), bound)
            out = eqn.primitive.bind(*functions, *given, **how)
            found = out if eqn.primitive.multiple_results else [out]
        known |= dict(zip(eqn.outvars, found))
    return value(traced.jaxpr.outvars[0])


def _pooled(x: jax.Array, window_dimensions: Any, window_strides: Any, **rest: Any) -> jax.Array:
    """The maximum of each window of images [B, H, W, C]."""
    del rest  # what is around them is there already
    parts = []
    for i in range(window_dimensions[1]):
        for j in range(window_dimensions[2]):
            ends = [x.shape[k] - window_dimensions[k] + 1 + at for k, at in ((1, i), (2, j))]
            parts.append(x[:, i : ends[0] : window_strides[1], j : ends[1] : window_strides[2]])
    return functools.reduce(jnp.maximum, parts)


def _call_onnx(path: pathlib.Path) -> Callable:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone: it warns of what it removes
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


# TensorFlow -----------------------------------------------------------------------------------


def _write_savedmodel(path: pathlib.Path, function: Callable, params: Any, said: dict) -> None:
    import tensorflow as tf
    from jax.experimental import jax2tf

    module, size = tf.Module(), said["image_size"]
    module.params = tf.nest.map_structure(tf.Variable, params)
    shapes: Any = [None, "(batch, ...)"]
    converted = jax2tf.convert(function, polymorphic_shapes=shapes, with_gradient=False)
    images = tf.TensorSpec((None, *size, 3), tf.uint8, name="images")

    @tf.function(autograph=False, input_signature=[images])
    def shares(images: Any) -> Any:
        return {"shares": converted(module.params, images)}

    tf.saved_model.save(module, str(path), signatures={"serving_default": shares})
    files.write_json(path / NAME, said)


def _call_savedmodel(path: pathlib.Path) -> Callable:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    serve = loaded.signatures["serving_default"]
    return lambda images: serve(images=tf.constant(images))["shares"].numpy()


FORMATS = {
    "stablehlo": Graph(
        ("model.stablehlo", NAME, "load.py"),
        {"flatbuffers": "install the extra stablehlo"},
        _write_stablehlo,
        _call_stablehlo,
    ),
    "onnx": Graph(
        (),
        {"jax2onnx": "install the extra onnx", "onnxruntime": "install the extra onnx"},
        _write_onnx,
        _call_onnx,
    ),
    "savedmodel": Graph(
        ("saved_model.pb", "variables", "assets", "fingerprint.pb", NAME),
        {"tensorflow": "pip install tensorflow"},
        _write_savedmodel,
        _call_savedmodel,
    ),
}


def advice(to: str, adapter: adapters.Adapter, out: Any) -> str:
    """How a graph is used elsewhere."""
    height, width = about(adapter)["image_size"]
    takes = f"uint8 RGB pixels [batch, {height}, {width}, 3]"
    if to == "stablehlo":
        return (
            f"with jax, flatbuffers and Pillow alone: python {files.local(out) / 'load.py'} IMAGES..."
        )
    if to == "onnx":
        return (
            f'onnxruntime: onnxruntime.InferenceSession("{out}").run(None, {{"images": images}})[0], '
            f"with {takes}"
        )
    return (
        f'TensorFlow: tf.saved_model.load("{out}").signatures["serving_default"](images=images)'
        f'["shares"], with {takes}'
    )
