"""
The first N layers with a skip connection: a memory embedding begins as the mean embedding of its slice of the document,
to which the layers learn to add:

    python train.py --compressor_type=skip.SkipNLayersCompressor ..

    document    a b c d e f g h       l = 2
    slices      a b c d | e f g h
    memory      mean(a b c d) + what the layers make of MEM_1, mean(e f g h) + what they make of MEM_2

What the layers of a small model make, alone, is read late and little (docs/ladder.md): their hidden states lie far
from the generator's embeddings and close to one another. (Our own, not the paper's.)
"""

import torch
import torch.nn.functional as F
from torch import nn

from compressor import NLayersCompressor
from pretrained import embedding_std


def slice_means(x, mask, l):
    """Embeddings x (B, k, D, d) of documents with mask (B, k, D) -> the mean of each of l slices, (B, k, l, d). Slices
    of a document differ by one token at most; of a document of fewer than l tokens some are empty, and 0."""
    n = mask.sum(-1, keepdim=True).clamp(min=1)
    slices = (mask.cumsum(-1) - 1) * l // n  # which slice of its document a token belongs to, (B, k, D)
    belongs = F.one_hot(slices.clamp(min=0), l) * mask[..., None]  # (B, k, D, l); padding belongs to none
    mean = belongs / belongs.sum(-2, keepdim=True).clamp(min=1)
    return mean.to(x.dtype).transpose(-1, -2) @ x


class SkipNLayersCompressor(NLayersCompressor):
    """Both parts are scaled to the size of the generator's embeddings, and multiplied by learned gains, one for each
    dimension of each memory embedding: 1 at first for the mean, 0.1 for what the layers make. Raises ValueError where
    the generator's layers cannot be packed."""

    def __init__(self, config, generator):
        super().__init__(config, generator)
        if not self.packed:
            raise ValueError(f"{config.generator} cannot be read packed, which SkipNLayersCompressor needs")
        embed, l = generator.get_input_embeddings(), config.num_memory_tokens
        self.generator_std = embedding_std(embed)
        self.skip_gain = nn.Parameter(torch.ones(l, embed.embedding_dim))
        self.layers_gain = nn.Parameter(torch.full((l, embed.embedding_dim), 0.1))

    def forward(self, **batch):
        h, scores = super().forward(**batch)  # (B, k, l, d)
        x = self.backbone.get_input_embeddings()(batch["doc_ids"])  # the generator's
        mean = slice_means(x, batch["doc_mask"], h.shape[2])
        mean, h = (F.rms_norm(t.float(), t.shape[-1:]) for t in (mean, h))
        return self.generator_std * (self.skip_gain * mean + self.layers_gain * h), scores
