"""Reading examples, scoring answers, overriding settings."""

import json
from pathlib import Path

import pytest
import pytrec_eval
import torch
from transformers import AutoTokenizer

from configurator import configure
from data import Chunks, Documents, Examples, StepExamples, with_documents_of_others
from files import replacing_folder
from metrics import mean_scores, ndcg, score, trec_order

ROOT = Path(__file__).parent.parent
GOOD = dict(query="who?", documents=["a", {"title": "T", "text": "b"}], answer="x", reranking_scores=[1, 2.5], answers=["x"])


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_jsonl_and_json_give_the_same_examples(tmp_path):
    examples = [{**GOOD, "query": f"who {i}? ]}}[{{ \"quoted\\\" ü 中"} for i in range(5)]
    lines = write(tmp_path / "a.jsonl", "\n".join(json.dumps(x, ensure_ascii=False) for x in examples) + "\n\n")
    compact = write(tmp_path / "a.json", json.dumps(examples))
    pretty = write(tmp_path / "b.json", json.dumps(examples, indent=2, ensure_ascii=False) + "\n")
    bom = write(tmp_path / "c.json", "\ufeff" + json.dumps(examples))
    for path in (lines, compact, pretty, bom):
        data = Examples(path, need_scores=True)
        assert [data[i] for i in range(len(data))] == examples


BROKEN = [
    ('{"query": "q", "documents": ["d"], "answer"', "broken JSON"),
    ('["q"]', "not a JSON object"),
    (json.dumps({**GOOD, "query": " "}), "'query' is missing or empty"),
    (json.dumps({**GOOD, "documents": []}), "no documents"),
    (json.dumps({**GOOD, "documents": [3, 4]}), "a document is neither"),
    (json.dumps({k: v for k, v in GOOD.items() if k != "answer"}), "'answer' is missing or no string"),
    (json.dumps({k: v for k, v in GOOD.items() if k != "reranking_scores"}), "'reranking_scores' is missing"),
    (json.dumps({**GOOD, "reranking_scores": [1]}), "2 documents but 1 reranking_scores"),
    (json.dumps({**GOOD, "reranking_scores": [1, "2"]}), "'reranking_scores' is not a list of numbers"),
    (json.dumps({**GOOD, "reranking_scores": [1, float("nan")]}), "'reranking_scores' is not a list of numbers"),
    (json.dumps({**GOOD, "answers": "x"}), "'answers' is not a list of strings"),
    (json.dumps({**GOOD, "documents": ["half a pair: \ud83d"]}), "surrogates not allowed"),
]


@pytest.mark.parametrize("line,wrong", BROKEN)
def test_a_broken_example_is_named_by_file_and_line(tmp_path, line, wrong):
    path = write(tmp_path / "a.jsonl", json.dumps(GOOD) + "\n\n" + line + "\n" + json.dumps(GOOD) + "\n")
    with pytest.raises(ValueError, match="a.jsonl, line 3: ") as e:
        Examples(path, need_scores=True)
    assert wrong in str(e.value) and "\n" not in str(e.value)


def test_a_pair_of_surrogates_is_good(tmp_path):
    examples = [{**GOOD, "query": "\U0001f600?"}]
    data = Examples(write(tmp_path / "a.jsonl", json.dumps(examples[0])))
    assert data[0] == examples[0]


@pytest.mark.parametrize("text,line", [
    ('[\n{good},\n{"query": "q"}\n]', 3), ("[\n{good},\n1,\n{good}]", 2), ("[\n{good}\n{good}]", 2), ("[\n{good},\n", 2),
    ('[\n{good},\n{"query": "q', 2), ("{good", 1), ("[\n{good}]\n]", 2)])
def test_a_broken_json_list(tmp_path, text, line):
    path = write(tmp_path / "a.json", text.replace("{good}", json.dumps(GOOD)))
    with pytest.raises(ValueError, match=f"a.json, line {line}: "):
        Examples(path)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl does not exist"):
        Examples("nowhere.jsonl")
    for kind, end in ((Examples, "--dataset=x --corpus=FILE --queries=FILE makes it"), (Documents, "does not exist")):
        with pytest.raises(FileNotFoundError, match=f"{end}$"):  # prepare.py makes no text
            kind("data/x/train.jsonl")
    for text in ("", "\n\n"):
        with pytest.raises(ValueError, match="holds no examples"):
            Examples(write(tmp_path / "a.jsonl", text))
    with pytest.raises(ValueError, match="holds no examples"):
        Examples(write(tmp_path / "a.json", "[ ]"))


