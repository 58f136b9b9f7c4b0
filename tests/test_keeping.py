"""The best epoch of each trial, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from rlrr_jax import keeping
from rlrr_jax.runtime import mesh as mesh_lib


def test_each_trial_keeps_its_own_and_ends_for_itself():
    """Two trials, of which one has a score that is of no use, and a third that fills the devices."""
    mesh = mesh_lib.make_mesh(jax.devices()[:1])
    trees = lambda epoch: {"w": jnp.array([[epoch], [10.0 + epoch], [10.0 + epoch]])}
    kept = keeping.map_start(mesh)(trees(-1))
    assert not keeping.over(kept)
    scores = [[0.5, None], [0.4, 0.1], [0.3, 0.1], [0.9, 0.3], [0.9, 0.2], [0.9, 0.1]]
    seen = []
    for epoch, of_epoch in enumerate(scores):
        kept = keeping.update(kept, trees(epoch), of_epoch, epoch, 2, mesh)
        seen.append([*np.asarray(kept["epoch"])[:2], *np.asarray(kept["last"])[:2]])
    # The first is over after epoch 2, and its 0.9 comes too late; ties keep the earlier epoch.
    assert seen == [
        [0, -1, -1, -1],
        [0, 1, -1, -1],
        [0, 1, 2, -1],
        [0, 3, 2, -1],
        [0, 3, 2, -1],
        [0, 3, 2, 5],
    ]
    np.testing.assert_allclose(kept["score"], [0.5, 0.3, 0.3], rtol=1e-6)
    np.testing.assert_array_equal(kept["tree"]["w"][:, 0], [0, 13, 13])
    assert keeping.over(kept)
