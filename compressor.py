"""
The compressors of OSCAR (arXiv 2504.07109, section 3): a query and k documents in, l memory embeddings a document out
(in the generator's embedding space), and, from an extra token RR, the document's relevance score.

    NLayersCompressor     the generator's own first N layers, as a trainable copy
    ModernBERTCompressor  any encoder, or a small decoder, and a two-layer projection

B queries, k documents each, l memory tokens a document, d the generator's hidden size. Everything is padded on the
left, so that the memory tokens always stand last: a slice takes them out.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, logging


def left_pad(rows, width=1):
    """Lists of token ids -> ids and mask (True = real), both (len(rows), longest), padded on the left with id 0
    (any id would do: padding is masked out). width: the least length."""
    width = max(width, max(len(row) for row in rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width) >= width - lengths[:, None]


def embedding_std(embed):
    """How large the embeddings are that a model is used to: learned ones start so too. Asked of the module, not of its
    weight, because some models (Gemma) scale inside it."""
    with torch.no_grad():
        return embed(torch.arange(min(1000, embed.num_embeddings))).float().std().item()


class Compressor(nn.Module):
    """What both compressors share: the tokeniser, the learned tokens, the score head.

    Raises ValueError when query, document and memory tokens do not fit into the backbone's longest sequence."""

    def __init__(self, tokenizer, backbone, num_memory_tokens, enable_reranking, query_tokens, doc_tokens):
        super().__init__()
        backbone.config.use_cache = False
        self.tokenizer, self.backbone = tokenizer, backbone
        self.num_memory_tokens, self.query_tokens, self.doc_tokens = num_memory_tokens, query_tokens, doc_tokens
        embed = backbone.get_input_embeddings()
        std, width = embedding_std(embed), embed.embedding_dim
        self.memory_tokens = nn.Parameter(std * torch.randn(num_memory_tokens, width))
        self.enable_reranking = enable_reranking
        if enable_reranking:
            self.rr_token = nn.Parameter(std * torch.randn(1, width))
            self.score_head = nn.Linear(backbone.config.hidden_size, 1)
        # [CLS] query [SEP] document [SEP] for an encoder, BOS query \n document for a decoder
        t = tokenizer
        start = t.cls_token_id if t.cls_token_id is not None else t.bos_token_id
        self.start = [] if start is None else [start]
        self.end = [] if t.sep_token_id is None else [t.sep_token_id]
        # some tokenisers (SentencePiece) put a space at the start of every text: not of a newline within one
        self.between = self.end or t("x\n", add_special_tokens=False).input_ids[len(self.tokens(["x"], 9)[0]):]
        self.longest = (len(self.start + self.between + self.end) + query_tokens + doc_tokens + num_memory_tokens
                        + enable_reranking)
        # RoBERTa and its kin count positions from padding_idx + 1
        table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
        self.first_position = 0 if getattr(table, "padding_idx", None) is None else table.padding_idx + 1
        limit = (getattr(backbone.config, "max_position_embeddings", None) or self.longest) - self.first_position
        if self.longest > limit:
            raise ValueError(f"query, document and memory tokens ({self.longest}) are longer than the compressor's "
                             f"{limit} positions: lower doc_tokens or query_tokens")

    def tokens(self, texts, max_tokens):
        """The first max_tokens token ids of each text, no special tokens."""
        return self.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=max_tokens).input_ids

    def learned_tokens(self):
        """MEM_1 .. MEM_l and, when reranking, RR: (l [+ 1], hidden)."""
        return torch.cat([self.memory_tokens, self.rr_token]) if self.enable_reranking else self.memory_tokens

    def scores(self, h):
        """Hidden states at MEM and RR (B, k, l + 1, hidden) -> relevance scores (B, k); None when not reranking."""
        return self.score_head(h[:, :, -1]).squeeze(-1) if self.enable_reranking else None


