"""
Makes training data as the paper does: from a corpus and queries, by retrieval, reranking and a teacher's answers,

    python prepare.py config/prepare_msmarco.py
    python prepare.py --dataset=wiki --corpus=corpus.jsonl --queries=queries.jsonl --teacher=gold

or from examples that others have made (public.py),

    python prepare.py config/prepare_pisco.py

or the toy world (data/toy/prepare.py), which needs no network and no GPU and comes with its own tiny language model:

    python prepare.py --dataset=toy           # anew each time

Everything is written into data/NAME. What else is there and complete is not made again: after a crash the same command
goes on where it stopped. torchrun --nproc_per_node=N prepare.py .. shares the work and writes the same files.
"""

import os

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # the same digits with any number of threads; read when MKL starts

import fcntl
import json
import math
import re
import runpy
import shutil
import sys
import time
from array import array
from collections import namedtuple
from contextlib import suppress
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, logging
from transformers.models.auto import modeling_auto

import distributed  # rank and world by its name: configure() takes numbers among a script's globals for settings
from configurator import at_least, configure, fail, fail_on, fast_dtype, first_line, torch_device
from corpus import Corpus, chunk, chunk_by_words, index_corpus
from data import document_text
from distributed import share
from files import file_sha256, naming, read_json, replacing
from formats import read_documents, read_others_run, read_queries, read_run, run_lines, to_line
from parts import by_length, join_parts, make_parts, pad, part_size, parts_of, progress
from pretrained import ModelError, load_config, load_model, load_tokenizer, longest_text, note
from prompt import Prompt
from public import copy_examples, fraction
from splade import Splade, check_pooling, find_shards, search, shard_size, write_shard
from teacher import Teacher

# -----------------------------------------------------------------------------
dataset = "toy"  # the result goes into data/NAME
examples = ""  # made by others, with documents and answers: a .jsonl or .parquet, a folder of them, a name of the hub
# where it comes from
corpus = ""  # BEIR's corpus.jsonl, KILT's knowledge source, or a .tsv of id, text (and title); .gz too
queries = ""  # BEIR's queries.jsonl, a .tsv of id, text (MS MARCO's), or plain lines; .gz too
run = ""  # a TREC run over data/NAME/corpus.jsonl, in place of our own retrieval; .gz too
max_passages = 0  # only the first n documents of the corpus; 0 = all
max_queries = 0  # only the first n queries; 0 = all
# the models: a name of the hub or a folder
generator = "mistralai/Mistral-7B-Instruct-v0.2"  # the model to be trained: lengths count its tokens
splade = "naver/splade-v3"  # any masked language model trained as SPLADE
reranker = "naver/trecdl22-crossencoder-debertav3"  # any cross-encoder with one score; empty: retrieval's order, scores
teacher = "mistralai/Mistral-7B-Instruct-v0.2"  # any causal LM; or gold: the queries' gold answers
teacher_url = ""  # ask an OpenAI-compatible server for the teacher's answers, such as http://localhost:8000/v1
teacher_requests = 16  # at a time, from each process under torchrun
teacher_retries = 8  # of one request; the waits between double, from 1 s to 60 s
teacher_timeout = 300.0  # seconds for one answer
# sizes
doc_tokens = 128  # of a chunk, its title included
chunk_words = 0  # cut documents into chunks of this number of words instead (KILT's passages: 100)
query_tokens = 64  # longer queries are cut
answer_tokens = 128
top_k = 50  # retrieved
num_documents = 5  # kept after reranking
val_fraction = 0.01  # of the queries
batch_tokens = 16384  # tokens in a batch of any of the models
overwrite = False  # make anew what was made with other settings
last_stage = "train"  # stop after this one: after corpus, to go on with the run of another engine
device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
dtype = ""  # of the teacher's weights: float32, bfloat16 or float16; empty: whichever of the first two is faster
encoder_dtype = ""  # of SPLADE's and the reranker's; empty: float16 on CUDA, else as the teacher's
# -----------------------------------------------------------------------------

