"""prepare.py: its pieces against transformers, sentence-transformers and dense products; the whole as a user runs it."""

import errno
import fcntl
import functools
import gzip
import http.server
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import jsonl, peak_memory, sentence, write
from sentence_transformers import SparseEncoder
from sentence_transformers.sentence_transformer.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import prepare
from compressor import left_pad
from data import Documents, Examples, document_text
from formats import read_run, run_lines, to_line
from model import ScaleDown, ScaleDownConfig

ROOT = Path(__file__).resolve().parent.parent
FILES = ["queries.jsonl", "corpus.jsonl", "run.retrieval.trec", "run.rerank.trec", "teacher.jsonl", "train.jsonl", "val.jsonl"]



def load(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def settings(tiny, tmp_path_factory):
    """The settings of a small run over a corpus of 40 documents and 20 queries."""
    folder, rng = tmp_path_factory.mktemp("inputs"), random.Random(0)
    corpus = jsonl(folder / "corpus.jsonl", [
        dict(_id=f"d{i}", title=sentence(rng, 2) if i % 3 else "", text=sentence(rng, rng.randint(3, 60))) for i in range(40)])
    queries = jsonl(folder / "queries.jsonl", [
        dict(_id=f"q{i}", text=f"{sentence(rng, 5)} {i}?", metadata=dict(answers=[sentence(rng, 2)])) for i in range(20)])
    return dict(dataset="x", corpus=corpus, queries=queries, generator=tiny("llama"), teacher=tiny("llama"),
                splade=tiny("splade"), reranker=tiny("cross_encoder"), doc_tokens=24, answer_tokens=6, top_k=10,
                num_documents=3, val_fraction=0.2, batch_tokens=512, device="cpu", dtype="float32", encoder_dtype="float32")


def make(folder, monkeypatch, settings, **changes):
    """make_dataset() in this process; -> data/x"""
    monkeypatch.chdir(folder)
    for name, value in {**settings, **changes}.items():
        monkeypatch.setattr(prepare, name, value)
    prepare.make_dataset({})
    return Path(folder) / "data" / "x"


def wrong(capfd, *args, **kwargs):
    """-> the one line that make() stops with"""
    with pytest.raises(SystemExit) as e:
        make(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


def command(settings, *before, **changes):
    return [sys.executable, *before, str(ROOT / "prepare.py"), *(f"--{k}={v}" for k, v in {**settings, **changes}.items())]


def run(folder, args, **kwargs):
    return subprocess.run(args, cwd=folder, capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """data/x of an undisturbed run, by the command line"""
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder, command(settings))
    assert done.returncode == 0, done.stderr
    return folder / "data" / "x"


def same(a, b):
    assert {f.name for f in Path(a).iterdir()} == {f.name for f in Path(b).iterdir()}
    for name in FILES:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


# ---- the corpus


def test_a_title_alone_is_a_passage_and_nothing_is_none(settings, tmp_path, monkeypatch):
    rows = [dict(_id="1", title="the river", text=""), dict(_id="2", title=None, text="the mayor"), dict(_id="3", title="", text=None),
            dict(_id="4", title="  ", text=" "), dict(_id="5", title="stone", text=None)]
    folder = make(tmp_path, monkeypatch, settings, corpus=jsonl(tmp_path / "c.jsonl", rows), last_stage="corpus")
    assert [(x["_id"], x["title"], x["text"]) for x in load(folder / "corpus.jsonl")] == [
        ("1#0", "the river", ""), ("2#0", "", "the mayor"), ("5#0", "stone", "")]
    assert load_manifest(folder)["stages"]["corpus"]["counts"]["empty_documents"] == 2
    assert [document_text(x) for x in Documents(str(tmp_path / "c.jsonl"))] == ["the river", "the mayor", "stone"]


def load_manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_settings_are_those_at_the_top_and_nothing_else(whole):
    """configure() takes every number and string among a script's globals for a setting, what it imports included."""
    block = (ROOT / "prepare.py").read_text().split(f"# {'-' * 77}\n")[1]
    assert [*load_manifest(whole)["settings"]] == re.findall(r"^(\w+) = ", block, re.MULTILINE)


def test_scores_keep_all_their_digits(settings, tmp_path, monkeypatch, whole):
    """Those of a given run, and those of the models in float32."""
    scores = [1.5e-9, 1.25e-9, 7.0000001, 123456.78125, 1e-30]
    ids = [x["_id"] for x in load(whole / "corpus.jsonl")]
    lines = "".join(f"q{i} Q0 {ids[i + 1]} 1 {scores[i % 5] * 2} x\nq{i} Q0 {ids[i]} 2 {scores[i % 5]} x\n" for i in range(20))
    folder = make(tmp_path, monkeypatch, settings, run=write(tmp_path / "given.trec", lines), reranker="", teacher="gold")
    examples = load(folder / "train.jsonl") + load(folder / "val.jsonl")
    for x in examples:
        assert x["reranking_scores"] == [scores[int(x["_id"][1:]) % 5] * 2, scores[int(x["_id"][1:]) % 5]]
    float32 = np.float32([0.1, 1e-8, 123.456])
    assert [float(line.split()[4]) for line in run_lines("q", "abc", float32, "x").splitlines()] == pytest.approx(
        float32.astype(float), rel=1e-7)


def test_what_no_model_has_used_may_change(settings, tmp_path, monkeypatch, capfd, whole):
    changes = dict(run=str(whole / "run.retrieval.trec"), reranker="", teacher="gold")
    make(tmp_path, monkeypatch, settings, **changes)
    capfd.readouterr()
    make(tmp_path, monkeypatch, settings, **changes, encoder_dtype="bfloat16", answer_tokens=7)
    assert capfd.readouterr().out.count("there already") == 6
    assert "encoder_dtype=float32, now bfloat16" in wrong(  # a reranker's would differ
        capfd, tmp_path, monkeypatch, settings, **changes | dict(reranker=settings["reranker"]), encoder_dtype="bfloat16")


def test_parts_of_another_run_are_not_taken(settings, tmp_path, monkeypatch, capfd):
    parts = tmp_path / "data" / "x" / "corpus.jsonl.parts"
    parts.mkdir(parents=True)
    write(parts / "000000", '{"_id": "old#0", "title": "", "text": "another corpus"}\n')
    assert "data/x/corpus.jsonl.parts is not made by this command" in wrong(capfd, tmp_path, monkeypatch, settings)
    (parts / "000000").unlink()
    make(tmp_path, monkeypatch, settings, last_stage="corpus")


# ---- retrieval


def test_retrieval_is_a_dense_product(settings, whole, tiny):
    corpus, queries = load(whole / "corpus.jsonl"), load(whole / "queries.jsonl")
    model = SparseEncoder(modules=[Transformer(tiny("splade"), transformer_task="fill-mask"), SpladePooling("max")], device="cpu")
    texts = [[document_text(c) for c in corpus], [q["text"] for q in queries]]
    passages, rows = (model.encode(t, convert_to_sparse_tensor=False).double().numpy() for t in texts)
    dense = rows @ passages.T
    for q, scores, (id, hits) in zip(queries, dense, read_run(whole / "run.retrieval.trec")):
        assert id == q["_id"] and len(hits) == 10
        by_id = dict(zip((c["_id"] for c in corpus), scores))
        assert np.allclose([by_id[p] for p, _ in hits], -np.sort(-scores)[:10], rtol=1e-5)  # no better one is left out
        assert np.allclose([s for _, s in hits], [by_id[p] for p, _ in hits], rtol=1e-5)


# ---- reranking, teacher, examples


def test_reranking_is_transformers(settings, whole, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny("cross_encoder"))
    model = AutoModelForSequenceClassification.from_pretrained(tiny("cross_encoder")).eval()
    corpus = {c["_id"]: c for c in load(whole / "corpus.jsonl")}
    retrieved, reranked = (dict(read_run(whole / f"run.{name}.trec")) for name in ("retrieval", "rerank"))
    for q in load(whole / "queries.jsonl"):
        with torch.no_grad():
            scores = [model(**tokenizer(q["text"], document_text(corpus[p]), return_tensors="pt")).logits[0, 0].item()
                      for p, _ in retrieved[q["_id"]]]
        best = sorted(range(10), key=lambda i: -scores[i])[:3]
        assert [p for p, _ in reranked[q["_id"]]] == [retrieved[q["_id"]][i][0] for i in best]
        assert np.allclose([s for _, s in reranked[q["_id"]]], [scores[i] for i in best], atol=1e-5)


def test_equal_scores_keep_retrieval_order(settings, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.CrossEncoder, "scores", lambda self, pairs, batch_tokens: [1.0, 2.0, 2.0, 1.0, 2.0] * (len(pairs) // 5))
    shutil.copytree(whole, tmp_path / "data" / "x")
    (tmp_path / "data" / "x" / "run.rerank.trec").unlink()
    for name, value in settings.items():
        monkeypatch.setattr(prepare, name, value)
    prepare.make_reranked(str(tmp_path / "data" / "x"))
    retrieved, reranked = (dict(read_run(tmp_path / "data" / "x" / f"run.{name}.trec")) for name in ("retrieval", "rerank"))
    for id, hits in retrieved.items():
        assert reranked[id] == [(hits[i][0], 2.0) for i in (1, 2, 4)]


def test_teacher_is_generate_on_the_models_full_prompt(settings, whole, tiny):
    model = ScaleDown(ScaleDownConfig(generator=tiny("llama"), num_layers=1, doc_tokens=24))
    teacher = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    answers = {x["_id"]: x["answer"] for x in load(whole / "teacher.jsonl")}
    queries, corpus = load(whole / "queries.jsonl"), {c["_id"]: c for c in load(whole / "corpus.jsonl")}
    assert list(answers) == [q["_id"] for q in queries] and len(set(answers.values())) > 5
    for q, (_, hits) in zip(queries, read_run(whole / "run.rerank.trec")):
        text = model.full_prompts([q["text"]], [[corpus[p] for p, _ in hits]])[0]
        ids, _ = left_pad([model.prompt.ids(text)])
        out = teacher.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=model.stop_ids, pad_token_id=4)
        assert answers[q["_id"]] == model.tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip()


def test_a_models_own_generation_config_does_not_matter(settings, whole, tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny("llama"), tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "generation_config.json").read_text())
    config.update(repetition_penalty=5.0, do_sample=True, temperature=3.0)
    (tmp_path / "llama" / "generation_config.json").write_text(json.dumps(config))
    got = make(tmp_path, monkeypatch, settings, teacher=str(tmp_path / "llama"))
    assert [x["answer"] for x in load(got / "teacher.jsonl")] == [x["answer"] for x in load(whole / "teacher.jsonl")]


def test_examples(settings, whole):
    corpus, queries = {c["_id"]: c for c in load(whole / "corpus.jsonl")}, {q["text"]: q for q in load(whole / "queries.jsonl")}
    reranked, answers = dict(read_run(whole / "run.rerank.trec")), {x["_id"]: x["answer"] for x in load(whole / "teacher.jsonl")}
    train, val = (Examples(str(whole / f"{name}.jsonl"), need_scores=True) for name in ("train", "val"))
    counts = json.loads((whole / "manifest.json").read_text())["stages"]["train"]["counts"]
    assert counts["train"] == len(train) and counts["val"] == len(val)
    assert len(train) + len(val) + counts["queries_without_answer"] == 20 and 1 <= len(val) <= 10
    for x in [*train, *val]:
        q = queries[x["query"]]
        assert x["answer"] == answers[q["_id"]] != "" and x["answers"] == q["metadata"]["answers"]
        assert x["reranking_scores"] == [s for _, s in reranked[q["_id"]]]
        assert x["_id"] == q["_id"] and x["documents"] == [corpus[p] for p, _ in reranked[q["_id"]]]


def test_the_split_does_not_move(settings, tmp_path, monkeypatch):
    """A query is for validation or not whatever other queries there are."""
    sides = []
    for i, n in enumerate((20, 12)):
        (tmp_path / str(i)).mkdir()
        folder = make(tmp_path / str(i), monkeypatch, settings, teacher="gold", reranker="", max_queries=n)
        sides.append({x["query"]: name for name in ("train", "val") for x in load(folder / f"{name}.jsonl")})
    assert len(sides[0]) == 20 and len(sides[1]) == 12
    assert all(sides[0][q] == side for q, side in sides[1].items()) and set(sides[1].values()) == {"train", "val"}


def test_gold_answers_and_retrieval_order(settings, whole, tmp_path, monkeypatch):
    folder = make(tmp_path, monkeypatch, settings, teacher="gold", reranker="")
    retrieved = dict(read_run(folder / "run.retrieval.trec"))
    assert dict(read_run(folder / "run.rerank.trec")) == {id: hits[:3] for id, hits in retrieved.items()}
    assert all(x["answer"] == x["answers"][0] for name in ("train", "val") for x in load(folder / f"{name}.jsonl"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["stages"].keys() == prepare.STAGES.keys()
    assert all(s["complete"] and s["seconds"] >= 0 and s["counts"] for s in manifest["stages"].values())


def test_duplicates_empty_documents_and_long_queries(settings, tmp_path, monkeypatch, capfd):
    queries = [dict(_id="a", text="who is it"), dict(_id="b", text=" who is it "), dict(_id="c", text="the stone " * 50),
               dict(_id="d", text="the stone " * 60), dict(_id="e", text=" near </s> the river")]
    corpus = [dict(_id="1", text="the mayor"), dict(_id="2", text=" "), dict(_id="3", title="Loku", text="a river")]
    folder = make(tmp_path, monkeypatch, settings, queries=jsonl(tmp_path / "q.jsonl", queries), max_passages=3,
                  corpus=jsonl(tmp_path / "c.jsonl", corpus + [dict(_id="4", text="not read")]), reranker="", top_k=5)
    stages = json.loads((folder / "manifest.json").read_text())["stages"]
    assert stages["queries"]["counts"] == dict(queries=3, duplicates=2, cut=1, with_gold_answers=0)
    assert stages["corpus"]["counts"] == dict(documents=3, empty_documents=1, chunks=2)
    assert [c["_id"] for c in load(folder / "corpus.jsonl")] == ["1#0", "3#0"]
    tokenizer = AutoTokenizer.from_pretrained(settings["generator"])
    assert len(tokenizer(load(folder / "queries.jsonl")[1]["text"], add_special_tokens=False).input_ids) == 64
    out = capfd.readouterr().out
    assert "2 duplicates dropped, 1 queries longer than 64 tokens cut" in out
    assert "3 examples have fewer than 3 documents" in out and stages["train"]["counts"]["fewer_documents"] == 3


# ---- runs of other engines


def test_a_run_in_place_of_retrieval(settings, whole, tmp_path, monkeypatch, capfd):
    lines = (whole / "run.retrieval.trec").read_text().splitlines(keepends=True)
    folder = make(tmp_path, monkeypatch, settings, run=str(whole / "run.retrieval.trec"))
    assert not (folder / "index").exists()
    for name in ("run.rerank.trec", "teacher.jsonl", "train.jsonl", "val.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    # in any order, with white space of other kinds, deeper than top_k, compressed
    scores = {(row.split()[0], row.split()[2]): float(row.split()[4]) for row in lines}
    more = [f"q{i}\tQ0\t{c['_id']}\t99\t-1e3\tx\n" for i in range(20) for c in load(whole / "corpus.jsonl") if (f"q{i}", c["_id"]) not in scores]
    random.Random(0).shuffle(lines)
    assert len(set(scores.values())) == len(scores)  # no ties here, so the order is known
    path = write(tmp_path / "other.trec.gz", gzip.compress("".join(more + lines).encode()))
    folder = make(tmp_path, monkeypatch, settings, run=path, overwrite=True)
    assert (folder / "train.jsonl").read_bytes() == (whole / "train.jsonl").read_bytes()
    # of a query without a line no example is made
    fewer = write(tmp_path / "fewer.trec", "".join(row for row in more + lines if row.split()[0] not in ("q0", "q1")))
    capfd.readouterr()
    folder = make(tmp_path, monkeypatch, settings, run=fewer, overwrite=True)
    assert "fewer.trec: no line for 2 of 20 queries, such as 'q0'" in capfd.readouterr().out
    made = {x["_id"] for name in ("train", "val") for x in load(folder / f"{name}.jsonl")}
    assert made == {x["_id"] for name in ("train", "val") for x in load(whole / f"{name}.jsonl")} - {"q0", "q1"}
    # its queries may be more than are asked
    folder = make(tmp_path, monkeypatch, settings, run=path, overwrite=True, max_queries=8)
    assert len(load(folder / "train.jsonl")) + len(load(folder / "val.jsonl")) == 8


@pytest.mark.parametrize("change,says", [
    (lambda rows: [*rows, "q1 Q0 d1#0 3 0.5\n"], "line 201: not a line of a TREC run"),
    (lambda rows: [*rows, "q1 Q0 d1#0 3 high x\n"], "line 201: not a line of a TREC run"),
    (lambda rows: [*rows, "q1 Q0 d1#0 3 nan x\n"], "line 201: not a line of a TREC run"),
    (lambda rows: [*rows, "q1 Q0 d1 3 0.5 x\n"], "line 201: no passage 'd1' in data/x/corpus.jsonl, whose ids look like 'd0#0'"),
    (lambda rows: ["q99 Q0 d1#0 3 0.5 x\n", *rows], "line 1: no query 'q99' in"),
    (lambda rows: [rows[0], *rows], "a passage stands twice for the query 'q0'")])
def test_a_bad_run(settings, whole, tmp_path, monkeypatch, capfd, change, says):
    path = write(tmp_path / "bad.trec", "".join(change((whole / "run.retrieval.trec").read_text().splitlines(keepends=True))))
    assert says in wrong(capfd, tmp_path, monkeypatch, settings, run=path)


def test_scores_that_are_no_numbers_stop_before_the_teacher(settings, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(prepare.CrossEncoder, "scores", lambda self, pairs, _: [float("nan")] * len(pairs))
    says = wrong(capfd, tmp_path, monkeypatch, settings)
    assert "gives no finite score in float32 for the query 'q0': --encoder_dtype=float32" in says
    assert not (tmp_path / "data" / "x" / "train.jsonl").exists()


# ---- the teacher on a server


class Server(http.server.BaseHTTPRequestHandler):
    """Answers chat requests as OpenAI's API does, after several kinds of failure."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, body, status=200, cut=0, **headers):
        self.close_connection = bool(cut)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        try:
            self.end_headers()
            self.wfile.write(body[:len(body) - cut])
        except BrokenPipeError:  # who asked has not waited
            self.close_connection = True

    def do_GET(self):
        self.reply(json.dumps(dict(data=[dict(id=m) for m in self.server.models])).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.keys.add(self.headers["Authorization"])
            failure = self.server.failures.pop() if self.server.failures else None
        answer = json.dumps(dict(choices=[dict(message=dict(content=f" {self.server.answer(body)} "), finish_reason="stop")])).encode()
        if failure == "slow":
            time.sleep(1.5)
        if failure == "closed":
            self.close_connection = True
        elif failure == "half":
            self.reply(answer, cut=20)
        elif failure == "unfinished":
            self.reply(json.dumps(dict(choices=[dict(message=dict(content="The ans"), finish_reason=None)])).encode())
        elif isinstance(failure, int):
            self.reply(b'{"error": "no luck"}', status=failure)
        elif isinstance(failure, dict):  # a message
            self.reply(json.dumps(dict(choices=[dict(message=failure, finish_reason="stop")])).encode())
        elif isinstance(failure, tuple):  # body, status, headers
            self.reply(failure[0].encode(), status=failure[1], **failure[2])
        else:
            self.reply(answer)


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.asked, server.failures, server.models, server.lock = [], [], ["a-model"], threading.Lock()
    server.keys = set()
    server.answer = lambda body: "answer to " + body["messages"][-1]["content"].rpartition("Question: ")[2]
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_server_that_fails_answers_every_query_once(settings, whole, server, tmp_path, monkeypatch):
    errors = "timeout", dict(message="slow down", code="rate_limit"), dict(message="slow down", code="429"), dict(code=502)
    server.failures = [500, "slow", "closed", "half", "unfinished", 429, 503,
                       *((json.dumps(dict(error=error)), 200, {}) for error in errors)]
    folder = make(tmp_path, monkeypatch, settings, teacher_url=server.url, teacher_timeout=1.0, teacher_requests=4)
    queries = load(folder / "queries.jsonl")
    assert load(folder / "teacher.jsonl") == [dict(_id=q["_id"], model="a-model", answer=f"answer to {q['text']}") for q in queries]
    assert len(server.asked) == 20 + 7 + 4
    # the chat that it is sent is the prompt of the model's full mode
    model = ScaleDown(ScaleDownConfig(generator=settings["generator"], num_layers=1, doc_tokens=24))
    sent = {model.tokenizer.apply_chat_template(b["messages"], tokenize=False, add_generation_prompt=True) for b in server.asked}
    corpus = {c["_id"]: c for c in load(folder / "corpus.jsonl")}
    assert sent == {model.full_prompts([q["text"]], [[corpus[p] for p, _ in hits]])[0]
                    for q, (_, hits) in zip(queries, read_run(folder / "run.rerank.trec"))}
    assert all(b["model"] == "a-model" and b["max_tokens"] == 6 and b["temperature"] == 0 for b in server.asked)


def test_a_server_that_gives_up_loses_no_answer(settings, server, tmp_path, monkeypatch, capfd):
    changes = dict(teacher_url=server.url, teacher_requests=1, teacher_retries=0)
    server.failures = ["half", *[None] * 7]
    says = wrong(capfd, tmp_path, monkeypatch, settings, **changes)
    assert re.search(rf"{server.url}: no answer to the query 'q\d+': \w+: ", says)
    kept = len(load(next((tmp_path / "data" / "x" / "teacher.jsonl.parts").iterdir())))
    first = len(server.asked)
    folder = make(tmp_path, monkeypatch, settings, **changes)
    assert kept >= 7 and len(load(folder / "teacher.jsonl")) == 20 and len(server.asked) - first == 20 - kept


def test_a_server_that_refuses(settings, server, tmp_path, monkeypatch, capfd):
    server.failures = [401]
    says = wrong(capfd, tmp_path, monkeypatch, settings, teacher_url=server.url, teacher_requests=1)
    assert "HTTP status 401" in says and "no luck" in says and len(server.asked) <= 3  # asked once and not again
    (tmp_path / "1").mkdir()
    server.failures = [400] * 30
    says = wrong(capfd, tmp_path / "1", monkeypatch, settings, teacher_url=server.url)
    assert "refuses every request: HTTP status 400" in says
    server.models = ["a", "b"]
    assert "serves a, b, not teacher=" in wrong(capfd, tmp_path / "1", monkeypatch, settings, teacher_url=server.url)
    nobody = "http://127.0.0.1:9/v1"
    assert f"{nobody}: no answer to the question which models it serves: ConnectionError" in wrong(
        capfd, tmp_path / "1", monkeypatch, settings, teacher_url=nobody, teacher_retries=0)


@pytest.mark.parametrize("failure, status", [(400, 400), (('{"error": "no"}', 200, {}), 200), (('{"error": {"code": "400"}}', 200, {}), 400)])
def test_a_server_that_refuses_one_query(settings, server, tmp_path, monkeypatch, capfd, failure, status):
    server.failures = [None, None, failure, None]
    folder = make(tmp_path, monkeypatch, settings, teacher_url=server.url, teacher_requests=2, teacher_retries=0)
    assert re.search(rf"refused 1 queries, such as 'q\d+': HTTP status {status}: ", capfd.readouterr().out)
    empty = [x["_id"] for x in load(folder / "teacher.jsonl") if not x["answer"]]
    assert len(empty) == 1 and len(load(folder / "teacher.jsonl")) == 20
    assert len(load(folder / "train.jsonl")) + len(load(folder / "val.jsonl")) == 19


def test_thoughts_and_parts(settings, server, tmp_path, monkeypatch):
    replies = [dict(content="<think>\nwho?\n</think>\n\nMara"), dict(content="who? </think> Mara"), dict(content="[THINK]a[/THINK]Mara"),
               dict(content="<Thinking>a</Thinking>Mara"), dict(content=[dict(type="thinking", thinking="a"), dict(type="text", text="Ma"),
                                                                         dict(type="text", text="ra")]),
               dict(content="Mara", reasoning_content="who?"), dict(content="Mara \ud83d")]
    buttons = [dict(content="The [Thinking] button"),
               (json.dumps(dict(choices=[dict(message=dict(content="Mar"), finish_reason="content_filter")])), 200, {})]
    lost = [dict(content="<think>\nwho?"), dict(content=None, reasoning_content="who?"), dict(content="", reasoning="who?"),
            dict(content=None, refusal="I will not")]
    server.failures = [*replies, *lost, *buttons, None]
    folder = make(tmp_path, monkeypatch, settings, teacher_url=server.url, teacher_requests=1)
    answers = [x["answer"] for x in load(folder / "teacher.jsonl")]
    assert answers.count("Mara") == len(replies) and answers.count("") == len(lost) + 1 and len(answers) == 20
    assert "The [Thinking] button" in answers
    assert all(b["chat_template_kwargs"] == dict(enable_thinking=False) for b in server.asked)


@pytest.mark.parametrize("reply, says", [
    (dict(content=None, reasoning_content="who is it?"), "has not come to an answer within answer_tokens=6"),
    (dict(content="<think> who is it?"), "has not come to an answer"),
    (dict(content=None, refusal="I will not"), "refused: I will not"),
    (('{"error": {"message": "out of credit", "code": 400}}', 200, {}), "out of credit"),
    (('{"error": "no such route"}', 422, {}), "no such route"),
    (('{"error": {"message": "out of credit", "code": 402}}', 200, {}), "out of credit"),
    (("<html>Log in</html>", 200, {}), "not JSON: <html>Log in"),
    (("", 308, dict(Location="http://elsewhere/v1")), "redirects to http://elsewhere/v1")])
def test_a_server_that_never_answers_is_not_asked_for_all(settings, server, tmp_path, monkeypatch, capfd, reply, says):
    queries = jsonl(tmp_path / "q.jsonl", [dict(_id=f"q{i}", text=f"who is it {i}?") for i in range(60)])
    server.failures = [reply] * 60
    assert says in wrong(capfd, tmp_path, monkeypatch, settings, queries=queries, teacher_url=server.url, teacher_requests=2)
    assert len(server.asked) < 20


def test_a_server_that_knows_less_or_wants_to_be_left_alone(settings, server, tmp_path, monkeypatch):
    said = ("Unrecognized request argument supplied: chat_template_kwargs", "Unsupported parameter: 'max_tokens'. Use "
            "'max_completion_tokens' instead.", "'temperature' does not support 0")
    server.failures = [*((json.dumps(dict(error=dict(message=m))), 400, {}) for m in said), ("{}", 429, dict(Retry_After="2"))]
    start = time.time()
    folder = make(tmp_path, monkeypatch, settings, teacher_url=server.url, teacher_requests=1)
    assert time.time() - start > 2 and all(x["answer"] for x in load(folder / "teacher.jsonl")) and len(server.asked) == 24
    assert server.asked[-1].keys() == {"model", "messages", "max_completion_tokens"}


def test_a_question_about_temperature_is_no_complaint_about_it(settings, server, tmp_path, monkeypatch, capfd):
    said = "Blocked by our guardrail: 'what temperature does iron melt at?' is not allowed"
    server.failures = [(json.dumps(dict(error=dict(message=said))), 400, {})]
    make(tmp_path, monkeypatch, settings, teacher_url=server.url, teacher_requests=1)
    assert all(b["temperature"] == 0 for b in server.asked)
    server.failures = [(json.dumps(dict(error=dict(message="`temperature` must be strictly positive"))), 422, {})]
    capfd.readouterr()
    make(tmp_path, monkeypatch, settings, teacher_url=server.url, teacher_requests=1, dataset="y")
    assert "rejects temperature: it is left out from now on" in capfd.readouterr().err
    assert "temperature" not in server.asked[-1]


def test_no_key_in_any_message(settings, server, tmp_path, monkeypatch, capfd):
    for key, failure in (("sk-SECRET\n", ('{"error": "bad key sk-SECRET"}', 401, {})), ("sk-\nSECRET", None), ("sk-SECRETé", None)):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        server.failures = [failure]
        says = wrong(capfd, tmp_path, monkeypatch, settings, teacher_url=server.url, teacher_requests=1)
        assert "SECRET" not in says + "".join(capfd.readouterr()) and ("***" in says or "OPENAI_API_KEY" in says)
    monkeypatch.delenv("OPENAI_API_KEY")
    for password in ("SECRET", "SEC@SECRET"):
        url = server.url.replace("//", f"//me:{password}@")
        server.failures = [401]
        assert "SECRET" not in wrong(capfd, tmp_path, monkeypatch, settings, teacher_url=url, teacher_requests=1)
    assert "SECRET" not in (tmp_path / "data" / "x" / "manifest.json").read_text()


def test_the_key_is_sent_whatever_netrc_has(settings, server, tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", write(tmp_path / "netrc", "machine 127.0.0.1 login me password p\n"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    make(tmp_path, monkeypatch, settings, teacher_url=server.url)
    assert server.keys == {"Bearer sk-1"}


def test_another_server_than_before(settings, server, tmp_path, monkeypatch, capfd):
    server.failures = [401, *[None] * 5]
    wrong(capfd, tmp_path, monkeypatch, settings, teacher_url=server.url, teacher_requests=1)
    server.models = ["another"]
    says = wrong(capfd, tmp_path, monkeypatch, settings, teacher_url=server.url)
    assert "serves another, but there are answers of a-model already" in says


def test_answers_on_their_way_when_another_fails_are_kept(settings, server, tmp_path, monkeypatch, capfd):
    server.failures = ["slow", "slow", "slow", 401]  # the last is asked first
    wrong(capfd, tmp_path, monkeypatch, settings, teacher_url=server.url, teacher_requests=4)
    assert len(load(next((tmp_path / "data" / "x" / "teacher.jsonl.parts").iterdir()))) >= 3


# ---- crashes, processes, other settings


def killed(folder, args, states):
    """Starts a run and kills it when its folder has gone through `states` states, or lets it end; -> how many there were."""
    process = subprocess.Popen(args, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen = set()
    while process.poll() is None and len(seen) < states:
        try:
            for path in Path(folder).rglob("*"):
                seen.add((str(path), path.stat().st_size))
        except FileNotFoundError:  # it has gone while we looked
            pass
        time.sleep(0.001)
    process.kill()
    process.wait()
    return len(seen)


def test_kill_and_restart(settings, whole, tmp_path):
    kill_at_random_moments(settings, whole, tmp_path, kills=2)


@pytest.mark.slow
def test_kill_and_restart_20_times(settings, whole, tmp_path):
    kill_at_random_moments(settings, whole, tmp_path, kills=20)


def kill_at_random_moments(settings, whole, tmp_path, kills):
    (tmp_path / "count").mkdir()
    all_states = killed(tmp_path / "count", command(settings), 10**9)
    rng = random.Random(kills)
    for i in range(kills):
        folder = tmp_path / str(i)
        folder.mkdir()
        # one in each twentieth of the run
        moment = int(all_states * (i + rng.random()) / kills)
        killed(folder, command(settings), moment)
        done = run(folder, command(settings))
        assert done.returncode == 0, done.stderr
        same(folder / "data" / "x", whole)
        print(f"killed at {moment} of {all_states} states")


@pytest.mark.parametrize("n", [2, 3])
def test_any_number_of_processes_makes_the_same_files(settings, whole, tmp_path, n):
    done = run(tmp_path, command(settings, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"))
    assert done.returncode == 0, done.stderr
    same(tmp_path / "data" / "x", whole)


def test_answers_torn_by_a_crash(settings, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "data" / "x")
    folder = tmp_path / "data" / "x"
    lines = (folder / "teacher.jsonl").read_bytes().splitlines(keepends=True)
    for name in ("teacher.jsonl", "train.jsonl", "val.jsonl"):
        (folder / name).unlink()
    (folder / "teacher.jsonl.parts").mkdir()
    # answers that the teacher would not give, to see that they are kept; of more processes than now
    kept = {json.loads(line)["_id"]: f"kept {i}" for i, line in enumerate(lines[:7])}
    for name, rows in (("000003", list(kept.items())[:4]), ("000000", list(kept.items())[4:])):
        write(folder / "teacher.jsonl.parts" / name, b"".join(to_line(dict(_id=i, model=settings["teacher"], answer=a)) for i, a in rows) + lines[9][:-9])
    make(tmp_path, monkeypatch, settings)
    want = [json.loads(line) for line in lines]
    assert load(folder / "teacher.jsonl") == [{**x, "answer": kept.get(x["_id"], x["answer"])} for x in want]


def test_other_settings_stop_or_overwrite(settings, whole, tmp_path, monkeypatch, capfd):
    shutil.copytree(whole, tmp_path / "data" / "x")
    folder = tmp_path / "data" / "x"
    before = {name: (folder / name).stat().st_mtime_ns for name in FILES}
    make(tmp_path, monkeypatch, settings, batch_tokens=600)  # what does not matter does not stop it
    assert before == {name: (folder / name).stat().st_mtime_ns for name in FILES}
    assert capfd.readouterr().out.count("there already") == 7
    says = wrong(capfd, tmp_path, monkeypatch, settings, num_documents=2, answer_tokens=5)
    assert "data/x was made with num_documents=3, now 2, answer_tokens=6, now 5:" in says
    assert "--overwrite=True makes anew rerank, teacher, train" in says
    other = jsonl(tmp_path / "other.jsonl", load(settings["queries"])[:15])
    says = wrong(capfd, tmp_path, monkeypatch, settings, queries=other)
    assert f"another content of queries={other}" in says and "makes anew queries, retrieval, rerank, teacher, train" in says
    assert before == {name: (folder / name).stat().st_mtime_ns for name in FILES}
    mine = Path(write(folder / "train.jsonl.old", "the user's"))
    make(tmp_path, monkeypatch, settings, num_documents=2, overwrite=True)
    after = {name: (folder / name).stat().st_mtime_ns for name in FILES}
    assert {name for name in FILES if after[name] != before[name]} == {"run.rerank.trec", "teacher.jsonl", "train.jsonl", "val.jsonl"}
    assert all(len(x["documents"]) == 2 for x in load(folder / "train.jsonl"))
    assert not list(folder.glob("*.replaced")) and mine.read_text() == "the user's"
    # a copy elsewhere of the same input is the same input
    make(tmp_path, monkeypatch, settings, num_documents=2, corpus=str(shutil.copy(settings["corpus"], tmp_path / "copy.jsonl")))
    trec = str(whole / "run.retrieval.trec")
    assert f"data/x was made with no run, now {trec}:" in wrong(capfd, tmp_path, monkeypatch, settings, num_documents=2, overwrite=False, run=trec)


def test_a_file_that_was_removed_is_made_anew_and_what_depends_on_it(settings, whole, server, tmp_path, monkeypatch, capfd):
    shutil.copytree(whole, tmp_path / "data" / "x")
    folder = tmp_path / "data" / "x"
    (folder / "run.rerank.trec").unlink()
    make(tmp_path, monkeypatch, settings)  # the same file again: nothing else to do
    assert capfd.readouterr().out.count("there already") == 6
    (folder / "teacher.jsonl").unlink()
    make(tmp_path, monkeypatch, settings, teacher_url=server.url)  # other answers
    assert capfd.readouterr().out.count("there already") == 5
    assert {x["answer"][:6] for x in load(folder / "train.jsonl")} == {"answer"}
    next((folder / "index").glob("[0-9]*")).unlink()
    (folder / "run.retrieval.trec").unlink()
    assert "index lacks some of the" in wrong(capfd, tmp_path, monkeypatch, settings)


def test_a_crash_while_things_are_removed(settings, whole, tmp_path, monkeypatch):
    """At whichever removal or renaming of an overwriting run: the next one ends as if nothing had happened."""
    changes = dict(num_documents=2, teacher="gold", overwrite=True)
    for at in range(12):
        work = tmp_path / str(at)
        shutil.copytree(whole, work / "data" / "x")
        calls = [0]

        with monkeypatch.context() as m:
            for module, name in ((prepare.os, "rename"), (prepare, "remove"), (prepare.os, "replace")):
                m.setattr(module, name, functools.partial(crashing, calls, at, getattr(module, name)))
            try:
                make(work, monkeypatch, settings, **changes)
            except KeyboardInterrupt:
                pass
        folder = make(work, monkeypatch, settings, **changes)
        assert {f.name for f in folder.iterdir()} == {f.name for f in whole.iterdir()}
        assert all(len(x["documents"]) == 2 and x["answer"] == x["answers"][0] for x in load(folder / "train.jsonl"))
        assert (folder / "run.retrieval.trec").read_bytes() == (whole / "run.retrieval.trec").read_bytes()


def crashing(calls, at, real, *args):
    calls[0] += 1
    if calls[0] == at:
        raise KeyboardInterrupt
    return real(*args)


def test_a_crash_before_parts_are_removed(settings, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "data" / "x")
    (tmp_path / "data" / "x" / "corpus.jsonl.parts").mkdir()
    write(tmp_path / "data" / "x" / "corpus.jsonl.parts" / "000000", "what was left")
    same(make(tmp_path, monkeypatch, settings), whole)


def test_two_at_once(settings, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "data" / "x")
    with open(tmp_path / "data" / "x" / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        done = run(tmp_path, command(settings))
        assert done.returncode == 1 and done.stderr.strip().endswith("error: another prepare.py is at work in data/x")


def test_input_mended_after_a_mistake_needs_no_overwrite(settings, tmp_path, monkeypatch, capfd):
    path = tmp_path / "c.jsonl"
    write(path, '{"_id": "1", "text": "the mayor"}\n{"_id": "2"}\n')
    assert "c.jsonl, line 2: 'text' is missing" in wrong(capfd, tmp_path, monkeypatch, settings, corpus=str(path))
    write(path, '{"_id": "1", "text": "the mayor"}\n{"_id": "2", "text": "a river"}\n')
    make(tmp_path, monkeypatch, settings, corpus=str(path))


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))


def test_a_full_disk(settings, whole, tmp_path):
    """Files may not grow beyond 8,000 bytes: as a full disk, it stops a write in its middle."""
    done = run(tmp_path, command(settings), preexec_fn=limit_file_size)
    says = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "File too large" in says and "data/x/" in says and "goes on from there" in says, says
    done = run(tmp_path, command(settings))
    assert done.returncode == 0 and "queries: there already" in done.stdout, done.stderr
    same(tmp_path / "data" / "x", whole)


def test_a_disk_full_of_answers(settings, server, whole, tmp_path):
    """Of the teacher's answers those that were written are kept."""
    shutil.copytree(whole, tmp_path / "data" / "x")
    for name in ("teacher.jsonl", "train.jsonl", "val.jsonl"):
        (tmp_path / "data" / "x" / name).unlink()
    server.answer = lambda body: "x" * 1000
    changes = dict(teacher_url=server.url, teacher_requests=1)
    done = run(tmp_path, command(settings, **changes), preexec_fn=limit_file_size)
    assert "teacher.jsonl.parts/000000" in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr
    server.asked = []
    done = run(tmp_path, command(settings, **changes))
    assert done.returncode == 0 and len(load(tmp_path / "data" / "x" / "teacher.jsonl")) == 20
    assert 5 < len(server.asked) < 16


# ---- real models on real data


@pytest.mark.slow
def test_real_passages_are_found(tmp_path):
    """SMALL_MODELS: a folder made by ../shared/tools/small_models.py, which needs the package index."""
    models, wiki = os.environ.get("SMALL_MODELS"), ROOT.parent / "shared" / "data" / "wiki"
    if not models or not wiki.exists():
        pytest.skip("needs SMALL_MODELS=FOLDER and ../shared/data/wiki")
    settings = dict(dataset="x", corpus=wiki / "corpus.jsonl", queries=wiki / "queries.dev.jsonl", splade=f"{models}/splade_tiny",
                    reranker="", generator=f"{models}/smollm2", teacher="gold", device="cpu")
    done = run(tmp_path, command(settings))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "data" / "x"
    hits = dict(read_run(folder / "run.retrieval.trec"))
    gold = [row.split("\t") for row in (wiki / "qrels" / "dev.tsv").read_text().splitlines()[1:]]
    found = {k: np.mean([any(p.split("#")[0] == passage for p, _ in hits[query][:k]) for query, passage, _ in gold]) for k in (1, 5)}
    print(found)
    assert found[5] >= 0.97
    # nothing that a chunk says is cut away when the model reads it
    tokenizer = AutoTokenizer.from_pretrained(f"{models}/smollm2")
    corpus = load(folder / "corpus.jsonl")
    assert max(len(ids) for ids in tokenizer([document_text(c) for c in corpus]).input_ids) == 128
    # the ten best are those of a dense product
    model = SparseEncoder(modules=[Transformer(f"{models}/splade_tiny", transformer_task="fill-mask"), SpladePooling("max")], device="cpu")
    passages = model.encode([document_text(c) for c in corpus], convert_to_sparse_tensor=False).numpy()
    queries = load(folder / "queries.jsonl")[::8]
    dense = model.encode([q["text"] for q in queries], convert_to_sparse_tensor=False).numpy() @ passages.T
    for q, scores in zip(queries, dense):
        best = np.argsort(-scores, kind="stable")[:10]
        if [corpus[i]["_id"] for i in best] != [p for p, _ in hits[q["_id"]][:10]]:  # but for what rounding may swap
            assert np.allclose([s for _, s in hits[q["_id"]][:10]], scores[best], atol=1e-4)
    # its run, read in place of retrieval
    done = run(tmp_path, command(settings, dataset="y", run=folder / "run.retrieval.trec"))
    assert done.returncode == 0, done.stderr
    for name in ("train.jsonl", "val.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "data" / "y" / name).read_bytes()


# ---- bad input


def test_no_file_of_the_user_is_written_over(settings, whole, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "data" / "x"  # as BEIR's archives are unpacked
    folder.mkdir(parents=True)
    for name in ("corpus", "queries"):
        shutil.copy(settings[name], folder / f"{name}.jsonl")
    before = (folder / "corpus.jsonl").read_bytes()
    there = dict(corpus="data/x/corpus.jsonl", queries="data/x/queries.jsonl")
    for overwrite in (False, True):
        says = wrong(capfd, tmp_path, monkeypatch, settings, **there, overwrite=overwrite)
        assert "corpus: data/x/corpus.jsonl would be written over: choose another --dataset" in says
        says = wrong(capfd, tmp_path, monkeypatch, settings, overwrite=overwrite)
        assert "data/x/queries.jsonl is not made by this command: choose another --dataset" in says
    assert (folder / "corpus.jsonl").read_bytes() == before and not (folder / "manifest.json").exists()
    shutil.copytree(whole, tmp_path / "data" / "y")
    says = wrong(capfd, tmp_path, monkeypatch, settings, dataset="y", run="data/y/run.retrieval.trec", overwrite=True)
    assert "run: data/y/run.retrieval.trec would be written over" in says


@pytest.mark.parametrize("name,text,says", [
    ("corpus.jsonl", "", "corpus.jsonl is empty"),
    ("corpus.jsonl", "\n \n", "corpus.jsonl holds no text"),
    ("corpus.jsonl", '{"_id": "1", "text": ""}\n', "corpus.jsonl holds no text"),
    ("corpus.jsonl", '{"_id": "1", "text": "a"}\n{"text": "b"}\n', "corpus.jsonl, line 2: '_id' is missing"),
    ("corpus.jsonl", '{"_id": "1"}\n', "corpus.jsonl, line 1: 'text' is missing"),
    ("corpus.jsonl", '{"_id": "a b", "text": "a"}\n', "corpus.jsonl, line 1: _id 'a b' is no word or number"),
    ("corpus.jsonl", '{"_id": "1", "text": ["a", 2]}\n', "corpus.jsonl, line 1: 'text' is missing or no string"),
    ("corpus.jsonl", '{"_id": "1", "title": 3, "text": "a"}\n', "corpus.jsonl, line 1: 'title' is missing or no string"),
    ("corpus.jsonl", '{"_id": "1", "text": "a"}\n{"_id": ', "corpus.jsonl, line 2: broken JSON"),
    ("corpus.jsonl", '["a"]\n', "corpus.jsonl, line 1: not a JSON object"),
    ("corpus.jsonl", '{"_id": "1", "text": "\\ud800"}\n', "corpus.jsonl, line 1: broken JSON"),
    ("corpus.jsonl", b'{"_id": "1", "text": "a"}\n{"_id": "2", "text": "\xe9"}\n', "corpus.jsonl, line 2: not UTF-8"),
    ("corpus.jsonl", '{"_id": "1", "text": "a"}\n\n{"_id": 1, "text": "b"}\n', "corpus.jsonl, line 3: the _id '1' stands already in line 1"),
    ("corpus.tsv", "1\ta\n2 b\n", "corpus.tsv, line 2: no tab"),
    ("corpus.jsonl.gz", gzip.compress(b'{"_id": "1", "text": "a"}\n' * 99, mtime=0)[:-9], "corpus.jsonl.gz: a damaged gzip file"),
    ("corpus.tsv", "docno\ttitle\tabstract\n1\ta\tb\n", "corpus.tsv, line 1: a header without a name for the text, such as text: _id, title, abstract"),
    ("corpus.tsv", "1\ta\tb\tc\td\n", "corpus.tsv, line 1: 5 columns, but the first line has only id, text, title"), ("corpus.txt", "the mill\n", "corpus.txt, line 1: neither a JSON object nor"),
    ("queries.jsonl", "\n", "queries.jsonl holds no queries"),
    ("queries.jsonl", '{"_id": "1"}\n', "queries.jsonl, line 1: 'text' is missing or empty"),
    ("queries.jsonl", '{"_id": "1", "text": " "}\n', "queries.jsonl, line 1: 'text' is missing or empty"),
    ("queries.jsonl", '{"text": "a"}\n', "queries.jsonl, line 1: '_id' is missing"),
    ("queries.jsonl", '{"_id": "1", "text": "a", "metadata": {"answers": "b"}}\n', "queries.jsonl, line 1: metadata.answers is not a list"),
    ("queries.jsonl", '{"_id": "1", "text": "a"}\n{"_id": "1", "text": "b"}\n', "queries.jsonl, line 2: the _id '1' stands already in line 1"),
    ("queries.tsv", "1\n", "queries.tsv, line 1: no tab"),
    ("queries.csv", "1,who\n", "queries.csv is neither JSON Lines"), ("corpus.csv", "1,who\n", "corpus.csv is neither JSON Lines"),
    ("queries.txt", "[\n", "queries.txt, line 1: broken JSON"),
    ("queries.txt", b"who\n\xff\xfew\n", "queries.txt, line 2: not UTF-8")])
def test_bad_files(settings, tmp_path, monkeypatch, capfd, name, text, says):
    setting = name.split(".")[0]
    assert says in wrong(capfd, tmp_path, monkeypatch, settings, **{setting: write(tmp_path / name, text)})


@pytest.mark.parametrize("changes,says", [
    (dict(corpus=""), "needs --corpus=FILE and --queries=FILE"), (dict(queries="nowhere.jsonl"), "queries: nowhere.jsonl does not exist"),
    (dict(run="nowhere.trec"), "run: nowhere.trec does not exist"), (dict(dataset="../x"), "dataset is the name of a folder"),
    (dict(val_fraction=1.0), "val_fraction is a part of 1"), (dict(teacher_url="localhost:8000"), "teacher_url is like http://"),
    (dict(teacher="gold", teacher_url="http://a/v1"), "leave out --teacher_url"), (dict(encoder_dtype="x"), "encoder_dtype is float32"),
    (dict(last_stage="x"), "last_stage is one of queries, corpus,"), (dict(top_k=2), "top_k (2) is smaller than num_documents (3)"), (dict(dtype="int8"), "dtype is float32"),
    (dict(answer_tokens=0), "answer_tokens must be at least 1"), (dict(device="tpu"), "device is cpu, cuda"),
    (dict(splade="nowhere"), "splade=nowhere: "), (dict(teacher="nowhere"), "teacher=nowhere: ")])
def test_bad_settings(settings, tmp_path, monkeypatch, capfd, changes, says):
    assert says in wrong(capfd, tmp_path, monkeypatch, settings, **changes)


@pytest.mark.parametrize("setting,model,says", [
    ("splade", "llama", "is a LlamaForCausalLM, not a masked language model"),
    ("splade", "bert", "is a BertModel, not a masked language model"),
    ("reranker", "splade", "is a BertForMaskedLM, not a cross-encoder"),
    ("reranker", "two_labels", "gives 2 scores for a document, not one"),
    ("teacher", "splade", "is a BertForMaskedLM, not a causal language model"),
    ("generator", "modernbert", "is a ModernBertModel, not a causal language model")])
def test_a_model_of_another_kind(settings, tiny, tmp_path, monkeypatch, capfd, setting, model, says):
    assert f"{setting}={tiny(model)} {says}" in wrong(capfd, tmp_path, monkeypatch, settings, **{setting: tiny(model)})


def test_a_model_without_its_tokeniser(settings, tiny, tmp_path, monkeypatch, capfd):
    for setting in ("splade", "reranker", "teacher", "generator"):
        shutil.copytree(settings[setting], tmp_path / setting)
        for file in (tmp_path / setting).glob("*token*"):
            file.unlink()
        assert f"error: {setting}={tmp_path / setting}" in wrong(capfd, tmp_path, monkeypatch, settings, **{setting: str(tmp_path / setting)})


def test_damaged_weights(settings, tmp_path):
    shutil.copytree(settings["splade"], tmp_path / "splade")
    weights = tmp_path / "splade" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = run(tmp_path, command(settings, splade=tmp_path / "splade"))
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.strip().splitlines()[-1].startswith("error: ")


def test_stages_up_to_the_corpus(settings, tmp_path, monkeypatch):
    folder = make(tmp_path, monkeypatch, settings, last_stage="corpus", splade="nowhere", reranker="nowhere", teacher="nowhere")
    assert sorted(f.name for f in folder.iterdir()) == [".lock", "corpus.index", "corpus.jsonl", "manifest.json", "queries.jsonl"]
    make(tmp_path, monkeypatch, settings)


def test_a_prompt_beyond_the_teachers_positions(settings, tmp_path, monkeypatch, capfd):
    says = wrong(capfd, tmp_path, monkeypatch, settings, answer_tokens=600)
    assert re.search(r"teacher: prompt and answer of the query 'q\d+' take \d+ tokens, .* has 512 positions", says)


def test_no_gold_answers(settings, tmp_path, monkeypatch, capfd):
    queries = jsonl(tmp_path / "q.jsonl", [dict(_id="1", text="who")])
    assert "q.jsonl: no query has gold answers" in wrong(capfd, tmp_path, monkeypatch, settings, queries=queries, teacher="gold")


def test_unreadable_files_on_the_command_line(settings, tmp_path):
    done = run(tmp_path, command(settings, dataset="toy"))
    assert done.returncode == 1 and "dataset 'toy' takes no corpus: " in done.stderr and not (tmp_path / "data").exists()
    done = run(tmp_path, command(settings, corpus=tmp_path))
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].endswith("is not a file")
    (tmp_path / "data").write_text("a file where a folder should be")
    done = run(tmp_path, command(settings))
    assert done.returncode == 1 and "Traceback" not in done.stderr and "data" in done.stderr.strip().splitlines()[-1]


# ---- memory


def examples_memory(tmp_path, n):
    x = json.dumps(dict(query="who is the mayor?", documents=[dict(title="Loku", text="The mayor is Tuson. " * 6)] * 5, answer="Tuson"))
    with open(tmp_path / "train.jsonl", "w") as f:
        f.writelines(f"{x}\n" for _ in range(n))
    return peak_memory(f"import random\nfrom data import Examples\nx = Examples({str(tmp_path / 'train.jsonl')!r})\n"
                       f"assert len(x) == {n}\nfor _ in range(10000): x[random.randrange({n})]")


def test_memory_of_examples(tmp_path):
    assert examples_memory(tmp_path, 50_000) < examples_memory(tmp_path, 1000) + 10  # their file has 40 MB


@pytest.mark.slow
def test_memory_of_a_million_examples(tmp_path):
    assert examples_memory(tmp_path, 1_000_000) < 500


def corpus_memory(settings, tmp_path, n):
    rng = random.Random(0)
    with open(tmp_path / "corpus.tsv", "w") as f:
        f.writelines(f"{i}\t{sentence(rng, 25)}\n" for i in range(n))
    changes = {**settings, "corpus": str(tmp_path / "corpus.tsv"), "doc_tokens": 128}
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    (tmp_path / "data" / "x").mkdir(parents=True)
    return peak_memory(f"import os, prepare\nvars(prepare).update({changes!r})\nos.chdir({str(tmp_path)!r})\n"
                       f"assert prepare.make_corpus('data/x')['chunks'] == {n}")


def test_memory_of_the_corpus(settings, tmp_path):
    assert corpus_memory(settings, tmp_path, 40_000) < corpus_memory(settings, tmp_path, 20_000) + 30


@pytest.mark.slow
def test_memory_of_a_million_passages(settings, tmp_path):
    assert corpus_memory(settings, tmp_path, 1_000_000) < 2048


# ---- file systems


def test_an_index_that_was_moved_to_another_disk_and_linked(settings, tmp_path, monkeypatch):
    folder = make(tmp_path, monkeypatch, settings, teacher="gold")
    shutil.move(folder / "index", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / "index")
    kept = sorted(f.name for f in (tmp_path / "elsewhere").iterdir())
    make(tmp_path, monkeypatch, settings, teacher="gold")  # is used where it is
    assert (folder / "index").is_symlink()
    make(tmp_path, monkeypatch, settings, teacher="gold", doc_tokens=20, overwrite=True)
    (tmp_path / "fresh").mkdir()
    fresh = make(tmp_path / "fresh", monkeypatch, settings, teacher="gold", doc_tokens=20)
    for name in FILES:
        assert (folder / name).read_bytes() == (fresh / name).read_bytes()
    assert not (folder / "index").is_symlink() and not [*folder.glob("*.replaced")]
    assert sorted(f.name for f in (tmp_path / "elsewhere").iterdir()) == kept  # another's, perhaps


def test_no_lock_is_said_and_a_held_one_stops(settings, tmp_path, monkeypatch, capfd):
    def refuse(number):
        def flock(*args):
            raise OSError(number, os.strerror(number))
        return flock

    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    make(tmp_path, monkeypatch, settings, last_stage="queries")
    assert "cannot be locked" in capfd.readouterr().err
    for number in (errno.EACCES, errno.EWOULDBLOCK):
        monkeypatch.setattr(fcntl, "flock", refuse(number))
        assert "another prepare.py is at work" in wrong(capfd, tmp_path, monkeypatch, settings, last_stage="queries")


# ---- models of another make


@pytest.mark.parametrize("pooling, says", [
    (dict(activation_function="log1p_relu"), "activation_function=log1p_relu"), (dict(pooling_strategy="sum"), "pooling_strategy=sum")])
def test_a_sparse_encoder_of_another_kind_is_refused_before_any_work(tiny, settings, tmp_path, monkeypatch, capfd, pooling, says):
    model = SparseEncoder(modules=[Transformer(tiny("splade"), transformer_task="fill-mask"), SpladePooling(**pooling)], device="cpu")
    model.save_pretrained(str(tmp_path / "splade"))
    line = wrong(capfd, tmp_path, monkeypatch, settings, splade=str(tmp_path / "splade"))
    assert line.startswith("error: splade=") and says in line and not (tmp_path / "data").exists()


@pytest.mark.parametrize("kind", ["roberta", "qwen2"])
def test_rerankers_of_another_make(tiny, tmp_path, kind):
    """RoBERTa has two positions fewer than its table; a decoder finds its score at the last token that is no padding."""
    shutil.copytree(tiny("bert" if kind == "roberta" else "qwen2"), tmp_path / "ce")
    for name in ("model.safetensors", "config.json"):
        os.remove(tmp_path / "ce" / name)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=400, num_labels=1)
    torch.manual_seed(0)
    config = (tf.RobertaConfig(**sizes, max_position_embeddings=42, pad_token_id=0) if kind == "roberta" else
              tf.Qwen2Config(**sizes, num_key_value_heads=2, max_position_embeddings=200, bos_token_id=3, eos_token_id=4))
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() > 1 else 1)
    model.save_pretrained(tmp_path / "ce")
    ours = prepare.CrossEncoder(str(tmp_path / "ce"), "cpu", torch.float32)
    pairs = [("who is it", "stone"), ("the river", "the mayor of Loku " * 30), ("it", "a red hound near the river")]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ce")
    limit = 41 if kind == "roberta" else 200  # padding_idx 0: positions 1 .. 41
    with torch.no_grad():
        theirs = [model(**tokenizer(q, d, truncation="only_second", max_length=limit, return_tensors="pt")).logits.item() for q, d in pairs]
    assert ours.scores(pairs, 512) == pytest.approx(theirs, abs=1e-4)
    assert ours.scores([("the mayor of Loku " * 60, "stone")], 512)  # longer than the model reads: cut, too
