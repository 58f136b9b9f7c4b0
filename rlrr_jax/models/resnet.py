"""Plain ResNets: with BatchNorm (He et al., CVPR 2016), and BiT's (Kolesnikov et al., ECCV 2020).

Those of `resnet18` to `resnet152` are torchvision's: BatchNorm with frozen statistics, which is a scale
and a shift of each channel; statistics are folded into these when weights are read. Those of `bit_50x1`
and so on are big_vision's (models/bit_paper.py): pre-activation, GroupNorm, standardised kernels. All
padding is symmetric, as in PyTorch. The stem is padded, so that pixels cannot be folded into it.
"""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlrr_jax import backend
from rlrr_jax.errors import UserError
from rlrr_jax.models.noise import drop_path, drop_path_masks
from rlrr_jax.sides import Size, pair

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
EXAMPLES = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("bit_50x1", "bit_50x3", "bit_101x1", "bit_101x3", "bit_152x2", "bit_152x4"),
)
SMALLEST = 32  # pixels: one value of the last stage
HALF = (0.5, 0.5, 0.5)
GroupNorm = functools.partial(nn.GroupNorm, 32, use_fast_variance=False)


def parse_variant(variant: str) -> dict[str, Any] | None:
    """`"resnet50"` -> `dict(depths=(3, 4, 6, 3), bottleneck=True, ...)`, `"bit_50x3"` is three times as
    wide; None for another name."""
    match = re.fullmatch(r"(resnet|bit_)(\d+)(?:x([1-9]))?", str(variant))
    if match is None or int(match[2]) not in DEPTHS or (match[1] == "bit_") != bool(match[3]):
        return None
    depth, bit = int(match[2]), match[1] == "bit_"
    if bit and depth < 50:
        return None
    return dict(depths=DEPTHS[depth], bottleneck=depth >= 50, bit=bit, widen=int(match[3] or 1))


def check_size(model: "ResNet", image_size: Size) -> None:
    """Raises UserError for images that are smaller than the network's steps."""
    del model
    if (side := min(pair(image_size))) < SMALLEST:
        raise UserError(f"image size {side} is too small: set config.image_size to {SMALLEST}")


def standardised(kernel: jax.Array) -> jax.Array:
    """Kernels [k, k, in, out] with mean 0 and variance 1 over the inputs of each output."""
    kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
    return kernel * jax.lax.rsqrt(jnp.square(kernel).mean((0, 1, 2), keepdims=True) + 1e-10)


def by_xla(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolution of [B, H, W, in] with a kernel [k, k, in, out], padded by half of it on each side."""
    pad = ((len(kernel) // 2,) * 2,) * 2
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, pad, dimension_numbers=names)


@functools.partial(jax.checkpoint, static_argnums=2)
def by_matmul(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The same as one matmul of patches, whose gradient takes a ninth of the time of XLA's on CPUs.

    The patches are made again for the gradient instead of being kept.
    """
    size, pad = len(kernel), len(kernel) // 2
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    ends = [side - size + 1 for side in x.shape[1:3]]
    cut = lambda i, j: x[:, i : i + ends[0] : stride, j : j + ends[1] : stride]
    patches = jnp.concatenate([cut(i, j) for i in range(size) for j in range(size)], -1)
    return patches @ kernel.reshape(-1, kernel.shape[-1])


class Conv(nn.Module):
    """A convolution without bias, padded by half its kernel on each side."""

    width: int
    size: int
    stride: int
    standardise: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, x.shape[-1], self.width)
        start = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
        kernel = self.param("kernel", start, shape)
        kernel = standardised(kernel) if self.standardise else kernel
        convolve = by_matmul if backend.platform() == "cpu" else by_xla
        return convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


