"""
The first N layers with a skip connection: what the layers make is added to embeddings that the generator reads anyway.

    python train.py --compressor_type=skip.SelectNLayersCompressor ..

    document                   a b c d e f g h                         l = 2
    SkipNLayersCompressor      mean(a b c d) + MEM_1, mean(e f g h) + MEM_2
    SelectNLayersCompressor    c + MEM_1, f + MEM_2                    where c and f have the highest scores

with MEM_i for what the layers make of it. Alone, that is read late and little in a small model (docs/ladder.md): hidden
states lie far from the generator's embeddings and close to one another. Added to means of slices or to selected tokens
it gives nothing within some thousand examples either: what is read is the mean or the token. Which tokens to keep the
layers do learn in that time, if told which tokens the answer is made of. (Our own, not the paper's. LLMLingua-2, arXiv
2403.12968, and Provence, arXiv 2501.16214, train a model to classify tokens, and cut the text for an LLM by it.)
"""

import torch
import torch.nn.functional as F
from torch import nn

from compressor import NLayersCompressor
from pretrained import decoder_layers, embedding_std


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

    def skip(self, x, mask):
        """Embeddings and mask as in slice_means() -> what the layers add to, (B, k, l, d)"""
        return slice_means(x, mask, self.config.num_memory_tokens)

    def forward(self, **batch):
        h, scores = super().forward(**batch)  # (B, k, l, d)
        h = F.rms_norm(h.float(), h.shape[-1:])
        x = self.backbone.get_input_embeddings()(batch["doc_ids"])  # the generator's
        skip = F.rms_norm(self.skip(x, batch["doc_mask"]).float(), h.shape[-1:])
        return self.generator_std * (self.skip_gain * skip + self.layers_gain * h), scores


class SelectNLayersCompressor(SkipNLayersCompressor):
    """In place of means the embeddings of l tokens of the document, in its order: those with the highest scores, which
    are products of the layers' hidden states at the tokens with a learned vector. An auxiliary loss teaches them: the
    cross-entropy of a softmax over all tokens of the documents with those that the answer is made of."""

    def __init__(self, config, generator):
        super().__init__(config, generator)
        del decoder_layers(self.backbone)[-1].forward  # only_memory()'s: the document's hidden states are read, too
        self.select = nn.Parameter(0.01 * torch.randn(self.skip_gain.shape[1]))  # of zeros all scores would be equal
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        first = {}  # of the tokens that differ by case or spaces alone; a part of a character is only itself
        same = [first.setdefault(i if "\ufffd" in text else text.strip().lower(), i) for i, text in enumerate(texts)]
        self.register_buffer("same", torch.tensor(same), persistent=False)

    def read_packed(self, learned, **batch):
        h = super().read_packed(learned, **batch)
        self.doc_states = h[:, :, :-len(learned)]  # (B, k, D, d)
        return h

    def skip(self, x, mask):
        """See SkipNLayersCompressor. A document of fewer than l tokens begins with zeros."""
        l, lowest = self.config.num_memory_tokens, torch.finfo(torch.float32).min
        # in float32, under autocast too
        self.scores = (self.doc_states.float() * self.select.float()).sum(-1).masked_fill(~mask, lowest)  # (B, k, D)
        best = F.pad(self.scores, (l, 0), value=lowest).topk(l).indices.sort().values  # (B, k, l)
        x = F.pad(x * mask[..., None], (0, 0, l, 0))
        return x.gather(2, best[..., None].expand(-1, -1, -1, x.shape[-1]))

    def auxiliary_loss(self, batch):
        """A batch of ScaleDown.collate(), which forward() has just read -> the loss, summed over its queries. Every
        token of the answer counts the same, divided among its occurrences; 0 for an answer none of whose tokens
        occurs."""
        docs, labels = batch["compressor"], batch["labels"]  # (B, A)
        answer = torch.where(labels < 0, -1, self.same[labels.clamp(min=0)])
        occurs = (self.same[docs["doc_ids"]][..., None] == answer[:, None, None]) & docs["doc_mask"][..., None]
        target = (occurs / occurs.sum((1, 2), keepdim=True).clamp(min=1)).sum(-1).flatten(1)  # (B, k * D)
        target = target / target.sum(1, keepdim=True).clamp(min=1)
        return -(target * self.scores.flatten(1).log_softmax(1)).sum()
