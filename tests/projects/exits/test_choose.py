import numpy as np
import pytest

from rlrr_jax.projects.exits import choose

COSTS = np.array([1.0, 2.0, 4.0])


def probabilities(seed=0, number=50, classes=4):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(number, 3, classes)) * np.array([1, 2, 3])[:, None]
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return shares, rng.integers(0, classes, number)


def by_hand(found, labels, threshold):
    """Cost, accuracy and shares, one image after another."""
    cost, right, left = 0.0, 0, [0, 0, 0]
    for image, label in zip(found, labels):
        place = next((i for i in range(2) if max(image[i]) >= threshold), 2)
        cost, answer = cost + COSTS[place], list(image[place]).index(max(image[place]))
        right += answer == label
        left[place] += 1
    return cost / len(labels), right / len(labels), np.array(left) / len(labels)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.7, 0.95, np.inf])
def test_a_point_is_what_images_give_one_after_another(threshold):
    found, labels = probabilities()
    point = choose.point(found, labels, COSTS, threshold)
    cost, accuracy, shares = by_hand(found, labels, threshold)
    assert (point.cost, point.accuracy) == (pytest.approx(cost), pytest.approx(accuracy))
    np.testing.assert_allclose(point.shares, shares)


def test_a_threshold_is_the_highest_within_the_budget():
    found, labels = probabilities()
    said = [0, *np.unique(found[:, :2].max(-1)), np.inf]
    for budget in (1.0, 1.3, 2.0, 3.1, 4.0):
        threshold = choose.threshold_of(found, COSTS, budget)
        within = [t for t in said if by_hand(found, labels, t)[0] <= budget + 1e-9]
        assert threshold == max(within)
    assert choose.threshold_of(found, COSTS, 4.0) == np.inf
    assert choose.threshold_of(found, COSTS, 1.0) == found[:, 0].max(-1).min()  # all leave at once


def test_budgets_go_from_the_first_exit_to_the_end():
    np.testing.assert_allclose(choose.budgets(COSTS, 4), [1, 2, 3, 4])


def test_the_knee_is_farthest_above_the_diagonal():
    assert choose.knee([(1, 50), (2, 90), (5, 92), (10, 93)]) == 1
    assert choose.knee([(1, 50), (2, 60), (5, 89), (10, 93)]) == 2
    assert choose.knee([(1, 50), (2, 50.1), (3, 50)]) == 1  # ends of one height
