"""train.py and sample.py as a user runs them."""

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import EXAMPLES, ROOT, curve, losses, metrics, run, torchrun
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from configurator import attention_for_training, configure, fast_dtype
from files import file_sha256
from metrics import normalize
from model import ScaleDown, ScaleDownConfig

TEXTS = ["bridge", "stone; red", "the mayor is", "mayor of Loku", "keeps", "near it", "made of facts", "Question"]


def test_training_learns_and_logs(job, trained):
    _, out_dir, _ = job
    rows = metrics(out_dir)
    train = [x for x in rows if "loss" in x]
    evals = [x for x in rows if "val_loss" in x]
    assert [x["step"] for x in train] == list(range(1, 11)) and [x["step"] for x in evals] == [0, 5, 10]
    assert evals[-1]["val_loss"] < 0.8 * evals[0]["val_loss"]
    assert {"em", "f1", "match", "val_reranking"} <= evals[-1].keys()
    x = train[-1]
    assert x["loss"] == pytest.approx(x["generation"] + 0.05 * x["reranking"], rel=1e-4)
    # 10 steps, warm-up over round(0.05 * 10) = 0, at least 1; then linearly down to zero
    assert [x["generator_lr"] for x in train] == pytest.approx([1e-2] + [1e-2 * i / 9 for i in range(9, 0, -1)])
    assert all(x["tokens_per_s"] > x["examples_per_s"] > 0 for x in train)
    assert "0:00:0" in trained.splitlines()[-2] and trained.splitlines()[-2].endswith(" left")
    for folder in (f"{out_dir}/last", f"{out_dir}/best"):
        assert ScaleDown.from_pretrained(folder).config.enable_reranking


def test_a_resumed_run_goes_on_bit_for_bit(job, trained):
    args, out_dir, folder = job
    stopped = str(folder / "stopped")
    # killed when it is about to log step 7: two steps after the checkpoint of step 5
    kill = ("import json, os, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, '.'); dumps = json.dumps\n"
            "json.dumps = lambda x, **k: os._exit(9) if x.get('step') == 7 else dumps(x, **k)\n"
            "exec(compile(open('train.py').read(), 'train.py', 'exec'))")
    done = subprocess.run([sys.executable, "-c", kill, "train.py", *args, f"--out_dir={stopped}"], cwd=ROOT,
                          capture_output=True)
    assert done.returncode == 9 and max(losses(stopped)) == 6
    run("train.py", *args, f"--out_dir={stopped}", "--init_from=resume")
    # as if it had never stopped, dropout and all
    assert curve(stopped) == curve(out_dir)


def test_eval_only_changes_nothing(job, trained):
    args, out_dir, _ = job
    before = {f: os.stat(f"{out_dir}/{f}").st_mtime_ns for f in os.listdir(out_dir)}
    out = run("train.py", *args, f"--out_dir={out_dir}/last", "--init_from=resume", "--eval_only=True")
    losses = {x["step"]: x["val_loss"] for x in metrics(out_dir) if "val_loss" in x}
    assert f"val_loss {losses[10]:.4f}" in out
    assert before == {f: os.stat(f"{out_dir}/{f}").st_mtime_ns for f in os.listdir(out_dir)}
    out = run("train.py", *args, f"--out_dir={out_dir}/best", "--eval_only=True", "--projection_hidden=7")  # of modernbert
    assert f"val_loss {min(losses.values()):.4f}" in out


def test_sample_answers_a_file_in_three_modes(job, trained):
    _, out_dir, folder = job
    # the gold answer of three examples is what the model says in one mode, of two in the next, of one in the last
    model, modes = ScaleDown.from_pretrained(f"{out_dir}/last"), ("compressed", "full", "none")
    rows = []
    for x in (dict(query=f"who is {a} {b}?", documents=[a, b]) for a in "Mara Loku hound river".split() for b in TEXTS):
        says = {m: model.generate([x["query"]], [x["documents"]], mode=m)[0] for m in modes}
        if len({normalize(s) for s in says.values()}) == 3 and len(rows) < 6:
            mode = ["compressed", "full", "none", "compressed", "full", "compressed"][len(rows)]
            rows.append({**x, "answers": ["something else", says[mode]]})
    assert len(rows) == 6
    (folder / "gold.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    out = run("sample.py", f"--out_dir={out_dir}/last", f"--data={folder / 'gold.jsonl'}", "--batch_size=2", "--device=cpu",
              "--dtype=float32")
    scores = json.loads(out.splitlines()[-1])
    for mode, n in (("compressed", 3), ("full", 2), ("none", 1)):
        assert scores[mode]["em"] == pytest.approx(n / 6, abs=1e-4) and f"{mode:10}  exact match {n / 6:.3f}" in out


