"""The loop of train.py against one written by hand: schedule, learning rates, clipping, AdamW, what the log says."""

import json

import pytest
import torch
from conftest import CHATML, EXAMPLES, metrics, run
from safetensors.torch import load_file
from transformers import get_linear_schedule_with_warmup

from data import Examples, StepExamples
from flops import StepFlops
from model import ScaleDown, ScaleDownConfig
from pretrained import embedding_std, load_tokenizer
from prompt import Prompt

STEPS, LRS, BETAS, DECAY, CLIP = 4, (3e-3, 1e-3), (0.7, 0.8), 0.5, 0.05


@pytest.fixture(scope="module")
def hand(job, tmp_path_factory):
    """(out_dir of a run, its model as it began, batches of its steps)"""
    args, _, folder = job
    here = tmp_path_factory.mktemp("loop")
    rows = [{**EXAMPLES[i % 3], "query": f"{EXAMPLES[i % 3]['query']} {i}"} for i in range(20)]
    for name, part in (("train", rows), ("val", rows[3:8])):
        (here / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in part))
    own = dict(train_data=here / "train.jsonl", val_data=here / "val.jsonl", max_iters=STEPS, warmup_ratio=0.5,
               generator_lr=LRS[0], compressor_lr=LRS[1], beta1=BETAS[0], beta2=BETAS[1], weight_decay=DECAY, grad_clip=CLIP,
               lora_dropout=0.0, eval_interval=STEPS, out_dir=here / "out", peak_tflops=1e-3)
    run("train.py", *args, *(f"--{k}={v}" for k, v in own.items()))
    settings = {a[2:].split("=")[0]: a.split("=")[1] for a in args}
    torch.manual_seed(1337)
    model = ScaleDown(ScaleDownConfig(generator=settings["generator"], num_layers=2, num_memory_tokens=2, answer_tokens=8,
                                      enable_reranking=True, lora_dropout=0.0))
    steps = StepExamples(Examples(str(here / "train.jsonl")), 4, 3, 1337, 1)
    return here, model, [model.collate([x for _, x in steps[i]], 3) for i in range(STEPS)]


def test_weights_are_those_of_a_loop_written_by_hand(hand):
    here, model, batches = hand
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in trained.items()}
    clock = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_linear_schedule_with_warmup(clock, STEPS // 2, STEPS)
    said = [x for x in metrics(here / "out") if "loss" in x]
    for step, batch in enumerate(batches):
        clock.step(), schedule.step()
        factor = (step + 1) / 2 if step < 2 else (STEPS - step) / 2
        if step + 1 < STEPS // 2:  # transformers' schedule begins at 0, ours one step further
            assert factor == schedule.get_last_lr()[0]
        loss = model(batch)[0]
        grads = dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))
        norm = sum((g ** 2).sum() for g in grads.values()).sqrt()
        assert norm > 2 * CLIP and said[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert said[step]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        with torch.no_grad():
            for name, p in trained.items():
                lr = factor * (LRS[0] if name.startswith("generator.") else LRS[1])
                g, (m, v) = grads[name] * CLIP / norm, moments[name]
                m.mul_(BETAS[0]).add_((1 - BETAS[0]) * g)
                v.mul_(BETAS[1]).add_((1 - BETAS[1]) * g ** 2)
                p.mul_(1 - lr * DECAY * (p.dim() >= 2))
                p.sub_(lr * m / (1 - BETAS[0] ** (step + 1)) / ((v / (1 - BETAS[1] ** (step + 1))).sqrt() + 1e-8))
    last = load_file(here / "out/last/compressor.safetensors")
    adapter = load_file(here / "out/last/adapter_model.safetensors")
    last |= {f"generator.{n.removeprefix('base_model.model.').removesuffix('.weight')}": t for n, t in adapter.items()}
    assert last.keys() == trained.keys()
    for name, p in trained.items():
        torch.testing.assert_close(last[name], p.detach(), atol=2e-4, rtol=2e-3, msg=name)


def test_validation_loss_is_the_mean_over_tokens(hand):
    here, _, _ = hand
    model = ScaleDown.from_pretrained(here / "out/last")
    generation = tokens = reranking = 0
    examples = Examples(str(here / "val.jsonl"))
    for x in map(examples.__getitem__, range(5)):
        batch = model.collate([x], 3)
        n = (batch["labels"] != -100).sum().item()
        parts = model(batch)[1]
        generation, tokens, reranking = generation + parts["generation"].item() * n, tokens + n, reranking + parts["reranking"].item()
    said = metrics(here / "out")[-1]
    # the control: each question with the documents of one that stands two places off, ordered by length
    rows = sorted(map(examples.__getitem__, range(5)), key=lambda x: len(x["query"] + x["answer"]))
    shuffled = [{**x, "documents": rows[(i + 2) % 5]["documents"]} for i, x in enumerate(rows)]
    sums = [model(model.collate([x], 3), num_answer_tokens=1)[1]["generation"].item() for x in shuffled]
    assert said["val_loss_shuffled"] == pytest.approx(sum(sums) / tokens, rel=1e-4) and sum(sums) != pytest.approx(generation, rel=1e-4)
    assert said["val_loss"] == pytest.approx(generation / tokens + 0.05 * reranking / 5, rel=1e-4)
    assert said["val_reranking"] == pytest.approx(reranking / 5, rel=1e-4)


def test_utilisation_is_flops_by_time_and_peak(hand):
    here, model, batches = hand
    for x, batch in zip([x for x in metrics(here / "out") if "loss" in x], batches):
        _, tokens, flops = StepFlops(model).count(batch)
        assert x["mfu"] * 1e-3 * 1e12 / x["tokens_per_s"] == pytest.approx(flops / tokens, rel=2e-3)


def test_sep_is_as_large_as_the_embeddings(hand):
    _, model, _ = hand
    fresh = ScaleDown(model.config)
    assert 0.5 < fresh.sep.std().item() / embedding_std(fresh.generator.get_input_embeddings()) < 2


def test_models_that_can_think_aloud_are_asked_not_to(tiny):
    tokenizer = load_tokenizer(tiny("llama"))
    thinking = "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
    tokenizer.chat_template = CHATML.replace("assistant\n", "assistant\n" + thinking)
    assert Prompt(tokenizer).after.endswith("<|im_end|>\n<|im_start|>assistant\n")
