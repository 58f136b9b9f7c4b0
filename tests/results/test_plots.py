"""Pictures of runs: names of any length leave room for what is drawn."""

import warnings

import pictures

from rlrr_jax.results import plots

LONG = "lora rank_dropout=0.5 rank_scale=1.0 targets=query+key+value+out+Dense_0+Dense_1 precision=bfloat16"


def test_a_long_name_is_written_in_lines():
    assert plots.wrapped("rlrr init=damped") == "rlrr init=damped"
    assert plots.wrapped(f"{'a' * 35} vit-b-16") == f"{'a' * 35}\nvit-b-16"
    lines = plots.wrapped(LONG).split("\n")
    assert len(lines) == 3 and max(map(len, lines)) <= 40
    assert "".join(x if x.endswith("+") else f"{x} " for x in lines).strip() == LONG


def test_curves_of_a_run_with_a_long_name_fill_their_picture():
    rows = [{"epoch": i, "train_loss": 2.0**-i, "train_acc": i / 9, "test_acc": 0.5} for i in range(9)]
    with pictures.drawn(), warnings.catch_warnings(action="error"), plots.settings():
        picture = plots.curves({f"{LONG} {LONG}": rows, f"{LONG} {LONG} seed 1": rows})
    pictures.look(picture, (1080, 420), colours=1)