# ---- 1. the corpus, in chunks


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
            chunks = chunk_by_words(batch, chunk_words) if chunk_words else chunk(tokenizer, batch, doc_tokens)
            f.writelines(map(to_line, chunks))

    with progress("corpus", total=os.path.getsize(corpus), unit="B", unit_scale=True) as bar:
        n = make_parts(f"{folder}/corpus.jsonl.parts", parts_of(documents(bar), 8192), write)
    join_parts(f"{folder}/corpus.jsonl", n)
    if distributed.rank == 0:
        counts["chunks"] = index_corpus(folder, corpus)
    return counts


# ---- 2. the queries


def cut_queries():
    """Yields ("FILE, line N", query, its text of at most query_tokens, whether it was longer) of every query."""
    prompt = Prompt(load_tokenizer(generator))
    for part in parts_of(read_queries(queries), 1024):
        for (where, x), text in zip(part, prompt.cut([x["text"] for _, x in part], query_tokens)):
            yield where, x, text.strip(), text.strip() != prompt.plain(x["text"]).strip()


def make_queries(folder):
    counts = dict(queries=0, duplicates=0, cut=0, with_gold_answers=0)
    if distributed.rank > 0:
        share()
        return counts
    texts, ids = set(), {}
    with replacing(f"{folder}/queries.jsonl") as f, progress("queries", unit="") as bar:
        for where, x, text, cut in cut_queries():
            if ids.setdefault(x["_id"], where) != where:
                fail(f"{where}: the _id '{x['_id']}' stands already in {ids[x['_id']].rpartition(', ')[2]}")
            if text in texts:
                counts["duplicates"] += 1
            elif not max_queries or counts["queries"] < max_queries:
                texts.add(text)
                counts["queries"] += 1
                counts["cut"] += cut
                counts["with_gold_answers"] += bool(x["answers"])
                f.write(to_line(dict(_id=x["_id"], text=text, metadata=dict(answers=x["answers"]))))
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


def load_queries(folder):
    with open(f"{folder}/queries.jsonl", "rb") as f:
        return [json.loads(line) for line in f]


# ---- 3. retrieval


def make_index(folder):
    passages, model = Corpus(folder), Splade(splade, device, getattr(torch, encoder_dtype))

    def write(f, numbers):
        matrix = model.encode([document_text(passages[i]) for i in numbers], batch_tokens)
        write_shard(f, matrix, model.vocab_size, numbers[0])

    if not os.path.exists(f"{folder}/index"):  # or a crash came before the manifest knew of it
        make_parts(f"{folder}/index.parts", parts_of(range(len(passages)), shard_size(len(passages))), write,
                   progress("index", total=len(passages), unit=" passages"))
        if distributed.rank == 0:
            os.rename(f"{folder}/index.parts", f"{folder}/index")
    return dict(passages=len(passages))


def make_run(folder):
    """The top_k passages of every query, by SPLADE or, with `run`, as another engine has found them."""
    if run:
        return import_run(folder)
    passages, model = Corpus(folder), Splade(splade, device, getattr(torch, encoder_dtype))
    asked = load_queries(folder)
    shards, indexed = find_shards(f"{folder}/index")
    if indexed != len(passages):
        fail(f"{folder}/index lacks some of the {len(passages):,} passages: remove it, and it will be made anew")

    def write(f, part):
        rows = model.encode([x["text"] for x in part], batch_tokens)
        best, scores = search(shards, rows, model.vocab_size, top_k, device)
        for x, numbers, row in zip(part, best, scores):
            found = numbers >= 0
            f.write(run_lines(x["_id"], [passages[i]["_id"] for i in numbers[found]], row[found], "splade"))

    n = make_parts(f"{folder}/run.retrieval.trec.parts", parts_of(asked, part_size(len(asked), 2048)), write,
                   progress("retrieval", total=len(asked), unit=" queries"))
    join_parts(f"{folder}/run.retrieval.trec", n)
    return count_run(folder, "run.retrieval.trec")


