"""Thresholds for a budget, and curves of accuracy against cost: NumPy alone.

Probabilities are [N, E + 1, C], of N images at E exits and the end; costs are FLOPs [E + 1].
"""

from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """What a threshold gives.

    Attributes:
      threshold: the probability at which an image leaves.
      cost: mean FLOPs of an image.
      accuracy: share of right answers.
      shares: share of the images that leave at each exit, and at the end [E + 1].
    """

    threshold: float
    cost: float
    accuracy: float
    shares: np.ndarray


def leaves(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """The number [N] of the exit at which each image leaves: the first that is sure, or the end."""
    sure = probabilities.max(-1) >= threshold
    sure[:, -1] = True
    return sure.argmax(1)


def point(probabilities: np.ndarray, labels: np.ndarray, costs: np.ndarray, threshold: float) -> Point:
    """The `Point` of a threshold on images of these labels [N]."""
    left = leaves(probabilities, threshold)
    answers = probabilities[np.arange(len(left)), left].argmax(-1)
    shares = np.bincount(left, minlength=len(costs)) / len(left)
    return Point(float(threshold), float(costs[left].mean()), float((answers == labels).mean()), shares)


def threshold_of(probabilities: np.ndarray, costs: np.ndarray, budget: float) -> float:
    """The highest threshold whose mean cost on these images is at most a budget.

    Candidates are what the exits say of the images, 0, and infinity, with which none leaves early.
    """
    said = np.unique(probabilities[:, :-1].max(-1))
    known = np.concatenate([[0.0], said, [np.inf]])
    mean = lambda i: costs[leaves(probabilities, known[i])].mean()
    low, high = 0, len(known) - 1  # the cost rises with the threshold
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if mean(middle) <= budget * (1 + 1e-9) else (low, middle - 1)
    return float(known[low])


def budgets(costs: np.ndarray, number: int = 12) -> np.ndarray:
    """Budgets from what the first exit costs to what the whole network costs."""
    return np.linspace(costs[0], costs[-1], number)


def knee(points: list[tuple[float, float]]) -> int:
    """The place of the knee of a curve of (cost, accuracy), rising cost: farthest above the diagonal.

    Both are scaled to their range (Satopaa et al., 2011, "Finding a Kneedle in a haystack").
    """
    x, y = np.array(points, float).T
    scale = lambda v: (v - v.min()) / (np.ptp(v) or 1.0)
    return int(np.argmax(scale(y) - scale(x)))
