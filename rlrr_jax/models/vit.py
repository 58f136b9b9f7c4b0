"""The plain Vision Transformer (Dosovitskiy et al., ICLR 2021). It knows nothing of RLRR.

The parameter tree is big_vision's in its scanned form: all blocks are stacked under one
`encoderblock`, the leading axis of every leaf there is the depth.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlrr_jax.errors import UserError
from rlrr_jax.models import matmul
from rlrr_jax.models.attention import MultiHeadDotProductAttention
from rlrr_jax.models.blocks import MlpBlock, added, over_depth, rematerialised
from rlrr_jax.models.matmul import Dense, DenseGeneral
from rlrr_jax.models.noise import drop_path_masks
from rlrr_jax.sides import Size, pair

# Dosovitskiy et al. (2021), table 1; Ti and S as in DeiT and AugReg.
VARIANTS = {
    "Ti": dict(width=192, depth=12, mlp_dim=768, num_heads=3),
    "S": dict(width=384, depth=12, mlp_dim=1536, num_heads=6),
    "B": dict(width=768, depth=12, mlp_dim=3072, num_heads=12),
    "L": dict(width=1024, depth=24, mlp_dim=4096, num_heads=16),
    "H": dict(width=1280, depth=32, mlp_dim=5120, num_heads=16),
}


ATTENTION, MLP, MAP = "MultiHeadDotProductAttention_0", "MlpBlock_0", "MAPHead_0"  # names in the tree
# Attributes that a weight file tells by its arrays.
PARTS = (
    *("pool", "class_token", "dist_token", "registers"),
    *("pre_norm", "fc_norm", "qk_norm", "projection"),
)
CHOSEN = ("depth", "block", "position_noise")  # and what a run chooses
EXAMPLES = tuple(f"{size}/16" for size in VARIANTS)


def parse_variant(variant: str) -> dict[str, int] | None:
    """`"B/16"` -> `dict(width=768, ..., patch_size=16)`; None for another name."""
    size, _, patch = str(variant).partition("/")
    if size not in VARIANTS or not patch.isdigit() or int(patch) == 0:
        return None
    return dict(VARIANTS[size], patch_size=int(patch))


def check_size(model: "ViT", image_size: Size) -> None:
    """Raises UserError if patches do not fill an image."""
    patch = model.patch_size
    for key, side in zip(("image_size", "image_width"), pair(image_size)):
        if side % patch or side < patch:
            raise UserError(
                f"image size {side} is not divisible by the patch size {patch}: set "
                f"config.{key} to {max(round(side / patch), 1) * patch}"
            )


class Block(nn.Module):
    """One pre-norm encoder block, as the body of a scan over depth. A model may be built with another.

    With `tokens` it returns so many of the first tokens; they attend to all. `grid` is that of the
    patches, rows and columns. The collection "blocks" gets its `tokens` [B, T, D], if it is asked for.
    """

    mlp_dim: int
    num_heads: int
    gelu: str
    attention: str
    norm_eps: float
    qk_norm: bool
    dtype: Any
    grid: tuple | None = None
    tokens: int | None = None

    def before_attention(self, y):
        """What attention gets of the normalised tokens [B, T, D]: a place for a block of one's own."""
        return y

    def attend(self, x, context):
        """What the tokens [B, t, D] get of all [B, T, D]."""
        kind = self.attention, self.dtype, self.norm_eps if self.qk_norm else None
        attention = MultiHeadDotProductAttention(self.num_heads, *kind, name=ATTENTION)
        return attention(x, context)

    def mlp(self, y):
        """The MLP of tokens [B, t, D]."""
        return MlpBlock(self.mlp_dim, self.gelu, self.dtype, name=MLP)(y)

    @nn.compact
    def __call__(self, x, rate, keep):
        first, second = (None, None) if keep is None else keep[:, :, : self.tokens]  # or [2, B, 1, 1]
        norm = functools.partial(matmul.LayerNorm, epsilon=self.norm_eps, dtype=self.dtype)
        y = norm(name="LayerNorm_0")(x)
        y = self.before_attention(y)
        x = added(x[:, : self.tokens], self.attend(y[:, : self.tokens], y), rate, first)
        x = added(x, self.mlp(norm(name="LayerNorm_1")(x)), rate, second)
        self.sow("blocks", "tokens", x)
        return x, None


