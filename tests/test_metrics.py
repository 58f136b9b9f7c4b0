"""Metrics against scikit-learn, and what is chosen on images set aside."""

import numpy as np
import pytest
from scipy import special
from sklearn import metrics as theirs
from sklearn.utils import class_weight

from rlrr_jax import losses, metrics

RANDOM = np.random.default_rng(0)


def test_classes_as_scikit_learn_counts_them():
    """With a class that no image has, one that no answer names, and ties."""
    labels = RANDOM.choice([0, 1, 2, 4], 200, p=[0.6, 0.2, 0.15, 0.05])
    logits = np.float32(RANDOM.normal(size=(200, 6)) + 2 * np.eye(6)[labels])
    logits[:, 5] = -9.0
    found, answers = metrics.of_classes(logits, labels), logits.argmax(-1)
    assert found["acc"] == theirs.accuracy_score(labels, answers)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        wanted = theirs.balanced_accuracy_score(labels, answers)
    np.testing.assert_allclose(found["balanced_acc"], wanted)
    wanted = theirs.f1_score(labels, answers, average="macro", zero_division=0)
    np.testing.assert_allclose(found["macro_f1"], wanted)
    shares = special.softmax(np.float64(logits), -1)
    np.testing.assert_allclose(found["loss"], theirs.log_loss(labels, shares, labels=range(6)))
    table = theirs.confusion_matrix(labels, answers, labels=range(6))
    np.testing.assert_array_equal(metrics.confusion(labels, answers, 6), table)


def test_a_logit_that_is_not_finite_is_no_answer():
    logits = np.eye(3)[[0, 1]] * 5
    logits[0] = np.nan
    with np.errstate(invalid="ignore"):
        found = metrics.of_classes(logits, np.array([0, 1]))
    assert found["acc"] == 0.5 and np.isnan(found["loss"])


def test_several_labels_as_scikit_learn_counts_them():
    labels = np.float32(RANDOM.random((150, 5)) < [0.5, 0.3, 0.1, 0.02, 0])
    logits = np.float32(RANDOM.normal(size=(150, 5)) + labels)
    logits = np.round(logits, 1)  # which ties some
    found, shares = metrics.of_labels(logits, labels), special.expit(np.float64(logits))
    there = labels.any(0)
    each = theirs.average_precision_score(labels[:, there], shares[:, there], average=None)
    np.testing.assert_allclose(found["map"], each.mean())
    given = shares > 0.5
    kinds = {
        "macro_f1": dict(average="macro", labels=np.flatnonzero(there)),
        "micro_f1": dict(average="micro"),
    }
    for name, how in kinds.items():
        np.testing.assert_allclose(found[name], theirs.f1_score(labels > 0, given, **how))
    np.testing.assert_allclose(found["loss"], theirs.log_loss(labels.ravel(), shares.ravel()))
    assert found["acc"] == (given == (labels > 0)).mean()


def test_values_as_scikit_learn_counts_them():
    values = RANDOM.normal(size=80) * 3 + 1
    answers = (values + RANDOM.normal(size=80))[:, None]
    found = metrics.of_values(answers, values)
    np.testing.assert_allclose(found["r2"], theirs.r2_score(values, answers[:, 0]))
    np.testing.assert_allclose(found["mae"], theirs.mean_absolute_error(values, answers[:, 0]))
    np.testing.assert_allclose(found["loss"], theirs.mean_squared_error(values, answers[:, 0]))


def test_calibration_error_of_answers_whose_truth_is_known():
    """Answers of 0.8 that are right 8 times of 10 are calibrated; at 0.95 they are 15 % too sure."""
    right = np.tile([True] * 8 + [False] * 2, 10)
    assert metrics.calibration_error(np.full(100, 0.8), right) == pytest.approx(0)
    assert metrics.calibration_error(np.full(100, 0.95), right) == pytest.approx(0.15)
    both = np.concatenate([np.full(100, 0.8), np.full(100, 0.95)])
    assert metrics.calibration_error(both, np.tile(right, 2)) == pytest.approx(0.075)
    bins = metrics.calibration(np.array([0.0, 1.0, 1.0]), np.array([False, True, False]), 4)
    assert bins == [(1, 0.0, 0.0), (2, 1.0, 0.5)]


def test_the_temperature_that_made_answers_too_sure_is_found():
    logits = RANDOM.normal(size=(20_000, 4)) * 2
    shares = special.softmax(logits, -1)
    labels = (shares.cumsum(1) > RANDOM.random((20_000, 1))).argmax(1)
    assert metrics.fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.05)
    several = np.float32(RANDOM.random((20_000, 4)) < special.expit(logits))
    assert metrics.fit_temperature(0.5 * logits, several) == pytest.approx(0.5, rel=0.05)


def test_thresholds_are_the_best_of_all():
    labels = np.float32(RANDOM.random((60, 3)) < [0.4, 0.1, 0])
    logits = np.round(RANDOM.normal(size=(60, 3)) + labels, 1)
    found, shares = metrics.fit_thresholds(logits, labels), special.expit(logits)
    assert found[2] == 0.5  # nothing is known of a label that no image has
    for i in (0, 1):
        every = [theirs.f1_score(labels[:, i], shares[:, i] > t) for t in np.linspace(0, 1, 401)]
        mine = theirs.f1_score(labels[:, i], shares[:, i] > found[i])
        assert mine == max(every)


def test_balanced_weights_are_those_of_scikit_learn():
    labels = np.repeat([0, 1, 3], [30, 12, 3])
    found = losses.balanced(labels, 4)
    wanted = class_weight.compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    np.testing.assert_allclose(found[[0, 1, 3]], wanted)
    assert found[2] == 0 and found[labels].mean() == pytest.approx(1)
    several = np.float32([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]])
    np.testing.assert_allclose(losses.balanced(several, 3), [1 / 3, 3, 1])  # without, for each with


def test_the_share_of_the_largest_class():
    assert metrics.largest(np.array([0, 0, 0, 1]), 2) == (0.75, 3.0)
    assert metrics.largest(np.array([0, 0, 0, 1]), 3)[1] == 3.0  # a class that is not there counts as 1
