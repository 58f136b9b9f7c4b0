"""The analysis against a direct SVD, and where the answer is known."""

import json
import re
import sys

import jax
import numpy as np
import pictures
import pytest
from PIL import Image
from squeeze import squeeze

from rlrr_jax import adapters
from rlrr_jax.errors import UserError
from rlrr_jax.methods import base
from rlrr_jax.projects.analysis import __main__ as analyze


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (20, 20)])
def test_numbers_equal_those_of_a_direct_svd(shape, rng):
    w = rng.standard_normal(shape).astype(np.float32)
    tuned = (
        w * (1 + 0.1 * np.outer(rng.standard_normal(shape[0]), rng.standard_normal(shape[1])))
    ).astype("f4")
    found = analyze.compare(w, tuned, 3)
    (u, s, vt), (u2, s2, vt2) = (np.linalg.svd(np.float64(x), full_matrices=False) for x in (w, tuned))
    change = np.linalg.svd(np.float64(tuned) - w, compute_uv=False)
    p = change / change.sum()
    angles = lambda a, b: np.degrees(np.arccos(np.clip(np.linalg.svd(a.T @ b)[1], -1, 1))).mean()
    np.testing.assert_allclose(found["values"], s, rtol=1e-5)
    np.testing.assert_allclose(found["tuned_values"], s2, rtol=1e-5)
    wanted = {
        "relative_change": np.linalg.norm(change) / np.linalg.norm(s),
        "effective_rank": np.exp(-(p * np.log(p)).sum()),
        "left_turn": angles(u[:, :3], u2[:, :3]),
        "right_turn": angles(vt[:3].T, vt2[:3].T),
        "spectrum_change": np.linalg.norm(s2 - s) / np.linalg.norm(s),
    }
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key


def test_where_the_answer_is_known(rng):
    q = lambda n: np.linalg.qr(rng.standard_normal((n, n)))[0]
    u, v, s = q(10), q(10), np.arange(10.0, 0, -1)
    w = u @ np.diag(s) @ v.T
    turned = analyze.compare(w, u @ np.diag(s) @ q(10).T, 3)  # only right vectors move
    assert turned["left_turn"] < 1e-4 < 20 < turned["right_turn"] and turned["spectrum_change"] < 1e-6
    angle = np.radians(30)
    turn = np.eye(10)
    turn[2:4, 2:4] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turned = analyze.compare(w, u @ turn @ np.diag(s) @ v.T, 3)  # one of three by 30 degrees
    assert turned["left_turn"] == pytest.approx(10, abs=1e-5) and turned["right_turn"] < 1e-4
    doubled = analyze.compare(w, 2 * w, 3)
    assert doubled["spectrum_change"] == pytest.approx(1) and doubled[
        "relative_change"
    ] == pytest.approx(1)
    assert doubled["left_turn"] < 1e-4 and doubled["right_turn"] < 1e-4
    for rank in (1, 4):
        flat = u[:, :rank] @ v[:, :rank].T  # equal singular values
        assert analyze.compare(w, w + flat)["effective_rank"] == pytest.approx(rank, rel=1e-6)


@pytest.mark.slow
def test_rlrr_with_zero_scales_changes_exactly_nothing(tuned_runs):
    adapter = adapters.read(tuned_runs / "digits/rlrr/seed0/adapter.safetensors")
    zero = adapter._replace(
        trainable=jax.tree_util.tree_map_with_path(
            lambda path, x: 0 * x if path[-1].key == "scale_in" else x, adapter.trainable
        )
    )
    numbers = analyze.analyze(zero, adapters.backbone(adapter).frozen)
    for row in numbers["kernels"]:
        assert row["values"] == row["tuned_values"] and max(row["values"]) > 0
        for key in ("relative_change", "effective_rank", "left_turn", "right_turn", "spectrum_change"):
            assert row[key] == 0, (row["kernel"], key)
    changed = analyze.analyze(adapter, adapters.backbone(adapter).frozen)["kernels"]
    assert min(row["relative_change"] for row in changed) > 0.01


@pytest.fixture(scope="module")
def analysis(tuned_runs, tmp_path_factory):
    """What the command writes for the runs on digits, and what it says."""
    out = tmp_path_factory.mktemp("analysis")
    argv, sys.argv = sys.argv, ["analyze", str(tuned_runs / "digits"), "--out", str(out)]
    with pictures.drawn():
        analyze.main()
    sys.argv = argv
    return out, json.loads((out / "analysis.json").read_text())