def test_sample_answers_a_question(job, trained, tmp_path):
    _, out_dir, folder = job
    args = [f"--out_dir={out_dir}/last", "--device=cpu", "--dtype=float32"]
    (tmp_path / "docs.jsonl").write_text('"The bridge is made of stone."\n\n{"title": "Loku", "text": "A town."}\n')
    out = run("sample.py", *args, "--query=what is it?", f"--docs={tmp_path / 'docs.jsonl'}", "--show_memory=True")
    assert "The bridge is made of stone." in out and "Loku\nA town." in out and "relevance" in out
    model = ScaleDown.from_pretrained(f"{out_dir}/last")
    documents = ["The bridge is made of stone.", dict(title="Loku", text="A town.")]
    for mode in ("compressed", "full", "none"):
        n = model.embed_prompts(["what is it?"], [documents], mode)[1].sum().item()
        answer = model.generate(["what is it?"], [documents], mode=mode)[0]
        assert f"{mode:10}  {n:5} positions read by the generator   {answer}\n" in out
    assert sum(x.startswith("document ") for x in out.splitlines()) == 4
    out = run("sample.py", *args, f"--val_data={folder / 'val.jsonl'}")
    assert "teacher" in out


def test_pretraining_and_what_begins_with_it(job, tmp_path):
    args, _, folder = job
    (tmp_path / "text.txt").write_text("\n".join(TEXTS * 9))
    pretrain = [*args, "--task=pretrain", f"--train_data={tmp_path / 'text.txt'}", f"--val_data={tmp_path / 'text.txt'}",
                f"--out_dir={tmp_path / 'pre'}", "--num_documents=1", "--answer_tokens=16", "--max_iters=10"]
    assert "task=pretrain has neither scores to learn" in run("train.py", *pretrain, ok=False)
    pretrain += ["--enable_reranking=False"]
    assert "nor a question to end with" in run("train.py", *pretrain, "--sample_at_end=True", ok=False)
    run("train.py", *pretrain)
    losses = [x["val_loss"] for x in metrics(tmp_path / "pre") if "val_loss" in x]
    assert losses[-1] < losses[0]
    # RR, which pretraining does not know, is new
    begin = [*args, "--max_iters=1", "--generator_lr=0.0", "--compressor_lr=0.0", f"--init_from={tmp_path / 'pre/last'}"]
    run("train.py", *begin, f"--out_dir={tmp_path / 'out'}")
    for name in ("compressor", "adapter_model"):
        before, after = (load_file(f"{tmp_path}/{run}/last/{name}.safetensors") for run in ("pre", "out"))
        assert all(after[key].equal(before[key]) for key in before)
        new = {"compressor.rr_token", "compressor.score_head.weight", "compressor.score_head.bias"}
        assert after.keys() - before.keys() == (new if name == "compressor" else set())
    out = f"--out_dir={tmp_path / 'none'}"
    assert "does not fit this model" in run("train.py", *begin, out, "--num_memory_tokens=3", ok=False)
    assert "init_from is scratch, resume or the folder" in run("train.py", *begin, out, "--init_from=nowhere", ok=False)
    assert "takes query_dependent=True" in run("train.py", *args, out, "--query_dependent=False", ok=False)


