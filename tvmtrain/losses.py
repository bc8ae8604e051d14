"""Losses of whole data sets: sums over batches of any size, so that the mean is the one over all samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvmtrain.artifact import LossSpec


class Evaluation(float):
    """The mean loss over all samples, with ``accuracy`` (of cross-entropy on class numbers, else None) and sample ``count``."""

    accuracy: float | None
    count: int

    def __new__(cls, loss: float, accuracy: float | None = None, count: int = 0) -> Evaluation:
        self = super().__new__(cls, loss)
        self.accuracy = accuracy
        self.count = count
        return self


@dataclass(frozen=True)
class Tally:
    """What adds up over batches: the sum of the loss and how many terms it has, right answers and labels that count."""

    loss: float = 0.0
    weight: float = 0.0
    right: int = 0
    labels: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.loss + other.loss, self.weight + other.weight, self.right + other.right, self.labels + other.labels)


def measure(loss: LossSpec, output: np.ndarray, target: np.ndarray) -> Tally:
    """The built-in ``loss`` of some samples, in float64, as PyTorch defines it."""
    values = output.astype(np.float64)
    if loss.name == "mse":
        terms = np.square(values - target)
        return Tally(float(terms.sum()), terms.size)
    if loss.name == "bce_with_logits":
        terms = np.maximum(values, 0) - values * target + np.log1p(np.exp(-np.abs(values)))
        return Tally(float(terms.sum()), terms.size)
    return _cross_entropy(values, target, loss.ignore_index)


def _cross_entropy(logits: np.ndarray, target: np.ndarray, ignore: int | None) -> Tally:
    """``logits`` [N, C, ...]; ``target`` class numbers [N, ...] or probabilities [N, C, ...]."""
    log_shares = logits - logits.max(axis=1, keepdims=True)
    log_shares -= np.log(np.exp(log_shares).sum(axis=1, keepdims=True))
    if target.dtype.kind == "f":
        return Tally(float(-(log_shares * target).sum()), target.size / target.shape[1])
    counts = np.ones(target.shape, bool) if ignore is None else target != ignore
    chosen = np.take_along_axis(log_shares, np.where(counts, target, 0)[:, None], axis=1)[:, 0]
    right = (logits.argmax(axis=1) == target) & counts
    labels = int(counts.sum())
    return Tally(float(-chosen[counts].sum()), labels, int(right.sum()), labels)
