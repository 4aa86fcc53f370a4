"""
skip.py's memory without the layers: what the generator makes of the means of slices alone.

    PYTHONPATH=docs:docs/ladder python train.py --compressor_type=means.Means ..
"""

import torch
import torch.nn.functional as F
from mean_pooling import MeanPooling
from torch import nn

from pretrained import embedding_std
from skip import slice_means


class Means(MeanPooling):
    def __init__(self, config, generator):
        super().__init__(config, generator)
        self.embed.requires_grad_(False)
        self.generator_std = embedding_std(generator.get_input_embeddings())
        self.linear = None
        self.gain = nn.Parameter(torch.ones(config.num_memory_tokens, self.embed.embedding_dim))

    def forward(self, ids, doc_mask):
        mean = slice_means(self.embed(ids), doc_mask, self.config.num_memory_tokens).float()
        return self.generator_std * self.gain * F.rms_norm(mean, mean.shape[-1:]), None
