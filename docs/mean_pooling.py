r"""A compressor of one's own: a document's token embeddings, the mean of each of l slices, and a linear layer.

    PYTHONPATH=docs python train.py config/toy.py --compressor_type=mean_pooling.MeanPooling --max_iters=20 \
        --out_dir=out/mean
"""

from torch import nn

from compressor import Compressor, left_pad
from pretrained import load_tokenizer, plain_text
from skip import slice_means


class MeanPooling(Compressor):
    def __init__(self, config, generator):
        super().__init__(config, generator)
        self.config, self.tokenizer = config, load_tokenizer(config.generator)
        self.plain = plain_text(self.tokenizer)  # nothing in a document becomes a control token
        table = generator.get_input_embeddings().weight.detach().float()  # (V, d)
        self.embed = nn.Embedding.from_pretrained(table.clone(), freeze=False)
        self.linear = nn.Linear(table.shape[1], table.shape[1])

    def tokenize(self, queries, documents, k, fixed=False):
        texts = [self.plain(d) for docs in documents for d in docs + [""] * (k - len(docs))]
        c = self.config
        ids = self.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=c.doc_tokens).input_ids
        ids, mask = left_pad(ids, c.doc_tokens if fixed else 1)
        return dict(ids=ids.view(len(queries), k, -1), doc_mask=mask.view(len(queries), k, -1))  # (B, k, D)

    def forward(self, ids, doc_mask):
        return self.linear(slice_means(self.embed(ids), doc_mask, self.config.num_memory_tokens)), None  # (B, k, l, d)
