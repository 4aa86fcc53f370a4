"""Training data that others have published, in PISCO's and CLaRa's form: read as it is, and copied by prepare.py."""

import json
import os
import shutil
from datetime import datetime

import pytest
from conftest import EXAMPLES, ROOT, jsonl, losses, run

from corpus import chunk_by_words
from data import Examples
from formats import examples_of
from public import copy_examples, read_examples

datasets = pytest.importorskip("datasets")
PISCO = [dict(query=f"{x['query']} {i}", docs=[d if isinstance(d, str) else d["text"] for d in x["documents"]],
              mistral_label=x["answer"]) for i in range(8) for x in EXAMPLES]
CLARA = [dict(question=["who is the mayor?"], docs=["The mayor of Loku is Tuson."], answers=["Tuson", "mayor Tuson"]),
         dict(question="who keeps a hound?", docs=["Mara keeps a red hound."], gold_answer="Mara"),
         dict(question=["who keeps it?", "what colour is it?"], docs=["Mara keeps a red hound."], answers=["Mara", "red"])]
AS_OURS = [dict(query="who is the mayor?", documents=["The mayor of Loku is Tuson."], answer="Tuson",
                answers=["Tuson", "mayor Tuson"]),
           dict(query="who keeps a hound?", documents=["Mara keeps a red hound."], answer="Mara"),
           dict(query="who keeps it?", documents=["Mara keeps a red hound."], answer="Mara"),
           dict(query="what colour is it?", documents=["Mara keeps a red hound."], answer="red")]


@pytest.fixture
def dataset():
    """The name of a data set, of which nothing is left afterwards."""
    name = f"test-public-{os.getpid()}"
    yield name
    shutil.rmtree(f"{ROOT}/data/{name}", ignore_errors=True)


def parquet(path, rows):
    names = {name for row in rows for name in row}
    datasets.Dataset.from_list([dict.fromkeys(names) | row for row in rows]).to_parquet(path)
    return str(path)


def read(name):
    rows = {}
    for kind in ("train", "val"):
        with open(f"{ROOT}/data/{name}/{kind}.jsonl") as f:
            rows[kind] = [json.loads(line) for line in f]
    return rows


def test_rows_are_read_under_our_names(tmp_path):
    path = jsonl(tmp_path / "clara.jsonl", CLARA)
    assert [*Examples(path)] == AS_OURS
    (tmp_path / "clara.json").write_text(json.dumps(CLARA))
    assert [*Examples(str(tmp_path / "clara.json"))] == AS_OURS
    assert Examples(jsonl(tmp_path / "pisco.jsonl", PISCO))[4] == dict(
        query=PISCO[4]["query"], documents=PISCO[4]["docs"], answer=PISCO[4]["mistral_label"])
    no_answer = dict(question="who?", docs=["x"])
    assert [*Examples(jsonl(tmp_path / "no.jsonl", [no_answer]), need_answer=False)] == [
        dict(query="who?", documents=["x"])]
    for x in [*EXAMPLES, dict(query="who?", question="another's", documents=["x"], docs=["y"], answer="z")]:
        assert examples_of(x) == [x]
    assert examples_of(dict(question="who?", docs=["x"], answers=[])) == [dict(query="who?", documents=["x"], answer="", answers=[])]


@pytest.mark.parametrize("row, wrong", [
    (dict(question=["a", "b"], docs=["x"], answers=["c"]), "2 questions, which is not the number of answers"),
    (dict(question=["a", " "], docs=["x"], answers=["c", "d"]), "'query' is missing or empty"),
    (dict(query="a", docs=[], mistral_label="c"), "no documents"),
    (dict(query="a", docs=["x"]), "'answer' is missing or no string"),
    (dict(query="a", docs=["x"], mistral_label=None), "'answer' is missing or no string"),
    (dict(question="a", docs=[["x"]], gold_answer="c"), "a document is neither a string nor an object"),
    (dict(question="a", docs=["x"], answers=[3]), "'answer' is missing or no string")])
def test_a_broken_row_is_named(tmp_path, dataset, row, wrong):
    path = jsonl(tmp_path / "x.jsonl", [CLARA[1], row])
    with pytest.raises(ValueError, match=f"x.jsonl, line 2: {wrong}"):
        Examples(path)
    assert f"x.jsonl, line 2: {wrong}" in run("prepare.py", f"--dataset={dataset}", f"--examples={path}", ok=False)
    try:
        table = parquet(tmp_path / "x.parquet", [PISCO[0], row])
    except Exception:  # a column of Parquet has one type
        return
    assert f"x.parquet, row 1: {wrong}" in run("prepare.py", f"--dataset={dataset}", f"--examples={table}", ok=False)
    assert not os.path.exists(f"{ROOT}/data/{dataset}/train.jsonl")


