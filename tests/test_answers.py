"""Own images of each kind of labels, from a list to a page: weights, the best epoch, temperature."""

import csv
import json
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import optimize, special

import rlrr_jax.html as page_lib
from rlrr_jax import adapters, answers, files, losses, metrics, predict, suite
from rlrr_jax import config as config_lib
from rlrr_jax.configs import own as own_config
from rlrr_jax.errors import UserError
from rlrr_jax.methods import knn
from rlrr_jax.recipe import Batch
from rlrr_jax.runtime.stop import Stop, Stopped

NUMBER = 160
CLASSES = ["dark", "green", "red"]


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """Noisy pictures of 32 pixels, and three lists of them: unequal classes, labels, values."""
    root, random = tmp_path_factory.mktemp("lists"), np.random.default_rng(0)
    rows: dict[str, list] = {"classes": [], "labels": [], "values": []}
    for i in range(NUMBER):
        red, green = random.random(2)
        colour = np.array([red, green, 0.5]) * 140
        noise = random.normal(0, 10, (32, 32, 3))
        Image.fromarray(np.uint8(np.clip(colour + noise, 0, 255))).save(root / f"{i}.png")
        several = [name for name, x in (("red", red), ("green", green)) if x > 0.5]
        one = "green" if green > 0.9 else "red" if red > 0.7 else "dark"
        rows["classes"].append(one)
        rows["labels"].append(";".join(several))
        rows["values"].append(f"{100 * red + 7:.3f}")
    heads = {"classes": "label", "labels": "labels", "values": "value"}
    for name, cells in rows.items():
        with (root / f"{name}.csv").open("w", newline="") as f:
            csv.writer(f).writerows(
                [("path", heads[name])] + [(f"{i}.png", c) for i, c in enumerate(cells)]
            )
    return root


def config_of(path, method="linear", **changes):
    config = own_config.get_config(f"{path},method={method}")
    config.update({"epochs": 20, "lr": 0.05, **changes})
    config.model.variant = "bundled"
    return config


@pytest.fixture(scope="module")
def runs(lists, tmp_path_factory):
    """Kind -> rows by method, and the workdir."""
    workdir, out = tmp_path_factory.mktemp("runs"), {}
    for name in ("classes", "labels", "values"):
        more = {"temperature": "fit", "keep": "best"} if name == "classes" else {}
        rows, _ = suite.run(config_of(lists / f"{name}.csv", "linear+knn", **more), workdir)
        out[name] = {row["method"]: row for row in rows}
    return out, workdir


def tuned(runs, name):
    return runs[1] / name / "linear/seed0"


# Results --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_kind_is_learnt_by_both_methods(runs):
    rows, _ = runs
    for method in ("linear", "knn"):
        assert rows["classes"][method]["test_acc_final"] > rows["classes"][method]["largest_class"]
        assert rows["labels"][method]["test_acc_final"] > 0.8
        assert rows["values"][method]["test_acc_final"] > 0.4
    for name, score in (("classes", "acc"), ("labels", "map"), ("values", "r2")):
        row = rows[name]["linear"]
        assert row["score"] == score and row["metrics"][score] == row["test_acc_final"]
    assert rows["values"]["linear"]["metrics"]["mae"] < 20  # of 7 to 107
    assert {"loss", "ece", "balanced_acc", "macro_f1"} < rows["classes"]["linear"]["metrics"].keys()


@pytest.mark.parametrize("name", ["classes", "labels", "values"])
def test_the_adapter_gives_what_the_row_says(runs, name):
    """Head, temperature and unit of values are in the file: metrics of its answers are the row's."""
    row, answered = runs[0][name]["linear"], page_lib.answer(tuned(runs, name), progress=False)
    assert len(answered.labels) == row["num_test"]
    if name == "values":
        found = metrics.of_values(answered.shares, answered.labels)
    elif name == "labels":
        found = metrics.of_labels(special.logit(answered.shares), answered.labels, answered.thresholds)
    else:
        found = metrics.of_classes(np.log(answered.shares), answered.labels)
    for key, value in found.items():
        assert value == pytest.approx(row["metrics"][key], abs=2e-4), key


