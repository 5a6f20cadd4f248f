"""Owns how the logits of a survival head become a risk and the chance to be without the event at stated times.

Two kinds of head: `CoxCurve` takes one logit, a log hazard, `MtlrCurve` one per edge between intervals of time. What
they need of the training cases (a baseline, the edges) is fitted here and kept with the head. Knows no head, no loss.

The risk is the share of the time up to the last stated one that a case is expected to lose to the event: one minus the
area under its curve over that time (trapezoids from 1 at time 0). So it means the same for every head and every fold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embedkit.hazards import estimate_log_baseline

__all__ = ["CoxCurve", "MtlrCurve", "choose_edges", "count_edges", "interval_logits", "make_curve"]

Floats = NDArray[np.float64]

_FEWEST_EDGES, _MOST_EDGES = 3, 20


class CoxCurve(nn.Module):
    """Proportional hazards: chance exp(-H(t) exp(logit)), H the baseline of the training cases (Breslow 1972)."""

    def __init__(self, times: Sequence[float]) -> None:
        super().__init__()
        self.outputs = 1
        self.log_baseline: Tensor
        self.spans: Tensor
        self.register_buffer("log_baseline", torch.zeros(len(times)))
        self.register_buffer("spans", _trapezoid_spans(times))
        self._times = np.asarray(times, dtype=np.float64)

    def forward(self, logits: Tensor) -> Tensor:
        """Risk, then the chance at each stated time: float64 [batch 1+times] of logits [batch 1]."""
        chances = torch.exp(-torch.exp(self.log_baseline.double() + logits.double()))
        return _with_risk(chances, self.spans)

    def fit(self, logits: Tensor, targets: NDArray[Any]) -> None:
        """Takes the baseline from logits [cases 1] and targets [cases 2] of the training cases."""
        baseline = estimate_log_baseline(logits[:, 0].double().cpu().numpy(), targets, self._times)
        self.log_baseline.copy_(torch.from_numpy(baseline))


class MtlrCurve(nn.Module):
    """Multi-task logistic regression: a softmax over intervals; between edges the chance runs straight.

    After the last edge, which is the last event of the training cases, it stays as it is.
    """

    def __init__(self, outputs: int, times: Sequence[float]) -> None:
        super().__init__()
        self.outputs = outputs
        self.edges: Tensor
        self.mixture: Tensor
        self.spans: Tensor
        self.register_buffer("edges", torch.arange(1.0, outputs + 1))
        self.register_buffer("mixture", torch.zeros(len(times), outputs + 1))
        self.register_buffer("spans", _trapezoid_spans(times))
        self._times = np.asarray(times, dtype=np.float64)

    def forward(self, logits: Tensor) -> Tensor:
        """Risk, then the chance at each stated time: float64 [batch 1+times] of logits [batch outputs]."""
        chances = interval_logits(logits.double()).softmax(-1)
        after = chances.flip(-1).cumsum(-1).flip(-1)  # of the event in this interval or later: 1 at time 0
        return _with_risk((after @ self.mixture.double().T).clamp(0, 1), self.spans)

    def fit(self, logits: Tensor, targets: NDArray[Any]) -> None:  # noqa: ARG002 - one signature with CoxCurve
        """Takes the edges from targets [cases 2] of the training cases."""
        edges = choose_edges(targets, self.outputs)
        self.edges.copy_(torch.from_numpy(edges))
        knots = np.append(0.0, edges)
        columns = [np.interp(self._times, knots, column) for column in np.eye(len(knots))]
        self.mixture.copy_(torch.from_numpy(np.stack(columns, axis=1)))


def make_curve(likelihood: str, outputs: int, times: Sequence[float]) -> CoxCurve | MtlrCurve:
    """The curve of a head of one of `LIKELIHOODS`, yet to be fitted."""
    return MtlrCurve(outputs, times) if likelihood == "mtlr" else CoxCurve(times)


def count_edges(targets: NDArray[Any]) -> int:
    """How many edges a task gets: the root of the number of events (Haider et al., JMLR 21:85, 2020), 3 to 20."""
    return min(max(math.ceil(math.sqrt(targets[:, 1].sum())), _FEWEST_EDGES), _MOST_EDGES)


def choose_edges(targets: NDArray[Any], count: int) -> Floats:
    """float64 [count], rising: quantiles of the times of the training events, the last of them the last edge.

    Where fewer times differ than edges are wanted, the rest lie after the last event, where they part nothing.
    """
    times = np.sort(targets[targets[:, 1] == 1, 0])
    edges = np.unique(np.quantile(times, np.arange(1, count + 1) / count, method="inverted_cdf"))
    step = edges[-1] / count
    return np.append(edges, edges[-1] + step * np.arange(1, count - len(edges) + 1))


def interval_logits(logits: Tensor) -> Tensor:
    """[... edges+1]: what the softmax over intervals takes, from logits [... edges].

    Yu, Greiner, Lin and Baracos, "Learning patient-specific cancer survival distributions as a sequence of dependent
    regressors" (NeurIPS 2011), equation 3: an event in an interval scores the sum of the logits of all later edges.
    """
    sums = logits.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([sums, torch.zeros_like(sums[..., :1])], -1)


def _trapezoid_spans(times: Sequence[float]) -> Tensor:
    """[times]: weight of the chance at each time in the mean from 0 to the last; 1 at time 0 has the rest."""
    knots = np.append(0.0, np.asarray(times, dtype=np.float64))
    gaps = np.append(np.diff(knots), 0.0)
    return torch.from_numpy((gaps[:-1] + gaps[1:]) / 2 / knots[-1]).float()


def _with_risk(chances: Tensor, spans: Tensor) -> Tensor:
    """[batch 1+times] of chances [batch times]."""
    weights = spans.double()
    lost = (1 - chances) @ weights
    return torch.cat([lost[:, None], chances], 1)
