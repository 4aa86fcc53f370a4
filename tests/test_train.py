"""train.py in several processes, and runs that are stopped, killed, damaged or fed with rubbish."""

import fcntl
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, ROOT, curve, losses, metrics, run, torchrun
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from flops import StepFlops
from model import ScaleDown, ScaleDownConfig

FILES = ("adapter_model.safetensors", "compressor.safetensors", "config.json", "adapter_config.json", "optimizer.pt")


@pytest.fixture(scope="module")
def small(job, tmp_path_factory):
    """Arguments of 20 steps of 8 different examples each, with learning rates at which float32 stays comparable."""
    folder = tmp_path_factory.mktemp("small")
    rows = [{**EXAMPLES[i % 3], "query": f"{EXAMPLES[i % 3]['query']} {i}"} for i in range(50)]
    (folder / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    return [*job[0], f"--train_data={folder}/train.jsonl", "--gradient_accumulation_steps=4", "--max_iters=20",
            "--eval_interval=10", "--compressor_lr=2e-4", "--generator_lr=2e-4", "--lora_dropout=0.0"], folder


@pytest.fixture(scope="module")
def one_process(small):
    args, folder = small
    run("train.py", *args, f"--out_dir={folder}/one")
    return f"{folder}/one"


def weights(checkpoint):
    return {name: t for file in FILES[:2] for name, t in load_file(f"{checkpoint}/{file}").items()}


def assert_same_training(a, b):
    assert len(metrics(a)) == len(metrics(b)) == 23
    for x, y in zip(curve(a), curve(b)):
        assert x == pytest.approx(y, abs=1e-5)
    ours, theirs = weights(f"{a}/last"), weights(f"{b}/last")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0, msg=name)


COUNT_REDUCTIONS = """
import os, sys, torch, torch.nn.parallel
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
sys.argv = sys.argv[1:]; sys.path.insert(0, "."); calls = []
class Counted(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, lambda _, bucket: calls.append(bucket.buffer().numel()) or allreduce_hook(None, bucket))
torch.nn.parallel.DistributedDataParallel = Counted
torch.distributed.destroy_process_group = lambda: print(
    "exchanged", sum(calls), "of", sum(p.numel() for p in parameters)) if rank == 0 else None
exec(compile(open("train.py").read(), "train.py", "exec"))
"""


def test_two_processes_train_as_one(small, one_process):
    args, folder = small
    (folder / "counted.py").write_text(COUNT_REDUCTIONS)
    out = torchrun(2, f"{folder}/counted.py", "train.py", *args, f"--out_dir={folder}/ddp")
    assert_same_training(f"{folder}/ddp", one_process)
    # every gradient travels once a step, though a step has two forward passes in each process
    exchanged, parameters = (int(x) for x in out.splitlines()[-1].split()[1::2])
    assert exchanged == 20 * parameters


def test_fsdp_trains_as_one_and_its_checkpoint_is_the_same(small, one_process):
    args, folder = small
    out = f"{folder}/fsdp"
    torchrun(2, "train.py", *args, f"--out_dir={out}", "--fsdp=True", "--gradient_checkpointing=True")
    assert_same_training(out, one_process)
    # one process goes on where two with FSDP2 have stopped
    for folder in (out, one_process):
        shutil.copytree(folder, f"{folder}.on")
        run("train.py", *args, f"--out_dir={folder}.on", "--init_from=resume", "--max_iters=24")
    steps = [24, 24]
    assert [max(losses(f"{d}.on")) for d in (out, one_process)] == steps
    for x, y in zip(curve(f"{out}.on"), curve(f"{one_process}.on")):
        assert x == pytest.approx(y, abs=1e-5)
    # and two with FSDP2 where one has, with a generator in bfloat16, but not what is trained
    shutil.copytree(one_process, f"{out}.back")
    said = torchrun(2, "train.py", *args, f"--out_dir={out}.back", "--init_from=resume", "--max_iters=24", "--fsdp=True",
                    "--dtype=bfloat16")
    assert "dtype=float32 (now bfloat16)" in said and "max_iters=20 (now 24)" in said and "fsdp=False (now True)" in said
    assert losses(f"{out}.back") == pytest.approx(losses(f"{one_process}.on"), rel=0.02)
    assert losses(f"{out}.back") != losses(f"{one_process}.on")
    state = torch.load(f"{out}.back/last/optimizer.pt", weights_only=True)["optimizer"]["state"]
    kept = [*weights(f"{out}.back/last").values(), *(t for moments in state.values() for t in moments.values())]
    assert {t.dtype for t in kept} == {torch.float32}


