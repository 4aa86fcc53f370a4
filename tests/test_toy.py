"""The toy world: what it is made of, and config/toy.py from nothing to a sample, short here and whole when slow."""

import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from string import ascii_letters
from types import SimpleNamespace

import pytest
import regex
import tiktoken
import torch
from conftest import run
from transformers import AutoTokenizer

import data
import experiments
from prompt import Prompt

ROOT = Path(__file__).resolve().parent.parent
world = SimpleNamespace(**runpy.run_path(str(ROOT / "data" / "toy" / "prepare.py")))


def test_a_question_has_one_answer_in_one_of_five_passages():
    rng = random.Random(0)
    for _ in range(200):
        x = world.draw_example(rng)
        assert len(x["documents"]) == 5
        name, fact = regex.fullmatch(r"What is (\w+)'s (\w+)\?", x["query"]).groups()
        statement = f"{name}'s {fact} is {x['answers'][0]}."
        assert [statement in d for d in x["documents"]].count(True) == 1
        assert sum(d.count(f"'s {fact} is ") for d in x["documents"]) == 1  # no other kind has such a fact
        for d in x["documents"]:  # every sentence names its subject
            assert len({s.split("'s ")[0] for s in d.split(". ")}) == 1


def test_tokenizer_is_one_token_a_word_and_tiktokens_own(tmp_path):
    tokenizer = world.make_tokenizer(str(tmp_path), random.Random(0))
    again = AutoTokenizer.from_pretrained(tmp_path)
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "tokenizer.tiktoken"))
    encoding = tiktoken.Encoding("toy", pat_str=world.WORD, mergeable_ranks=ranks, special_tokens={})
    rng = random.Random(1)
    for _ in range(50):
        x = world.draw_example(rng)
        for text in [x["query"], *x["documents"], "\n\n".join(x["documents"])]:
            ids = tokenizer(text).input_ids
            assert len(ids) == len(regex.findall(world.WORD, text))
            assert ids == encoding.encode(text) == again(text).input_ids and tokenizer.decode(ids) == text
    prompt = Prompt(tokenizer)
    for text in prompt.text(x["query"], x["documents"]), prompt.text(x["query"]):
        assert not {*tokenizer.convert_ids_to_tokens(prompt.ids([text])[0])} & {*ascii_letters}
    assert tokenizer.decode(tokenizer("Ångström's 7 unknown words").input_ids) == "Ångström's 7 unknown words"


@pytest.mark.parametrize("shape", [(32, 32), (64, 32), (32, 64)])
def test_muon_is_torchs_in_float32(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = world.Muon([ours], lr=0.03), torch.optim.Muon([theirs], lr=0.03, weight_decay=0.0)
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for o in optimizers:
            o.step()
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()  # torch's multiplies in bfloat16


def scores(folder, *args):
    return json.loads(run("sample.py", "--data=data/toy/test.jsonl", *args, cwd=folder).splitlines()[-1])


def checkout(folder):
    """Copies the project, as it is without any data."""
    for script in [*ROOT.glob("*.py"), *ROOT.glob("config/*.py"), ROOT / "data" / "toy" / "prepare.py"]:
        copy = folder / script.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(script, copy)


SHORT = ["--llm_steps=3", "--encoder_steps=3", "--train_examples=64", "--val_examples=20", "--test_examples=10"]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """config/toy.py from nothing, in short; -> the folder, what train.py printed, the scores of data/toy/test.jsonl"""
    folder = tmp_path_factory.mktemp("toy")
    checkout(folder)
    # what train.py starts makes the toy of other settings
    script = folder / "data" / "toy" / "prepare.py"
    script.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '{ROOT}/data/toy/prepare.py', *{SHORT}], check=True)\n")
    return folder, run("train.py", "config/toy.py", "--epochs=1.0", "--eval_samples=4", cwd=folder), scores(folder)


def test_the_toy_in_short(short):
    _, out, found = short
    assert "2 steps of 32" in out and "positions read by the generator" in out and "teacher" in out
    assert found.keys() == {"compressed", "full", "none"}


def test_the_toy_is_the_same_made_in_parts(short, tmp_path):
    script = ROOT / "data" / "toy" / "prepare.py"
    run(script, *SHORT, "--parts=examples", cwd=tmp_path)
    assert not (tmp_path / "data/toy/encoder").exists()
    run(script, *SHORT, "--parts=encoders", cwd=tmp_path)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert Path("data/toy/decoder/model.safetensors") in made and Path("data/toy/qrels.val.tsv") in made
    for path in made:
        assert (tmp_path / path).read_bytes() == (short[0] / path).read_bytes(), path


