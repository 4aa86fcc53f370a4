"""sample.py's evaluation as a user runs it: reranking, stores, a judge, export; and its scores."""

import json
import os
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import pytrec_eval
import scipy.stats
import torch
from conftest import EXAMPLES, ROOT, jsonl, run
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora
from data import Store, document_text
from metrics import interval, ndcg, paired_test, read_qrels
from model import ScaleDown, ScaleDownConfig
from pretrained import decoder_layers

CPU = ["--device=cpu", "--dtype=float32"]
README = os.path.join(ROOT, "README.md")


def load(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def speaking(generator, folder, **settings):
    """A checkpoint, untrained, whose adapter does so much that it says something else for other documents."""
    torch.manual_seed(0)
    model = ScaleDown(ScaleDownConfig(generator=generator, num_layers=2, num_memory_tokens=2, answer_tokens=8, **settings))
    with torch.no_grad():
        for _, m in lora.layers(model.generator):
            m.lora_B.normal_(std=0.5)
    model.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def ranker(tiny, tmp_path_factory):
    return speaking(tiny("llama"), tmp_path_factory.mktemp("ranker") / "checkpoint", enable_reranking=True)


@pytest.fixture(scope="module")
def asked(ranker, tmp_path_factory):
    """Examples whose queries and documents have ids, and qrels of them; the reference of every other question is what
    the model says from its first two documents."""
    model, folder = ScaleDown.from_pretrained(ranker), tmp_path_factory.mktemp("asked")
    rng, rows = random.Random(0), []
    texts = [document_text(d) for x in EXAMPLES for d in x["documents"]]
    for n in range(6):
        chosen = rng.sample(range(len(texts)), 4 - n % 2)
        x = dict(_id=f"q{n}", query=EXAMPLES[n % 3]["query"], reranking_scores=[rng.random() for _ in chosen],
                 documents=[dict(_id=f"d{i}#{n}", text=texts[i]) for i in chosen])
        said = model.generate([x["query"]], [x["documents"][:2]])[0]
        rows.append(x | dict(answers=["stone", said if n % 2 else "the river"]))
    (folder / "asked.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    qrels = {f"q{n}": {f"d{i}": rng.randint(0, 2) for i in rng.sample(range(len(texts)), 5)} for n in range(5)}  # not q5
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(
        f"{q}\t{d}\t{r}\n" for q, row in qrels.items() for d, r in row.items()))
    return folder, rows, qrels


def test_ndcg_is_trec_evals():
    rng = random.Random(0)
    for _ in range(50):
        ids = [f"d{i}" for i in range(30)]
        relevance = {id: rng.randint(-1, 3) for id in rng.sample(ids, 20)} | {"never found": 2}
        ranking = rng.sample(ids, rng.randint(1, 25))
        run = {"q": {id: float(-i) for i, id in enumerate(ranking)}}
        want = pytrec_eval.RelevanceEvaluator({"q": relevance}, {"ndcg_cut.10"}).evaluate(run)["q"]["ndcg_cut_10"]
        assert ndcg(ranking, relevance) == pytest.approx(want)


def test_qrels_without_a_relevant_document_and_broken_ones(tmp_path):
    assert ndcg(["a", "b"], {"a": 0}) == 0.0
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t1\n\nq\tb\tno\n")
    with pytest.raises(ValueError, match="qrels.tsv, line 4: not query-id"):
        read_qrels(tmp_path / "qrels.tsv")
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t1\n\nq\tb\t2\n")
    assert read_qrels(tmp_path / "qrels.tsv") == {"q": {"a": 1, "b": 2}}


def test_interval_is_the_percentile_bootstrap():
    values = np.random.default_rng(1).random(200) < 0.3
    want = scipy.stats.bootstrap((values.astype(float),), np.mean, method="percentile", n_resamples=5000, rng=0)
    assert interval(values, 5000) == pytest.approx([*want.confidence_interval], abs=0.01)
    draws = np.random.default_rng(2).normal(size=1000)  # of which the percentiles differ in every digit
    assert interval(draws, 40_000) == pytest.approx(1.96 * draws.std() / 1000**0.5 * np.array([-1, 1]) + draws.mean(), abs=0.002)


def test_paired_bootstrap_agrees_with_scipy():
    rng = np.random.default_rng(3)
    a, noise = rng.normal(size=400), rng.normal(size=400)
    for shift in (0.0, 0.05, 0.1, 0.3):
        b = a - shift + 0.5 * noise
        mean, (low, high), p = paired_test(a, b, 4000)
        want = scipy.stats.bootstrap((a - b,), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
        assert mean == pytest.approx((a - b).mean()) and (low, high) == pytest.approx([*want], abs=0.005)
        assert p == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue, abs=0.02)
    assert paired_test(a, a)[2] == 1.0


def test_the_best_candidates_by_relevance(ranker, asked):
    folder, rows, qrels = asked
    args = ["sample.py", f"--out_dir={ranker}", f"--data={folder}/asked.jsonl", "--candidates=3", "--keep=2", *CPU]
    out = run(*args, f"--qrels={folder}/qrels.tsv", "--batch_size=4")
    scores, said = json.loads(out.splitlines()[-1]), load(f"{ranker}.{folder.name}.asked.jsonl")
    model = ScaleDown.from_pretrained(ranker)
    runs = dict(given={}, reranked={}, teacher={})
    for x, row in zip(rows, said):
        documents = x["documents"][:3]
        relevance = [model.compress([x["query"]], [[d]])[1].item() for d in documents]
        best = sorted(range(3), key=lambda i: -relevance[i])[:2]
        for mode, kept in (("reranked", [documents[i] for i in best]), ("compressed", documents[:2])):
            assert row[mode]["answer"] == model.generate([x["query"]], [kept])[0]
        assert row["full"]["answer"] == model.generate([x["query"]], [documents[:2]], mode="full")[0]
        assert row["references"] == x["answers"] and row["query"] == x["query"]
        order = dict(given=[3, 2, 1], reranked=relevance, teacher=x["reranking_scores"])
        for name, values in order.items():
            runs[name][x["_id"]] = {d["_id"].split("#")[0]: float(s) for d, s in zip(documents, values)}
    for name, ranked in runs.items():
        found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(ranked)
        assert len(found) == 5
        assert scores["ndcg@10"][name] == pytest.approx(np.mean([x["ndcg_cut_10"] for x in found.values()]), abs=1e-4)
    assert len({row["compressed"]["answer"] for row in said}) > 3 and len({row["compressed"]["em"] for row in said}) == 2
    assert sum(row["compressed"]["answer"] != row["reranked"]["answer"] for row in said) > 2
    for mode in ("compressed", "reranked", "full", "none"):
        f1 = [row[mode]["f1"] for row in said]
        assert scores[mode]["f1"] == pytest.approx(np.mean(f1), abs=1e-4)
        assert scores[mode]["f1_interval"] == pytest.approx(interval(f1), abs=1e-4)
    assert read_qrels(f"{folder}/qrels.tsv") == qrels
    # more candidates than the generator has positions for, of which it reads few
    many = dict(query="who is it?", answers=["stone"], documents=rows[0]["documents"] * 60)
    (folder / "many.jsonl").write_text(json.dumps(many))
    out = run("sample.py", f"--out_dir={ranker}", f"--data={folder}/many.jsonl", "--keep=2", *CPU)
    assert json.loads(out.splitlines()[-1]).keys() == {"compressed", "reranked", "full", "none"}
    # full text too long, some without the teacher's scores: what is left of the scores
    long = [rows[0], rows[1] | dict(documents=rows[1]["documents"] * 20, reranking_scores=None)]
    (folder / "long.jsonl").write_text("".join(json.dumps(x) + "\n" for x in long))
    out = run("sample.py", f"--out_dir={ranker}", f"--data={folder}/long.jsonl", f"--qrels={folder}/qrels.tsv", *CPU)
    scores = json.loads(out.splitlines()[-1])
    assert scores.keys() == {"compressed", "none", "ndcg@10"} and scores["ndcg@10"].keys() == {"given"}
    assert "full        left out: prompt and answer (" in out
    out = run("evaluate.py", f"--out_dir={ranker}", f"--data={folder}/long.jsonl", "--mode=full", *CPU, ok=False)
    assert "prompt and answer (" in out and "left out" not in out


def test_memory_from_a_store(tiny, asked, tmp_path):
    folder, rows, _ = asked
    alone = speaking(tiny("llama"), tmp_path / "out", query_dependent=False)
    corpus = {document_text(d): d for x in rows for d in x["documents"]}
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(d) + "\n" for d in corpus.values()))
    sample = ["sample.py", f"--out_dir={alone}", f"--store={tmp_path}/store", *CPU]
    make = [*sample, f"--compress={tmp_path}/corpus.jsonl", "--shard_size=4", "--batch_size=3"]
    assert f"memory of {len(corpus)} documents" in run(*make)
    model = ScaleDown.from_pretrained(alone)
    store = Store(f"{tmp_path}/store")
    memory = store.memory([x["documents"] for x in rows])  # (B, k, l, d)
    for x, m in zip(rows, memory):
        for i, d in enumerate(x["documents"]):
            torch.testing.assert_close(m[i], model.compress(["any"], [[document_text(d)]])[0][0, 0], atol=1e-5, rtol=1e-4)
    # a shard that is there stays, one that is missing comes back
    shards = sorted(os.listdir(tmp_path / "store"))
    assert len(shards) == -(-len(corpus) // 4) > 1
    os.remove(tmp_path / "store" / shards[1])
    before = os.stat(tmp_path / "store" / shards[0]).st_mtime_ns
    run(*make)
    assert sorted(os.listdir(tmp_path / "store")) == shards
    assert os.stat(tmp_path / "store" / shards[0]).st_mtime_ns == before
    said = []
    for extra in ([], [f"--store={tmp_path}/store"]):
        run("sample.py", f"--out_dir={alone}", *CPU, f"--data={folder}/asked.jsonl",
            f"--answers={tmp_path}/answers.jsonl", *extra)
        said.append(load(f"{tmp_path}/answers.jsonl"))
    assert said[0] == said[1] and len({row["compressed"]["answer"] for row in said[0]}) > 3
    (tmp_path / "other.txt").write_text("Nobody has stored me.")
    assert "has no memory of the document 'Nobody has stored me.'" in run(
        *sample, "--query=who?", f"--docs={tmp_path}/other.txt", ok=False)
    assert "was made of another shard_size" in run(*make, "--shard_size=5", ok=False)
    assert "was made of another corpus" in run(*make[:-3], f"--compress={tmp_path}/other.txt", ok=False)
    with torch.no_grad():
        model.compressor.memory_tokens += 1
    model.save(alone)
    assert "was made of another compressor" in run(*sample, f"--data={folder}/asked.jsonl", ok=False)
    assert "holds no store: evaluate.py --compress=CORPUS" in run(
        *sample, f"--store={tmp_path}/none", f"--data={folder}/asked.jsonl", ok=False)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])  # ChatML, no system role, no template
