"""The bundled files are what their script makes."""

import jax
import make_bundled as make
import numpy as np
import pytest
import scribble

from rlrr_jax.weights import names


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hearts", "digits"])
def test_tasks_are_made_again_bit_for_bit(name, tmp_path):
    rng = np.random.default_rng(0)
    made = make.hearts(3000, rng) if name == "hearts" else make.digits(rng)
    make.save_task(tmp_path / "task.npz", *made)
    with np.load(tmp_path / "task.npz") as new, np.load(names.BUNDLED.parent / f"{name}.npz") as old:
        assert set(new.files) == set(old.files)
        for key in new.files:
            np.testing.assert_array_equal(new[key], old[key])


@pytest.mark.parametrize("direction", [0, 3, 17])
def test_a_quarter_of_the_directions_is_a_quarter_turn(direction):
    first, second = (make.heart(14.3, direction + d, (32, 32)).astype(int) for d in (0, 10))
    assert first.sum() > 10_000
    assert np.abs(first - second).mean() > 5
    assert np.abs(np.rot90(first) - second).mean() < 0.5


@pytest.mark.slow
def test_labels_are_sixteen_sectors():
    _, labels = make.hearts(600, np.random.default_rng(1))
    counts = np.bincount(labels)
    assert len(counts) == 16 and counts.min() > 15  # sectors of two and three directions in forty


@pytest.mark.slow
@jax.numpy_rank_promotion("allow")  # the script is written like NumPy
def test_scribbles_are_keyed_and_in_range():
    render = jax.jit(scribble.batch, static_argnums=1)
    images, labels, masks = render(jax.random.key(0), 64, 1.0)
    assert images.shape == (64, 32, 32, 3) and masks.shape == (64, 32, 32)
    assert -1 <= images.min() < -0.9 and 0.9 < images.max() <= 1
    assert 0 <= masks.min() and masks.max() == 1 and (masks.max((1, 2)) > 0.5).all()
    assert labels.min() >= 0 and labels.max() < 100
    np.testing.assert_array_equal(images, render(jax.random.key(0), 64, 1.0)[0])
    assert (images != render(jax.random.key(1), 64, 1.0)[0]).any()


def test_the_100_drawings_differ():
    drawings = scribble.shapes()
    assert drawings.shape == (100, 18, 2, 2) and np.abs(drawings).max() == 1
    gaps = [np.abs(drawings[i] - drawings[j]).max() for i in range(100) for j in range(i)]
    assert min(gaps) > 0.05


@pytest.mark.slow
def test_pretraining_learns():
    """500 of the 4,750 steps: far above chance at full difficulty is not to be had, at h < 1 it is."""
    with jax.numpy_rank_promotion("allow"):  # as where nothing is asked
        params, accuracy = make.pretrain(steps=500)
    assert accuracy > 0.02  # chance is 0.01, with a deviation of 0.0014 for 5,000 images
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
