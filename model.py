"""
ScaleDown: a compressor and a generator with LoRA, trained together (OSCAR, arXiv 2504.07109, section 3).

    memory, scores = compressor(query, documents)         # k documents -> k * l embeddings
    answer         = generator(prompt with the memory where the documents' text would stand)

B queries, k documents each, l memory tokens a document, d the generator's hidden size.
"""

import json
import os
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from inspect import signature
from itertools import chain
from pathlib import Path
from zlib import crc32

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from compressor import ModernBERTCompressor, NLayersCompressor, embedding_std, layer_list, left_pad, other_layers
from data import document_text
from lora import adapter_off, apply_lora, layers, load_lora, load_tensors, save_lora
from pretrained import ModelError, first_line, load_model, load_tokenizer, note, plain_text

SYSTEM = "Extract the facts that matter from the background and answer as briefly as possible."
SYSTEM_NO_DOCUMENTS = "Answer the question as briefly as possible."


def chat_messages(query, documents=None, system_role=True):
    """The chat behind every prompt; documents: their texts as one string, None for a prompt without any."""
    system = SYSTEM_NO_DOCUMENTS if documents is None else SYSTEM
    user = f"Question: {query}" if documents is None else f"Background:\n{documents}\n\nQuestion: {query}"
    return with_system(system, user, system_role)


def with_system(system, user, system_role=True):
    """A template without a system role gets the system line in the user's turn."""
    if system_role:
        return [dict(role="system", content=system), dict(role="user", content=user)]
    return [dict(role="user", content=f"{system}\n\n{user}")]


def render(tokenizer, messages, answer):
    """A chat as text, by the tokeniser's template, and what the template writes behind it when `answer` is given;
    messages: by whether there is a system role -> (text, rest, system_role). A tokeniser without a template gets plain
    text. Raises ValueError where the template takes an answer for something else."""
    if tokenizer.chat_template is None:
        bos = tokenizer.bos_token if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else None
        return f"{bos or ''}{messages(False)[0]['content']}\n\nAnswer:", f" {answer}", False
    for system_role in (True, False):
        chat = messages(system_role)
        # enable_thinking: models that can reason aloud first (Qwen3) answer at once; others ignore it
        template = partial(tokenizer.apply_chat_template, tokenize=False, enable_thinking=False)
        try:
            text = template(chat, add_generation_prompt=True)
            whole = template(chat + [dict(role="assistant", content=answer)])
        except Exception as e:  # a template refuses a role by raising, each in its own way
            if not system_role:
                raise ValueError(f"the chat template fails: {first_line(e)}") from e
            continue
        if whole.startswith(text) and all(text.count(m["content"]) == 1 for m in chat) and whole.count(answer) == 1:
            return text, whole[len(text):], system_role
    raise ValueError("the chat template does not write the messages once and as they are, and an answer after its own "
                     "generation prompt")


class Prompt:
    """The generator's prompt, rendered once by its chat template and cut where documents, query and answer go:

        before | documents | between | query | after | answer_start | answer | end

    A template without a system role gets the system line in the user's turn, a tokeniser without a template plain text.
    Documents, query and answer are text from outside: nothing in them becomes a control token.

    kept: the parts() of a prompt that was rendered before, to be used as it was. Raises ValueError for a template that
    fails, or writes something else than it is given.
    """

    def __init__(self, tokenizer, with_documents=True, kept=None):
        self.tokenizer, self.plain = tokenizer, plain_text(tokenizer)
        if kept:
            vars(self).update(kept)
            return
        D, Q, A = "[[documents]]", "[[query]]", "[[answer]]"
        messages = partial(chat_messages, Q, D if with_documents else None)
        text, rest, self.system_role = render(tokenizer, messages, A)
        # what a template puts between its generation prompt and an answer, such as a space
        self.answer_start, end = rest.split(A)
        self.before, rest = text.split(D) if with_documents else ("", text)
        self.between, self.after = rest.split(Q)
        special = [t for t in self.ids(end.strip())[:1] if t in tokenizer.get_added_vocab().values()]
        self.end_id = special[0] if special else tokenizer.eos_token_id
        if self.end_id is None:
            raise ValueError("the generator's tokeniser has neither an end-of-turn token nor an eos_token")

    def parts(self):
        """What was rendered, to be kept: a template may write another prompt tomorrow (today's date)."""
        return {name: value for name, value in vars(self).items() if name not in ("tokenizer", "plain")}

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def ids_behind(self, before, texts):
        """Token ids of each text where it stands behind another: many tokenisers write a word differently at the start
        of a text."""
        skip = len(self.ids(before))
        return [row[skip:] for row in self.ids([before + text for text in texts])]

    def cut(self, texts, max_tokens):
        """Each text cut after its first max_tokens tokens, or before the character that this would part."""
        texts = [self.plain(text) for text in texts]
        offsets = self.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=max_tokens + 1,
                                 return_offsets_mapping=True).offset_mapping
        ends = [min(o[-2][1], o[-1][0]) if len(o) > max_tokens else o[-1][1] if o else 0 for o in offsets]
        return [text[:end] for text, end in zip(texts, ends)]

    def text(self, query, documents=()):
        """The whole prompt as text, up to where the answer begins."""
        documents = "\n\n".join(self.plain(document) for document in documents)
        return self.before + documents + self.between + self.plain(query) + self.after

    def answer_ids(self, answers, max_tokens):
        """Token ids of each answer and its end of turn, at most max_tokens."""
        rows = self.ids_behind(self.after, [self.answer_start + self.plain(a) for a in answers])
        return [(row + [self.end_id])[:max_tokens] for row in rows]


