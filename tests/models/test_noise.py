"""The masks: JAX's own cipher, the right rate, no pattern."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from marks import quick

from rlrr_jax.models import noise


def test_cipher_is_that_of_jax():
    rng = np.random.default_rng(0)
    key, counter = (rng.integers(0, 2**32, shape, np.uint32) for shape in (2, (2, 1000)))
    ours = noise.threefry2x32(key, counter)
    theirs = threefry_2x32(jnp.asarray(key), jnp.asarray(counter).ravel())
    np.testing.assert_array_equal(np.concatenate(ours), theirs)


def test_masks_stay_what_they_are():
    """Their bits as recorded before they were packed: a run of then goes on with the same noise."""
    bits = lambda x: np.packbits(np.asarray(x)).tobytes().hex()
    keep = jax.jit(noise.keep, static_argnums=2)
    masks = jax.jit(noise.drop_path_masks, static_argnums=(2, 3, 4))
    assert bits(keep(jax.random.key(3), jnp.float32(0.3), (3, 10))) == "d6cdddbc"
    keys, rates = jax.random.split(jax.random.key(5), 2), jnp.array([0.2, 0.6])
    packed = masks(keys, rates, (3, 10), "element", 4)
    assert packed.dtype == jnp.uint8 and packed.shape == (2, 2, 2, 3, 3)
    recorded = "ff9f2cb6d7bdfbd5ff7fd3fdf36f7b1cc0a96ea63e9f261d033546082908"
    assert bits(noise.unpacked(packed, 10)) == recorded
    assert bits(masks(keys, rates, (3, 10), "sample", 4)) == "d4"


@pytest.mark.parametrize("rate", quick([0.0, 1e-4, 0.1, 0.5, 0.999], 0.0, 0.1))
def test_rate_of_drops(rate):
    number = 2_000_000
    kept = noise.keep(jax.random.key(3), jnp.float32(rate), (2000, 1000))
    error = np.sqrt(rate * (1 - rate) / number)
    assert abs(1 - kept.mean(dtype=float) - rate) <= 4 * error + 2**-17
    assert rate > 0 or kept.all()


def test_no_pattern_within_a_mask_or_between_masks():
    """Correlations of neighbours, of the four values of a block, of rows, keys and epochs."""
    rows, columns = 512, 768
    draw = lambda i: noise.keep(
        jax.random.fold_in(jax.random.key(0), i), jnp.float32(0.5), (rows, columns)
    )
    a, b = (np.asarray(draw(i)) * 2.0 - 1 for i in (0, 1))
    pairs = [(a, b), (a[1:], a[:-1]), (a[:, 1:], a[:, :-1])]
    quarters = np.split(a, 4, 1)
    pairs += [(quarters[i], quarters[j]) for i in range(4) for j in range(i)]
    for x, y in pairs:
        assert abs((x * y).mean()) < 5 / np.sqrt(x.size)
    assert np.abs(a.mean(0)).max() < 5.5 / np.sqrt(rows)
    assert np.abs(a.mean(1)).max() < 5.5 / np.sqrt(columns)


@pytest.mark.parametrize("shape", quick([(1, 1), (5, 6), (3, 7), (2, 8)], (1, 1), (3, 7)))
def test_any_shape(shape):
    kept = noise.keep(jax.random.key(0), jnp.float32(0.5), shape)
    assert kept.shape == shape and kept.dtype == bool
