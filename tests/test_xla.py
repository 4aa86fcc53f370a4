"""
train.py's PyTorch/XLA branch, that of --device=trainium, on PyTorch/XLA's CPU device. Needs torch_xla, in a virtual
environment of its own; .ci/run makes one.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import EXAMPLES, ROOT, losses, metrics, run, torchrun

pytest.importorskip("torch_xla", reason="torch_xla is not installed: see .ci/run for an environment that has it")

# every line of the log with what the lazy device has done so far: graphs compiled, operators run on the CPU instead
SPY = """
import json, sys
import torch_xla.debug.metrics as met
sys.argv = sys.argv[1:]; sys.path.insert(0, ".")
dumps = json.dumps
def spy(x, **kwargs):
    if "step" in x:
        x = {**x, "graphs": met.metric_data("CompileTime")[0],
             "aten": {n: met.counter_value(n) for n in met.counter_names() if n.startswith("aten::")}}
    return dumps(x, **kwargs)
json.dumps = spy
exec(compile(open("train.py").read(), "train.py", "exec"))
"""


@pytest.fixture(scope="module")
def xla_args(job, tiny, tmp_path_factory):
    args, _, folder = job
    (folder / "spy.py").write_text(SPY)
    return folder, [*args, "--max_iters=20", "--eval_interval=10", "--log_interval=2", "--lora_dropout=0.0",
                    "--doc_tokens=16", "--query_tokens=16", f"--compressor_model={tiny('modernbert')}",
                    "--projection_hidden=16",
                    "--compressor_lr=1e-3", "--generator_lr=1e-3"]


def run_xla(*args, devices=1):
    done = subprocess.run([sys.executable, *args, "--device=xla"], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices)})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_few_graphs(out_dir, reranking):
    rows = metrics(out_dir)
    graphs = {x["step"]: x["graphs"] for x in rows}
    # evaluation, a prompt, a token, a micro-batch, update (the first makes Adam's state), and two that make the model
    assert graphs[20] == graphs[2] <= 8, graphs
    assert {*rows[-1]["aten"]} == {"aten::_local_scalar_dense"}
    # evaluation fetches a loss (two when reranking) a batch, and one more with documents of others, the log one norm a
    # step: nothing else waits for the device
    assert rows[-1]["aten"]["aten::_local_scalar_dense"] <= 20 + 3 * 3 * (2 + reranking)


@pytest.mark.parametrize("reranking", [False, True])
@pytest.mark.parametrize("compressor_type", ["n_layers", "modernbert"])
def test_xla_trains_as_the_cpu_does(xla_args, compressor_type, reranking, tmp_path):
    folder, args = xla_args
    args = [*args, f"--compressor_type={compressor_type}", f"--enable_reranking={reranking}"]
    run("train.py", *args, f"--out_dir={tmp_path}/cpu")
    run_xla(f"{folder}/spy.py", "train.py", *args, f"--out_dir={tmp_path}/xla")
    for x, y in zip(metrics(f"{tmp_path}/cpu"), metrics(f"{tmp_path}/xla"), strict=True):
        for name in x.keys() - {"examples_per_s", "tokens_per_s"}:  # em and f1, too: generated
            assert x[name] == pytest.approx(y[name], abs=1e-4, rel=1e-3 if name == "grad_norm" else 0), (x["step"], name)
    assert_few_graphs(f"{tmp_path}/xla", reranking)
    assert max(losses(f"{tmp_path}/xla")) == 20


def test_xla_with_all_that_a_real_run_has(xla_args, tmp_path):
    """bfloat16, dropout, gradient checkpointing; stopped, and resumed on the CPU, and back on XLA."""
    folder, args = xla_args
    run("train.py", *args, f"--out_dir={tmp_path}/cpu")
    more = ["--dtype=bfloat16", "--gradient_checkpointing=True", "--lora_dropout=0.1"]
    run_xla(f"{folder}/spy.py", "train.py", *args, *more, f"--out_dir={tmp_path}/xla")
    assert_few_graphs(f"{tmp_path}/xla", reranking=True)
    for step, loss in losses(f"{tmp_path}/cpu").items():
        assert losses(f"{tmp_path}/xla")[step] == pytest.approx(loss, rel=0.1)
    args = [*args, "--lora_dropout=0.1", f"--out_dir={tmp_path}/xla", "--init_from=resume"]
    run("train.py", *args, "--max_iters=22")
    run_xla("train.py", *args, "--max_iters=24")
    assert max(losses(f"{tmp_path}/xla")) == 24


GENERATE = """
import json, sys
sys.path.insert(0, ".")
import torch, torch_xla.core.xla_model as xm, torch_xla.debug.metrics as met
from model import ScaleDown
folder, examples = sys.argv[1], json.loads(sys.argv[2])
model = ScaleDown.from_pretrained(folder)
asked = [([x["query"] for x in examples[i:i + 2]], [x["documents"] for x in examples[i:i + 2]]) for i in range(2)]
plain = [model.generate(*a, num_documents=3) for a in asked]
model.generator.set_attn_implementation("eager")
model.compressor.backbone.set_attn_implementation("packed_eager")
model.to(xm.xla_device())
xm.mark_step()
graphs = lambda: (met.metric_data("CompileTime") or [0])[0]
before = graphs()
answers = [model.generate(*a, num_documents=3) for a in asked]
assert answers == plain and len({*sum(plain, [])}) > 1, (answers, plain)
assert graphs() - before == 2, graphs() - before
"""


def test_generation_takes_two_graphs(xla_args, tmp_path, tiny):
    folder, args = xla_args
    run("train.py", *args, f"--out_dir={tmp_path}/out", "--max_iters=3", "--eval_interval=3")
    (folder / "generate.py").write_text(GENERATE)
    done = subprocess.run([sys.executable, f"{folder}/generate.py", f"{tmp_path}/out/best", json.dumps(EXAMPLES)], cwd=ROOT,
                          capture_output=True, text=True, env={**os.environ, "PJRT_DEVICE": "CPU"})
    assert done.returncode == 0, done.stdout + done.stderr


# PyTorch/XLA's CPU device cannot be shared by processes, but one process may have two, a thread each. The two threads
# run train.py itself; torch.distributed, which has one state a process, is replaced by a rendezvous of threads, and so
# is the one operation that makes up xm.reduce_gradients and xm.broadcast_master_param: XLA's own all-reduce hangs now and then
# on its CPU device (https://github.com/pytorch/xla/issues/9089).
TWO_REPLICAS = """
import os, signal, sys, threading, traceback
import torch, torch.distributed as dist, torch_xla, torch_xla.runtime as xr, torch_xla.distributed.xla_backend
from torch_xla._internal import pjrt
from transformers import AutoTokenizer  # before two threads ask for it: its lazy import is no matter of theirs
sys.argv = sys.argv[1:]; sys.path.insert(0, ".")
barrier, box = threading.Barrier(2), {}

