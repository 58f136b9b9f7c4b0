"""One run as values: what is built, trained and evaluated reads no key of its configuration."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlrr_jax import answers, blockwise, lookup, losses, methods, mixing, optim, run_images, run_model
from rlrr_jax.data import crops
from rlrr_jax.data.task import Task
from rlrr_jax.recipe import Hyper, Recipe
from rlrr_jax.runtime import mesh as mesh_lib

_MADE: dict = {}  # see `_same`


class Limits(NamedTuple):
    """Where a run stops, saves and shows, and how its weights lie.

    Numbers are the same with others, but for `frozen_dtype`.

    Attributes:
      devices: number of devices; None is all.
      image_gb: GB of a device for training images; None is a share of it, see `feed`.
      eval_batch_size: images of an evaluation's batch.
      checkpoint_seconds: seconds between two checkpoints.
      log: "tensorboard", "wandb" or None.
      recompute: whether activations are computed twice; None is not decided.
      shard_weights: whether each device has a share of the blocks' frozen weights, see `blockwise`.
      frozen_dtype: in which they are kept; None is float32.
    """

    devices: int | None = None
    image_gb: float | None = None
    eval_batch_size: int = 256
    checkpoint_seconds: float = 10.0
    log: str | None = None
    recompute: bool | None = None
    shard_weights: bool = False
    frozen_dtype: str | None = None


class Run(NamedTuple):
    """One run, as `of` makes it of its configuration.

    Attributes:
      config: that configuration, which is saved and compared.
      task: the `Task`.
      label: `"cifar rlrr"`, for the screen.
      recipe: the `Recipe`.
      lrs: learning rate of each step [epochs * S].
      weight_decay: of AdamW, or of SGD.
      drop_path: drop rate of the last block.
      flip: whether training images are flipped at random.
      loss: the options of the loss that are real numbers.
      seed: of all that is random.
      epochs: number of epochs.
      total_steps: steps after which the last epoch ends early; None is not.
      splits: names of the images trained on, and of those evaluated.
      held_out: what these are called in results: "val" or "test".
      tested: name of the images that are tested on at the end beside them, or None.
      fits: what is fitted on them at the end, see `run_images.fits`.
      keep: whether the best epoch is kept, see `keeping`.
      patience: epochs without a better one after which a run ends; None is never.
      class_weights: see `answers.class_weights`.
      evaluated: for each epoch, whether the held-out images are evaluated after it.
      crop: how training images are cropped, see `data.crops`, or None.
      limits: the `Limits`.
    """

    config: ConfigDict
    task: Task
    label: str
    recipe: Recipe
    lrs: list[float]
    weight_decay: float
    drop_path: float
    flip: bool
    loss: dict[str, float]
    seed: int
    epochs: int
    total_steps: int | None
    splits: tuple[str, str]
    held_out: str
    tested: str | None
    fits: tuple[str, ...]
    keep: bool
    patience: int | None
    class_weights: str | None
    evaluated: tuple[bool, ...]
    crop: str | None
    limits: Limits

    @property
    def keys(self) -> jax.Array:
        """Keys of the first values, of the noise, and of the order of the images."""
        return jax.random.split(jax.random.key(self.seed), 3)

    @property
    def crops(self) -> tuple[str, int] | None:
        """Kind and seed of random crops that the host makes; None is none."""
        return (self.crop, self.seed) if self.crop and crops.by_host(self.crop) else None

    def hyper(self, labels: Any) -> Hyper:
        """What the step gets of this trial alone, with these labels of its training images."""
        numbers = {**self.loss, **answers.class_weights(self.class_weights, labels, self.task)}
        _, noise_key, order_key = self.keys
        return Hyper(
            lr=jnp.array(self.lrs),
            weight_decay=jnp.array(self.weight_decay),
            drop_path=jnp.array(self.drop_path),
            flip=jnp.array(self.flip),
            noise_key=noise_key,
            order_key=order_key,
            loss={name: jnp.array(value) for name, value in numbers.items()},
        )


def of(config: ConfigDict) -> Run:
    """The `Run` of a configuration that `config.resolve` and `run_model.follow` have filled in."""
    task, splits = run_images.task_of(config), run_images.splits(config)
    recipe = _recipe(config, task.number(splits[0]))
    bigvision = config.schedule == "bigvision"
    warmup = config.warmup_steps if bigvision else config.warmup_epochs
    length = config.epochs, recipe.steps, config.total_steps
    return Run(
        config=config,
        task=task,
        label=f"{config.task} {config.method}",
        recipe=recipe,
        lrs=optim.learning_rates(config.schedule, config.lr, *length, warmup, config.restarts),
        weight_decay=config.weight_decay,
        drop_path=config.drop_path,
        flip=config.flip,
        loss={key: x for key, x in config.loss_kwargs.items() if isinstance(x, float)},
        seed=config.seed,
        epochs=config.epochs,
        total_steps=config.total_steps,
        splits=splits,
        held_out="test" if splits[1] == "test" else "val",
        tested=run_images.tested(config),
        fits=run_images.fits(config),
        keep=bool(config.keep),
        patience=config.patience,
        class_weights=config.class_weights,
        evaluated=tuple(run_images.evaluates(config, epoch) for epoch in range(config.epochs)),
        crop=config.crop,
        limits=Limits(
            config.num_devices,
            config.data.device_gb,
            config.eval_batch_size,
            config.checkpoint_seconds,
            config.log,
            True if blockwise.asked(config) else config.model.remat,  # it computes them twice anyway
            config.shard_weights,
            config.frozen_dtype,
        ),
    )


def _recipe(config: ConfigDict, num_images: int) -> Recipe:
    model = run_model.build_model(config)
    options, fixed = config.method_kwargs.to_dict(), losses.fixed(config.loss_kwargs)
    method, loss = methods.find(config.method), losses.find(config.loss)
    weigh = config.class_weights is not None
    method = _same(method, options, lambda: methods.get(config.method, **options))
    values = lambda: run_model.check_contracts(config)
    gradients = config.gradients and lookup.find("gradients", config.gradients)
    optimizer = config.optimizer, config.momentum_dtype, config.grad_clip
    return Recipe(
        model=model.clone(num_classes=config.get("head_classes") or model.num_classes),
        method=method,
        batch_size=config.batch_size,
        num_images=num_images,
        image_size=run_images.size_of(config),
        drop_path=_noisy(config, method),
        precision=config.precision,
        optimizer=optim.Optimizer(*optimizer, gradients, config.average),
        loss=_same((loss, weigh), fixed, lambda: losses.get(config.loss, fixed, values(), weigh)),
        mixing=mixing.Mixing(config.mixup, config.cutmix, config.label_smoothing),
        crop_from=config.crop_from if config.crop == crops.SQUARE else None,
        accumulate=config.accumulate,
    )


def _noisy(config: ConfigDict, method: methods.Method) -> bool:
    """Whether drop path is in the program: at a rate of 0, too, where the method's own is another.

    So tasks that differ in it share a program. A rate of 0 changes nothing.
    """
    if config.drop_path > 0 or config.model.position_noise is not None:
        return True
    # Else blocks before which nothing is trained are computed once.
    return method.untouched is None and method.DEFAULTS["drop_path"] > 0


def mesh_of(runs: list[Run], devices: Any) -> Mesh:
    """The mesh on which runs train together: of weights in shares, all devices share one trial's."""
    run = runs[0]
    trials = 1 if run.limits.shard_weights else len(runs)
    return mesh_lib.make_mesh(devices[: run.limits.devices], trials, run.recipe.batch_size)


def together(runs: list[Run]) -> Recipe:
    """The recipe of runs that train together: that of each, with the drop path that any needs."""
    return runs[0].recipe._replace(drop_path=any(run.recipe.drop_path for run in runs))


def _same(function: Any, options: dict, make: Callable[[], Any]) -> Any:
    """What `make` gives for a function and its options, the same object each time.

    Programs are kept by what they are of, and closures and partials are equal to themselves alone.
    """
    key = function, repr(sorted(options.items()))
    if key not in _MADE:
        _MADE[key] = make()
    return _MADE[key]


def forget() -> None:
    """Forgets methods and losses that were made: their code may have been edited."""
    _MADE.clear()
