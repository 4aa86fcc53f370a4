"""
Training examples and documents on disk, and memory of documents that was made before.

An example is one JSON object: {"query": str, "documents": [str or {"title", "text"}, ...], "answer": str,
"reranking_scores": [float, ...]?, "answers": [gold str, ...]?}; a file is JSON Lines or one JSON list. The names that
PISCO's and CLaRa's published data have are understood, too (formats.py).
"""

import codecs
import json
import math
import mmap
import os
import random
import re
import sys
from array import array
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configurator import fail
from distributed import host_sum, print0, rank, run_script
from files import read_lines
from formats import check_unicode, examples_of
from pretrained import load_tokenizer


def is_document(d):
    """A string, or an object with a text and perhaps a title; either may be empty or null."""
    if isinstance(d, dict):
        return "text" in d and all(isinstance(d.get(name) or "", str) for name in ("text", "title"))
    return isinstance(d, str)


def document_text(document):
    """A document as the models read it: a string, or the title on a line of its own before the text."""
    if isinstance(document, str):
        return document.strip()
    return f"{document.get('title') or ''}\n{document['text'] or ''}".strip()


def check_example(x, need_answer, need_scores):
    """Says in a few words what is wrong with a parsed example; None when it is good."""
    if not isinstance(x, dict):
        return "not a JSON object"
    if isinstance(x.get("query"), list):
        return f"{len(x['query'])} questions, which is not the number of answers"
    if not isinstance(x.get("query"), str) or not x["query"].strip():
        return "'query' is missing or empty"
    documents = x.get("documents")
    if not isinstance(documents, list) or not documents:
        return "no documents"
    if not all(map(is_document, documents)):
        return "a document is neither a string nor an object with 'title' and 'text'"
    if not isinstance(x.get("answer"), str) and (need_answer or "answer" in x):
        return "'answer' is missing or no string"
    golds = x.get("answers") or []
    if not isinstance(golds, list) or not all(isinstance(g, str) for g in golds):
        return "'answers' is not a list of strings"
    scores = x.get("reranking_scores")
    if need_scores and scores is None:
        return "'reranking_scores' is missing, and enable_reranking is True"
    if scores is not None:
        if not isinstance(scores, list) or not all(type(s) in (int, float) and math.isfinite(s) for s in scores):
            return "'reranking_scores' is not a list of numbers"
        if len(scores) != len(documents):
            return f"{len(documents)} documents but {len(scores)} reranking_scores"
    return None


