"""What a training step is given: all that is fixed, what differs between trials, and its images."""

import math
from typing import Any, NamedTuple

import jax

from rlrr_jax.methods import Method
from rlrr_jax.mixing import Mixing
from rlrr_jax.optim import Optimizer
from rlrr_jax.sides import Size


class Recipe(NamedTuple):
    """All that is fixed while the step is traced.

    Attributes:
      model: the flax model.
      method: the `methods.Method`.
      batch_size: B, over all devices.
      num_images: N.
      image_size: size of the images that the model takes, see `sides`; smaller images are enlarged.
        None: it takes what first blocks made of images, see `prefix`.
      crop_from: side of the images from which squares are cut on the device, at random to train on,
        the middle to evaluate; None cuts nothing.
      precision: precision of matmuls, as `jax.default_matmul_precision` names it.
      drop_path: whether its noise is in the program; the rate itself is traced.
      optimizer: how gradients become updates, see `optim.build`.
      loss: the `losses.Loss` with its fixed options; None is cross-entropy.
      mixing: how images and labels are mixed.
      accumulate: in how many parts, one after another, a device computes the gradient of its images.
    """

    model: Any
    method: Method
    batch_size: int
    num_images: int
    image_size: Size | None
    drop_path: bool = True
    precision: str = "highest"
    optimizer: Optimizer = Optimizer()
    loss: Any = None
    mixing: Mixing = Mixing()
    crop_from: int | None = None
    accumulate: int = 1

    @property
    def steps(self) -> int:
        """S: steps an epoch; the last may be short."""
        return math.ceil(self.num_images / self.batch_size)

    def images_before(self, epoch: int, step: int) -> int:
        """Number of images seen before a step of an epoch."""
        return epoch * self.num_images + min(step * self.batch_size, self.num_images)


class Hyper(NamedTuple):
    """What trials of one program may differ in; traced.

    Attributes:
      lr: learning rate of each step of the run [epochs * S].
      weight_decay: of AdamW, or of SGD.
      drop_path: drop rate of the last block.
      flip: whether images are flipped left to right at random.
      noise_key: of drop path, flips, mixing and the like.
      order_key: of the order of the images.
      loss: the options of the loss that are real numbers, and `class_weights` [classes] if set.
    """

    lr: Any
    weight_decay: Any
    drop_path: Any
    flip: Any
    noise_key: jax.Array
    order_key: jax.Array
    loss: Any = {}  # noqa: RUF012, it is never changed


class Batch(NamedTuple):
    """A device's share of a batch, b images of B.

    Attributes:
      images: pixels in [-1, 1], [b, H, W, 3].
      labels: classes [b]; 0 or 1 [b, classes] or values [b] of tasks of other kinds, see `metrics`.
      targets: probabilities [b, classes] where labels are mixed or smoothed, else None.
      mask: 1 for an image, 0 for padding [b].
      keys: a noise key for each image [b].
      slots: place of each image in the whole batch [b].
      numbers: number of each image in the training set [b].
      step: number of the step, from the start of training.
      remembered: what the loss returned as "remember" of each image last [b, classes], 0 at first;
        None for a loss that returns no such value.
    """

    images: jax.Array
    labels: jax.Array
    targets: jax.Array | None
    mask: jax.Array
    keys: jax.Array
    slots: jax.Array
    numbers: jax.Array
    step: jax.Array
    remembered: jax.Array | None = None
