"""
PISCO's compressor (arXiv 2501.16075): all layers of the generator read a document, without the query, with a LoRA of
their own. There is one copy of the weights, on which two adapters are switched:

    python train.py --compressor_type=pisco.PISCOCompressor --query_dependent=False ..
"""

import torch
import torch.nn.functional as F
from torch import nn

from compressor import Compressor
from layout import left_pad
from lora import layers, other_adapter
from pretrained import embedding_std, load_tokenizer, max_positions, plain_text


class PISCOCompressor(Compressor):
    """Reads `<ENC> BOS document EOS`, the first doc_tokens + 3 tokens of it, and then MEM_1..l; the memory is what the
    generator's final norm gives at MEM. <ENC> and MEM are learned. The LoRA has the rank, alpha and dropout of the
    generator's. Raises ValueError for settings that do not go with it."""

    shares_generator = True

    def __init__(self, config, generator):
        super().__init__(config, generator)
        if config.query_dependent or config.enable_reranking or config.compressor_lora_r:
            raise ValueError("PISCOCompressor reads documents without the query, with a LoRA of its own: it takes "
                             "query_dependent=False, enable_reranking=False and compressor_lora_r=0")
        self.longest = config.doc_tokens + 3
        n, limit = self.longest + config.num_memory_tokens, max_positions(generator)
        if n > limit:
            raise ValueError(f"document and memory tokens ({n}) are longer than the generator's {limit} positions: "
                             "lower doc_tokens")
        self.config, self.tokenizer = config, load_tokenizer(config.generator)
        self.plain = plain_text(self.tokenizer)
        self.generator = [generator]  # in a list: it is not the compressor's to save
        embed = generator.get_input_embeddings()
        std, width = embedding_std(embed), embed.embedding_dim
        self.memory_tokens = nn.Parameter(std * torch.randn(config.num_memory_tokens, width))
        self.enc_token = nn.Parameter(std * torch.randn(1, width))
        adapted = [m for _, m in layers(generator)]
        self.lora_A = nn.ParameterList(m.lora_A.detach().clone() for m in adapted)
        self.lora_B = nn.ParameterList(m.lora_B.detach().clone() for m in adapted)

    def tokenize(self, queries, documents, k, fixed=False):
        """See Compressor. <ENC> has the id 0, in whose place forward() puts its embedding."""
        texts = [self.plain(d) for docs in documents for d in docs + [""] * (k - len(docs))]
        t, longest = self.tokenizer, self.longest
        start, end = ([] if i is None else [i] for i in (t.bos_token_id, t.eos_token_id))
        rows = t(texts, add_special_tokens=False, truncation=True, max_length=longest).input_ids
        ids, mask = left_pad([[0, *start, *row, *end][:longest] for row in rows], longest if fixed else 1)
        return dict(ids=ids.view(len(queries), k, -1), mask=mask.view(len(queries), k, -1))  # (B, k, T)

    def forward(self, ids, mask):
        """(B, k, T), (B, k, T) -> memory (B, k, l, d), None"""
        (B, k, T), (generator,) = ids.shape, self.generator
        mask = F.pad(mask, (0, len(self.memory_tokens)), value=True).flatten(0, 1)  # (B * k, T + l)
        count = mask.long().cumsum(1)
        x = generator.get_input_embeddings()(ids.flatten(0, 1))  # (B * k, T, d)
        x = torch.where(count[:, :T, None] == 1, self.enc_token.to(x.dtype), x)  # the first that is real
        x = torch.cat([x, self.memory_tokens.to(x.dtype).expand(B * k, -1, -1)], dim=1)
        with other_adapter(generator, [*zip(self.lora_A, self.lora_B)]):
            h = generator.base_model(inputs_embeds=x, attention_mask=mask, position_ids=(count - 1).clamp(min=0),
                                     use_cache=False).last_hidden_state
        return h[:, T:].unflatten(0, (B, k)), None