def test_the_temperature_is_the_likeliest_and_said(runs):
    row, folder = runs[0]["classes"]["linear"], tuned(runs, "classes")
    adapter = adapters.read(folder / "adapter.safetensors")
    assert adapter.card["answers"] == {"temperature": row["temperature"]}
    images, labels = adapters.images(adapter, "val")
    logits = np.float64(adapters.load(adapter).logits(np.asarray(images[:])))
    loss = lambda heat: -metrics.likelihoods(logits / heat, labels).mean()
    again = optimize.minimize_scalar(loss, bounds=(0.1, 10), method="bounded").x
    assert again == pytest.approx(1, abs=1e-3)  # it is in the head already
    before = -metrics.likelihoods(logits * row["temperature"], labels).mean()
    assert loss(1) < before
    assert row["uncalibrated"].keys() == {"ece", "loss"}


def test_unequal_classes_have_columns_of_their_own(runs, tmp_path):
    _, workdir = runs
    text = (workdir / "results.md").read_text()
    row = runs[0]["classes"]["linear"]
    for name in ("balanced acc", "macro F1", "largest class", "ECE", "temperature", "epoch kept"):
        assert name in text, name
    line = next(x for x in text.splitlines() if "| classes | linear" in re.sub(" +", " ", x))
    for value in ("balanced_acc", "macro_f1", "ece"):
        assert f"{100 * row['metrics'][value]:.2f} %" in line
    assert f"{100 * row['largest_class']:.2f} %" in line and f"{row['temperature']:.2f}" in line
    assert "classes are unequal" in text and " mAP" in text and " R²" in text


# The best epoch -------------------------------------------------------------------------------


def kept_run(lists, workdir, stop=None, **changes):
    config = config_of(lists / "classes.csv", keep="best", checkpoint_seconds=0.0, **changes)
    config.epochs = 12
    (row,), _ = suite.run(config, workdir, stop)
    return row, files.read_rows(workdir / "classes/linear/seed0/metrics.jsonl")


def test_the_best_epoch_is_kept_and_patience_ends_a_run(lists, tmp_path):
    row, history = kept_run(lists, tmp_path / "whole")
    scores = [each["val_acc"] for each in history]
    assert len(history) == row["epochs_trained"] == 12
    assert row["kept_epoch"] == int(np.argmax(scores)) and row["val_acc"] == max(scores)
    assert row["train_loss"] == history[row["kept_epoch"]]["train_loss"]
    patient, short = kept_run(lists, tmp_path / "patient", patience=2)
    best = int(np.argmax(scores[: patient["epochs_trained"]]))
    assert patient["kept_epoch"] == best and patient["epochs_trained"] == min(best + 3, 12) < 12
    assert [x["val_acc"] for x in short] == scores[: len(short)]
    folder = tmp_path / "patient/classes/linear/seed0"
    adapter = adapters.read(folder / "adapter.safetensors")
    images, labels = adapters.images(adapter, "val")
    answered = np.asarray(adapters.load(adapter).logits(np.asarray(images[:]))).argmax(-1)
    assert (answered == labels).mean() == max(scores[: len(short)])


def test_a_stopped_run_keeps_the_same_epoch(lists, tmp_path):
    whole, _ = kept_run(lists, tmp_path / "whole")

    class After(Stop):
        """Asks to stop after some epochs."""

        asked = 0

        def __call__(self):
            self.asked += 1
            return self.asked > 14

    with pytest.raises(Stopped):
        kept_run(lists, tmp_path / "parts", After())
    assert not (tmp_path / "parts/classes/linear/seed0/result.json").exists()
    again, _ = kept_run(lists, tmp_path / "parts")
    assert (again["kept_epoch"], again["metrics"]) == (whole["kept_epoch"], whole["metrics"])
    read = lambda name: (tmp_path / name / "classes/linear/seed0/adapter.safetensors").read_bytes()
    assert read("parts") == read("whole")


