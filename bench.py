"""
What things cost, measured on this machine against the usual way of doing them, side by side in one run:

    python bench.py --what=prepare --splade=FOLDER --corpus=corpus.jsonl   # encoding and search of prepare.py

Needs requirements-dev.txt, which has what is compared with. Before anything is timed, both sides must give the same.
"""

import os
import statistics
import tempfile
import time
from itertools import islice

import numpy as np
import torch

import prepare
from configurator import at_least, configure, fail, torch_device
from model import document_text

# -----------------------------------------------------------------------------
what = "prepare"
splade = "naver/splade-v3"  # a name of the hub or a folder
corpus = ""  # texts to encode, in any of prepare.py's formats; the first `texts` documents
texts = 512
passages = 100_000  # of the synthetic index, with 150 words each
queries = 1024  # with 40 words each
repeats = 5
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = "bfloat16" if torch.cuda.is_available() else "float32"
# -----------------------------------------------------------------------------


def timed(ways, n, unit):
    """ways: {name: function}, each called `repeats` times, in turns after one call that does not count; prints the
    median of n things a second with the least and the most, and how much faster the first way is."""
    seconds = {name: [] for name in ways}
    for i in range(repeats + 1):
        for name, way in ways.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
    first = statistics.median(next(iter(seconds.values())))
    for name, s in seconds.items():
        median = statistics.median(s)
        print(f"{name:40} {n / median:10,.1f} {unit}/s  ({n / max(s):,.1f} to {n / min(s):,.1f})   "
              f"{median / first:5.2f}x the first's time")


def bench_encoding():
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sentence_transformer.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    documents = [document_text(dict(title=title, text=text))
                 for _, title, text in islice(prepare.read_documents(corpus), texts)]
    model = prepare.Splade(splade, device, getattr(torch, dtype))
    module = Transformer(splade, transformer_task="fill-mask", model_kwargs=dict(dtype=dtype))
    other = SparseEncoder(modules=[module, SpladePooling("max")], device=device)
    pointers, words, weights = model.encode(documents, prepare.batch_tokens)
    theirs = other.encode(documents, convert_to_sparse_tensor=False).float().cpu().numpy()
    ours = np.zeros_like(theirs)
    ours[np.repeat(np.arange(len(documents)), np.diff(pointers)), words] = weights
    print(f"encoding {len(documents)} passages with {splade}: {len(words) / len(documents):.0f} words a passage")
    print(f"largest difference from sentence-transformers: {abs(ours - theirs).max():.1e}")
    if not np.allclose(ours, theirs, atol=1e-4 if dtype == "float32" else 0.1):
        fail("the two encoders do not agree")
    timed({"prepare.py": lambda: model.encode(documents, prepare.batch_tokens),
           "sentence-transformers, batch 32 (default)": lambda: other.encode(documents),
           "sentence-transformers, batch 8": lambda: other.encode(documents, batch_size=8)}, len(documents), "passages")


def sparse_matrix(rng, n, words_a_row, vocab_size=30522):
    """Rows of words drawn by a Zipf-like law, as SPLADE's are, and random weights: pointers, words, weights."""
    p = (10 + np.arange(vocab_size)) ** -0.8
    drawn = np.searchsorted(np.cumsum(p / p.sum()), rng.random((n, words_a_row))).clip(max=vocab_size - 1)
    drawn = np.unique(drawn + vocab_size * np.arange(n)[:, None])  # a word once a row
    pointers = np.searchsorted(drawn, vocab_size * np.arange(n + 1))
    weights = rng.gamma(2.0, 0.4, len(drawn)).astype(np.float32)
    return pointers, (drawn % vocab_size).astype(np.int32), weights


def write_index(folder, rng, n):
    """A synthetic index of n passages on disk, in shards as prepare.py makes them; -> their files."""
    size = prepare.part_size(n, prepare.SHARD_PASSAGES)
    for i, start in enumerate(range(0, n, size)):
        shard = prepare.inverted(*sparse_matrix(rng, min(size, n - start), 150), 30522, start)
        with open(f"{folder}/{i:06d}", "wb") as f:
            f.write(prepare.to_safetensors(shard))
    return sorted(os.path.join(folder, name) for name in os.listdir(folder))


def bench_search():
    import scipy.sparse
    from splade_index.numba.retrieve_utils import _retrieve_numba_functional

    rng, k = np.random.default_rng(0), 50
    q = sparse_matrix(rng, queries, 40)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        shards = write_index(folder, rng, passages)
        rows, columns, values = [], [], []
        for path in shards:
            shard = {key: t.numpy() for key, t in prepare.load_file(path).items()}
            columns.append(np.repeat(np.arange(30522), np.diff(shard["pointers"])))
            rows.append(shard["passages"] + shard["span"][0])
            values.append(shard["weights"])
        matrix = scipy.sparse.csr_matrix((np.concatenate(values), (np.concatenate(columns), np.concatenate(rows))),
                                         shape=(30522, passages))  # (V, n)
        del rows, columns, values
        scores = dict(data=matrix.data, indices=matrix.indices, indptr=matrix.indptr, num_docs=passages)
        by_query = np.split(q[1], q[0][1:-1]), np.split(q[2], q[0][1:-1])
        q_matrix = scipy.sparse.csr_matrix((q[2], q[1], q[0]), shape=(queries, 30522))

        def with_scipy():
            out = q_matrix @ matrix
            best = []
            for i in range(queries):
                row = slice(out.indptr[i], out.indptr[i + 1])
                top = np.argpartition(-out.data[row], k)[:k]
                best.append(np.sort(out.data[row][top])[::-1])
            return np.stack(best)

        def with_splade_index():
            return _retrieve_numba_functional(*by_query, scores, k=k, n_threads=threads)[1]

        prepare.numba.set_num_threads(threads)
        ours = prepare.search(shards, q, 30522, k, device)[1]
        print(f"\nsearching {passages:,} synthetic passages for {queries} queries, the {k} best, {threads} threads: "
              f"{matrix.nnz / passages:.0f} words a passage, {len(q[1]) / queries:.0f} a query")
        differences = [abs(ours - other()).max() for other in (with_scipy, with_splade_index)]
        print("largest difference from scipy.sparse: {:.1e}, from splade-index: {:.1e}".format(*differences))
        if max(differences) > 1e-4:
            fail("the searches do not agree")
        timed({"prepare.py, index on disk": lambda: prepare.search(shards, q, 30522, k, device),
               "scipy.sparse, index in memory": with_scipy,
               "splade-index (numba), index in memory": with_splade_index}, queries, "queries")


if __name__ == "__main__":
    configure(globals())
    device = torch_device(device)
    at_least(globals(), texts=1, passages=100, queries=1, repeats=1)
    if what != "prepare":
        fail(f"what is prepare, not '{what}'")
    if not os.path.isfile(corpus):
        fail(f"--corpus=FILE: a file of texts to encode ({corpus or 'none given'})")
    bench_encoding()
    bench_search()