class NLayersCompressor(Compressor):
    """The first N layers of the generator, with its final norm but no head (paper, section 3: "OSCAR-N-Layers").

    The layers are causal and the query comes first, so its keys and values do not depend on the document. All k
    documents are therefore packed behind one reading of the query,

        [query | doc_1 MEM_1..l RR | doc_2 MEM_1..l RR | ... | doc_k MEM_1..l RR]

    where a token sees the query and, causally, its own block, and positions restart behind the query in every block:
    the same numbers as k separate passes over [query doc MEM RR], but the query is computed once.

    Raises ValueError where num_layers is not within the generator's, or its layers are not all of attention that a
    mask and position ids decide.
    """

    def __init__(self, generator, num_layers=8, num_memory_tokens=8, enable_reranking=False, query_tokens=64,
                 doc_tokens=128):
        config = AutoConfig.from_pretrained(generator)
        if not 1 <= num_layers <= config.num_hidden_layers:
            raise ValueError(f"num_layers={num_layers}, but {generator} has {config.num_hidden_layers} layers")
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):  # models that mix full and sliding attention name each layer's kind
            config.layer_types = config.layer_types[:num_layers]
        kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", [])
        other = {*kinds} - {"full_attention", "sliding_attention", "global"}
        if other:  # a recurrence or a convolution would carry one document over into the next
            raise ValueError(f"{generator} has layers of type {other.pop()}: n_layers needs plain attention in all")
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # or a table of the layers beyond N, which are left out on purpose
        backbone = AutoModel.from_pretrained(generator, config=config, dtype=torch.float32)
        logging.set_verbosity(verbosity)
        super().__init__(AutoTokenizer.from_pretrained(generator), backbone, num_memory_tokens, enable_reranking,
                         query_tokens, doc_tokens)
        window = getattr(config, "sliding_window", None) or self.longest
        if self.longest > window:  # the mask below knows no window
            raise ValueError(f"query, document and memory tokens ({self.longest}) are longer than the attention window "
                             f"of {generator} ({window}): lower doc_tokens or query_tokens")

    def tokenize(self, queries, documents, k, fixed=False):
        """B queries, B lists of at most k document texts -> the tensors that forward() takes. A document that is
        missing is a block of padding. fixed: every batch has the same, the largest, shape."""
        rows = [self.start + q + self.between for q in self.tokens(queries, self.query_tokens)]
        query_ids, query_mask = left_pad(rows, len(self.start + self.between) + self.query_tokens if fixed else 1)
        texts = [d for docs in documents for d in docs + [""] * (k - len(docs))]
        rows = [d + self.end for d in self.tokens(texts, self.doc_tokens)]
        doc_ids, doc_mask = left_pad(rows, self.doc_tokens + len(self.end) if fixed else 1)
        B = len(queries)
        return dict(query_ids=query_ids, query_mask=query_mask,  # (B, Q)
                    doc_ids=doc_ids.view(B, k, -1), doc_mask=doc_mask.view(B, k, -1))  # (B, k, D)

    def forward(self, query_ids, query_mask, doc_ids, doc_mask):
        """(B, Q), (B, Q), (B, k, D), (B, k, D) -> memory (B, k, l, d), scores (B, k) or None"""
        (B, k, D), Q = doc_ids.shape, query_ids.shape[1]
        learned = self.learned_tokens()
        S = D + len(learned)  # the length of a document's block
        embed = self.backbone.get_input_embeddings()
        blocks = torch.cat([embed(doc_ids), learned.expand(B, k, -1, -1)], dim=2)  # (B, k, S, d)
        x = torch.cat([embed(query_ids), blocks.flatten(1, 2)], dim=1)  # (B, T, d), T = Q + k * S

        real = F.pad(doc_mask, (0, len(learned)), value=True)  # (B, k, S)
        query_positions = query_mask.long().cumsum(1) - 1  # (B, Q)
        positions = query_positions[:, -1:, None] + real.long().cumsum(2)  # restart after the query in every block
        positions = torch.cat([query_positions, positions.flatten(1)], dim=1).clamp(min=0)  # (B, T)

        i = torch.arange(Q + k * S, device=x.device)
        block = (i - Q).div(S, rounding_mode="floor").clamp(min=-1)  # -1 = the query
        sees = (i[:, None] >= i) & ((block == -1) | (block[:, None] == block))  # (T, T), rows look at columns
        keys = torch.cat([query_mask, real.flatten(1)], dim=1)  # (B, T)
        # padding sees itself: a softmax over nothing is NaN
        mask = (sees & keys[:, None] | torch.eye(len(i), dtype=torch.bool, device=x.device))[:, None]  # (B, 1, T, T)

        if self.backbone.config._attn_implementation == "eager":  # Gemma 2: adds the mask to the attention's logits
            mask = torch.zeros(mask.shape, device=x.device).masked_fill(~mask, torch.finfo(x.dtype).min)
        h = self.backbone(inputs_embeds=x, attention_mask=mask, position_ids=positions)
        h = h.last_hidden_state[:, Q:].unflatten(1, (k, S))[:, :, D:]  # (B, k, l [+ 1], d)
        return h[:, :, :self.num_memory_tokens], self.scores(h)


