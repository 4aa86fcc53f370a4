"""
Trains a compressor and the generator's LoRA on a teacher's answers, on one device or many:

    python train.py config/toy.py                                                # a toy world, minutes on a laptop
    python train.py config/n_layers.py --batch_size=4                            # any setting can be overridden
    torchrun --nproc_per_node=8 train.py config/n_layers.py                      # 8 GPUs, DDP
    torchrun --nproc_per_node=8 train.py config/n_layers.py --fsdp=True          # 8 GPUs that share out the weights
    torchrun --nproc_per_node=2 train.py config/modernbert.py --device=trainium  # 2 NeuronCores

writes into out_dir, every eval_interval steps: last/, the checkpoint that --init_from=resume goes on from; previous/,
the one before it; best/, that of the lowest validation loss; metrics.jsonl. SIGTERM and Ctrl-C finish the step, save
and leave.
"""

import math
import os
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import distributed
from checkpoint import Checkpoints
from configurator import at_least, attention_for_training, configure, fail, fail_on, import_or_fail
from data import StepExamples, example_size, open_data, with_documents_of_others
from distributed import host_sum, print0
from files import file_sha256
from flops import StepFlops, Throughput, describe_entry, describe_parameters, peak_tflops_here
from metrics import mean_scores
from model import ScaleDown, ScaleDownConfig

# -----------------------------------------------------------------------------
# the paper's values (Table 7), for its N-layers compressor
# i/o
out_dir = "out"
init_from = "scratch"  # or resume, or a checkpoint of another run to begin with, such as out/pretrain/best
eval_only = False  # evaluate the checkpoint that lies in out_dir itself, such as out/toy/best, and stop
eval_interval = 500  # steps between two evaluations, each with a checkpoint
eval_examples = 1000  # validation loss on the first n examples of val_data
eval_samples = 100  # exact match and F1 of answers generated for the first n of them
log_interval = 10
sample_at_end = False  # finish with sample.py on one validation question
wandb_log = False
wandb_project = "scaledown"
wandb_run_name = ""
# data
task = "answer"  # or pretrain: text itself, from embeddings of it and of what stood before (data.py)
train_data = "data/train.jsonl"  # for pretrain a corpus.jsonl, or a file of plain text
val_data = "data/val.jsonl"
num_documents = 5  # k: only the first k documents of a question are read
# model
mode = "compressed"  # what the generator learns to answer from; to compare with: full, the documents' text, or none
generator = "mistralai/Mistral-7B-Instruct-v0.2"
compressor_type = "n_layers"  # or modernbert, or a class of your own: module.Class
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
compressor_layout = "scaledown"  # how query and document stand in the compressor; or oscar, as in the released models
prompt_style = "scaledown"  # the generator's prompt; or oscar, the released models'
sep_after_last = False  # a SEP after the last document, too, as in the released models
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
dtype = ""  # float32 or bfloat16; empty: whichever is faster on the device. What is trained is always kept in float32
compile = False
fsdp = False  # under torchrun: spread the weights over the devices (FSDP2) instead of copying them (DDP)
peak_tflops = 0.0  # of one device, for "mfu"; 0: looked up for some GPUs
# -----------------------------------------------------------------------------
config = configure(globals())
if init_from not in ("scratch", "resume") and not os.path.isdir(init_from):
    fail(f"init_from is scratch, resume or the folder of a checkpoint, not '{init_from}'")
at_least(globals(), **{name: 0 for name, value in config.items() if type(value) in (int, float)})
at_least(globals(), batch_size=1, gradient_accumulation_steps=1, num_documents=1, eval_examples=1, eval_interval=1,
         log_interval=1, lora_alpha=1, projection_hidden=1)
if max(beta1, beta2) >= 1 or warmup_ratio > 1 or epochs == 0:
    fail("beta1 and beta2 must be less than 1, warmup_ratio (of all steps) at most 1, epochs more than 0")
if wandb_log:
    wandb = import_or_fail("wandb", "wandb_log=True")

# device, processes
processes = distributed.start(device, dtype, fsdp, gradient_accumulation_steps)
device, dtype, kind, rank, world = (getattr(processes, name) for name in ("device", "dtype", "kind", "rank", "world"))
xla = kind == "xla"  # PyTorch/XLA: operations are collected into graphs, see the loop
if xla:
    import torch_xla.core.xla_model as xm
