"""The plain Swin Transformer (Liu et al., ICCV 2021): windows of tokens, shifted in every second block.

Follows https://github.com/microsoft/Swin-Transformer. Blocks of a stage are stacked in pairs, one plain
and one shifted: the leading axis of every leaf in `stage_<s>/encoderblock` is the number of pairs.
Patch merging has a bias, which public weights have not: it is zero there.
"""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlrr_jax.errors import UserError
from rlrr_jax.models import matmul
from rlrr_jax.models.blocks import MlpBlock, added, over_depth
from rlrr_jax.models.matmul import Dense, DenseGeneral
from rlrr_jax.models.noise import drop_path_masks
from rlrr_jax.sides import Size, pair

ATTENTION = "WindowAttention_0"  # name in a block
# Liu et al. (2021), section 3.3.
VARIANTS = {
    "t": dict(width=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "s": dict(width=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "b": dict(width=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "l": dict(width=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
}
EXAMPLES = ("swin_t", "swin_s", "swin_b", "swin_l", "swin_b_12", "swin_l_12")
_NAME = re.compile(rf"swin_([{''.join(VARIANTS)}])(?:_(\d+))?")


def parse_variant(variant: str) -> dict[str, Any] | None:
    """`"swin_b"` -> `dict(width=128, ..., window=7)`, `"swin_b_12"` has windows of 12 tokens a side.

    Returns None for another name.
    """
    match = _NAME.fullmatch(str(variant))
    if match is None or match[2] in ("0", "1"):
        return None
    return dict(VARIANTS[match[1]], patch_size=4, window=int(match[2] or 7))


def default_size(variant: str) -> int:
    """The side of images that windows fill: 224 pixels with 7 tokens a window, 384 with 12."""
    return 32 * (parse_variant(variant) or {"window": 7})["window"]


def check_size(model: Any, image_size: Size) -> None:
    """Raises UserError if windows do not fill an image, or if it is no square."""
    height, width = pair(image_size)
    if height != width:
        raise UserError("images of a Swin are squares here: leave config.image_width out")
    grids(height, model)


def grids(image_size: int, model: "Swin") -> list[int]:
    """Tokens along a side of each stage's grid; UserError if windows do not fill one of them.

    In a grid that is smaller than the window the window is as large as the grid.
    """
    stages, step = len(model.depths), model.patch_size * 2 ** (len(model.depths) - 1)
    halved = lambda size: [size // model.patch_size >> stage for stage in range(stages)]
    filled = lambda size: all(grid % min(model.window, grid) == 0 for grid in halved(size))
    fits = lambda size: size > 0 and size % step == 0 and filled(size)
    if not fits(image_size):
        every = filter(fits, range(step, 4 * image_size + 64 * step, step))
        near = min(every, key=lambda side: abs(side - image_size))
        raise UserError(
            f"image size {image_size} does not fill windows of {model.window} patches of "
            f"{model.patch_size} pixels in {stages} stages: set config.image_size to {near}"
        )
    return halved(image_size)


def relative_index(window: int) -> np.ndarray:
    """Row of the table for query p and key q, [window^2, window^2], by (y - y', x - x')."""
    place = np.indices((window, window)).reshape(2, -1)
    rows, columns = place[:, :, None] - place[:, None] + window - 1
    return rows * (2 * window - 1) + columns


def shift_mask(grid: int, window: int, shift: int) -> np.ndarray:
    """-100 between tokens of a window that are no neighbours in the image, [windows, N, N] float32."""
    label = np.searchsorted((grid - window, grid - shift), np.arange(grid), side="right")
    labels = label[:, None] * 3 + label
    labels = np.asarray(windows(labels[None, ..., None], window))[0, ..., 0]  # [windows, N]
    return np.where(labels[:, :, None] == labels[:, None], 0.0, -100.0).astype(np.float32)


def windows(x: Any, window: int) -> Any:
    """[B, H, W, C] -> [B, windows, window^2, C], both in rows."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // window, window, w // window, window, c).swapaxes(2, 3)
    return x.reshape(b, -1, window * window, c)


def unwindowed(x: Any, grid: int, window: int) -> Any:
    """[B, windows, window^2, C] -> [B, grid, grid, C]: what `windows` undoes."""
    b, c, n = x.shape[0], x.shape[-1], grid // window
    return x.reshape(b, n, n, window, window, c).swapaxes(2, 3).reshape(b, grid, grid, c)


def merged_patches(x: Any) -> Any:
    """[B, H, W, C] -> [B, H/2, W/2, 4 C], in the order of the authors.

    That is (even row, even column), (odd, even), (even, odd), (odd, odd): the row is the faster bit.
    """
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(b, h // 2, w // 2, 4 * c)


class WindowAttention(nn.Module):
    """Self-attention within windows, with a learnt bias for each relative position."""

    num_heads: int
    window: int
    dtype: Any

    @nn.compact
    def __call__(self, x, mask):
        width = x.shape[-1]  # x is [B, windows, N, C]
        table = self.param(
            "relative_position_bias_table",
            nn.initializers.truncated_normal(0.02),
            ((2 * self.window - 1) ** 2, self.num_heads),
        )
        bias = table[relative_index(self.window)].transpose(2, 0, 1)[None]  # [1, heads, N, N]
        if mask is not None:
            bias = bias + mask[:, None]  # [windows, heads, N, N]
        qkv = Dense(3 * width, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(*qkv.shape[:-1], 3, self.num_heads, width // self.num_heads)
        # Keep what the matmuls give, not the steps of the softmax.
        keep = jax.checkpoint_policies.dots_saveable
        heads = (qkv[..., i, :, :] for i in range(3))
        x = jax.checkpoint(matmul.attention, policy=keep)(*heads, bias[None])
        return Dense(width, dtype=self.dtype, name="out")(x.reshape(*x.shape[:-2], width))


class Block(nn.Module):
    """One pre-norm block; its windows are moved by `shift` tokens."""

    grid: int
    shift: int
    window: int
    num_heads: int
    gelu: str
    norm_eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x, rate, keep):
        first, second = (None, None) if keep is None else keep
        norm = functools.partial(matmul.LayerNorm, epsilon=self.norm_eps, dtype=self.dtype)
        x = added(x, self.attended(norm(name="LayerNorm_0")(x)), rate, first)
        return added(x, self.mlp(norm(name="LayerNorm_1")(x)), rate, second)

    def attention(self):
        """What attends within windows."""
        return WindowAttention(self.num_heads, self.window, self.dtype, name=ATTENTION)

    def attended(self, x):
        """What tokens [B, h*w, C] get of those of their windows."""
        y = x.reshape(x.shape[0], self.grid, self.grid, -1)
        mask = shift_mask(self.grid, self.window, self.shift) if self.shift else None
        y = windows(jnp.roll(y, (-self.shift,) * 2, (1, 2)), self.window)
        y = unwindowed(self.attention()(y, mask), self.grid, self.window)
        return jnp.roll(y, (self.shift,) * 2, (1, 2)).reshape(x.shape)

    def mlp(self, x):
        """The MLP of tokens [B, h*w, C]."""
        return MlpBlock(4 * x.shape[-1], self.gelu, self.dtype, name="MlpBlock_0")(x)


class Pair(nn.Module):
    """A plain and a shifted block, as the body of a scan over the pairs of a stage."""

    kind: type
    block: dict

    @nn.compact
    def __call__(self, x, rates, keep):
        window, grid = self.block["window"], self.block["grid"]
        for i, (name, shift) in enumerate({"plain": 0, "shifted": window // 2}.items()):
            shift = shift if window < grid else 0
            kept = None if keep is None else keep[i]
            x = self.kind(**self.block, shift=shift, name=name)(x, rates[i], kept)
        return x, None


class PatchMerging(nn.Module):
    """LayerNorm and Dense of four neighbours: half the grid, twice the width."""

    norm_eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(merged_patches(x))
        return Dense(2 * width, dtype=self.dtype, name="reduction")(x)


class Stage(nn.Module):
    """The blocks of one grid, scanned in pairs, and the merging after them (but in the last stage)."""

    depth: int
    unroll: int
    remat: bool
    kind: type
    merging: type | None
    block: dict

    @nn.compact
    def __call__(self, x, rates, keep):
        pairs = self.depth // 2
        blocks = over_depth(Pair, pairs, self.unroll, self.remat)(
            self.kind, self.block, name="encoderblock"
        )
        halve = lambda x: x.reshape(pairs, 2, *x.shape[1:])
        x, _ = blocks(x, halve(rates), None if keep is None else halve(keep))
        if self.merging is None:
            return x
        grid = self.block["grid"]
        norm = self.block["norm_eps"], self.block["dtype"]
        x = self.merging(*norm, name="merge")(x.reshape(x.shape[0], grid, grid, -1))
        return x.reshape(x.shape[0], -1, x.shape[-1])


class PatchEmbed(nn.Module):
    """Patches through a Dense and a LayerNorm."""

    width: int
    norm_eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        dense = DenseGeneral(self.width, axis=(-3, -2, -1), dtype=self.dtype, name="proj")
        return nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(dense(x))


class Swin(nn.Module):
    """Swin Transformer with a zero-initialised float32 head on the mean of its last tokens.

    Attributes:
      width: channels of the first stage; each next one has twice as many.
      depths: blocks of each stage, even numbers.
      num_heads: attention heads of each stage.
      window: tokens along a side of a window.
      The others are as those of `vit.ViT`.
    """

    width: int
    depths: tuple
    num_heads: tuple
    patch_size: int
    window: int
    num_classes: int
    gelu: str = "exact"
    drop_path_mode: str = "sample"
    unroll: int = 1
    remat: bool = False
    norm_eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, drop_path=0.0, keys=None):
        """Logits [B, num_classes], float32, of square images [B, H, H, 3] in [-1, 1].

        Args:
          images: UserError for a size that windows do not fill, see `grids`.
          drop_path: drop rate of the last block; rises linearly from 0 at the first. May be traced.
          keys: one PRNG key per example, [B]; None switches drop path off.

        The collection "intermediates" gets `encoded` [B, h*w, D], the normalised tokens.
        """
        b, p, sides = images.shape[0], self.patch_size, grids(images.shape[1], self)
        h = sides[0]
        x = images.astype(self.dtype).reshape(b, h, p, h, p, 3).transpose(0, 1, 3, 2, 4, 5)
        x = PatchEmbed(self.width, self.norm_eps, self.dtype, name="patch_embed")(x)
        x = x.reshape(b, h * h, self.width)
        rates = jnp.linspace(0.0, 1.0, sum(self.depths)) * drop_path
        first, (kind, merging) = 0, self.kinds()
        for stage, (depth, heads, grid) in enumerate(zip(self.depths, self.num_heads, sides)):
            block = dict(
                grid=grid,
                window=min(self.window, grid),
                num_heads=heads,
                gelu=self.gelu,
                norm_eps=self.norm_eps,
                dtype=self.dtype,
                **self.block_options(stage),
            )
            mine = rates[first : first + depth]
            mode = self.drop_path_mode
            keep = None if keys is None else drop_path_masks(keys, mine, x.shape[1:], mode, first)
            last = stage + 1 == len(self.depths)
            modes = self.unroll, self.remat, kind, None if last else merging, block
            x = Stage(depth, *modes, name=f"stage_{stage}")(x, mine, keep)
            first += depth
        x = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(x)
        self.sow("intermediates", "encoded", x)
        high = jnp.promote_types(self.dtype, jnp.float32)
        x = x.astype(high).mean(1)
        self.sow("pre_logits", "features", x)
        head = nn.Dense(self.num_classes, dtype=high, kernel_init=nn.initializers.zeros, name="head")
        return head(x)

    def kinds(self):
        """Classes of blocks and of what merges patches."""
        return Block, PatchMerging

    def block_options(self, stage):
        """More attributes of the blocks of a stage."""
        del stage
        return {}


Model = Swin
