"""
Trains a compressor and the generator's LoRA on a teacher's answers, on one device or many:

    python train.py config/toy.py                                                # a toy world, minutes on a laptop
    python train.py config/n_layers.py --batch_size=4                            # any setting can be overridden
    torchrun --nproc_per_node=8 train.py config/n_layers.py                      # 8 GPUs, DDP
    torchrun --nproc_per_node=8 train.py config/n_layers.py --fsdp=True          # 8 GPUs that share out the weights
    torchrun --nproc_per_node=2 train.py config/modernbert.py --device=trainium  # 2 NeuronCores

writes into out_dir: last/, the checkpoint that --init_from=resume goes on from; former/, the one before it; best/, that
of the lowest validation loss; metrics.jsonl. SIGTERM and Ctrl-C finish the step, save and leave.
"""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from configurator import at_least, configure, fail, torch_device, under_torchrun
from data import Chunks, Examples, file_sha256, mean_scores
from model import ScaleDown, ScaleDownConfig, read_config
from pretrained import first_line, load_tokenizer

# -----------------------------------------------------------------------------
# the paper's values (Table 7), for its N-layers compressor
# i/o
out_dir = "out"
init_from = "scratch"  # or resume, or a checkpoint of another run to begin with, such as out/pretrain/best
eval_only = False  # evaluate the checkpoint that lies in out_dir itself, such as out/toy/best, and stop
eval_interval = 500
eval_examples = 1000  # validation loss on so many examples
eval_samples = 100  # exact match and F1 of answers generated for so many of them
log_interval = 10
sample_at_end = False  # finish with sample.py on one validation question
wandb_log = False
wandb_project = "scaledown"
wandb_run_name = ""
# data
task = "answer"  # or pretrain: text itself, from embeddings of it and of what stood before (data.py)
train_data = "data/train.jsonl"  # for pretrain a corpus.jsonl, or a file of plain text
val_data = "data/val.jsonl"
num_documents = 5  # k
# model
generator = "mistralai/Mistral-7B-Instruct-v0.2"
compressor_type = "n_layers"  # or modernbert
num_layers = 8
compressor_model = "answerdotai/ModernBERT-base"
projection_hidden = 8096
num_memory_tokens = 8
enable_reranking = False
rerank_lambda = 0.05
query_dependent = True  # False: the compressor reads documents without the query, so that they can be stored
query_tokens = 64
doc_tokens = 128
answer_tokens = 128
lora_r = 16
lora_alpha = 32
lora_dropout = 0.1
compressor_lora_r = 0  # LoRA on the compressor instead of training all of it
compressor_norm = True  # n_layers: the final norm after the first N layers; the authors' released class drops it
gradient_checkpointing = False
# optimisation
batch_size = 16  # examples a forward pass
gradient_accumulation_steps = 8  # forward passes a step, shared out among all processes
epochs = 1.0
max_iters = 0  # steps; 0 = as many as the epochs take
generator_lr = 1e-4
compressor_lr = 5e-5
warmup_ratio = 0.05  # of all steps; then linearly down to zero
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0
skip_nonfinite = False  # leave out a step whose loss or gradient is not finite, instead of stopping
seed = 1337
# system
device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
# also trainium (PyTorch/XLA), neuron (TorchNeuron), xla (PyTorch/XLA on anything else)
dtype = ""  # float32 or bfloat16, by default bfloat16 on CUDA and Trainium; what is trained is always kept in float32
compile = False
fsdp = False  # under torchrun: spread the weights over the devices (FSDP2) instead of copying them (DDP)
peak_tflops = 0.0  # of one device, for "mfu"; 0: looked up for some GPUs
# -----------------------------------------------------------------------------
config = configure(globals())
signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save Ctrl-C just quits
if init_from not in ("scratch", "resume") and not os.path.isdir(init_from):
    fail(f"init_from is scratch, resume or the folder of a checkpoint, not '{init_from}'")
if task not in ("answer", "pretrain"):
    fail(f"task is answer or pretrain, not '{task}'")
if task == "pretrain" and enable_reranking:
    fail("task=pretrain has no scores to learn: leave enable_reranking to the run that begins with it")