def count_run(folder, name):
    lengths = [len(hits) for _, hits in read_run(f"{folder}/{name}")] if distributed.rank == 0 else []
    return dict(queries=len(lengths), passages=sum(lengths))


def read_hits(folder, position, passages):
    """Reads the run of another engine: for every line of a query that is asked its place in queries.jsonl, the number
    of its passage and its score, as arrays. position: {query id: place}."""
    query, passage, score, given = array("i"), array("q"), array("d"), None
    with progress("run", total=os.path.getsize(run), unit="B", unit_scale=True) as bar:
        for part in parts_of(read_others_run(run, bar), 65536):
            numbers = passages.numbers([passage_id for _, _, passage_id, _ in part])
            for (where, query_id, passage_id, s), number in zip(part, numbers.tolist()):
                if number < 0:
                    fail(f"{where}: no passage '{passage_id}' in {folder}/corpus.jsonl, whose ids look like "
                         f"'{passages[0]['_id']}'")
                if query_id in position:
                    query.append(position[query_id])
                    passage.append(number)
                    score.append(s)
                else:  # fine when it was dropped as a duplicate or by max_queries
                    given = given or {x["_id"] for _, x in read_queries(queries)}
                    if query_id not in given:
                        fail(f"{where}: no query '{query_id}' in {queries}")
    return np.array(query), np.array(passage), np.array(score)


def import_run(folder):
    """Checks a TREC run made elsewhere and writes it as ours: queries in the order of queries.jsonl, of each the top_k
    best by score, equals as they stand."""
    if distributed.rank > 0:
        share()
        return {}
    asked, passages = load_queries(folder), Corpus(folder)
    query, passage, score = read_hits(folder, {x["_id"]: i for i, x in enumerate(asked)}, passages)
    order = np.lexsort((-score, query))  # stable
    bounds = np.searchsorted(query[order], np.arange(len(asked) + 1))
    lacking = [x["_id"] for x, n in zip(asked, np.diff(bounds)) if n == 0]
    if lacking:  # such as one of stop words alone, for BM25
        print(f"{run}: no line for {len(lacking):,} of {len(asked):,} queries, such as '{lacking[0]}'")
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
    """A model that reads a query and a document together and gives one score."""

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
        ids = self.tokenizer(*map(list, zip(*pairs)), truncation="longest_first", max_length=self.max_length)
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
                if not all(math.isfinite(score) for _, score in hits):
                    fail(f"reranker={reranker} gives no finite score in {encoder_dtype} for the query '{id}': "
                         "--encoder_dtype=float32")
            f.write(run_lines(id, *zip(*hits[:num_documents]), "cross-encoder" if reranker else "retrieval"))

    n = make_parts(f"{folder}/run.rerank.trec.parts",
                   parts_of(read_run(f"{folder}/run.retrieval.trec"), part_size(len(texts), 256)), write,
                   progress("rerank", total=len(texts), unit=" queries"))
    join_parts(f"{folder}/run.rerank.trec", n)
    return count_run(folder, "run.rerank.trec")


# ---- 5. the teacher's answers


def read_answers(folder):
    """Reads all files of a folder: {query id: {"_id", "model", "answer"}}. A line that a crash has torn is left out."""
    answers = {}
    for path in Path(folder).iterdir():
        with open(path, "rb") as f:
            for line in f:
                with suppress(ValueError):
                    x = json.loads(line)
                    answers[x["_id"]] = x
    return answers


def my_queries(folder, asked):
    """Yields this process's queries with their documents' texts, in lists of (id, query, [text, ..])."""
    passages = Corpus(folder)
    size = part_size(len(asked), 512)
    for i, part in enumerate(parts_of(read_run(f"{folder}/run.rerank.trec"), size)):
        if i % distributed.world == distributed.rank:
            yield [(id, asked[id]["text"], [document_text(x) for x in passages.of(hits)]) for id, hits in part]


