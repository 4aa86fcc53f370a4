"""
Answers from any causal LM of transformers, read from embeddings instead of token ids: attention masks by positions, a
key-value cache of fixed size, prefill, decoding and sampling. Nothing here knows what the embeddings stand for.

B rows, P positions of the prompt, padded on the left (mask: True = real), d the model's hidden size, V its vocabulary.

Notable: the cache has its final size from the start and is written at a cache position ("slot"), so that no step copies
what is there and every step has the same shapes, as CUDA graphs and PyTorch/XLA want them. Attention windows count
positions (real tokens); transformers would count slots, padding included.
"""

from contextlib import contextmanager
from inspect import signature
from itertools import chain

import torch
import torch.nn.functional as F

from configurator import first_line
from pretrained import max_positions


@contextmanager
def eval_mode(model):
    """No dropout within it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class KVCache:
    """Keys and values of every layer, (B, G, length, c) each, in tensors of their final size. The caller sets `slots`,
    the positions that the next step writes. Stands in for transformers' own, of which attention layers call no more
    than these two methods."""

    def __init__(self, length):
        self.length, self.layers = length, {}  # layer -> keys, values

    def update(self, k, v, layer, *_, **__):
        if layer not in self.layers:
            self.layers[layer] = tuple(t.new_zeros(*t.shape[:2], self.length, t.shape[3]) for t in (k, v))
        for kept, new in zip(self.layers[layer], (k, v)):
            kept.index_copy_(2, self.slots, new)
        return self.layers[layer]

    def get_seq_length(self, *_):
        return 0


def attention_masks(config, sees, here, positions, dtype):
    """What a model takes for its attention mask: sees (B, 1, L, length), restricted to the model's attention window,
    counted in positions: here (B, L) of those that look, positions (B, length) of those that they look at."""
    window = getattr(config, "sliding_window", None) or positions.shape[1]
    near = here[:, None, :, None] - positions[:, None, None] < window
    masks = {"full_attention": sees, "sliding_attention": sees & near}
    if config._attn_implementation == "eager":  # adds the mask to the attention's logits
        masks = {kind: torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(dtype).min) for kind, mask in masks.items()}
    kinds = {*(getattr(config, "layer_types", None) or ["sliding_attention"])}
    return masks if len(kinds) > 1 else masks[kinds.pop()]


def last_logits(model, x, mask, n):
    """Logits (B, n, V) at the last n positions of embeddings x (B, P, d) with mask (B, P), without a cache."""
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    P = x.shape[1]
    if (getattr(model.config, "sliding_window", None) or P) < P:
        causal = torch.ones(P, P, dtype=torch.bool, device=x.device).tril()
        itself = torch.eye(P, dtype=torch.bool, device=x.device)
        sees = mask[:, None, None] & causal | itself
        mask = attention_masks(model.config, sees, positions, positions, x.dtype)
    last = torch.arange(P - n, P, device=x.device)  # not a slice, whose product copies the head for each row on a CPU
    return model(inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False,
                 logits_to_keep=last).logits


def check_length(model, length, whose=""):
    """Raises ValueError when a prompt and its answer have more positions than the model. whose: says which prompt."""
    limit = max_positions(model)
    if length > limit:
        raise ValueError(f"prompt and answer{whose} ({length} tokens) are longer than the generator's {limit} "
                         "positions: fewer documents, or lower num_memory_tokens, doc_tokens or answer_tokens")


class Decoder:
    """Decodes with a causal LM, greedily or by sampling. num_tokens: how many tokens its tokeniser has; some heads
    (Qwen2's) have more rows, of which no token is to come."""

    def __init__(self, model, num_tokens):
        self.model, self.num_tokens, self.static_caches = model, num_tokens, None
        # transformers renamed past_key_values to cache in 5.24
        self.cache_name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"

    def step(self, x, slots, real, positions, cache):
        """One pass over embeddings x (B, L, d) that stand at slots (L,) of the cache -> logits (B, V) at the last of
        them. real (B, length): no padding; positions (B, length)."""
        every = torch.arange(cache.length, device=x.device)
        sees = real[:, None, None] & (every <= slots[:, None]) | (every == slots[:, None])  # (B, 1, L, length)
        here = positions[:, slots]  # (B, L)
        cache.slots = slots
        mask = attention_masks(self.model.config, sees, here, positions, x.dtype)
        out = self.model(inputs_embeds=x, attention_mask=mask, position_ids=here, use_cache=True, logits_to_keep=1,
                         **{self.cache_name: cache})
        return out.logits[:, -1, :self.num_tokens].float()

    def decode_one_token(self, token, slot, real, positions, cache):
        """Logits (B, V) after a token (B,) at a slot (1,) of the cache: all that is done once a token, and what
        compile() compiles."""
        return self.step(self.model.get_input_embeddings()(token)[:, None], slot, real, positions, cache)

    def compile(self):
        """Compiles decode_one_token(), for weights that do not change from now on. On CUDA into CUDA graphs: these want
        the cache at addresses that stay, so that one is kept for each number of rows and length. On a CPU with a copy
        of the weights in the layout that its products are fastest with."""
        torch._dynamo.config.recompile_limit = 64  # one for each of them, adapter on and off
        if self.model.device.type == "cpu":
            torch._inductor.config.freezing = True
        self.decode_one_token = torch.compile(self.decode_one_token, mode="reduce-overhead", dynamic=False)
        self.static_caches = {}

    def prefill(self, x, real, positions, cache, prefix):
        """Fills the cache with the prompts -> logits (B, V) after them. The first `prefix` positions, which all rows
        have in common, are read once."""
        if len(x) == 1:
            prefix = 0  # nothing is shared, and one pass is faster than two
        if prefix:
            slots, shared = torch.arange(prefix, device=x.device), KVCache(prefix)
            self.step(x[:1, :prefix], slots, real[:1, :prefix], positions[:1, :prefix], shared)
            cache.slots = slots
            for layer, kept in shared.layers.items():
                cache.update(*(t.expand(len(x), -1, -1, -1) for t in kept), layer)
        return self.step(x[:, prefix:], torch.arange(prefix, x.shape[1], device=x.device), real, positions, cache)

    @torch.no_grad()
    def generate(self, x, mask, max_new_tokens, stop_ids, temperature=0.0, top_k=0, prefix=0):
        """Embeddings x (B, P, d) and mask (B, P) of the prompts -> B lists of token ids, each up to the first of
        stop_ids or of max_new_tokens. temperature 0: greedy; top_k 0: sample from all tokens. prefix: how many
        positions all rows have in common at their start, without padding. On XLA two graphs are all: the prompt's and
        a token's. Raises ValueError for more positions than the model has."""
        (B, P), xla = mask.shape, x.device.type == "xla"
        # padding takes no position; on XLA to count it would fetch the mask from the device, by a graph of its own
        check_length(self.model, (P if xla else mask.sum(1).max().item()) + max_new_tokens)
        if xla:
            import torch_xla.core.xla_model as xm
        length = -(-(P + max_new_tokens) // 128) * 128  # few different ones: a step is compiled for each
        real = F.pad(mask, (0, length - P), value=True)
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
        cache = KVCache(length)
        if self.static_caches is not None:
            cache = self.static_caches.setdefault((B, length), cache)
        logits, token = self.prefill(x, real, positions, cache, prefix), None
        if self.static_caches is not None:
            for t in chain(*cache.layers.values()):
                torch._dynamo.mark_static_address(t)
        rows, done, stop = [[] for _ in range(B)], torch.zeros(B, dtype=torch.bool), torch.tensor(stop_ids)
        for n in range(max_new_tokens):
            if n > 0:
                slot = torch.tensor([P + n - 1], device=x.device)
                logits = self.decode_one_token(token, slot, real, positions, cache)
            token = sample(logits, temperature, top_k)
            if xla:
                xm.mark_step()
            new = token.cpu()
            done |= torch.isin(new, stop)
            for row, t, ended in zip(rows, new.tolist(), done.tolist()):
                if not ended:
                    row.append(t)
            if done.all():
                break
        return rows


def sample(logits, temperature, top_k):
    """The next token (B,) by logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    return torch.multinomial(F.softmax(logits / temperature, dim=-1), 1).squeeze(1)


def probe(decoder, x):
    """Reads embeddings x (L, d) as in training and as in generation. Raises ValueError in one line for a model that
    cannot be read so: before any work, not in its midst."""
    name = decoder.model.name_or_path
    try:
        with torch.no_grad():
            whole = last_logits(decoder.model, x[None], torch.ones(1, len(x), dtype=torch.bool), 1)[:, -1].float()
            every = torch.arange(len(x))
            stepped = decoder.step(x[None], every, every[None] >= 0, every[None], KVCache(len(x)))
    except Exception as e:  # each architecture fails in its own way
        raise ValueError(f"{name} cannot be the generator: {first_line(e)}") from e
    whole = whole[:, :decoder.num_tokens]
    if not torch.allclose(whole, stepped, rtol=0, atol=0.1 * whole.abs().max().item()):
        raise ValueError(f"{name} cannot be the generator: it gives other logits with a key-value cache than without")


@torch.no_grad()
def nearest_tokens(model, tokenizer, memory, n=5):
    """memory (B, k, l, d) -> B lists of k lists of l lists of the n vocabulary tokens whose output embeddings lie
    nearest (cosine) to each vector (paper, Figure 8)."""
    head = model.get_output_embeddings().weight  # (V, d)
    similarity = F.normalize(memory.float(), dim=-1) @ F.normalize(head.float(), dim=-1).T
    return [[[[tokenizer.decode([i]).strip() for i in slot] for slot in document] for document in row]
            for row in similarity.topk(n).indices.tolist()]
