"""ConvNeXt (Liu et al., CVPR 2022): depthwise convolutions of 7 x 7 and MLPs; also DINOv3's.

Blocks of a stage are stacked, under `stage_<s>/encoderblock`; what halves the grid comes before them.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlrr_jax import backend
from rlrr_jax.errors import UserError
from rlrr_jax.models import matmul
from rlrr_jax.models.blocks import MlpBlock, added, over_depth
from rlrr_jax.models.matmul import Dense
from rlrr_jax.models.noise import drop_path_masks
from rlrr_jax.models.swin import PatchEmbed
from rlrr_jax.sides import Size, pair

# Liu et al. (2022), section 3, and facebookresearch/dinov3, which has the same four.
VARIANTS = {
    "convnext_t": dict(width=96, depths=(3, 3, 9, 3)),
    "convnext_s": dict(width=96, depths=(3, 3, 27, 3)),
    "convnext_b": dict(width=128, depths=(3, 3, 27, 3)),
    "convnext_l": dict(width=192, depths=(3, 3, 27, 3)),
}
EXAMPLES = tuple(VARIANTS)
PATCH = 4


def parse_variant(variant: str) -> dict[str, Any] | None:
    """`"convnext_b"` -> `dict(width=128, depths=(3, 3, 27, 3))`; None for another name."""
    found = VARIANTS.get(str(variant))
    return dict(found) if found else None


def check_size(model: Any, image_size: Size) -> None:
    """Raises UserError if the last stage's tokens do not fill an image."""
    step = PATCH * 2 ** (len(model.depths) - 1)
    for key, side in zip(("image_size", "image_width"), pair(image_size)):
        if side % step or side < step:
            raise UserError(
                f"image size {side} is not divisible by {step}, what a token of the last stage covers: "
                f"set config.{key} to {max(round(side / step), 1) * step}"
            )


def joined(x: Any, side: int) -> Any:
    """Squares of tokens as one: [B, H, W, C] -> [B, H / side, W / side, side^2 C], row by row."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // side, side, w // side, side, c).swapaxes(2, 3)
    return x.reshape(b, h // side, w // side, side * side * c)


class Depthwise(nn.Module):
    """A convolution of 7 x 7 of each channel alone, padded with zeros."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (7, 7, 1, width))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        x, kernel = (y.astype(self.dtype) for y in (x, kernel))
        each = _shifted if backend.platform() == "cpu" else _convolved
        return each(x, kernel) + bias.astype(self.dtype).reshape(1, 1, 1, -1)


def _convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
    how: Any = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1])
    out: jax.Array = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", **how)
    return out


def _shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same as 49 products: XLA's own takes fifteen times as long on CPUs."""
    high = jnp.promote_types(x.dtype, jnp.float32)  # of the sum
    (b, h, w, width), out = x.shape, jnp.zeros(x.shape, high)
    padded = jnp.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0))).astype(high)
    for i in range(7):
        for j in range(7):
            part = padded[:, i : i + h, j : j + w]
            out = out + part * jnp.broadcast_to(kernel[i, j, 0], (b, h, w, width))
    return out.astype(x.dtype)


class Block(nn.Module):
    """A depthwise convolution, a LayerNorm and an MLP, as the body of a scan over a stage."""

    grid: tuple
    gelu: str
    norm_eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x, rate, keep):
        b, tokens, width = x.shape
        y = x.reshape(b, *self.grid, width)
        y = Depthwise(self.dtype, name="dwconv")(y)
        y = matmul.LayerNorm(self.norm_eps, self.dtype, name="LayerNorm_0")(y.reshape(b, tokens, width))
        y = MlpBlock(4 * width, self.gelu, self.dtype, name="MlpBlock_0")(y)
        return added(x, y, rate, None if keep is None else keep[0]), None


class Merging(nn.Module):
    """LayerNorm, then a Dense of four neighbours: half the grid, twice the width."""

    norm_eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        width = 2 * x.shape[-1]
        x = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(x)
        return Dense(width, dtype=self.dtype, name="reduction")(joined(x, 2))


class Stage(nn.Module):
    """What halves the grid, but in the first stage, and the blocks."""

    depth: int
    unroll: int
    remat: bool
    merges: bool
    block: dict

    @nn.compact
    def __call__(self, x, rates, keep):
        norm = self.block["norm_eps"], self.block["dtype"]
        x = Merging(*norm, name="merge")(x) if self.merges else x
        b, h, w, width = x.shape
        blocks = over_depth(Block, self.depth, self.unroll, self.remat)
        blocks = blocks(**self.block, grid=(h, w), name="encoderblock")
        return blocks(x.reshape(b, h * w, width), rates, keep)[0].reshape(x.shape)


class ConvNeXt(nn.Module):
    """ConvNeXt with a zero-initialised float32 head on the normalised mean of its last tokens.

    Attributes:
      width: channels of the first stage; each next one has twice as many.
      depths: blocks of each stage.
      The others are as those of `vit.ViT`.
    """

    width: int
    depths: tuple
    num_classes: int
    gelu: str = "exact"
    drop_path_mode: str = "sample"
    unroll: int = 1
    remat: bool = False
    norm_eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, drop_path=0.0, keys=None):
        """Logits [B, num_classes], float32, of images [B, H, W, 3] in [-1, 1].

        Args:
          images: H and W must be divisible by 4 times 2 for each further stage, see `check_size`.
          drop_path: drop rate of the last block; rises linearly from 0 at the first. May be traced.
          keys: one PRNG key per example, [B]; None switches drop path off.

        The collection "intermediates" gets `encoded` [B, h*w, D], the tokens before their mean.
        """
        check_size(self, images.shape[1:3])
        b, h, w, _ = images.shape
        x = images.astype(self.dtype).reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, 3)
        x = PatchEmbed(self.width, self.norm_eps, self.dtype, name="patch_embed")(x.swapaxes(2, 3))
        rates = jnp.linspace(0.0, 1.0, sum(self.depths)) * drop_path
        block, first = dict(gelu=self.gelu, norm_eps=self.norm_eps, dtype=self.dtype), 0
        for stage, depth in enumerate(self.depths):
            mine, keep = rates[first : first + depth], None
            if keys is not None:
                tokens = x.shape[1] * x.shape[2] >> 2 * bool(stage), self.width << stage
                keep = drop_path_masks(keys, mine, tokens, self.drop_path_mode, first)
            modes = self.unroll, self.remat, stage > 0, block
            x = Stage(depth, *modes, name=f"stage_{stage}")(x, mine, keep)
            first += depth
        x = x.reshape(b, -1, x.shape[-1])
        self.sow("intermediates", "encoded", x)
        high = jnp.promote_types(self.dtype, jnp.float32)
        x = nn.LayerNorm(epsilon=self.norm_eps, dtype=high, name="norm")(x.astype(high).mean(1))
        self.sow("pre_logits", "features", x)
        head = nn.Dense(self.num_classes, dtype=high, kernel_init=nn.initializers.zeros, name="head")
        return head(x)


Model = ConvNeXt