def test_another_split_of_the_same_batch_goes_on(small, one_process, tmp_path):
    args, _ = small
    for name, split in (("a", []), ("b", ["--batch_size=4", "--gradient_accumulation_steps=2", "--eval_interval=3"])):
        shutil.copytree(one_process, tmp_path / name)
        run("train.py", *args, f"--out_dir={tmp_path / name}", "--init_from=resume", "--max_iters=24", *split)
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert a == pytest.approx(b, abs=1e-5) and max(a) == 24


def start(*args, **kwargs):
    return subprocess.Popen([sys.executable, *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "PYTHONUNBUFFERED": "1"}, **kwargs)


def same_files(a, b):
    for name in FILES[:4]:
        with open(f"{a}/{name}", "rb") as f, open(f"{b}/{name}", "rb") as g:
            assert f.read() == g.read(), name
    a, b = (torch.load(f"{x}/optimizer.pt", weights_only=True) for x in (a, b))
    a, b = ([t for s in x["optimizer"]["state"].values() for t in s.values()] for x in (a, b))
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_a_resumed_run_goes_on_in_its_run_of_wandb(job, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(
        "from types import SimpleNamespace\n\n\ndef init(id, resume, **_):\n"
        f"    print(id, resume, file=open('{tmp_path}/inits', 'a'))\n    return SimpleNamespace(id=id or 'new')\n\n\n"
        f"def log(entry, step):\n    print(step, file=open('{tmp_path}/steps', 'a'))\n\n\ndef finish():\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    args = ["train.py", *job[0], "--wandb_log=True", "--eval_interval=2", f"--out_dir={tmp_path}/out"]
    run(*args, "--max_iters=2")
    run(*args, "--max_iters=4", "--init_from=resume")
    assert (tmp_path / "inits").read_text() == "None allow\nnew allow\n"
    steps = [int(step) for step in (tmp_path / "steps").read_text().split()]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 4


def resume_if_begun(out_dir):
    return ["--init_from=resume"] * any(os.path.isdir(f"{out_dir}/{name}") for name in ("last", "previous"))


def kill_and_resume(args, out_dir, reference, kills, patience):
    """Kills a run with -9 at random moments, resumes it, kills it again .. and lets it end at last. A run that ends
    before its kill comes is compared, and begun anew."""
    rng, done = random.Random(0), 0
    while done < kills:
        process = start("train.py", *args, f"--out_dir={out_dir}", *resume_if_begun(out_dir))
        while not process.stdout.readline().startswith("trained:"):  # from here on there is something to lose
            assert process.poll() is None
        time.sleep(rng.random() * patience)
        process.kill()
        if process.wait() == -signal.SIGKILL:
            done += 1
        else:
            assert process.returncode == 0 and curve(out_dir) == curve(reference)
            shutil.rmtree(out_dir)
    run("train.py", *args, f"--out_dir={out_dir}", *resume_if_begun(out_dir))
    assert curve(out_dir) == curve(reference)
    same_files(f"{out_dir}/last", f"{reference}/last")


def test_killed_at_random_moments(job, trained, tmp_path):
    args, out_dir, _ = job
    kill_and_resume(args, str(tmp_path / "out"), out_dir, kills=3, patience=1.0)


@pytest.mark.slow
def test_the_toy_killed_at_30_random_moments(tmp_path):
    """config/toy.py, shortened to 60 steps with a checkpoint every 5."""
    if not os.path.exists(os.path.join(ROOT, "data", "toy", "train.jsonl")):
        run("prepare.py", "--dataset=toy")
    args = ["config/toy.py", "--max_iters=60", "--eval_interval=5", "--eval_examples=32", "--eval_samples=8",
            "--log_interval=1", "--sample_at_end=False"]
    run("train.py", *args, f"--out_dir={tmp_path}/reference")
    kill_and_resume(args, str(tmp_path / "out"), str(tmp_path / "reference"), kills=30, patience=20.0)


DIE = """
import os, shutil, sys
sys.argv = sys.argv[1:]; sys.path.insert(0, "."); _calls = int(sys.argv.pop(0))
def dying(f):
    def g(*args, **kwargs):
        global _calls
        _calls -= str(args[0]).startswith(out_dir)
        if _calls == 0:
            os._exit(9)
        return f(*args, **kwargs)
    return g
os.rename, os.replace, shutil.rmtree = map(dying, (os.rename, os.replace, shutil.rmtree))
exec(compile(open("train.py").read(), "train.py", "exec"))
"""


def test_killed_between_the_renames_of_a_checkpoint(job, trained, tmp_path):
    args, out_dir, _ = job
    (tmp_path / "die.py").write_text(DIE)
    out = tmp_path / "out"
    # killed before: the first last/ has its name; the second; the second best/; best/, when it is made up for
    aside = {"best.old", "best.tmp", "previous", "last"}
    for n, left in ((3, {"last.tmp"}), (10, {"best", "previous", "last.tmp"}), (15, aside), (2, aside)):
        assert start(f"{tmp_path}/die.py", str(n), "train.py", *args, f"--out_dir={out}", *resume_if_begun(out)).wait() == 9
        assert {name for name in os.listdir(out) if os.path.isdir(out / name)} == left
    run("train.py", *args, f"--out_dir={out}", *resume_if_begun(out))
    assert curve(out) == curve(out_dir)
    same_files(out / "last", f"{out_dir}/last")
    assert all(torch.equal(t, weights(f"{out_dir}/best")[name]) for name, t in weights(out / "best").items())
    assert {name for name in os.listdir(out) if os.path.isdir(out / name)} == {"best", "previous", "last"}


def test_signals_lose_nothing(job, trained, tmp_path):
    args, out_dir, _ = job
    args = [*args, "--log_interval=7", "--max_iters=60", "--eval_interval=20", f"--out_dir={tmp_path / 'out'}"]
    run("train.py", *args, f"--out_dir={tmp_path / 'undisturbed'}")
    for number, line, more in ((signal.SIGTERM, "step 7,", []), (signal.SIGINT, "step 28,", ["--init_from=resume"])):
        process = start("train.py", *args, *more)
        while not process.stdout.readline().startswith(line):
            assert process.poll() is None
        process.send_signal(number)
        rest = process.stdout.read()
        assert process.wait() == 0 and "Traceback" not in rest
        assert f"{number.name}: finishing the step" in rest
        assert "to go on: the same command with --init_from=resume" in rest.splitlines()[-1]
    assert max(x["step"] for x in metrics(tmp_path / "out")) < 60
    run("train.py", *args, "--init_from=resume")
    assert curve(tmp_path / "out") == curve(tmp_path / "undisturbed")
    same_files(tmp_path / "out/last", tmp_path / "undisturbed/last")


def test_ctrl_c_ends_the_listener_too(job, tmp_path):
    """As in `python train.py | tee log`."""
    args = [*job[0], "--max_iters=60", f"--out_dir={tmp_path / 'out'}"]
    process = start("train.py", *args)
    while not process.stdout.readline().startswith("step 2,"):
        assert process.poll() is None
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    assert "last" in os.listdir(tmp_path / "out") and max(losses(tmp_path / "out")) < 60


def test_sigterm_under_torchrun(small, one_process, tmp_path):
    args = [*small[0], f"--out_dir={tmp_path}/out"]
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *args)
    while not process.stdout.readline().startswith("step 3,"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    process.wait()
    assert "to go on: the same command with --init_from=resume" in rest, rest
    assert 3 <= max(losses(tmp_path / "out")) < 20
    run("train.py", *args, "--init_from=resume")
    assert_same_training(tmp_path / "out", one_process)


def test_a_damaged_checkpoint_gives_way_to_the_previous(job, trained, tmp_path):
    args, out_dir, _ = job
    out = shutil.copytree(out_dir, tmp_path / "out")
    resume = ["train.py", *args, f"--out_dir={out}", "--init_from=resume"]
    content = bytearray((out / "last/compressor.safetensors").read_bytes())
    content[-100] ^= 4
    (out / "last/compressor.safetensors").write_bytes(content)
    with open(out / ".lock", "a") as lock:  # a run that still lives
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert f"another train.py is at work in {out}" in run(*resume, ok=False)
    assert (out / "last/compressor.safetensors").read_bytes() == content and not (out / "damaged").exists()
    early = shutil.copytree(out, tmp_path / "early")
    assert "previous checkpoint is used" in run(*resume, f"--out_dir={early}", "--max_iters=5")
    assert all(torch.equal(t, weights(f"{out_dir}/best")[name]) for name, t in weights(early / "best").items())  # of step 10
    said = run(*resume)
    assert f"{out}/last: compressor.safetensors is not as it was written: the previous checkpoint is used" in said
    assert "at step 5" in said and curve(out) == curve(out_dir)
    (out / "last/README").write_text("a file more does no harm")
    same_files(out / "last", f"{out_dir}/last")
    with open(out / "metrics.jsonl", "a") as f:
        f.write("half a li")
    said = run(*resume)
    assert "is used" not in said and "it has done its 10 steps" in said and curve(out) == curve(out_dir)
    assert (out / "damaged/compressor.safetensors").read_bytes() == content
    os.truncate(out / "last/optimizer.pt", 1000)
    os.remove(out / "previous/config.json")
    said = run(*resume, ok=False)
    assert "last: optimizer.pt is not as it was written" in said and "previous: [Errno 2]" in said and "config.json" in said
    shutil.rmtree(out / "previous")
    assert "previous: is missing: nothing to resume from" in run(*resume, ok=False)


def test_a_full_disk_leaves_the_checkpoint(job, trained, tmp_path):
    args, out_dir, _ = job
    out = shutil.copytree(out_dir, tmp_path / "out")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    assert os.path.getsize(out / "last/optimizer.pt") > 200_000
    process = start("train.py", *args, f"--out_dir={out}", "--init_from=resume", "--max_iters=12", preexec_fn=limit)
    said = process.stdout.read()
    assert process.wait() == 1 and "Traceback" not in said
    assert "step 12: the checkpoint could not be written: [Errno 27] File too large" in said.splitlines()[-1]
    assert said.splitlines()[-1].endswith(f"{out}/last holds the checkpoint of step 10")
    same_files(out / "last", f"{out_dir}/last")
    assert not any(name.endswith(".tmp") for name in os.listdir(out))


def test_what_differs_from_the_checkpoint_is_named(job, trained, tmp_path):
    args, out_dir, _ = job
    said = run("train.py", *args, "--init_from=resume", "--seed=1", "--gradient_accumulation_steps=4", ok=False)
    assert "seed=1337 (now 1), batch_size * gradient_accumulation_steps=4 (now 8): resume with its settings" in said
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(EXAMPLES[0]) + "\n" for _ in range(20)))
    said = run("train.py", *args, "--init_from=resume", f"--train_data={tmp_path / 'other.jsonl'}", ok=False)
    assert "sha256 of train_data=" in said
    said = run("train.py", *args, "--init_from=resume", "--projection_hidden=9", "--log_interval=3")
    assert f"not as in {out_dir}/last: log_interval=1 (now 3), projection_hidden=8096 (now 9)" in said
    assert "holds a run already: --init_from=resume goes on with it" in run("train.py", *args, ok=False)
    with open(f"{out_dir}/.lock") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        assert f"another train.py is at work in {out_dir}" in run("train.py", *args, "--init_from=resume", ok=False)