def test_prepare_copies_a_file_or_a_folder(tmp_path, dataset, tiny):
    ours = [dict(query=x["query"], documents=x["docs"], answer=x["mistral_label"]) for x in PISCO]
    empty = dict(PISCO[0], query="answered by nothing", mistral_label=" ")
    folder = tmp_path / "parts" / "deep"
    folder.mkdir(parents=True)
    parquet(folder / "a.parquet", PISCO[:10])
    jsonl(folder / "b.jsonl", PISCO[10:] + [empty])
    sources = [jsonl(tmp_path / "pisco.jsonl", PISCO), parquet(tmp_path / "pisco.parquet", PISCO), str(tmp_path / "parts")]
    made = []
    for source in sources:
        args = "prepare.py", "config/prepare_pisco.py", f"--dataset={dataset}", f"--examples={source}", "--val_fraction=0.2"
        said = run(*args, "--overwrite=True")
        made.append(read(dataset))
        assert f"{len(made[-1]['train'])} train, {len(made[-1]['val'])} val" in said
        assert "there already" in run(*args)
        assert "made with val_fraction=0.2, now 0.1" in run(*args, "--val_fraction=0.1", ok=False)
        assert sorted(x["query"] for part in made[-1].values() for x in part) == sorted(x["query"] for x in ours)
        assert all(x in ours for part in made[-1].values() for x in part)
    assert made[0] == made[1] == made[2] and 1 <= len(made[0]["val"]) < 12
    run("train.py", f"--generator={tiny('llama')}", f"--train_data=data/{dataset}/train.jsonl", "--device=cpu",
        f"--val_data=data/{dataset}/val.jsonl", f"--out_dir={tmp_path}/out", "--num_layers=2", "--batch_size=2",
        "--gradient_accumulation_steps=1", "--max_iters=20", "--log_interval=1", "--dtype=float32", "--generator_lr=1e-2",
        "--compressor_lr=1e-2", "--eval_samples=0", "--answer_tokens=16")
    curve = losses(f"{tmp_path}/out")
    assert len(curve) == 20 and curve[20] < curve[1] - 0.5


def test_a_table_may_hold_dates(tmp_path, dataset):
    table = parquet(tmp_path / "x.parquet", [dict(x, made=datetime(2026, 1, 2)) for x in PISCO])
    run("prepare.py", f"--dataset={dataset}", f"--examples={table}")
    assert {x["made"] for x in read(dataset)["train"]} == {"2026-01-02 00:00:00"}


