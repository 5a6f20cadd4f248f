"""Owns the head ``mtlr``: any other head as trunk, its outputs a logistic regression for each edge between intervals.

Yu, Greiner, Lin and Baracos, "Learning patient-specific cancer survival distributions as a sequence of dependent
regressors" (NeurIPS 2011), on pooled tokens as the prognosis head of MAFM3. The chance of the event in each interval is
a softmax (`embedkit.curves.interval_logits`); a censored case has the likelihood of all intervals that are left to it.
It assumes no proportional hazards: curves of two cases may cross. The smoothness term of the paper is left to weight
decay.
"""

from __future__ import annotations

from typing import ClassVar

from embedkit.trunks import TrunkHead

__all__ = ["MtlrHead"]


class MtlrHead(TrunkHead):
    """Survival curve from a trunk, learned by the censored likelihood of multi-task logistic regression."""

    owner: ClassVar[str] = "mtlr"
    kinds: ClassVar[frozenset[str]] = frozenset({"survival"})
    likelihood: ClassVar[str] = "mtlr"