if task == "pretrain" and sample_at_end:
    fail("task=pretrain has no question to end with: sample_at_end=False")
if os.path.exists(out_dir) and not os.path.isdir(out_dir):
    fail(f"out_dir={out_dir} is not a folder")
at_least(globals(), batch_size=1, gradient_accumulation_steps=1, num_documents=1, eval_examples=1, eval_interval=1,
         log_interval=1, eval_samples=0, max_iters=0, epochs=0, seed=0, generator_lr=0, compressor_lr=0, warmup_ratio=0,
         weight_decay=0, compressor_lora_r=0, beta1=0, beta2=0, grad_clip=0, rerank_lambda=0, peak_tflops=0)
if max(beta1, beta2) >= 1 or epochs == 0:
    fail("beta1 and beta2 must be less than 1, epochs more than 0")
if wandb_log:
    try:
        import wandb
    except ImportError:
        fail("wandb_log=True needs wandb: pip install wandb")

# device, processes
xla = device in ("trainium", "xla")  # PyTorch/XLA: operations are collected into graphs, see the loop
if device == "trainium":
    if not (find_spec("torch_neuronx") and find_spec("torch_xla")):
        fail("device is trainium, which takes torch-neuronx on PyTorch/XLA: pip install -r requirements-trainium.txt, "
             "on a Trn1, Trn1n or Trn2 instance (README, AWS Trainium); with TorchNeuron --device=neuron")
    os.environ.setdefault("PJRT_DEVICE", "NEURON")
if device == "xla" and not find_spec("torch_xla"):
    fail("device is xla, which takes PyTorch/XLA: pip install torch==2.9.0 torch_xla==2.9.0")
if not xla:
    device = torch_device(device)
kind = "xla" if xla else device.split(":")[0]
dtype = dtype or ("bfloat16" if kind in ("cuda", "neuron") or device == "trainium" else "float32")
if dtype not in ("float32", "bfloat16"):
    fail(f"dtype is float32 or bfloat16, not '{dtype}'")
rank, world, ddp = 0, 1, False
if under_torchrun():
    backend = {"cuda": "nccl", "neuron": "neuron", "xla": "xla"}.get(kind, "gloo")
    if kind == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            fail(f"there are more processes than GPUs ({torch.cuda.device_count()}) on this machine")
        torch.cuda.set_device(device)
    if kind == "mps":
        fail("one mps device takes one process")
    if xla:
        import torch_xla.distributed.xla_backend  # noqa: F401 (registers "xla")
    dist.init_process_group(backend, init_method="xla://" if xla else None)
    host = dist.new_group(backend="gloo")  # for counts, losses and signals, which never go to the device
    rank, world = dist.get_rank(), dist.get_world_size()
    if world != int(os.environ["WORLD_SIZE"]):
        fail(f"torchrun has started {os.environ['WORLD_SIZE']} processes, PyTorch/XLA sees {world}: it cannot part "
             "its devices among them")
    ddp = not (fsdp or xla)
if xla:
    import torch_xla.core.xla_model as xm
    import transformers.masking_utils
    from torch_xla.utils.checkpoint import checkpoint as xla_checkpoint
    device = xm.xla_device()
    # transformers would ask every mask whether it hides anything at all, which fetches it from the device
    transformers.masking_utils.is_tracing = lambda *_: True
if fsdp and (xla or not under_torchrun()):
    fail("fsdp=True takes several processes (torchrun), and a device other than trainium or xla")
if gradient_accumulation_steps % world:
    fail(f"gradient_accumulation_steps={gradient_accumulation_steps} does not divide among {world} processes: make it "
         f"a multiple of {world}, and batch_size smaller for the same step")
ctx = nullcontext() if dtype == "float32" else torch.autocast(kind, dtype=torch.bfloat16)


def say(line):
    """One process speaks; where nobody listens any more (Ctrl-C ends `| tee log` too) the run goes on."""
    if rank == 0:
        try:
            print(line, flush=True)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")


