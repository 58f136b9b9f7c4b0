"""Our numbers against those recorded from the authors' PyTorch code, float32."""

import json

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from golden import DATA, load
from trees import started

from rlrr_jax import methods, optim
from rlrr_jax.weights import reader

RLRR = methods.get("rlrr")


@pytest.fixture(scope="module", params=["open_a", "open_b", "swin_open"])
def case(request, tmp_path_factory):
    golden = load(request.param, tmp_path_factory.mktemp("golden"))
    size = golden.image_size
    frozen = reader.load(golden.weights, model=golden.model, image_size=size, how=golden.how)
    like = started(RLRR, frozen)

    @jax.jit
    def loss_fn(trainable):
        with jax.default_matmul_precision("highest"):
            params = methods.merge(RLRR, frozen, trainable)
            logits = golden.model.apply({"params": params}, golden.images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, golden.labels).mean()
        return loss, logits

    return golden, like, loss_fn


def largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(np.asarray(x) - y).max(), a, b)))


def test_logits_loss_and_gradients(case):
    golden, like, loss_fn = case
    start = golden.tree("init/", like)
    (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(start)
    np.testing.assert_allclose(logits, golden.data["logits"], rtol=0, atol=2e-5)
    assert abs(float(loss) - golden.data["loss"]) < 1e-5
    assert largest_difference(grads, golden.tree("grad/", like)) < 1e-5


def test_ten_steps_of_adamw(case):
    golden, like, loss_fn = case
    trainable = golden.tree("init/", like)
    weight_decay = float(golden.data["weight_decay"])

    @jax.jit
    def step(trainable, opt_state, lr):
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
        tx = optim.build(optim.Optimizer(), RLRR, trainable, lr, weight_decay)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    opt_state = optim.build(optim.Optimizer(), RLRR, trainable, 0.0, 0.0).init(trainable)
    assert len(golden.data["lrs"]) == 10
    for i, lr in enumerate(golden.data["lrs"]):
        trainable, opt_state, loss = step(trainable, opt_state, lr)
        assert abs(float(loss) - golden.data["losses"][i]) < 1e-4
        if i == 0 and golden.under("after_1/"):
            assert_close_but_key_shift(trainable, golden.tree("after_1/", like), 1e-5)
    assert_close_but_key_shift(trainable, golden.tree("after_n/", like), 2e-4)
    logits = loss_fn(trainable)[1]
    np.testing.assert_allclose(logits, golden.data["logits_after_n"], rtol=0, atol=2e-4)


def assert_close_but_key_shift(a, b, atol):
    """The key's shift has no gradient but rounding noise, which Adam turns into steps of lr."""
    a, b = flatten_dict(a, sep="/"), flatten_dict(b, sep="/")
    for name in a:
        if name.endswith("qkv/shift"):  # whose middle third is the key's
            a, b = ({**x, name: np.delete(np.split(x[name], 3, -1), 1, 0)} for x in (a, b))
        if not name.endswith("key/shift"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=atol, err_msg=name)


def test_decay_names(case):
    golden, like, _ = case
    decayed = flatten_dict(methods.decay(RLRR, like), sep="/").items()
    ours = {name.removeprefix("adapter/") for name, yes in decayed if yes}
    assert ours == {golden.our_name(str(name))[0] for name in golden.data["decayed"]}


def test_official_learning_rates():
    recorded = json.loads((DATA / "lr_official.json").read_text())
    ours = optim.learning_rates("official", recorded["lr"], 110)
    np.testing.assert_allclose(ours, recorded["lr_by_epoch"], rtol=1e-9, atol=0)
