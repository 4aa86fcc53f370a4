"""
The compressors of OSCAR (arXiv 2504.07109, section 3): a query and k documents in, l memory embeddings a document out
(in the generator's embedding space), and, from an extra token RR, the document's relevance score.

    NLayersCompressor     the generator's own first N layers, as a trainable copy
    ModernBERTCompressor  any encoder, or a small decoder, and a two-layer projection

B queries, k documents each, l memory tokens a document, d the generator's hidden size. Everything is padded on the
left, so that the memory tokens always stand last: a slice takes them out.

A causal backbone (a decoder) reads the query once. The query comes first, so its keys and values do not depend on the
document, and all k documents are packed behind one reading of it,

    [query | doc_1 MEM_1..l RR | doc_2 MEM_1..l RR | ... | doc_k MEM_1..l RR]        T = Q + k * S positions

where a token sees the query and, causally, its own block, and positions restart behind the query in every block: the
same numbers as k separate passes over [query doc MEM RR]. An encoder looks both ways and reads k separate rows.
"""

import inspect
import sys
from contextlib import suppress
from functools import partial
from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AutoModel, logging

from pretrained import first_line, first_position, load_config, load_model, load_tokenizer, plain_text


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


def layer_list(backbone):
    return next(m for m in backbone.modules() if isinstance(m, nn.ModuleList)
                and len(m) == backbone.config.num_hidden_layers)


# ---- attention over the packed sequence, in the place of transformers' own

def beside_query(x, Q, k):
    """Every document's block with the query before it: (B, G, Q + k * S, c) -> (B * k, G, Q + S, c)."""
    query, blocks = x[:, :, None, :Q], x[:, :, Q:].unflatten(2, (k, -1))
    return torch.cat([query.expand(-1, -1, k, -1, -1), blocks], dim=3).transpose(1, 2).flatten(0, 1)


