"""What is minimised: options, what a loss must return, and values that it trains itself."""

import math

import jax
import jax.numpy as jnp
import pytest
from marks import quick
from named import register

from rlrr_jax import losses, methods, models
from rlrr_jax.errors import UserError


def contract(name, given, classes):
    """`losses.check_contract` on a tiny ViT."""
    model = models.build("bundled", classes)
    net = model, methods.get("linear"), models.shapes(model, 32)
    return losses.check_contract(name, given, net, (32, 32))


def test_a_loss_says_what_it_returns():
    assert contract("cross_entropy", {}, 3) == ("acc",)


def test_a_loss_can_train_values_of_its_own(monkeypatch):
    """They are in the trained tree, and get weight decay if they are called kernel."""

    def function(net, batch, parts=4):
        each, values = losses.cross_entropy(net, batch)
        assert net.trained["loss"]["kernel"].shape == (parts, 3)
        return each * jnp.exp(net.trained["loss"]["log"]), values

    def init(key, frozen, classes, **options):
        return {"log": jnp.zeros(()), "kernel": jax.random.normal(key, (options["parts"], classes))}

    register(monkeypatch, "loss", "mine", losses.Loss(function, init))
    assert losses.options("mine") == {"parts": 4}
    assert contract("mine", {"parts": 4}, 3) == ("acc",)
    model, method = models.build("bundled", 3), methods.get("linear")
    frozen = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    trained = losses.start(losses.get("mine", {"parts": 4}), method, jax.random.key(0), frozen)
    assert {*trained} == {"adapter", "head", "loss"} and trained["loss"]["kernel"].shape == (4, 3)
    assert methods.decay(method, trained)["loss"] == {"log": False, "kernel": True}
    assert methods.trainable_count(trained) == 0 and methods.head_count(trained) == 3 * 97 + 13


# Options --------------------------------------------------------------------------------------


def test_options_are_checked_before_any_work(monkeypatch):
    loss = lambda net, batch, lam=1.0, sigma=1.0, every=2: losses.cross_entropy(net, batch)
    register(monkeypatch, "loss", "mine", loss)
    assert losses.check("mine", {"lam": 2}) == {"lam": 2.0, "sigma": 1.0, "every": 2}
    assert losses.fixed(losses.check("mine", {"every": 4})) == {"every": 4}
    for name, given, message in (
        ("mine", {"lamda": 1.0}, "unknown option of loss 'mine' 'lamda': did you mean 'lam'"),
        ("mine", {"lam": -1.0}, "config.loss_kwargs.lam=-1.0 must be a number like 1.0"),
        ("mine", {"sigma": "x"}, "config.loss_kwargs.sigma=x must be a number"),
        ("mine", {"lam": math.nan}, "config.loss_kwargs.lam=nan must be a number like 1.0"),
        ("mine", {"every": 0}, "config.loss_kwargs.every=0 must be at least 1"),
        ("mine", {"every": 1.5}, "config.loss_kwargs.every=1.5 must be a number like 2"),
        ("cross_entropy", {"lam": 1.0}, "unknown option of loss 'cross_entropy' 'lam'"),
    ):
        with pytest.raises(UserError, match=message):
            losses.check(name, given)


def wide(net, batch):
    losses, values = losses_of(net, batch)
    return losses[:, None], values


def losses_of(net, batch):
    return losses.cross_entropy(net, batch)


MISFITS = {
    "two axes": (
        wide,
        r"must return losses of shape \(2,\) for 2 images, not \(2, 1\): return one for",
    ),
    "a mean": (lambda f, b: (losses_of(f, b)[0].mean(), losses_of(f, b)[1]), r"losses .* not \(\)"),
    "a value of the batch": (
        lambda f, b: (losses_of(f, b)[0], {"acc": losses_of(f, b)[0].mean()}),
        r"must return acc of shape \(2,\)",
    ),
    "no accuracy": (lambda f, b: (losses_of(f, b)[0], {}), "must return the value 'acc'"),
    "a value called loss": (
        lambda f, b: (losses_of(f, b)[0], {"acc": losses_of(f, b)[0], "loss": losses_of(f, b)[0]}),
        "and none of name 'loss'",
    ),
}


@pytest.mark.parametrize("what", quick(MISFITS, "a mean", "no accuracy"))
def test_a_loss_that_returns_something_else_is_refused(what, monkeypatch):
    loss, message = MISFITS[what]
    register(monkeypatch, "loss", what, loss)
    with pytest.raises(UserError, match=message):
        contract(what, {}, 2)


def test_a_loss_is_checked_with_the_options_and_classes_of_the_run(monkeypatch):
    def loss(net, batch, k=0):
        logits = net(batch.images, batch.keys)
        top = jax.lax.top_k(logits, k)[0].sum(-1)
        return top, {"acc": top}

    register(monkeypatch, "loss", "top", loss)
    contract("top", losses.check("top", {"k": 5}), 100)
    with pytest.raises(ValueError, match="top_k"):  # a fork's own mistake
        contract("top", {"k": 5}, 2)


def test_options_of_other_kinds_and_signs(monkeypatch):
    def loss(net, batch, margin=0.0, weights=(1.0, 2.0), name=None):
        return losses.cross_entropy(net, batch)

    register(monkeypatch, "loss", "margin", loss)
    given = {"margin": -0.5, "weights": (3, 1)}
    assert losses.check("margin", given) == {"margin": -0.5, "weights": (3, 1), "name": None}
