"""Makes the bundled files again from nothing: `python tools/make_bundled.py [folder]`.

`vit.npz`     a ViT pre-trained here on Scribble-100 (some ten minutes on two CPU cores)
`hearts.npz`  rendered: which of 16 directions does a heart point to
`digits.npz`  real handwritten digits, from scikit-learn (extra `test`)
"""

import argparse
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scribble
from tqdm import tqdm

from rlrr_jax import models
from rlrr_jax.weights import reader

STEPS, CHUNK, BATCH = 4750, 25, 128


def _mask_patches(masks, p):
    """[B, H, W] -> [B, patches, p * p]."""
    b, size, _ = masks.shape
    n = size // p
    return masks.reshape(b, n, p, n, p).swapaxes(2, 3).reshape(b, n * n, p * p)


def _upstream(model, params, mask_head, images):
    """Class logits [B, 100] and object-mask logits [B, patches, p * p]."""
    logits, state = model.apply({"params": params}, images, mutable=["intermediates"])
    (tokens,) = state["intermediates"]["encoded"]
    return logits, tokens[:, 1:] @ mask_head["kernel"] + mask_head["bias"]


def pretrain(steps=STEPS, seed=0):
    """Trains the bundled ViT on Scribble-100; returns its tree and its held-out accuracy at h = 1."""
    model = models.build("bundled", scribble.CLASSES)
    key = jax.random.key(seed)
    params = model.init(key, jnp.zeros((1, scribble.SIZE, scribble.SIZE, 3)))["params"]
    pixels = models.BUNDLED["patch_size"] ** 2
    mask_head = {"kernel": jnp.zeros((models.BUNDLED["width"], pixels)), "bias": jnp.zeros(pixels)}
    flat = steps * 3 // 10
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0, 1e-3, 200),
            optax.constant_schedule(1e-3),
            optax.cosine_decay_schedule(1e-3, steps - flat),
        ],
        [200, flat],
    )
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule, b2=0.98, weight_decay=0.03, mask=lambda t: jax.tree.map(lambda x: x.ndim > 1, t)
        ),
    )

    def loss_fn(trainable, images, labels, masks):
        logits, mask_logits = _upstream(model, *trainable, images)
        target = optax.smooth_labels(jax.nn.one_hot(labels, scribble.CLASSES), 0.05)
        loss = optax.softmax_cross_entropy(logits, target).mean()
        target = _mask_patches(masks, models.BUNDLED["patch_size"])
        loss += optax.sigmoid_binary_cross_entropy(mask_logits, target).mean()
        return loss, (logits.argmax(-1) == labels).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def chunk(state, start, h):
        def step(state, i):
            trainable, opt_state = state
            images, labels, masks = scribble.batch(jax.random.fold_in(key, i), BATCH, h)
            (loss, acc), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                trainable, images, labels, masks
            )
            updates, opt_state = tx.update(grads, opt_state, trainable)
            return (optax.apply_updates(trainable, updates), opt_state), (loss, acc)

        state, (loss, acc) = jax.lax.scan(step, state, start + jnp.arange(CHUNK))
        return state, loss.mean(), acc.mean()

    trainable = (params, mask_head)
    state, h = (trainable, tx.init(trainable)), 0.0
    bar = tqdm(total=steps, unit="step", desc="pre-training")
    for start in range(0, steps, CHUNK):
        state, loss, acc = chunk(state, start, h)
        bar.update(CHUNK)
        bar.set_postfix(loss=f"{loss:.3f}", acc=f"{acc:.3f}", h=f"{h:.2f}")
        if acc > 0.5 or start > 0.6 * steps:  # harder once it copes, or once time runs out
            h = min(h + 0.02, 1.0)
    bar.close()

    @jax.jit
    def accuracy(params, key):
        images, labels, _ = scribble.batch(key, 500, 1.0)
        return (model.apply({"params": params}, images).argmax(-1) == labels).mean()

    params = state[0][0]
    held_out = jax.random.split(jax.random.key(seed + 1), 10)
    return jax.device_get(params), float(np.mean([accuracy(params, k) for k in held_out]))


def heart(scale, direction, center):
    """A filled heart [32, 32] uint8, drawn at 64 x 64 without antialiasing and averaged by 2 x 2.

    Args:
      scale: half its width, in pixels of 64.
      direction: in fortieths of a full turn.
      center: (x, y) in pixels of 64.
    """
    t = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    y = (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    angle = 2 * np.pi * direction / 40
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    a = np.stack([np.sin(t) ** 3, y], 1) @ turn * scale + center
    b = np.roll(a, -1, 0)
    pixels = np.stack(np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5), -1).reshape(-1, 1, 2)
    crosses = (a[:, 1] > pixels[..., 1]) != (b[:, 1] > pixels[..., 1])
    dy = np.where(a[:, 1] == b[:, 1], 1, b[:, 1] - a[:, 1])
    at = a[:, 0] + (b[:, 0] - a[:, 0]) * (pixels[..., 1] - a[:, 1]) / dy
    inside = (crosses & (pixels[..., 0] < at)).sum(1) % 2  # even-odd rule
    return np.round(inside.reshape(32, 2, 32, 2).mean((1, 3)) * 255).astype(np.uint8)


def hearts(number, rng):
    """Hearts of 6 sizes, 40 directions and 32 x 32 places: images [N, 32, 32] uint8, labels [N].

    Like the orientation task of dSprites with only the heart, 1.4 times as large; a label is one of
    16 sectors of the full turn.
    """
    images, labels = [], []
    for _ in range(number):
        scale = 1.4 * 11 * rng.choice(np.linspace(0.5, 1, 6))
        direction = rng.integers(40)
        images.append(heart(scale, direction, 16.5 + rng.integers(0, 32, 2)))
        labels.append(direction * 2 // 5)
    return np.stack(images), np.array(labels)


def digits(rng):
    """scikit-learn's 1,797 digits of 8 x 8 in a frame of one pixel: images [N, 10, 10] uint8, [N]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.uint8(np.round(np.pad(data.images, ((0, 0), (1, 1), (1, 1))) * 255 / 16))
    order = rng.permutation(len(images))
    return images[order], data.target[order]


def save_task(path, images, labels):
    """Writes a task: the first 800 are train800, the next 200 val200, all others test."""
    splits = {}
    for name, part in dict(train800=np.s_[:800], val200=np.s_[800:1000], test=np.s_[1000:]).items():
        splits[f"{name}/images"] = images[part]
        splits[f"{name}/labels"] = labels[part].astype(np.uint8)
    np.savez_compressed(path, **splits)


def main():
    """Makes all three files, or those named by `--only`, in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default=str(pathlib.Path(__file__).parent))
    parser.add_argument("--only", nargs="+", choices=["vit", "hearts", "digits"])
    args = parser.parse_args()
    folder, only = pathlib.Path(args.folder), args.only or ["hearts", "digits", "vit"]
    folder.mkdir(parents=True, exist_ok=True)
    if "hearts" in only:
        save_task(folder / "hearts.npz", *hearts(3000, np.random.default_rng(0)))
    if "digits" in only:
        save_task(folder / "digits.npz", *digits(np.random.default_rng(0)))
    if "vit" in only:
        params, accuracy = pretrain()
        print(f"Scribble-100 accuracy at h = 1 on 5,000 held-out images: {100 * accuracy:.1f} %")
        reader.save(folder / "vit.npz", params, dtype=np.float16)
    for name in only:
        print(f"{folder / name}.npz: {(folder / f'{name}.npz').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
