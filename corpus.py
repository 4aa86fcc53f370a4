"""
Passages: documents cut into chunks of a number of tokens, and corpus.jsonl, in which they lie on disk, as a table that
is looked up by number and by id. Memory holds none of it: the largest corpora (Wikipedia, 30 million passages) do not
fit.
"""

import json
import re
from array import array
from hashlib import blake2b

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from configurator import fail
from data import document_text
from files import replacing
from formats import document_id, records
from parts import progress


def chunk(tokenizer, documents, max_tokens):
    """Cuts documents [(id, title, text), ..] into passages [{"_id": "ID#0", "title", "text"}, ..]: each text every n
    tokens, so that a passage with its title, as document_text() writes it, has at most max_tokens (>= 8).

    No character of a text is lost but white space at a cut; a character of several tokens that a cut would split goes
    to the next chunk whole. A title is cut at half of max_tokens.
    """
    def offsets_of(texts):
        # a control token in a text is read as the text that it is (pretrained.py)
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True,
                         verbose=False).offset_mapping

    titles, room = [], []
    for (_, title, _), offsets in zip(documents, offsets_of([f"{title}\n" for _, title, _ in documents])):
        if len(offsets) > max_tokens // 2:
            title = title[:offsets[max_tokens // 2 - 1][0]].strip()
        titles.append(title)
        room.append(max_tokens - min(len(offsets), max_tokens // 2) * bool(title))
    starts = [[start for start, _ in offsets] for offsets in offsets_of([text for _, _, text in documents])]
    pieces, todo = [[] for _ in documents], range(len(documents))
    while todo:
        for i in todo:
            text = documents[i][2]
            cuts = [0, *starts[i][room[i]::room[i]], len(text)]
            pieces[i] = [piece for a, b in zip(cuts, cuts[1:]) if (piece := text[a:b].strip())]
            pieces[i] = pieces[i] or [""] * bool(titles[i])  # a title alone is a passage
        # a word that a cut has split can take a token more when it is read again: then the document is cut shorter
        rows = [(i, document_text(dict(title=titles[i], text=piece))) for i in todo for piece in pieces[i]]
        lengths = map(len, offsets_of([text for _, text in rows]) if rows else [])
        todo = sorted({i for (i, _), n in zip(rows, lengths) if n > max_tokens and room[i] > 1})
        for i in todo:
            room[i] -= 1
    return [dict(_id=f"{id}#{n}", title=title, text=piece)
            for (id, _, _), title, texts in zip(documents, titles, pieces) for n, piece in enumerate(texts)]


def chunk_by_words(documents, n):
    """As chunk(), each text every n words (KILT's passages have 100, on which PISCO and OSCAR were trained)."""
    def pieces(title, text):
        words = [m.span() for m in re.finditer(r"\S+", text)]
        found = [text[words[i][0]:words[min(i + n, len(words)) - 1][1]] for i in range(0, len(words), n)]
        return found or [""] * bool(title)  # a title alone is a passage

    return [dict(_id=f"{id}#{i}", title=title, text=piece)
            for id, title, text in documents for i, piece in enumerate(pieces(title, text))]


def id_hash(id):
    """The hash of an id, 64 bits."""
    return int.from_bytes(blake2b(id.encode(), digest_size=8).digest(), "big", signed=True)


def index_corpus(folder, source):
    """Writes corpus.index, of all lines of corpus.jsonl: their offsets, and the hashes of their ids in ascending order
    with the lines' numbers. Takes some 70 bytes of memory a passage. Returns the number of passages. Exits when there
    is none, or when two documents of the file `source`, which they were made of, have the same id."""
    offsets, hashes, position = array("q"), array("q"), 0
    with open(f"{folder}/corpus.jsonl", "rb") as f:
        for line in progress("ids", iterable=f, unit=" chunks"):
            offsets.append(position)
            hashes.append(id_hash(json.loads(line)["_id"]))
            position += len(line)
    if not offsets:
        fail(f"{source} holds no text")
    hashes, order = torch.frombuffer(hashes, dtype=torch.int64).sort(stable=True)
    with replacing(f"{folder}/corpus.index") as f:
        f.write(to_safetensors(dict(offsets=torch.frombuffer(offsets, dtype=torch.int64), hashes=hashes, order=order)))
    same = (hashes[1:] == hashes[:-1]).nonzero()
    if len(same):
        id = Corpus(folder)[order[same[0, 0]].item()]["_id"].rpartition("#")[0]
        first, second, *_ = [where for where, x in records(source) if str(document_id(x)) == id]
        fail(f"{second}: the _id '{id}' stands already in {first.rpartition(', ')[2]}")
    return len(offsets)


class Corpus:
    """corpus.jsonl, a passage by its number or its id. Offsets and hashes are mapped from disk."""

    def __init__(self, folder):
        self.file = open(f"{folder}/corpus.jsonl", "rb")
        index = load_file(f"{folder}/corpus.index")
        self.offsets, self.hashes, self.order = (index[name].numpy() for name in ("offsets", "hashes", "order"))

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, number):
        self.file.seek(self.offsets[number])
        return json.loads(self.file.readline())

    def numbers(self, ids):
        """Ids -> numbers of passages, -1 for an id that is none."""
        hashes = np.fromiter(map(id_hash, ids), np.int64, len(ids))
        at = np.searchsorted(self.hashes, hashes).clip(max=len(self) - 1)
        return np.where(self.hashes[at] == hashes, self.order[at], -1)

    def of(self, hits):
        """The passages of a query's (id, score) pairs."""
        return [self[i] for i in self.numbers([id for id, _ in hits])]
