"""How answers are judged, on the host: the labels of a task are of one of three kinds.

    class   one class an image [N]: softmax, accuracy
    labels  none, one or several an image [N, classes] of 0 and 1: sigmoids, mean average precision
    value   a number an image [N]: the logit itself, R²

scikit-learn's definitions; it is not needed here, and the tests compare with it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import special

BINS = 15  # of the calibration error (Guo et al., ICML 2017)


class Kind(NamedTuple):
    """What the labels of a task are, and how answers to them are judged.

    Attributes:
      score: which of `measure`'s values is the larger the better: it chooses, and tables show it.
      loss: name of the loss where the configuration names none.
      shares: function from logits [..., C] to what is shown of them: probabilities, or the value.
      measure: function `(logits [N, C], labels) -> {name: number}`.
    """

    score: str
    loss: str
    shares: Callable[[np.ndarray], np.ndarray]
    measure: Callable[..., dict[str, float]]


def likelihoods(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Log-likelihood of each image's label [N]: of its class, or of all its labels, their mean."""
    if labels.ndim == 1:
        return special.log_softmax(logits, -1)[np.arange(len(labels)), labels]
    return special.log_expit(np.where(labels > 0, logits, -logits)).mean(-1)


def calibration(shares: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[tuple]:
    """Bins of equal width of how sure answers are: `[(answers, their mean share, part right), ...]`.

    Args:
      shares: probability of each answer [N].
      right: whether each is right [N].
      bins: number of bins.
    """
    which = np.clip(np.ceil(shares * bins).astype(int) - 1, 0, bins - 1)
    inside = [which == i for i in range(bins)]
    return [(int(m.sum()), shares[m].mean(), right[m].mean()) for m in inside if m.any()]


def calibration_error(shares: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: by how much shares and parts that are right differ, on average."""
    bins = calibration(shares, right)
    return sum(n * abs(share - part) for n, share, part in bins) / len(shares)


def confusion(labels: np.ndarray, answers: np.ndarray, classes: int) -> np.ndarray:
    """Numbers of images [classes, classes] of each class (row) that got each answer (column)."""
    return np.bincount(labels * classes + answers, minlength=classes**2).reshape(classes, classes)


def f1(both: np.ndarray, labels: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """F1 from numbers of right answers, of images and of answers; 0 where there is neither."""
    return 2 * both / np.maximum(labels + answers, 1)


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Average precision of scores [N] for labels [N] of 0 and 1; NaN where no label is 1."""
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # equal scores come at once
    found = np.cumsum(labels[order])[last]
    if not found[-1]:
        return float("nan")
    return float(np.sum(np.diff(found, prepend=0) * found / (last + 1)) / found[-1])


def of_classes(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, of classes on average and macro F1, too, cross-entropy, and calibration error."""
    logits = np.asarray(logits, np.float64)
    each, answers = -likelihoods(logits, labels), logits.argmax(-1)
    right = (answers == labels) & np.isfinite(each)  # of NaN, argmax is class 0
    count = lambda x: np.bincount(x, minlength=logits.shape[-1])
    of, given, hits = count(labels), count(answers), count(labels[answers == labels])
    there = of > 0
    return {
        "acc": right.mean(),
        "loss": each.mean(),
        "ece": calibration_error(special.softmax(logits, -1).max(-1), right),
        "balanced_acc": (hits[there] / of[there]).mean(),
        "macro_f1": f1(hits, of, given)[there | (given > 0)].mean(),
    }


def of_labels(logits: np.ndarray, labels: np.ndarray, thresholds: Any = 0.5) -> dict[str, float]:
    """Mean average precision over labels, F1 above thresholds, cross-entropy, calibration error.

    Labels that no image has are left out of means over labels.

    Args:
      logits: outputs of the head [N, C].
      labels: 0 or 1 [N, C].
      thresholds: share above which a label is given, of all or of each [C].
    """
    logits = np.asarray(logits, np.float64)
    shares, yes, there = special.expit(logits), labels > 0, (labels > 0).any(0)
    given = shares > thresholds
    hits, of, answers = (yes & given).sum(0), yes.sum(0), given.sum(0)
    return {
        "map": float(np.mean([average_precision(logits[:, i], yes[:, i]) for i in np.where(there)[0]])),
        "loss": -likelihoods(logits, labels).mean(),
        "ece": calibration_error(shares.ravel(), yes.ravel()),
        "macro_f1": f1(hits, of, answers)[there].mean(),
        "micro_f1": f1(hits.sum(), of.sum(), answers.sum()),
        "acc": (yes == given).mean(),  # of single labels
    }


def of_values(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """R², mean absolute error, and mean squared error."""
    wrong = np.asarray(logits, np.float64)[:, 0] - labels
    spread = ((labels - labels.mean()) ** 2).sum()
    return {
        "r2": 1 - (wrong**2).sum() / spread if spread else float("nan"),
        "mae": abs(wrong).mean(),
        "loss": (wrong**2).mean(),
    }


KINDS = {
    "class": Kind("acc", "cross_entropy", lambda x: special.softmax(x, -1), of_classes),
    "labels": Kind("map", "binary", special.expit, of_labels),
    "value": Kind("r2", "squared", lambda x: x, of_values),
}


def largest(labels: np.ndarray, classes: int) -> tuple[float, float]:
    """Share of the largest class [N], which always naming it gets right, and how unequal classes are.

    Second, the number of its images as a multiple of that of the smallest class.
    """
    counts = np.bincount(labels, minlength=classes)
    return float(counts.max() / len(labels)), float(counts.max() / max(counts.min(), 1))


# What is chosen on images set aside ---------------------------------------------------------------


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The number that logits are divided by for the largest likelihood (Guo et al., ICML 2017)."""
    from scipy import optimize

    logits = np.asarray(logits, np.float64)
    loss = lambda log: -likelihoods(logits / np.exp(log), labels).mean()
    found = optimize.minimize_scalar(loss, bounds=np.log([0.05, 20.0]), method="bounded")
    return float(np.exp(found.x))


def fit_thresholds(logits: np.ndarray, labels: np.ndarray) -> list[float]:
    """For each label the share above which it is given, for the best F1 on these images.

    Halfway between two of their shares; of several the middle one, and 0.5 where no image has it.
    """
    out = []
    for shares, yes in zip(special.expit(np.asarray(logits, np.float64)).T, (labels > 0).T):
        order = np.argsort(-shares, kind="stable")
        values = np.append(shares[order], 0.0)
        cuts = np.flatnonzero(np.diff(values) != 0)  # behind the last of equal shares
        scores = f1(np.cumsum(yes[order])[cuts], yes.sum(), cuts + 1)
        best = cuts[np.flatnonzero(scores == scores.max(initial=0))]
        cut = best[len(best) // 2] if yes.any() else None
        out.append(0.5 if cut is None else float((values[cut] + values[cut + 1]) / 2))
    return out