def test_a_loss_that_is_not_finite(job, tmp_path):
    args, _, _ = job
    rows = [dict(EXAMPLES[i % 3]) for i in range(20)]
    bad = int(np.random.default_rng((1337, 0)).permutation(20)[9])  # read in step 3 of 4 examples each
    rows[bad] = {**EXAMPLES[0], "reranking_scores": [1e38] * 3}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    args = [*args, f"--train_data={tmp_path / 'train.jsonl'}", "--eval_interval=1", "--eval_samples=0"]
    said = run("train.py", *args, f"--out_dir={tmp_path / 'a'}", ok=False)
    assert "error: step 3: loss inf, gradient norm " in said
    named = [part for part in said.split("; ") if part.startswith("micro-batch")]
    assert len(named) == 1 and f"of {tmp_path}/train.jsonl" in named[0]
    # within a step those of few documents first, of them the short ones, two a micro-batch
    size = lambda x: (len(x["documents"]), len(x["query"] + x["answer"]))
    step = sorted(np.random.default_rng((1337, 0)).permutation(20)[8:12], key=lambda i: size(rows[i]))
    batches = [[int(i) + 1 for i in step[:2]], [int(i) + 1 for i in step[2:]]]
    where, = [i for i, batch in enumerate(batches) if bad + 1 in batch]
    assert named[0].startswith(f"micro-batch {where + 1} of process 0: examples {batches[where]} of ")
    assert said.endswith(f"{tmp_path / 'a'}/last holds the checkpoint of step 2")
    said = torchrun(2, "train.py", *args, f"--out_dir={tmp_path / 'b'}", "--skip_nonfinite=True")
    assert "step 3: loss inf" in said and ": skipped" in said
    rows = [x for x in metrics(tmp_path / "b") if "loss" in x or "grad_norm" in x or "skipped" in x]
    assert rows[-1]["step"] == 10 and rows[-1]["skipped"] == 2 and all(math.isfinite(x.get("loss", 0)) for x in rows)
    # a bad first step, which is left out before the optimiser has a state to save
    said = run("train.py", *args, f"--out_dir={tmp_path / 'd'}", "--skip_nonfinite=True", "--seed=10", "--max_iters=1")
    assert "step 1: loss inf" in said
    run("train.py", *args, f"--out_dir={tmp_path / 'd'}", "--skip_nonfinite=True", "--seed=10", "--max_iters=3",
        "--init_from=resume")
    state = torch.load(tmp_path / "d/last/optimizer.pt", weights_only=True)["optimizer"]["state"]
    assert {moments["step"].item() for moments in state.values()} == {2}
    # weights that blew up in a step whose own loss was finite
    said = run("train.py", *args, f"--out_dir={tmp_path / 'c'}", "--compressor_lr=1e37", ok=False)
    assert "step 1: validation loss nan; no checkpoint was written yet" in said


