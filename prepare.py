"""
Makes training data as the paper does: from a corpus and queries, by retrieval, reranking and a teacher's answers,

    python prepare.py config/prepare_msmarco.py
    python prepare.py --dataset=wiki --corpus=corpus.jsonl --queries=queries.jsonl --teacher=gold

or the toy world, which needs no network and no GPU and comes with its own tiny language model:

    python prepare.py --dataset=toy

Everything is written into data/NAME. What is there and complete is not made again: after a crash the same command goes
on where it stopped. torchrun --nproc_per_node=N prepare.py .. shares the work and writes the same files.
"""

import os

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # the same digits with any number of threads; read when MKL starts

import base64
import concurrent.futures
import fcntl
import gzip
import json
import random
import re
import shutil
import sys
import threading
import time
import zlib
from array import array
from contextlib import contextmanager, suppress
from datetime import timedelta
from email.utils import parsedate_to_datetime
from hashlib import blake2b, sha256
from itertools import groupby, islice, product
from pathlib import Path

import numba
import numpy as np
import regex
import requests
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedTokenizerFast,
    logging,
)
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file

from compressor import left_pad
from configurator import at_least, configure, fail, torch_device, under_torchrun
from data import document_text
from files import file_sha256, read_lines
from metrics import mean_scores
from pretrained import (
    ModelError,
    decoder_layers,
    first_line,
    load_config,
    load_model,
    load_tokenizer,
    longest_text,
    note,
)
from prompt import Prompt, chat_messages

# -----------------------------------------------------------------------------
dataset = "toy"  # the result goes into data/NAME
# where it comes from
corpus = ""  # BEIR's corpus.jsonl, KILT's knowledge source, or a .tsv of id, text (and title); .gz too
queries = ""  # BEIR's queries.jsonl, a .tsv of id, text (MS MARCO's), or plain lines; .gz too
run = ""  # a TREC run over data/NAME/corpus.jsonl, in place of our own retrieval; .gz too
max_passages = 0  # the first so many documents of the corpus; 0 = all
max_queries = 0  # the first so many queries; 0 = all
# the models: a name of the hub or a folder
generator = "mistralai/Mistral-7B-Instruct-v0.2"  # for which the data is made: its tokens count
splade = "naver/splade-v3"  # any masked language model trained as SPLADE
reranker = "naver/trecdl22-crossencoder-debertav3"  # any cross-encoder with one score; empty: retrieval's order, scores
teacher = "mistralai/Mistral-7B-Instruct-v0.2"  # any causal LM; or gold: the queries' gold answers
teacher_url = ""  # ask an OpenAI-compatible server for the teacher's answers, such as http://localhost:8000/v1
teacher_requests = 16  # so many at a time (for each process under torchrun)
teacher_retries = 8  # of one request; the waits between double, from 1 s to 60 s
teacher_timeout = 300.0  # seconds for one answer
# sizes
doc_tokens = 128  # of a chunk, its title included
query_tokens = 64  # longer queries are cut
answer_tokens = 128
top_k = 50  # retrieved
num_documents = 5  # kept after reranking
val_fraction = 0.01  # of the queries
batch_tokens = 16384  # tokens in a batch of any of the models
overwrite = False  # make anew what was made with other settings
last_stage = "train"  # stop after this one: after corpus, to go on with the run of another engine
device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
dtype = "bfloat16" if torch.cuda.is_available() else "float32"  # of the teacher's weights
encoder_dtype = "float16" if torch.cuda.is_available() else "float32"  # of SPLADE's and the reranker's
# of the toy
seed = 1337
train_examples = 36000
val_examples = 500
test_examples = 500
llm_steps = 300  # to train the toy's language model ..
encoder_steps = 250  # .. and its encoders
# -----------------------------------------------------------------------------
if __name__ == "__main__":
    settings = configure(globals())

rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if under_torchrun() else (0, 1)

# ---- files that appear when they are complete, and parts of them that processes take turns in


def name_file(error, path):
    """A full disk does not say which file it was."""
    if error.errno and not error.filename:
        error.filename = str(path)


