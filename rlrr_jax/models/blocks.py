"""What the blocks of several families are made of."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from rlrr_jax.models import matmul
from rlrr_jax.models.matmul import Dense
from rlrr_jax.models.noise import drop_path


def activation(gelu: str) -> Callable:
    """The function of a name: "tanh" and "exact" are forms of GELU, "quick" is CLIP's."""
    if gelu == "quick":
        return lambda x: x * nn.sigmoid(1.702 * x)
    return functools.partial(nn.gelu, approximate=gelu == "tanh")


def added(x: jax.Array, branch: jax.Array, rate: Any, keep: jax.Array | None) -> jax.Array:
    """`x` and a residual branch, parts of which are dropped where `keep` says so; None keeps all."""
    return x + (branch if keep is None else drop_path(branch, rate, keep))


def rematerialised(block: Any, prevent_cse: bool) -> Any:
    """A block in whose training what Dense layers give is kept, attention and the rest made again."""
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return nn.remat(block, policy=policy, prevent_cse=prevent_cse)


def over_depth(block: Any, number: int, unroll: int, remat: bool) -> Any:
    """The module that applies so many of a block in turn, `(x, rates, keep) -> (x, what each returns)`.

    Args:
      block: class of a flax module.
      number: how many; the leading axis of its parameters.
      unroll: how many each step of the scan contains.
      remat: whether training computes again what it can, see `rematerialised`.
    """
    return nn.scan(
        rematerialised(block, unroll > 1) if remat else block,
        variable_axes={True: 0},  # of every collection, also those that somebody's interceptor reads
        split_rngs={"params": True},
        in_axes=(0, 0),
        length=number,
        unroll=min(unroll, number),
    )


class MlpBlock(nn.Module):
    """Dense, GELU, Dense."""

    mlp_dim: int
    gelu: str
    dtype: Any

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]

        def hidden(mlp, x):
            return activation(self.gelu)(Dense(self.mlp_dim, dtype=self.dtype, name="Dense_0")(x))

        # Else the gradient would keep five arrays of this size instead of one.
        x = nn.remat(hidden, policy=matmul.kept)(self, x)
        return Dense(width, dtype=self.dtype, name="Dense_1")(x)
