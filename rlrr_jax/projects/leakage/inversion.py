"""Images made to have a given gradient, and how near they come to the true ones.

After Geiping et al. (NeurIPS 2020, https://github.com/JonasGeiping/invertinggradients): the cosine
distance of gradients and the total variation of the image are minimised by Adam on signs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.ndimage

from rlrr_jax.projects.leakage.gradients import Client, flat, gradient


class Attack(NamedTuple):
    """How an image is searched.

    Attributes:
      steps: number of steps of Adam; the step size falls by ten after 3/8, 5/8 and 7/8 of them.
      lr: first step size, for pixels in [-1, 1].
      variation: weight of the total variation, the mean absolute difference of neighbours.
      restarts: number of random beginnings, of which that with the least loss is kept.
      head: whether the gradient of the head is shared, too.
    """

    steps: int = 400
    lr: float = 0.1
    variation: float = 0.1
    restarts: int = 1
    head: bool = True


def total_variation(image: jax.Array) -> jax.Array:
    """Mean absolute difference of neighbouring pixels of an image [h, w, 3], both ways."""
    return jnp.abs(jnp.diff(image, axis=0)).mean() + jnp.abs(jnp.diff(image, axis=1)).mean()


def objective(client: Client, attack: Attack, shared: Any, image: jax.Array, label: Any) -> jax.Array:
    """1 - the cosine of the image's gradient and the shared one, and the weighted total variation."""
    chosen = lambda tree: flat(tree if attack.head else tree["adapter"])
    ours, theirs = chosen(gradient(client, image[None], label[None])), chosen(shared)
    lengths = jnp.sqrt(jnp.maximum((ours @ ours) * (theirs @ theirs), 1e-24))
    return 1 - ours @ theirs / lengths + attack.variation * total_variation(image)


def invert(
    client: Client, attack: Attack, shared: Any, label: Any, key: jax.Array, shape: tuple
) -> tuple[jax.Array, jax.Array]:
    """An image [h, w, 3] in [-1, 1] whose gradient is like the shared one, and its objective.

    Args:
      client: the `Client`.
      attack: the `Attack`.
      shared: gradient of a single image, see `gradients.gradient`.
      label: its class, which the gradient of the head gives away.
      key: PRNG key of the beginnings.
      shape: shape of the image, (h, w, 3).
    """
    ends = [int(attack.steps * part) for part in (3 / 8, 5 / 8, 7 / 8)]
    tx = optax.adam(optax.piecewise_constant_schedule(attack.lr, dict.fromkeys(ends, 0.1)))
    loss = lambda image: objective(client, attack, shared, image, label)

    def step(_: Any, carry: tuple) -> tuple:
        image, state = carry
        updates, state = tx.update(jnp.sign(jax.grad(loss)(image)), state)
        return jnp.clip(optax.apply_updates(image, updates), -1, 1), state

    def once(key: jax.Array) -> tuple:
        image = jnp.clip(jax.random.normal(key, shape), -1, 1)
        image, _ = jax.lax.fori_loop(0, attack.steps, step, (image, tx.init(image)))
        return image, loss(image)

    images, losses = jax.lax.map(once, jax.random.split(key, attack.restarts))
    return images[jnp.argmin(losses)], losses.min()


# How near -------------------------------------------------------------------------------------


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of images with values in [-1, 1]."""
    error = np.square(np.asarray(a, np.float64) - b).mean()
    return float(10 * np.log10(4 / max(error, 1e-12)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al., 2004) of images [h, w, 3] with values in [-1, 1].

    A Gaussian window of 11 pixels and standard deviation 1.5; the mean over colours, and pixels whose
    window lies in the image.
    """
    blur = lambda x: scipy.ndimage.gaussian_filter(x, 1.5, truncate=10 / 3, axes=(0, 1))[5:-5, 5:-5]
    a, b = (np.asarray(x, np.float64) / 2 for x in (a, b))
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    one, two = 0.01**2, 0.03**2
    upper = (2 * mean_a * mean_b + one) * (2 * both + two)
    return float((upper / ((mean_a**2 + mean_b**2 + one) * (var_a + var_b + two))).mean())


def baselines(true: np.ndarray, others: np.ndarray) -> dict[str, np.ndarray]:
    """What one can guess without a gradient: the mean of other images, and the nearest of them.

    Args:
      true: an image [h, w, 3] in [-1, 1].
      others: images that the attacker has [n, h, w, 3].
    """
    errors = np.square(others - true).mean((1, 2, 3))
    return {"mean image": others.mean(0), "nearest image": others[int(errors.argmin())]}
