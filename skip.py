"""
The first N layers with a skip connection: a memory embedding begins as the mean embedding of its slice of the document,
to which the layers learn to add:

    python train.py --compressor_type=skip.PointerNLayersCompressor ..

    document    a b c d e f g h       l = 2
    slices      a b c d | e f g h
    memory      mean(a b c d) + what the layers make of MEM_1, mean(e f g h) + what they make of MEM_2

What the layers of a small model make, alone, is read late and little (docs/ladder.md): their hidden states lie far
from the generator's embeddings and close to one another. Within some thousand examples they add nothing to a mean
either. What such a run does learn is which tokens the means should be made of, whatever the passage:
PointerNLayersCompressor. (Our own, not the paper's.)
"""

import torch
import torch.nn.functional as F
from torch import nn

from compressor import NLayersCompressor
from pretrained import embedding_std


def in_slices(mask, l):
    """Mask (B, k, D) of documents -> whether a token belongs to each of l slices, (B, k, D, l). Slices of a document
    differ by one token at most; of a document of fewer than l tokens some are empty. Padding belongs to none."""
    n = mask.sum(-1, keepdim=True).clamp(min=1)
    slices = (mask.cumsum(-1) - 1) * l // n  # (B, k, D)
    return F.one_hot(slices.clamp(min=0), l).bool() & mask[..., None]


def slice_means(x, mask, l):
    """Embeddings x (B, k, D, d) of documents with mask (B, k, D) -> the mean of each slice, (B, k, l, d); of an empty
    one 0."""
    belongs = in_slices(mask, l)
    mean = belongs / belongs.sum(-2, keepdim=True).clamp(min=1)
    return mean.to(x.dtype).transpose(-1, -2) @ x


class SkipNLayersCompressor(NLayersCompressor):
    """Both parts are scaled to the size of the generator's embeddings, and multiplied by learned gains, one for each
    dimension of each memory embedding: 1 at first for the mean, 0.1 for what the layers make. Raises ValueError where
    the generator's layers cannot be packed."""

    def __init__(self, config, generator):
        super().__init__(config, generator)
        if not self.packed:
            raise ValueError(f"{config.generator} cannot be read packed, which {type(self).__name__} needs")
        embed, l = generator.get_input_embeddings(), config.num_memory_tokens
        self.generator_std = embedding_std(embed)
        self.skip_gain = nn.Parameter(torch.ones(l, embed.embedding_dim))
        self.layers_gain = nn.Parameter(torch.full((l, embed.embedding_dim), 0.1))

    def means(self, h, x, mask):
        """h (B, k, l, d), what the layers make at MEM, and x and mask as in slice_means() -> (B, k, l, d)"""
        return slice_means(x, mask, h.shape[2])

    def forward(self, **batch):
        h, scores = super().forward(**batch)  # (B, k, l, d)
        h = F.rms_norm(h.float(), h.shape[-1:])
        x = self.backbone.get_input_embeddings()(batch["doc_ids"])  # the generator's
        means = self.means(h, x, batch["doc_mask"]).float()
        return self.generator_std * (self.skip_gain * F.rms_norm(means, h.shape[-1:]) + self.layers_gain * h), scores


class PointerNLayersCompressor(SkipNLayersCompressor):
    """The means are weighted: what the layers make at a memory token is, by a learned matrix and bias, a pointer, and
    the weights of the tokens of its slice are a softmax over the products of their embeddings with it. Both begin as 0,
    where all tokens weigh the same."""

    def __init__(self, config, generator):
        super().__init__(config, generator)
        d = self.skip_gain.shape[1]
        self.point, self.point_bias = nn.Parameter(torch.zeros(d, d)), nn.Parameter(torch.zeros(d))

    def means(self, h, x, mask):
        """See SkipNLayersCompressor."""
        l, d = h.shape[2:]
        # A step of Adam moves every parameter by about the learning rate. 1 / d makes a step of the matrix change a
        # product about as much as one of the bias; with the factor 4 both learn sooner (docs/ladder.md).
        pointers = 4 * (h @ self.point.float() / d + self.point_bias)  # (B, k, l, d)
        products = F.rms_norm(x.float(), (d,)) @ pointers.transpose(-1, -2)  # (B, k, D, l)
        belongs = in_slices(mask, l)
        weights = products.masked_fill(~belongs, torch.finfo(products.dtype).min).softmax(-2) * belongs
        return weights.to(x.dtype).transpose(-1, -2) @ x
