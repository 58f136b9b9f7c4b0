"""ViTs that know where patches are by rotating queries and keys: DINOv3 and its like.

The parts are those of `vit`, under the same names; what is named here is what differs. Positions are
rotary (Su et al., RoFormer, 2021) along two axes, so that a backbone takes any image size as it is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlrr_jax.models import matmul, vit
from rlrr_jax.models.attention import MultiHeadDotProductAttention
from rlrr_jax.models.matmul import Dense


class Rotary(NamedTuple):
    """How positions of patches rotate queries and keys.

    A head's Dh values are Dh / 2 pairs. A quarter of the values goes with rows and a quarter with
    columns, at frequencies `base` to the -4k / Dh.

    Attributes:
      base: ratio of the longest to the shortest period, nearly.
      reference: side of the grid that every grid is stretched to, and positions are counted in, as in
        EVA-02; 0: they are centres of patches, from -1 to 1 of each side, in full turns.
      start: number of the first row and column, where they are counted.
      columns_first: whether columns come before rows.
      neighbours: whether values 2i and 2i + 1 are a pair; else values i and i + Dh / 2.
    """

    base: float = 100.0
    reference: int = 0
    start: int = 0
    columns_first: bool = False
    neighbours: bool = False

    def places(self, grid: tuple[int, int]) -> jax.Array:
        """Positions of the patches of a grid [P, 2], row by row."""
        if self.reference:
            axes = [(jnp.arange(n, dtype=jnp.float32) + self.start) / n * self.reference for n in grid]
        else:
            axes = [(2 * jnp.arange(n, dtype=jnp.float32) + 1) / n - 1 for n in grid]
        both = jnp.meshgrid(*axes, indexing="ij")
        both = both[::-1] if self.columns_first else both
        return jnp.concatenate([x.reshape(-1, 1) for x in both], 1)

    def angles(self, places: jax.Array, width: int) -> jax.Array:
        """Angles [..., P, Dh] of a head of a width, for positions [..., P, 2]."""
        frequencies = self.base ** (-4 * jnp.arange(width // 4, dtype=jnp.float32) / width)
        turns = 1.0 if self.reference else 2 * jnp.pi
        angles = turns * places[..., None] * frequencies.reshape(*(1,) * places.ndim, -1)
        angles = angles.reshape(*places.shape[:-1], -1)
        return jnp.repeat(angles, 2, -1) if self.neighbours else jnp.tile(angles, 2)

    def other(self, x: jax.Array) -> jax.Array:
        """Of each pair (a, b) in the last axis, (-b, a)."""
        if self.neighbours:
            first, second = x[..., ::2], x[..., 1::2]
            pairs = jnp.concatenate([-second[..., None], first[..., None]], -1)
            return pairs.reshape(x.shape)
        first, second = jnp.split(x, 2, -1)
        return jnp.concatenate([-second, first], -1)

    def function(self, places: jax.Array, width: int, before: int) -> Callable:
        """What rotates queries or keys [B, T, H, Dh], in float32.

        Args:
          places: positions of patches [P, 2], or of each image [B, P, 2].
          width: Dh.
          before: number of tokens before those of the patches, which are not rotated.
        """
        angles = self.angles(places, width)
        # Nor is one behind them, which cuDNN's attention may need.
        ends = [(0, 0)] * (angles.ndim - 2) + [(before, 1), (0, 0)]
        cos = jnp.pad(jnp.cos(angles), ends, constant_values=1.0)[..., None, :]
        sin = jnp.pad(jnp.sin(angles), ends)[..., None, :]

        def rotate(x: jax.Array) -> jax.Array:
            high, number = x.astype(jnp.promote_types(x.dtype, jnp.float32)), x.shape[1]
            mine = lambda table: jnp.broadcast_to(table[..., :number, :, :], x.shape)
            return (high * mine(cos) + self.other(high) * mine(sin)).astype(x.dtype)

        return rotate


_T = dict(width=192, depth=12, mlp_dim=768, num_heads=3, patch_size=16)
_S = dict(width=384, depth=12, mlp_dim=1536, num_heads=6, patch_size=16)
_B = dict(width=768, depth=12, mlp_dim=3072, num_heads=12, patch_size=16)
_L = dict(width=1024, depth=24, mlp_dim=4096, num_heads=16, patch_size=16)
# facebookresearch/dinov3, hub/backbones.py. The smallest is EUPE's.
_DINO: dict[str, dict[str, Any]] = {
    **{"dinov3_t16": _T, "dinov3_s16": _S, "dinov3_s16plus": dict(_S, gated=True)},
    **{"dinov3_b16": _B, "dinov3_l16": _L},
    "dinov3_h16plus": dict(_L, width=1280, depth=32, mlp_dim=5120, num_heads=20, gated=True),
    "dinov3_7b16": dict(_L, width=4096, depth=40, mlp_dim=8192, num_heads=32, gated=True, qkv_bias=""),
}
# facebookresearch/perception_models, PE-core; the rest of its names as in timm 1.0.31.
_PE = dict(embedded=True, pre_norm=True, pool="map", pool_heads=8, qkv_bias="qkv", registers=0)
_COUNTED = Rotary(1e4, 24, 1, columns_first=True, neighbours=True)
_PE_CORE = {
    "pe_core_t16": dict(_T, **_PE, rotary=_COUNTED),
    "pe_core_s16": dict(_S, **_PE, rotary=_COUNTED),
    "pe_core_b16": dict(_B, **_PE, rotary=_COUNTED._replace(reference=14)),
    "pe_core_l14": dict(_L, **_PE, rotary=_COUNTED) | dict(patch_size=14),
    "pe_core_g14": dict(_PE, width=1536, depth=50, mlp_dim=8960, num_heads=16, patch_size=14)
    | dict(rotary=_COUNTED._replace(reference=32, start=0), class_token=False),
}
# baaivision/EVA, EVA-02 after masked image modelling, and fine-tuned.
_EVA = dict(embedded=True, gated=True, pool="avg", fc_norm=True, registers=0, norm_eps=1e-6)
_EVA |= dict(rotary=Rotary(1e4, 16, neighbours=True), patch_size=14)
_EVA_02 = {
    "eva02_t14": dict(_T, **_EVA | dict(mlp_dim=512)),
    "eva02_s14": dict(_S, **_EVA | dict(mlp_dim=1024)),
    "eva02_b14": dict(_B, **_EVA | dict(mlp_dim=2048, mlp_norm=True)),
    "eva02_l14": dict(_L, **_EVA | dict(mlp_dim=2730, mlp_norm=True)),
}
VARIANTS: dict[str, dict[str, Any]] = {**_DINO, **_PE_CORE, **_EVA_02}
EXAMPLES = tuple(VARIANTS)
check_size = vit.check_size


def parse_variant(variant: str) -> dict[str, Any] | None:
    """`"dinov3_b16"` -> `dict(width=768, ...)`; None for another name."""
    found = VARIANTS.get(str(variant))
    return dict(found) if found else None


def moved(places: jax.Array, noise: tuple, keys: jax.Array) -> jax.Array:
    """Positions of the patches of each image [B, P, 2], as DINOv3's code moves them in training.

    Args:
      places: [P, 2].
      noise: how far they are shifted at most; the largest factor of each axis; that of both.
      keys: one of each image [B]. (Its code draws once for all images of a GPU.)
    """
    shift, jitter, rescale = noise
    draw = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (5,), minval=-1.0))
    own = draw(keys)[:, None]  # [B, 1, 5]
    factor = jnp.log(jitter) * own[..., 2:4] + jnp.log(rescale) * own[..., 4:]
    return (places[None] + shift * own[..., :2]) * jnp.exp(factor)


class GatedMlpBlock(nn.Module):
    """`Dense_1(silu(gate(x)) * Dense_0(x))` (Shazeer, 2020); with `norm` a LayerNorm inside."""

    mlp_dim: int
    norm: bool
    norm_eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]

        def hidden(mlp, x):
            gate = nn.silu(Dense(self.mlp_dim, dtype=self.dtype, name="gate")(x))
            return gate * Dense(self.mlp_dim, dtype=self.dtype, name="Dense_0")(x)

        x = nn.remat(hidden, policy=matmul.kept)(self, x)  # as in `blocks.MlpBlock`
        if self.norm:
            x = matmul.LayerNorm(self.norm_eps, self.dtype, name="LayerNorm_0")(x)
        return Dense(width, dtype=self.dtype, name="Dense_1")(x)


class Block(vit.Block):
    """A ViT's block whose queries and keys are rotated, and whose MLP may be gated."""

    qkv_bias: str = "qkv"
    gated: bool = False
    mlp_norm: bool = False
    rotate: Callable | None = None

    def attend(self, x, context):
        """What the tokens [B, t, D] get of all [B, T, D]."""
        kind = self.attention, self.dtype, self.norm_eps if self.qk_norm else None
        attention = MultiHeadDotProductAttention(
            self.num_heads, *kind, self.qkv_bias, self.rotate, name=vit.ATTENTION
        )
        return attention(x, context)

    def mlp(self, y):
        """The MLP of tokens [B, t, D]."""
        if not self.gated:
            return super().mlp(y)
        return GatedMlpBlock(self.mlp_dim, self.mlp_norm, self.norm_eps, self.dtype, name=vit.MLP)(y)


