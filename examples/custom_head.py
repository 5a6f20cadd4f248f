"""Owns a head of one's own, complete: ``smoothmax``, a linear score per slice and the smooth maximum of all slices.

Log-sum-exp pooling after Pinheiro and Collobert (CVPR 2015, arXiv 1411.6228). To use it, put it beside a pyproject.toml
that names it, `pip install` that folder, and `embedkit train CACHE ... --head smoothmax` finds it::

    [project]
    name = "smoothmax"
    version = "1.0"
    [project.entry-points."embedkit.heads"]
    smoothmax = "custom_head:SmoothMaxHead"
"""

import torch
from torch import nn

from embedkit.bags import Bag, BagShape
from embedkit.plugins import HeadOutput
from embedkit.pooling import join_tokens, joined_size


class SmoothMaxHead(nn.Module):
    """A linear score for every slice of every view, and their log-sum-exp: near the mean if sharp is small."""

    reads = frozenset({"cls", "patch"})
    fit_by = "gradient"

    def __init__(self, shape: BagShape, token_sets: tuple[str, ...], outputs: int, *, sharp: float = 2.0) -> None:
        super().__init__()
        self.token_sets, self.sharp = token_sets, sharp
        self.score = nn.Linear(joined_size(shape, token_sets)[1], outputs)

    def forward(self, bag: Bag) -> HeadOutput:
        """Logits [batch outputs]; masked slices score so low that they weigh nothing."""
        scores = self.sharp * self.score(join_tokens(bag, self.token_sets).mean(3)).flatten(1, 2)
        real = bag.mask.flatten(1)[..., None]
        highest = scores.masked_fill(~real, torch.finfo(scores.dtype).min).logsumexp(1)
        return HeadOutput((highest - real.sum(1).log()) / self.sharp)
