"""mode=full and none: the generator's LoRA trained on the text itself, to compare with; and compare.py."""

import json

import pytest
import torch
from conftest import EXAMPLES, losses, metrics, run, torchrun

from lora import layers
from model import ScaleDown, ScaleDownConfig
from modes import Modes

QUESTIONS = [x["query"] for x in EXAMPLES], [x["documents"] for x in EXAMPLES]


def build(generator, mode, **settings):
    torch.manual_seed(0)
    model = ScaleDown(ScaleDownConfig(generator=generator, mode=mode, answer_tokens=8, **settings)).eval()
    with torch.no_grad():
        for _, m in layers(model.generator):
            m.lora_B.normal_(std=0.5)
    return model


@pytest.mark.parametrize("mode", ["full", "none"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_loss_and_answers_are_transformers_own_on_the_text(tiny, name, mode):
    model = build(tiny(name), mode)
    t, total, tokens = model.tokenizer, 0, 0
    for x in EXAMPLES:
        text, = model.full_prompts([x["query"]], [x["documents"]], mode)
        prompt, answer = model.prompt.ids(text), model.prompt.answer_ids([x["answer"]], 8)[0]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        total += model.generator(input_ids=torch.tensor([prompt + answer]), labels=labels).loss * len(answer)
        tokens += len(answer)
    loss, _ = model(model.collate(EXAMPLES, num_documents=4))
    torch.testing.assert_close(loss, total / tokens, atol=1e-5, rtol=1e-5)
    loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    assert model.modes == ["fine-tuned", "full", "none"]
    tuned, plain = model.generate(*QUESTIONS), model.generate(*QUESTIONS, mode=mode)
    no_tokens = [*range(len(t), model.generator.config.vocab_size)] or None  # rows of the head without one
    for query, documents, answer in zip(*QUESTIONS, tuned):
        ids = t(model.full_prompts([query], [documents], mode), return_tensors="pt", add_special_tokens=False).input_ids
        out = model.generator.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=model.stop_ids,
                                       pad_token_id=0, suppress_tokens=no_tokens)
        assert answer == t.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip()
    assert tuned != plain
    cut = [docs[:1] for docs in QUESTIONS[1]]
    assert model.generate(*QUESTIONS, num_documents=1) == model.generate(QUESTIONS[0], cut)
    assert (model.generate(QUESTIONS[0], cut) != tuned) == (mode == "full")
    with pytest.raises(ValueError, match=f"trained with mode={mode} makes no memory"):
        model.compress(*QUESTIONS)


def test_settings_that_take_a_compressor(tiny):
    for settings, why in ((dict(mode="half"), "mode is compressed, full or none, not 'half'"),
                          (dict(mode="full", enable_reranking=True), "take a compressor, which mode=full has not"),
                          (dict(mode="none", compressor_lora_r=4), "take a compressor, which mode=none has not")):
        with pytest.raises(ValueError, match=why):
            ScaleDown(ScaleDownConfig(generator=tiny("llama"), **settings))
    with pytest.raises(ValueError, match="mode is fine-tuned, full or none, not 'compressed'"):
        build(tiny("llama"), "full").generate(*QUESTIONS, mode="compressed")


def test_a_run_on_the_text_is_resumed_shared_out_and_evaluated(job, tmp_path):
    args, _, folder = job
    args = [*args, "--mode=full", "--enable_reranking=False", "--max_iters=10", "--lora_dropout=0.0"]
    run("train.py", *args, f"--out_dir={tmp_path / 'one'}")
    torchrun(2, "train.py", *args, f"--out_dir={tmp_path / 'two'}")
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert a == pytest.approx(b, abs=1e-5) and len(a) == 10 and a[10] < a[1]
    run("train.py", *args, f"--out_dir={tmp_path / 'part'}", "--max_iters=5")
    said = run("train.py", *args, f"--out_dir={tmp_path / 'part'}", "--init_from=resume", "--max_iters=10")
    assert "not as in" in said and max(losses(tmp_path / "part")) == 10
    assert "was trained with mode=full" in run("train.py", *args, f"--out_dir={tmp_path / 'one'}", "--init_from=resume",
                                               "--mode=none", "--max_iters=11", ok=False)
    one = [f"--out_dir={tmp_path / 'one/best'}", f"--data={folder / 'val.jsonl'}", "--device=cpu", "--dtype=float32"]
    scores = json.loads(run("evaluate.py", *one).splitlines()[-1])
    assert scores.keys() == {"fine-tuned", "full", "none"}
    assert json.loads(run("evaluate.py", *one, "--mode=none").splitlines()[-1]) == {"none": scores["none"]}
    assert "is one of" in run("evaluate.py", *one, "--mode=compressed", ok=False)
    out = run("sample.py", f"--out_dir={tmp_path / 'one/best'}", f"--val_data={folder / 'val.jsonl'}", "--device=cpu", "--dtype=float32")
    assert "\nfine-tuned" in out
    assert "it compresses nothing" in run("bench.py", f"--runs={tmp_path / 'one'}", ok=False)
    for more, why in ((["--store=x"], "makes no memory to store"), (["--show_memory=True"], "it has no memory to show"), (["--keep=2"], "without enable_reranking")):
        assert why in run("sample.py", f"--out_dir={tmp_path / 'one/best'}", f"--val_data={folder / 'val.jsonl'}", *more, ok=False)
    assert "mode are for the run that begins with it" in run("train.py", *args, "--task=pretrain", ok=False)
    said = metrics(tmp_path / "one")[-1]
    assert said["val_loss"] != said["val_loss_shuffled"]


@pytest.mark.parametrize("compressor", ["n_layers", "pisco.PISCOCompressor"])
def test_the_lora_is_merged_where_no_mode_is_to_come_without_it(tiny, tmp_path, compressor):
    """But PISCO's compressor, which reads with the generator's layers, needs them without it."""
    build(tiny("llama"), "compressed", compressor_type=compressor, num_layers=2,
          query_dependent=compressor == "n_layers").save(tmp_path)
    answers = {}
    for mode in "", "compressed", "full":
        modes = Modes(tmp_path, "cpu", "float32", mode=mode)
        merged = {m.merged for _, m in layers(modes.model.generator)}
        assert merged == {mode == "compressed" and compressor == "n_layers"}
        for name in modes.names:
            answers.setdefault(name, []).append(modes.answer(name, *modes.reads(EXAMPLES, name), 6))
    assert len(answers) == 3 and all(a == rows[0] for rows in answers.values() for a in rows)


def test_only_the_lora_learns_on_the_text(tiny):
    model = build(tiny("llama"), "full")
    assert not [*model.compressor.parameters()] and not model.sep.requires_grad
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_a_compressor_begins_next_to_a_lora_trained_on_the_text(tiny, tmp_path):
    text = build(tiny("llama"), "full")
    compressed = build(tiny("llama"), "compressed", num_layers=2, compressor_norm=False)  # which text knows nothing of
    text.save(tmp_path / "text")
    with torch.no_grad():
        for _, m in layers(compressed.generator):
            m.lora_B.zero_()
    compressor = {name: p.clone() for name, p in compressed.compressor.named_parameters()}
    compressed.load(tmp_path / "text")
    for (_, a), (_, b) in zip(layers(text.generator), layers(compressed.generator)):
        assert torch.equal(a.lora_A, b.lora_A) and torch.equal(a.lora_B, b.lora_B)
    assert all(torch.equal(p, compressor[name]) for name, p in compressed.compressor.named_parameters())
    compressed.save(tmp_path / "compressed")
    text.load(tmp_path / "compressed")  # and the other way round
    with pytest.raises(ValueError, match="lora_alpha"):
        build(tiny("llama"), "compressed", num_layers=2, lora_alpha=8).load(tmp_path / "text")


def test_compare_pairs_the_same_questions(tmp_path):
    def answers(name, ways):
        (tmp_path / name).mkdir()
        rows = [dict(_id=f"{'nq' if i < 30 else 'c'}{i}", query=f"q{i}", references=["x"])
                | {way: dict(answer="", em=0.0, f1=f(i), match=0.0) for way, f in ways.items()} for i in range(50)]
        (tmp_path / name / "best.x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name / "best.x.jsonl")
    a = answers("a", dict(compressed=lambda i: i % 2, full=lambda i: 0.5))
    b = answers("b", dict(compressed=lambda i: min(1, i % 2 + 0.1), full=lambda i: 0.5))
    out = run("compare.py", f"--answers={a},{b}", "--groups=nq,c")
    assert "all (50 questions)" in out and "nq.. (30 questions)" in out and "c.. (20 questions)" in out
    assert out.count(f"{b} full") == 0 and out.count(f"{a} full") == 3  # the plain LLM's answers are shown once
    line, = (x for x in out.split("nq..")[0].splitlines() if x.startswith(f"{b} compressed"))
    assert "F1 0.550" in line and "f1 +0.050 [+0.0" in line and line.endswith("p = 0.0001")
    line, = (x for x in out.split("nq..")[0].splitlines() if x.startswith(f"{a} full"))
    assert "f1 +0.000" in line and line.endswith("p = 1.0000")
    same = answers("same", dict(compressed=lambda i: i % 2))
    assert run("compare.py", f"--answers={a},{same}").count(f"{same} compressed") == 1  # another checkpoint's are shown
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text("{}\n{\n")
    (tmp_path / "c.jsonl").write_text(json.dumps(dict(query="another", references=[])) + "\n")
    with open(a) as f:
        (tmp_path / "d.jsonl").write_text(f.read().replace('["x"]', '["y"]', 1))
    for args, why in (([f"--answers={a},{tmp_path / 'c.jsonl'}"], "has answers to other questions than"),
                      ([f"--answers={a},{tmp_path / 'd.jsonl'}"], "d.jsonl has scores against other references than"),
                      ([f"--answers={a}", "--score=judge"], "is no file of answers by evaluate.py with a judge in every line"),
                      ([f"--answers={a}", "--score=answer"], "score is f1, em, match or judge, not 'answer'"),
                      ([f"--answers={tmp_path / 'empty.jsonl'}"], "is no file of answers"),
                      ([f"--answers={tmp_path / 'broken.jsonl'}"], "broken.jsonl, line 2: broken JSON"),
                      ([f"--answers={a}", "--groups=z"], "no question has an _id that begins with z"),
                      ([], "--answers=FILE"), ([f"--answers={tmp_path / 'none'}"], "No such file")):
        assert why in run("compare.py", *args, ok=False)
