"""Training examples made of passages alone."""

import json
from collections import Counter

import pytest
from conftest import jsonl, run

# every word stands once
PASSAGES = [dict(_id=f"p{i}", title=f"About {i}", text=" ".join(f"w{i}-{j}" for j in range(20 + i % 150))) for i in range(240)]


def read(path):
    return [json.loads(line) for line in open(path)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    here = tmp_path_factory.mktemp("cloze")
    jsonl(here / "corpus.jsonl", [dict(_id="t1", title="A title alone", text=None), dict(_id="t2", title="Another", text=" "), *PASSAGES])
    jsonl(here / "mine.jsonl", [dict(query="who?", documents=["Ann sang."], answer="Ann", answers=["Ann"])])
    args = ["cloze.py", f"--corpus={here}/corpus.jsonl", f"--mix={here}/mine.jsonl", "--repeats=3", "--examples=2000"]
    for out in ("all", "again"):
        run(*args, f"--out={here}/{out}")
    first = read(here / "all" / "train.jsonl")[3]["answer"].split("-")[0]  # w and the passage's number
    (here / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\nq1\tp{first[1:]}\t1\n")
    said = run(*args, f"--leave_out={here}/qrels.tsv", f"--out={here}/rest")
    assert said.strip().endswith("256 to validate; 1 passages left out")
    # as prepare.py writes the corpus, every passage as the first chunk of a document
    jsonl(here / "chunks.jsonl", [{**p, "_id": p["_id"] + "#0"} for p in PASSAGES])
    args[1] = f"--corpus={here}/chunks.jsonl"
    run(*args, f"--leave_out={here}/qrels.tsv", f"--out={here}/chunks")
    return here, f"{first}-"


def test_a_query_asks_for_a_part_of_its_passage(made):
    (made, _), kinds, gaps = made, Counter(), []
    for x in read(made / "all" / "train.jsonl")[3:]:
        (d,), answer = x["documents"], x["answer"]
        assert answer
        if x["query"] == "Repeat it.":
            assert d == answer and 4 <= len(d.split()) <= 24 and sum(d in p["text"] for p in PASSAGES) >= 1
            kinds["repeat"] += 1
            continue
        passage = next(p for p in PASSAGES if p["title"] == d["title"])
        assert d["text"] in passage["text"] and len(d["text"].split()) <= 85
        if x["query"].startswith("What follows"):
            assert f'{x["query"][len("What follows ") + 1:-2]} {answer}' in d["text"]
            kinds["follows"] += 1
        else:
            before, after = (side.split() for side in x["query"].split("___"))
            words, said = d["text"].split(), answer.split()
            at = words.index(said[0])
            assert words[at:at + len(said)] == said and 0 < at and len(said) <= 5
            assert before == [w for w in words[max(0, at - 8):at] if w in before]
            assert after == [w for w in words[at + len(said):][:8] if w in after]
            gaps.append(len(before) + len(after))
            kinds["gap"] += 1
    assert kinds["gap"] == pytest.approx(1000, abs=100) and kinds["follows"] == pytest.approx(500, abs=80)
    assert min(gaps) == 3 and max(gaps) <= 16


def test_what_is_written(made):
    made, left_out = made
    train, val = (read(made / "all" / f"{name}.jsonl") for name in ("train", "val"))
    assert [x["answers"] for x in train[:3]] == [["Ann"]] * 3 and len(train) == 2003 and len(val) == 256
    titles = [{x["documents"][0]["title"] for x in rows if isinstance(x["documents"][0], dict)} for rows in (train, val)]
    assert len(titles[0]) > 100 and not titles[0] & titles[1]
    for name in ("train", "val"):
        assert (made / "all" / f"{name}.jsonl").read_bytes() == (made / "again" / f"{name}.jsonl").read_bytes()
    texts = [[(made / folder / f"{name}.jsonl").read_text() for name in ("train", "val")] for folder in ("all", "rest", "chunks")]
    assert left_out in texts[0][0] and not any(left_out in text for text in texts[1]) and texts[1] == texts[2]


@pytest.mark.parametrize("args, says", [
    (["--out=x"], "cloze.py takes --corpus=FILE and --out=FOLDER"), (["--corpus=gone", "--out=x"], "gone does not exist"),
    (["--corpus=few", "--out=x"], "few has 199 passages of 12 words or more, with white space"),
    (["--corpus=chinese", "--out=x"], "chinese has 0 passages of 12 words or more, with white space between them, to ask about"),
    (["--corpus=corpus.jsonl", "--leave_out=header.tsv", "--out=x"], "header.tsv names no passage of"),
    (["--corpus=corpus.jsonl", "--out=all"], "all/train.jsonl is there already: choose another --out, or delete it"),
    (["--corpus=corpus.jsonl", "--out=validate"], "validate/val.jsonl is there already: choose another --out, or delete it"),
    (["--corpus=corpus.jsonl", "--leave_out=others.tsv", "--out=x"], "others.tsv names no passage of"),
    (["--corpus=others.tsv", "--out=x"], "others.tsv: columns; prepare.py makes a corpus.jsonl of them"),
    (["--corpus=corpus.jsonl", "--mix=few", "--out=x"], "few, line 1: broken JSON"),
    (["--corpus=corpus.jsonl", "--leave_out=few", "--out=x"], "few, line 1: not query-id, corpus-id, score between tabs")])
def test_errors(made, args, says):
    made, _ = made
    (made / "few").write_text("a passage of twelve words or more that stands in a file\n" * 199)
    (made / "others.tsv").write_text("q1\tgone\t1\n")
    (made / "header.tsv").write_text("query-id\tcorpus-id\tscore\n")
    (made / "chinese").write_text("\u4e2d\u6587" * 99 + "\n" + "\u4e2d\u6587\n" * 300)
    (made / "validate").mkdir(exist_ok=True)
    (made / "validate" / "val.jsonl").touch()
    before = (made / "all" / "train.jsonl").read_bytes()
    args = [a.replace("=", f"={made}/") for a in args]
    assert says in run("cloze.py", *args, ok=False)
    assert not (made / "x").exists() and (made / "all" / "train.jsonl").read_bytes() == before
