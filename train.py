"""
Trains a compressor and the generator's LoRA on a teacher's answers. One process, one device:

    python train.py config/toy.py                        # a toy world, minutes on a laptop
    python train.py config/n_layers.py --batch_size=4    # the paper's run; any setting below can be overridden

writes into out_dir: the last checkpoint (with optimizer.pt, to resume from), best/ (lowest validation loss) and
metrics.jsonl.
"""

import json
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import torch

from configurator import at_least, configure, fail, torch_device
from data import Examples, mean_scores
from model import ScaleDown, ScaleDownConfig, read_config

# -----------------------------------------------------------------------------
# the paper's values (Table 7), for its N-layers compressor
# i/o
out_dir = "out"
init_from = "scratch"  # or resume
eval_only = False  # evaluate once and stop
eval_interval = 500
eval_examples = 1000  # validation loss on so many examples
eval_samples = 100  # exact match and F1 of answers generated for so many of them
log_interval = 10
sample_at_end = False  # finish with sample.py on one validation question
wandb_log = False
wandb_project = "scaledown"
wandb_run_name = ""
# data
train_data = "data/train.jsonl"
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
query_tokens = 64
doc_tokens = 128
answer_tokens = 128
lora_r = 16
lora_alpha = 32
lora_dropout = 0.1
gradient_checkpointing = False
# optimisation
batch_size = 16  # examples a forward pass
gradient_accumulation_steps = 8  # forward passes a step
epochs = 1.0
max_iters = 0  # steps; 0 = as many as the epochs take
generator_lr = 1e-4
compressor_lr = 5e-5
warmup_ratio = 0.05  # of all steps; then linearly down to zero
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0
seed = 1337
# system
device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
dtype = "bfloat16" if torch.cuda.is_available() else "float32"
compile = False
# -----------------------------------------------------------------------------
config = configure(globals())
device = torch_device(device)
if dtype not in ("float32", "bfloat16"):
    fail(f"dtype is float32 or bfloat16, not '{dtype}'")
if init_from not in ("scratch", "resume"):
    fail(f"init_from is scratch or resume, not '{init_from}'")
at_least(globals(), batch_size=1, gradient_accumulation_steps=1, num_documents=1, eval_examples=1, eval_interval=1,
         log_interval=1, eval_samples=0, max_iters=0, epochs=0, seed=0, generator_lr=0, compressor_lr=0, warmup_ratio=0,
         weight_decay=0, beta1=0, beta2=0, grad_clip=0, rerank_lambda=0)
if max(beta1, beta2) >= 1 or epochs == 0:
    fail("beta1 and beta2 must be less than 1, epochs more than 0")
if wandb_log:
    try:
        import wandb
    except ImportError:
        fail("wandb_log=True needs wandb: pip install wandb")
torch.manual_seed(seed)
ctx = nullcontext() if dtype == "float32" else torch.autocast(device.split(":")[0], dtype=torch.bfloat16)

# data
if train_data == "data/toy/train.jsonl" and not os.path.exists(train_data):
    subprocess.run([sys.executable, "prepare.py", "--dataset=toy"], check=True)
try:
    train_set = Examples(train_data, need_scores=enable_reranking)
    val_set = Examples(val_data, need_scores=enable_reranking)
except (ValueError, OSError) as e:
    fail(e)
examples_per_step = batch_size * gradient_accumulation_steps
steps = max_iters or math.ceil(epochs * len(train_set) / examples_per_step)
val_examples = [val_set[i] for i in range(min(eval_examples, len(val_set)))]