def identity(model):
    """Fingerprint of a frozen model, independent of its folder's path, its dtype and its parameters' names: a digest of
    the checksums of all its weights in bfloat16 (4 GB/s on one core)."""
    shape = model.config
    sums = sorted(crc32(p.detach().cpu().bfloat16().flatten().view(torch.int16).numpy()) for p in model.parameters())
    return dict(model_type=shape.model_type, num_hidden_layers=shape.num_hidden_layers,
                hidden_size=model.get_input_embeddings().embedding_dim, vocab_size=shape.vocab_size,
                weights_crc32=sha256(repr(sums).encode()).hexdigest()[:16])


@dataclass
class ScaleDownConfig:
    generator: str = "mistralai/Mistral-7B-Instruct-v0.2"
    compressor_type: str = "n_layers"  # or modernbert
    num_layers: int = 8  # n_layers: how many of the generator's layers
    compressor_model: str = "answerdotai/ModernBERT-base"  # modernbert: any encoder or small decoder
    projection_hidden: int = 8096  # modernbert: hidden size of the projection (Table 7)
    num_memory_tokens: int = 8  # l
    enable_reranking: bool = False
    rerank_lambda: float = 0.05
    query_dependent: bool = True  # False: the compressor reads documents alone, once for all queries
    query_tokens: int = 64
    doc_tokens: int = 128
    answer_tokens: int = 128
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    compressor_norm: bool = True  # n_layers: the final norm after the first N layers (the authors' class drops it)
    compressor_lora_r: int = 0  # LoRA on the compressor's backbone, too; 0: all of it is trained, as in the paper


class KVCache:
    """Keys and values of a prompt and its answer, in tensors of their final size: no step copies what is there, and
    every step has the same shapes (CUDA graphs, XLA). Where a step writes, `slots` says. It stands in for transformers'
    own, of which attention layers use no more than this."""

    def __init__(self, length):
        self.length, self.layers = length, {}  # layer -> keys, values (B, G, length, c)

    def update(self, k, v, layer, *_, **__):
        if layer not in self.layers:
            self.layers[layer] = tuple(t.new_zeros(*t.shape[:2], self.length, t.shape[3]) for t in (k, v))
        for kept, new in zip(self.layers[layer], (k, v)):
            kept.index_copy_(2, self.slots, new)
        return self.layers[layer]

    def get_seq_length(self, *_):
        return 0


