"""Owns when a fit has learned enough: judges the epochs of many fits on held-out cases; knows no head and no token.

The held-out cases judge by the loss at the sharpness (a factor on the logits, one over the temperature of Guo et al.
2017) that suits them best: a head that ranks better and better while growing overconfident is then not stopped too
soon. The factor is kept, so that the scores are calibrated.

With few cases held out their loss is noisy, and the lowest of thirty is low by chance. So the latest epoch that is not
worse than the best by more than one standard error (of the paired difference) is taken, and in the same way the
sharpness nearest to 1: the one-standard-error rule of Breiman et al., "Classification and regression trees" (1984).
"""

from __future__ import annotations

import torch
from torch import Tensor

from embedkit.losses import StackedFitLoss

__all__ = ["SHARPNESS", "Watch"]

SHARPNESS = torch.logspace(-1.5, 0.5, 21)  # has 1 among its values


class Watch:
    """Remembers for each of some fits how many epochs to run.

    Attributes:
        epochs: int64 [fits], the epoch chosen so far; 0 where no epoch had a finite loss.
        sharpness: [fits], chosen at that epoch.
        losses: [fits], mean held-out loss there.
        logits: [fits held outputs], of the held-out cases there, before the sharpness.
    """

    def __init__(self, cases: Tensor, real: Tensor, patience: int) -> None:
        """Takes the held-out cases [fits held] as numbers in their tasks, and which of these are no padding."""
        self.cases = cases
        self.real = real
        self.patience = patience
        fits, held = cases.shape
        self.epochs = torch.zeros(fits, dtype=torch.int64)
        self.sharpness = torch.ones(fits)
        self.losses = torch.full((fits,), torch.nan)
        self.logits = torch.zeros(fits, held, 0)
        self._best = torch.zeros(fits, held, device=cases.device)
        self._judged = torch.zeros(fits, dtype=torch.bool, device=cases.device)
        self._seen = 0

    def judge(self, logits: Tensor, loss: StackedFitLoss, more: Tensor | None = None) -> Tensor:
        """Takes held-out logits [fits held outputs] after an epoch; tells which fits [fits] should go on.

        ``more`` [fits held] is added to the losses of the cases.
        """
        self._seen += 1
        if self.logits.shape != logits.shape:
            self.logits = torch.zeros_like(logits)
        factors = (torch.ones(1) if loss.kind == "regression" else SHARPNESS).to(logits.device)
        losses = loss.each(logits[:, None] * factors[:, None, None], self.cases, real=self.real)
        losses = losses if more is None else losses + more[:, None]
        means = self._mean(losses)
        finite = means.isfinite().all(1)
        lowest = losses[torch.arange(len(losses)), means.nan_to_num(torch.inf).argmin(1)]
        better = finite & (~self._judged | (self._mean(lowest) < self._mean(self._best)))
        self._best = torch.where(better[:, None], lowest, self._best)
        self._judged |= finite
        chosen = finite & self._is_as_good(lowest, self._best)
        fine = self._is_as_good(losses, lowest[:, None])
        place = torch.where(fine, factors.log().abs(), torch.inf).argmin(1)
        self.logits = torch.where(chosen[:, None, None], logits, self.logits)
        chosen = chosen.cpu()
        self.epochs[chosen] = self._seen
        self.sharpness = torch.where(chosen, factors[place].cpu(), self.sharpness)
        self.losses = torch.where(chosen, means.gather(1, place[:, None])[:, 0].cpu(), self.losses)
        return self._seen - self.epochs < self.patience

    def keep(self, rows: Tensor) -> None:
        """Leaves only these fits, in this order."""
        for name in ("cases", "real", "epochs", "sharpness", "losses", "logits", "_best", "_judged"):
            values: Tensor = getattr(self, name)
            setattr(self, name, values[rows.to(values.device)])

    def _mean(self, values: Tensor) -> Tensor:
        """Mean over the real cases of values [fits ... held]."""
        real = self.real.view(len(self.real), *[1] * (values.ndim - 2), -1)
        return torch.where(real, values, 0.0).sum(-1) / real.sum(-1)

    def _is_as_good(self, losses: Tensor, best: Tensor) -> Tensor:
        """Whether losses [fits ... held] exceed the best by no more than a standard error of the difference."""
        difference = losses - best
        mean = self._mean(difference)
        variance = self._mean((difference - mean[..., None]).square())
        counts = self.real.sum(1).view(-1, *[1] * (mean.ndim - 1))
        return mean <= (variance / counts).sqrt()
