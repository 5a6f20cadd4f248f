"""Owns the head ``text``: slices weighed by how well they agree with given texts.

The text-guided inter-slice scoring of Shi et al., "Med-2E3: a 2D-enhanced 3D medical multimodal large language model"
(arXiv 2411.12783): s = softmax_j(MLP(z_T) . z_j) over the slices j, z_T being the vector of a text; the slices are then
summed with these weights. Scores are divided by sqrt(dim) times a temperature. Different from the paper: tokens are
frozen, the texts are the same for all cases (what to look for, one or more), each with weights of its own, and the
pooled tokens go to a linear layer instead of a language model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.dropout import Dropout
from embedkit.errors import HeadError
from embedkit.plugins import HeadOutput, SliceOrder
from embedkit.pooling import ViewQuery, join_tokens, joined_size, masked_softmax
from embedkit.textvectors import embed_texts, read_vectors, write_vectors

__all__ = ["TextHead"]


class TextHead(nn.Module):
    """Softmax over slices of slice token times projected text vector (text.vectors=FILE), one linear layer."""

    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "gradient"
    fit_defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-3}
    slice_order: ClassVar[SliceOrder] = "free"

    def __init__(
        self,
        shape: BagShape,
        token_sets: Sequence[str],
        outputs: int,
        *,
        vectors: str = "",
        texts: Sequence[str] = (),
        model: str = "",
        temperature: float = 1.0,
        hidden: int = 128,
        width: int = 64,
        dropout: float = 0.2,
    ) -> None:
        """Takes the texts as a file of vectors, or as texts and the sentence-transformers model that reads them."""
        super().__init__()
        if temperature <= 0:
            raise HeadError(f"option temperature of head 'text' is {temperature}, expected above 0")
        options = self.resolve_options({"vectors": vectors, "texts": texts, "model": model})
        self.token_sets = tuple(token_sets)
        self.temperature = temperature
        _, dim = joined_size(shape, token_sets)
        self.vectors: Tensor
        self.register_buffer("vectors", torch.from_numpy(read_vectors(options["vectors"])))
        count, text_dim = self.vectors.shape
        self.project = nn.Sequential(
            nn.Linear(text_dim, hidden), nn.GELU(), Dropout(dropout), nn.Linear(hidden, dim, bias=False)
        )
        self.value = nn.Linear(dim, width)
        self.fuse = ViewQuery(count * width, len(shape.views))
        self.dropout = Dropout(dropout)
        self.classify = nn.Linear(count * width, outputs)

    @classmethod
    def resolve_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with the vectors themselves in ``vectors``, so that a run needs neither file nor text model."""
        vectors, texts, model = (options.get(name) for name in ("vectors", "texts", "model"))
        if vectors:
            if texts or model:
                raise HeadError(
                    "head 'text' was given vectors and texts; expected text.vectors alone, or texts and model"
                )
            return dict(options) | {"vectors": write_vectors(read_vectors(vectors))}
        if not texts or not model:
            raise HeadError(
                "head 'text' needs the texts to look for: --head-option text.vectors=FILE (.npy or .safetensors,"
                " [texts, dim]), or text.model=NAME and text.texts=TEXT once per text"
            )
        found = write_vectors(embed_texts(list(texts), model))
        return dict(options) | {"vectors": found, "texts": (), "model": ""}

    def forward(self, bag: Bag) -> HeadOutput:
        _, attention, pooled = self._attend(bag)
        embedding = self.fuse(pooled, bag.mask.any(2))
        return HeadOutput(self.classify(self.dropout(embedding)), attention.mean(2), embedding=embedding)

    def evidence(self, bag: Bag, output: int) -> Tensor:
        """[batch views slices patches]: what each token adds to the logit under its attention, exactly."""
        tokens, attention, pooled = self._attend(bag)
        share = attention * self.fuse.weigh(pooled, bag.mask.any(2))[:, :, None, None]
        weight = self.classify.weight[output].view(attention.shape[2], -1)
        added = torch.einsum("bvspw,tw,bvts->bvsp", self.value(tokens), weight, share.to(tokens.dtype))
        return added / tokens.shape[3]

    def _attend(self, bag: Bag) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, attention [batch views texts slices] and what it pools [batch views dim]."""
        tokens = join_tokens(bag, self.token_sets)
        slices = tokens.mean(3)
        queries = self.project(self.vectors)
        scores = torch.einsum("bvsd,td->bvts", slices, queries) / (math.sqrt(slices.shape[-1]) * self.temperature)
        attention = masked_softmax(scores, bag.mask[:, :, None], 3)
        pooled = torch.einsum("bvts,bvsw->bvtw", attention.to(slices.dtype), self.value(slices))
        return tokens, attention, pooled.flatten(2)
