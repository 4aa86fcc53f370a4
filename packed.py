"""
Attention over a packed sequence, in which the query stands once before all k of its documents:

    positions     0 .. Q-1     Q .. Q+S-1      Q+S .. Q+2S-1            T = Q + k * S in all
    hold          query        doc_1 MEM RR    doc_2 MEM RR    ..

    rows look at  query        doc_1 MEM RR    doc_2 MEM RR
    query         causal
    doc_1 MEM RR  all          causal
    doc_2 MEM RR  all                          causal

B queries, G heads of keys and values, c numbers a head. Notable: these are attention functions of transformers' own
interface, so that every decoder takes them, also under gradient checkpointing, torch.compile, FSDP2 and PyTorch/XLA.
"""

import inspect
import sys
from contextlib import suppress
from functools import partial
from types import MethodType

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from transformers import AttentionInterface


def packed_lengths(mask):
    """Q and S of the mask (B * k, 1, S, Q + S) that says what every block sees of the query and of itself."""
    return mask.shape[3] - mask.shape[2], mask.shape[2]


def blocks_with_query(x, Q, k):
    """Every document's block with the query before it: (B, G, Q + k * S, c) -> (B * k, G, Q + S, c)."""
    query, blocks = x[:, :, None, :Q], x[:, :, Q:].unflatten(2, (k, -1))
    return torch.cat([query.expand(-1, -1, k, -1, -1), blocks], dim=3).transpose(1, 2).flatten(0, 1)


def attend(module, q, k, v, mask, eager, scaling, dropout, **kwargs):
    """Attention of R rows: q (R, H, L, c), k and v (R, G, L', c), G dividing H, mask (R, 1, L, L') -> (R, L, H, c)."""
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
    """What transformers calls in every decoder layer: q (B, H, T, c), k and v (B, G, T, c), attention_mask
    (B * k, 1, S, Q + S) -> (B, T, H, c). The query attends to itself, and the blocks, as rows of a batch, to the query
    and themselves: Q^2 + k * S * (Q + S) products where a mask over the whole sequence would take T^2."""
    mask, (Q, S) = attention_mask, packed_lengths(attention_mask)
    attention = partial(attend, module, eager=eager, scaling=scaling, dropout=dropout, **kwargs)
    if q.shape[2] == S:  # rows already: the last layer's, see only_memory()
        return attention(q, k, v, mask).contiguous(), None
    B, documents = len(q), len(mask) // len(q)
    causal = torch.ones(Q, Q, dtype=torch.bool, device=q.device).tril()
    itself = torch.eye(Q, dtype=torch.bool, device=q.device)
    query_mask = mask[::documents, :, -1:, :Q] & causal | itself  # (B, 1, Q, Q); a block's last row sees all of it
    # contiguous: torch.compile's backward pass on a CPU takes views of another length for the ones that it has kept
    y_query = attention(*(t[:, :, :Q].contiguous() for t in (q, k, v)), query_mask)
    blocks = q[:, :, Q:].unflatten(2, (documents, S)).transpose(1, 2).flatten(0, 1)  # (B * k, H, S, c)
    y = attention(blocks, *(blocks_with_query(t, Q, documents) for t in (k, v)), mask)  # (B * k, S, H, c)
    return torch.cat([y_query, y.reshape(B, documents * S, *y.shape[2:])], dim=1), None


AttentionInterface.register("packed_sdpa", partial(packed_attention, eager=False))
AttentionInterface.register("packed_eager", partial(packed_attention, eager=True))


# ---- the last layer, of which only MEM and RR are read
#
#     position     query   doc MEM RR   doc MEM RR
#     key, value     x      x   x  x     x   x  x      first call of the layer, as far as its cache
#     all else                  x  x         x  x      second call, for these n positions of each block alone


class KeysAndValues:
    """Takes the place of a layer's cache: in the first call it keeps keys and values and ends the call; in the second
    one it gives them back."""

    class Kept(Exception):
        pass

    kept = None

    def update(self, k, v, *_, **__):
        if self.kept is None:
            self.kept = k, v
            raise self.Kept
        return self.kept


def only_memory(layer, n):
    """Makes the last decoder layer compute its output for the last n positions of every block (MEM and RR) alone; it is
    0 elsewhere. Of the others it computes keys and values (and, as layers do them first, queries: a hundredth of the
    cost of 8 layers of Mistral-7B)."""
    call = inspect.unwrap(type(layer).forward)
    signature = inspect.signature(call)
    # transformers' layers name it in three ways
    cache_name = next(name for name in ("cache", "past_key_values", "layer_past") if name in signature.parameters)

    def forward(layer, *args, **kwargs):
        bound = signature.bind(layer, *args, **kwargs)
        x, mask = bound.arguments["hidden_states"], bound.arguments["attention_mask"]
        (Q, S), (B, T, _) = packed_lengths(mask), x.shape
        k = len(mask) // B

        def at_memory(a):
            """Of what has a value for every position, (B, T, ..), those of MEM and RR: (B * k, n, ..)."""
            if isinstance(a, torch.Tensor) and a.shape[:2] == (B, T):
                return a[:, Q:].unflatten(1, (k, S))[:, :, -n:].flatten(0, 1)
            return a

        cache = bound.arguments[cache_name] = KeysAndValues()
        with suppress(KeysAndValues.Kept):
            call(*bound.args, **bound.kwargs)
        cache.kept = [blocks_with_query(t, Q, k) for t in cache.kept]
        bound.arguments.update(tree_map(at_memory, dict(bound.arguments)), attention_mask=mask[:, :, -n:])
        out = call(*bound.args, **bound.kwargs)
        h = out[0] if isinstance(out, tuple) else out  # (B * k, n, d)
        h = F.pad(F.pad(h, (0, 0, S - n, 0)).reshape(B, k * S, -1), (0, 0, Q, 0))  # (B, T, d)
        return (h, *out[1:]) if isinstance(out, tuple) else h

    layer.forward = MethodType(forward, layer)