def host_sum(numbers):
    """The sum of the numbers over all processes."""
    numbers = torch.as_tensor(numbers, dtype=torch.float64)
    if world > 1:
        try:
            dist.all_reduce(numbers, group=host)
        except RuntimeError as e:  # another process has failed, and has said why
            sys.exit(f"process {rank} has lost the others: {first_line(e)}")
    return numbers


# data
here = os.path.dirname(os.path.abspath(sys.argv[0]))
alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
if train_data.startswith("data/toy/") and not os.path.exists(train_data) and rank == 0:
    subprocess.run([sys.executable, f"{here}/data/toy/prepare.py"], check=True, env=alone)
host_sum(0)  # wait for it
try:
    if task == "pretrain":
        tokenizer = load_tokenizer(generator)
        train_set, val_set = (Chunks(path, tokenizer, doc_tokens) for path in (train_data, val_data))
    else:
        train_set, val_set = (Examples(path, need_scores=enable_reranking) for path in (train_data, val_data))
except (ValueError, OSError) as e:
    made = re.search(r"(?:^|/)data/([^/]+)/(?:train|val)\.jsonl does not exist$", str(e))
    fail(f"{e}: python prepare.py --dataset={made[1]} --corpus=FILE --queries=FILE makes it" if made else e)
if enable_reranking:
    squares = [sum(s * s for s in x["reranking_scores"][:num_documents])
               for x in map(train_set.__getitem__, range(min(1000, len(train_set))))]
    begin = rerank_lambda * sum(squares) / len(squares)
    if begin > 50:  # answers begin at a loss of 2 to 6
        say(f"reranking_scores are large: they begin with a loss of {begin:,.0f}, next to which the answers' is lost: "
            "take a cross-encoder's scores, or a smaller rerank_lambda")
examples_per_step = batch_size * gradient_accumulation_steps
steps = max_iters or math.ceil(epochs * len(train_set) / examples_per_step)
length = lambda x: len(x["query"] + x["answer"])  # what tells examples apart; documents are mostly cut to doc_tokens
val_examples = [val_set[i] for i in range(min(eval_examples, len(val_set)))]
fixed = kind in ("xla", "neuron")  # devices that compile what they run get batches of one shape
samples = sorted(val_examples[:eval_samples], key=length)
val_examples.sort(key=length)  # alike beside alike: less padding


@lru_cache(maxsize=2)
def epoch_order(epoch):
    return np.random.default_rng((seed, epoch)).permutation(len(train_set))