class Examples:
    """The examples of a .jsonl or .json file, read when asked for: memory holds two offsets an example, not the text.

    Every example is parsed once here, so that a broken one stops a run at its start and not in its tenth hour.
    Raises ValueError with file and line number for a broken or incomplete example, FileNotFoundError for a missing one.
    """

    def __init__(self, path, need_answer=True, need_scores=False):
        self.read(path, partial(check_example, need_answer=need_answer, need_scores=need_scores))

    kind, parse, rows = "examples", staticmethod(json.loads), staticmethod(examples_of)
    is_empty = staticmethod(lambda x: False)

    def read(self, path, check):
        """check: says what is wrong with a parsed example, None when it is good."""
        if not os.path.isfile(path):
            made = self.kind == "examples" and re.search(r"(?:^|/)data/([^/]+)/(?:train|val)\.jsonl$", path)
            raise FileNotFoundError(f"{path} does not exist" + (
                "" if not made else ": python train.py config/toy.py makes the toy" if made[1] == "toy" else
                f": python prepare.py --dataset={made[1]} --corpus=FILE --queries=FILE makes it"))
        self.path = path
        self.spans = array("q")  # of example i at 3 i: start and end of its row, and which it is of the row's examples
        if os.path.getsize(path) == 0:
            raise ValueError(f"{path} holds no {self.kind}")
        self.file = open(path, "rb")
        self.empty = 0
        for start, end, text in self.list_items() if self.is_list() else self.lines():
            try:
                rows = self.rows(self.parse(text))
                if b"\\ud" in text.lower():
                    check_unicode(rows)
                wrong = next(filter(None, map(check, rows)), None)
                if not wrong and self.is_empty(rows[0]):
                    self.empty += 1
                    continue
            except ValueError as e:
                wrong = f"{'no UTF-8' if isinstance(e, UnicodeDecodeError) else 'broken JSON'}: {e}"
            if wrong:
                raise ValueError(self.at(start, wrong))
            for i in range(len(rows)):
                self.spans.extend((start, end, i))
        if not self.spans:
            raise ValueError(f"{path} holds no {self.kind}")

    def is_list(self):
        """Whether the file is one JSON list, by what it begins with."""
        head = self.file.peek(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
        return self.parse is json.loads and head[:1] == b"["

    def at(self, offset, wrong):
        with open(self.path, "rb") as f:
            before = [f.read(min(1 << 20, offset - start)) for start in range(0, offset, 1 << 20)]
        line = 1 + (sum(part.count(b"\n") for part in before) or sum(part.count(b"\r") for part in before))
        return f"{self.path}, line {line}: {wrong}"

    def lines(self):
        """(start, end, text) of every line that is not blank. Read, not mapped: mapped pages would stay in memory."""
        start = 0
        for line in read_lines(self.file):
            if line.strip():
                yield start, start + len(line), line
            start += len(line)

    def list_items(self):
        """(start, end, text) of the objects of a JSON list, found by counting brackets outside strings."""
        depth, separator = 0, b"["
        file = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        end = kept = len(codecs.BOM_UTF8) if file[:3] == codecs.BOM_UTF8 else 0
        for m in re.finditer(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', file, re.DOTALL):
            c = m[0][:1]
            if c in b"[{":
                depth += 1
                if depth == 2:
                    start = m.start()
                    if file[end:start].strip() != separator:
                        raise ValueError(self.at(end, "broken JSON: not a list of objects"))
            elif c in b"]}":
                depth -= 1
                if depth == 1:
                    end, separator = m.end(), b","
                    yield start, end, file[start:end]
                    if end - kept > 1 << 24:  # mapped pages would stay in memory
                        file.madvise(mmap.MADV_DONTNEED)
                        kept = end
        if b"".join(file[end:].split()) == b"[]":
            return
        if depth != 0 or file[end:].strip() != b"]":
            raise ValueError(self.at(end, "broken JSON: the list does not end as a list of objects does"))

    def __len__(self):
        return len(self.spans) // 3

    def __getitem__(self, n):
        start, end, i = (self.spans[3 * n + j] for j in range(3))
        return self.rows(self.parse(os.pread(self.file.fileno(), end - start, start)))[i]


class Documents(Examples):
    """The documents of a file of JSON, {"title", "text"} objects or strings, or, one a line, of plain text. Empty ones
    are left out, which a line on stderr says.

    Raises what Examples raises, and ValueError for a .tsv file."""

    kind, rows = "documents", staticmethod(lambda x: [x])
    is_empty = staticmethod(lambda x: not document_text(x))

    def __init__(self, path):
        if path.endswith(".tsv"):
            raise ValueError(f"{path}: columns; prepare.py makes a corpus.jsonl of them, which can be read here")
        if not path.endswith((".jsonl", ".json", ".ndjson")) and not self.begins_as_json(path):
            self.parse = lambda line: line.decode("utf-8-sig").strip()
        self.read(path, lambda x: None if is_document(x) else "neither a text nor an object with 'title' and 'text'")
        if self.empty:
            print(f"{path}: {self.empty:,} empty documents left out", file=sys.stderr)

    @staticmethod
    def begins_as_json(path):
        try:
            with open(path, "rb") as f:
                return isinstance(json.loads(next(line for line in read_lines(f) if line.strip())), dict)
        except (OSError, ValueError, StopIteration):
            return False


class Chunks(Documents):
    """Examples to pretrain on, two of every document: one asks for a chunk of it again, one for what follows a
    chunk (auto-encoding and continuation; COCOM, arXiv 2407.09252, section 3.3; OSCAR, appendix I). A chunk has at most
    max_tokens of the tokeniser's, begins anywhere, and is the same every time.

    Raises what Examples raises."""

    REPEAT, CONTINUE = "Repeat it.", "Continue it."

    def __init__(self, path, tokenizer, max_tokens):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        super().__init__(path)

    def __len__(self):
        return 2 * super().__len__()

    def __getitem__(self, i):
        text = " ".join(document_text(super().__getitem__(i // 2)).split())  # no chunk of blanks
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        pieces = 1 + (i % 2 and len(offsets) > 1)
        size = min(self.max_tokens, len(offsets) // pieces)
        start = random.Random(i).randrange(len(offsets) - pieces * size + 1)
        cut = lambda n: text[offsets[n][0]:offsets[n + size - 1][1]].strip()
        return dict(query=self.CONTINUE if pieces == 2 else self.REPEAT, documents=[cut(start)],
                    answer=cut(start + (pieces - 1) * size))


def open_data(c):
    """train_data and val_data of a run of train.py with the settings c; of the toy, what is missing is made. Exits with
    one line where they cannot be used, and says it when reranking_scores are so large that the loss of the answers is
    lost next to theirs."""
    if c["task"] not in ("answer", "pretrain"):
        fail(f"task is answer or pretrain, not '{c['task']}'")
    if c["task"] == "pretrain" and (c["enable_reranking"] or c["sample_at_end"] or c["mode"] != "compressed"):
        fail("task=pretrain has neither scores to learn, nor a question to end with, nor a text to answer from: "
             "enable_reranking, sample_at_end and mode are for the run that begins with it")
    toy = [part for part, path in (("examples", c["train_data"]), ("encoders", c["compressor_model"]))
           if path.startswith("data/toy/") and not os.path.exists(path)]
    if toy and rank == 0:
        run_script("data/toy/prepare.py", parts=",".join(toy))
    host_sum(0)  # the others wait for it
    try:
        if c["task"] == "pretrain":
            tokenizer = load_tokenizer(c["generator"])
            return [Chunks(c[name], tokenizer, c["doc_tokens"]) for name in ("train_data", "val_data")]
        train, val = (Examples(c[name], need_scores=c["enable_reranking"]) for name in ("train_data", "val_data"))
    except (ValueError, OSError) as e:
        fail(e)
    if c["enable_reranking"]:
        squares = [sum(s * s for s in x["reranking_scores"][:c["num_documents"]])
                   for x in map(train.__getitem__, range(min(1000, len(train))))]
        begin = c["rerank_lambda"] * sum(squares) / len(squares)
        if begin > 50:  # answers begin at a loss of 2 to 6
            print0(f"reranking_scores are large: they begin with a loss of {begin:,.0f}, next to which the answers' is "
                   "lost: take a cross-encoder's scores, or a smaller rerank_lambda")
    return train, val


def check_questions(queries, documents=None):
    """Raises ValueError for an empty query and, where documents are read, unless every query has a list of them."""
    if isinstance(queries, str) or documents is not None and len(queries) != len(documents):
        raise ValueError("a list of queries takes as many lists of documents")
    for i, query in enumerate(queries):
        if not query.strip():
            raise ValueError("empty query")
        if documents is not None and (not documents[i] or isinstance(documents[i], (str, dict))):
            raise ValueError(f"no list of documents for the query '{query}'")


def with_documents_of_others(examples):
    """Every example with the documents of the one that stands half the list away, or of the next one after it that has
    as many documents and none of its own; none of a single one."""
    n, half, found = len(examples), len(examples) // 2, []
    for i, x in enumerate(examples if half else []):
        own = x["documents"]
        others = (examples[(i + half + j) % n]["documents"] for j in range(n))
        good = (o for o in others if len(o) == len(own) and not any(d in own for d in o))
        found.append({**x, "documents": next(good, examples[(i + half) % n]["documents"])})
    return found


def example_size(x, num_documents):
    """A key to sort by: a batch of examples of like size has little padding. Documents are mostly cut to doc_tokens."""
    return min(len(x["documents"]), num_documents), len(x["query"] + x["answer"])


class StepExamples:
    """The examples of every training step: item `step` is a list of (number in the data set, example). Every epoch is a
    permutation that depends on the seed alone, so that a resumed run and any number of processes see the same examples
    at the same step. Within the step they are sorted by size, so that a micro-batch holds little padding."""

    def __init__(self, examples, per_step, num_documents, seed, world_size):
        self.examples, self.per_step, self.num_documents, self.seed = examples, per_step, num_documents, seed
        self.world_size, self.orders = world_size, {}

    def order(self, epoch):
        if epoch not in self.orders:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.examples))
            self.orders = {epoch - 1: self.orders.get(epoch - 1), epoch: order}  # a step may lie in two epochs
        return self.orders[epoch]

    def __getitem__(self, step):
        n = len(self.examples)
        numbers = [int(self.order(i // n)[i % n]) for i in range(step * self.per_step, (step + 1) * self.per_step)]
        return sorted(((i, self.examples[i]) for i in numbers),
                      key=lambda pair: example_size(pair[1], self.num_documents))

    def describe(self, step, losses, norm, batch_size):
        """Which examples made the loss of a finished step infinite or NaN; losses (processes, micro-batches, names)."""
        numbers = [i + 1 for i, _ in self[step - 1]]
        where = [f"micro-batch {i + 1} of process {r}: examples "
                 f"{numbers[r::self.world_size][i * batch_size:(i + 1) * batch_size]}"
                 for r, i in (~losses.isfinite().all(dim=2)).nonzero().tolist()]
        return (f"step {step}: loss {losses[:, :, 0].sum().item()}, gradient norm {norm}; "
                f"{'; '.join(where) or f'examples {numbers}'} of {self.examples.path}")


class Store:
    """Memory of documents, made once for all queries (query_dependent=False): shards of safetensors, memory-mapped,
    each with "keys" (n,), the first eight bytes of the sha256 of every document's text, and "memory" (n, l, d). What it
    was made of stands in their metadata.

    Raises FileNotFoundError for no store, ValueError for a damaged one or one of another compressor or corpus."""

    def __init__(self, folder, **made_of):
        """made_of: {what: str}, what the metadata of every shard is to say."""
        self.folder = folder
        self.paths = sorted(Path(folder).glob("*.safetensors"))
        if not self.paths:
            raise FileNotFoundError(f"{folder} holds no store: evaluate.py --compress=CORPUS --store={folder} makes it")
        self.shards = [self.open(path, made_of) for path in self.paths]
        keys = [shard.get_tensor("keys").numpy() for shard in self.shards]
        shard, row = np.repeat(range(len(keys)), [*map(len, keys)]), np.concatenate([np.arange(len(k)) for k in keys])
        keys = np.concatenate(keys)
        order = keys.argsort()
        self.keys, self.where = keys[order], np.stack([shard, row], 1)[order]  # (N,), (N, 2)

    @staticmethod
    def open(path, made_of):
        try:
            shard = safe_open(path, framework="pt")
        except SafetensorError as e:
            raise ValueError(f"{path} is damaged: {e}") from e
        for name, digest in made_of.items():
            if (shard.metadata() or {}).get(name) != digest:
                raise ValueError(f"{path} was made of another {name}: choose another folder, or delete this one")
        return shard

    @staticmethod
    def key(document):
        return int.from_bytes(sha256(document_text(document).encode()).digest()[:8], "little", signed=True)

    @classmethod
    def write(cls, folder, number, documents, memory, **made_of):
        """Adds a shard: memory (n, l, d) of n documents. It is there when it is complete."""
        os.makedirs(folder, exist_ok=True)
        keys = torch.tensor([cls.key(d) for d in documents])
        path = f"{folder}/{number:05d}.safetensors"
        save_file(dict(keys=keys, memory=memory.cpu().contiguous()), f"{path}.tmp", metadata=made_of)
        os.replace(f"{path}.tmp", path)

    def find(self, documents):
        """[(shard, row)] of each. Raises ValueError for a document that is not in the store."""
        keys = np.array([self.key(d) for d in documents])
        at = self.keys.searchsorted(keys).clip(max=len(self.keys) - 1)
        for i in np.flatnonzero(self.keys[at] != keys):
            raise ValueError(f"{self.folder} has no memory of the document '{document_text(documents[i])[:60]}'")
        return self.where[at].tolist()

    def memory(self, documents):
        """B lists of documents -> memory (B, k, l, d), k the longest list's length; 0 for a document that is missing.
        Raises ValueError for one that is not in the store."""
        found = self.find([d for docs in documents for d in docs])
        rows = iter([self.shards[i].get_slice("memory")[row:row + 1] for i, row in found])
        k, nothing = max(map(len, documents)), torch.zeros_like(self.shards[0].get_slice("memory")[:1])
        return torch.stack([torch.cat([next(rows) if i < len(docs) else nothing for i in range(k)])
                            for docs in documents])
