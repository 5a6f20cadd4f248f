"""Owns the closed-form read-outs: L2 logistic, ridge and Cox regression on fixed features; knows no token and no file.

All are convex, so there is nothing to seed. The penalty is chosen on held-out parts of the training cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn

from embedkit.hazards import fit_hazards, partial_likelihood
from embedkit.targets import TaskKind

__all__ = ["LinearReadout"]

Floats = NDArray[np.float64]
_STRENGTHS = tuple(10.0**power for power in range(-2, 5))
"""Inverse penalties tried, in units of one over the number of features."""
_NEWTON_SIZE = 1500


class LinearReadout(nn.Module):
    """Standardises features and applies a linear layer; features that are NaN (a missing view) count as average."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("weight", torch.zeros(outputs, features))
        self.register_buffer("bias", torch.zeros(outputs))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [batch outputs] of features [batch features]."""
        return self.standardise(features) @ self.weight.T + self.bias

    def standardise(self, features: Tensor) -> Tensor:
        """Features [batch features] at mean 0 and deviation 1 over the training cases, NaN replaced by 0."""
        centred = (features - self.mean) * self.scale
        return centred.masked_fill(centred.isnan(), 0.0)

    def fit(
        self,
        features: Tensor,
        targets: NDArray[Any],
        *,
        kind: TaskKind,
        holdouts: Sequence[NDArray[np.bool_]] = (),
        class_weights: bool = True,
        strength: float | None = None,
    ) -> float:
        """Fits the read-out on training cases.

        Args:
            features: [cases features], NaN where a view is missing.
            targets: As `Task.targets`; a regression's standardised.
            kind: Binary and multilabel are fitted one against the rest, multiclass as multinomial, survival by the
                penalised partial likelihood of Cox (the logit is the log hazard).
            holdouts: Each bool [cases]: cases held out to choose the penalty; it is refitted on all.
            class_weights: Weigh classes by the inverse of their frequency.
            strength: The inverse penalty, as it was once returned; None chooses it.

        Returns:
            The inverse penalty chosen, in units of one over the number of features.
        """
        values = features.double()
        self.mean.copy_(values.nanmean(0).nan_to_num(0.0))
        deviation = (values - self.mean).square().nanmean(0).sqrt().nan_to_num(0.0)
        self.scale.copy_(torch.where(deviation > 1e-6, 1 / deviation.clamp(min=1e-6), 0.0))
        reduced, back = _reduce(self.standardise(features).double().cpu().numpy())
        size = self.weight.shape[1]
        if strength is None:
            losses = [
                sum(
                    _held_out_loss(reduced, targets, held, each / size, kind=kind, balanced=class_weights)
                    for held in holdouts
                )
                for each in _STRENGTHS
            ]
            strength = _STRENGTHS[int(np.argmin(losses))] if holdouts else 1.0
        weight, bias = _fit(reduced, targets, strength / size, kind=kind, balanced=class_weights)
        self.weight.copy_(torch.from_numpy(weight @ back))
        self.bias.copy_(torch.from_numpy(bias))
        return strength


def _reduce(features: Floats) -> tuple[Floats, Floats]:
    """Rotates features [cases features] into the space that the cases span; exact for any L2-penalised linear model.

    Returns:
        Features [cases rank] and the rotation back [rank features].
    """
    if features.shape[0] >= features.shape[1]:
        return features, np.eye(features.shape[1])
    variance, basis = np.linalg.eigh(features @ features.T)
    kept = variance > 1e-9 * max(variance[-1], 1e-30)
    basis, spread = basis[:, kept], np.sqrt(variance[kept])
    return basis * spread, (basis / spread).T @ features


def _fit(
    features: Floats, targets: NDArray[Any], strength: float, *, kind: str, balanced: bool
) -> tuple[Floats, Floats]:
    """Weight [outputs features] and bias [outputs] at inverse penalty ``strength``."""
    if kind == "regression":
        model = Ridge(alpha=1 / (2 * strength)).fit(features, targets)
        return model.coef_[None], np.atleast_1d(model.intercept_)
    if kind == "survival":
        return fit_hazards(features, targets, strength=strength)[None], np.zeros(1)
    if kind == "multilabel":
        parts = [_fit(features, column, strength, kind="binary", balanced=balanced) for column in targets.T]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    classes = len(np.unique(targets))
    if classes < 2:  # a label that every training case has, or none
        rate = (targets.sum() + 0.5) / (len(targets) + 1)
        return np.zeros((1, features.shape[1])), np.array([np.log(rate / (1 - rate))])
    model = LogisticRegression(
        C=strength,
        class_weight="balanced" if balanced else None,
        solver="newton-cholesky" if features.shape[1] * (classes if classes > 2 else 1) <= _NEWTON_SIZE else "lbfgs",
        max_iter=5000,
    ).fit(features, targets)
    if kind == "multiclass" and classes == 2:  # one row in scikit-learn; softmax of these two is its sigmoid
        weight, bias = model.coef_ / 2, model.intercept_ / 2
        return np.concatenate([-weight, weight]), np.concatenate([-bias, bias])
    return model.coef_, model.intercept_


def _held_out_loss(
    features: Floats, targets: NDArray[Any], held: NDArray[np.bool_], strength: float, *, kind: str, balanced: bool
) -> float:
    """Mean squared error or log loss on the cases held out from the fit.

    Of survival how far they lower the log partial likelihood of all (Verweij and van Houwelingen 1993, Statistics in
    Medicine 12:2305), since few of them are at risk together.
    """
    weight, bias = _fit(features[~held], targets[~held], strength, kind=kind, balanced=balanced)
    if kind == "survival":
        eta = features @ weight[0]
        return partial_likelihood(eta[~held], targets[~held]) - partial_likelihood(eta, targets)
    scores, truth = features[held] @ weight.T + bias, targets[held]
    if kind == "regression":
        return float(np.square(scores[:, 0] - truth).mean())
    if kind == "multiclass":
        shifted = scores - scores.max(1, keepdims=True)
        return float((np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(truth)), truth]).mean())
    signs = 2 * truth.reshape(scores.shape) - 1
    return float(np.logaddexp(0, -signs * scores).mean())