autocast = nullcontext() if dtype == "float32" else torch.autocast(kind, dtype=torch.bfloat16)

# data
train_set, val_set = open_data(config)
examples_per_step = batch_size * gradient_accumulation_steps
step_examples = StepExamples(train_set, examples_per_step, num_documents, seed, world)
steps = max_iters or math.ceil(epochs * len(train_set) / examples_per_step)
val_examples = [val_set[i] for i in range(min(eval_examples, len(val_set)))]
by_size = partial(example_size, num_documents=num_documents)  # like next to like: less padding
samples = sorted(val_examples[:eval_samples], key=by_size)
val_examples.sort(key=by_size)
strangers = with_documents_of_others(val_examples) if mode != "none" else []
static_shapes = kind in ("xla", "neuron")  # devices that compile what they run get batches of one shape
if static_shapes and mode != "compressed":
    fail(f"mode={mode} is for devices that take batches of any shape: not for {device}")


def collate(examples):
    """Room for as many documents as the examples have; for num_documents where every shape is compiled anew."""
    k = num_documents if static_shapes or compile else min(num_documents, max(len(x["documents"]) for x in examples))
    try:
        return model.collate(examples, k, static_shapes)
    except ValueError as e:  # longer than the generator's positions
        fail(f"{e}; {checkpoints.describe()}")


def get_micro_batches(step):
    """This process's part of a step's examples, as batches on the CPU; none after the last step."""
    mine = [x for _, x in step_examples[step][rank::world]] if step < steps else []
    return [collate(mine[i:i + batch_size]) for i in range(0, len(mine), batch_size)]


# what a checkpoint keeps of this run
checkpoints, resuming = Checkpoints(out_dir), init_from == "resume" and not eval_only
run = {**config, "batch_size * gradient_accumulation_steps": examples_per_step,
       "sha256 of train_data": file_sha256(train_data), "sha256 of val_data": file_sha256(val_data)}
state = dict(step=0, evaluated=-1, skipped=0, best_val_loss=float("inf"), is_best=False, optimizer=None, window=None)
if resuming:
    if rank == 0:
        checkpoints.recover()
    host_sum(0)
    state = checkpoints.read_state(run, {"task": "answer", **vars(ScaleDownConfig())})
elif not eval_only:
    checkpoints.must_not_exist()

# model
torch.manual_seed(seed)
with fail_on(ValueError, OSError):
    model = ScaleDown(ScaleDownConfig(**{name: config[name] for name in ScaleDownConfig.__dataclass_fields__}),
                      dtype=getattr(torch, dtype))
    if eval_only:
        checkpoints.compare_model(config, ScaleDownConfig)
    if eval_only or init_from != "scratch":
        model.load(out_dir if eval_only else checkpoints.last if resuming else init_from)
distributed.place(model, processes, fsdp)
attention_for_training(kind, dtype, model.config, num_documents)
if gradient_checkpointing:
    distributed.enable_gradient_checkpointing(model, kind)
flops = StepFlops(model)

# optimizer. capturable: AdamW counts its steps in tensors; with numbers XLA would now and then compile the update anew
optimizer = model.configure_optimizers(generator_lr, compressor_lr, weight_decay, (beta1, beta2), fused=kind == "cuda",
                                       capturable=xla)
base_lrs = [group["lr"] for group in optimizer.param_groups]
parameters = [p for p in model.parameters() if p.requires_grad]
step_losses = distributed.StepLosses(["loss", *model.loss_parts], processes)
step = checkpoints.step = state["step"]
if resuming:
    distributed.load_optimizer_state(model, optimizer, state.pop("optimizer"))
    if xla:  # the line above makes AdamW's moments by a step at learning rate 0, which leaves NaN when capturable
        model.load(checkpoints.last)
    step_losses.window = state.pop("window")
    print0(f"resuming {out_dir} at step {step:,}"
           + (f": it has done its {steps:,} steps, more epochs or max_iters go on" if step >= steps else ""))
forward = torch.compile(model, backend="neuron" if kind == "neuron" else "inductor") if compile else model
ddp = world > 1 and not (fsdp or xla)
if ddp:
    forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)