def test_scores():
    # worked by hand from SQuAD's definition
    assert score("The Eiffel Tower!", ["eiffel tower"]) == (1.0, 1.0, 1.0)
    assert score("in Paris, France", ["Paris"]) == (0.0, 0.5, 1.0)
    assert score("London", ["Paris", "Rome"]) == (0.0, 0.0, 0.0)
    assert score("the cat sat", ["a cat sat down", "dog"]) == (0.0, 0.8, 0.0)
    assert score("", [""]) == (1.0, 1.0, 1.0)
    assert score("a", ["b", "z"]) == score("z", ["b"]) == score("b", ["z"]) == score("x", [""]) == (0.0, 0.0, 0.0)
    assert score("red green blue", ["blue green red"]) == (0.0, 1.0, 0.0)
    assert mean_scores(["x", "y"], [dict(answer="x"), dict(answer="y", answers=["z"])]) == dict(em=0.5, f1=0.5, match=0.5)


SETTINGS = dict(batch_size=4, lr=1e-3, name="n", flag=False, _private=1, other=[1])


def test_overrides_in_order(tmp_path):
    settings = dict(SETTINGS)
    file = write(tmp_path / "c.py", "import math\nn = 3\nbatch_size = 2 * n\nname = 'file'\ndel n\n")
    config = configure(settings, [file, "--name=arg", "--lr=1", "--flag=True"])
    assert config == dict(batch_size=6, lr=1.0, name="arg", flag=True)
    assert settings["batch_size"] == 6 and type(settings["lr"]) is float
    assert configure(dict(SETTINGS), ["--name=3"])["name"] == "3"


@pytest.mark.parametrize("args,wrong", [
    (["--batchsize=3"], "unknown setting 'batchsize', did you mean 'batch_size'?"), (["--_private=3"], "unknown setting"),
    (["--batch_size=3.5"], "batch_size takes a value of type int"), (["--batch_size=four"], "of type int, not 'four'"),
    (["--batch_size={[]: 1}"], "batch_size takes a value of type int"), (["--batch_size=1" + "0" * 19], "has more than 64 bits"),
    (["--flag=1"], "flag takes a value of type bool"), (["--lr=True"], "lr takes a value of type float"),
    (["--batch_size"], "written --name=value"), (["batch_size=3"], "does not exist"), (["config/none.py"], "does not exist")])
def test_bad_settings(args, wrong):
    with pytest.raises(SystemExit) as e:
        configure(dict(SETTINGS), args)
    assert wrong in str(e.value) and "\n" not in str(e.value)


def test_a_broken_config_file(tmp_path):
    for text, wrong in (("batch_size = = 3", "SyntaxError"), ("batch_size = sixteen", "NameError"), ("size = 3", "unknown setting")):
        with pytest.raises(SystemExit) as e:
            configure(dict(SETTINGS), [write(tmp_path / "c.py", text)])
        assert wrong in str(e.value) and "c.py" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/**/*.py")), ids=lambda path: path.stem)
def test_every_config_sets_what_its_script_has(path):
    script = ROOT / ("prepare.py" if path.name.startswith("prepare") else "train.py")
    block = script.read_text(encoding="utf-8").split("# " + "-" * 77 + "\n")[1]
    settings = dict(torch=torch)
    exec(block, settings)
    before = dict(settings)
    configure(settings, [str(path)])
    assert settings != before