class ScaleDown(nn.Module):
    """Answers to queries over documents that the compressor has turned into embeddings (paper, section 3)."""

    def __init__(self, config, dtype=torch.float32, kept_prompt=None):
        """dtype: of the frozen generator. What is trained (compressor, LoRA) is float32. kept_prompt: a checkpoint's.
        Raises ValueError for settings that do not fit the models, and for models that cannot be found or used."""
        super().__init__()
        self.config = c = config
        if min(c.num_memory_tokens, c.query_tokens, c.doc_tokens, c.answer_tokens, c.lora_r) < 1:
            raise ValueError("num_memory_tokens, query_tokens, doc_tokens, answer_tokens and lora_r must be at least 1")
        if c.enable_reranking and not c.query_dependent:
            raise ValueError("enable_reranking scores documents for a query: it takes query_dependent=True")
        self.generator = load_model(AutoModelForCausalLM, c.generator, dtype=dtype)
        shape = self.generator.config
        if "position_ids" not in signature(self.generator.forward).parameters or getattr(shape, "alibi", False):
            raise ValueError(f"{c.generator} takes no position ids (ALiBi, or a recurrence), which are needed here")
        if other := other_layers(shape):
            raise ValueError(f"{c.generator} has layers of type {other.pop()}: all must be of plain attention")
        embed = self.generator.get_input_embeddings()
        hidden = embed.embedding_dim
        self.generator_identity, self.compressor_identity = identity(self.generator), None
        apply_lora(self.generator, c.lora_r, c.lora_alpha, c.lora_dropout)
        if experts := sum(p.numel() for p in self.generator.parameters() if p.dim() == 3):
            adapted = {name.rpartition(".")[2] for name, _ in layers(self.generator)}
            note(f"{c.generator}: {experts:,} weights of experts, fused to one tensor a layer, get no LoRA"
                 + ("; PEFT cannot load this adapter: it takes the names of shared and dense layers for those of the "
                    "experts" if adapted & {"gate_proj", "up_proj", "down_proj"} else ""))
        self.tokenizer = load_tokenizer(c.generator)
        try:
            self.template_prompt = self.render_prompt()
        except ValueError as e:
            if not kept_prompt:
                raise ValueError(f"{c.generator}: {e}") from e
            self.template_prompt = None
        self.use_prompt(kept_prompt or self.template_prompt)
        sizes = dict(num_memory_tokens=c.num_memory_tokens, enable_reranking=c.enable_reranking,
                     query_dependent=c.query_dependent, query_tokens=c.query_tokens, doc_tokens=c.doc_tokens)
        if c.compressor_type == "n_layers":
            self.compressor = NLayersCompressor(c.generator, c.num_layers, norm=c.compressor_norm, **sizes)
        elif c.compressor_type == "modernbert":
            self.compressor = ModernBERTCompressor(c.compressor_model, hidden, c.projection_hidden,
                                                   generator_std=embedding_std(embed), **sizes)
        else:
            raise ValueError(f"compressor_type is n_layers or modernbert, not '{c.compressor_type}'")
        self.sep = nn.Parameter(embedding_std(embed) * torch.randn(1, hidden))  # stands between two documents
        self.kept_beginning, self.kept_caches = (None, None), None
        # transformers renamed past_key_values to cache in 5.24
        self.cache_name = "cache" if "cache" in signature(self.generator.forward).parameters else "past_key_values"
        count = lambda module: sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Linear, Conv1D)))
        self.head_weights = self.generator.get_output_embeddings().weight.numel()
        self.frozen_weights = count(self.generator) - self.head_weights
        self.lora_weights = sum(p.numel() for p in self.generator.parameters() if p.requires_grad)
        self.compressor_weights = count(self.compressor.backbone)
        self.memory_weights = count(self.compressor) - self.compressor_weights  # read memory tokens only
        self.last_weights = 0  # what only MEM and RR meet: all behind queries, keys and values in a packed last layer
        if self.compressor.packed:
            layer = layer_list(self.compressor.backbone)[-1]
            attention = next(m for m in layer.modules() if hasattr(m, "is_causal"))
            first = [m for name, m in attention.named_modules() if isinstance(m, (nn.Linear, Conv1D))
                     and name not in ("o_proj", "out_proj", "c_proj", "dense", "resid_proj")]
            self.last_weights = count(layer) - sum(m.weight.numel() for m in first)
            self.compressor_weights -= self.last_weights
        if c.compressor_lora_r:  # frozen, too, and so not in a checkpoint
            self.compressor_identity = identity(self.compressor.backbone)
            apply_lora(self.compressor.backbone, c.compressor_lora_r, c.lora_alpha, c.lora_dropout)
        if self.device.type != "meta":
            self.probe()

    def probe(self):
        """Reads the prompt's beginning as in training and as in generation. Raises ValueError in one line for a
        generator that cannot be read so: before any work, not in its midst."""
        try:
            with torch.no_grad():
                x = self.generator.get_input_embeddings()(self.before_ids)[None]
                mask = torch.ones(x.shape[:2], dtype=torch.bool)
                whole, step = self.logits(x, mask, 1), self.prefill(x[0])[1]
        except Exception as e:  # each architecture fails in its own way
            raise ValueError(f"{self.config.generator} cannot be the generator: {first_line(e)}") from e
        if not torch.allclose(whole[:, -1].float(), step, rtol=0, atol=0.1 * whole.abs().max().item()):
            raise ValueError(f"{self.config.generator} cannot be the generator: it gives other logits with a key-value "
                             "cache than without")

    # ---- prompt

    def render_prompt(self):
        """The prompt by the tokeniser's template, all of it that matters, as a checkpoint keeps it."""
        prompts = {name: Prompt(self.tokenizer, name == "documents") for name in ("documents", "no_documents")}
        eos = self.generator.generation_config.eos_token_id
        stop = [prompts["documents"].end_id] + (eos if isinstance(eos, list) else [] if eos is None else [eos])
        return {name: prompt.parts() for name, prompt in prompts.items()} | dict(
            before_ids=prompts["documents"].ids(prompts["documents"].before), stop_ids=stop)

    def use_prompt(self, kept):
        """kept: what render_prompt() has returned, now or when a checkpoint was made."""
        self.kept_prompt = kept
        self.prompt, self.prompt_no_documents = (Prompt(self.tokenizer, kept=kept[name])
                                                 for name in ("documents", "no_documents"))
        device = self.sep.device if hasattr(self, "sep") else None
        self.register_buffer("before_ids", torch.tensor(kept["before_ids"], device=device), persistent=False)
        self.tail_tokens = len(self.prompt.ids(self.prompt.between + self.prompt.after))
        self.stop_ids = kept["stop_ids"]

    @property
    def device(self):
        return self.sep.device

    def train(self, mode=True):
        if mode:
            self.kept_beginning = None, None
        return super().train(mode)

    # ---- text -> tensors

    def collate(self, examples, num_documents=None, fixed=False):
        """Examples (see data.py) -> a batch of CPU tensors for forward(). k is num_documents (further documents are
        left out, missing ones masked), or else the largest number of documents there is. Without answers: a prompt to
        generate from. fixed: every batch of B has the same, the largest, shape (XLA compiles each shape anew). Raises
        ValueError for an empty query, a query without documents and more positions than the generator has."""
        documents = [[document_text(d) for d in x["documents"]][:num_documents] for x in examples]
        for x, docs in zip(examples, documents):
            if not x["query"].strip():
                raise ValueError("empty query")
            if not docs:
                raise ValueError(f"no documents for the query '{x['query']}'")
        k = num_documents or max(len(docs) for docs in documents)
        queries = [x["query"].strip() for x in examples]
        present = torch.arange(k) < torch.tensor([len(docs) for docs in documents])[:, None]  # (B, k)
        batch = dict(compressor=self.compressor.tokenize(queries, documents, k, fixed), present=present)
        queries = self.prompt.cut(queries, self.config.query_tokens)
        # `between query after [answer]`, after any letter, as it would stand after a document's text
        tails = [self.tail(q) for q in queries]
        if "answer" in examples[0]:
            answers = self.prompt.answer_ids([x["answer"] for x in examples], self.config.answer_tokens)
            tails = [t + a for t, a in zip(tails, answers)]
            ids, mask = left_pad(answers, self.config.answer_tokens if fixed else 1)
            batch["labels"] = ids.masked_fill(~mask, -100)  # (B, A)
        longest = self.tail_tokens + self.config.query_tokens + self.config.answer_tokens
        batch["tail_ids"], batch["tail_mask"] = left_pad(tails, longest if fixed else 1)  # (B, T)
        documents_tokens = present.sum(1) * (self.config.num_memory_tokens + 1) - 1
        self.check_length((len(self.before_ids) + documents_tokens + batch["tail_mask"].sum(1)).max().item())
        if self.config.enable_reranking and "reranking_scores" in examples[0]:
            batch["scores"] = torch.tensor([(x["reranking_scores"][:k] + [0.0] * k)[:k] for x in examples])  # (B, k)
        return batch

    def tail(self, query):
        """Token ids of `between query after`, of which the query has at most query_tokens: cut text can have more of
        them when it is read again."""
        for n in range(self.config.query_tokens, -1, -1):
            ids, = self.prompt.ids_behind("x", [self.prompt.between + query + self.prompt.after])
            if len(ids) <= self.tail_tokens + self.config.query_tokens or not n:
                return ids
            query, = self.prompt.cut([query], n - 1) if n > 1 else [""]

    def to_device(self, batch):
        return {name: self.to_device(t) if isinstance(t, dict) else t.to(self.device, non_blocking=True)
                for name, t in batch.items()}

    # ---- compressed prompt, loss

    def prompt_embeddings(self, memory, batch):
        """memory (B, k, l, d) -> embeddings (B, P, d) and mask (B, P) of
        `before | MEM of doc 1, SEP, MEM of doc 2, SEP, .. MEM of doc k | between query after [answer]`."""
        (B, k, l, d), present = memory.shape, batch["present"]
        embed = self.generator.get_input_embeddings()
        before, tail = embed(self.before_ids), embed(batch["tail_ids"])
        documents = torch.cat([memory, self.sep.expand(B, k, 1, d)], dim=2).flatten(1, 2)[:, :-1].to(tail.dtype)
        next_present = F.pad(present[:, 1:], (0, 1))  # a SEP stands only before a document that is there
        real = torch.cat([present[:, :, None].expand(B, k, l), next_present[:, :, None]], dim=2).flatten(1)[:, :-1]
        mask = torch.cat([real.new_ones(B, len(before)), real, batch["tail_mask"]], dim=1)
        return torch.cat([before.expand(B, -1, -1), documents, tail], dim=1), mask

    def forward(self, batch, num_answer_tokens=None, num_queries=None):
        """The loss (paper, section 3): cross-entropy on the teacher's answer tokens, their mean, plus, when reranking,
        rerank_lambda * the sum over documents of (score - teacher's score)^2, its mean over queries.

        num_answer_tokens, num_queries: what to divide the sums by, where the batch is a part of a larger one (gradient
        accumulation, several processes); the batch's own counts by default.
        Returns loss, {"generation": .., "reranking": ..} (the second only when reranking, before lambda).
        """
        labels = batch["labels"]  # (B, A), -100 = padding
        memory, scores = self.compressor(**batch["compressor"])
        x, mask = self.prompt_embeddings(memory, batch)
        # the answer stands at the last A positions; each token is predicted from the position before it
        logits = self.logits(x, mask, labels.shape[1] + 1)[:, :-1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        loss = loss / ((labels != -100).sum() if num_answer_tokens is None else num_answer_tokens)
        parts = {"generation": loss.detach()}
        if self.config.enable_reranking:
            error = ((scores.float() - batch["scores"]) ** 2 * batch["present"]).sum()
            error = error / (len(labels) if num_queries is None else num_queries)
            parts["reranking"] = error.detach()
            loss = loss + self.config.rerank_lambda * error
        return loss, parts

    def logits(self, x, mask, n):
        """The generator's logits (B, n, V) at the last n positions of prompt embeddings x (B, P, d), mask (B, P)."""
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        window = getattr(self.generator.config, "sliding_window", None) or x.shape[1]
        if window < x.shape[1]:  # transformers would count it in slots, the padding between documents included
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
            mask = self.attention_masks(mask[:, None, None] & causal | itself, positions, positions, x.dtype)
        return self.generator(inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False,
                              logits_to_keep=n).logits

    def attention_masks(self, sees, here, positions, dtype):
        """What the generator takes for its attention mask: sees (B, 1, L, length), and within an attention window,
        counted in positions, here (B, L) of those that look and positions (B, length) of those that they look at."""
        config = self.generator.config
        window = getattr(config, "sliding_window", None) or positions.shape[1]
        near = here[:, None, :, None] - positions[:, None, None] < window
        masks = {"full_attention": sees, "sliding_attention": sees & near}
        if config._attn_implementation == "eager":  # adds the mask to the attention's logits
            masks = {kind: torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
                ~mask, torch.finfo(dtype).min) for kind, mask in masks.items()}
        kinds = {*(getattr(config, "layer_types", None) or ["sliding_attention"])}
        return masks if len(kinds) > 1 else masks[kinds.pop()]

    def check_length(self, length):
        limit = getattr(self.generator.config, "max_position_embeddings", None) or length
        if length > limit:
            raise ValueError(f"prompt and answer ({length} tokens) are longer than the generator's {limit} positions: "
                             "fewer documents, or lower num_memory_tokens, doc_tokens or answer_tokens")

    # ---- inference

    @contextmanager
    def evaluating(self):
        """No dropout within it."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    @torch.no_grad()
    def compress(self, queries, documents):
        """B queries, B lists of documents -> memory (B, k, l, d), scores (B, k) or None. k: the longest list's length;
        what stands for a missing document means nothing."""
        texts = [[document_text(d) for d in docs] for docs in documents]
        batch = self.compressor.tokenize([q.strip() for q in queries], texts, max(map(len, texts)))
        with self.evaluating():
            return self.compressor(**self.to_device(batch))

    def full_prompts(self, queries, documents, mode="full"):
        """The prompts as text: for mode full the documents' own text, each cut to doc_tokens of the generator's
        tokens; no documents for none."""
        prompt = self.prompt if mode == "full" else self.prompt_no_documents
        queries = prompt.cut([q.strip() for q in queries], self.config.query_tokens)
        if mode == "none":
            return [prompt.text(q) for q in queries]
        return [prompt.text(q, prompt.cut([document_text(d) for d in docs], self.config.doc_tokens))
                for q, docs in zip(queries, documents)]

    @torch.no_grad()
    def embed_prompts(self, queries, documents, mode="compressed", num_documents=None, memory=None):
        """B queries and B lists of documents -> what the generator reads: embeddings (B, P, d) and mask (B, P). On XLA
        and TorchNeuron of one shape for all queries, given num_documents. memory: as in generate()."""
        if mode == "compressed":
            examples = [dict(query=q, documents=d) for q, d in zip(queries, documents)]
            fixed = self.device.type in ("xla", "neuron")
            batch = self.to_device(self.collate(examples, num_documents, fixed))
            if memory is None:
                memory, _ = self.compressor(**batch["compressor"])
            return self.prompt_embeddings(memory, batch)
        if not all(q.strip() for q in queries):
            raise ValueError("empty query")
        if mode == "full" and not all(documents):
            raise ValueError("a query without documents")
        ids, mask = left_pad(self.prompt.ids(self.full_prompts(queries, documents, mode)))
        return self.generator.get_input_embeddings()(ids.to(self.device)), mask.to(self.device)

    def generate(self, queries, documents, max_new_tokens=None, temperature=0.0, top_k=0, mode="compressed",
                 num_documents=None, memory=None):
        """Answers (B strings) to B queries over B lists of documents. num_documents: as in collate(). memory
        (B, k, l, d): of these documents, where compress() has made it already.

        mode: compressed; full (the same prompt with the documents' text, adapter off: the uncompressed model); none (no
        documents, adapter off). temperature 0 is greedy; top_k 0 samples from all tokens. max_new_tokens: answer_tokens
        by default. Raises ValueError for an empty query, for no documents (unless mode is none) and for more positions
        than the generator has.
        """
        if mode not in ("compressed", "full", "none"):
            raise ValueError(f"mode is compressed, full or none, not '{mode}'")
        with torch.no_grad(), self.evaluating(), nullcontext() if mode == "compressed" else adapter_off(self.generator):
            x, mask = self.embed_prompts(queries, documents, mode, num_documents, memory)
            return self.decode(x, mask, max_new_tokens or self.config.answer_tokens, temperature, top_k,
                               self.beginning() if mode == "compressed" and self.device.type != "xla" else None)

    def read(self, x, slots, real, positions, cache):
        """The generator's next step: embeddings x (B, L, d) that stand at slots (L,) of the cache -> logits (B, V) at
        the last of them. real (B, length): no padding; positions (B, length)."""
        every = torch.arange(cache.length, device=x.device)
        sees = real[:, None, None] & (every <= slots[:, None]) | (every == slots[:, None])  # (B, 1, L, length)
        here = positions[:, slots]  # (B, L)
        cache.slots = slots
        out = self.generator(inputs_embeds=x, attention_mask=self.attention_masks(sees, here, positions, x.dtype),
                             position_ids=here, use_cache=True, logits_to_keep=1, **{self.cache_name: cache})
        return out.logits[:, -1].float()

    def next(self, token, slot, real, positions, cache):
        """Logits (B, V) behind a token (B,) at a slot (1,) of the cache: all that is done once a token, and what to
        compile."""
        return self.read(self.generator.get_input_embeddings()(token)[:, None], slot, real, positions, cache)

    def compile_next(self):
        """Compiles next(), on CUDA into CUDA graphs. These want the cache at addresses that stay: from now on one is
        kept for each number of queries and length."""
        torch._dynamo.config.recompile_limit = 64  # one for each of them, adapter on and off
        self.next = torch.compile(self.next, mode="reduce-overhead", dynamic=False)
        self.kept_caches = {}

    def beginning(self):
        """Keys and values of what every compressed prompt begins with: computed once, and again when a weight of the
        generator has changed, or the model been in training mode. (A change in eval mode by a fused optimiser, through
        .data or under FSDP2 would go unseen.)"""
        version = (self.device, self.generator.dtype, torch.is_autocast_enabled(self.device.type),
                   sum(p._version for p in self.generator.parameters()),
                   [(m.enabled, m.merged, m.scaling) for _, m in layers(self.generator)])
        if self.kept_beginning[0] != version:
            self.kept_beginning = version, self.prefill(self.generator.get_input_embeddings()(self.before_ids))[0]
        return self.kept_beginning[1]

    def prefill(self, x):
        """Embeddings x (L, d) -> the keys and values of every layer, and the logits (1, V) after the last."""
        slots, cache = torch.arange(len(x), device=x.device), KVCache(len(x))
        logits = self.read(x[None], slots, torch.ones_like(slots, dtype=torch.bool)[None], slots[None], cache)
        return cache.layers, logits

    @torch.no_grad()
    def decode(self, x, mask, max_new_tokens, temperature, top_k, beginning=None):
        """Prompt embeddings x (B, P, d) and mask (B, P) -> B answers, token by token with a key-value cache. beginning:
        keys and values of the first positions, which every row has in common. On XLA two graphs are all: the prompt's
        and a token's."""
        B, P = mask.shape
        # padding takes no position; on XLA to count it would fetch the mask from the device, by a graph of its own
        self.check_length((P if x.device.type == "xla" else mask.sum(1).max().item()) + max_new_tokens)
        if x.device.type == "xla":
            import torch_xla.core.xla_model as xm
        length = -(-(P + max_new_tokens) // 128) * 128  # few different ones: next() is compiled for each
        real = F.pad(mask, (0, length - P), value=True)
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
        cache, known = KVCache(length), 0
        if self.kept_caches is not None:
            cache = self.kept_caches.setdefault((B, length), cache)
        for layer, kept in (beginning or {}).items():
            known = kept[0].shape[2]
            cache.slots = torch.arange(known, device=x.device)
            cache.update(*(t.expand(B, -1, -1, -1) for t in kept), layer)
        logits = self.read(x[:, known:], torch.arange(known, P, device=x.device), real, positions, cache)
        if self.kept_caches is not None:
            for t in chain(*cache.layers.values()):
                torch._dynamo.mark_static_address(t)
        tokens, done, stop = [], torch.zeros(B, dtype=torch.bool), torch.tensor(self.stop_ids)
        for slot in range(P, P + max_new_tokens):
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                if top_k:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, float("-inf"))
                token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1).squeeze(1)
            if x.device.type == "xla":
                xm.mark_step()
            tokens.append(token.cpu())
            done = done | torch.isin(tokens[-1], stop)
            tokens[-1] = tokens[-1].masked_fill(done, self.prompt.end_id)
            if done.all() or len(tokens) == max_new_tokens:
                break
            logits = self.next(token, torch.tensor([slot], device=x.device), real, positions, cache)
        rows = torch.stack(tokens, 1).tolist()
        rows = [row[:row.index(self.prompt.end_id)] if self.prompt.end_id in row else row for row in rows]
        return [a.strip() for a in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    @torch.no_grad()
    def nearest_tokens(self, memory, n=5):
        """memory (B, k, l, d) -> B lists of k lists of l lists of the n vocabulary tokens whose output embeddings lie
        nearest (cosine) to each memory embedding (paper, Figure 8)."""
        head = self.generator.get_output_embeddings().weight  # (V, d)
        similarity = F.normalize(memory.float(), dim=-1) @ F.normalize(head.float(), dim=-1).T
        return [[[[self.tokenizer.decode([i]).strip() for i in slot] for slot in document] for document in row]
                for row in similarity.topk(n).indices.tolist()]

    # ---- training, checkpoints

    def count(self, batch):
        """Answer tokens, all tokens and FLOPs of a training step on a batch from collate(), padding left out. A token
        costs 6 FLOPs for each trained weight of a matrix product that it meets and 4 for each frozen one, which needs
        no gradient of its own (PaLM, arXiv 2204.02311, appendix B, counts 6 for all); attention's own products and
        what gradient checkpointing computes again are left out, as is the compressor's own LoRA."""
        each = 4 if self.config.compressor_lora_r else 6
        answer, documents = (batch["labels"] != -100).sum().item(), batch["present"].sum().item()
        l, B = self.config.num_memory_tokens, len(batch["labels"])
        masks = [t for name, t in batch["compressor"].items() if name.endswith("mask")]  # (B, T) or (B, k, T)
        compressor = sum((t & batch["present"][..., None] if t.dim() == 3 else t).sum().item() for t in masks)
        compressor += documents * (l + self.config.enable_reranking)
        generator = B * (len(self.before_ids) - 1) + documents * (l + 1) + batch["tail_mask"].sum().item()
        flops = (each * compressor * self.compressor_weights + 6 * documents * l * self.memory_weights
                 + each * documents * (l + self.config.enable_reranking) * self.last_weights
                 + generator * (4 * self.frozen_weights + 6 * self.lora_weights) + 4 * answer * self.head_weights)
        return answer, compressor + generator, flops

    def shard(self, mesh):
        """FSDP2: spreads all parameters over the devices of a mesh and moves them there. Every layer is gathered when
        it is used and let go behind it (with gradient checkpointing; without, autocast's bfloat16 copies of trained
        weights stay until the backward pass); what is no layer (embeddings, head, projection) is gathered for the
        whole pass."""
        for backbone in (self.generator, self.compressor.backbone):
            for layer in layer_list(backbone):
                fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(self, "generate")

    def configure_optimizers(self, generator_lr, compressor_lr, weight_decay, betas, **kwargs):
        """AdamW with a learning rate for the LoRA and one for the compressor (its memory tokens and SEP with it).
        Weight decay on matrices only. kwargs: AdamW's own."""
        groups = []
        for lr, parameters in ((generator_lr, self.generator.parameters()),
                               (compressor_lr, [*self.compressor.parameters(), self.sep])):
            parameters = [p for p in parameters if p.requires_grad]
            groups.append(dict(params=[p for p in parameters if p.dim() >= 2], lr=lr, weight_decay=weight_decay))
            groups.append(dict(params=[p for p in parameters if p.dim() < 2], lr=lr, weight_decay=0.0))
        return torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, **kwargs)

    def enable_gradient_checkpointing(self, checkpoint=None):
        """Recompute activations in the backward pass: less memory, about a third more time. checkpoint: torch's own
        function by default; PyTorch/XLA has another."""
        checkpoint = checkpoint or partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        for backbone in (self.generator, self.compressor.backbone):
            backbone._set_gradient_checkpointing(gradient_checkpointing_func=checkpoint)

    def save(self, out_dir, tensors=None):
        """Writes config.json, compressor.safetensors and the LoRA in PEFT's format; not the frozen generator. tensors:
        what is trained, by name, where the model holds but a part of it itself (FSDP2)."""
        tensors = tensors or dict(self.named_parameters())
        tensors = {name: tensors[name] for name, p in self.named_parameters() if p.requires_grad}  # no buffers
        adapter = {name.removeprefix("generator."): t for name, t in tensors.items() if name.startswith("generator.")}
        save_lora(self.generator, out_dir, self.config.generator, adapter)
        tensors = {name: t.detach().cpu() for name, t in tensors.items() if not name.startswith("generator.")}
        save_file(tensors, os.path.join(out_dir, "compressor.safetensors"))
        with open(os.path.join(out_dir, "config.json"), "w") as f:
            json.dump({**asdict(self.config), "generator_identity": self.generator_identity,
                       "compressor_identity": self.compressor_identity, "prompt": self.kept_prompt}, f, indent=2)

    def load(self, out_dir):
        """Loads the weights of a checkpoint into this model, and the prompt that they were trained with; RR stays as it
        is where the checkpoint has none. Raises ValueError when they are of another backbone, of other sizes or another
        lora_alpha, OSError when there is no checkpoint."""
        saved, _ = read_config(out_dir)
        for part in ("generator", "compressor"):
            then, now = saved[f"{part}_identity"], getattr(self, f"{part}_identity")
            # a compressor has one where its backbone is frozen; of older checkpoints only the sizes can be compared
            if then and now and any(then[key] != now[key] for key in then.keys() & now.keys()):
                raise ValueError(f"the checkpoint {out_dir} was trained with another {part}: its is {then}, "
                                 f"this is {now}")
        if saved["lora_alpha"] != self.config.lora_alpha:
            raise ValueError(f"the checkpoint {out_dir} was trained with lora_alpha={saved['lora_alpha']}, this is "
                             f"{self.config.lora_alpha}")
        own = {name: p for name, p in self.named_parameters() if p.requires_grad and not name.startswith("generator.")}
        if not saved["enable_reranking"]:
            own = {name: p for name, p in own.items() if not name.startswith(("compressor.rr_", "compressor.score_"))}
        tensors = load_tensors(os.path.join(out_dir, "compressor.safetensors"), own)
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(tensors[name])
        load_lora(self.generator, out_dir)
        if saved["prompt"]:
            self.use_prompt(saved["prompt"])
        if saved["prompt"] != self.template_prompt:
            template = f"the chat template of {self.config.generator}"
            note(f"{out_dir} was trained with another prompt than {template} writes now: its own is used"
                 if saved["prompt"] else f"{out_dir} was made before prompts were kept: its prompt is taken from "
                 f"{template}")

    @classmethod
    def from_pretrained(cls, out_dir, device="cpu", dtype=None, **overrides):
        """A trained model, ready to generate. dtype: of all weights, by default bfloat16 on CUDA, else float32.
        overrides: settings to replace, such as generator= where the generator's folder has moved."""
        saved, config = read_config(out_dir, **overrides)
        for name in ("generator", "compressor_model"):  # a folder's path counts from where the training was started
            path = getattr(config, name)
            above = (folder / path for folder in Path(out_dir).resolve().parents if (folder / path).is_dir())
            if not os.path.isdir(path):
                setattr(config, name, str(next(above, path)))
        dtype = dtype or (torch.bfloat16 if str(device).startswith("cuda") else torch.float32)
        try:
            model = cls(config, dtype, saved["prompt"])
        except ModelError as e:
            moved = "" if os.path.isdir(config.generator) else " (--generator=FOLDER says where it lies now)"
            raise ModelError(f"{e}{moved}") from e
        model.load(out_dir)
        for p in model.parameters():  # not .to(dtype): it would round the rotary embeddings' frequencies too
            p.data = p.data.to(dtype)
        return model.to(device).eval()


def read_config(out_dir, **overrides):
    """config.json of a checkpoint, as the dict it is and as a ScaleDownConfig. Raises OSError, ValueError."""
    path = os.path.join(out_dir, "config.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{out_dir} holds no checkpoint: {path} does not exist")
    with open(path) as f:
        try:
            saved = json.load(f)
        except ValueError as e:
            raise ValueError(f"{path} is damaged: {e}") from e
    settings = ScaleDownConfig.__dataclass_fields__.keys()
    if isinstance(saved, dict):
        # there has not always been another way
        saved = {"query_dependent": True, "compressor_lora_r": 0, "compressor_norm": True, "compressor_identity": None,
                 "prompt": None} | saved
    others = {"generator_identity", "compressor_identity", "prompt"}
    if not isinstance(saved, dict) or saved.keys() != settings | others:
        raise ValueError(f"{path} is not the config.json of a ScaleDown checkpoint")
    return saved, ScaleDownConfig(**{**{name: saved[name] for name in settings}, **overrides})