if xla:
    xm.broadcast_master_param(model)  # the same start in every process, as DDP does it
    for p in parameters:  # zeros and never None, so that the first micro-batch of a step has the graph of the others
        p.grad = torch.zeros_like(p)
print0(f"{len(train_set):,} training and {len(val_set):,} validation examples, {steps:,} steps of {examples_per_step}")
print0(describe_parameters(model))


def lr_factor(step):
    """Linear warm-up, then linearly down to zero (Table 7)."""
    warmup = max(1, round(warmup_ratio * steps))
    return (step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup)


@torch.no_grad()
def evaluate():
    """Validation loss, the same with documents of other questions (where the two are equal nothing is read), and scores
    of greedy answers, over all processes; None when a signal came in between."""
    sums = dict.fromkeys((*model.loss_parts, "shuffled", "tokens", "em", "f1", "match", "samples"), 0.0)
    model.eval()
    stride = batch_size * world
    slices = [(examples, i) for examples in (val_examples, strangers) for i in range(0, len(examples), stride)]
    for examples, i in signals.until_caught(slices):
        mine = examples[i:i + stride][rank::world]
        # every process has as many batches (FSDP2 needs it), each full (XLA needs it); what fills them up is masked
        batch = collate((mine + val_examples[:1] * batch_size)[:batch_size])
        batch["labels"][len(mine):] = -100
        batch["present"][len(mine):] = False
        with autocast:
            _, parts = forward(model.to_device(batch), num_answer_tokens=1, num_queries=1)
        if xla:
            xm.mark_step()
        if examples is strangers:
            sums["shuffled"] += parts["generation"].item()
            continue
        for name, part in parts.items():
            sums[name] += part.item()
        sums["tokens"] += (batch["labels"] != -100).sum().item()
    # with FSDP2 the processes must go through the layers together, as often: each answers all
    stride = batch_size if fsdp else batch_size * world
    for i in signals.until_caught(range(0, len(samples), stride)):
        mine = samples[i:i + stride] if fsdp else samples[i:i + stride][rank::world]
        if mine:
            full = (mine + mine[:1] * batch_size)[:batch_size] if static_shapes else mine
            with autocast, fail_on(ValueError):  # longer than the generator's positions
                answers = model.generate([x["query"] for x in full], [x["documents"] for x in full],
                                         num_documents=num_documents)
            for name, mean in mean_scores(answers[:len(mine)], mine).items():
                sums[name] += len(mine) * mean
            sums["samples"] += len(mine)
    model.train()
    if signals.caught():
        return None
    sums = dict(zip(sums, host_sum(list(sums.values())).tolist()))
    n = len(val_examples)
    result = {"val_loss": sums["generation"] / sums["tokens"] + rerank_lambda * sums.get("reranking", 0) / n}
    if strangers:
        result["val_loss_shuffled"] = sums["shuffled"] / sums["tokens"]
    for name in model.loss_parts[1:]:
        result[f"val_{name}"] = sums[name] / n
    return result | {name: sums[name] / sums["samples"] for name in ("em", "f1", "match") if sums["samples"]}


def stop_if(bad):
    if bad:
        distributed.stop(f"{step_examples.describe(*bad, batch_size)}: stopped; {checkpoints.describe()}")


def save(is_best):
    """Writes the checkpoint of this step. Files are the same for one process, DDP and FSDP2."""
    tensors, moments = distributed.whole_state(model, optimizer)
    state.update(step=step, is_best=is_best)
    if rank == 0:
        checkpoints.save(model, tensors, dict(state, run=run, optimizer=moments, window=step_losses.window))
    checkpoints.step = step
    if rank == 0 and is_best:
        checkpoints.copy_to_best()
    host_sum(0)  # the others wait


def log(entry, more=""):
    if rank == 0 and not eval_only:
        checkpoints.log(entry, step)
    if rank == 0 and wandb_log and not eval_only:
        wandb.log(entry, step=entry.get("step"))
    print0(describe_entry(entry) + more)


signals = distributed.Signals()  # SIGTERM and Ctrl-C end the run after the step
model.train()
if eval_only:
    log(evaluate())
    distributed.leave()
if rank == 0:
    checkpoints.open(step, state["is_best"])
    if wandb_log:  # a resumed run goes on in its own run of wandb
        state["wandb_id"] = wandb.init(project=wandb_project, name=wandb_run_name or None, config=config,
                                       id=state.get("wandb_id"), resume="allow").id
