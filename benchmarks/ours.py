"""Our train and eval steps as a run calls them, on random weights and images: what is measured."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from rlrr_jax import config, evaluate, losses, methods, models, step
from rlrr_jax.recipe import Hyper, Recipe
from rlrr_jax.runtime import mesh as mesh_lib

CLASSES = 100


class Ours:
    """Compiled programs and their arguments.

    Args:
      method: a name, with options behind it: `"rlrr/rank=4/init=scaled"`.
      variant, dtype, batch, size, trials: as in a configuration.
      steps: the most that one call will do.
      drop_path: rate; 0 leaves drop path out of the program, and flips nothing.
      unroll, remat, attention: as in `config.model`.
      loss: a name of a loss, with its default options.
      precision: as `config.precision`; None goes by the dtype.
    """

    def __init__(
        self,
        method="rlrr",
        variant="B/16",
        dtype="float32",
        batch=8,
        size=224,
        trials=1,
        steps=2,
        drop_path=0.1,
        unroll=None,
        remat=False,
        attention="xla",
        loss="cross_entropy",
        precision=None,
    ):
        self.batch, self.size, self.trials, self.steps = batch, size, trials, steps
        self.sizes = models.sizes(variant)
        unroll = unroll or models.default_unroll(variant)
        self.model = models.build(
            variant,
            CLASSES,
            unroll=unroll,
            remat=remat,
            attention=None if attention == "xla" else attention,
            dtype=jnp.dtype(dtype),
        )
        self.precision = precision or ("highest" if dtype == "float32" else "default")
        self.mesh = mesh_lib.make_mesh(jax.devices(), trials)
        name, *options = method.split("/")
        pairs = [option.partition("=") for option in options]
        self.method = methods.get(name, **{key: config.literal(value) for key, _, value in pairs})
        net = self.model, self.method, models.shapes(self.model, size)
        self.recipe = Recipe(
            model=self.model,
            method=self.method,
            batch_size=batch,
            num_images=batch * steps,
            image_size=size,
            drop_path=drop_path > 0,
            precision=self.precision,
            loss=losses.get(
                loss,
                losses.fixed(losses.options(loss)),
                losses.check_contract(loss, losses.options(loss), net, (size, size)),
            ),
        )
        hyper = {"lr": jnp.array([1e-3]), "weight_decay": jnp.array(1e-4)}
        hyper["drop_path"] = jnp.array(float(drop_path))
        hyper["flip"] = jnp.array(drop_path > 0)
        options = {k: v for k, v in losses.options(loss).items() if isinstance(v, float)}
        hyper["loss"] = {key: jnp.array(value) for key, value in options.items()}
        keys = [
            {"noise_key": jax.random.key(i), "order_key": jax.random.key(-i)} for i in range(trials)
        ]
        self.hyper = mesh_lib.put_trials(self.mesh, [Hyper(**hyper, **key) for key in keys])
        self.images = jax.ShapeDtypeStruct((batch * steps, size, size, 3), jnp.uint8)
        self.labels = jax.ShapeDtypeStruct((batch * steps,), jnp.int32)
        self.frozen = models.shapes(self.model, size)
        self.eval_step = evaluate.map_eval_step(self.model, size, self.precision, self.mesh)

    def compile(self):
        """Compiles, without weights: seconds, memory on a device in GiB, GFLOP of an image."""
        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        data = {"images": self.images, "labels": self.labels}
        many = functools.partial(jax.tree.map, lambda x: _shape((self.trials, *x.shape), x.dtype))
        start = functools.partial(step.init_state, self.recipe)
        state = many(jax.eval_shape(start, jax.random.key(0), self.frozen))
        metrics = many(jax.eval_shape(functools.partial(step.init_metrics, self.recipe)))
        begun = time.perf_counter()
        train = step.map_train_steps(self.recipe, self.mesh)
        compiled = train.lower(self.frozen, data, state, metrics, self.hyper, (scalar,) * 3).compile()
        seconds = time.perf_counter() - begun
        memory = compiled.memory_analysis()
        slots = -(-self.batch // self.mesh.shape["data"]) * self.mesh.shape["data"]
        batch = _shape((slots, self.size, self.size, 3), jnp.uint8)
        begun = time.perf_counter()
        self.eval_step.lower(many(self.frozen), batch).compile()
        return {
            "train_compile_seconds": seconds,
            "eval_compile_seconds": time.perf_counter() - begun,
            "train_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
            "gflop": self.flop() / 1e9,
        }

    def flop(self):
        """Of the matmuls of one image's forward pass; training takes three times as much."""
        if "depth" not in self.sizes:  # a Swin or a ResNet: as XLA counts
            image = _shape((1, self.size, self.size, 3), jnp.float32)
            apply = jax.jit(lambda params, x: self.model.apply({"params": params}, x))
            shapes = jax.tree.map(lambda x: _shape(x.shape, jnp.float32), self.frozen)
            return apply.lower(shapes, image).cost_analysis()["flops"]
        s, patches = self.sizes, (self.size // self.sizes["patch_size"]) ** 2
        tokens = patches + sum(self.model.tokens().values())
        layers = 3 if s.get("gated") else 2  # of an MLP
        dense = 4 * s["width"] ** 2 + layers * s["width"] * s["mlp_dim"]
        block = tokens * dense + 2 * tokens**2 * s["width"]
        stem = patches * 3 * s["patch_size"] ** 2 * s["width"]
        return 2 * (s["depth"] * block + stem)

    def fill(self):
        """Makes weights and data, and runs everything once."""
        rng = np.random.default_rng(0)
        draw = lambda x: (0.02 * rng.standard_normal(x.shape)).astype(x.dtype)
        self.frozen = mesh_lib.put(self.mesh, P(), jax.tree.map(draw, self.frozen))
        self.images = rng.integers(0, 256, self.images.shape, np.uint8)
        self.labels = rng.integers(0, CLASSES, self.labels.shape).astype(np.int32)
        self.data = mesh_lib.put(self.mesh, P(), {"images": self.images, "labels": self.labels})
        keys = mesh_lib.put(self.mesh, P("trial"), jax.random.split(jax.random.key(0), self.trials))
        self.now = step.map_start(self.recipe, self.mesh)(keys, self.frozen)
        self.train_steps = step.map_train_steps(self.recipe, self.mesh)
        self.merge_all = step.map_merge(self.method, self.mesh)
        self.unmerged = mesh_lib.put_trials(self.mesh, [self.frozen] * self.trials)
        dtype, tokens = self.model.dtype, (self.size // self.model.patch_size) ** 2 + 1
        dtype = jnp.bfloat16 if self.precision == "bfloat16" else dtype
        width, hidden = (getattr(self.model, key, n) for key, n in (("width", 512), ("mlp_dim", 2048)))
        self.factors = jnp.ones((self.batch * tokens, width), dtype), jnp.ones((width, hidden), dtype)
        sums = dict(precision=self.precision, preferred_element_type=jnp.float32)
        self.product = jax.jit(functools.partial(jnp.matmul, **sums))
        for number in (1, self.steps):
            self.train(number)
        self.merge()
        self.evaluate(1)
        self.matmul()

    def train(self, number):
        """So many steps, as one dispatch."""
        scalars = [mesh_lib.put(self.mesh, P(), jnp.int32(i)) for i in (0, 0, number)]
        self.now = self.train_steps(self.frozen, self.data, *self.now, self.hyper, tuple(scalars))
        jax.block_until_ready(self.now)

    def merge(self):
        """What precedes an evaluation, once."""
        merged = self.merge_all(self.frozen, self.now[0]["trainable"])
        self.merged = jax.block_until_ready(merged)

    def evaluate(self, number, params=None):
        """So many batches."""
        images = self.images[: number * self.batch]
        evaluate.evaluate(self.eval_step, params or self.merged, images, self.batch, self.mesh)

    def plain(self, number):
        """The same, of the backbone itself."""
        self.evaluate(number, self.unmerged)

    def matmul(self):
        """A matmul of the size of the MLP's first."""
        jax.block_until_ready(self.product(*self.factors))

    def matmul_flop(self):
        """Of one such matmul."""
        (rows, inner), columns = self.factors[0].shape, self.factors[1].shape[1]
        return 2 * rows * inner * columns


def _shape(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)