def both_sums(values):
    box[xr.global_ordinal()] = values
    barrier.wait()
    sums = [a + b for a, b in zip(box[0], box[1], strict=True)]
    barrier.wait()
    return sums

@torch.no_grad()
def xla_all_reduce(kind, tensors, scale, groups, pin_layout):
    assert kind == "sum" and not groups
    torch_xla.sync()  # one graph for all of them
    for t, total in zip(tensors, both_sums([t.cpu() for t in tensors])):
        t.copy_(total * scale)

torch_xla._XLAC._xla_all_reduce_inplace = xla_all_reduce
dist.all_reduce = lambda t, group=None: t.copy_(both_sums([t.clone()])[0])
dist.init_process_group = dist.destroy_process_group = lambda *args, **kwargs: None
dist.new_group = lambda **kwargs: None
dist.get_rank, dist.get_world_size = xr.global_ordinal, lambda: 2
signal.signal = lambda *args: None
# as under torchrun
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
source = compile(open("train.py").read(), "train.py", "exec")

def replica():
    try:
        exec(source, {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        os._exit(1)

pjrt._run_thread_per_device(0, 1, replica, pjrt.initialize_multiprocess)
"""


def test_two_replicas_train_as_one(xla_args, tmp_path):
    folder, args = xla_args
    (folder / "two.py").write_text(TWO_REPLICAS)
    # the threads share torch's random numbers: both begin with weights from a checkpoint
    run("train.py", *args, f"--out_dir={tmp_path}/one", "--max_iters=10", "--eval_samples=0")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    args = [*args, "--init_from=resume", "--eval_samples=0"]
    run_xla(f"{folder}/two.py", "train.py", *args, f"--out_dir={tmp_path}/two", devices=2)
    run("train.py", *args, f"--out_dir={tmp_path}/one")
    a, b = losses(f"{tmp_path}/one"), losses(f"{tmp_path}/two")
    assert a == pytest.approx(b, abs=1e-4) and max(a) == 20


def test_processes_that_cannot_share_the_device_are_refused(xla_args, tmp_path, monkeypatch):
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    said = torchrun(2, "train.py", *xla_args[1], f"--out_dir={tmp_path}/out", "--device=xla", ok=False)
    assert "torchrun has started 2 processes, PyTorch/XLA sees 1" in said