def test_the_judge_replies_with_a_letter(ranker, asked, tiny, tmp_path, name):
    folder, rows, _ = asked
    tokenizer, model = AutoTokenizer.from_pretrained(tiny(name)), AutoModelForCausalLM.from_pretrained(tiny(name))
    with torch.no_grad():  # it heeds what it reads: not the same letter every time
        for parameter in decoder_layers(model).parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    tokenizer.save_pretrained(tmp_path / "judge")
    model.save_pretrained(tmp_path / "judge")
    out = run("sample.py", f"--out_dir={ranker}", f"--data={folder}/asked.jsonl", f"--judge={tmp_path}/judge", *CPU,
              f"--answers={tmp_path}/answers.jsonl", "--batch_size=4")
    scores, said = json.loads(out.splitlines()[-1]), load(tmp_path / "answers.jsonl")
    grades = []
    for row in (row | dict(mode=mode) for row in said for mode in ("compressed", "full", "none")):
        system = "You grade answers to questions."
        user = (f"Question: {row['query']}\nReference answers: {' / '.join(row['references'])}\nAnswer to grade: "
                f"{row[row['mode']]['answer']}\n\nDoes the answer to grade say what one of the reference answers says? "
                "A: yes. B: in part. C: no. Reply with the letter alone.")
        text = {"llama": f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
                "mistral": f"<s>[INST] {system}\n\n{user} [/INST] ", "gpt2": f"<s>{system}\n\n{user}\n\nAnswer: "}[name]
        whole = [tokenizer(text + letter, add_special_tokens=False).input_ids for letter in "ABC"]
        assert whole[0][:-1] == whole[1][:-1] == whole[2][:-1]
        with torch.no_grad():
            logits = model(torch.tensor([whole[0][:-1]])).logits[0, -1]
        grades.append([1.0, 0.5, 0.0][logits[[ids[-1] for ids in whole]].argmax()])
        assert row[row["mode"]]["judge"] == grades[-1]
    assert len({*grades}) > 1
    assert np.mean(grades) == pytest.approx(np.mean([scores[m]["judge"] for m in ("compressed", "full", "none")]), abs=1e-3)


