"""
Retrieval with SPLADE (arXiv 2403.06789): texts become sparse vectors, a weight for every word of the vocabulary, and
the passages with the largest inner products are found exactly.

An index is a folder of shards, which are searched one after the other: on a CPU they are mapped from disk and compiled
code (numba) adds up the lists of the query's words; on a GPU it is torch's sparse product. n passages, V words, B
queries, k passages to be found.
"""

import json
from pathlib import Path

import numba
import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from transformers import AutoModelForMaskedLM
from transformers.utils import cached_file

from parts import by_length, pad, part_size, parts_of
from pretrained import load_model, load_tokenizer, longest_text

SHARD_PASSAGES = 50_000


# ---- encoding


def check_pooling(name):
    """Raises ValueError for a model of sentence-transformers that makes its weights in another way than Splade does."""
    def read(file):
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False,
                           _raise_exceptions_for_connection_errors=False)
        return json.loads(Path(path).read_text()) if path else None

    modules = read("modules.json")
    if not modules:  # a plain masked language model
        return
    kinds = [m["type"].rpartition(".")[2] for m in modules]
    if kinds not in (["MLMTransformer", "SpladePooling"], ["Transformer", "SpladePooling"]) or modules[0]["path"]:
        raise ValueError(f"{name} is made of {', '.join(kinds)}: a masked language model and SpladePooling are needed")
    pooling = read(f"{modules[1]['path']}/config.json") or {}
    for key, ours in (("activation_function", "relu"), ("pooling_strategy", "max")):
        if pooling.get(key, ours) != ours:
            raise ValueError(f"{name} is trained with {key}={pooling[key]}: only {ours} is supported")


class Splade:
    """log(1 + max over the text's tokens of relu(logit)), for every word of the vocabulary.

    log(1 + relu(x)) is monotone, so the maximum over the tokens is taken first, one text at a time and in place of the
    model's output layer: logits of shape (B, T, V), half a gigabyte for 4,096 tokens, never exist.
    """

    def __init__(self, name, device, dtype):
        check_pooling(name)
        self.tokenizer = load_tokenizer(name)
        self.model = load_model(AutoModelForMaskedLM, name, dtype=dtype).eval().to(device)
        self.max_length = longest_text(self.model, self.tokenizer)
        self.output = self.model.get_output_embeddings()
        self.output.forward = self.max_over_tokens
        self.vocab_size = len(self.output.weight)

    def max_over_tokens(self, hidden):
        """Last hidden states (B, T, d) -> the largest logits of the texts' own tokens (B, V)."""
        W, b = self.output.weight, self.output.bias  # (V, d), (V,)
        rows = torch.stack([torch.mm(h[:n], W.T).amax(0) for h, n in zip(hidden, self.lengths)])  # (B, V)
        return rows if b is None else rows + b

    @torch.inference_mode()
    def encode(self, texts, batch_tokens):
        """n texts -> pointers (n + 1,), words, weights of a sparse (n, V) matrix: the words of row i are
        words[pointers[i]:pointers[i + 1]], in ascending order, and their weights stand at the same places of weights.
        numpy arrays."""
        rows = []
        for window in parts_of(texts, 8192):  # token ids in lists take much memory
            ids = self.tokenizer(window, truncation=True, max_length=self.max_length)
            lengths = [len(x) for x in ids["input_ids"]]
            found = [None] * len(window)
            for batch in by_length(lengths, batch_tokens):
                self.lengths = [lengths[i] for i in batch]
                weights = self.model(**pad(self.tokenizer, ids, batch).to(self.model.device)).logits  # (B, V)
                weights = weights.float().relu().log1p()
                row, word = weights.nonzero(as_tuple=True)
                counts = row.bincount(minlength=len(batch)).tolist()
                for i, w, v in zip(batch, word.int().cpu().split(counts), weights[row, word].cpu().split(counts)):
                    found[i] = w.numpy(), v.numpy()
            rows += found
        pointers = np.cumsum([0] + [len(words) for words, _ in rows])
        return pointers, np.concatenate([w for w, _ in rows]), np.concatenate([v for _, v in rows])


# ---- the index


def shard_size(n):
    """Passages in a shard of an index of n passages."""
    return part_size(n, SHARD_PASSAGES)


def inverted(pointers, words, weights, vocab_size, first):
    """A sparse (n, V) matrix by rows -> the shard of the n passages from number `first` on: the same by words, as
    tensors. passages[pointers[w]:pointers[w + 1]] are the rows that have word w, in ascending order, and their weights
    stand at the same places of weights. span: `first`, and the number after the last."""
    passages = np.repeat(np.arange(len(pointers) - 1, dtype=np.int32), np.diff(pointers))
    order = np.argsort(words, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(words, minlength=vocab_size))])
    return dict(pointers=torch.from_numpy(starts), passages=torch.from_numpy(passages[order]),
                weights=torch.from_numpy(weights[order]), span=torch.tensor([first, first + len(pointers) - 1]))