def test_another_val_data_is_noticed_and_best_begins_anew(job, trained, tmp_path):
    args, out_dir, folder = job
    kept = shutil.copytree(out_dir, tmp_path / "out")
    (tmp_path / "val.jsonl").write_text(json.dumps({**EXAMPLES[0], "answer": "river river river"}))  # not what it learns
    shutil.copy(folder / "val.jsonl", tmp_path / "same.jsonl")
    same = run("train.py", *args, f"--out_dir={kept}", "--init_from=resume", f"--val_data={tmp_path / 'same.jsonl'}")
    assert "validation is on other examples" not in same
    said = run("train.py", *args, f"--out_dir={kept}", "--init_from=resume", "--max_iters=11",
               f"--val_data={tmp_path / 'val.jsonl'}")
    assert "sha256 of val_data=" in said and "validation is on other examples: best/ is what is best on them" in said
    scores = [x["val_loss"] for x in metrics(kept) if "val_loss" in x]
    assert scores[-1] > min(scores)
    weights = [open(f"{kept}/{name}/compressor.safetensors", "rb").read() for name in ("best", "last")]
    assert weights[0] == weights[1]
    fewer = run("train.py", *args, f"--out_dir={kept}", "--init_from=resume", "--max_iters=11", "--eval_examples=2",
                f"--val_data={tmp_path / 'val.jsonl'}")
    assert "eval_examples=" in fewer and "validation is on other examples" in fewer


def test_best_stays_the_best(job, trained, tmp_path):
    args, out_dir, _ = job
    kept = shutil.copytree(out_dir, tmp_path / "out")
    state = torch.load(f"{kept}/last/optimizer.pt", weights_only=True)
    torch.save({**state, "best_val_loss": 0.01}, f"{kept}/last/optimizer.pt")  # out of reach
    names = sorted({*os.listdir(f"{kept}/last")} - {"SHA256SUMS"})
    (kept / "last/SHA256SUMS").write_text("".join(f"{file_sha256(f'{kept}/last/{name}')}  {name}\n" for name in names))
    # two more evaluations, the second a little better than the first
    run("train.py", *args, f"--out_dir={kept}", "--init_from=resume", "--max_iters=12", "--eval_interval=1",
        "--generator_lr=1e-2")
    evaluated = [x["val_loss"] for x in metrics(kept) if "val_loss" in x][-2:]
    assert evaluated[1] < evaluated[0]
    for old, new, same in (("best", "best", True), ("last", "last", False)):
        old, new = (open(f"{d}/compressor.safetensors", "rb").read() for d in (f"{out_dir}/{old}", f"{kept}/{new}"))
        assert (old == new) == same


def test_in_bfloat16_with_checkpointing_and_so_many_steps(job, tmp_path):
    args, _, _ = job
    run("train.py", *args, f"--out_dir={tmp_path}", "--dtype=bfloat16", "--gradient_checkpointing=True", "--max_iters=3",
        "--compressor_lr=1e-3", "--generator_lr=1e-3")
    exact = str(tmp_path / "float32")
    run("train.py", *args, f"--out_dir={exact}", "--max_iters=3", "--compressor_lr=1e-3", "--generator_lr=1e-3")
    assert losses(tmp_path) == pytest.approx(losses(exact), rel=0.05) and len(losses(exact)) == 3
    run("train.py", *args, f"--out_dir={tmp_path / 'mean'}", "--max_iters=3", "--compressor_lr=1e-3", "--generator_lr=1e-3",
        "--log_interval=2")
    of = losses(exact)  # a line tells the mean since the line before it
    assert losses(tmp_path / "mean") == pytest.approx({2: (of[1] + of[2]) / 2, 3: of[3]})


def test_the_scripts_defaults_are_the_models():
    with open(os.path.join(ROOT, "train.py")) as f:
        settings = {n.targets[0].id: n.value for n in ast.parse(f.read()).body
                    if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}
    for field in dataclasses.fields(ScaleDownConfig):
        assert ast.literal_eval(settings[field.name]) == field.default, field.name


