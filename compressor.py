"""
The compressors of OSCAR (arXiv 2504.07109, section 3): a query and k documents in, l memory embeddings a document out
(in the generator's embedding space), and, from an extra token RR, the document's relevance score.

    NLayersCompressor     the generator's own first N layers, as a trainable copy
    ModernBERTCompressor  any encoder, or a small decoder, and a two-layer projection
    Compressor            what one of your own has to be

B queries, k documents each, l memory tokens a document, d the generator's hidden size. Everything is padded on the
left, so that the memory tokens always stand last and a slice takes them out:

    a b c MEM MEM RR
    - - x MEM MEM RR      - = padding, hidden by the mask; position ids count from a and from x

Notable: a causal backbone (a decoder) reads the query once. The query comes first, so its keys and values do not depend
on the document, and all k documents are packed after one reading of it (packed.py),

    [query | doc_1 MEM_1..l RR | doc_2 MEM_1..l RR | ... | doc_k MEM_1..l RR]        T = Q + k * S positions

where positions restart after the query in every block: the same numbers as k separate passes over [query doc MEM RR].
With a query of 2 tokens and blocks of 4 the position ids are 0 1 | 2 3 4 5 | 2 3 4 5. An encoder looks both ways and
reads k separate rows.
"""

from importlib import import_module

import torch
import torch.nn.functional as F
from torch import nn

import pretrained
from layout import Layout, PairLayout, TextLayout, left_pad
from packed import only_memory


class Compressor(nn.Module):
    """What compressor_type=module.Class names (docs/mean_pooling.py is one): a subclass with these three methods
    and, if it has a loss of its own, a fourth, auxiliary_loss() (skip.py)."""

    def __init__(self, config, generator):
        """config: a ScaleDownConfig; generator: the frozen causal LM."""
        super().__init__()

    def tokenize(self, queries, documents, k, fixed=False):
        """B queries, B lists of at most k document texts -> a dict of tensors, which forward() takes. What is missing
        of the k is read as an empty document. Masks of real tokens have names that end in "mask". fixed: every batch
        has the same, the largest, shape."""
        raise NotImplementedError

    def forward(self, **batch):
        """What tokenize() returns, on the model's device -> memory (B, k, l, d), scores (B, k), or None without
        enable_reranking."""
        raise NotImplementedError