@contextmanager
def replacing(path):
    """Writes PATH.tmp, flushes it to disk and renames it: a file that has its name is complete."""
    try:
        with open(f"{path}.tmp", "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as e:
        name_file(e, path)
        raise


def share(x=None):
    """All processes wait for one another; returns the first one's x in each."""
    if world == 1:
        return x
    box = [x]
    try:
        dist.broadcast_object_list(box)
        dist.barrier()
    except RuntimeError:  # another process has failed, and has said why
        sys.exit(1)
    return box[0]


def part_size(n, most):
    """Items in a part: a function of n alone, so that no result depends on the number of processes. At least 8 parts
    (so many processes can share a small job), none larger than `most` (which a crash can cost)."""
    return max(1, min(most, -(-n // 8)))


def parts_of(items, size):
    items = iter(items)
    while part := list(islice(items, size)):
        yield part


def make_parts(folder, parts, write, bar=None):
    """Part i goes into the file FOLDER/i, by write(file, part), in process i % world; what is there stays.
    Returns the number of parts."""
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
    """The first process makes the file PATH of the n files in PATH.parts, which go when the manifest knows of PATH."""
    if rank == 0:
        with replacing(path) as f:
            for i in range(n):
                with open(f"{path}.parts/{i:06d}", "rb") as part:
                    shutil.copyfileobj(part, f)
    share()


def progress(what, **kwargs):
    return tqdm(desc=f"{what:9}", disable=rank > 0, mininterval=1, **kwargs)


def to_line(x):
    return json.dumps(x, ensure_ascii=False).encode() + b"\n"


# ---- reading what others wrote


def lines(path, bar=None):
    """(line number, line without its end) of every line that is not blank of a text file or .gz; bar counts bytes."""
    try:
        with open(path, "rb") as raw, gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw as f:
            for number, line in enumerate(read_lines(f), 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as e:
                    fail(f"{path}, line {number}: not UTF-8: {e.reason} at byte {e.start} of the line")
                if bar is not None and number % 1000 == 0:
                    bar.update(raw.tell() - bar.n)
                if text.strip():
                    yield number, text
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        fail(f"{path}: a damaged gzip file: {e}")


# what a header may call the columns of a .tsv
COLUMNS = {name: key for key, names in dict(
    _id="_id id docid doc_id did pid passage_id qid query_id query-id", url="url", title="title",
    text="text body passage contents query question").items() for name in names.split()}


def file_format(path):
    """json (JSON Lines), tsv or text, by what the first lines of a file look like."""
    first = [line for _, line in islice(lines(path), 10)]
    if first and first[0].lstrip()[0] in "{[":
        return "json"
    words = [line.split("\t")[0].strip() for line in first]
    if path.removesuffix(".gz").endswith(".tsv") or all("\t" in line for line in first) and not any(
            " " in word for word in words):
        return "tsv"
    return "text"


def columns_of(line):
    """The names of a .tsv's columns, by its first line, and whether that is a header. Without one: id, text (and
    title), as MS MARCO's passages and queries, or id, url, title, body, as its documents."""
    cells = [cell.strip().lower() for cell in line.split("\t")]
    if len(cells) > 1 and all(cell in COLUMNS for cell in cells):
        return [COLUMNS[cell] for cell in cells], True
    if len(cells) == 4 and re.match(r"https?://|www\.", cells[1]):
        return ["_id", "url", "title", "text"], False
    return ["_id", "text", "title"], False


def unquoted(cell):
    """A cell without the quotes of csv, where it has them: DPR's passages."""
    inner = cell[1:-1].replace('""', "")
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner else cell


def records(path, bar=None):
    """("FILE, line N", object) of every line of a file of JSON Lines or of columns between tabs."""
    kind, names = file_format(path), None
    if kind == "text":
        number, _ = next(lines(path))
        fail(f"{path}, line {number}: neither a JSON object nor columns between tabs")
    for number, line in lines(path, bar):
        where = f"{path}, line {number}"
        if kind == "tsv":
            if names is None:
                names, header = columns_of(line)
                if header:
                    continue
            cells = line.split("\t")
            if not 2 <= len(cells) <= len(names):
                fail(f"{where}: {len(cells)} columns, of which the first line tells no more than "
                     f"{', '.join(name.strip('_') for name in names)}" if len(cells) > 1 else
                     f"{where}: no tab: a .tsv file holds id, text on a line")
            x = dict(zip(names, map(unquoted, cells) if header else cells))
        else:
            try:
                x = json.loads(line)
                if "\\ud" in line.lower():  # half a surrogate pair is good JSON, but no tokeniser takes it
                    json.dumps(x, ensure_ascii=False).encode()
            except ValueError as e:
                fail(f"{where}: broken JSON: {e}")
            if not isinstance(x, dict):
                fail(f"{where}: not a JSON object")
        yield where, x


def check_id(where, x):
    """Ids stand in TREC runs, whose columns are parted by white space."""
    if isinstance(x, bool) or not isinstance(x, (str, int)) or str(x).split() != [str(x)]:
        fail(f"{where}: '_id' is missing or empty" if x in (None, "") else f"{where}: _id {x!r} is no word or number")
    return str(x)


def read_documents(path, bar=None):
    """(id, title, text) of every document of a corpus. KILT's text is a list of paragraphs: the first repeats the
    title, headings and list items carry a mark."""
    for where, x in records(path, bar):
        title, text = x.get("title", x.get("wikipedia_title")) or "", x["text"] or "" if "text" in x else None
        if isinstance(text, list) and all(isinstance(p, str) for p in text):
            paragraphs = [re.sub(r"^(Section::::|BULLET::::-?\s*)", "", p).strip() for p in text]
            text = "\n".join(p for i, p in enumerate(paragraphs) if p and (i > 0 or p != title))
        for name, value in (("text", text), ("title", title)):
            if not isinstance(value, str):
                fail(f"{where}: '{name}' is missing or no string")
        yield check_id(where, x.get("_id", x.get("wikipedia_id"))), title.strip(), text


def read_queries(path):
    """(where, {"_id", "text", "answers"}) of every query; without ids a query's line number is its id."""
    if file_format(path) == "text":
        for number, line in lines(path):
            yield f"{path}, line {number}", dict(_id=str(number), text=line.strip(), answers=[])
        return
    for where, x in records(path):
        text, metadata = x.get("text"), x.get("metadata")
        if not isinstance(text, str) or not text.strip():
            fail(f"{where}: 'text' is missing or empty")
        answers = metadata.get("answers") or [] if isinstance(metadata, dict) else []
        if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
            fail(f"{where}: metadata.answers is not a list of strings")
        yield where, dict(_id=check_id(where, x.get("_id")), text=text.strip(), answers=answers)


def read_run(path):
    """(query id, [(passage id, score), ..]) of a run file of ours: the lines of a query stand together, best first."""
    rows = (line.split() for _, line in lines(path))
    for query, group in groupby(rows, key=lambda row: row[0]):
        yield query, [(row[2], float(row[4])) for row in group]


def run_lines(query, passages, scores, tag):
    """Lines of a TREC run: query, Q0, passage, rank, score, tag. Scores have all their digits: they become targets."""
    return b"".join(f"{query} Q0 {p} {i} {s} {tag}\n".encode() for i, (p, s) in enumerate(zip(passages, scores), 1))


# ---- 1. the corpus, in chunks


def chunk(tokenizer, documents, max_tokens):
    """documents [(id, title, text), ..] -> [{"_id": "ID#0", "title", "text"}, ..]: each text cut where every so many of
    its tokens begin, so that a chunk with its title, as document_text() writes it, has at most max_tokens (>= 8).

    No character of a text is lost but white space at a cut; one of several tokens goes with the first of them. Of a
    title that is longer than half the tokens the rest is lost.
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
        # a word that a cut has parted can take a token more when it is read again: then the document is cut shorter
        rows = [(i, document_text(dict(title=titles[i], text=piece))) for i in todo for piece in pieces[i]]
        lengths = map(len, offsets_of([text for _, text in rows]) if rows else [])
        todo = sorted({i for (i, _), n in zip(rows, lengths) if n > max_tokens and room[i] > 1})
        for i in todo:
            room[i] -= 1
    return [dict(_id=f"{id}#{n}", title=title, text=piece)
            for (id, _, _), title, texts in zip(documents, titles, pieces) for n, piece in enumerate(texts)]


def id_hash(id):
    return int.from_bytes(blake2b(id.encode(), digest_size=8).digest(), "big", signed=True)


class Corpus:
    """corpus.jsonl, a chunk by its number or its id. Memory holds none of it: offsets and hashes of ids are mapped from
    disk (corpus.index). Only to sort the hashes, once, index_corpus() takes some 70 bytes a chunk."""

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
        """Ids -> numbers of chunks, -1 for an id that is none."""
        hashes = np.fromiter(map(id_hash, ids), np.int64, len(ids))
        at = np.searchsorted(self.hashes, hashes).clip(max=len(self) - 1)
        return np.where(self.hashes[at] == hashes, self.order[at], -1)

    def of(self, hits):
        """The chunks of a query's (id, score) pairs."""
        return [self[i] for i in self.numbers([id for id, _ in hits])]


def make_corpus(folder):
    tokenizer = load_tokenizer(generator)
    counts = dict(documents=0, empty_documents=0)

    def documents(bar):
        for id, title, text in islice(read_documents(corpus, bar), max_passages or None):
            counts["documents"] += 1
            counts["empty_documents"] += not (title + text).strip()
            yield id, title, text

    def write(f, part):
        for batch in parts_of(part, 256):
            f.writelines(map(to_line, chunk(tokenizer, batch, doc_tokens)))

    with progress("corpus", total=os.path.getsize(corpus), unit="B", unit_scale=True) as bar:
        n = make_parts(f"{folder}/corpus.jsonl.parts", parts_of(documents(bar), 8192), write)
    join_parts(f"{folder}/corpus.jsonl", n)
    if rank == 0:
        counts["chunks"] = index_corpus(folder)
    return counts


def index_corpus(folder):
    """Writes corpus.index: the chunks' offsets and their ids' hashes. Returns the number of chunks."""
    offsets, hashes, position = array("q"), array("q"), 0
    with open(f"{folder}/corpus.jsonl", "rb") as f:
        for line in progress("ids", iterable=f, unit=" chunks"):
            offsets.append(position)
            hashes.append(id_hash(json.loads(line)["_id"]))
            position += len(line)
    if not offsets:
        fail(f"{corpus} holds no text")
    hashes = torch.frombuffer(hashes, dtype=torch.int64)
    hashes, order = hashes.sort(stable=True)
    with replacing(f"{folder}/corpus.index") as f:
        f.write(to_safetensors(dict(offsets=torch.frombuffer(offsets, dtype=torch.int64), hashes=hashes, order=order)))
    same = (hashes[1:] == hashes[:-1]).nonzero()
    if len(same):
        id = Corpus(folder)[order[same[0, 0]].item()]["_id"].rpartition("#")[0]
        places = [where for where, x in records(corpus) if str(x.get("_id", x.get("wikipedia_id"))) == id]
        fail(f"{places[1]}: the _id '{id}' stands already in {places[0].rpartition(', ')[2]}")
    return len(offsets)


# ---- 2. the queries


def make_queries(folder):
    tokenizer = load_tokenizer(generator)
    prompt = Prompt(tokenizer)
    counts = dict(queries=0, duplicates=0, cut=0, with_gold_answers=0)
    if rank == 0:
        texts, ids = set(), {}
        with replacing(f"{folder}/queries.jsonl") as f, progress("queries", unit="") as bar:
            for part in parts_of(read_queries(queries), 1024):
                short = prompt.cut([x["text"] for _, x in part], query_tokens)
                for (where, x), text in zip(part, short):
                    if ids.setdefault(x["_id"], where) != where:
                        fail(f"{where}: the _id '{x['_id']}' stands already in {ids[x['_id']].rpartition(', ')[2]}")
                    if text.strip() in texts:
                        counts["duplicates"] += 1
                    elif not max_queries or counts["queries"] < max_queries:
                        texts.add(text.strip())
                        counts["queries"] += 1
                        counts["cut"] += text != x["text"]
                        counts["with_gold_answers"] += bool(x["answers"])
                        f.write(to_line(dict(_id=x["_id"], text=text.strip(), metadata=dict(answers=x["answers"]))))
                    bar.update()
            if not counts["queries"]:
                fail(f"{queries} holds no queries")
            if teacher == "gold" and not counts["with_gold_answers"]:
                fail(f"{queries}: no query has gold answers (metadata.answers) for --teacher=gold")
        if counts["duplicates"] or counts["cut"]:
            print(f"{queries}: {counts['duplicates']:,} duplicates dropped, {counts['cut']:,} queries longer than "
                  f"{query_tokens} tokens cut")
    share()
    return counts


# ---- 3. retrieval with SPLADE (arXiv 2403.06789)

SHARD_PASSAGES = 50_000


def by_length(lengths, batch_tokens):
    """Indices in batches of similar length, the longest first; a batch, padded, holds at most batch_tokens tokens."""
    batch = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pad(tokenizer, encodings, batch):
    return tokenizer.pad({name: [rows[i] for i in batch] for name, rows in encodings.items()}, return_tensors="pt")


def check_pooling(name):
    """Raises ValueError for a model of sentence-transformers that makes its weights otherwise than Splade does."""
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

    def max_over_tokens(self, hidden):
        W, b = self.output.weight, self.output.bias  # (V, d), (V,)
        rows = torch.stack([torch.mm(h[:n], W.T).amax(0) for h, n in zip(hidden, self.lengths)])  # (B, V)
        return rows if b is None else rows + b

    @torch.inference_mode()
    def encode(self, texts, batch_tokens):
        """n texts -> pointers (n + 1,), words, weights: row i of the sparse (n, V) matrix is words[pointers[i]:
        pointers[i + 1]] and the weights beside them. numpy arrays."""
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


def inverted(pointers, words, weights, vocab_size, first):
    """A sparse (n, V) matrix by rows -> the same by words, as tensors: passages[pointers[w]:pointers[w + 1]] are the
    rows that have word w, in ascending order, and the weights beside them. span: the numbers of the first passage and
    behind the last."""
    passages = np.repeat(np.arange(len(pointers) - 1, dtype=np.int32), np.diff(pointers))
    order = np.argsort(words, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(words, minlength=vocab_size))])
    return dict(pointers=torch.from_numpy(starts), passages=torch.from_numpy(passages[order]),
                weights=torch.from_numpy(weights[order]), span=torch.tensor([first, first + len(pointers) - 1]))


def make_index(folder):
    passages, model = Corpus(folder), Splade(splade, device, getattr(torch, encoder_dtype))

    def write(f, numbers):
        matrix = model.encode([document_text(passages[i]) for i in numbers], batch_tokens)
        f.write(to_safetensors(inverted(*matrix, len(model.output.weight), numbers[0])))

    if not os.path.exists(f"{folder}/index"):  # or a crash came before the manifest knew of it
        make_parts(f"{folder}/index.parts", parts_of(range(len(passages)), part_size(len(passages), SHARD_PASSAGES)),
                   write, progress("index", total=len(passages), unit=" passages"))
        if rank == 0:
            os.rename(f"{folder}/index.parts", f"{folder}/index")
    return dict(passages=len(passages))


def compiled(function):
    try:
        return numba.njit(parallel=True, cache=True)(function)
    except RuntimeError:  # no folder for the cache: checkout and home are read-only
        return numba.njit(parallel=True)(function)


@compiled
def search_shard(q_pointers, q_words, q_weights, pointers, passages, weights, n, first, best, scores):
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
    starts = (counts.cumsum(0) - counts)[:, None] + torch.arange(k, device=row.device)  # the k first of every row
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
    for path in shards:
        shard = load_file(path, device=str(device) if on_cuda else "cpu")  # on a CPU it is mapped, not read
        first, end = shard["span"].tolist()
        args = shard["pointers"], shard["passages"], shard["weights"], end - first, first
        if on_cuda:
            search_shard_cuda(q_matrix, *args, best, scores)
        else:
            search_shard(pointers, words, weights, *(a.numpy() if torch.is_tensor(a) else a for a in args),
                         best.numpy(), scores.numpy())
    return best.cpu().numpy(), scores.cpu().numpy()


def make_run(folder):
    if run:
        return import_run(folder)
    passages, model = Corpus(folder), Splade(splade, device, getattr(torch, encoder_dtype))
    asked = load_queries(folder)
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    shards = sorted(Path(f"{folder}/index").glob("[0-9]*"))
    if sum(end - first for first, end in (load_file(path)["span"].tolist() for path in shards)) != len(passages):
        fail(f"{folder}/index lacks some of the {len(passages):,} passages: remove it, and it will be made anew")

    def write(f, part):
        rows = model.encode([x["text"] for x in part], batch_tokens)
        best, scores = search(shards, rows, len(model.output.weight), top_k, device)
        for x, numbers, row in zip(part, best, scores):
            found = numbers >= 0
            f.write(run_lines(x["_id"], [passages[i]["_id"] for i in numbers[found]], row[found], "splade"))

    n = make_parts(f"{folder}/run.retrieval.trec.parts", parts_of(asked, part_size(len(asked), 2048)), write,
                   progress("retrieval", total=len(asked), unit=" queries"))
    join_parts(f"{folder}/run.retrieval.trec", n)
    return count_run(folder, "run.retrieval.trec")


def load_queries(folder):
    with open(f"{folder}/queries.jsonl", "rb") as f:
        return [json.loads(line) for line in f]


def count_run(folder, name):
    lengths = [len(hits) for _, hits in read_run(f"{folder}/{name}")] if rank == 0 else []
    return dict(queries=len(lengths), passages=sum(lengths))


def import_run(folder):
    """Checks a TREC run made elsewhere and writes it as ours: queries in the order of queries.jsonl, of each the top_k
    best (by score, equals as they stand; as trec_eval, it does not look at the ranks)."""
    if rank > 0:
        share()
        return {}
    asked, passages = load_queries(folder), Corpus(folder)
    position, given = {x["_id"]: i for i, x in enumerate(asked)}, None
    query, passage, score = array("i"), array("q"), array("d")
    with progress("run", total=os.path.getsize(run), unit="B", unit_scale=True) as bar:
        for part in parts_of(lines(run, bar), 65536):
            rows = []
            for number, line in part:
                columns = line.split()
                try:
                    rows.append((columns[0], columns[2], float(columns[4])))
                    good = len(columns) == 6 and np.isfinite(rows[-1][2])
                except (IndexError, ValueError):
                    good = False
                if not good:
                    fail(f"{run}, line {number}: not a line of a TREC run: query Q0 passage rank score tag, with a "
                         "number as score")
            numbers = passages.numbers([row[1] for row in rows])
            for (line_number, _), (query_id, passage_id, s), number in zip(part, rows, numbers.tolist()):
                if number < 0:
                    fail(f"{run}, line {line_number}: no passage '{passage_id}' in {folder}/corpus.jsonl, whose ids "
                         f"look like '{passages[0]['_id']}'")
                if query_id in position:
                    query.append(position[query_id])
                    passage.append(number)
                    score.append(s)
                else:  # fine when it was dropped as a duplicate or by max_queries
                    given = given or {x["_id"] for _, x in read_queries(queries)}
                    if query_id not in given:
                        fail(f"{run}, line {line_number}: no query '{query_id}' in {queries}")
    query, passage, score = np.array(query), np.array(passage), np.array(score)
    order = np.lexsort((-score, query))  # stable
    bounds = np.searchsorted(query[order], np.arange(len(asked) + 1))
    lacking = [x["_id"] for x, n in zip(asked, np.diff(bounds)) if n == 0]
    if lacking:
        more = f" and {len(lacking) - 1:,} more" if lacking[1:] else ""
        fail(f"{run}: no line for the query '{lacking[0]}'{more}")
    with replacing(f"{folder}/run.retrieval.trec") as f:
        for x, a, b in zip(asked, bounds, bounds[1:]):
            best = order[a:b][:top_k]
            if len(set(passage[best].tolist())) < len(best):
                fail(f"{run}: a passage stands twice for the query '{x['_id']}'")
            f.write(run_lines(x["_id"], [passages[i]["_id"] for i in passage[best]], score[best], "given"))
    share()
    return count_run(folder, "run.retrieval.trec")


# ---- 4. reranking with a cross-encoder


class CrossEncoder:
    def __init__(self, name, device, dtype):
        self.tokenizer = load_tokenizer(name)
        self.model = load_model(AutoModelForSequenceClassification, name, dtype=dtype).eval().to(device)
        self.max_length = longest_text(self.model, self.tokenizer)
        if self.tokenizer.pad_token is None:  # decoders
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.model.config.pad_token_id is None:  # by which they find the last token
            self.model.config.pad_token_id = self.tokenizer.pad_token_id

    @torch.inference_mode()
    def scores(self, pairs, batch_tokens):
        """(query, document) pairs -> a list of raw logits."""
        ids = self.tokenizer(*map(list, zip(*pairs)), truncation="only_second", max_length=self.max_length)
        scores = [0.0] * len(pairs)
        for batch in by_length([len(x) for x in ids["input_ids"]], batch_tokens):
            logits = self.model(**pad(self.tokenizer, ids, batch).to(self.model.device)).logits  # (B, 1)
            for i, score in zip(batch, logits[:, 0].tolist()):
                scores[i] = score
        return scores


def make_reranked(folder):
    passages, texts = Corpus(folder), {x["_id"]: x["text"] for x in load_queries(folder)}
    model = CrossEncoder(reranker, device, getattr(torch, encoder_dtype)) if reranker else None

    def write(f, part):
        if model is not None:
            pairs = [(texts[id], document_text(x)) for id, hits in part for x in passages.of(hits)]
            scores = iter(model.scores(pairs, batch_tokens))
        for id, hits in part:
            if model is not None:
                hits = sorted(((p, next(scores)) for p, _ in hits), key=lambda hit: -hit[1])  # stable
            f.write(run_lines(id, *zip(*hits[:num_documents]), "cross-encoder" if reranker else "retrieval"))

    n = make_parts(f"{folder}/run.rerank.trec.parts",
                   parts_of(read_run(f"{folder}/run.retrieval.trec"), part_size(len(texts), 256)), write,
                   progress("rerank", total=len(texts), unit=" queries"))
    join_parts(f"{folder}/run.rerank.trec", n)
    return count_run(folder, "run.rerank.trec")


# ---- 5. the teacher's answers


@torch.no_grad()
def generate_answers(model, tokenizer, prompts, max_new_tokens):
    """The model's greedy answers to a batch of prompts."""
    ids, mask = left_pad(tokenizer(prompts, add_special_tokens=False).input_ids)
    out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                         max_new_tokens=max_new_tokens, do_sample=False)
    return [without_thoughts(a) for a in tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)]


def without_thoughts(reply):
    """The answer in the reply of a model that thinks aloud first; empty where it has not come to one."""
    tag = r"[<\[]{}(?:think|thinking|thoughts?|reasoning)[>\]]"
    reply = re.split(tag.format("/"), reply, flags=re.IGNORECASE)[-1]  # templates can open a thought in the prompt
    return re.split(tag.format(""), reply, flags=re.IGNORECASE)[0].strip()


def read_answers(folder):
    """{query id: {"_id", "model", "answer"}} of all files of a folder; a line that a crash has torn is left out."""
    answers = {}
    for path in Path(folder).iterdir():
        with open(path, "rb") as f:
            for line in f:
                try:
                    x = json.loads(line)
                except ValueError:
                    continue
                answers[x["_id"]] = x
    return answers


def make_answers(folder):
    asked = {x["_id"]: x for x in load_queries(folder)}
    parts = f"{folder}/teacher.jsonl.parts"
    os.makedirs(parts, exist_ok=True)
    done = read_answers(parts)
    share()  # nobody appends before all have read
    passages = Corpus(folder)

    def windows():
        """This process's (query id, query, its documents' text), in lists."""
        size = part_size(len(asked), 512)
        for i, part in enumerate(parts_of(read_run(f"{folder}/run.rerank.trec"), size)):
            if i % world == rank:
                yield [(id, asked[id]["text"], [document_text(x) for x in passages.of(hits)]) for id, hits in part]

    path = f"{parts}/{rank:06d}"
    try:
        with open(path, "ab") as f, progress("teacher", total=-(-len(asked) // world), initial=len(done) // world,
                                             unit=" queries") as bar:
            if f.tell():
                f.write(b"\n")  # ends a line that a crash has torn

            def record(answers, model=teacher):
                new = [dict(_id=id, model=model, answer=answer) for id, answer in answers.items() if id not in done]
                f.write(b"".join(map(to_line, new)))
                f.flush()
                bar.update(len(new))

            if teacher == "gold":
                for window in windows():
                    golds = {id: asked[id]["metadata"]["answers"] for id, _, _ in window}
                    record({id: answers[0] for id, answers in golds.items() if answers})
            elif teacher_url:
                ask_server(windows(), done, record)
            else:
                ask_model(windows(), done, record)
    except OSError as e:
        name_file(e, path)
        raise
    share()
    answers = read_answers(parts) if rank == 0 else {}
    if rank == 0:
        with replacing(f"{folder}/teacher.jsonl") as f:
            f.writelines(to_line(answers[id]) for id in asked if id in answers)
    share()
    return dict(answers=len(answers), empty_answers=sum(not x["answer"] for x in answers.values()))


def ask_model(windows, done, record):
    model = load_model(AutoModelForCausalLM, teacher, dtype=getattr(torch, dtype)).eval().to(device)
    tokenizer = load_tokenizer(teacher)
    prompt = Prompt(tokenizer)
    eos = model.generation_config.eos_token_id
    stop = {prompt.end_id, *(eos if isinstance(eos, list) else [] if eos is None else [eos])}
    # greedy and nothing else: a model's own generation config may ask for a repetition penalty
    model.generation_config = GenerationConfig(eos_token_id=sorted(stop), pad_token_id=prompt.end_id)
    limit = getattr(model.config, "max_position_embeddings", None) or float("inf")
    for window in windows:
        prompts = [prompt.text(query, documents) for _, query, documents in window]
        lengths = [len(ids) + answer_tokens for ids in tokenizer(prompts, add_special_tokens=False).input_ids]
        if max(lengths) > limit:
            id = window[lengths.index(max(lengths))][0]
            fail(f"teacher: prompt and answer of the query '{id}' take {max(lengths)} tokens, {teacher} has {limit} "
                 "positions: lower num_documents, doc_tokens or answer_tokens")
        for batch in by_length(lengths, batch_tokens):  # always the same, so that rounding is the same after a restart
            if not all(window[i][0] in done for i in batch):
                answers = generate_answers(model, tokenizer, [prompts[i] for i in batch], answer_tokens)
                record({window[i][0]: answer for i, answer in zip(batch, answers)})


def ask_server(windows, done, record):
    """Chat requests to an OpenAI-compatible server, teacher_requests at a time."""
    session, stopped, refused = requests.Session(), threading.Event(), []
    session.mount("http", requests.adapters.HTTPAdapter(pool_maxsize=teacher_requests))
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch("[!-~]*", key):
        fail("OPENAI_API_KEY is no key: it holds white space, or letters that no HTTP header takes")
    if key:
        session.headers["Authorization"] = f"Bearer {key}"
    secrets = [secret for secret in (key, *re.findall("//([^/@]+)@", teacher_url)) if secret]

    def public(text, most=300):
        """Some of a message, in one line, without key and password."""
        for secret in secrets:
            text = text.replace(secret, "***")
        return " ".join(text[:most].split())

    server = public(teacher_url)
    try:  # a template without a system role wants the system line in the user's turn, as in model.py
        prompt = Prompt(load_tokenizer(teacher))
        system_role, plain = prompt.system_role, prompt.plain
    except (OSError, ValueError):
        system_role, plain = True, lambda text: text
    # what a server may not know: it says so, and is asked without from then on
    asked = dict(max_tokens=answer_tokens, temperature=0, chat_template_kwargs=dict(enable_thinking=False))

    def adapt(complaint, sent):
        """Whether what a complaint is about is asked otherwise from now on than it was sent."""
        if "max_completion_tokens" in complaint and asked.pop("max_tokens", None):
            asked["max_completion_tokens"] = answer_tokens
        for name in ("chat_template_kwargs", "temperature"):
            if name in complaint:
                asked.pop(name, None)
        return asked.keys() != sent.keys()

    def retry_after(r):
        """Seconds that a server wants to be left alone, which it says as a number or as a date; 10 minutes at most."""
        value = r.headers.get("Retry-After", "0")
        try:
            seconds = float(value) if re.fullmatch(r"[\d.]+", value) else (
                parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            seconds = 0.0
        return min(seconds, 600.0)

    def ask(path, what, parse, **body):
        """Tries again after whatever may pass: no connection, a timeout, an overloaded or failing server, half an
        answer. Returns None when the server refuses what was asked (too long for it, or against its rules), or has
        no answer to it."""
        attempt = 0
        while True:
            wait = min(2.0 ** attempt, 60.0) * random.uniform(0.5, 1)
            sent = dict(asked)
            try:
                r = session.request("POST" if body else "GET", teacher_url.rstrip("/") + path, timeout=teacher_timeout,
                                    json={**body, **sent} if body else None, allow_redirects=False)
                status, wait, text = r.status_code, max(wait, retry_after(r)), r.text
                if status < 300:
                    reply = r.json()
                    if not isinstance(reply, dict) or not reply.get("error"):
                        return parse(reply)
                    error = reply["error"]  # gateways pack their server's error into a 200
                    status = error.get("code") if isinstance(error, dict) else None
                    status = status if isinstance(status, int) and status >= 400 else 400
                    text = str(error.get("message", error) if isinstance(error, dict) else error)
                problem = f"HTTP status {status}: {public(text)}"
                if 300 <= status < 400:
                    problem += f" redirects to {public(r.headers.get('Location', 'nowhere'))}"
                    break
                if status in (400, 422) and adapt(text, sent):
                    continue
                if status in (400, 413, 422) or not body and status in (404, 405, 501):
                    refused.append(problem)
                    return None
                if status < 500 and status not in (408, 409, 425, 429):
                    break
            except requests.exceptions.JSONDecodeError:
                problem = f"not JSON: {public(text, 100)}"
                if text.lstrip().startswith(("<", "data:")):  # a page to log in, a stream: the same the next time
                    break
            except (requests.RequestException, AttributeError, LookupError, TypeError, ValueError) as e:
                problem = f"{type(e).__name__}: {public(str(e))}"
            if attempt == teacher_retries or stopped.wait(wait):
                break
            attempt += 1
        fail(f"{server}: no answer to {what}: {problem}; the answers so far are kept")

    def parse_answer(reply):
        choice = reply["choices"][0]
        message, content = choice["message"], choice["message"].get("content") or ""
        if not choice["finish_reason"]:
            raise ValueError("half an answer: no finish_reason")
        if isinstance(content, list):  # in parts
            content = "".join(part.get("text") or "" for part in content if part.get("type", "text") == "text")
        answer = without_thoughts(content)
        thought = content.strip() or message.get("reasoning_content") or message.get("reasoning")
        if message.get("refusal") or not answer and thought:
            refused.append(f"refused: {public(str(message['refusal']))}" if message.get("refusal") else
                           f"it thinks and has not come to an answer within answer_tokens={answer_tokens}")
            return None
        # without half a surrogate pair, which no tokeniser takes
        return answer.encode(errors="ignore").decode().strip()

    served = ask("/models", "the question which models it serves", lambda reply: [m["id"] for m in reply["data"]])
    if served is None:  # not every server says
        served = [teacher]
    if teacher not in served and len(served) != 1:
        fail(f"{server} serves {', '.join(served) or 'no model'}, not teacher={teacher}")
    model = teacher if teacher in served else served[0]
    others = {x["model"] for x in done.values()} - {model}
    if others:
        fail(f"{server} serves {model}, but there are answers of {others.pop()} already: --overwrite=True with "
             "another --teacher name, or the former server")
    waiting, answered, without = {}, bool(done), []

    def collect(most):
        nonlocal answered
        while len(waiting) > most:
            for future in concurrent.futures.wait(waiting, return_when="FIRST_COMPLETED").done:
                id, answer = waiting.pop(future), future.result()
                if answer is None:
                    without.append(id)
                else:
                    record({id: answer}, model)
                    answered = True
            if not answered and len(without) >= 10:
                fail(f"{server} refuses every request: {refused[-1]}")

    with concurrent.futures.ThreadPoolExecutor(teacher_requests) as pool:
        try:
            for window in windows:
                for id, query, documents in window:
                    if id not in done:
                        messages = chat_messages(plain(query), plain("\n\n".join(documents)), system_role)
                        waiting[pool.submit(ask, "/chat/completions", f"the query '{id}'", parse_answer, model=model,
                                            messages=messages)] = id
                        collect(2 * teacher_requests)
            collect(0)
        except BaseException:
            stopped.set()  # no further tries, but what is on its way is worth waiting for
            pool.shutdown(cancel_futures=True)
            for future, id in waiting.items():
                if not future.cancelled() and not future.exception() and future.result() is not None:
                    record({id: future.result()}, model)
            raise
    if without:
        if not answered:
            fail(f"{server} refuses every request: {refused[-1]}")
        print(f"{server} refused {len(without):,} queries, such as '{without[0]}': {refused[-1]}")
        record(dict.fromkeys(without, ""), model)


# ---- 6. training examples


def make_examples(folder):
    if rank > 0:
        return {}
    passages, asked = Corpus(folder), {x["_id"]: x for x in load_queries(folder)}
    with open(f"{folder}/teacher.jsonl", "rb") as f:
        answers = {x["_id"]: x["answer"] for x in map(json.loads, f) if x["answer"]}
    fraction = {id: int(sha256(asked[id]["text"].encode()).hexdigest()[:8], 16) / 2**32 for id in answers}
    limit = max(val_fraction, min(fraction.values(), default=0))  # at least one query is for validation
    counts = dict(train=0, val=0, queries_without_answer=0, fewer_documents=0)
    with replacing(f"{folder}/val.jsonl") as val, replacing(f"{folder}/train.jsonl") as train:
        for id, hits in progress("examples", iterable=read_run(f"{folder}/run.rerank.trec"), total=len(asked), unit=""):
            if id not in answers:
                counts["queries_without_answer"] += 1
                continue
            documents = passages.of(hits)
            counts["fewer_documents"] += len(documents) < num_documents
            x = dict(_id=id, query=asked[id]["text"], documents=documents, answer=answers[id],
                     reranking_scores=[score for _, score in hits])
            if asked[id]["metadata"]["answers"]:
                x["answers"] = asked[id]["metadata"]["answers"]
            counts["val" if fraction[id] <= limit else "train"] += 1
            (val if fraction[id] <= limit else train).write(to_line(x))
        made = counts["train"] + counts["val"] + counts["queries_without_answer"]
        counts["queries_without_passage"] = len(asked) - made
        if not counts["train"]:
            fail(f"no training example: {counts['val']} for validation, {counts['queries_without_answer']} queries "
                 f"without an answer, {counts['queries_without_passage']} without a passage")
    if counts["fewer_documents"]:
        print(f"{counts['fewer_documents']:,} examples have fewer than {num_documents} documents: training masks the "
              "missing ones")
    return counts


# ---- all stages

STAGES = dict(  # what is made, of which settings, after which stages; inputs are known by their contents
    queries=(make_queries, ["queries.jsonl"], "queries generator query_tokens max_queries", ""),
    corpus=(make_corpus, ["corpus.jsonl", "corpus.index"], "corpus generator doc_tokens max_passages", ""),
    index=(make_index, ["index"], "splade encoder_dtype", "corpus"),
    retrieval=(make_run, ["run.retrieval.trec"], "run top_k", "queries corpus index"),
    rerank=(make_reranked, ["run.rerank.trec"], "reranker num_documents encoder_dtype", "retrieval"),
    teacher=(make_answers, ["teacher.jsonl"], "teacher answer_tokens", "rerank"),
    train=(make_examples, ["train.jsonl", "val.jsonl"], "val_fraction", "teacher"),
)


def check_model(setting, kinds, kind):
    """Of a model its config and tokeniser, without its weights."""
    name = globals()[setting]
    names = {n for v in kinds.values() for n in ([v] if isinstance(v, str) else v)}
    try:
        config = load_config(name)
        made_as = config.architectures or [kinds.get(config.model_type)]  # a folder need not say
        if not names & {n for made in made_as for n in ([made] if isinstance(made, str) else made or [])}:
            fail(f"{setting}={name} is a {', '.join(config.architectures or [config.model_type])}, not {kind}")
        tokenizer = load_tokenizer(name)
        if 2 * len(tokenizer) < getattr(config, "vocab_size", 0):  # transformers makes an empty one where there is none
            fail(f"{setting}={name} lacks its tokeniser: it knows {len(tokenizer):,} of {config.vocab_size:,} tokens")
        if setting in ("generator", "teacher"):
            Prompt(tokenizer)
        if setting == "splade":
            check_pooling(name)
        if setting == "reranker" and tokenizer.pad_token is None and tokenizer.eos_token is None:
            fail(f"{setting}={name}: its tokeniser has neither a pad_token nor an eos_token to pad with")
    except (OSError, ValueError) as e:
        fail(f"{setting}={name}: {first_line(e)}")
    return config


def check_inputs():
    """Everything that can be known before hours of work."""
    at_least(globals(), max_passages=0, max_queries=0, teacher_requests=1, teacher_retries=0, teacher_timeout=0.1,
             doc_tokens=8, query_tokens=1, answer_tokens=1, top_k=1, num_documents=1, val_fraction=0, batch_tokens=1)
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", dataset):
        fail(f"dataset is the name of a folder in data/, not '{dataset}'")
    for name in ("corpus", "queries"):
        if not globals()[name]:
            fail(f"dataset '{dataset}' needs --corpus=FILE and --queries=FILE ('toy' is made without)")
    for name in ("corpus", "queries", "run"):
        if globals()[name] and not os.path.isfile(globals()[name]):
            fail(f"{name}: {globals()[name]} does not exist")
        if globals()[name] and os.path.getsize(globals()[name]) == 0:
            fail(f"{name}: {globals()[name]} is empty")
        if globals()[name].removesuffix(".gz").endswith((".csv", ".parquet")):
            fail(f"{name}: {globals()[name]} is neither JSON Lines (.jsonl) nor a .tsv")
    if last_stage not in STAGES:
        fail(f"last_stage is one of {', '.join(STAGES)}, not '{last_stage}'")
    if val_fraction >= 1:
        fail(f"val_fraction is a part of 1, not {val_fraction}")
    if top_k < num_documents:
        fail(f"top_k ({top_k}) is smaller than num_documents ({num_documents})")
    for name in ("dtype", "encoder_dtype"):
        if globals()[name] not in ("float32", "float16", "bfloat16"):
            fail(f"{name} is float32, float16 or bfloat16, not '{globals()[name]}'")
    wanted = stages_wanted()
    check_model("generator", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "a causal language model")
    if "index" in wanted:
        check_model("splade", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "a masked language model")
    if "rerank" in wanted and reranker:
        config = check_model("reranker", modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
                             "a cross-encoder (sequence classification)")
        if config.num_labels != 1:
            fail(f"reranker={reranker} gives {config.num_labels} scores for a document, not one")
    if teacher_url and (teacher == "gold" or not re.match("https?://.", teacher_url)):
        fail(f"teacher_url is like http://localhost:8000/v1, not '{teacher_url}'" if teacher != "gold"
             else "--teacher=gold asks no server: leave out --teacher_url")
    if "teacher" in wanted and teacher != "gold" and not teacher_url:
        check_model("teacher", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "a causal language model")


def remove(path):
    """A link goes alone: what it leads to may be another's."""
    shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else Path(path).unlink(missing_ok=True)


def stages_wanted():
    names = list(STAGES)[:1 + list(STAGES).index(last_stage)]
    return [name for name in names if not (run and name == "index")]


def begun(folder, files):
    return any(os.path.exists(f"{folder}/{name}") or any(Path(f"{folder}/{name}.parts").glob("*")) for name in files)


def lock(folder):
    """Holds data/NAME until this process ends, together with the others of this run: a second command, or what torchrun
    leaves alive when it is killed, would write the same files."""
    file = open(f"{folder}/.lock", "a")
    if rank == 0:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            fail(f"another prepare.py is at work in {folder}")
        except OSError as e:
            note(f"{folder} cannot be locked ({e.strerror}): see to it that no other prepare.py works in it")
    share()
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_SH)
    return file


def make_dataset(settings):
    global device
    device = torch_device(device)
    if rank == 0:
        check_inputs()
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))  # the others wait while the first joins the parts
        if device.startswith("cuda"):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    folder = f"data/{dataset}"
    os.makedirs(folder, exist_ok=True)
    with lock(folder):
        manifest = share(start_manifest(folder, settings) if rank == 0 else None)
        for name in stages_wanted():
            make, files, _, _ = STAGES[name]
            entry = manifest["stages"][name]
            if entry.get("complete"):
                if rank == 0:
                    print(f"{name}: there already")
                continue
            start = time.time()
            counts = make(folder)
            made = dict(complete=True, counts=counts, seconds=round(time.time() - start, 1))
            if rank == 0:
                made["sha256"] = {file: file_sha256(f"{folder}/{file}") for file in files if file != "index"}
                print(f"{name}: " + ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in counts.items())
                      + f" ({made['seconds']} s)")
            made, after = share(made), []
            if entry.get("sha256", made["sha256"]) != made["sha256"]:  # what came of another result goes
                after = later(name)
                for other in after:
                    manifest["stages"][other] = dict(settings=manifest["stages"][other]["settings"])
            entry.update(made)
            if rank == 0:
                replace_files(folder, after, manifest)
                for file in files:
                    remove(f"{folder}/{file}.parts")
            share()