class Encoder(nn.Module):
    """All blocks, scanned over depth, and the final LayerNorm, unless that comes after pooling."""

    depth: int
    unroll: int
    remat: bool
    drop_path_mode: str
    final_norm: bool
    first: int
    until: int | None
    pooled: int | None
    block: type
    options: dict

    @nn.compact
    def __call__(self, x, rate, keys):
        number = (self.until or self.depth) - self.first
        rates = jnp.linspace(0.0, 1.0, self.depth) * rate  # 0 at the first block, `rate` at the last
        rates = rates[self.first : self.until]
        # All masks at once: a kernel for each branch would take longer to compile than the rest.
        noise = rates, x.shape[1:], self.drop_path_mode, self.first
        keep = None if keys is None else drop_path_masks(keys, *noise)
        asked = any(map(self.is_mutable_collection, ("intermediates", "blocks")))
        every = self.is_initializing() or asked
        # Cut apart only where nothing is scanned: a second kind of block would be compiled, too.
        if self.pooled and self.unroll >= number and not self.until and not every:
            x = self._apart(x, rates, keep)
        else:
            blocks = over_depth(self.block, number, self.unroll, self.remat)
            x, _ = blocks(**self.options, name="encoderblock")(x, rates, keep)
        if not self.final_norm or self.until:
            return x
        norm = dict(epsilon=self.options["norm_eps"], dtype=self.options["dtype"])
        return nn.LayerNorm(**norm, name="encoder_norm")(x)

    def _apart(self, x, rates, keep):
        """All blocks, of which the last computes what is pooled alone: [B, pooled, D]."""
        name, last = "encoderblock", len(rates) - 1
        kinds = {kind: tree[name] for kind, tree in self.variables.items() if name in tree}
        own = lambda index: jax.tree.map(lambda leaf: leaf[index], kinds)
        masks = lambda index: None if keep is None else keep[index]
        if last:
            blocks = over_depth(self.block, last, self.unroll, self.remat)(**self.options, parent=None)
            x, _ = blocks.apply(own(slice(last)), x, rates[:last], masks(slice(last)))
        block = rematerialised(self.block, True) if self.remat else self.block
        block = block(**self.options, tokens=self.pooled, parent=None)
        return block.apply(own(last), x, rates[last], masks(last))[0]


class MAPHead(nn.Module):
    """Multihead attention pooling (Zhai et al., CVPR 2022): a learnt query, and an MLP."""

    mlp_dim: int
    num_heads: int
    gelu: str
    norm_eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        b, _, width = x.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width))
        attention = MultiHeadDotProductAttention(self.num_heads, "xla", self.dtype, name=ATTENTION)
        x = attention(jnp.tile(probe.astype(self.dtype), (b, 1, 1)), x)
        y = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="LayerNorm_0")(x)
        return x + MlpBlock(self.mlp_dim, self.gelu, self.dtype, name=MLP)(y)


