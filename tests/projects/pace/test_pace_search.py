"""The options of PACE in a search, and what is refused of them."""

import pytest
from test_compare import changed, run
from test_config import resolve

from rlrr_jax import config as config_lib
from rlrr_jax import files, report
from rlrr_jax.configs import compare
from rlrr_jax.errors import UserError
from rlrr_jax.runs import identity, search


def test_lam_and_sigma_are_chosen_with_the_rest():
    config = compare.get_config("kitti,method=lora")
    config.runs = ({"loss": ("cross_entropy", "pace")}, {"loss": "pace", "loss_kwargs.lam": 0.1})
    config.grid.lr, config.grid.lam, config.grid.sigma = (1.0,), (0.1, 1.0), (0.5, 1.0, 2.0)
    plain, both, given = (r for r in config_lib.resolve(config) if r.seed == 0)
    assert len(search.settings(plain)) == 1 and plain.loss_kwargs.to_dict() == {}
    trials = search.settings(both)
    values = [(t.loss_kwargs.lam, t.loss_kwargs.sigma) for t in trials]
    assert values == [(a, b) for a in (0.1, 1.0) for b in (0.5, 1.0, 2.0)]
    assert trials[1].trial.endswith("lam0.1-sigma1")
    assert len({identity.together(t) for t in trials}) == 1  # trained at once
    assert len({identity.fingerprint([t]) for t in trials}) == 6
    assert [t.loss_kwargs.sigma for t in search.settings(given)] == [0.5, 1.0, 2.0]
    config.grid.lam = (-1.0,)
    with pytest.raises(ValueError, match="config.grid.lam=-1.0 must be finite and not negative"):
        config_lib.resolve(config)


@pytest.mark.slow
def test_the_chosen_lam_is_trained_and_what_was_tried_is_shown(tmp_path):
    config = changed(compare.get_config("digits,method=linear"), loss="pace", epochs=1, seeds=(0,))
    config.grid.lr, config.grid.lam = (1.0,), (0.0, 50.0)
    (row,) = run(config, tmp_path)
    tried = [files.read_json(p) for p in tmp_path.glob("*/*/search/seed0-*/result.json")]
    best = max(tried, key=lambda t: t["val_acc"])
    assert row["loss_kwargs"] == best["loss_kwargs"] and row["loss_kwargs"]["sigma"] == 1.0
    assert row["val_tried"] == sorted(t["val_acc"] for t in tried)
    low, high = (f"{100 * x:.2f}" for x in row["val_tried"])
    text = report.show([row])
    assert f"{low} to {high} %" in text and "linear loss=pace" in text
    assert run(config, tmp_path) == [row]  # finished, and known again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"variant": "resnet18"}, "loss": "pace"}, "pace puts noise on changed Dense layers"),
        ({"loss": "pcae"}, "unknown loss 'pcae': did you mean 'pace'"),
        ({"loss_kwargs": {"lam": 2.0}}, "unknown option of loss 'cross_entropy' 'lam'"),
        (
            {"protocol": "vtab", "grid": {"lam": (0.1, 1.0)}},
            "config.grid.lam is of no use for config.loss=cross_entropy: leave it out",
        ),
        (
            {
                "protocol": "vtab",
                "loss": "pace",
                "loss_kwargs": {"lam": 1.0},
                "grid": {"lam": (0.1, 1.0)},
            },
            "config.loss_kwargs.lam and config.grid.lam are both set: leave one out",
        ),
    ],
    ids=str,
)
def test_impossible_values(changes, message):
    with pytest.raises(UserError, match=message):
        resolve("cifar", **changes)