def test_bad_input_to_train(job, tmp_path):
    args, _, folder = job
    fresh = [*args, f"--out_dir={tmp_path / 'out'}"]
    assert "unknown setting 'batchsize', did you mean 'batch_size'?" in run("train.py", "--batchsize=3", ok=False)
    assert "nowhere.jsonl does not exist" in run("train.py", *fresh, "--train_data=nowhere.jsonl", ok=False)
    (tmp_path / "broken.jsonl").write_text(json.dumps(EXAMPLES[0]) + "\n" + json.dumps(EXAMPLES[0])[:-9] + "\n")
    assert "broken.jsonl, line 2: broken JSON" in run("train.py", *fresh, f"--val_data={tmp_path / 'broken.jsonl'}", ok=False)
    assert "num_layers=9, but" in run("train.py", *fresh, "--num_layers=9", ok=False)
    assert "no/such/model" in run("train.py", *fresh, "--generator=no/such/model", ok=False)
    assert "device is cpu, cuda" in run("train.py", *fresh, "--device=abacus", ok=False)
    assert "compressor_lr must be at least 0, not -0.1" in run("train.py", *fresh, "--compressor_lr=-0.1", ok=False)
    for wrong in "--beta2=1.0", "--warmup_ratio=500":
        assert "beta1 and beta2 must be less than 1, warmup_ratio (of all steps) at most 1" in run("train.py", *fresh, wrong, ok=False)
    for name in "lora_alpha", "projection_hidden":
        assert f"{name} must be at least 1, not 0" in run("train.py", *fresh, f"--{name}=0", ok=False)
    assert "takes --table=rate and no rows" in run("experiments.py", "--table=rate", "--rows=2", f"--plot={tmp_path}", ok=False)
    assert "compressor_type is n_layers, modernbert or module.Class" in run("train.py", *fresh, "--compressor_type=zip", ok=False)
    assert "holds no checkpoint" in run("train.py", *fresh, "--init_from=resume", ok=False)
    assert "does not divide among 3 processes" in torchrun(3, "train.py", *fresh, ok=False)
    assert "fsdp=True takes several processes" in run("train.py", *fresh, "--fsdp=True", ok=False)
    assert "takes torch-neuronx on PyTorch/XLA: pip install -r requirements-trainium.txt" in run(
        "train.py", *fresh, "--device=trainium", ok=False)
    assert "Trn2 or Trn3 instance and TorchNeuron" in run("train.py", *fresh, "--device=neuron", ok=False)
    assert not (tmp_path / "out").exists()
    said = run("train.py", *fresh, "--num_memory_tokens=160", "--doc_tokens=9", "--query_tokens=9", ok=False)
    assert "longer than the generator's 512 positions" in said and "no checkpoint was written yet" in said
    (tmp_path / "file").write_text("")
    assert "the folder could not be written: " in run("train.py", *args, f"--out_dir={tmp_path}/file/out", ok=False)
    assert "file is not a folder" in run("train.py", *args, f"--out_dir={tmp_path}/file", ok=False)


def test_bad_checkpoints(job, trained, tiny, tmp_path):
    args, out_dir, _ = job
    resume = [*args, "--init_from=resume"]
    assert "last was trained with num_memory_tokens=2 (now 4)" in run("train.py", *resume, "--num_memory_tokens=4", ok=False)
    assert "another generator" in run("train.py", *resume, f"--generator={tiny('qwen2')}", ok=False)
    assert "another generator" in run("sample.py", f"--out_dir={out_dir}/last", f"--generator={tiny('qwen2')}",
                                      "--query=who?", "--docs=LICENSE", ok=False)


def test_bad_questions(job, trained, tmp_path):
    _, out_dir, _ = job
    args = ["sample.py", f"--out_dir={out_dir}/last", "--device=cpu"]
    (tmp_path / "empty.txt").write_text("\n")
    assert "empty.txt holds no documents" in run(*args, "--query=who?", f"--docs={tmp_path / 'empty.txt'}", ok=False)
    assert "none.txt does not exist" in run(*args, "--query=who?", "--docs=none.txt", ok=False)
    assert "go together" in run(*args, "--query=who?", ok=False)
    assert "empty query" in run(*args, "--query= ", "--docs=LICENSE", ok=False)
    (tmp_path / "bad.jsonl").write_text('{"title": "no text"}\n')
    assert "bad.jsonl, line 1" in run(*args, "--query=who?", f"--docs={tmp_path / 'bad.jsonl'}", ok=False)
    assert "batch_size must be at least 1" in run(*args, "--data=LICENSE", "--batch_size=0", ok=False)
    assert "leave out --query" in run(*args, "--query=who?", "--docs=LICENSE", "--data=LICENSE", ok=False)
    (tmp_path / "latin.txt").write_bytes("Café".encode("latin-1"))
    assert "latin.txt, line 1: no UTF-8" in run(*args, "--query=who?", f"--docs={tmp_path / 'latin.txt'}", ok=False)
    (tmp_path / "null.jsonl").write_text('{"query": "who?", "documents": ["stone"], "answers": null}\n')
    assert "gold" not in run(*args, f"--val_data={tmp_path / 'null.jsonl'}")
    assert "holds no checkpoint" in run("sample.py", "--out_dir=nowhere", "--query=who?", "--docs=LICENSE", ok=False)