class ViT(nn.Module):
    """Vision Transformer with a zero-initialised float32 head.

    Attributes:
      pool: what the head gets: "token" (the class token), "avg" (the mean of the patches' tokens),
        "map" (attention pooling, `MAPHead`), or "both" (class and distillation token, halved: DeiT
        averages two heads).
      class_token: whether there is one.
      dist_token: whether there is a distillation token after it.
      registers: number of further tokens (Darcet et al., ICLR 2024).
      pre_norm: whether a LayerNorm comes before the first block, as in CLIP.
      fc_norm: whether the last LayerNorm comes after pooling, as in MAE's fine-tuning.
      qk_norm: whether queries and keys pass a LayerNorm.
      first: number of blocks that the input has passed already; it is tokens then.
      until: number of blocks after which tokens are returned; None: logits after all.
      grid: rows and columns of the patches of tokens that are given, see `first`.
      projection: width of a Dense without bias before the head, as CLIP's; 0 is none.
      block: class of the blocks.
      gelu: "tanh" (the public JAX weights were trained with it), "exact", or "quick" (CLIP).
      attention: "xla" or "cudnn", see `MultiHeadDotProductAttention`.
      drop_path_mode: see `drop_path`.
      unroll: how many blocks each step of the scan over depth contains.
      remat: whether training computes again what it can instead of keeping it, to save memory.
      norm_eps: epsilon of every LayerNorm.
      dtype: dtype of activations and matmuls; parameters are always float32.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int
    num_classes: int
    gelu: str = "tanh"
    attention: str = "xla"
    drop_path_mode: str = "element"
    unroll: int = 1
    remat: bool = False
    norm_eps: float = 1e-6
    dtype: Any = jnp.float32
    pool: str = "token"
    class_token: bool = True
    dist_token: bool = False
    registers: int = 0
    pre_norm: bool = False
    fc_norm: bool = False
    qk_norm: bool = False
    projection: int = 0
    block: type = Block
    first: int = 0
    until: int | None = None
    grid: tuple | None = None

    @nn.compact
    def __call__(self, images, drop_path=0.0, keys=None):
        """Logits [B, num_classes], float32, of images [B, H, W, 3] in [-1, 1].

        Args:
          images: H and W must be divisible by the patch size, else ValueError; tokens [B, T, D] that
            have passed `first` blocks, if there are any.
          drop_path: drop rate of the last block; rises linearly from 0 at the first. May be traced.
          keys: one PRNG key per example, [B]; None switches drop path off.

        The collection "intermediates" gets `encoded` [B, tokens + h*w, D], the normalised tokens, if it
        is asked for; else the last block computes no token that is not pooled, where depth is unrolled.
        The collection "blocks" gets the tokens of every block [L, B, T, D], "pre_logits" what the head
        gets, `features` [B, D].
        """
        x = images.astype(self.dtype) if self.first else self._tokens(images)
        grid = self.grid if self.first else tuple(n // self.patch_size for n in images.shape[1:3])
        modes = self.unroll, self.remat, self.drop_path_mode, not self.fc_norm, self.first, self.until
        pooled = {"token": 1, "both": 2}.get(self.pool)
        kind = pooled, self.block, self.block_options(grid, keys)
        x = Encoder(self.depth, *modes, *kind, name="Transformer")(x, drop_path, keys)
        if self.until:
            return x
        self.sow("intermediates", "encoded", x)
        x = self._pooled(x)
        if self.fc_norm:
            x = self._norm("fc_norm")(x)
        if self.projection:
            x = Dense(self.projection, use_bias=False, dtype=self.dtype, name="projection")(x)
        high = jnp.promote_types(self.dtype, jnp.float32)  # float64 where a test computes in it
        self.sow("pre_logits", "features", x.astype(high))
        head = nn.Dense(self.num_classes, dtype=high, kernel_init=nn.initializers.zeros, name="head")
        return head(x.astype(high))

    def _tokens(self, images):
        """What the first block gets of images, [B, T, D]."""
        b, height, width, _ = images.shape
        p = self.patch_size
        if height % p or width % p:
            raise ValueError(f"image size {height}x{width} is not divisible by the patch size {p}")
        h, w = height // p, width // p
        x = images.astype(self.dtype).reshape(b, h, p, w, p, 3).transpose(0, 1, 3, 2, 4, 5)
        # The same as a convolution of stride p, kernel [p, p, 3, D], but its gradient is one matmul.
        x = DenseGeneral(self.width, axis=(-3, -2, -1), dtype=self.dtype, name="embedding")(x)
        x = self.placed(x.reshape(b, h * w, self.width))
        tokens = [
            jnp.tile(self.param(name, nn.initializers.zeros, (1, n, self.width)), (b, 1, 1))
            for name, n in self.tokens().items()
        ]
        x = jnp.concatenate([*(token.astype(self.dtype) for token in tokens), x], axis=1)
        x = matmul.in_order(x)
        return self._norm("pre_norm")(x) if self.pre_norm else x

    def placed(self, x):
        """Patches [B, h*w, D] with what tells where they are."""
        position = self.param("pos_embedding", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        return x + position.astype(self.dtype)

    def block_options(self, grid, keys):
        """Attributes of the blocks, by name, for patches in rows and columns; keys as in a call."""
        del keys  # no noise but drop path
        same = ("mlp_dim", "num_heads", "gelu", "attention", "norm_eps", "qk_norm", "dtype")
        return {**{name: getattr(self, name) for name in same}, "grid": grid}

    def tokens(self) -> dict[str, int]:
        """Names and numbers of the tokens before those of the patches."""
        every = {
            "cls": int(self.class_token),
            "dist": int(self.dist_token),
            "registers": self.registers,
        }
        return {name: number for name, number in every.items() if number}

    def _norm(self, name):
        return nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name=name)

    def _pooled(self, x):
        """What is made of the tokens [B, T, D]: [B, D], or [B, 2 D] of two tokens."""
        if self.pool == "token":
            return x[:, 0]
        if self.pool == "both":
            return jnp.concatenate([x[:, 0], x[:, 1]], -1) / 2
        if self.pool == "avg":
            return x[:, sum(self.tokens().values()) :].mean(1)
        return self.map_pooled(x)[:, 0]

    def map_pooled(self, x):
        """Attention pooling [B, 1, D] over the patches' tokens."""
        kind = self.mlp_dim, self.num_heads, self.gelu, self.norm_eps, self.dtype
        return MAPHead(*kind, name=MAP)(x[:, sum(self.tokens().values()) :])


def part(model: ViT, tree: Any, blocks: slice, size: Size | None = None) -> tuple[ViT, Any]:
    """The model and tree of some of a ViT's blocks; those to the last end in logits.

    Args:
      model: a ViT.
      tree: its tree.
      blocks: the first, and the one after the last.
      size: size of its images in pixels, where the first blocks are not among them.
    """
    own = jax.tree.map(lambda x: x[blocks], tree["Transformer"]["encoderblock"])
    own = {**tree, "Transformer": {**tree["Transformer"], "encoderblock": own}}
    first = blocks.start or 0
    grid = tuple(side // model.patch_size for side in pair(size)) if first and size else None
    return model.clone(first=first, until=blocks.stop, grid=grid), own


Model = ViT