def test_what_does_not_go_together(tmp_path, dataset):
    path = jsonl(tmp_path / "x.jsonl", PISCO)
    for args, message in (
            (["--corpus=x"], "leave out corpus"), (["--teacher=gold"], "leave out teacher"),
            (["--max_queries=-1"], "max_queries must be at least 0"), (["--dataset=toy"], "which is not toy"),
            (["--examples=no/such"], "no/such cannot be loaded"), (["--val_fraction=1.0"], "less than 1"),
            ([f"--examples={tmp_path}/empty"], "holds no .jsonl, .json or .parquet file")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert message in run("prepare.py", f"--dataset={dataset}", f"--examples={path}", *args, ok=False)


def test_nothing_of_others_is_written_over(tmp_path, dataset, tiny):
    path, folder = jsonl(tmp_path / "x.jsonl", PISCO), f"{ROOT}/data/{dataset}"
    os.makedirs(folder)
    shutil.copy(path, f"{folder}/train.jsonl")
    args = "prepare.py", f"--dataset={dataset}"
    assert "not made by this command" in run(*args, f"--examples={path}", ok=False)
    os.rename(f"{folder}/train.jsonl", f"{folder}/mine.jsonl")
    for source in (folder, f"{folder}/mine.jsonl"):
        assert "is what would be written over" in run(*args, f"--examples={source}", ok=False)
    run(*args, f"--examples={path}")
    corpus = jsonl(tmp_path / "corpus.jsonl", [dict(_id="a", text="Mara keeps a hound.")])
    queries = jsonl(tmp_path / "queries.jsonl", [dict(_id="q", text="who?", metadata=dict(answers=["Mara"]))])
    of_corpus = [f"--corpus={corpus}", f"--queries={queries}", f"--generator={tiny('llama')}", f"--splade={tiny('splade')}",
                 "--reranker=", "--teacher=gold", "--device=cpu", "--dtype=float32"]
    assert "others have made (--examples)" in run(*args, *of_corpus, ok=False)
    with open(f"{folder}/mine.jsonl") as f, open(path) as g:
        assert f.read() == g.read()
    for damaged in "{", "[]":
        with open(f"{folder}/manifest.json", "w") as f:
            f.write(damaged)
        for made_of in [f"--examples={path}"], of_corpus:
            assert f"{dataset}/manifest.json is damaged: " in run(*args, *made_of, ok=False)


def test_a_folder_made_of_a_corpus_stays(tmp_path, dataset):
    path, folder = jsonl(tmp_path / "x.jsonl", PISCO), f"{ROOT}/data/{dataset}"
    os.makedirs(folder)
    with open(f"{folder}/manifest.json", "w") as f:
        json.dump(dict(settings={}, stages={}), f)
    for overwrite in ("False", "True"):
        assert "was made of a corpus and queries" in run(
            "prepare.py", f"--dataset={dataset}", f"--examples={path}", f"--overwrite={overwrite}", ok=False)
    assert sorted(os.listdir(folder)) == [".lock", "manifest.json"]


def test_a_changed_source_is_noticed_and_a_removed_file_made_anew(tmp_path, dataset):
    path = jsonl(tmp_path / "x.jsonl", PISCO)
    args = "prepare.py", f"--dataset={dataset}", f"--examples={path}", "--val_fraction=0.2"
    run(*args)
    made = read(dataset)
    os.remove(f"{ROOT}/data/{dataset}/val.jsonl")
    run(*args)
    assert read(dataset) == made
    jsonl(tmp_path / "x.jsonl", PISCO[:5])
    assert f"was made with another content of {path}" in run(*args, ok=False)
    jsonl(tmp_path / "x.jsonl", PISCO)
    assert "max_queries=0, now 3" in run(*args, "--max_queries=3", ok=False)
    run(*args, "--max_queries=3", "--overwrite=True")
    assert sorted(x["query"] for rows in read(dataset).values() for x in rows) == sorted(x["query"] for x in PISCO[:3])


def test_a_crash_between_two_files_mixes_no_splits(tmp_path, monkeypatch):
    path, folder, real = jsonl(tmp_path / "x.jsonl", PISCO), tmp_path / "made", os.replace
    folder.mkdir()

    def crash(source, target):
        if target.endswith("train.jsonl"):
            raise KeyboardInterrupt
        real(source, target)

    for before, fraction in ((None, 0.2), (0.2, 0.6), (0.6, 0.1)):
        monkeypatch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            copy_examples(str(folder), path, fraction, 0, True)
        monkeypatch.setattr(os, "replace", real)
        copy_examples(str(folder), path, before or fraction, 0, False)  # neither refused nor taken as complete
        rows = [json.loads(line)["query"] for kind in ("train", "val") for line in open(folder / f"{kind}.jsonl")]
        assert sorted(rows) == sorted(x["query"] for x in PISCO)


def test_what_prepare_has_made_is_read_as_a_folder(tmp_path):
    for name in ("manifest.json", "dataset_infos.json"):
        (tmp_path / name).write_text('{"settings": {}}')
    jsonl(tmp_path / "train.jsonl", PISCO)
    assert [x["query"] for x in read_examples(str(tmp_path))] == [x["query"] for x in PISCO]


def test_one_example_at_least_is_for_validation(tmp_path, dataset):
    args = "prepare.py", f"--dataset={dataset}", "--val_fraction=0.0"
    path = jsonl(tmp_path / "x.jsonl", PISCO[:3] + [dict(PISCO[i], query=f"q{i}", mistral_label="") for i in range(20)])
    run(*args, f"--examples={path}")
    assert len(read(dataset)["val"]) == 1 and len(read(dataset)["train"]) == 2
    path = jsonl(tmp_path / "y.jsonl", [dict(PISCO[0], mistral_label="")])
    assert "holds no example with an answer" in run(*args, f"--examples={path}", "--overwrite=True", ok=False)


def test_chunks_by_words():
    text = " ".join(f"w{i}" for i in range(250)) + "\n"
    chunks = chunk_by_words([("a", "Title", text), ("b", "Alone", ""), ("c", "", " ")], 100)
    assert [(x["_id"], x["title"], len(x["text"].split())) for x in chunks] == [
        ("a#0", "Title", 100), ("a#1", "Title", 100), ("a#2", "Title", 50), ("b#0", "Alone", 0)]
    assert " ".join(x["text"] for x in chunks[:3]) == text.strip()
