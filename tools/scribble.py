"""Scribble-100: an endless upstream task for the bundled ViT, rendered on the fly in JAX.

100 classes, each one fixed drawing of 18 line segments: 30 sharp polygons and stars, 20 smooth
blobs, 50 glyphs of two or three strokes. An image shows one of them deformed, turned, coloured and
textured; the difficulty `h` in [0, 1] scales all of that.
"""

import jax
import jax.numpy as jnp
import numpy as np

CLOSED = 50  # classes below this are closed shapes, filled or outlined; the others are glyphs
CLASSES = 100
SEGMENTS = 18
SIZE = 32


def _closed_line(corners):
    """Splits the closed poly-line through `corners` [N, 2] into SEGMENTS pieces: points [S + 1, 2]."""
    n = len(corners)
    t = np.linspace(0, n, SEGMENTS + 1)
    t[1:-1][np.argsort(np.abs(t[1:-1] - np.round(t[1:-1])))[: n - 1]] = np.arange(1, n)
    t = np.sort(t)
    ring = np.concatenate([corners, corners[:1]])
    low = np.minimum(t.astype(int), n - 1)
    return ring[low] + (t - low)[:, None] * (ring[low + 1] - ring[low])


def shapes(seed=0):
    """The 100 drawings as segments [100, 18, 2 ends, 2 coordinates] in [-1, 1]."""
    rng = np.random.default_rng(seed)
    drawings = []
    for i in range(30):  # polygons, every other one a star
        n = int(rng.integers(3, 9))
        angle = 2 * np.pi * (np.arange(n) + rng.uniform(-0.3, 0.3, n)) / n
        radius = rng.uniform(0.35, 1, n)
        if i % 2:
            angle = np.pi * (np.arange(2 * n) + rng.uniform(-0.2, 0.2, 2 * n)) / n
            radius = np.stack([rng.uniform(0.8, 1, n), rng.uniform(0.3, 0.55, n)], 1).ravel()
        points = _closed_line(np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None])
        drawings.append(np.stack([points[:-1], points[1:]], 1))
    for _ in range(20):  # blobs
        angle = np.linspace(0, 2 * np.pi, SEGMENTS + 1)
        radius = 1.0
        for k in range(1, 5):
            radius = radius + rng.normal(0, 0.35 / k**0.5) * np.cos(k * angle + rng.uniform(0, 7))
        points = np.stack([np.cos(angle), np.sin(angle)], 1) * np.maximum(radius, 0.15)[:, None]
        drawings.append(np.stack([points[:-1], points[1:]], 1))
    for i in range(50):  # glyphs: quadratic Bezier strokes between points of a 3 x 3 grid
        strokes = 2 + i % 2
        pieces = SEGMENTS // strokes
        t = np.linspace(0, 1, pieces + 1)[:, None]
        segments = []
        for _ in range(strokes):
            start, end = rng.choice(9, 2, replace=False)
            a, c = (np.array([k % 3 - 1.0, k // 3 - 1.0]) for k in (start, end))
            b = (a + c) / 2 + rng.normal(0, 0.6, 2)
            points = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
            segments.append(np.stack([points[:-1], points[1:]], 1))
        drawings.append(np.concatenate(segments))
    out = np.stack(drawings)
    low, high = out.min((1, 2), keepdims=True), out.max((1, 2), keepdims=True)
    return ((out - (low + high) / 2) * 2 / (high - low).max(-1, keepdims=True)).astype(np.float32)


def _distance(segments, pixels):
    """Distances of pixels [P, 2] to the nearest of the segments [S, 2, 2], and which are inside."""
    a, b = segments[:, 0], segments[:, 1]  # [S, 2]
    ab = b - a
    ap = pixels[:, None] - a  # [P, S, 2]
    t = jnp.clip((ap * ab).sum(-1) / ((ab * ab).sum(-1) + 1e-9), 0, 1)
    gap = ap - t[..., None] * ab
    distance = jnp.sqrt((gap * gap).sum(-1).min(1) + 1e-12)
    crosses = (a[:, 1] > pixels[:, None, 1]) != (b[:, 1] > pixels[:, None, 1])
    slope = ab[:, 0] / jnp.where(ab[:, 1] == 0, 1e-9, ab[:, 1])
    left = pixels[:, None, 0] < a[:, 0] + slope * (pixels[:, None, 1] - a[:, 1])
    return distance, (crosses & left).sum(1) % 2 == 1


def _colors(key, h):
    """Foreground and background colour [2, 3] in [0, 1], with a luminance gap."""
    k = jax.random.split(key, 4)
    color = jax.random.uniform(k[0], (2, 3))
    color = jnp.where(jax.random.uniform(k[1]) < 0.3, color.mean(1, keepdims=True), color)
    gap = color[0].mean() - color[1].mean()
    push = jnp.where(gap < 0, -1.0, 1.0) * jnp.maximum(0.35 - jnp.abs(gap), 0) / 2
    color = jnp.clip(color + jnp.array([[1.0], [-1.0]]) * push, 0, 1)
    plain = jnp.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    color = plain + h * (color - plain)
    bright = plain * jax.random.uniform(k[2], minval=0.7)
    return jnp.where(jax.random.uniform(k[3]) < 0.15, bright, color)


def render(key, segments, closed, h):
    """One image [32, 32, 3] in [-1, 1] and its object mask [32, 32] in [0, 1].

    Args:
      segments: the drawing, [18, 2, 2] in [-1, 1].
      closed: whether it is a closed shape; glyphs are only turned a little.
      h: difficulty in [0, 1].
    """
    k = iter(jax.random.split(key, 24))
    uniform = lambda low, high, shape=(): jax.random.uniform(next(k), shape, minval=low, maxval=high)

    # Geometry.
    wave = uniform(-3, 3, (2, 2))
    warp = 0.06 * 2 * h * jax.random.normal(next(k), (2,))
    x = segments + warp * jnp.sin(segments @ wave + uniform(0, 6.3, (2,)))
    angle = h * uniform(-1, 1) * jnp.where(closed, jnp.pi, 0.6)
    aspect, shear = h * uniform(-0.2, 0.2), h * uniform(-0.2, 0.2)
    turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    x = x @ (jnp.array([[jnp.exp(aspect), shear], [0.0, jnp.exp(-aspect)]]) @ turn)
    half = 0.38 + h * (uniform(0.24, 0.46) - 0.38)
    x = x * half / jnp.maximum(jnp.abs(x).max(), 1e-3)
    center = 0.5 + h * uniform(-1, 1, (2,)) * (0.5 - half)
    x = x + center

    # Coverage, antialiased over one pixel.
    axis = (jnp.arange(SIZE) + 0.5) / SIZE
    pixels = jnp.stack(jnp.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
    distance, inside = _distance(x, pixels)
    filled = jnp.clip(0.5 - jnp.where(inside, -distance, distance) * SIZE, 0, 1)
    stroke = jnp.clip(0.5 + uniform(0.7, 1.5) - distance * SIZE, 0, 1)
    outlined = jnp.logical_or(~closed, uniform(0, 1) < 0.2)
    mask = jnp.where(outlined, stroke, filled)

    # Colour, texture, distractors, noise.
    color_key = next(k)
    fg, bg = _colors(color_key, h)
    plain = (bg.max() == 0) & (h > 0)
    texture = jnp.sin(pixels @ uniform(-30, 30, (2, 2)) + uniform(0, 6.3, (2,)))  # [P, 2]
    texture = texture * h * jnp.where(plain, 0, uniform(0, 0.12, (2,)))
    ends = uniform(0, 1, (2, 1, 2, 2))
    count = jnp.floor(h * uniform(0, 3))
    image = bg + texture[:, :1]
    for i in range(2):
        line = jnp.clip(0.9 - _distance(ends[i], pixels)[0] * SIZE, 0, 1)[:, None]
        line = line * (i < count) * ~plain
        image = image + line * (uniform(0, 1, (3,)) - image)
    image = image + mask[:, None] * (fg + texture[:, 1:] - image)
    noise = jnp.where(plain, 0, uniform(0, 0.08) * h)
    image = image + noise * uniform(-1, 1, image.shape)
    image = jnp.clip(image, 0, 1).reshape(SIZE, SIZE, 3)
    return 2 * image - 1, mask.reshape(SIZE, SIZE)


def batch(key, size, h):
    """A fresh batch: images [B, 32, 32, 3] in [-1, 1], labels [B] and masks [B, 32, 32]."""
    label_key, key = jax.random.split(key)
    labels = jax.random.randint(label_key, (size,), 0, CLASSES)
    segments = jnp.asarray(shapes())[labels]
    images, masks = jax.vmap(render, (0, 0, 0, None))(
        jax.random.split(key, size), segments, labels < CLOSED, h
    )
    return images, labels, masks
