"""
The ways in which a checkpoint answers questions, next to one another:

    compressed  from the documents' memory, made now or taken from a store
    reranked    the same, of only the documents that the compressor finds most relevant
    fine-tuned  in place of both, where the checkpoint was trained with mode=full or none: from what it was trained on
    full, none  the same generator without its adapter, from the documents' full text, or without any
"""

import torch
from safetensors import SafetensorError

from configurator import fail, fast_dtype, torch_device
from data import Store
from files import file_sha256
from lora import merge, merge_and_unload
from model import ScaleDown


class Modes:
    """A checkpoint, ready to answer. keep: answer from the n most relevant documents (enable_reranking), 0 = from all;
    store: a folder with their memory; mode: the one to answer in, empty = all that it has. Exits with one line for
    what does not go together. names: the modes to answer in."""

    def __init__(self, out_dir, device, dtype, keep=0, store="", generator="", compressor_model="", mode=""):
        device = torch_device(device)
        dtype = dtype or fast_dtype(device)
        if dtype not in ("float32", "bfloat16"):
            fail(f"dtype is float32 or bfloat16, not '{dtype}'")
        moved = dict(generator=generator, compressor_model=compressor_model)
        self.dtype = getattr(torch, dtype)
        self.model = ScaleDown.from_pretrained(out_dir, device, self.dtype,
                                               **{name: value for name, value in moved.items() if value})
        config = self.model.config
        if store and config.mode != "compressed":
            fail(f"{out_dir} was trained with mode={config.mode}: it makes no memory to store")
        if store and config.query_dependent:
            fail(f"{out_dir} was trained with query_dependent=True: it reads documents together with the query, so "
                 "that there is nothing to store")
        if keep and not config.enable_reranking:
            fail(f"{out_dir} was trained without enable_reranking: it has no relevance to keep documents by")
        self.keep, self.store, trained = keep, None, self.model.modes
        every = trained[:1] + ["reranked"] * bool(keep) + trained[1:]
        self.names = [name for name in every if mode in ("", name)]
        if not self.names:
            fail(f"mode is one of {out_dir}'s, {', '.join(every)}, not '{mode}'")
        if {"full", "none"}.isdisjoint(self.names) and not getattr(self.model.compressor, "shares_generator", False):
            merge(self.model.generator)  # nothing will ask for it without the adapter, and a token takes less time
        self.made_of = store and {name: file_sha256(f"{out_dir}/{file}") for name, file in
                                  (("compressor", "compressor.safetensors"), ("config", "config.json"))}

    def export(self, folder):
        """Writes the generator with its LoRA merged, and its tokeniser, as an ordinary Hugging Face folder. Nothing can
        be answered here afterwards."""
        merge_and_unload(self.model.generator)
        try:
            self.model.generator.save_pretrained(folder)
            self.model.tokenizer.save_pretrained(folder)
        except (OSError, SafetensorError) as e:
            fail(f"{folder} could not be written: {e}")

    def open_store(self, folder):
        self.store = Store(folder, **self.made_of)

    def reads(self, examples, mode):
        """What a mode reads for some examples: queries, lists of documents and, where it is made already, their memory
        (B, k, l, d)."""
        queries, documents = [x["query"] for x in examples], [x["documents"] for x in examples]
        if mode == "reranked":
            memory, relevance = self.model.compress(queries, documents)  # (B, k, l, d), (B, k)
            for x, row in zip(examples, relevance.tolist()):
                x["relevance"] = row[:len(x["documents"])]
            best = [sorted(range(len(x["documents"])), key=lambda i: -x["relevance"][i])[:self.keep] for x in examples]
            documents = [[docs[i] for i in row] for docs, row in zip(documents, best)]
            k = max(map(len, best))
            memory = torch.stack([m[row + [0] * (k - len(row))] for m, row in zip(memory, best)])  # (B, keep, l, d)
            return queries, documents, memory
        documents = [docs[:self.keep or None] for docs in documents]
        if not self.store or mode != "compressed":
            return queries, documents, None
        return queries, documents, self.store.memory(documents).to(self.model.device)

    def answer(self, mode, queries, documents, memory, max_new_tokens=0, temperature=0.0, top_k=0):
        """Answers to what reads() has returned. max_new_tokens: 0 = the checkpoint's answer_tokens."""
        return self.model.generate(queries, documents, max_new_tokens or None, temperature, top_k,
                                   "compressed" if mode == "reranked" else mode, memory=memory)