class BackboneCompressor(Compressor):
    """What both compressors share: a transformer and its tokeniser, the learned tokens, how they read, the score head.

    Raises ValueError when query, document and memory tokens do not fit into the backbone's longest sequence, and for a
    backbone that cannot do what is asked of it (see probe_compressor())."""

    layouts = dict(scaledown=Layout, oscar=PairLayout)  # what it reads, by compressor_layout (layout.py)

    def __init__(self, config, generator, name, backbone):
        super().__init__(config, generator)
        self.config = c = config
        backbone.config.use_cache = False
        self.tokenizer, self.backbone = pretrained.load_tokenizer(name), backbone
        embed = backbone.get_input_embeddings()
        std, width = pretrained.embedding_std(embed), embed.embedding_dim
        self.memory_tokens = nn.Parameter(std * torch.randn(c.num_memory_tokens, width))
        if c.enable_reranking:
            self.rr_token = nn.Parameter(std * torch.randn(1, width))
            self.score_head = nn.Linear(backbone.config.hidden_size, 1)
        self.projection = nn.Identity()
        self.layout = self.layouts[c.compressor_layout](self.tokenizer, c)
        self.longest = self.layout.longest + c.num_memory_tokens + c.enable_reranking
        self.first_position = pretrained.first_position(backbone)
        limit = pretrained.max_positions(backbone) - self.first_position
        if self.longest > limit:
            raise ValueError(f"query, document and memory tokens ({self.longest}) are longer than the compressor's "
                             f"{limit} positions: lower doc_tokens or query_tokens")
        # the packed mask knows no window, and some old architectures have no attention but their own
        self.packed = (any(getattr(m, "is_causal", False) for m in backbone.modules())
                       and not pretrained.other_layers(backbone.config)
                       and self.longest <= (getattr(backbone.config, "sliding_window", None) or self.longest)
                       and backbone._can_set_attn_implementation())
        if self.packed:
            backbone.set_attn_implementation(f"packed_{backbone.config._attn_implementation}")
            only_memory(pretrained.decoder_layers(backbone)[-1], c.num_memory_tokens + c.enable_reranking)
        if self.memory_tokens.device.type != "meta":
            pretrained.probe_compressor(self, name)

    def tokenize(self, queries, documents, k, fixed=False):
        """See Compressor."""
        queries, docs = self.layout.rows(queries, [texts + [""] * (k - len(texts)) for texts in documents])
        if not self.packed:
            rows = [queries[i // k] + d for i, d in enumerate(docs)]
            ids, mask = left_pad(rows, self.layout.longest if fixed else 1)
            return dict(ids=ids.unflatten(0, (-1, k)), mask=mask.unflatten(0, (-1, k)))  # (B, k, T)
        query_ids, query_mask = left_pad(queries, self.layout.longest_query if fixed else 1)
        doc_ids, doc_mask = left_pad(docs, self.layout.longest_document if fixed else 1)
        return dict(query_ids=query_ids, query_mask=query_mask,  # (B, Q)
                    doc_ids=doc_ids.unflatten(0, (-1, k)), doc_mask=doc_mask.unflatten(0, (-1, k)))  # (B, k, D)

    def learned_tokens(self):
        """MEM_1 .. MEM_l and, when reranking, RR: (n, hidden), n = l [+ 1]."""
        return torch.cat([self.memory_tokens, self.rr_token]) if self.config.enable_reranking else self.memory_tokens

    def forward(self, **batch):
        h = self.read(self.learned_tokens(), **batch)  # (B, k, n, hidden)
        scores = None
        if self.config.enable_reranking:  # in float32, under autocast too: bfloat16 has not the digits for 50 documents
            rr, head = h[:, :, -1].float(), self.score_head
            scores = (rr * head.weight.float()).sum(-1) + head.bias.float()
        return self.projection(h[:, :, :self.config.num_memory_tokens]), scores

    def read(self, learned, **batch):
        return (self.read_packed if self.packed else self.read_rows)(learned, **batch)[:, :, -len(learned):]

    def read_packed(self, learned, query_ids, query_mask, doc_ids, doc_mask):
        """(n, hidden), (B, Q), (B, Q), (B, k, D), (B, k, D) -> hidden states of the blocks (B, k, D + n, hidden)"""
        (B, k, D), Q, n = doc_ids.shape, query_ids.shape[1], len(learned)
        embed = self.backbone.get_input_embeddings()
        blocks = torch.cat([embed(doc_ids), learned.expand(B, k, -1, -1)], dim=2)  # (B, k, S, hidden), S = D + n
        x = torch.cat([embed(query_ids), blocks.flatten(1, 2)], dim=1)  # (B, T, hidden), T = Q + k * S

        real = F.pad(doc_mask, (0, n), value=True)  # (B, k, S)
        query_positions = query_mask.long().cumsum(1) - 1  # (B, Q)
        positions = query_positions[:, -1:, None] + real.long().cumsum(2)  # restart after the query in every block
        positions = torch.cat([query_positions, positions.flatten(1)], dim=1).clamp(min=0)  # (B, T)

        causal = torch.ones(D + n, D + n, dtype=torch.bool, device=x.device).tril()
        itself = torch.eye(D + n, dtype=torch.bool, device=x.device)  # padding, too: a softmax over nothing is NaN
        block = real[:, :, None] & causal | itself  # (B, k, S, S), rows look at columns
        query = query_mask[:, None, None].expand(B, k, D + n, Q)
        mask = torch.cat([query, block], dim=3).flatten(0, 1)[:, None]  # (B * k, 1, S, Q + S), see packed.py
        h = self.backbone(inputs_embeds=x, attention_mask=mask, position_ids=positions).last_hidden_state
        return h[:, Q:].unflatten(1, (k, D + n))

    def read_rows(self, learned, ids, mask):
        """(n, hidden), (B, k, T), (B, k, T) -> hidden states of the rows (B, k, T + n, hidden)"""
        B, k, T = ids.shape
        x = torch.cat([self.backbone.get_input_embeddings()(ids), learned.expand(B, k, -1, -1)], dim=2).flatten(0, 1)
        mask = F.pad(mask, (0, len(learned)), value=True).flatten(0, 1)  # (B * k, T + n)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0) + self.first_position
        h = self.backbone(inputs_embeds=x, attention_mask=mask, position_ids=positions).last_hidden_state
        return h.unflatten(0, (B, k))


class NLayersCompressor(BackboneCompressor):
    """The first num_layers layers of the generator, with no head (paper, section 3: "OSCAR-N-Layers"), and with its
    final norm if compressor_norm (the authors' released class drops it: memory is then three times as large for
    SmolLM2). Input embeddings stay the generator's (why: docs/ladder.md). Raises what first_layers() raises."""

    layouts = dict(scaledown=Layout, oscar=TextLayout)

    def __init__(self, config, generator):
        backbone = pretrained.first_layers(config.generator, config.num_layers, config.compressor_norm)
        super().__init__(config, generator, config.generator, backbone)
        self.backbone.get_input_embeddings().requires_grad_(False)


class ModernBERTCompressor(BackboneCompressor):
    """An encoder that reads `[CLS] query [SEP] document [SEP] MEM_1..l RR`, every document as a row of its own, and a
    projection Linear, ReLU, Linear to the generator's hidden size (paper, section 3 and appendix J). compressor_model:
    any encoder or a small decoder (meta-llama/Llama-3.2-1B-Instruct, the paper's OSCAR-llama), by name or folder.

    The projection begins as an isometry, relu(x) - relu(-x) = x, where it is wide enough (projection_hidden twice the
    backbone's hidden size, no larger than the generator's): what the backbone tells apart stays apart. Its output is
    scaled to be as large as the generator's own embeddings, by a factor that is learned from there. Memory tokens begin
    near the encoder's [MASK], if it has one. (Our own; the paper does not say how either begins.)"""

    def __init__(self, config, generator):
        name, embed = config.compressor_model, generator.get_input_embeddings()
        super().__init__(config, generator, name, pretrained.load_backbone(name))
        if self.tokenizer.mask_token_id is not None:  # where an encoder has learned to put what a text leaves open
            mask = self.backbone.get_input_embeddings()(torch.tensor(self.tokenizer.mask_token_id))
            with torch.no_grad():
                self.memory_tokens.mul_(0.3).add_(mask)  # identical ones would take long to become different
        hidden, d = self.backbone.config.hidden_size, embed.embedding_dim
        up, down = nn.Linear(hidden, config.projection_hidden), nn.Linear(config.projection_hidden, d)
        self.projection, self.generator_std = nn.Sequential(up, nn.ReLU(), down), pretrained.embedding_std(embed)
        self.scale = nn.Parameter(torch.ones(1))
        half = config.projection_hidden // 2
        basis = nn.init.orthogonal_(torch.empty(half, hidden))
        back = basis @ torch.eye(hidden, d)  # (half, d)
        with torch.no_grad():
            up.weight[:2 * half], down.weight[:, :2 * half] = torch.cat([basis, -basis]), torch.cat([back, -back]).T
            up.bias.zero_(), down.bias.zero_()

    def forward(self, **batch):
        memory, scores = super().forward(**batch)
        return self.generator_std * self.scale * memory, scores


def compressor_class(name):
    """The class that compressor_type=name stands for. Raises ValueError for none."""
    ours = dict(n_layers=NLayersCompressor, modernbert=ModernBERTCompressor)
    if name in ours:
        return ours[name]
    module, _, class_name = name.rpartition(".")
    try:
        return getattr(import_module(module), class_name)
    except (ImportError, AttributeError, ValueError) as e:
        raise ValueError(f"compressor_type is n_layers, modernbert or module.Class, not '{name}': {e}") from e