# ---- where and how a script is started

def start(*args, cwd, env=None):
    done = subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, env={**os.environ, **(env or {})})
    return done.returncode, (done.stdout + done.stderr).decode()


def test_a_run_started_from_another_folder(job, tiny, tmp_path):
    args, _, folder = job
    os.symlink(tiny("llama"), tmp_path / "gen")
    mine = [a for a in args if not a.startswith("--generator=")] + ["--generator=gen", "--max_iters=2", "--out_dir=out"]
    env = dict(RANK="0", LOCAL_RANK="0")  # of another launcher
    code, said = start(f"{ROOT}/train.py", "config/rerank.py", *mine, "--sample_at_end=True", cwd=tmp_path, env=env)
    assert code == 0 and "positions read by the generator" in said, said
    # the generator's path counts from there, wherever one asks from
    (tmp_path / "x").mkdir()
    code, said = start(f"{ROOT}/sample.py", "--out_dir=../out/best", f"--val_data={folder}/val.jsonl", "--device=cpu",
                       "--dtype=float32", cwd=tmp_path / "x")
    assert code == 0 and "Traceback" not in said, said
    code, said = start(f"{ROOT}/train.py", *mine, "--train_data=data/wiki/train.jsonl", cwd=tmp_path)
    assert code == 1 and said.strip().endswith("python prepare.py --dataset=wiki --corpus=FILE --queries=FILE makes it")


def test_a_generator_that_is_nowhere(job, tiny, tmp_path):
    args, _, _ = job
    mine = [a for a in args if not a.startswith("--generator=")]
    os.symlink(tiny("llama"), tmp_path / "gen")
    (tmp_path / "x").mkdir()
    run(f"{ROOT}/train.py", *mine, "--generator=gen", "--max_iters=1", "--out_dir=out", cwd=tmp_path)
    os.rename(tmp_path / "gen", tmp_path / "x" / "moved")
    ask = [f"{ROOT}/sample.py", "--out_dir=out/best", next(a for a in args if "val_data" in a), "--device=cpu", "--dtype=float32"]
    code, said = start(*ask, cwd=tmp_path)
    assert code == 1 and said.startswith("error: gen cannot be loaded: ") and "--generator=FOLDER" in said and said.count("\n") == 1
    run(*ask, "--generator=x/moved", cwd=tmp_path)