class RopeViT(vit.ViT):
    """A `vit.ViT` whose queries and keys are rotated, in place of a position embedding or beside it.

    Attributes:
      rotary: how they are rotated.
      embedded: whether there is a position embedding, too.
      qkv_bias: which of query, key and value have a bias, by their first letters.
      gated: whether MLPs are gated.
      mlp_norm: whether these have a LayerNorm inside.
      pool_heads: number of heads of attention pooling; None: as many as of the blocks.
      position_noise: how positions are moved in training, see `moved`; None: they are not.
      The others are as those of `vit.ViT`.
    """

    gelu: str = "exact"
    norm_eps: float = 1e-5
    registers: int = 4
    block: type = Block
    rotary: Rotary = Rotary()
    embedded: bool = False
    qkv_bias: str = "qv"
    gated: bool = False
    mlp_norm: bool = False
    pool_heads: int | None = None
    position_noise: tuple | None = None

    def placed(self, x):
        """Patches [B, h*w, D] with the position embedding, if there is one."""
        return super().placed(x) if self.embedded else x

    def block_options(self, grid, keys):
        """Attributes of the blocks; the rotation is computed once for all of them."""
        places = self.rotary.places(grid)
        if keys is not None and self.position_noise is not None:
            places = moved(places, self.position_noise, keys)
        before = sum(self.tokens().values())
        rotate = self.rotary.function(places, self.width // self.num_heads, before)
        same = {name: getattr(self, name) for name in ("qkv_bias", "gated", "mlp_norm")}
        return {**super().block_options(grid, keys), **same, "rotate": rotate}

    def map_pooled(self, x):
        """Attention pooling [B, 1, D] over all tokens, with an MLP of four times the width."""
        kind = self.gelu, self.norm_eps, self.dtype
        heads = self.pool_heads or self.num_heads
        return vit.MAPHead(4 * self.width, heads, *kind, name=vit.MAP)(x)


Model = RopeViT