def step_examples(step):
    """(number, example) of a step's examples: every epoch is a permutation that depends on the seed alone, so that a
    resumed run and any number of processes see the same examples at the same step. Within the step they are sorted by
    length, so that a micro-batch holds little padding. Process r takes [r::world]."""
    where = range(step * examples_per_step, (step + 1) * examples_per_step)
    numbers = [int(epoch_order(i // len(train_set))[i % len(train_set)]) for i in where]
    return sorted(((i, train_set[i]) for i in numbers), key=lambda pair: length(pair[1]))


def collate(examples):
    try:
        return model.collate(examples, num_documents, fixed)
    except ValueError as e:
        fail(e)


def get_micro_batches(step):
    """This process's part of a step's examples, as batches on the CPU."""
    mine = [x for _, x in step_examples(step)[rank::world]]
    return [collate(mine[i:i + batch_size]) for i in range(0, len(mine), batch_size)]


# model
last, former, best, damaged = (f"{out_dir}/{name}" for name in ("last", "former", "best", "damaged"))


def broken(checkpoint):
    """What is wrong with the files of a checkpoint; None when they are those that were written."""
    try:
        if not os.path.isdir(checkpoint):
            return "is missing"
        with open(f"{checkpoint}/SHA256SUMS") as f:
            sums = {line[66:-1]: line[:64] for line in f}
        return next((f"{name} is not as it was written" for name in
                     ("adapter_config.json", "adapter_model.safetensors", "compressor.safetensors", "config.json",
                      "optimizer.pt") if file_sha256(f"{checkpoint}/{name}") != sums.get(name)), None)
    except (ValueError, OSError) as e:
        return str(e)


def put_aside(folder, name):
    shutil.rmtree(name, ignore_errors=True)
    os.rename(folder, name)


def find_checkpoint():
    """Sees to it that the checkpoint in last/ is a good one: the one before takes the place of a damaged one."""
    if not os.path.isdir(last) and not os.path.isdir(former):
        fail(f"{out_dir} holds no checkpoint to resume from")
    if wrong := broken(last):
        if broken(former):
            fail(f"{last}: {wrong}; {former}: {broken(former)}: nothing to resume from")
        if os.path.isdir(last):
            put_aside(last, damaged)
        os.rename(former, last)
        say(f"{last}: {wrong}: the checkpoint before it is used")


def copy_to_best():
    """best/ as the checkpoint in last/, but for what is only there to resume from."""
    shutil.rmtree(f"{best}.tmp", ignore_errors=True)
    os.makedirs(f"{best}.tmp")
    for name in {*os.listdir(last)} - {"optimizer.pt", "SHA256SUMS"}:
        shutil.copyfile(f"{last}/{name}", f"{best}.tmp/{name}")  # contents alone: some file systems know no permissions
    flush(f"{best}.tmp")
    if os.path.isdir(best):
        put_aside(best, f"{best}.old")
    os.rename(f"{best}.tmp", best)
    shutil.rmtree(f"{best}.old", ignore_errors=True)


# what may change when a run is resumed: data as long as its contents are the same, batch_size and
# gradient_accumulation_steps as long as their product is
may_differ = {*"""out_dir init_from eval_only eval_interval eval_examples eval_samples log_interval sample_at_end
    wandb_log wandb_project wandb_run_name train_data val_data generator compressor_model gradient_checkpointing
    batch_size gradient_accumulation_steps epochs max_iters skip_nonfinite device dtype compile fsdp
    peak_tflops""".split()}
may_differ |= {"sha256 of val_data"}
may_differ |= {"num_layers", "compressor_norm"} if compressor_type == "modernbert" else {"projection_hidden"}
may_differ |= set() if enable_reranking else {"rerank_lambda"}
run = {**config, "batch_size * gradient_accumulation_steps": examples_per_step,
       "sha256 of train_data": file_sha256(train_data), "sha256 of val_data": file_sha256(val_data)}


def compare_settings(saved):
    """Says which settings are not those of the checkpoint, and fails for those that decide what is trained."""
    # there has not always been a choice
    saved = dict(task="answer", query_dependent=True, compressor_lora_r=0, compressor_norm=True,
                 **{"sha256 of val_data": run["sha256 of val_data"]}) | saved
    differs = {name: f"{name}={saved.get(name)} (now {value})" for name, value in run.items()
               if value != saved.get(name)}
    wrong = [text for name, text in differs.items() if name not in may_differ]
    if wrong:
        fail(f"{last} was trained with {', '.join(wrong)}: resume with its settings, or choose another out_dir")
    differs.pop("init_from", None)
    if differs:
        say(f"not as in {last}: {', '.join(differs.values())}")


if init_from == "resume" and not eval_only:
    if rank == 0:
        find_checkpoint()
    host_sum(0)
    state = torch.load(f"{last}/optimizer.pt", map_location="cpu", weights_only=True)
    compare_settings(state["run"])
elif not eval_only and any(map(os.path.isdir, (last, former, best))):
    fail(f"{out_dir} holds a run already: --init_from=resume goes on with it; for a new one choose another --out_dir "
         "or remove the folder")
torch.manual_seed(seed)
step, evaluated, skipped, best_val_loss, is_best = 0, -1, 0, float("inf"), False
names = ["loss", "generation", "reranking"][:2 + enable_reranking]
window = dict(sums=torch.zeros(len(names), dtype=torch.float64), steps=0)  # since the last line of the log
try:
    model = ScaleDown(ScaleDownConfig(**{name: config[name] for name in ScaleDownConfig.__dataclass_fields__}),
                      dtype=getattr(torch, dtype))
    if eval_only:
        for name, value in vars(read_config(out_dir)[1]).items():
            if name not in ("generator", "compressor_model") and value != config[name]:
                fail(f"the checkpoint {out_dir} has {name}={value}, this run {name}={config[name]}")
        model.load(out_dir)
        say(f"evaluating {out_dir}")
    elif init_from != "scratch":
        model.load(last if init_from == "resume" else init_from)
except (ValueError, OSError) as e:
    fail(first_line(e))
if fsdp:
    model.shard(dist.device_mesh.init_device_mesh(kind, (world,)))
else:
    model.to(device)
if xla:
    for backbone in (model.generator, model.compressor.backbone):
        # autocast knows no other attention there
        backbone.set_attn_implementation(backbone.config._attn_implementation.replace("sdpa", "eager"))
if gradient_checkpointing:
    model.enable_gradient_checkpointing(xla_checkpoint if xla else None)
# capturable: AdamW counts its steps in tensors; with numbers XLA would now and then compile the update anew
optimizer = model.configure_optimizers(generator_lr, compressor_lr, weight_decay, (beta1, beta2), fused=kind == "cuda",
                                       capturable=xla)
settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
if init_from == "resume" and not eval_only:
    if state["optimizer"]:  # None before its first step
        for group, own in zip(state["optimizer"]["param_groups"], settings):
            group.update(own)  # fused and capturable are this device's
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=StateDictOptions(full_state_dict=True))
        if xla:  # the line above makes room by a step with learning rate 0, which is 0 / 0 when capturable
            model.load(last)
    step, evaluated, skipped, window = (state[name] for name in ("step", "evaluated", "skipped", "window"))
    best_val_loss, is_best = state["best_val_loss"], state["is_best"]
    if state["run"].get("sha256 of val_data", run["sha256 of val_data"]) != run["sha256 of val_data"]:
        say("val_data is another: best/ is what is best on it from here on")
        best_val_loss = float("inf")
    del state
    say(f"resuming {out_dir} at step {step:,}"
        + (f": it has done its {steps:,} steps, more epochs or max_iters go on" if step >= steps else ""))
parameters = [p for p in model.parameters() if p.requires_grad]
forward = torch.compile(model, backend="neuron" if kind == "neuron" else "inductor") if compile else model
if ddp:
    forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)
if xla:
    xm.broadcast_master_param(model)  # the same start in every process, as DDP does it
    for p in parameters:  # never None: the first micro-batch of a step runs the graph of all others
        p.grad = torch.zeros_like(p)
count = lambda module: sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6
say(f"{len(train_set):,} training and {len(val_set):,} validation examples, {steps:,} steps of {examples_per_step}")
say(f"trained: compressor {count(model.compressor):.2f}M, LoRA {count(model.generator):.2f}M parameters; "
    f"frozen: {sum(p.numel() for p in model.parameters() if not p.requires_grad) / 1e6:.2f}M")
# of one device, in 16 bit, dense (NVIDIA's data sheets)
known = {"H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312}
if kind == "cuda" and dtype == "bfloat16" and not peak_tflops:
    peak_tflops = next((peak for name, peak in known.items() if name in torch.cuda.get_device_name()), 0)


def lr_factor(step):
    """Linear warm-up, then linearly down to zero (Table 7)."""
    warmup = max(1, round(warmup_ratio * steps))
    return (step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup)


def signalled():
    """Whether any process has got SIGTERM or Ctrl-C."""
    return host_sum(stop is not None) > 0


@torch.no_grad()
def evaluate():
    """Validation loss and, on the first eval_samples examples, the scores of greedily generated answers, the examples
    spread over the processes; None when a signal came in between."""
    model.eval()
    sums = torch.zeros(7, dtype=torch.float64)  # generation, reranking, answer tokens, em, f1, match, samples
    for i in range(0, len(val_examples), batch_size * world):
        if signalled():
            return
        mine = val_examples[i:i + batch_size * world][rank::world]
        # as many batches in every process (FSDP2), all full (XLA): what fills up counts nothing
        batch = collate((mine + val_examples[:1] * batch_size)[:batch_size])
        batch["labels"][len(mine):] = -100
        batch["present"][len(mine):] = False
        with ctx:
            _, parts = forward(model.to_device(batch), num_answer_tokens=1, num_queries=1)
        if xla:
            xm.mark_step()
        sums[0] += parts["generation"].item()
        sums[1] += parts["reranking"].item() if enable_reranking else 0
        sums[2] += (batch["labels"] != -100).sum().item()
    # with FSDP2 the processes must go through the layers together, as often: each answers all
    stride = batch_size if fsdp else batch_size * world
    for i in range(0, len(samples), stride):
        if signalled():
            return
        mine = samples[i:i + stride] if fsdp else samples[i:i + stride][rank::world]
        if mine:
            full = (mine + mine[:1] * batch_size)[:batch_size] if fixed else mine
            try:
                with ctx:
                    answers = model.generate([x["query"] for x in full], [x["documents"] for x in full],
                                             num_documents=num_documents)
            except ValueError as e:  # longer than the generator's positions
                fail(e)
            scores = mean_scores(answers[:len(mine)], mine)
            sums[3:] += len(mine) * torch.tensor([scores["em"], scores["f1"], scores["match"], 1], dtype=torch.float64)
    model.train()
    generation, reranking, tokens, em, f1, match, n = host_sum(sums).tolist()
    result = {"val_loss": generation / tokens + rerank_lambda * reranking / len(val_examples)}
    if enable_reranking:
        result["val_reranking"] = reranking / len(val_examples)
    return {**result, **dict(em=em / n, f1=f1 / n, match=match / n)} if n else result


def settle():
    """Fetches the losses and gradient norms of the steps since the last call, adds those that are finite to the window
    and returns those that are not: (step, losses (processes, micro-batches, names), gradient norm)."""
    if xla:
        xm.mark_step()
    bad = []
    for step, losses, norm in pending:
        mine = torch.zeros(world, *losses.shape, dtype=torch.float64)
        mine[rank] = losses.cpu()
        losses, norm = host_sum(mine) / world, norm.item()
        if math.isfinite(norm) and losses.isfinite().all():
            window["sums"] += losses.sum(dim=(0, 1))
            window["steps"] += 1
            window["grad_norm"] = norm
        else:
            bad.append((step, losses, norm))
    pending.clear()
    return bad


def describe(step, losses, norm):
    """Which batch made a step's loss infinite or NaN."""
    text = f"step {step}: loss {losses[:, :, 0].sum().item()}, gradient norm {norm}"
    numbers = [i + 1 for i, _ in step_examples(step - 1)]
    where = [f"micro-batch {i + 1} of process {r}: examples {numbers[r::world][i * batch_size:(i + 1) * batch_size]}"
             for r, i in (~losses.isfinite().all(dim=2)).nonzero().tolist()]
    return f"{text}; {'; '.join(where) or f'examples {numbers}'} of {train_data}"


def last_good():
    return f"{last} holds the checkpoint of step {saved:,}" if saved else "no checkpoint was written yet"


def stop_all(message):
    """For what every process has found."""
    fail(message) if rank == 0 else sys.exit(1)


def stop_if_not_finite(bad):
    if bad:
        stop_all(f"{describe(*bad[0])}: stopped; {last_good()}")


@contextmanager
def writing(what):
    """A full disk and its like: one line that says which checkpoint is left."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:  # torch.save raises RuntimeError for a failed write
        shutil.rmtree(f"{last}.tmp", ignore_errors=True)
        shutil.rmtree(f"{best}.tmp", ignore_errors=True)
        while e.__context__:  # torch.save hides the reason behind errors of its own
            e = e.__context__
        fail(f"step {step:,}: {what} could not be written: {first_line(e)}; {last_good()}")


def flush(folder):
    """Checksums beside the files of a checkpoint, and all of it on the disk before it gets its name."""
    sums = "".join(f"{file_sha256(f'{folder}/{name}')}  {name}\n" for name in sorted(os.listdir(folder)))
    with open(f"{folder}/SHA256SUMS", "w") as f:
        f.write(sums)
    for name in os.listdir(folder):
        with suppress(OSError):  # some file systems know no permissions
            os.chmod(f"{folder}/{name}", 0o644)  # safetensors makes files that only their owner can read
        to_disk(f"{folder}/{name}")
    to_disk(folder)


def to_disk(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:  # some file systems flush no folder
        if not os.path.isdir(path) or e.errno in (errno.EIO, errno.ENOSPC):
            raise
    os.close(fd)


def save(is_best):
    """Writes the checkpoint of this step aside and renames it into place when all of it is on the disk; the one before
    stays as former/. Files are the same for one process, DDP and FSDP2."""
    global saved
    tensors = get_model_state_dict(model, options=whole)
    # asked for its state before its first step, torch would make that step
    moments = get_optimizer_state_dict(model, optimizer, options=whole) if optimizer.state else None
    state = dict(optimizer=moments, step=step, evaluated=evaluated, skipped=skipped, best_val_loss=best_val_loss,
                 window=window, run=run, is_best=is_best)
    if rank == 0:
        with writing("the checkpoint"):
            model.save(f"{last}.tmp", tensors)
            with open(f"{last}.tmp/optimizer.pt", "wb") as f:
                torch.save(state, f)
            flush(f"{last}.tmp")
            if os.path.isdir(last):
                put_aside(last, former)
            os.rename(f"{last}.tmp", last)
            to_disk(out_dir)
    saved = step
    if rank == 0 and is_best:
        with writing("best/"):
            copy_to_best()
    host_sum(0)  # the others wait


def log(entry, more=""):
    if rank > 0:
        return
    if not eval_only:
        with writing("metrics.jsonl"), open(f"{out_dir}/metrics.jsonl", "a") as f:
            f.write(json.dumps(entry) + "\n")
            f.flush()
            os.fsync(f.fileno())  # no checkpoint may reach the disk before the lines that lead to it
    if wandb_log:
        wandb.log(entry, step=entry.get("step"))
    say(", ".join(f"{name} {value:.2e}" if name.endswith("_lr") else f"{name} {value:,}" if isinstance(value, int)
                  else f"{name} {value:.4f}" for name, value in entry.items()) + more)


def step_of(line):
    """The step of a line of metrics.jsonl; of what a crash has left of a line, none that is kept."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


saved, stop, pending = step, None, []
model.train()
if eval_only:
    log(evaluate())
    if world > 1:
        dist.destroy_process_group()
    sys.exit()
if rank == 0:
    with writing("the folder"):
        os.makedirs(out_dir, exist_ok=True)
        lock = open(f"{out_dir}/.lock", "a")  # held until this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # such as one that outlived a torchrun that was killed
            fail(f"another train.py is at work in {out_dir}")
        except OSError as e:
            say(f"{out_dir} cannot be locked ({e.strerror}): see to it that no other train.py works in it")
        if is_best:
            copy_to_best()  # it may have been killed when it was about to
        shutil.rmtree(f"{last}.tmp", ignore_errors=True)
        kept = []
        if step > 0 and os.path.isfile(f"{out_dir}/metrics.jsonl"):  # what came after its checkpoint is said again
            with open(f"{out_dir}/metrics.jsonl", errors="replace") as f:
                kept = [line for line in f if line.endswith("\n") and step_of(line) <= step]
        with open(f"{out_dir}/metrics.tmp", "w") as f:
            f.writelines(kept)
        to_disk(f"{out_dir}/metrics.tmp")
        os.replace(f"{out_dir}/metrics.tmp", f"{out_dir}/metrics.jsonl")
if wandb_log and rank == 0:
    wandb.init(project=wandb_project, name=wandb_run_name or None, config=config)


def on_signal(number, _):
    global stop
    stop = signal.Signals(number).name
    if rank == 0:
        with suppress(BrokenPipeError):
            os.write(1, f"{stop}: finishing the step\n".encode())  # print() may be at work itself
    if world == 1:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C quits at once; torchrun sends several


signal.signal(signal.SIGTERM, on_signal)
signal.signal(signal.SIGINT, on_signal)

# training loop
batches = get_micro_batches(step) if step < steps else []
examples = tokens = flops = 0  # since the last line of the log, and its time, evaluations left out
first, started = step, time.time()
t0 = started
while True:
    counts = [sum(column) for column in zip(*map(model.count, batches))] or [0, 0, 0]
    stopping, num_answer_tokens, step_tokens, step_flops = host_sum([stop is not None, *counts]).tolist()
    if stopping:
        stop_if_not_finite(settle())
        if saved < step:
            save(is_best=False)
        say(f"stopped behind step {step:,}; {last_good()}"
            + ("; to go on: the same command with --init_from=resume" if saved else ""))
        break

    # evaluate and write checkpoints; a resumed run does not evaluate again what it has evaluated
    if (step % eval_interval == 0 or step == steps) and step != evaluated:
        t1 = time.time()
        stop_if_not_finite(settle())
        result = evaluate()
        if result is None:
            continue
        log({"step": step, **result})
        if not math.isfinite(result["val_loss"]):
            stop_all(f"step {step}: validation loss {result['val_loss']}; {last_good()}")
        evaluated = step
        if step > 0:
            is_best = result["val_loss"] < best_val_loss
            best_val_loss = min(best_val_loss, result["val_loss"])
            save(is_best)
        t0 += time.time() - t1
    if step >= steps:
        break

    for group, own in zip(optimizer.param_groups, settings):
        group["lr"] = own["lr"] * lr_factor(step)
    # dropout, too, depends on nothing but seed, step and process: no random state to keep
    step_seed = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    torch.manual_seed(step_seed)
    if xla:
        xm.set_rng_state(step_seed, str(device))
    losses = []
    for i, batch in enumerate(batches):
        if ddp:
            forward.require_backward_grad_sync = i == len(batches) - 1  # gradients travel once a step
        with ctx:  # the mean over all answer tokens of the step, wherever they are; processes' gradients are averaged
            loss, parts = forward(model.to_device(batch), num_answer_tokens / world, examples_per_step / world)
        loss.backward()
        losses.append(torch.stack([loss.detach(), *parts.values()]))
        if xla:
            xm.mark_step()  # the graph of a micro-batch ends here and runs while the next one is collected
    batches = get_micro_batches(step + 1) if step + 1 < steps else []
    if xla:
        xm.reduce_gradients(optimizer)  # averages over the replicas, which DDP and FSDP2 do in backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or float("inf"))
    pending.append((step + 1, torch.stack(losses), norm.full_tensor() if fsdp else norm))
    bad = settle() if not xla or skip_nonfinite else []
    if bad and skip_nonfinite:
        skipped += 1
        say(f"{describe(*bad[0])}: skipped")
    else:
        stop_if_not_finite(bad)
        optimizer.step()
    optimizer.zero_grad(set_to_none=not xla)
    if xla:
        xm.mark_step()  # the graph of the update
    step += 1
    examples, tokens, flops = examples + examples_per_step, tokens + step_tokens, flops + step_flops

    if step % log_interval == 0 or step == steps:
        stop_if_not_finite(settle())  # on XLA the only time that losses are fetched
        entry, seconds = {"step": step}, time.time() - t0
        if window["steps"]:
            entry.update({name: value / window["steps"] for name, value in zip(names, window["sums"].tolist())})
            entry["grad_norm"] = window["grad_norm"]
        entry.update(generator_lr=generator_lr * lr_factor(step - 1), compressor_lr=compressor_lr * lr_factor(step - 1),
                     examples_per_s=examples / seconds, tokens_per_s=round(tokens / seconds))
        if peak_tflops:
            entry["mfu"] = flops / seconds / (peak_tflops * 1e12 * world)
        if skipped:
            entry["skipped"] = skipped
        left = (time.time() - started) / (step - first) * (steps - step)
        log(entry, f", {timedelta(seconds=round(left))} left")
        window = dict(sums=torch.zeros(len(names), dtype=torch.float64), steps=0)
        examples = tokens = flops = 0
        t0 = time.time()

signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.SIG_DFL)
if sample_at_end and not stopping and rank == 0:
    args = dict(out_dir=best, val_data=val_data, candidates=num_documents, device="cpu" if xla else device,
                dtype=dtype)
    subprocess.run([sys.executable, f"{here}/sample.py", *(f"--{name}={value}" for name, value in args.items())],
                   check=True, env=alone)
if world > 1:
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # beside Gloo's threads an interpreter that shuts down now and then aborts