def refused(tmp_path, error, patch, *args, ok):
    """A script on a system that refuses with an error what `patch` names."""
    (tmp_path / "refused.py").write_text(
        f"import errno, fcntl, os, runpy, stat, sys\ndef refuse(*args, **kwargs): raise OSError({error}, 'not here')\n"
        f"{patch}\nsys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    return run(tmp_path / "refused.py", *args, ok=ok)


FOLDERS = "sync = os.fsync; os.fsync = lambda fd: refuse() if stat.S_ISDIR(os.fstat(fd).st_mode) else sync(fd)"


@pytest.mark.parametrize("patch", ["fcntl.flock = refuse", "os.chmod = refuse", FOLDERS], ids=["lock", "chmod", "folders"])
def test_file_systems_that_can_do_less(job, tmp_path, patch):
    """No flock (Lustre), no permissions (SMB, exFAT), no flush of a folder: the run goes on, with its best/ and all."""
    said = refused(tmp_path, "errno.ENOTSUP", patch, "train.py", *job[0], "--max_iters=2", "--eval_interval=1",
                   f"--out_dir={tmp_path / 'out'}", ok=True)
    assert ("cannot be locked (not here)" in said) == ("flock" in patch)
    for name in ("last", "previous", "best"):
        ScaleDown.from_pretrained(tmp_path / "out" / name)


def test_a_folder_that_is_locked_or_damaged_is_not_used(job, trained, tmp_path):
    """A lock that another process holds is reported as EACCES by some systems; a flush that failed is no flush."""
    for error, patch, says in (("errno.EACCES", "fcntl.flock = refuse", "another train.py is at work"),
                               ("errno.EIO", FOLDERS, "could not be written")):
        assert says in refused(tmp_path, error, patch, "train.py", *job[0], "--max_iters=1", f"--out_dir={tmp_path / 'out'}", ok=False)
        shutil.rmtree(tmp_path / "out")


def test_scores_that_drown_the_answers_are_said(job, tmp_path):
    args, _, _ = job
    for scale in (1.0, 30.0):
        rows = [{**x, "reranking_scores": [scale * s for s in x["reranking_scores"]]} for x in EXAMPLES]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
        said = run("train.py", *args, f"--train_data={tmp_path / 'train.jsonl'}", "--max_iters=1", f"--out_dir={tmp_path}/{scale}")
        assert ("reranking_scores are large: they begin with a loss of" in said) == (scale > 1)
        if scale > 1:  # by hand, and of the size that the first step has
            mean = 0.05 * 900 * sum(s * s for x in EXAMPLES for s in x["reranking_scores"]) / 3
            assert f"a loss of {mean:,.0f}," in said
            assert metrics(tmp_path / str(scale))[1]["reranking"] * 0.05 > mean / 3


def test_text_that_is_not_utf8_in_a_setting(tmp_path):
    for script, setting in (("train.py", b"--out_dir=\xe9t\xe9"), ("sample.py", b"--docs=\xff.txt"), ("train.py", b"caf\xe9.py")):
        code, said = start(f"{ROOT}/{script}", os.fsdecode(setting), cwd=tmp_path)
        assert code == 1 and said.startswith("error: ") and "is not UTF-8" in said and "Traceback" not in said, said


def test_config_files(tmp_path):
    settings = dict(batch_size=16, max_iters=0, out_dir="out")
    (tmp_path / "base.py").write_text("batch_size = 3\nmax_iters = 5\n")
    for text, expected in (("from base import *\nmax_iters = 6", (3, 6)), ("import base\nbatch_size = base.max_iters", (5, 0)),
                           ("\ufeffbatch_size = 2", (2, 0)), ("batch_size = 2\r\rmax_iters: int = 4\r", (2, 4)),
                           ("import os\nout_dir = os.path.dirname(__file__)", (16, 0))):
        (tmp_path / "mine.py").write_bytes(text.encode())
        got = configure(dict(settings), [str(tmp_path / "mine.py")])
        assert (got["batch_size"], got["max_iters"]) == expected
    for text, line in (("max_iters = 1\nbatch_size: 2", 2), ("out_dir: 'x'", 1), ("batch_size: int", 1)):
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(SystemExit, match=f"mine.py, line {line}: .* sets nothing"):
            configure(dict(settings), [str(tmp_path / "mine.py")])
    for name in "ab":  # two neighbours of the same name
        (tmp_path / name).mkdir()
        (tmp_path / name / "base.py").write_text(f"{dict(a='batch_size', b='max_iters')[name]} = 9")
        (tmp_path / name / "mine.py").write_text("from base import *")
    got = configure(dict(settings), [str(tmp_path / name / "mine.py") for name in "ab"])
    assert (got["batch_size"], got["max_iters"]) == (9, 9)
    assert configure(dict(settings), ["--out_dir=~/x"])["out_dir"] == os.path.expanduser("~/x")


def test_bfloat16_is_the_default_where_it_is_faster(monkeypatch):
    for amx, bf16, cpu in ((False, False, "float32"), (True, False, "bfloat16"), (False, True, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda bf16=bf16: bf16)
        assert [fast_dtype(d) for d in ("cpu", "cuda:1", "gpu", "trainium", "neuron")] == [cpu] + ["bfloat16"] * 4
        assert fast_dtype("mps") == fast_dtype("xla") == "float32"


def test_attention_of_training_in_bfloat16_on_a_cpu(job, tmp_path):
    q = torch.zeros(1, 1, 8, 16, dtype=torch.bfloat16, requires_grad=True)
    sizes = dict(query_tokens=100, answer_tokens=24, num_memory_tokens=8)
    try:
        for device, dtype, k, more, choice in (
                ("cpu", "bfloat16", 100, dict(doc_tokens=900), "MATH"), ("cpu", "bfloat16", 101, dict(doc_tokens=900), "FLASH_ATTENTION"),
                ("cpu", "bfloat16", 1, dict(doc_tokens=901), "FLASH_ATTENTION"), ("cpu", "bfloat16", 7, dict(mode="full"), "FLASH_ATTENTION"),
                ("cpu", "float32", 1, {}, "FLASH_ATTENTION"), ("cuda", "bfloat16", 1, {}, "FLASH_ATTENTION")):
            attention_for_training(device, dtype, ScaleDownConfig(**sizes, **dict(doc_tokens=200) | more), k)
            assert torch._fused_sdp_choice(q, q, q) == getattr(torch.nn.attention.SDPBackend, choice).value
    finally:
        attention_for_training("cpu", "float32", ScaleDownConfig(), 1)
    look = ("import sys, torch; sys.argv = sys.argv[1:]; sys.path.insert(0, '.'); clip = torch.nn.utils.clip_grad_norm_\n"
            "torch.nn.utils.clip_grad_norm_ = lambda *a: print('fused', torch.backends.cuda.flash_sdp_enabled()) or clip(*a)\n"
            "exec(compile(open('train.py').read(), 'train.py', 'exec'))")
    args, _, _ = job
    done = subprocess.run([sys.executable, "-c", look, "train.py", *args, f"--out_dir={tmp_path}", "--dtype=bfloat16", "--max_iters=1"],
                          cwd=ROOT, capture_output=True, text=True)
    assert "fused False" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("mode, n_layers", [("full", 1), pytest.param("compressed", 4, marks=pytest.mark.slow)])
def test_compiled_training_on_batches_of_other_lengths(job, tiny, tmp_path, mode, n_layers):
    """Inductor's backward pass once took views for ones of another length, at the third batch."""
    generator = shutil.copytree(tiny("llama"), tmp_path / "generator")
    model = AutoModelForCausalLM.from_pretrained(generator)
    del model.model.layers[n_layers:]
    model.config.num_hidden_layers = n_layers
    model.save_pretrained(generator)
    args, _, folder = job
    rows = [{**x, "query": x["query"] + " river" * (3 * i)} for i, x in enumerate(EXAMPLES * 4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    args = [*args, f"--train_data={tmp_path / 'train.jsonl'}", "--enable_reranking=False", "--max_iters=5", "--eval_interval=9",
            "--eval_samples=0", "--gradient_accumulation_steps=1", "--lora_dropout=0.0", f"--generator={generator}",
            f"--mode={mode}"]
    run("train.py", *args, f"--out_dir={tmp_path / 'plain'}")
    run("train.py", *args, f"--out_dir={tmp_path / 'compiled'}", "--compile=True")
    for step, loss in losses(tmp_path / "plain").items():
        assert losses(tmp_path / "compiled")[step] == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("script", ["train.py", "prepare.py", "sample.py", "evaluate.py", "compare.py", "bench.py",
                                    "experiments.py", "import_oscar.py", "serve.py", "bench_serve.py"])
def test_help_prints_every_setting(script):
    said = (run(script, "--seed=7", *["config/toy.py"] * (script == "train.py"), "--help")
            if script in ("train.py", "sample.py", "evaluate.py", "experiments.py") else run(script, "-h"))
    with open(os.path.join(ROOT, script)) as f:
        source = ast.parse(f.read())
    assert said.startswith(ast.get_docstring(source, clean=False))
    names = [n.targets[0].id for n in source.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
    last = next(name for name in ("device", "seed", "resamples", "repeats", "compressor_model") if name in names)
    names = names[:names.index(last) + 1]
    assert len(names) >= (4 if script in ("compare.py", "import_oscar.py") else 6) and all(f"\n  --{name}=" in said for name in names)
    if script == "train.py":  # as the config and the command leave them, with their comments
        assert "--generator=data/toy/llm" in said and "--seed=7" in said and "# optimisation" in said
        assert re.search(r"--max_iters=0 +steps; 0 = as many as the epochs take\n", said)