def test_prepare_makes_the_toy(tmp_path):
    checkout(tmp_path)
    (tmp_path / "data/toy/prepare.py").write_text("import sys\nprint(__name__, sys.argv)")
    for given in [], ["--dataset=toy"]:
        assert run("prepare.py", *given, cwd=tmp_path) == f"__main__ ['{tmp_path}/data/toy/prepare.py']\n"


def test_train_makes_of_the_toy_what_is_missing(tmp_path, monkeypatch):
    """config/toy.py takes no encoder, which are a quarter of the work."""
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(data, "run_script", lambda name, **settings: started.append((name, settings)))
    c = dict(task="answer", enable_reranking=False, val_data="data/toy/val.jsonl")
    example = '{"query": "q", "documents": ["d"], "answer": "a"}\n'
    for folder, compressor_model, parts in (("data/toy", "answerdotai/ModernBERT-base", "examples"),
                                            ("data/toy", "data/toy/encoder", "examples,encoders"),
                                            ("mine", "data/toy/encoder", "encoders"), ("mine", "x", None)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        if folder == "mine":
            (tmp_path / "mine/train.jsonl").write_text(example)
            (tmp_path / "mine/val.jsonl").write_text(example)
        c |= dict(train_data=f"{folder}/train.jsonl", val_data=f"{folder}/val.jsonl", compressor_model=compressor_model)
        started.clear()
        with suppress(SystemExit):  # nothing was made
            data.open_data(c)
        assert started == ([("data/toy/prepare.py", dict(parts=parts))] if parts else [])


@pytest.mark.parametrize("script, wrong, says", [
    ("data/toy/prepare.py", "--parts=llm", "parts is examples, encoders or both, not 'llm'"),
    ("data/toy/prepare.py", "--llm_steps=0", "llm_steps must be at least 1, not 0"), ("train.py", "--task=x", "task is answer or pretrain, not 'x'")])
def test_training_the_toy_takes_no_numba_and_no_requests(script, wrong, says):
    """Both scripts come to look at their settings, which they do after all their imports."""
    blocked = "import runpy, sys\nsys.modules.update(numba=None, requests=None)\nsys.argv = sys.argv[1:]\nsys.path[0] = '.'\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", blocked, script, wrong], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == f"error: {says}\n"


@pytest.mark.parametrize("table, rows, has", [
    ("compressors", 3, "encoder (ModernBERT), 2 layers | yes"), ("rate", 1, "25 | 4x"), ("length", 1, "5 of up to 20 tokens"),
    ("documents", 1, "1"), ("query", 1, "1 | 20x"), ("training", 2, "all of it | 0.001 | 0.001"),
    ("reranking", 2, "with it | the 5 best of 5")])
def test_a_table_in_short(short, monkeypatch, table, rows, has):
    monkeypatch.chdir(short[0])
    monkeypatch.setattr(experiments, "run", partial(run, cwd=short[0]))
    for name, value in dict(steps=2, pretrain_steps=2, max_samples=6).items():
        monkeypatch.setattr(experiments, name, value)
    os.makedirs(experiments.out_dir, exist_ok=True)
    lines = [" | ".join(map(str, row)) for row in islice(experiments.TABLES[table](), rows + 1)]
    assert len(lines) == rows + 1 and lines[-1].startswith(f"{has} | ")
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_a_table_is_printed(short):
    out = run("experiments.py", "--table=documents", "--steps=2", "--max_samples=6", "--rows=1", cwd=short[0])
    head, line, row = out.splitlines()[2:]
    assert head == "| documents | compressed | full text |" and line == "| --- | --- | --- |" and row.startswith("| 1 | ")


@pytest.mark.slow
def test_the_toy_learns(tmp_path):
    checkout(tmp_path)
    run("train.py", "config/toy.py", cwd=tmp_path)
    found = scores(tmp_path)
    assert found["compressed"]["em"] >= 0.90 and found["full"]["em"] >= 0.95 and found["none"]["em"] <= 0.10
    run("train.py", "config/pretrain_toy_modernbert.py", cwd=tmp_path)
    run("train.py", "config/toy_modernbert.py", "--init_from=out/pretrain_toy_modernbert/best", "--out_dir=out/toy_pretrained", cwd=tmp_path)
    assert scores(tmp_path, "--out_dir=out/toy_pretrained/best")["compressed"]["em"] >= 0.90