def get_micro_batches(step):
    """The examples of a step, as batches on the CPU. Every epoch has an order of its own; the order depends on nothing
    but the seed, so that a resumed run goes on with the same examples."""
    where = np.arange(step * examples_per_step, (step + 1) * examples_per_step)
    orders = {e: np.random.default_rng((seed, e)).permutation(len(train_set)) for e in {*(where // len(train_set))}}
    examples = [train_set[orders[i // len(train_set)][i % len(train_set)]] for i in where]
    return [model.collate(examples[i:i + batch_size], num_documents) for i in range(0, len(examples), batch_size)]


# model
try:
    model = ScaleDown(ScaleDownConfig(**{name: config[name] for name in ScaleDownConfig.__dataclass_fields__}),
                      dtype=getattr(torch, dtype))
    start, best_val_loss = 0, float("inf")
    if init_from == "resume":
        for name, value in read_config(out_dir)[0].items():
            if name not in ("generator", "compressor_model", "generator_identity") and value != config[name]:
                fail(f"the checkpoint {out_dir} has {name}={value}, this run {name}={config[name]}")
        model.load(out_dir)
except (ValueError, OSError) as e:
    fail(str(e).splitlines()[0])
model.to(device)
if gradient_checkpointing:
    model.enable_gradient_checkpointing()
optimizer = model.configure_optimizers(generator_lr, compressor_lr, weight_decay, (beta1, beta2),
                                       fused=device.startswith("cuda"))
base_lrs = [group["lr"] for group in optimizer.param_groups]  # before a resumed state brings the last step's
if init_from == "resume" and not eval_only:
    if not os.path.isfile(f"{out_dir}/optimizer.pt"):
        fail(f"{out_dir}/optimizer.pt does not exist: nothing to resume from")
    state = torch.load(f"{out_dir}/optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    start, best_val_loss = state["step"], state["best_val_loss"]
    torch.set_rng_state(state["rng"])
    if device.startswith("cuda") and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"], device)
    del state
    print(f"resuming {out_dir} at step {start:,}")
parameters = [p for p in model.parameters() if p.requires_grad]
forward = torch.compile(model) if compile else model
count = lambda module: sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6
print(f"{len(train_set):,} training and {len(val_set):,} validation examples, {steps:,} steps of {examples_per_step}")
print(f"trained: compressor {count(model.compressor):.2f}M, LoRA {count(model.generator):.2f}M parameters; "
      f"frozen: {sum(p.numel() for p in model.parameters() if not p.requires_grad) / 1e6:.2f}M")


def lr_factor(step):
    """Linear warm-up, then linearly down to zero (Table 7)."""
    warmup = max(1, round(warmup_ratio * steps))
    return (step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup)


@torch.no_grad()
def evaluate():
    """Validation loss and, on the first eval_samples examples, the scores of greedily generated answers."""
    model.eval()
    generation = reranking = tokens = 0
    for i in range(0, len(val_examples), batch_size):
        batch = model.to_device(model.collate(val_examples[i:i + batch_size], num_documents))
        with ctx:
            _, parts = forward(batch, num_answer_tokens=1, num_queries=1)
        generation += parts["generation"].item()
        reranking += parts["reranking"].item() if enable_reranking else 0
        tokens += (batch["labels"] != -100).sum().item()
    result = {"val_loss": generation / tokens + rerank_lambda * reranking / len(val_examples)}
    if enable_reranking:
        result["val_reranking"] = reranking / len(val_examples)
    samples = val_examples[:eval_samples]
    answers = []
    for i in range(0, len(samples), batch_size):
        part = samples[i:i + batch_size]
        with ctx:
            answers += model.generate([x["query"] for x in part], [x["documents"][:num_documents] for x in part])
    if samples:
        result.update(mean_scores(answers, samples))
    model.train()
    return result


def save(step):
    """The last checkpoint, which --init_from=resume goes on from."""
    model.save(out_dir)
    state = dict(optimizer=optimizer.state_dict(), step=step, best_val_loss=best_val_loss, rng=torch.get_rng_state())
    if device.startswith("cuda"):
        state["cuda_rng"] = torch.cuda.get_rng_state(device)
    torch.save(state, f"{out_dir}/optimizer.pt")


def last_good():
    return f"{out_dir} holds the checkpoint of step {saved}" if saved else "no checkpoint was written yet"


def log(entry):
    if not eval_only:
        with open(f"{out_dir}/metrics.jsonl", "a") as f:
            f.write(json.dumps(entry) + "\n")
    if wandb_log:
        wandb.log(entry, step=entry.get("step"))
    print(", ".join(f"{name} {value:.2e}" if name.endswith("_lr") else f"{name} {value:,}" if isinstance(value, int)
                    else f"{name} {value:.4f}" for name, value in entry.items()), flush=True)


if not eval_only:  # a resumed run says again what came after its checkpoint
    os.makedirs(out_dir, exist_ok=True)
    kept = []
    if init_from == "resume" and os.path.isfile(f"{out_dir}/metrics.jsonl"):
        with open(f"{out_dir}/metrics.jsonl") as f:
            kept = [line for line in f if json.loads(line)["step"] <= start]
    with open(f"{out_dir}/metrics.jsonl", "w") as f:
        f.writelines(kept)
if wandb_log:
    wandb.init(project=wandb_project, name=wandb_run_name or None, config=config)

# training loop
model.train()
step, saved = start, start
batches = get_micro_batches(step)
# what a log line tells of the steps since the last one or since an evaluation: sums of losses, real tokens read
losses, num_steps, tokens_read, t0 = {}, 0, 0, time.time()
while True:
    # evaluate and write checkpoints; a resumed run has done so at the step it begins with
    if (step % eval_interval == 0 or step == steps) and (step > start or init_from == "scratch") or eval_only:
        result = evaluate()
        log(result if eval_only else {"step": step, **result})
        if eval_only:
            break
        if not math.isfinite(result["val_loss"]):
            fail(f"step {step}: validation loss {result['val_loss']}; {last_good()}")
        if step > 0:
            if result["val_loss"] < best_val_loss:
                best_val_loss = result["val_loss"]
                model.save(f"{out_dir}/best")
            save(step)
            saved = step
        losses, num_steps, tokens_read, t0 = {}, 0, 0, time.time()
    if step >= steps:
        break

    for group, lr in zip(optimizer.param_groups, base_lrs):
        group["lr"] = lr * lr_factor(step)
    # the mean over all answer tokens of the step, however they are spread over its micro-batches
    num_answer_tokens = sum((b["labels"] != -100).sum().item() for b in batches)
    tokens_read += sum(mask.sum().item() for b in batches for mask in (b["tail_mask"], *b["compressor"].values())
                       if mask.dtype == torch.bool)
    loss = 0.0
    for batch in batches:
        with ctx:
            part, parts = forward(model.to_device(batch), num_answer_tokens, examples_per_step)
        part.backward()
        loss += part.detach()
        for name, value in {"loss": part.detach(), **parts}.items():
            losses[name] = losses.get(name, 0.0) + value
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or float("inf"))
    if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
        fail(f"step {step + 1}: loss {loss.item()}, gradient norm {norm.item()}: stopped before it reached the "
             f"weights; {last_good()}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    step += 1
    num_steps += 1
    if step < steps:
        batches = get_micro_batches(step)
    if step % log_interval == 0 or step == steps:
        seconds = time.time() - t0
        log({"step": step, **{name: value.item() / num_steps for name, value in losses.items()},
             "generator_lr": generator_lr * lr_factor(step - 1), "compressor_lr": compressor_lr * lr_factor(step - 1),
             "grad_norm": norm.item(), "tokens_per_s": round(tokens_read / seconds)})
        losses, num_steps, tokens_read, t0 = {}, 0, 0, time.time()

if sample_at_end and not eval_only:
    args = dict(out_dir=f"{out_dir}/best", val_data=val_data, num_documents=num_documents, device=device, dtype=dtype)
    subprocess.run([sys.executable, "sample.py", *(f"--{name}={value}" for name, value in args.items())], check=True)