def later(name):
    """The stages that use what stage `name` makes, directly or not."""
    names = [name]
    for other, (_, _, _, after) in STAGES.items():
        if set(after.split()) & set(names):
            names.append(other)
    return names[1:]


def start_manifest(folder, settings):
    """The manifest of this run, with the stages of the former one that can stay. Stops when something was made with
    other settings, unless overwrite; then that goes, and what was made of it."""
    path, old = f"{folder}/manifest.json", {}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            old = json.load(f)["stages"]
    contents = {name: file_sha256(globals()[name]) if globals()[name] else "" for name in ("corpus", "queries", "run")}
    manifest = dict(settings=settings, sha256=contents, stages={})
    differences, stale = {}, set()
    for name, (_, files, depends, _) in STAGES.items():
        used = {key: contents.get(key, globals()[key]) for key in depends.split()}
        entry = old.get(name, dict(settings=used))
        if run and name == "index":
            used = entry["settings"]  # not needed, but good still for a command without run
        differs = {key: entry["settings"].get(key) for key in used if entry["settings"].get(key) != used[key]}
        if differs:
            stale |= {name, *later(name)}
            if any(begun(folder, STAGES[other][1]) for other in [name, *later(name)]):
                differences.update(differs)
        if name in stale:
            entry = {}
        elif not all(os.path.exists(f"{folder}/{file}") for file in files):
            entry.pop("complete", None)
        manifest["stages"][name] = {**entry, "settings": used}
    stale = [name for name in STAGES if name in stale and begun(folder, STAGES[name][1])]
    if stale and not overwrite:
        what = ", ".join(f"{key}: other contents than now {globals()[key]}" if key in contents
                         else f"{key}={value}, now {globals()[key]}"
                         for key, value in differences.items())
        fail(f"{folder} was made with {what}: --overwrite=True makes anew {', '.join(stale)}, another --dataset keeps "
             "both")
    replace_files(folder, stale, manifest)
    for name, (_, files, _, _) in STAGES.items():
        if manifest["stages"][name].get("complete"):
            for file in files:
                remove(f"{folder}/{file}.parts")
    return manifest


