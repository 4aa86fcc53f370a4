"""
What the log says about size and speed: numbers of parameters, examples and tokens a second, and "mfu" (model FLOPs
utilisation: the share of the device's peak), by the FLOPs of a training step.

A token costs 6 FLOPs for each trained weight of a matrix product that it meets and 4 for each frozen one, which needs
no gradient of its own (PaLM, arXiv 2204.02311, appendix B, counts 6 for all); attention's own products and what
gradient checkpointing computes again are left out, as is the compressor's own LoRA.
"""

import time
from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pretrained import decoder_layers

# of one device, TFLOP/s in 16 bit, dense (NVIDIA's data sheets)
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312}


def peak_tflops_here(kind, dtype):
    """The peak of this machine's device where it is known, else 0."""
    if kind != "cuda" or dtype != "bfloat16":
        return 0.0
    return next((peak for name, peak in PEAKS.items() if name in torch.cuda.get_device_name()), 0.0)


def describe_parameters(model):
    """A line about the numbers of parameters."""
    millions = lambda module, trained: sum(p.numel() for p in module.parameters() if p.requires_grad == trained) / 1e6
    return (f"trained: compressor {millions(model.compressor, True):.2f}M, LoRA {millions(model.generator, True):.2f}M "
            f"parameters; frozen: {millions(model, False):.2f}M")


def describe_entry(entry):
    """An entry of the log as a line."""
    return ", ".join(f"{name} {value:.2e}" if name.endswith("_lr") else f"{name} {value:,}" if isinstance(value, int)
                     else f"{name} {value:.4f}" for name, value in entry.items())


def matrix_weights(module):
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Linear, Conv1D)))


class StepFlops:
    """Counts tokens and FLOPs of a ScaleDown model's batches."""

    def __init__(self, model):
        self.model, generator, compressor = model, model.generator, model.compressor
        backbone = getattr(compressor, "backbone", compressor)
        self.head = generator.get_output_embeddings().weight.numel()
        self.frozen = matrix_weights(generator) - self.head
        self.lora = sum(p.numel() for p in generator.parameters() if p.requires_grad)
        self.compressor = matrix_weights(backbone)
        self.projection = matrix_weights(compressor) - self.compressor  # reads memory tokens only
        self.shared = getattr(compressor, "shares_generator", False)  # PISCO's reads with the generator's layers
        if self.shared:
            self.compressor = self.frozen
        self.last = 0  # weights that only MEM and RR pass through: a packed last layer's after queries, keys and values
        if getattr(compressor, "packed", False):
            layer = decoder_layers(backbone)[-1]
            attention = next(m for m in layer.modules() if hasattr(m, "is_causal"))
            first = [m for name, m in attention.named_modules() if isinstance(m, (nn.Linear, Conv1D))
                     and name.removesuffix(".base") not in ("o_proj", "out_proj", "c_proj", "dense", "resid_proj")]
            self.last = matrix_weights(layer) - sum(m.weight.numel() for m in first)
            self.compressor -= self.last

    def count(self, batch):
        """A batch of collate() -> answer tokens, all tokens and FLOPs of a training step on it, padding left out."""
        c, present = self.model.config, batch["present"]
        each = 4 if c.compressor_lora_r or self.shared else 6
        answer, documents = (batch["labels"] != -100).sum().item(), present.sum().item()
        l, learned = c.num_memory_tokens, c.num_memory_tokens + c.enable_reranking
        if "compressor" not in batch:  # mode full or none
            tokens = batch["tail_mask"].sum().item()
            return answer, tokens, tokens * (4 * self.frozen + 6 * self.lora) + 4 * answer * self.head
        masks = [t for name, t in batch["compressor"].items() if name.endswith("mask")]  # (B, T) or (B, k, T)
        compressor = sum((t & present[..., None] if t.dim() == 3 else t).sum().item() for t in masks)
        compressor += documents * learned
        B, before = len(present), len(self.model.before_ids)
        generator = B * (before + c.sep_after_last - 1) + documents * (l + 1) + batch["tail_mask"].sum().item()
        flops = (each * compressor * self.compressor + 6 * documents * l * self.projection
                 + each * documents * learned * self.last
                 + generator * (4 * self.frozen + 6 * self.lora) + 4 * answer * self.head)
        return answer, compressor + generator, flops


class Throughput:
    """Examples, tokens and FLOPs a second since restart(), evaluations and checkpoints left out. peak: TFLOP/s of all
    devices, 0 = unknown."""

    def __init__(self, peak):
        self.peak = peak
        self.restart()

    def restart(self):
        self.began, self.sums = time.time(), dict(examples=0, tokens=0, flops=0)

    @contextmanager
    def paused(self):
        t = time.time()
        yield
        self.began += time.time() - t

    def add(self, examples, tokens, flops):
        for name, n in dict(examples=examples, tokens=tokens, flops=flops).items():
            self.sums[name] += n

    def rates(self):
        seconds = time.time() - self.began
        rates = dict(examples_per_s=self.sums["examples"] / seconds, tokens_per_s=round(self.sums["tokens"] / seconds))
        return rates | ({"mfu": self.sums["flops"] / seconds / (self.peak * 1e12)} if self.peak else {})