def make_answers(folder):
    """Every process appends its answers to a file of its own in teacher.jsonl.parts, as they come."""
    asked = {x["_id"]: x for x in load_queries(folder)}
    parts = f"{folder}/teacher.jsonl.parts"
    os.makedirs(parts, exist_ok=True)
    done = read_answers(parts)
    share()  # nobody appends before all have read
    path = f"{parts}/{distributed.rank:06d}"
    with naming(path), open(path, "ab") as f, progress(
            "teacher", total=-(-len(asked) // distributed.world), initial=len(done) // distributed.world,
            unit=" queries") as bar:
        if f.tell():
            f.write(b"\n")  # ends a line that a crash has torn

        def record(answers, model=teacher):
            new = [dict(_id=id, model=model, answer=answer) for id, answer in answers.items() if id not in done]
            f.write(b"".join(map(to_line, new)))
            f.flush()
            bar.update(len(new))

        windows = my_queries(folder, asked)
        if teacher == "gold":
            for window in windows:
                golds = {id: asked[id]["metadata"]["answers"] for id, _, _ in window}
                record({id: answers[0] for id, answers in golds.items() if answers})
        elif teacher_url:
            from teacher_server import Server, ask_server  # takes requests, which nothing else needs
            server = Server(teacher_url, teacher, answer_tokens, connections=teacher_requests, retries=teacher_retries,
                            timeout=teacher_timeout)
            ask_server(server, chain.from_iterable(windows), done, record, teacher_requests)
        else:
            model = Teacher(teacher, device, getattr(torch, dtype))
            for window in windows:
                for answers in model.answer(window, done, answer_tokens, batch_tokens):
                    record(answers)
    share()
    answers = read_answers(parts) if distributed.rank == 0 else {}
    if distributed.rank == 0:
        with replacing(f"{folder}/teacher.jsonl") as f:
            f.writelines(to_line(answers[id]) for id in asked if id in answers)
    share()
    return dict(answers=len(answers), empty_answers=sum(not x["answer"] for x in answers.values()))


# ---- 6. training examples


def make_examples(folder):
    if distributed.rank > 0:
        return {}
    passages, asked = Corpus(folder), {x["_id"]: x for x in load_queries(folder)}
    with open(f"{folder}/teacher.jsonl", "rb") as f:
        answers = {x["_id"]: x["answer"] for x in map(json.loads, f) if x["answer"]}
    fractions = {id: fraction(asked[id]["text"]) for id in answers}
    limit = max(val_fraction, min(fractions.values(), default=0))  # at least one query is for validation
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
            counts["val" if fractions[id] <= limit else "train"] += 1
            (val if fractions[id] <= limit else train).write(to_line(x))
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


# make(folder) makes `files` and returns what it has counted, {what: number}; the first process's counts are kept. The
# files depend on the settings `depends`, where an input file's contents count and not its name, and on the files of the
# stages `after`
Stage = namedtuple("Stage", "make files depends after")
STAGES = dict(
    queries=Stage(make_queries, ["queries.jsonl"], "queries generator query_tokens max_queries", ""),
    corpus=Stage(make_corpus, ["corpus.jsonl", "corpus.index"],
                 "corpus generator doc_tokens chunk_words max_passages", ""),
    index=Stage(make_index, ["index"], "splade encoder_dtype", "corpus"),
    retrieval=Stage(make_run, ["run.retrieval.trec"], "run top_k", "queries corpus index"),
    rerank=Stage(make_reranked, ["run.rerank.trec"], "reranker num_documents encoder_dtype", "retrieval"),
    teacher=Stage(make_answers, ["teacher.jsonl"], "teacher answer_tokens", "rerank"),
    train=Stage(make_examples, ["train.jsonl", "val.jsonl"], "val_fraction", "teacher"),
)


def stages_wanted():
    names = list(STAGES)[:1 + list(STAGES).index(last_stage)]
    return [name for name in names if not (run and name == "index")]


def later(name):
    """The stages that use what stage `name` makes, directly or not."""
    names = [name]
    for other, stage in STAGES.items():
        if set(stage.after.split()) & set(names):
            names.append(other)
    return names[1:]


# ---- what can be known before hours of work


def check_model(setting, kinds, kind):
    """Checks a model by its config and tokeniser, without its weights, and returns the config. kinds: transformers'
    classes of this kind by model type."""
    name = globals()[setting]
    classes = {c for value in kinds.values() for c in ([value] if isinstance(value, str) else value)}
    try:
        config = load_config(name)
        made_as = config.architectures or []  # a folder need not say
        if not (classes & {*made_as} if made_as else config.model_type in kinds):
            fail(f"{setting}={name} is a {', '.join(made_as or [config.model_type])}, not {kind}")
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


def check_name():
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", dataset):
        fail(f"dataset is the name of a folder in data/, not '{dataset}'")


def check_files():
    """Checks the files that are read."""
    for name in ("corpus", "queries"):
        if not globals()[name]:
            fail(f"dataset '{dataset}' needs --corpus=FILE and --queries=FILE ('toy' is made without)")
    for name in ("corpus", "queries", "run"):
        path = globals()[name]
        if path and not os.path.isfile(path):
            fail(f"{name}: {path} {'is not a file' if os.path.exists(path) else 'does not exist'}")
        if path and os.path.getsize(path) == 0:
            fail(f"{name}: {path} is empty")
        if path.removesuffix(".gz").endswith((".csv", ".parquet")):
            fail(f"{name}: {path} is neither JSON Lines (.jsonl) nor a .tsv")


def check_settings():
    at_least(globals(), max_passages=0, max_queries=0, teacher_requests=1, teacher_retries=0, teacher_timeout=0.1,
             doc_tokens=8, chunk_words=0, query_tokens=1, answer_tokens=1, top_k=1, num_documents=1, val_fraction=0,
             batch_tokens=1)
    check_name()
    check_files()
    if last_stage not in STAGES:
        fail(f"last_stage is one of {', '.join(STAGES)}, not '{last_stage}'")
    if val_fraction >= 1:
        fail(f"val_fraction is a part of 1, not {val_fraction}")
    if top_k < num_documents:
        fail(f"top_k ({top_k}) is smaller than num_documents ({num_documents})")
    for name in ("dtype", "encoder_dtype"):
        if globals()[name] not in ("float32", "float16", "bfloat16"):
            fail(f"{name} is float32, float16 or bfloat16, not '{globals()[name]}'")
    if teacher_url and teacher == "gold":
        fail("--teacher=gold asks no server: leave out --teacher_url")
    if teacher_url and not re.match("https?://.", teacher_url):
        fail(f"teacher_url is like http://localhost:8000/v1, not '{teacher_url}'")


def check_models():
    wanted = stages_wanted()
    check_model("generator", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "a causal language model")
    if "index" in wanted:
        check_model("splade", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "a masked language model")
    if "rerank" in wanted and reranker:
        config = check_model("reranker", modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
                             "a cross-encoder (sequence classification)")
        if config.num_labels != 1:
            fail(f"reranker={reranker} gives {config.num_labels} scores for a document, not one")
    if "teacher" in wanted and teacher != "gold" and not teacher_url:
        check_model("teacher", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "a causal language model")


# ---- the manifest: which stages are complete, with which settings they were made


def remove(path):
    """Removes a file or a folder. A link goes alone: what it leads to may be another's."""
    shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else Path(path).unlink(missing_ok=True)


def paths_of(folder, stages):
    """The files of stages, and the folders with their parts."""
    return [f"{folder}/{file}{end}" for name in stages for file in STAGES[name].files for end in ("", ".parts")]


def begun(folder, stages):
    """What there is of some stages on disk; an empty folder of parts is nothing."""
    return [path for path in paths_of(folder, stages)
            if os.path.exists(path) and (not path.endswith(".parts") or any(Path(path).iterdir()))]


def start_manifest(folder, settings):
    """The manifest of this run, with the stages of the former one that can stay. Exits when something was made with
    other settings, unless overwrite is True; then that goes, and what was made of it."""
    former = {}
    for name in ("corpus", "queries", "run"):
        if globals()[name] and os.path.realpath(globals()[name]) in map(os.path.realpath, paths_of(folder, STAGES)):
            fail(f"{name}: {globals()[name]} would be written over: choose another --dataset")
    if not os.path.exists(f"{folder}/manifest.json"):
        if others := begun(folder, STAGES):
            fail(f"{others[0]} is not made by this command: choose another --dataset")
    else:
        with fail_on(ValueError):
            former = read_json(f"{folder}/manifest.json").get("stages")
        if former is None:
            fail(f"{folder} holds examples that others have made (--examples): choose another --dataset")
    contents = {name: file_sha256(globals()[name]) if globals()[name] else "" for name in ("corpus", "queries", "run")}
    now = {name: {key: contents.get(key, globals()[key]) for key in stage.depends.split()}
           for name, stage in STAGES.items()}
    # a manifest that is older than chunk_words was made without
    was = {name: {"chunk_words": 0} | former[name]["settings"] if name in former else now[name] for name in STAGES}
    if run:  # the index is not needed, but still good for a command without run
        now["index"] = was["index"]
    if not reranker:
        now["rerank"]["encoder_dtype"] = was["rerank"].get("encoder_dtype")
    if teacher == "gold":
        now["teacher"]["answer_tokens"] = was["teacher"].get("answer_tokens")
    changed = {name: [key for key in now[name] if was[name].get(key) != now[name][key]] for name in STAGES}
    stale = {other for name in STAGES if changed[name] for other in (name, *later(name))}
    on_disk = [name for name in STAGES if name in stale and begun(folder, [name])]
    if on_disk and not overwrite:
        made_with = {}  # a setting may be that of several stages
        for name in STAGES:
            if {name, *later(name)} & {*on_disk}:
                made_with |= {key: difference(key, was[name].get(key)) for key in changed[name]}
        fail(f"{folder} was made with {', '.join(made_with.values())}: --overwrite=True makes anew "
             f"{', '.join(on_disk)}, another --dataset keeps both")

    stages = {}
    for name, stage in STAGES.items():
        entry = {} if name in stale else former.get(name, {})
        if not all(os.path.exists(f"{folder}/{file}") for file in stage.files):
            entry.pop("complete", None)
        stages[name] = {**entry, "settings": now[name]}
    manifest = dict(settings=settings, sha256=contents, stages=stages)
    replace_files(folder, on_disk, manifest)
    for name in STAGES:
        if stages[name].get("complete"):
            remove_parts(folder, name)
    return manifest


def difference(key, was):
    """How a setting differs from what it was, for a message; of a file that is read, was is its checksum, or empty."""
    now = globals()[key]
    if key not in ("corpus", "queries", "run"):
        return f"{key}={was}, now {now}"
    if was and now:
        return f"another content of {key}={now}"
    return f"a {key}, now none" if was else f"no {key}, now {now}"


def replace_files(folder, stages, manifest):
    """Writes the manifest, and removes the files of `stages`, which it no longer has. These are renamed first: a crash
    leaves the former manifest with its files or without them, or the new one without them, never half of them."""
    for path in filter(os.path.exists, paths_of(folder, stages)):
        remove(f"{path}.replaced")
        os.rename(path, f"{path}.replaced")
    with replacing(f"{folder}/manifest.json") as f:
        f.write(json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")
    for path in paths_of(folder, STAGES):
        remove(f"{path}.replaced")


def remove_parts(folder, name):
    for file in STAGES[name].files:
        remove(f"{folder}/{file}.parts")


# ---- the whole


def lock(folder):
    """Holds data/NAME until this process ends, together with the others of this run: a second command, or what torchrun
    leaves alive when it is killed, would write the same files."""
    file = open(f"{folder}/.lock", "a")
    if distributed.rank == 0:
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


def make_stage(folder, name, manifest):
    """Makes a stage's files and enters them in the manifest. Where they are not what they were before, what was made of
    them goes."""
    stage, entry, start = STAGES[name], manifest["stages"][name], time.time()
    counts = stage.make(folder)
    made = dict(complete=True, counts=counts, seconds=round(time.time() - start, 1))
    if distributed.rank == 0:
        made["sha256"] = {file: file_sha256(f"{folder}/{file}") for file in stage.files if file != "index"}
        print(f"{name}: " + ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in counts.items())
              + f" ({made['seconds']} s)")
    made = share(made)
    stale = later(name) if entry.get("sha256", made["sha256"]) != made["sha256"] else []
    for other in stale:
        manifest["stages"][other] = dict(settings=manifest["stages"][other]["settings"])
    entry.update(made)
    if distributed.rank == 0:
        replace_files(folder, stale, manifest)
        remove_parts(folder, name)
    share()


def make_dataset(settings):
    global device, dtype, encoder_dtype
    device = torch_device(device)
    settings["dtype"] = dtype = dtype or fast_dtype(device)
    settings["teacher_url"] = re.sub("//[^/]+@", "//", teacher_url)  # a password is not for the manifest
    settings["encoder_dtype"] = encoder_dtype = encoder_dtype or ("float16" if device.startswith("cuda") else dtype)
    if distributed.rank == 0:
        check_settings()
        check_models()
    if distributed.world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))  # the others wait while the first joins the parts
        if device.startswith("cuda"):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    folder = f"data/{dataset}"
    os.makedirs(folder, exist_ok=True)
    with lock(folder):
        manifest = share(start_manifest(folder, settings) if distributed.rank == 0 else None)
        for name in stages_wanted():
            if not manifest["stages"][name].get("complete"):
                make_stage(folder, name, manifest)
            elif distributed.rank == 0:
                print(f"{name}: there already")