def replace_files(folder, stages, manifest):
    """Writes the manifest and removes the files of stages that it no longer has. These are renamed first: a crash
    leaves the former manifest with its files or without them, or the new one without them, never half of them."""
    for file in (f"{folder}/{file}{end}" for name in stages for file in STAGES[name][1] for end in ("", ".parts")):
        if os.path.exists(file):
            remove(f"{file}.old")
            os.rename(file, f"{file}.old")
    with replacing(f"{folder}/manifest.json") as f:
        f.write(json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")
    for old in Path(folder).glob("*.old"):
        remove(old)


# ---- the toy world: short passages about invented things, everything drawn afresh for every example

# what is known of a thing of each kind; a fact's 20 values are made of the 4 beginnings and its 5 endings, so that a
# river may be blackwater or coldbrook. No two kinds share a fact.
BEGINNINGS = "black cold gold iron".split()
KINDS = {
    "person": {"job": "smith wright monger maker keeper", "home": "house cottage hall hut manor",
               "pet": "hound cat finch mouse pony", "lunch": "bread cake soup pie broth"},
    "town": {"mayor": "wood man well shaw stone", "river": "water brook beck burn stream",
             "bridge": "bridge arch span crossing walk", "feast": "day fair feast dance ball"},
    "ship": {"captain": "beard hook tooth eye hand", "port": "haven harbour bay quay cove",
             "cargo": "corn wool salt silk wine", "flag": "cross star stripe moon lion"},
    "dragon": {"rider": "heart helm spear lance shield", "cave": "rock cliff peak den hollow",
               "prey": "deer goat hare boar sheep", "fire": "flame spark smoke ember blaze"},
    "robot": {"inventor": "son berg stein field ley", "engine": "wheel gear spring motor rotor",
              "lamp": "light glow beam shine gleam", "metal": "steel brass tin zinc lead"},
}
SYLLABLES = [c + v for c in "bdgklmnrtv" for v in "aeiou"]
NAMES = [(a + b + c).capitalize() for a, b, c in random.Random(0).sample([*product(SYLLABLES, repeat=3)], 200)]


def draw_world(rng, k):
    """k passages, each about a thing of another kind, and all questions that they answer, with the answers."""
    passages, questions = [], []
    for kind, name in zip(rng.sample(sorted(KINDS), k), rng.sample(NAMES, k)):
        facts = [(fact, rng.choice(BEGINNINGS) + rng.choice(endings.split())) for fact, endings in KINDS[kind].items()]
        rng.shuffle(facts)
        passages.append(" ".join(f"{name}'s {fact} is {value}." for fact, value in facts))
        questions += [(f"What is {name}'s {fact}?", value) for fact, value in facts]
    return passages, questions


def draw_example(rng, k=5):
    passages, questions = draw_world(rng, k)
    query, answer = rng.choice(questions)
    scores = [5.0 if query[8:-1] in passage else -5.0 for passage in passages]  # "Lurinu's metal"
    return dict(query=query, documents=passages, answers=[answer], reranking_scores=scores)


# ---- its tokeniser and its language model

WORD = r" ?\p{L}+(?:'s)?|\s+|[^\p{L}\s]"
SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|cls|>", "<|sep|>"]
CHAT_TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}<|end|>{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def draw_conversation(rng, prompt, k, turns=10):
    """One context of k passages with several questions, as a list of (text, is it an answer?). The first turn is
    Prompt's own; or, as LLMs know that too and a compressor of their layers needs it, a question before its passage."""
    passages, questions = draw_world(rng, k)
    pieces = []
    for _ in range(turns):  # independently: without repetition they could be answered by elimination
        query, answer = rng.choice(questions)
        text = f"<|user|> {query}{prompt.after}"
        if not pieces and k == 1 and rng.random() < 0.5:
            text = f"{query}\n{passages[0]}{prompt.after}"
        elif not pieces:
            text = prompt.text(query, passages)
        pieces += [(text, False), (f"{prompt.answer_start}{answer}<|end|>", True)]
    return pieces


def make_tokenizer(folder, rng):
    """One token a word: tiktoken looks a whole word up before it merges bytes, so bytes and words are all it needs."""
    ranks = {bytes([b]): b for b in range(256)}
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # tiktoken would keep the file it reads first, by its path, for ever
    os.makedirs(folder, exist_ok=True)
    for learn in (False, True):  # the prompt is part of the world's text, and it takes a tokeniser to render it
        with open(f"{folder}/tokenizer.tiktoken", "wb") as f:  # tiktoken's format: a token in base64 and its rank
            f.writelines(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
        converter = TikTokenConverter(f"{folder}/tokenizer.tiktoken", pattern=WORD, extra_special_tokens=SPECIAL)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=converter.converted(), eos_token="<|end|>",
                                            pad_token="<|end|>", chat_template=CHAT_TEMPLATE)
        if not learn:
            prompt = Prompt(tokenizer)
            text = "".join(p for _ in range(4000) for p, _ in draw_conversation(rng, prompt, rng.randint(1, 5)))
            for special in SPECIAL:
                text = text.replace(special, "\n")
            for word in sorted(set(regex.findall(WORD, text))):
                ranks.setdefault(word.encode(), len(ranks))
    tokenizer.save_pretrained(folder)
    return tokenizer


def train_llm(tokenizer, rng):
    """A Llama of 4 layers, trained from scratch to answer from full text: first from one passage, then from up to 5."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        initializer_range=0.08, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None))
    with torch.no_grad():
        model.model.embed_tokens.weight *= 2  # or the first MLP drowns what word it is
    prompt = Prompt(tokenizer)

    def loss(step):
        most = min(5, 1 + int(16 * max(0.0, step / llm_steps - 0.4)))
        rows = []
        for _ in range(32):
            pieces = draw_conversation(rng, prompt, rng.randint(1, most))
            rows.append([(i, answer) for text, answer in pieces for i in prompt.ids(text)])
        width = max(len(row) for row in rows)
        rows = torch.tensor([row + [(0, False)] * (width - len(row)) for row in rows])  # padding on the right: causal
        ids, is_answer = rows[:, :, 0], rows[:, 1:, 1].bool()
        # the first two layers learn to answer on their own too: in a deep LLM the early layers do such local reading
        h = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
        return sum(torch.nn.functional.cross_entropy(model.lm_head(x[:, :-1][is_answer]), ids[:, 1:][is_answer])
                   for x in (model.model.norm(h[2]), h[4]))

    return fit(model, llm_steps, loss, "training data/toy/llm")


def fit(model, steps, loss_of, desc):
    """Trains a model on the loss of every step, loss_of(step)."""
    # Muon learns to look answers up in a third of AdamW's steps; it is for matrices, not for the table of embeddings
    matrices = [p for p in decoder_layers(model).parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() == 1] + [model.get_input_embeddings().weight]
    optimizers = [torch.optim.Muon(matrices, lr=0.03, weight_decay=0.0),
                  torch.optim.AdamW(others, lr=4e-3, weight_decay=0.0)]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1, (s + 1) / 20) * (1 - s / steps))
                  for o in optimizers]
    bar = tqdm(range(steps), desc=desc, mininterval=5)
    for step in bar:
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o, scheduler in zip(optimizers, schedulers):
            o.step()
            o.zero_grad()
            scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def train_encoder(folder, tokenizer, model, config, **tokens):
    """A model of two layers for config/toy_modernbert.py, with the LLM's words and embeddings of its own: it has
    learned to fill in a masked word, the answer behind a question and a passage, as encoders know such things from
    their own pretraining. What it has never seen is the LLM."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokens)
    special = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    encoder = model(config(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                           num_attention_heads=4, initializer_range=0.08,
                           **{"bos_token_id": None, "eos_token_id": None, **special}))
    embeddings = encoder.get_input_embeddings().weight
    begin, between, end = tokens.get("cls_token", tokens.get("bos_token")), *[tokens.get("sep_token", "\n")] * 2

    def loss(step):
        answers, rows = [], []
        for _ in range(64):
            passages, questions = draw_world(rng, 1)
            query, answer = rng.choice(questions)
            rows.append(f"{begin}{query}{between}{passages[0]}{end}{tokens['mask_token']}")
            answers.append(f" {answer}")
        ids, mask = left_pad(tokenizer(rows, add_special_tokens=False).input_ids)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        h = encoder(ids, attention_mask=mask.long(), position_ids=positions).last_hidden_state[:, -1]  # (64, 128)
        return torch.nn.functional.cross_entropy(h @ embeddings.T, torch.tensor(tokenizer(answers).input_ids)[:, 0])

    fit(encoder, encoder_steps, loss, f"training {folder}").save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_toy():
    # train.py takes train.jsonl as the sign that the toy is complete: it goes first and comes back last
    Path("data/toy/train.jsonl").unlink(missing_ok=True)
    rng = random.Random(seed)
    tokenizer = make_tokenizer("data/toy/llm", rng)
    train_encoder("data/toy/encoder", tokenizer, ModernBertModel, ModernBertConfig, cls_token="<|cls|>",
                  sep_token="<|sep|>", pad_token="<|end|>", mask_token="<|assistant|>")
    train_encoder("data/toy/decoder", tokenizer, LlamaModel, LlamaConfig, bos_token="<|cls|>", pad_token="<|end|>",
                  mask_token="<|assistant|>")
    llm = train_llm(tokenizer, rng)
    llm.save_pretrained("data/toy/llm")
    prompt = Prompt(tokenizer)
    for split, n in (("test", test_examples), ("val", val_examples), ("train", train_examples)):
        examples = [draw_example(rng) for _ in range(n)]
        for i in tqdm(range(0, n, 100), desc="teacher's answers", mininterval=5):
            prompts = [prompt.text(x["query"], x["documents"]) for x in examples[i:i + 100]]
            for x, answer in zip(examples[i:i + 100], generate_answers(llm, tokenizer, prompts, 8)):
                x["answer"] = answer
        for number, x in enumerate(examples):
            x["_id"] = f"{split}{number}"
            x["documents"] = [dict(_id=f"{split}{number}-{i}", text=d) for i, d in enumerate(x["documents"])]
        with open(f"data/toy/corpus.{split}.jsonl", "w") as f:  # to pretrain on, to store the memory of
            f.writelines(json.dumps(d) + "\n" for x in examples for d in x["documents"])
        with open(f"data/toy/qrels.{split}.tsv", "w") as f:
            f.write("query-id\tcorpus-id\tscore\n")
            f.writelines(f"{x['_id']}\t{d['_id']}\t1\n" for x in examples
                         for d, score in zip(x["documents"], x["reranking_scores"]) if score > 0)
        with open(f"data/toy/{split}.jsonl.tmp", "w") as f:
            f.writelines(json.dumps(x) + "\n" for x in examples)
        os.replace(f"data/toy/{split}.jsonl.tmp", f"data/toy/{split}.jsonl")
        print(f"data/toy/{split}.jsonl: {n:,} examples; the teacher's answers from full text: exact match "
              f"{mean_scores([x['answer'] for x in examples], examples)['em']:.3f}")


if __name__ == "__main__":
    if dataset == "toy":
        if corpus or queries or run:
            fail("dataset 'toy' takes no corpus, queries or run: --dataset=NAME names what is made of yours")
        at_least(globals(), seed=0, llm_steps=1, encoder_steps=1, train_examples=1, val_examples=1, test_examples=1)
        make_toy()
    else:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            make_dataset(settings)
        except (OSError, SafetensorError, ModelError) as e:  # a full disk, a file that cannot be read, damaged weights
            fail(f"{first_line(e)}; what is complete stays: the same command goes on from there")
        except KeyboardInterrupt:
            fail("interrupted: the same command goes on from there")
    if world > 1:
        sys.stdout.flush()
        os._exit(0)  # see the end of train.py