def test_the_exported_generator_answers_alone(job, trained, tmp_path, monkeypatch):
    _, out_dir, _ = job
    run("sample.py", f"--out_dir={out_dir}/last", f"--export={tmp_path}/generator", *CPU)
    model = ScaleDown.from_pretrained(f"{out_dir}/last")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "generator", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "generator")
    for x in EXAMPLES:
        embeds, mask = model.embed_prompts([x["query"]], [x["documents"]])
        ids = plain.generate(inputs_embeds=embeds[:, mask[0]], max_new_tokens=8, do_sample=False, pad_token_id=0,
                             eos_token_id=model.stop_ids)[0]
        want = model.generate([x["query"]], [x["documents"]])[0]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == want
    assert "is there already" in run("sample.py", f"--out_dir={out_dir}/last", f"--export={tmp_path}/generator", ok=False)

    # its LoRA would count twice
    assert "trained with another generator" in run(
        "sample.py", f"--out_dir={out_dir}/last", f"--generator={tmp_path}/generator", "--query=who?", f"--docs={README}", ok=False)

    # docs/serving.md's script, as it stands, with a stand-in for vLLM
    class LLM:
        def __init__(self, folder, enable_prompt_embeds):
            self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

        def generate(self, prompts, sampling):
            for prompt in prompts:
                ids = self.model.generate(inputs_embeds=prompt["prompt_embeds"][None], max_new_tokens=sampling["max_tokens"],
                                          do_sample=False, pad_token_id=0, eos_token_id=sampling["stop_token_ids"])[0]
                yield SimpleNamespace(outputs=[SimpleNamespace(text=self.tokenizer.decode(ids, skip_special_tokens=True))])

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=dict))
    with open(os.path.join(ROOT, "docs", "serving.md")) as f:
        script = next(part for part in f.read().split("```python\n") if part.startswith("from vllm")).split("```")[0]
    script = script.replace('"out/smollm/best"', f'"{out_dir}/last"').replace('"generator"', f'"{tmp_path}/generator"')
    exec(script, scope := {})
    assert scope["answers"] == model.generate(scope["queries"], scope["documents"])


