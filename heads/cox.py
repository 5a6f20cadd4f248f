"""Owns the head ``cox``: any other head as trunk, its one output the log hazard of a survival task.

Katzman et al., "DeepSurv: personalized treatment recommender system using a Cox proportional hazards deep neural
network" (BMC Medical Research Methodology 18:24, 2018, arXiv 1606.00931), with pooled tokens in place of covariates.

The partial likelihood compares each event with all who are then at risk, so a small batch is biased: by default a step
takes all training cases, up to 1,024 at once. Beyond that, or where tokens are streamed in blocks, a risk set is the
batch's part of it. The level of the logit means nothing: the baseline hazard of the training cases takes it up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from embedkit.trunks import TrunkHead

__all__ = ["CoxHead"]


class CoxHead(TrunkHead):
    """Log hazard from a trunk, learned by the Cox partial likelihood over whole risk sets."""

    owner: ClassVar[str] = "cox"
    kinds: ClassVar[frozenset[str]] = frozenset({"survival"})
    likelihood: ClassVar[str] = "cox"
    fit_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 1024, "epochs": 100, "patience": 40}
