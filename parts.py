"""
Work in parts. A file of any size is made in parts, of which a crash costs one and which several processes share; it
gets its name when it is complete, so that a file that has its name can be trusted. Where the parts end depends on the
items alone: any number of processes makes the same files, byte for byte. Texts go through a model in batches.
"""

import os
import shutil
from itertools import islice

from tqdm import tqdm

from distributed import rank, share, world
from files import replacing


def part_size(n, most):
    """Items in a part of n items: at least 8 parts, so that processes can share a small job, none larger than `most`,
    which is what a crash can cost."""
    return max(1, min(most, -(-n // 8)))


def parts_of(items, size):
    """Yields lists of `size` items, the last one shorter."""
    items = iter(items)
    while part := list(islice(items, size)):
        yield part


def make_parts(folder, parts, write, bar=None):
    """Writes part i into the file FOLDER/i, by write(file, part), in process i % world; what is there stays. bar counts
    items. Returns the number of parts."""
    os.makedirs(folder, exist_ok=True)
    n = 0
    for i, part in enumerate(parts):
        path, n = f"{folder}/{i:06d}", i + 1
        if i % world == rank and not os.path.exists(path):
            with replacing(path) as f:
                write(f, part)
        if bar is not None:
            bar.update(len(part))
    if bar is not None:
        bar.close()
    share()
    return n


def join_parts(path, n):
    """Makes the file PATH of the n files in PATH.parts, in the first process. Removes none of them: a crash before the
    manifest knows of PATH must find them."""
    if rank == 0:
        with replacing(path) as f:
            for i in range(n):
                with open(f"{path}.parts/{i:06d}", "rb") as part:
                    shutil.copyfileobj(part, f)
    share()


def progress(what, **kwargs):
    return tqdm(desc=f"{what:9}", disable=rank > 0, mininterval=1, **kwargs)


def by_length(lengths, batch_tokens):
    """Yields lists of indices, texts of similar length together, the longest first: a batch, padded, holds at most
    batch_tokens tokens, or a single longer text."""
    batch = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pad(tokenizer, encodings, batch):
    """The encodings number `batch` (indices) as padded tensors."""
    return tokenizer.pad({name: [rows[i] for i in batch] for name, rows in encodings.items()}, return_tensors="pt")
