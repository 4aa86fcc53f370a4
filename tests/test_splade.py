"""splade.py against sentence-transformers and dense products, and the memory that a search takes."""

import random

import numba
import numpy as np
import pytest
import torch
from conftest import peak_memory, sentence
from safetensors.torch import load_file
from sentence_transformers import SparseEncoder
from sentence_transformers.sentence_transformer.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling

from splade import Splade, compiled, search, search_shard_cuda, write_shard


def test_encoding_is_sentence_transformers(tiny):
    rng = random.Random(1)
    texts = [sentence(rng, n) for n in (1, 30, 4, 4, 17, 60, 2)]
    pointers, words, weights = Splade(tiny("splade"), "cpu", torch.float32).encode(texts, 64)
    oracle = SparseEncoder(modules=[Transformer(tiny("splade"), transformer_task="fill-mask"), SpladePooling("max")], device="cpu")
    want = oracle.encode(texts, convert_to_sparse_tensor=False).numpy()
    got = np.zeros_like(want)
    for i in range(len(texts)):
        got[i, words[pointers[i]:pointers[i + 1]]] = weights[pointers[i]:pointers[i + 1]]
    assert np.allclose(got, want, atol=1e-5) and (want > 0).any(1).all()


def random_matrix(rng, n, V, per_row):
    dense = np.where(rng.random((n, V)) < per_row / V, rng.integers(1, 5, (n, V)), 0).astype(np.float32)
    rows, words = dense.nonzero()
    return dense, (np.cumsum([0, *np.bincount(rows, minlength=n)]), words.astype(np.int32), dense[rows, words])


@pytest.mark.parametrize("per_row", [0.3, 4, 20])  # small integers: many equal scores; 0.3: queries that find little
def test_search_is_a_dense_product(tmp_path, monkeypatch, per_row):
    rng = np.random.default_rng(0)
    passages, (pointers, words, weights) = random_matrix(rng, 230, 40, per_row)
    queries, rows = random_matrix(rng, 30, 40, per_row)
    for start in range(0, 230, 50):
        end = min(start + 50, 230)
        part = slice(pointers[start], pointers[end])
        with open(tmp_path / f"{start:06d}", "wb") as f:
            write_shard(f, (pointers[start:end + 1] - pointers[start], words[part], weights[part]), 40, start)
    shards = sorted(tmp_path.iterdir())
    dense = queries @ passages.T
    order = np.argsort(-dense, axis=1, kind="stable")[:, :12]
    scores = np.take_along_axis(dense, order, 1)
    order[scores == 0] = -1
    best, got = search(shards, rows, 40, 12, "cpu")
    assert np.array_equal(best, order) and np.array_equal(got, scores)
    # CUDA's half, on the CPU
    best, got = torch.full((30, 12), -1), torch.zeros(30, 12)
    for i, path in enumerate(shards):
        shard = load_file(path)
        search_shard_cuda(torch.from_numpy(queries.T.copy()), shard["pointers"], shard["passages"], shard["weights"],
                                  min(50, 230 - 50 * i), 50 * i, best, got)
    assert np.array_equal(best, order) and np.array_equal(got, scores)


def test_a_checkout_that_cannot_be_written_compiles_without_a_cache(monkeypatch):
    njit = numba.njit

    def no_place(*args, cache=False, **kwargs):
        if cache:
            raise RuntimeError("cannot cache function 'f': no locator available")
        return njit(*args, **kwargs)

    monkeypatch.setattr(numba, "njit", no_place)
    assert compiled(lambda x: x + 1)(1) == 2


HEAD = "import os, bench, splade, numpy\nrng = numpy.random.default_rng(0)\n"


def write_index(folder, n, shard_passages):
    """A synthetic index of n passages."""
    folder.mkdir()
    peak_memory(HEAD + f"splade.SHARD_PASSAGES = {shard_passages}\nbench.write_index({str(folder)!r}, rng, {n})")


def search_memory(index, shards, last):
    """Of a search in the first shards of an index. last: a passage after which one is found."""
    return peak_memory(HEAD + f"q = bench.sparse_matrix(rng, 64, 40)\n"
                       f"shards = sorted(os.path.join({str(index)!r}, name) for name in os.listdir({str(index)!r}))\n"
                       f"best, _ = splade.search(shards[:{shards}], q, 30522, 50, 'cpu')\n"
                       f"assert best.min() >= 0 and best.max() > {last}")


def test_memory_of_search(tmp_path):
    write_index(tmp_path / "index", 120_000, 5000)
    # 90 MB more on disk
    assert search_memory(tmp_path / "index", 24, 108_000) < search_memory(tmp_path / "index", 8, 36_000) + 40


@pytest.mark.slow
def test_memory_of_search_in_a_million_passages(tmp_path):
    write_index(tmp_path / "index", 1_000_000, 100_000)
    assert search_memory(tmp_path / "index", 10, 900_000) < 2048