def write_shard(file, matrix, vocab_size, first):
    """Writes the shard of the passages from number `first` on; matrix: what Splade.encode() makes of their texts."""
    file.write(to_safetensors(inverted(*matrix, vocab_size, first)))


def find_shards(folder):
    """The shards of an index, in the order of their passages, and the number of passages in them."""
    shards = sorted(Path(folder).glob("[0-9]*"))
    return shards, sum(end - first for first, end in (load_file(path)["span"].tolist() for path in shards))


# ---- search


def compiled(function):
    try:
        return numba.njit(parallel=True, cache=True)(function)
    except RuntimeError:  # no folder for the cache: checkout and home are read-only
        return numba.njit(parallel=True)(function)


@compiled
def search_shard(q_pointers, q_words, q_weights, pointers, passages, weights, n, first, best, scores):
    """Puts what the shard of n passages from number `first` on has to offer into best and scores, (B, k), the best of
    the shards before it."""
    for q in numba.prange(len(q_pointers) - 1):
        dense = np.zeros(-(-n // 64) * 64, np.float32)  # the query's scores of the shard's n passages
        for j in range(q_pointers[q], q_pointers[q + 1]):
            start, end, weight = pointers[q_words[j]], pointers[q_words[j] + 1], q_weights[j]
            these, their_weights = passages[start:end], weights[start:end]
            for i in range(end - start):
                dense[these[i]] += weight * their_weights[i]
        for block in range(0, n, 64):
            better, least = False, scores[q, -1]
            for p in range(block, block + 64):  # without a branch, so that 16 are compared at a time
                better |= dense[p] > least
            for p in range(block, block + 64 if better else block):
                if dense[p] > scores[q, -1]:
                    i = scores.shape[1] - 1
                    while i > 0 and scores[q, i - 1] < dense[p]:
                        scores[q, i], best[q, i] = scores[q, i - 1], best[q, i - 1]
                        i -= 1
                    scores[q, i], best[q, i] = dense[p], first + p


def search_shard_cuda(q_matrix, pointers, passages, weights, n, first, best, scores):
    """The same with torch's sparse product. q_matrix (V, B), best and scores (B, k), all on the shard's device."""
    B, k = best.shape
    by_word = torch.sparse_csc_tensor(pointers, passages.long(), weights, (n, len(q_matrix)))
    dense = (by_word.to_sparse_csr() @ q_matrix).T  # (B, n)
    # only what beats the running k-th, and as much of that as can be among the k best
    least = torch.maximum(scores[:, -1:], dense.topk(min(k, n)).values[:, -1:].nextafter(dense.new_tensor(-1.0)))
    row, column = (dense > least).nonzero(as_tuple=True)
    row = torch.cat([torch.arange(B, device=row.device).repeat_interleave(k), row])
    found = torch.cat([best.flatten(), first + column])
    score = torch.cat([scores.flatten(), dense[row[B * k:], column]])
    order = score.argsort(descending=True, stable=True)  # stable: equals keep the order of the corpus
    order = order[row[order].argsort(stable=True)]
    counts = row.bincount(minlength=B)
    starts = (counts.cumsum(0) - counts)[:, None] + torch.arange(k, device=row.device)  # the first k of every row
    best.copy_(found[order[starts]])
    scores.copy_(score[order[starts]])


def search(shards, queries, vocab_size, k, device):
    """The k passages with the largest scores, exactly: the sum over words of the query's weight times the passage's.

    shards: files, in the order of their passages. queries: pointers, words, weights of a sparse (B, V) matrix.
    Returns passages (B, k), scores (B, k), best first; of equal scores the first in the corpus comes first; -1 and 0
    where no further passage shares a word with the query. numpy arrays.
    """
    pointers, words, weights = queries
    B = len(pointers) - 1
    best, scores = torch.full((B, k), -1), torch.zeros(B, k)
    on_cuda = str(device).startswith("cuda")
    if on_cuda:
        best, scores, q_matrix = best.to(device), scores.to(device), torch.zeros(vocab_size, B, device=device)
        row = torch.arange(B).repeat_interleave(torch.from_numpy(np.diff(pointers)))
        q_matrix[torch.from_numpy(words).long(), row] = torch.from_numpy(weights).to(device)
    else:
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    for path in shards:
        shard = load_file(path, device=str(device) if on_cuda else "cpu")  # on a CPU it is mapped, not read
        first, end = shard["span"].tolist()
        lists = [shard[name] for name in ("pointers", "passages", "weights")]
        if on_cuda:
            search_shard_cuda(q_matrix, *lists, end - first, first, best, scores)
        else:
            search_shard(pointers, words, weights, *(t.numpy() for t in lists), end - first, first, best.numpy(),
                         scores.numpy())
    return best.cpu().numpy(), scores.cpu().numpy()
