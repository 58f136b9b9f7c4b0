"""Each operator against the dense matrix of its equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.linalg
from float64 import in_float64
from models.test_vit import SMALL
from trees import images, random_tree

from rlrr_jax.models import vit
from rlrr_jax.projects.moppa import block as physics

GRID, WIDTH = (4, 6), 3
RNG = np.random.default_rng(0)
X = RNG.standard_normal((*GRID, WIDTH))
softplus = lambda x: np.log1p(np.exp(x))


def laplacian():
    """The dense matrix [24, 24] of the negative Laplacian with Neumann borders, in this basis."""
    each = []
    for size in GRID:
        c = scipy.fft.dct(np.eye(size), norm="ortho", axis=0)
        each.append(c.T @ np.diag((np.arange(size) * np.pi / size) ** 2) @ c)
    return np.kron(each[0], np.eye(GRID[1])) + np.kron(np.eye(GRID[0]), each[1])


def values(**other):
    draw = lambda: jnp.array(RNG.standard_normal(WIDTH))
    return {"k": draw(), "t": draw(), "c": draw(), "f": draw(), "route": jnp.zeros(3), **other}


def only(path, v, x=X):
    """What a path alone makes of a picture."""
    route = jnp.array([0.0 if name == path else -1e9 for name in physics.PATHS])
    tokens = jnp.asarray(x).reshape(1, -1, WIDTH)
    return np.asarray(physics.before_attention({**v, "route": route}, tokens, GRID)[0])


@pytest.mark.slow
@in_float64
def test_heat():
    v, matrix, flat = values(), laplacian(), X.reshape(-1, WIDTH)
    found = only("heat", v)
    for i in range(WIDTH):
        kt = softplus(float(v["k"][i])) * softplus(float(v["t"][i]))
        np.testing.assert_allclose(
            found[:, i], scipy.linalg.expm(-kt * matrix) @ flat[:, i], atol=1e-10
        )
    np.testing.assert_allclose(found.mean(0), flat.mean(0), atol=1e-12)  # heat is neither made nor lost
    assert (found.var(0) < flat.var(0)).all()


@pytest.mark.slow
@in_float64
def test_wave():
    v, matrix, flat = values(), laplacian(), X.reshape(-1, WIDTH)
    found = only("wave", v)
    root = scipy.linalg.sqrtm(matrix + 1e-15 * np.eye(24)).real
    for i in range(WIDTH):
        ct = float(v["c"][i]) * softplus(float(v["t"][i]))
        np.testing.assert_allclose(found[:, i], scipy.linalg.cosm(ct * root) @ flat[:, i], atol=1e-6)
    # Energy: the square of the speed and c^2 times that of the slope, at this time and at time 0.
    speed = jax.jvp(lambda t: jnp.stack(only_traced(v, t)), (v["t"],), (1 + np.exp(-v["t"]),))[1]
    slope = lambda u: np.einsum("id,ij,jd->d", u, matrix, u) * np.square(v["c"])
    np.testing.assert_allclose(np.square(speed).sum(0) + slope(found), slope(flat), rtol=1e-8)


def only_traced(v, t):
    route = jnp.array([-1e9, 0.0, -1e9])
    tokens = jnp.asarray(X).reshape(1, -1, WIDTH)
    return physics.before_attention({**v, "t": t, "route": route}, tokens, GRID)[0]


@in_float64
def test_poisson_inverts_the_laplacian():
    v, matrix, flat = values(), laplacian(), X.reshape(-1, WIDTH)
    u = only("poisson", v) - flat
    np.testing.assert_allclose(-matrix @ u, np.asarray(v["f"]) * (flat - flat.mean(0)), atol=1e-10)


@in_float64
def test_paths_are_mixed_and_other_tokens_pass():
    v = values(route=jnp.array([0.3, -1.0, 2.0]))
    tokens = jnp.asarray(RNG.standard_normal((2, 2 + 24, WIDTH)))
    out = physics.before_attention(v, tokens, GRID)
    assert (out[:, :2] == tokens[:, :2]).all()
    each = [only(path, v, tokens[1, 2:].reshape(*GRID, WIDTH)) for path in physics.PATHS]
    shares = np.exp([0.3, -1.0, 2.0]) / np.exp([0.3, -1.0, 2.0]).sum()
    np.testing.assert_allclose(out[1, 2:], sum(s * x for s, x in zip(shares, each)), atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [pytest.param(1, marks=pytest.mark.slow), 3])
@in_float64
def test_a_vit_mixes_before_attention(unroll):
    """Against the same blocks with the operators written around their first LayerNorm."""
    model = vit.ViT(**SMALL, block=physics.Block, unroll=unroll, dtype=jnp.float64)
    params = jax.tree.map(jnp.float64, random_tree(vit.ViT(**SMALL), 48))
    draw = lambda *shape: jnp.array(0.3 * RNG.standard_normal(shape))
    extra = {name: draw(3, 32) for name in "ktcf"} | {"route": draw(3, 3)}
    block = params["Transformer"]["encoderblock"]
    tuned = {
        **params,
        "Transformer": {**params["Transformer"], "encoderblock": {**block, "physics": extra}},
    }
    found = jax.jit(model.apply)({"params": tuned}, images())
    now = [0]  # the block that is computed

    def around(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.module.name == "LayerNorm_0" and context.method_name == "__call__":
            own = jax.tree.map(lambda x: x[now[0]], extra)
            return physics.before_attention(own, out, (6, 6))
        return out

    import flax.linen as nn

    x = model.clone(until=3).apply({"params": params}, images())
    assert (found != jax.jit(model.apply)({"params": params}, images())).any() and x.shape[1] == 37
    with nn.intercept_methods(around):
        for i in range(3):
            now[0] = i
            own = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], block)
            one = {**params, "Transformer": {**params["Transformer"], "encoderblock": own}}
            if i == 0:
                tokens = vit.ViT(
                    **{**SMALL, "depth": 1}, block=physics.Block, dtype=jnp.float64, until=1
                ).apply({"params": one}, images())
            else:
                part = vit.ViT(
                    **{**SMALL, "depth": i + 1}, block=physics.Block, dtype=jnp.float64, first=i
                )
                part = part.clone(until=i + 1) if i < 2 else part
                tokens = part.apply({"params": one}, tokens)
    np.testing.assert_allclose(found, tokens, atol=1e-9)