def test_bad_evaluations(job, trained, asked, tiny, tmp_path):
    _, out_dir, job_folder = job
    folder, rows, _ = asked
    args = ["sample.py", f"--out_dir={out_dir}/last", *CPU]
    data = f"--data={folder}/asked.jsonl"
    assert "belong to the answers of a file" in run(*args, "--judge=x", ok=False)
    assert "goes into --store=FOLDER" in run(*args, "--compress=x", ok=False)
    assert "there is nothing to store" in run(*args, data, f"--store={tmp_path}", ok=False)
    assert "keep must be at least 0" in run(*args, data, "--keep=-1", ok=False)
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq0 d0 1\n")
    assert "qrels.tsv, line 2: not query-id" in run(*args, data, f"--qrels={tmp_path}/qrels.tsv", ok=False)
    (tmp_path / "qrels.tsv").write_text("q99\td0\t1\n")
    assert "judges none of the queries" in run(*args, data, f"--qrels={tmp_path}/qrels.tsv", ok=False)
    (tmp_path / "text.jsonl").write_text(json.dumps({**EXAMPLES[0], "_id": "q99"}))
    assert "answer nothing" in run(*args, data, f"--export={tmp_path}/x", ok=False)
    assert "leave out --compress and --store" in run(*args, f"--store={tmp_path}", f"--export={tmp_path}/x", ok=False)
    assert "x could not be written" in run(*args, f"--export={tmp_path}/qrels.tsv/x", ok=False)
    assert "would overwrite" in run(*args, data, f"--answers={folder}/../{folder.name}/asked.jsonl", ok=False)
    assert "cannot be written" in run(*args, data, f"--answers={folder}", ok=False)
    assert 'a document has no "_id"' in run(*args, f"--data={tmp_path}/text.jsonl", f"--qrels={tmp_path}/qrels.tsv", ok=False)
    assert "--answers=FILE for another place" in run(*args, data, "--answers=/nowhere/answers.jsonl", ok=False)
    assert "no/such/judge" in run(*args, data, "--judge=no/such/judge", ok=False)
    assert "last_/config.json does not exist" in run("evaluate.py", f"--out_dir={tmp_path}/last_", data, ok=False)
    long = [dict(EXAMPLES[0], answers=[" ".join(["stone"] * n)]) for n in (1, 600)]
    jsonl(tmp_path / "long.jsonl", long)
    assert f"cannot judge: question, references and answer of '{EXAMPLES[0]['query']}' take " in run(
        *args, f"--data={tmp_path}/long.jsonl", f"--judge={tiny('llama')}", ok=False)


def test_an_examples_own_relevance_is_not_the_compressors(job, trained, asked, tmp_path):
    folder, rows, _ = asked
    jsonl(tmp_path / "x.jsonl", [dict(x, relevance=number) for number, x in enumerate(rows)])
    said = run("evaluate.py", f"--out_dir={job[1]}/last", f"--data={tmp_path}/x.jsonl", f"--qrels={folder}/qrels.tsv",
               "--mode=none", *CPU)
    assert json.loads(said.splitlines()[-1])["ndcg@10"].keys() == {"given", "teacher"}