class Affine(nn.Module):
    """A scale and a shift of each channel: BatchNorm whose statistics stay as they are."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, width).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, width).astype(self.dtype)
        return x * scale[None, None, None] + bias[None, None, None]


class Unit(nn.Module):
    """A residual unit: two convolutions of 3 x 3, or 1 x 1, 3 x 3 and 1 x 1; with a projection or not.

    Attributes:
      width: channels of the inner convolutions.
      stride: of the one of 3 x 3 (the first of two).
      projects: whether the shortcut is a convolution of 1 x 1.
    """

    width: int
    stride: int
    projects: bool
    bottleneck: bool
    bit: bool
    norm_eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x, rate, keep):
        out = 4 * self.width if self.bottleneck else self.width
        sizes = ((1, self.width), (3, self.width), (1, out)) if self.bottleneck else ((3, out),) * 2
        where = 1 if self.bottleneck else 0

        def conv(name, width, size, stride):
            return Conv(width, size, stride, self.bit, self.dtype, name=name)

        def norm(number):
            if self.bit:
                return GroupNorm(epsilon=self.norm_eps, dtype=self.dtype, name=f"gn{number}")
            return Affine(self.dtype, name=f"bn{number}")

        y = nn.relu(norm(1)(x)) if self.bit else x
        shortcut = x
        if self.projects:
            shortcut = conv("conv_proj", out, 1, self.stride)(y)
            shortcut = shortcut if self.bit else norm("_proj")(shortcut)
        for i, (size, width) in enumerate(sizes, 1):
            if self.bit and i > 1:
                y = nn.relu(norm(i)(y))
            y = conv(f"conv{i}", width, size, self.stride if i - 1 == where else 1)(y)
            if not self.bit:
                y = norm(i)(y)
                y = nn.relu(y) if i < len(sizes) else y
        if keep is not None:
            grid = y.shape[1:3] if keep.shape[1] > 1 else (1, 1)
            y = drop_path(y, rate, keep.reshape(len(y), *grid, -1))
        return shortcut + y if self.bit else nn.relu(shortcut + y)


class ResNet(nn.Module):
    """ResNet with a zero-initialised float32 head on the mean of its last values.

    Attributes:
      depths: units of each stage.
      bottleneck: whether a unit has three convolutions, the last four times as wide.
      bit: whether it is BiT's, see above.
      widen: factor of all widths.
      mean, std: mean and standard deviation of each colour that the network was trained with, of pixels
        in [0, 1].
      norm_eps: epsilon of GroupNorm; of BatchNorm, before it was folded.
      The others are as those of `vit.ViT`.
    """

    depths: tuple
    bottleneck: bool
    bit: bool
    widen: int
    num_classes: int
    mean: tuple = HALF
    std: tuple = HALF
    drop_path_mode: str = "sample"
    remat: bool = False
    norm_eps: float = 1e-5
    dtype: Any = jnp.float32

    @property
    def patch_size(self) -> int:
        """Pixels along a side of what one value of the last stage stands for."""
        return SMALLEST

    @nn.compact
    def __call__(self, images, drop_path=0.0, keys=None):
        """Logits [B, num_classes], float32, of images [B, H, W, 3] in [-1, 1].

        Args:
          images: pixels, normalised here to `mean` and `std`.
          drop_path: drop rate of the last unit; rises linearly from 0 at the first. May be traced.
          keys: one PRNG key per example, [B]; None switches drop path off.

        The collection "intermediates" gets `encoded` [B, h*w, D], the values before pooling.
        """
        mean, std = (jnp.array(x, images.dtype)[None, None, None] for x in (self.mean, self.std))
        x = ((images + 1) / 2 - mean) / std
        x = Conv(64 * self.widen, 7, 2, self.bit, self.dtype, name="conv_root")(x)
        if not self.bit:
            x = nn.relu(Affine(self.dtype, name="bn_root")(x))
        for axis in (1, 2):  # zeros around, also where BiT has negative values
            edge = jnp.zeros_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis))
            x = jnp.concatenate([edge, x, edge], axis)
        x = nn.max_pool(x, (3, 3), (2, 2))
        rates = jnp.linspace(0.0, 1.0, sum(self.depths)) * drop_path
        unit = nn.remat(Unit) if self.remat else Unit
        number = 0
        for stage, depth in enumerate(self.depths):
            width = 64 * self.widen * 2**stage
            for i in range(depth):
                stride = 2 if stage and not i else 1
                projects = not i and (self.bottleneck or stage > 0)
                kind = self.bottleneck, self.bit, self.norm_eps, self.dtype
                module = unit(width, stride, projects, *kind, name=f"stage_{stage}_unit_{i}")
                keep = self._keep(keys, rates, number, x, width, stride)
                x = module(x, rates[number], keep)
                number += 1
        if self.bit:
            x = nn.relu(GroupNorm(epsilon=self.norm_eps, dtype=self.dtype, name="gn_head")(x))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        self.sow("intermediates", "encoded", x)
        high = jnp.promote_types(self.dtype, jnp.float32)
        x = x.astype(high).mean(1)
        self.sow("pre_logits", "features", x)
        head = nn.Dense(self.num_classes, dtype=high, kernel_init=nn.initializers.zeros, name="head")
        return head(x)

    def _keep(self, keys, rates, number, x, width, stride):
        """Mask of a unit's branch, [B, h*w, D] or [B, 1, 1]; None without keys."""
        if keys is None:
            return None
        h, w = (-(-side // stride) for side in x.shape[1:3])
        shape = h * w, width * (4 if self.bottleneck else 1)
        masks = drop_path_masks(keys, rates[number : number + 1], shape, self.drop_path_mode, number)
        return masks[0, 0]


Model = ResNet