signals.listen()

# training loop
batches = get_micro_batches(step)
first, started = step, time.time()
throughput = Throughput(world * (peak_tflops or peak_tflops_here(kind, dtype)))
while True:
    # how much all processes have to do in this step, and whether one of them is to stop
    counts = [sum(column) for column in zip(*map(flops.count, batches))] or [0, 0, 0]
    stopping, num_answer_tokens, step_tokens, step_flops = host_sum([signals.name is not None, *counts]).tolist()
    if stopping:
        stop_if(step_losses.fetch())
        if checkpoints.step < step:
            save(is_best=False)
        print0(f"stopped after step {step:,}; {checkpoints.describe()}"
               + ("; to go on: the same command with --init_from=resume" if checkpoints.step else ""))
        break

    # evaluate and write checkpoints; a resumed run does not evaluate again what it has evaluated
    if (step % eval_interval == 0 or step == steps) and step != state["evaluated"]:
        stop_if(step_losses.fetch())
        with throughput.paused():
            result = evaluate()
        if result is None:
            continue
        log({"step": step, **result})
        if not math.isfinite(result["val_loss"]):
            distributed.stop(f"step {step}: validation loss {result['val_loss']}; {checkpoints.describe()}")
        state["evaluated"] = step
        if step > 0:
            is_best = result["val_loss"] < state["best_val_loss"]
            state["best_val_loss"] = min(state["best_val_loss"], result["val_loss"])
            with throughput.paused():
                save(is_best)
    if step >= steps:
        break

    # learning rates, and the seed of dropout, which depends on seed, step and process: no random state to keep
    for group, lr in zip(optimizer.param_groups, base_lrs):
        group["lr"] = lr * lr_factor(step)
    step_seed = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    torch.manual_seed(step_seed)
    if xla:
        xm.set_rng_state(step_seed, str(device))

    # forward and backward, a micro-batch at a time
    losses = []
    for i, batch in enumerate(batches):
        if ddp:
            forward.require_backward_grad_sync = i == len(batches) - 1  # gradients travel once a step
        with autocast:  # a process divides by its share of the step: gradients are then averaged over the processes
            loss, parts = forward(model.to_device(batch), num_answer_tokens / world, examples_per_step / world)
        loss.backward()
        losses.append(torch.stack([loss.detach(), *parts.values()]))
        if xla:
            xm.mark_step()  # one graph, compiled once, for every micro-batch; it runs while the next is collected
    batches = get_micro_batches(step + 1)

    # clip the gradient and update the weights
    if xla:
        xm.reduce_gradients(optimizer)  # averages over the replicas, which DDP and FSDP2 do in backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or float("inf"))
    step_losses.add(step + 1, torch.stack(losses), norm.full_tensor() if fsdp else norm)
    bad = step_losses.fetch() if not xla or skip_nonfinite else None
    if bad and skip_nonfinite:
        state["skipped"] += 1
        print0(f"{step_examples.describe(*bad, batch_size)}: skipped")
    else:
        stop_if(bad)
        optimizer.step()
    optimizer.zero_grad(set_to_none=not xla)
    if xla:
        xm.mark_step()  # the graph of the update
    step += 1

    # log
    throughput.add(examples_per_step, step_tokens, step_flops)
    if step % log_interval == 0 or step == steps:
        stop_if(step_losses.fetch())  # on XLA the only time that losses are fetched
        lr = dict(generator_lr=generator_lr * lr_factor(step - 1), compressor_lr=compressor_lr * lr_factor(step - 1))
        entry = {"step": step} | step_losses.means() | lr | throughput.rates()
        if state["skipped"]:
            entry["skipped"] = state["skipped"]
        left = (time.time() - started) / (step - first) * (steps - step)
        log(entry, f", {timedelta(seconds=round(left))} left")
        step_losses.clear_window()
        throughput.restart()

signals.restore()
if rank == 0 and wandb_log:
    wandb.finish()
if sample_at_end and not stopping and rank == 0:
    distributed.run_script("sample.py", out_dir=checkpoints.best, val_data=val_data, candidates=num_documents,
                           device="cpu" if xla else device, dtype=dtype)
distributed.leave()