def make_toy(given):
    """Runs data/toy/prepare.py, which has settings of its own, in this process. given: names of settings that are not
    as they stand above."""
    if given:
        fail(f"dataset 'toy' takes no {given[0]}: --dataset=NAME names what is made of your files")
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "toy", "prepare.py")
    sys.argv = [script]
    runpy.run_path(script, run_name="__main__")


def copy_public(given):
    """See public.py: with examples there is nothing to retrieve and to answer."""
    check_name()
    at_least(globals(), max_queries=0)
    if unused := [x for x in given if x not in ("dataset", "examples", "val_fraction", "max_queries", "overwrite")]:
        fail(f"examples={examples} have documents and answers: leave out {unused[0]}")
    if dataset == "toy" or not 0 <= val_fraction < 1:
        fail("examples take --dataset=NAME, which is not toy, and a val_fraction from 0 to less than 1")
    if distributed.world > 1:
        fail("examples are copied by one process: without torchrun")
    folder = f"data/{dataset}"
    os.makedirs(folder, exist_ok=True)
    with lock(folder):
        copy_examples(folder, examples, val_fraction, max_queries, overwrite)


if __name__ == "__main__":
    above = dict(globals())
    settings = configure(globals())
    given = [name for name in settings if settings[name] != above[name]]
    if examples:
        try:
            with fail_on(OSError):
                copy_public(given)
        except KeyboardInterrupt:
            fail("interrupted: the same command begins anew")
    elif dataset == "toy":
        make_toy(given)
    else:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            make_dataset(settings)
        except (OSError, SafetensorError, ModelError) as e:  # a full disk, a file that cannot be read, damaged weights
            fail(f"{first_line(e)}; what is complete stays: the same command goes on from there")
        except KeyboardInterrupt:
            fail("interrupted: the same command goes on from there")
    if distributed.world > 1:
        sys.stdout.flush()
        os._exit(0)  # see the end of train.py
