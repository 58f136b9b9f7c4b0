"""What a page says of a run's answers: of classes, of several labels an image, of values."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rlrr_jax import metrics
from rlrr_jax.results import plots, tables
from rlrr_jax.results.elements import Raw, bar, picture, png, shaded, table

MOST_PAIRS = 8  # of confused classes
MOST_PICTURES = 4  # of each pair
MOST_CLASSES = 40  # of a confusion matrix


class Answers(NamedTuple):
    """A run's answers to its held-out images.

    Attributes:
      kind: of the labels, see `metrics.KINDS`.
      labels: classes [N], 0 or 1 [N, classes], or values [N].
      shares: probabilities of classes or labels [N, classes], or values [N, 1].
      names: of the classes.
      thresholds: share above which each label is given [classes]; None for one class an image.
      pictures: function `i -> uint8 [h, w, 3]`.
    """

    kind: str
    labels: np.ndarray
    shares: np.ndarray
    names: list[str]
    thresholds: np.ndarray | None
    pictures: Callable[[int], np.ndarray]

    @property
    def answers(self) -> np.ndarray:
        """The likeliest classes [N]."""
        return self.shares.argmax(-1)


def of(answers: Answers) -> list[str]:
    """All sections of a run's answers."""
    kinds: dict[str, tuple[Callable, ...]] = {
        "class": (classes, confusion, pairs, reliability),
        "labels": (labels, reliability),
        "value": (values, furthest),
    }
    return [section(answers) for section in kinds[answers.kind]]


def classes(answers: Answers) -> str:
    """The accuracy of each class."""
    lines = []
    for i, name in enumerate(answers.names):
        mine = answers.labels == i
        right = (answers.answers[mine] == i).mean() if mine.any() else None
        taken = int((answers.answers == i).sum())
        shown = "" if right is None else bar(right)
        lines.append([name, int(mine.sum()), tables.percent(right), taken, Raw(shown)])
    total = tables.percent((answers.labels == answers.answers).mean())
    found = table(["class", "images", "accuracy", "answers", ""], lines)
    return f"<h3>Classes</h3><p>{total} of {len(answers.labels):,} images.</p>{found}"


def confusion(answers: Answers) -> str:
    """How often images of each class got each answer; of few classes."""
    number = len(answers.names)
    if number > MOST_CLASSES:
        return ""
    counts = metrics.confusion(answers.labels, answers.answers, number)
    rows = [
        [name, *(shaded(int(n), n / max(1, row.sum())) for n in row)]
        for name, row in zip(answers.names, counts)
    ]
    text = (
        "A row for each class, a column for each answer; the darker, the larger the share of the row."
    )
    return f"<h3>Confusion matrix</h3><p>{text}</p>" + table(["", *answers.names], rows, "confusion")


def pairs(answers: Answers) -> str:
    """The pairs of classes that are confused most, with pictures."""
    wrong, names = np.flatnonzero(answers.labels != answers.answers), answers.names
    if not len(wrong):
        return "<p>No image was classified wrongly.</p>"
    kinds, counts = np.unique(
        np.stack([answers.labels[wrong], answers.answers[wrong]]), axis=1, return_counts=True
    )
    lines = []
    for place in np.argsort(-counts, kind="stable")[:MOST_PAIRS]:
        label, answer = kinds[:, place]
        these = wrong[(answers.labels[wrong] == label) & (answers.answers[wrong] == answer)]
        text = f"{names[label]} taken for {names[answer]}"
        shown = _pictures(answers, these, f"image {{}}: {text}")
        lines.append([names[label], names[answer], int(counts[place]), shown])
    return "<h3>Most confused</h3>" + table(["class", "taken for", "images", "some of them"], lines)


def labels(answers: Answers) -> str:
    """How well each of several labels is found."""
    given, yes = answers.shares > answers.thresholds, answers.labels > 0
    thresholds = np.broadcast_to(np.asarray(answers.thresholds), len(answers.names))
    both, of, taken = (given & yes).sum(0), yes.sum(0), given.sum(0)
    scores, lines = metrics.f1(both, of, taken), []
    for i, name in enumerate(answers.names):
        found = metrics.average_precision(answers.shares[:, i], yes[:, i]) if of[i] else None
        counts = [int(of[i]), int(taken[i]), int(both[i])]
        shown = "" if found is None else bar(found)
        numbers = [tables.percent(found), tables.percent(scores[i]) if of[i] else ""]
        lines.append([name, *counts, *numbers, f"{thresholds[i]:.3f}", Raw(shown)])
    head = ["label", "images", "given", "both", "average precision", "F1", "given above", ""]
    return f"<h3>Labels</h3><p>{len(answers.labels):,} images.</p>" + table(head, lines)


def reliability(answers: Answers) -> str:
    """How sure answers are, and how many are right: a picture."""
    if answers.kind == "class":
        shares, right = answers.shares.max(-1), answers.answers == answers.labels
    else:
        shares, right = answers.shares.ravel(), answers.labels.ravel() > 0
    if not np.isfinite(shares).all():
        return ""
    error = metrics.calibration_error(shares, right)
    with plots.settings():
        drawn = plots.reliability(metrics.calibration(shares, right), metrics.BINS)
    what = f"Expected calibration error {100 * error:.2f} %, in {metrics.BINS} bins."
    return f"<h3>How sure</h3><p>{what}</p>" + picture(drawn, "share and part that is right", "curve")


def values(answers: Answers) -> str:
    """The values against those that were answered: a picture."""
    found = metrics.of_values(answers.shares, answers.labels)
    with plots.settings():
        drawn = plots.values(answers.labels, answers.shares[:, 0])
    said = f"R² {found['r2']:.4f}, mean error {found['mae']:.4g}, {len(answers.labels):,} images."
    return f"<h3>Values</h3><p>{said}</p>" + picture(drawn, "value and answer", "curve")


def furthest(answers: Answers) -> str:
    """The images whose answers are furthest off."""
    wrong = answers.shares[:, 0] - answers.labels
    lines = [
        [
            f"{answers.labels[i]:.4g}",
            f"{answers.shares[i, 0]:.4g}",
            f"{wrong[i]:.4g}",
            _pictures(answers, [i], "image {}"),
        ]
        for i in np.argsort(-abs(wrong), kind="stable")[:MOST_PAIRS]
    ]
    return "<h3>Furthest off</h3>" + table(["value", "answer", "error", "image"], lines)


def _pictures(answers: Answers, these: Any, what: str) -> Raw:
    """The first of some images; `{}` in the text is the number of each."""
    shown = (picture(png(answers.pictures(i)), what.format(i)) for i in these[:MOST_PICTURES])
    return Raw(f'<span class="pair">{"".join(shown)}</span>')