def test_chunks_are_repeated_and_continued(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    texts = ["who is the mayor of Loku? " * 20, "The bridge is made of stone", "Loku"]
    plain = write(tmp_path / "text.txt", "\n\n".join(texts) + "\n")
    corpus = write(tmp_path / "corpus.jsonl", "".join(json.dumps(dict(_id=str(i), title="", text=t)) + "\n" for i, t in enumerate(texts)))
    chunks = Chunks(plain, tokenizer, 8)
    assert len(chunks) == 6 and [chunks[i] for i in range(6)] == [Chunks(corpus, tokenizer, 8)[i] for i in range(6)]
    count = lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)
    for i in range(6):
        x = chunks[i]
        document, = x["documents"]
        if i % 2 == 0 or texts[i // 2] == "Loku" and count("Loku") == 1:
            assert x["query"] == Chunks.REPEAT and x["answer"] == document and document in texts[i // 2]
        else:
            assert x["query"] == Chunks.CONTINUE
            assert any(document + space + x["answer"] in texts[i // 2] for space in ("", " "))
    assert all(4 <= count(x) <= 9 for x in (chunks[0]["answer"], chunks[1]["answer"], *chunks[1]["documents"]))
    assert chunks[2]["answer"] == texts[1] or count(texts[1]) > 8
    blanks = write(tmp_path / "blanks.txt", "Loku" + " " * 400 + "river\n")
    assert all(x["answer"] and all(x["documents"]) for x in map(Chunks(blanks, tokenizer, 8).__getitem__, range(2)))
    # an empty document is left out, whatever is wrong is said
    assert len(Chunks(write(tmp_path / "empty.jsonl", '"a"\n{"title": "", "text": " "}\n'), tokenizer, 8)) == 2
    with pytest.raises(ValueError, match="wrong.jsonl, line 2: neither a text nor"):
        Chunks(write(tmp_path / "wrong.jsonl", '"a"\n{"title": ""}\n'), tokenizer, 8)


def test_files_are_read_by_what_is_in_them(tmp_path):
    rows = [GOOD, {**GOOD, "documents": [{"title": None, "text": "the mill"}, "a"], "answers": None}]
    lines = [json.dumps(x) for x in rows]
    for name, text in (("a.ndjson", "\n".join(lines)), ("a.json", "\n".join(lines)), ("a.jsonl", f"[{','.join(lines)}]"),
                       ("b.txt", "\r".join(lines) + "\r"), ("c", "\r\n".join(lines))):
        assert [*Examples(write(tmp_path / name, text))] == rows, name
    broken = "\r".join([lines[0], '{"query": "q"}', ""])
    with pytest.raises(ValueError, match="d.jsonl, line 2: no documents"):
        Examples(write(tmp_path / "d.jsonl", broken))


def test_a_step_goes_from_few_documents_to_many_and_from_short_to_long():
    rows = [dict(query="q" * (1 + 7 * i % 5), documents=["d"] * (1 + i % 3), answer="a") for i in range(40)]
    steps = StepExamples(rows, 10, 5, 0, 1)
    for step in range(4):
        sizes = [(len(x["documents"]), len(x["query"])) for _, x in steps[step]]
        assert sizes == sorted(sizes) and len(set(sizes)) > 5
    assert sorted(i for step in range(4) for i, _ in steps[step]) == [*range(40)]


def test_other_documents_are_not_its_own():
    # the next one after half the list, unless it shares a document or has another number of them
    examples = [dict(query=str(i), documents=documents) for i, documents in enumerate(["ab", "c", "de", "bf", "gh", "i", "c"])]
    shuffled = with_documents_of_others(examples)
    assert [x["documents"] for x in shuffled] == ["gh", "i", "ab", "de", "ab", "c", "i"]
    assert [x["query"] for x in shuffled] == [x["query"] for x in examples]
    assert with_documents_of_others(examples[:1]) == []
    assert [x["documents"] for x in with_documents_of_others([examples[1], examples[6]])] == ["c", "c"]
    assert [x["documents"] for x in with_documents_of_others(examples[:2])] == ["c", "ab"]


def test_a_folder_with_a_slash_at_its_end_is_replaced(tmp_path):
    for content in ("old", "new"):
        with replacing_folder(f"{tmp_path}/x/") as folder:
            write(Path(folder) / "a", content)
    assert (tmp_path / "x" / "a").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_ties_are_ranked_as_trec_eval_ranks_them():
    ids, scores, relevance = ["d1", "d10", "d2", "d3"], [1.0, 1.0, 1.0, 2.0], {"d1": 1, "d2": 0, "d10": 2}
    theirs = pytrec_eval.RelevanceEvaluator({"q": relevance}, {"ndcg_cut_2"}).evaluate({"q": dict(zip(ids, scores))})
    order = trec_order(ids, scores)
    assert ndcg([ids[i] for i in order], relevance, 2) == pytest.approx(theirs["q"]["ndcg_cut_2"])
    assert [ids[i] for i in order] == ["d3", "d2", "d10", "d1"]