class ModernBERTCompressor(Compressor):
    """An encoder that reads `[CLS] query [SEP] document [SEP] MEM_1..l RR`, every document as a row of its own
    (attention looks both ways, so there is no reading of the query to share), and a projection Linear, ReLU, Linear to
    the generator's hidden size (paper, section 3 and appendix J).

    compressor_model: any encoder (answerdotai/ModernBERT-base) or a small decoder (meta-llama/Llama-3.2-1B-Instruct,
    the paper's OSCAR-llama), by name or folder.
    """

    def __init__(self, compressor_model, generator_hidden, projection_hidden=8096, num_memory_tokens=8,
                 enable_reranking=False, query_tokens=64, doc_tokens=128):
        backbone = AutoModel.from_pretrained(compressor_model, dtype=torch.float32)
        if hasattr(backbone, "pooler"):  # BERT's, for [CLS]: it would never get a gradient here
            backbone.pooler = None
        super().__init__(AutoTokenizer.from_pretrained(compressor_model), backbone, num_memory_tokens,
                         enable_reranking, query_tokens, doc_tokens)
        self.projection = nn.Sequential(nn.Linear(backbone.config.hidden_size, projection_hidden), nn.ReLU(),
                                        nn.Linear(projection_hidden, generator_hidden))

    def tokenize(self, queries, documents, k, fixed=False):
        """B queries, B lists of at most k document texts -> the tensors that forward() takes. A document that is
        missing is read as an empty one. fixed: every batch has the same, the largest, shape."""
        texts = [d for docs in documents for d in docs + [""] * (k - len(docs))]
        docs = self.tokens(texts, self.doc_tokens)
        rows = [self.start + q + self.between for q in self.tokens(queries, self.query_tokens) for _ in range(k)]
        rows = [q + d + self.end for q, d in zip(rows, docs)]
        ids, mask = left_pad(rows, self.longest - self.num_memory_tokens - self.enable_reranking if fixed else 1)
        B = len(queries)
        return dict(ids=ids.view(B, k, -1), mask=mask.view(B, k, -1))  # (B, k, T)

    def forward(self, ids, mask):
        """(B, k, T), (B, k, T) -> memory (B, k, l, d), scores (B, k) or None"""
        B, k, T = ids.shape
        learned = self.learned_tokens()
        x = torch.cat([self.backbone.get_input_embeddings()(ids), learned.expand(B, k, -1, -1)], dim=2).flatten(0, 1)
        mask = F.pad(mask, (0, len(learned)), value=True).flatten(0, 1)  # (B * k, T + l [+ 1])
        positions = (mask.long().cumsum(1) - 1).clamp(min=0) + self.first_position
        h = self.backbone(inputs_embeds=x, attention_mask=mask, position_ids=positions)
        h = h.last_hidden_state[:, T:].unflatten(0, (B, k))  # (B, k, l [+ 1], hidden)
        return self.projection(h[:, :, :self.num_memory_tokens]), self.scores(h)