@pytest.mark.slow
def test_trials_end_each_for_itself(lists, tmp_path):
    """Two that train together keep what each keeps alone; one is over before the other."""
    config = config_of(lists / "classes.csv", patience=2, runs=({"lr": (1e-4, 0.05)},))
    config.lr, config.epochs = None, 12
    together, _ = suite.run(config, tmp_path / "both")
    for row in together:
        alone = config_of(lists / "classes.csv", patience=2)
        alone.lr, alone.epochs = row["lr"], 12
        (other,), _ = suite.run(alone, tmp_path / f"{row['lr']}")
        for key in ("kept_epoch", "epochs_trained", "val_acc", "test_acc_final"):
            assert row[key] == other[key], key
    assert len({row["epochs_trained"] for row in together}) == 2


# Weights of classes ---------------------------------------------------------------------------


class Net:
    """Logits that do not depend on pixels."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, images, keys):
        return self.logits


def batch_of(labels, targets=None):
    labels = jnp.asarray(labels)
    rest = [jnp.ones(len(labels)), None, None, None, None]
    return Batch(None, labels, targets, *rest)


def test_weights_multiply_any_loss():
    random = np.random.default_rng(0)
    logits, labels = jnp.float32(random.normal(size=(6, 3))), np.array([0, 1, 2, 2, 1, 0])
    weights = jnp.array([0.5, 2.0, 0.0])
    plain, _ = losses.cross_entropy(Net(logits), batch_of(labels))
    weighed = losses.get("cross_entropy", {}, weigh=True)
    found, values = weighed(Net(logits), batch_of(labels), class_weights=weights)
    np.testing.assert_allclose(found, plain * weights[labels], rtol=1e-6)
    assert values.keys() == {"acc"}
    targets = jnp.float32(random.dirichlet(np.ones(3), 6))  # of mixed images
    plain, _ = losses.cross_entropy(Net(logits), batch_of(labels, targets))
    found, _ = weighed(Net(logits), batch_of(labels, targets), class_weights=weights)
    np.testing.assert_allclose(found, plain * (targets @ weights), rtol=1e-5)


def test_binary_weighs_the_part_of_labels_that_are_there():
    random = np.random.default_rng(1)
    logits, labels = random.normal(size=(5, 4)), np.float32(random.random((5, 4)) < 0.4)
    weights, shares = np.array([1.0, 3.0, 0.5, 0.0]), special.expit(logits)
    wanted = -(weights * labels * np.log(shares) + (1 - labels) * np.log(1 - shares)).mean(-1)
    weighed = losses.get("binary", {}, weigh=True)
    net = Net(jnp.float32(logits))
    found, values = weighed(net, batch_of(labels), class_weights=jnp.float32(weights))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(values["acc"], ((shares > 0.5) == (labels > 0)).mean(-1))
    hot, _ = losses.find("binary")(net, batch_of(np.array([0, 1, 2, 3, 0])))  # classes, too
    wanted, _ = losses.find("binary")(net, batch_of(np.float32(np.eye(4)[[0, 1, 2, 3, 0]])))
    np.testing.assert_allclose(hot, wanted)


def test_huber_is_squared_near_and_linear_far():
    net, batch = Net(jnp.array([[0.5], [5.0]])), batch_of(np.float32([0, 0]))
    np.testing.assert_allclose(losses.get("huber", {})(net, batch, delta=1.0)[0], [0.125, 4.5])
    np.testing.assert_allclose(losses.get("squared", {})(net, batch)[0], [0.25, 25.0])


def test_balanced_runs_differ_and_weights_of_one_do_not(lists, tmp_path, capsys):
    ones = json.dumps(dict.fromkeys(CLASSES, 1.0))
    table = tmp_path / "weights.csv"
    table.write_text("class,weight\nred,1\ndark,1\ngreen,1\n")
    config = config_of(lists / "classes.csv", epochs=2)
    entries = [{"class_weights": x} for x in ("balanced", str(table))]
    config.runs = ({"seed": 0}, *entries)
    plain, balanced, given = suite.run(config, tmp_path / "runs")[0]
    said = re.search(r"images count (\S+) to (\S+) times, by their class", capsys.readouterr().out)
    assert float(said[1]) < 1 < float(said[2])
    assert given["class_weights"] == ones
    assert given["train_loss"] == plain["train_loss"] != balanced["train_loss"]
    assert balanced["metrics"]["balanced_acc"] > plain["metrics"]["balanced_acc"]
    text = (tmp_path / "runs/results.md").read_text()
    assert "class_weights=balanced" in text and "weights.csv" in text and "{" not in text


# Commands -------------------------------------------------------------------------------------


def run_predict(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, words)])
    predict.main()
    return capsys.readouterr().out


def test_labels_above_their_thresholds_are_printed(lists, runs, monkeypatch, capsys):
    folder, pictures = tuned(runs, "labels"), [lists / f"{i}.png" for i in range(20)]
    model = adapters.load(adapters.read(folder / "adapter.safetensors"))
    images = np.stack([np.asarray(Image.open(path)) for path in pictures])
    shares = special.expit(np.float64(model.logits(images)))
    thresholds = model.card["answers"]["thresholds"]
    names = np.array(model.card["classes"])
    wanted = [{*names[row > thresholds]} for row in shares]
    out = run_predict(monkeypatch, capsys, "--adapter", folder, "--format", "jsonl", *pictures)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [{x["class"] for x in row["labels"]} for row in rows] == wanted
    assert set() in wanted and {"red", "green"} in wanted
    out = run_predict(monkeypatch, capsys, "--adapter", folder, "--format", "csv", *pictures)
    table = list(csv.DictReader(out.splitlines()))
    assert [{*filter(None, row["label"].split(";"))} for row in table] == wanted
    out = run_predict(monkeypatch, capsys, "--adapter", folder, *pictures)
    assert sum(line.endswith("none") for line in out.splitlines()) == wanted.count(set())


def test_values_are_printed_in_their_unit(lists, runs, monkeypatch, capsys):
    folder, pictures = tuned(runs, "values"), [lists / f"{i}.png" for i in range(60)]
    given = [float(row["value"]) for row in csv.DictReader((lists / "values.csv").open())][:60]
    out = run_predict(monkeypatch, capsys, "--adapter", folder, "--format", "csv", *pictures)
    found = [float(row["value"]) for row in csv.DictReader(out.splitlines())]
    assert np.corrcoef(found, given)[0, 1] > 0.7 and abs(np.mean(found) - np.mean(given)) < 10
    out = run_predict(monkeypatch, capsys, "--adapter", folder, "--format", "jsonl", *pictures)
    assert [json.loads(line)["value"] for line in out.splitlines()] == found
    out = run_predict(monkeypatch, capsys, "--adapter", folder, pictures[0])
    assert float(out.split()[-1]) == pytest.approx(found[0], rel=1e-5)


def test_the_page_shows_each_kind(runs):
    text = page_lib.page([runs[1]], progress=False)
    for said in (
        *("Confusion matrix", "How sure", "Expected calibration error", "Labels", "average precision"),
        *("Values", "Furthest off", "mean error"),
    ):
        assert f"<h3>{said}</h3>" in text or said in text, said
    matrix = re.search(r'<table class="confusion">.*?</table>', text, re.S)[0]
    counts = [int(x) for x in re.findall(r'data-v="(\d+)"', matrix)]
    row = runs[0]["classes"]["knn"]
    assert len(counts) == 9 and sum(counts) == row["num_test"]
    row = runs[0]["classes"]["linear"]
    assert sum(counts[i] for i in (0, 4, 8)) == round(row["num_test"] * row["test_acc_final"])


# Neighbours -----------------------------------------------------------------------------------


def test_neighbours_vote_as_scikit_learns_do():
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

    random = np.random.default_rng(0)
    bank, labels = random.normal(size=(300, 8)), random.integers(0, 4, 300)
    queries = np.float32(bank[:40] + random.normal(size=(40, 8)))
    weigh = lambda distance: np.exp(-distance / 0.07)  # of the cosine distance, 1 - s
    for k in (1, 7, 50):
        made = (np.float32(bank), np.eye(4)[labels])
        found = knn.answer(made, queries, k, 0.07)
        theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weigh)
        wanted = theirs.fit(np.float64(np.float32(bank)), labels).predict_proba(np.float64(queries))
        np.testing.assert_allclose(found, wanted, atol=2e-4)
        values = np.float32(bank[:, :1])
        theirs = KNeighborsRegressor(k, metric="cosine", algorithm="brute", weights=weigh)
        wanted = theirs.fit(np.float64(np.float32(bank)), values).predict(np.float64(queries))
        np.testing.assert_allclose(knn.answer((made[0], values), queries, k, 0.07), wanted, atol=2e-4)


@pytest.mark.slow
def test_a_search_without_a_score_says_so(lists, tmp_path):
    """All validation images have one value, so that R² is of no use."""
    rows = list(csv.DictReader((lists / "values.csv").open()))
    path = lists / "constant.csv"
    with path.open("w", newline="") as f:
        table = csv.writer(f)
        table.writerow(("path", "value", "split"))
        for i, row in enumerate(rows):
            split = "val" if i < 10 else "test" if i < 20 else "train"
            table.writerow((row["path"], 50.0 if split == "val" else row["value"], split))
    config = config_of(path, protocol="vtab", epochs=1)
    config.lr = None
    config.grid.lr = (0.01, 0.05)
    with pytest.raises(UserError, match="no image of constant to choose on says anything: give them"):
        suite.run(config, tmp_path)


def test_tuning_says_what_comes_before_the_fit(lists, tmp_path):
    (plain,), _ = suite.run(config_of(lists / "classes.csv", protocol="tune", epochs=2), tmp_path / "a")
    config = config_of(lists / "classes.csv", protocol="tune", temperature="fit", epochs=2)
    (fitted,), _ = suite.run(config, tmp_path / "b")
    assert fitted["metrics"] == plain["metrics"] and fitted["temperature"] != 1
    assert fitted["num_test"] is None


def test_a_large_mean_costs_no_digits(lists):
    """Values around 5,000 deviations from 0 are judged as those around 0."""
    from rlrr_jax.data.task import Task

    random = np.random.default_rng(0)
    labels, logits = (np.float32(random.normal(size=n)) for n in (200, (200, 1)))
    task = Task("x", "own", {}, 1, 200, kind="value")
    near, far = (
        answers.judged(task._replace(unit=(1.0, mean)), logits, labels) for mean in (0.0, 5000.0)
    )
    for key, value in near.items():
        assert far[key] == pytest.approx(value, rel=1e-9), key


def test_no_image_votes_for_itself():
    bank = np.float32(np.eye(5))
    found = knn.answer((bank, np.eye(5)), bank, 1, 0.07, same=True)
    assert (np.diag(found) == 0).all()


def test_the_number_of_neighbours_is_the_smallest_of_the_best():
    random = np.random.default_rng(0)
    bank = np.float32(random.normal(size=(60, 4))), np.eye(2)[random.integers(0, 2, 60)]
    seen = []

    def judge(votes):
        seen.append(votes)
        return {1: 0.5, 2: 0.7, 3: 0.7}.get(len(seen), 0.1)

    chosen = knn.choose(bank, (bank[0][:9], None), judge, 0, 0.07)
    assert chosen == {"k": 5} and len(seen) == len([k for k in knn.KS if k <= 60])
    assert knn.choose(bank, None, None, 3, 0.07) == {"k": 3}


def test_neighbours_leave_no_adapter_and_say_what_was_chosen(runs):
    row = runs[0]["classes"]["knn"]
    assert row["chosen"]["k"] in knn.KS and row["trainable_params"] == row["head_params"] == 0
    assert row["epochs_trained"] == 0 and row["keep"] is None
    assert not (runs[1] / "classes/knn/seed0/adapter.safetensors").exists()


# Wrong inputs ---------------------------------------------------------------------------------

WRONG = {
    "weights of nothing": ("classes", {"class_weights": "equal"}, "is neither balanced nor a file"),
    "weights of values": ("values", {"class_weights": "balanced"}, "is for classes, and .* has values"),
    "an unknown class": ("classes", {"class_weights": '{"blue": 1}'}, "weight of 'blue', which is no"),
    "a missing class": (
        "classes",
        {"class_weights": '{"red": 1}'},
        "has no weight of 'dark': give one",
    ),
    "a negative weight": (
        "classes",
        {"class_weights": '{"red": -1, "green": 1, "dark": 1}'},
        "the weight -1 of 'red' must be finite and not negative",
    ),
    "weights of 0": (
        "classes",
        {"class_weights": '{"red": 0, "green": 0, "dark": 0}'},
        "has only weights of 0",
    ),
    "no JSON": ("classes", {"class_weights": "{red}"}, "is no JSON object: name a .csv instead"),
    "another loss": ("labels", {"loss": "cross_entropy"}, "learns one class an image: take .*binary"),
    "another kind": (
        "classes",
        {"loss": "squared"},
        "learns values: take config.loss=cross_entropy or",
    ),
    "a loss of classes": ("values", {"loss": "binary"}, "has values, and the loss binary learns one"),
    "mixed values": ("values", {"mixup": 0.2}, "config.mixup is for classes, and .* has values"),
    "heat of values": ("values", {"temperature": "fit"}, "config.temperature is for classes, and"),
    "temperature": ("classes", {"temperature": "fitt"}, "unknown value of config.temperature 'fitt'"),
    "keep": ("classes", {"keep": "last"}, "unknown value of config.keep 'last': .*best"),
    "patience": ("classes", {"patience": 0}, "config.patience=0 must be greater than 0"),
    "official": (
        "classes",
        {"keep": "best", "protocol": "official"},
        "tests after each epoch, and config",
    ),
    "official labels": ("labels", {"protocol": "official"}, "thresholds of labels is chosen on images"),
    "nothing aside": (
        "classes",
        {"keep": "best", "val": 0.0},
        "has no images to choose on: raise config",
    ),
    "crops of neighbours": ("classes", {"method": "knn", "mixup": 0.1}, "takes each image once: leave"),
    "k": ("classes", {"method": "knn", "k": -1}, "k=-1 must be a whole number, 0 to choose it"),
    "heat of votes": ("classes", {"method": "knn", "temperature_of": 0.0}, "must be greater than 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_one_sentence(case, lists):
    name, changes, message = WRONG[case]
    changes = dict(changes)
    config = config_of(lists / f"{name}.csv", changes.pop("method", "linear"))
    config.own.val = changes.pop("val", config.own.val)
    for key in ("k", "temperature_of"):
        if key in changes:
            config.method_kwargs[key.removesuffix("_of")] = changes.pop(key)
    with pytest.raises(UserError, match=message) as e:
        config.update(changes)
        config_lib.resolve(config)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class,weight\nred,1\nred,2\n", "weights.csv:3: 'red' has a weight already: keep one"),
        ("class,weight\nred,much\n", "weights.csv:2: the weight 'much' is no number: correct it"),
        ("name,weight\nred,1\n", "weights.csv has no header class,weight and lines under it"),
        ("", "weights.csv has no header class,weight"),
        ("class,weight\nrde,1\n", "weight of 'rde', which is no class: did you mean 'red'"),
        ("class,weight\nred,inf\n", "has no weight of 'dark'|must be finite"),
    ],
)
def test_wrong_files_of_weights(text, message, tmp_path):
    path = tmp_path / "weights.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        answers._given(str(path), CLASSES)


def test_cards_that_cannot_be_used_are_refused(runs, tmp_path):
    adapter = adapters.read(tuned(runs, "labels") / "adapter.safetensors")
    for said in (
        {"kind": "boxes"},
        {"kind": "labels", "thresholds": [0.5]},
        {"kind": "labels", "thresholds": [0.5, "x"]},
        {"temperature": "hot"},
        [],
    ):
        card = {**adapter.card, "answers": said} if said else {**adapter.card, "answers": [1]}
        adapters.write(tmp_path / "a.safetensors", adapter._replace(card=card))
        with pytest.raises(UserError, match="is of another version of method linear"):
            adapters.read(tmp_path / "a.safetensors")