@pytest.mark.parametrize("compressor_type, settings", [
    ("n_layers", dict(enable_reranking=True)), ("modernbert", dict(enable_reranking=True)),
    ("pisco.PISCOCompressor", dict(query_dependent=False))])
def test_counted_flops_are_those_of_the_matrix_products(tiny, compressor_type, settings):
    """Against torch's own counter, on a batch without padding; attention's products, the head's one position more and
    the compressor's own LoRA left out."""
    model = ScaleDown(ScaleDownConfig(generator=tiny("llama"), compressor_type=compressor_type, num_layers=2,
                                      compressor_model=tiny("modernbert"), projection_hidden=24, num_memory_tokens=3,
                                      query_tokens=8, doc_tokens=16, answer_tokens=4, **settings))
    x = dict(query="who is the mayor of Loku? " * 3, documents=["The mayor of Loku is Tuson. " * 9] * 4, answer="Tuson " * 9,
             reranking_scores=[1.0] * 4)
    batch = model.collate([x] * 2, 4)
    masks = [batch["tail_mask"], *(t for name, t in batch["compressor"].items() if name.endswith("mask"))]
    assert all(mask.all() for mask in masks) and batch["labels"].shape == (2, 4)
    with FlopCounterMode(display=False) as counter:
        model(batch)[0].backward()
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
    answer, tokens, flops = StepFlops(model).count(batch)
    if "pisco" in compressor_type:
        own = sum(p.numel() for name, p in model.compressor.named_parameters() if "lora_" in name)
        products -= 6 * own * sum(ids.numel() + 3 for ids in batch["compressor"]["ids"].flatten(0, 1))
    assert answer == 8 and products == pytest.approx(flops, rel=0.03)