def attend(module, q, k, v, mask, eager, scaling, dropout, **kwargs):
    """q (R, H, L, c), k and v (R, G, L', c), G dividing H, mask (R, 1, L, L') -> (R, L, H, c)"""
    if eager:  # a model's own: Gemma 2 caps the logits, and PyTorch/XLA's autocast knows no other
        mask = torch.zeros(mask.shape, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
        attention = sys.modules[type(module).__module__].eager_attention_forward
        return attention(module, q, k, v, mask, scaling=scaling, dropout=dropout, **kwargs)[0]
    # the H / G heads that share keys and values are more rows of one head: nothing is copied for them but the mask
    (G, L), shared = (k.shape[1], q.shape[2]), q.shape[1] // k.shape[1]
    y = F.scaled_dot_product_attention(q.unflatten(1, (G, shared)).flatten(2, 3), k, v, mask.repeat(1, 1, shared, 1),
                                       dropout_p=dropout, scale=scaling)
    return y.unflatten(2, (shared, L)).flatten(1, 2).transpose(1, 2)


def packed_attention(module, q, k, v, attention_mask, eager, scaling=None, dropout=0.0, **kwargs):
    """What transformers calls in every layer. q (B, H, T, c), k and v (B, G, T, c), attention_mask (B * k, 1, S,
    Q + S), which says what a block sees of the query and of itself -> (B, T, H, c). The query attends to itself, and
    the blocks, as rows, to the query and themselves: Q^2 + k * S * (Q + S) products where a mask over the whole would
    take T^2."""
    mask = attention_mask
    S, Q = mask.shape[2], mask.shape[3] - mask.shape[2]
    attention = partial(attend, module, eager=eager, scaling=scaling, dropout=dropout, **kwargs)
    if len(q) == len(mask) and q.shape[2] == S:  # the last layer's, rows already
        return attention(q, k, v, mask).contiguous(), None
    B, documents = len(q), len(mask) // len(q)
    causal = torch.ones(Q, Q, dtype=torch.bool, device=q.device).tril()
    itself = torch.eye(Q, dtype=torch.bool, device=q.device)
    query_mask = mask[::documents, :, -1:, :Q] & causal | itself  # (B, 1, Q, Q)
    # contiguous: torch.compile's backward pass on a CPU takes views of another length for the ones that it has kept
    y_query = attention(*(t[:, :, :Q].contiguous() for t in (q, k, v)), query_mask)
    blocks = q[:, :, Q:].unflatten(2, (documents, S)).transpose(1, 2).flatten(0, 1)  # (B * k, H, S, c)
    y = attention(blocks, beside_query(k, Q, documents), beside_query(v, Q, documents), mask)  # (B * k, S, H, c)
    return torch.cat([y_query, y.reshape(B, documents * S, *y.shape[2:])], dim=1), None


AttentionInterface.register("packed_sdpa", partial(packed_attention, eager=False))
AttentionInterface.register("packed_eager", partial(packed_attention, eager=True))


class KeysAndValues:
    """What the last layer takes for its cache: a first call stops where it hands over the keys and values of all
    positions, a second one gets them back."""

    class Taken(Exception):
        pass

    kept = None

    def update(self, k, v, *_, **__):
        if self.kept is None:
            self.kept = k, v
            raise self.Taken
        return self.kept


def only_memory(layer, n):
    """Makes a decoder layer compute its output for the last n positions of every block alone, MEM and RR, which is all
    that anything reads of the last layer; elsewhere its output is 0. The others get no further than keys and values
    (and the queries that layers compute along with them: a hundredth of what 8 layers of Mistral-7B cost; MEM and RR,
    which are few, come twice)."""
    call = inspect.unwrap(type(layer).forward)
    signature = inspect.signature(call)
    # transformers' layers name it in three ways
    cache_name = next(name for name in ("cache", "past_key_values", "layer_past") if name in signature.parameters)

    def forward(layer, *args, **kwargs):
        bound = signature.bind(layer, *args, **kwargs)
        x, mask = bound.arguments["hidden_states"], bound.arguments["attention_mask"]
        B, k, S, Q = len(x), len(mask) // len(x), mask.shape[2], mask.shape[3] - mask.shape[2]

        def cut(a):
            """Of what has a value for every position, (B, T, ..), those of MEM and RR: (B * k, n, ..)"""
            if isinstance(a, torch.Tensor) and a.shape[:2] == x.shape[:2]:
                return a[:, Q:].unflatten(1, (k, S))[:, :, -n:].flatten(0, 1)
            return a

        cache = bound.arguments[cache_name] = KeysAndValues()
        with suppress(KeysAndValues.Taken):
            call(*bound.args, **bound.kwargs)
        cache.kept = [beside_query(t, Q, k) for t in cache.kept]
        bound.arguments.update(tree_map(cut, dict(bound.arguments)), attention_mask=mask[:, :, -n:])
        out = call(*bound.args, **bound.kwargs)
        h = out[0] if isinstance(out, tuple) else out  # (B * k, n, d)
        h = F.pad(F.pad(h, (0, 0, S - n, 0)).reshape(B, k * S, -1), (0, 0, Q, 0))  # (B, T, d)
        return (h, *out[1:]) if isinstance(out, tuple) else h

    layer.forward = MethodType(forward, layer)


class Compressor(nn.Module):
    """What both compressors share: the tokeniser, the learned tokens, how they read, the score head.

    Raises ValueError when query, document and memory tokens do not fit into the backbone's longest sequence, and for a
    backbone that cannot do what is asked of it (see probe())."""

    def __init__(self, name, backbone, num_memory_tokens, enable_reranking, query_dependent, query_tokens, doc_tokens):
        super().__init__()
        backbone.config.use_cache = False
        self.tokenizer, self.backbone = load_tokenizer(name), backbone
        self.plain = plain_text(self.tokenizer)
        self.num_memory_tokens, self.query_tokens, self.doc_tokens = num_memory_tokens, query_tokens, doc_tokens
        embed = backbone.get_input_embeddings()
        std, width = embedding_std(embed), embed.embedding_dim
        self.memory_tokens = nn.Parameter(std * torch.randn(num_memory_tokens, width))
        self.enable_reranking = enable_reranking
        if enable_reranking:
            self.rr_token = nn.Parameter(std * torch.randn(1, width))
            self.score_head = nn.Linear(backbone.config.hidden_size, 1)
        self.projection = nn.Identity()
        # [CLS] query [SEP] document [SEP] for an encoder, BOS query \n document for a decoder
        t = self.tokenizer
        start = t.cls_token_id if t.cls_token_id is not None else t.bos_token_id
        self.start = [] if start is None else [start]
        self.end = [] if t.sep_token_id is None else [t.sep_token_id]
        # some tokenisers (SentencePiece) put a space at the start of every text: not of a newline within one
        self.between = self.end or t("x\n", add_special_tokens=False).input_ids[len(self.tokens(["x"], 9)[0]):]
        self.query_dependent = query_dependent
        self.longest_query = max(1, len(self.start + self.between * query_dependent) + query_tokens * query_dependent)
        self.longest = self.longest_query + doc_tokens + len(self.end) + num_memory_tokens + enable_reranking
        self.first_position = first_position(backbone)
        config = backbone.config
        limit = (getattr(config, "max_position_embeddings", None) or self.longest) - self.first_position
        if self.longest > limit:
            raise ValueError(f"query, document and memory tokens ({self.longest}) are longer than the compressor's "
                             f"{limit} positions: lower doc_tokens or query_tokens")
        # the packed mask knows no window, and some old architectures have no attention but their own
        self.packed = (any(getattr(m, "is_causal", False) for m in backbone.modules()) and not other_layers(config)
                       and self.longest <= (getattr(config, "sliding_window", None) or self.longest)
                       and backbone._can_set_attn_implementation())
        if self.packed:
            backbone.set_attn_implementation(f"packed_{config._attn_implementation}")
            only_memory(layer_list(backbone)[-1], num_memory_tokens + enable_reranking)
        if self.memory_tokens.device.type != "meta":
            self.probe(name)

    def probe(self, name):
        """Reads a document alone and next to a longer one: both must give the same hidden states, or padding or the
        neighbour is seen. Parameters of rows' backbones that this does not use (Longformer's global attention) are
        frozen: they would never get a gradient, which DDP waits for. Raises ValueError in one line."""
        read = lambda *docs: self.read(self.learned_tokens(), **self.tokenize(["x"], [[*docs]], len(docs)))[0, 0]
        try:
            with torch.no_grad():
                together = read("x", "x " * min(16, self.doc_tokens))
            with torch.set_grad_enabled(not self.packed):
                alone = read("x")
            if not self.packed:
                alone.sum().backward()
        except Exception as e:  # each architecture fails in its own way
            raise ValueError(f"{name} cannot be a compressor: {first_line(e)}") from e
        if not torch.allclose(alone, together, rtol=0, atol=1e-3 * together.abs().max().item()):
            raise ValueError(f"{name} cannot be a compressor: next to a longer document it reads one differently than "
                             "alone, as it does not heed the attention mask")
        for p in self.backbone.parameters() if not self.packed else ():
            p.requires_grad_(p.grad is not None)
        self.zero_grad()

    def tokens(self, texts, max_tokens):
        """The first max_tokens token ids of each text, no special tokens."""
        return self.tokenizer([self.plain(text) for text in texts], add_special_tokens=False, truncation=True,
                              max_length=max_tokens).input_ids

    def tokenize(self, queries, documents, k, fixed=False):
        """B queries, B lists of at most k document texts -> the tensors that forward() takes. A document that is
        missing is read as an empty one. Without query_dependent the query is left out (PISCO, arXiv 2501.16075). fixed:
        every batch has the same, the largest, shape."""
        queries = [self.start + q + self.between if self.query_dependent else self.start
                   for q in self.tokens(queries, self.query_tokens)]
        texts = [d for docs in documents for d in docs + [""] * (k - len(docs))]
        docs = [d + self.end for d in self.tokens(texts, self.doc_tokens)]
        longest_doc = self.doc_tokens + len(self.end)
        B = len(queries)
        if not self.packed:
            rows = [queries[i // k] + d for i, d in enumerate(docs)]
            ids, mask = left_pad(rows, self.longest_query + longest_doc if fixed else 1)
            return dict(ids=ids.view(B, k, -1), mask=mask.view(B, k, -1))  # (B, k, T)
        query_ids, query_mask = left_pad(queries, self.longest_query if fixed else 1)
        doc_ids, doc_mask = left_pad(docs, longest_doc if fixed else 1)
        return dict(query_ids=query_ids, query_mask=query_mask,  # (B, Q)
                    doc_ids=doc_ids.view(B, k, -1), doc_mask=doc_mask.view(B, k, -1))  # (B, k, D)

    def learned_tokens(self):
        """MEM_1 .. MEM_l and, when reranking, RR: (n, hidden), n = l [+ 1]."""
        return torch.cat([self.memory_tokens, self.rr_token]) if self.enable_reranking else self.memory_tokens

    def forward(self, **batch):
        """What tokenize() returns -> memory (B, k, l, d), scores (B, k) or None"""
        h = self.read(self.learned_tokens(), **batch)  # (B, k, n, hidden)
        scores = None
        if self.enable_reranking:  # in float32, under autocast too: bfloat16 has not the digits to rank 50 documents
            rr, head = h[:, :, -1].float(), self.score_head
            scores = (rr * head.weight.float()).sum(-1) + head.bias.float()
        return self.projection(h[:, :, :self.num_memory_tokens]), scores

    def read(self, learned, **batch):
        return (self.read_packed if self.packed else self.read_rows)(learned, **batch)

    def read_packed(self, learned, query_ids, query_mask, doc_ids, doc_mask):
        """(n, hidden), (B, Q), (B, Q), (B, k, D), (B, k, D) -> hidden states at MEM and RR (B, k, n, hidden)"""
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
        mask = torch.cat([query, block], dim=3).flatten(0, 1)[:, None]  # (B * k, 1, S, Q + S)
        h = self.backbone(inputs_embeds=x, attention_mask=mask, position_ids=positions).last_hidden_state
        return h[:, Q:].unflatten(1, (k, D + n))[:, :, D:]

    def read_rows(self, learned, ids, mask):
        """(n, hidden), (B, k, T), (B, k, T) -> hidden states at MEM and RR (B, k, n, hidden)"""
        B, k, T = ids.shape
        x = torch.cat([self.backbone.get_input_embeddings()(ids), learned.expand(B, k, -1, -1)], dim=2).flatten(0, 1)
        mask = F.pad(mask, (0, len(learned)), value=True).flatten(0, 1)  # (B * k, T + n)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0) + self.first_position
        h = self.backbone(inputs_embeds=x, attention_mask=mask, position_ids=positions).last_hidden_state
        return h[:, T:].unflatten(0, (B, k))


def other_layers(config):
    """The kinds of layers that are not attention decided by a mask and position ids: a recurrence or a convolution
    would carry one document over into the next."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", [])
    return {*kinds} - {"full_attention", "sliding_attention", "global"}


class NLayersCompressor(Compressor):
    """The first N layers of the generator, with no head (paper, section 3: "OSCAR-N-Layers"). norm: with its final norm
    (the authors' released class drops it, and nothing scales: memory is then three times as large for SmolLM2).

    Raises ValueError where num_layers is not within the generator's, or its layers are not all of attention that a
    mask and position ids decide."""

    def __init__(self, generator, num_layers=8, num_memory_tokens=8, enable_reranking=False, query_dependent=True,
                 query_tokens=64, doc_tokens=128, norm=True):
        config = load_config(generator)
        if not 1 <= num_layers <= config.num_hidden_layers:
            raise ValueError(f"num_layers={num_layers}, but {generator} has {config.num_hidden_layers} layers")
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):  # models that mix full and sliding attention name each layer's kind
            config.layer_types = config.layer_types[:num_layers]
        if other := other_layers(config):
            raise ValueError(f"{generator} has layers of type {other.pop()}: n_layers needs plain attention in all")
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # or a table of the layers beyond N, which are left out on purpose
        try:
            backbone = load_model(AutoModel, generator, config, dtype=torch.float32)
        finally:
            logging.set_verbosity(verbosity)
        if not norm:
            final = [name for name, m in backbone.named_children() if "norm" in type(m).__name__.lower()]
            if len(final) != 1:
                raise ValueError(f"compressor_norm=False, but {generator} has not one final norm but {len(final)}")
            setattr(backbone, final[0], nn.Identity())
        super().__init__(generator, backbone, num_memory_tokens, enable_reranking, query_dependent, query_tokens,
                         doc_tokens)


class ModernBERTCompressor(Compressor):
    """An encoder that reads `[CLS] query [SEP] document [SEP] MEM_1..l RR`, every document as a row of its own, and a
    projection Linear, ReLU, Linear to the generator's hidden size (paper, section 3 and appendix J).

    compressor_model: any encoder (answerdotai/ModernBERT-base) or a small decoder (meta-llama/Llama-3.2-1B-Instruct,
    the paper's OSCAR-llama), by name or folder. generator_std: embedding_std() of the generator's embeddings.

    The projection begins as an isometry, relu(x) - relu(-x) = x, where it is wide enough (projection_hidden twice the
    backbone's hidden size, no larger than the generator's): what the backbone tells apart stays apart. Its output is
    scaled to be as large as the generator's own embeddings, by a factor that is learned from there. Memory tokens begin
    near the encoder's [MASK], if it has one. (Our own; the paper does not say how either begins.)"""

    def __init__(self, compressor_model, generator_hidden, projection_hidden=8096, num_memory_tokens=8,
                 enable_reranking=False, query_dependent=True, query_tokens=64, doc_tokens=128, generator_std=1.0):
        config = load_config(compressor_model)
        if config.is_encoder_decoder:
            raise ValueError(f"{compressor_model} is an encoder-decoder ({config.model_type}): a compressor is one or "
                             "the other")
        backbone = load_model(AutoModel, compressor_model, config, dtype=torch.float32)
        if hasattr(backbone, "pooler"):  # BERT's, for [CLS]: it would never get a gradient here
            backbone.pooler = None
        super().__init__(compressor_model, backbone, num_memory_tokens, enable_reranking, query_dependent, query_tokens,
                         doc_tokens)
        if self.tokenizer.mask_token_id is not None:  # where an encoder has learned to put what a text leaves open
            mask = backbone.get_input_embeddings()(torch.tensor(self.tokenizer.mask_token_id))
            with torch.no_grad():
                self.memory_tokens.mul_(0.3).add_(mask)  # equal ones take long to part
        hidden = backbone.config.hidden_size
        up, down = nn.Linear(hidden, projection_hidden), nn.Linear(projection_hidden, generator_hidden)
        self.projection, self.generator_std = nn.Sequential(up, nn.ReLU(), down), generator_std
        self.scale = nn.Parameter(torch.ones(1))
        half = projection_hidden // 2
        basis = nn.init.orthogonal_(torch.empty(half, hidden))
        back = basis @ torch.eye(hidden, generator_hidden)  # (half, d)
        with torch.no_grad():
            up.weight[:2 * half], down.weight[:, :2 * half] = torch.cat([basis, -basis]), torch.cat([back, -back]).T
            up.bias.zero_(), down.bias.zero_()

    def forward(self, **batch):
        memory, scores = super().forward(**batch)
        return self.generator_std * self.scale * memory, scores