@pytest.mark.slow
def test_methods_show_what_they_are(analysis):
    """LoRA's change has the rank of its factors and only in its targets; the others' has far more."""
    _, found = analysis
    assert list(found) == ["digits lora", "digits rlrr", "digits ssf"]
    mean = lambda label, key, names=tuple(base.DENSE): np.mean(
        [row[key] for row in found[label]["kernels"] if row["kernel"] in names]
    )
    lora = found["digits lora"]["kernels"]
    changed = {row["kernel"] for row in lora if row["relative_change"] > 0}
    assert 0 < len(changed) < 6 and max(row["effective_rank"] for row in lora) <= 8 + 1e-6
    assert mean("digits rlrr", "effective_rank") > 30 and mean("digits ssf", "effective_rank") > 30
    assert mean("digits rlrr", "left_turn") > 1 and mean("digits rlrr", "right_turn") > 1
    names = {row["name"].rsplit("/", 1)[-1] for row in found["digits rlrr"]["trained"]}
    assert names == {"scale", "scale_in", "scale_out", "shift"}
    assert {row["block"] for row in found["digits ssf"]["trained"]} == {None, 1, 2}


def test_the_page_and_its_figures_are_whole(analysis):
    folder, _ = analysis
    text = (folder / "analysis.md").read_text()
    assert "| digits rlrr | 12 of 12 |" in squeeze(text) and "spans of the 8 leading singular" in text
    names = re.findall(r"\((\w+\.png)\)", text)
    assert names == ["change.png", "rank.png", "turn.png", "spectra.png", "scales.png"]
    for name in names:
        pixels = np.asarray(Image.open(folder / name).convert("L"))
        assert min(pixels.shape) > 300 and pixels.std() > 10, name


def test_a_kernel_of_the_run_against_numpy(analysis, tuned_runs):
    _, found = analysis
    adapter = adapters.read(tuned_runs / "digits/rlrr/seed0/adapter.safetensors")
    tuned, frozen = adapters.load(adapter).params, adapters.backbone(adapter).frozen
    before, after = (np.float64(analyze.kernels(t)["Dense_0", 1]) for t in (frozen, tuned))
    (row,) = (r for r in found["digits rlrr"]["kernels"] if (r["kernel"], r["block"]) == ("Dense_0", 2))
    np.testing.assert_allclose(row["values"], np.linalg.svd(before, compute_uv=False), rtol=2e-5)
    np.testing.assert_allclose(row["tuned_values"], np.linalg.svd(after, compute_uv=False), rtol=2e-5)
    assert row["relative_change"] == pytest.approx(
        np.linalg.norm(after - before) / np.linalg.norm(before)
    )


def test_runs_are_told_apart_and_other_seeds_named(tuned_runs, tmp_path, capsys):
    adapter = adapters.read(tuned_runs / "digits/rlrr/seed0/adapter.safetensors")
    for name, changes in {"seed1": {"seed": 1}, "seed2": {"lr": 0.5}}.items():
        card = {**adapter.card, "config": {**adapter.card["config"], **changes}}
        (tmp_path / name).mkdir()
        adapters.write(tmp_path / name / "adapter.safetensors", adapter._replace(card=card))
        (tmp_path / name / "result.json").write_text("{}")
    found = analyze.find([tuned_runs / "digits/rlrr", tmp_path])
    assert list(found) == ["digits rlrr", f"digits rlrr ({tmp_path}/seed2/adapter.safetensors)"]
    assert capsys.readouterr().out == (
        f"left out: {tmp_path}/seed1/adapter.safetensors (another seed of a run that is shown)\n"
    )
    files = [tmp_path / name / "adapter.safetensors" for name in ("seed1", "seed2")]
    assert len(analyze.find(files)) == 2


def test_another_backbone_is_refused_before_any_work(tuned_runs, tmp_path, monkeypatch):
    good = tuned_runs / "digits/rlrr/seed0/adapter.safetensors"
    adapter = adapters.read(good)
    other = adapter._replace(card={**adapter.card, "backbone_sha256": "0" * 64})
    adapters.write(tmp_path / "other.safetensors", other)
    monkeypatch.setattr(analyze, "analyze", None)
    monkeypatch.setattr(sys, "argv", ["analyze", str(good), str(tmp_path / "other.safetensors")])
    with pytest.raises(UserError, match="other.safetensors.* has another backbone than the first"):
        analyze.main()


def test_nothing_to_analyse_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["analyze", str(tmp_path)])
    with pytest.raises(UserError, match="there is no finished run in "):
        analyze.main()


def test_a_remote_workdir_is_said(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["analysis", "gs://bucket/run"])
    with pytest.raises(UserError, match="gs://bucket/run is not on this machine"):
        analyze.main()
