"""
LoRA (arXiv 2106.09685), written by hand: y = W x + (alpha / r) B A x, with W frozen and A, B learned.

r is the rank of the update, alpha / r scales it. Files are PEFT's own (adapter_model.safetensors,
adapter_config.json), so PEFT and vLLM load what is saved here.
"""

import json
import math
import os
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer: its weight is transposed, (in, out)

from dropout import Dropout
from files import load_tensors, read_json
from pretrained import check_plain_lora


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update. x (B, ..., in) -> (B, ..., out)."""

    def __init__(self, base, r=16, alpha=32, dropout=0.1):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.transposed = isinstance(base, Conv1D)
        n_out, n_in = base.weight.T.shape if self.transposed else base.weight.shape
        # float32 whatever the base is: a step of 1e-4 on a bf16 weight is mostly rounded away
        self.lora_A = nn.Parameter(torch.empty(r, n_in, device=base.weight.device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(n_out, r, device=base.weight.device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # B = 0: training starts from the base model
        self.dropout = Dropout(dropout)
        self.alpha = alpha
        self.scaling = alpha / r
        self.merged = False
        self.other = ()  # A and B in place of its own, or None, see other_adapter()

    def forward(self, x):
        y = self.base(x)
        if self.merged or self.other is None:
            return y
        A, B = self.other or (self.lora_A, self.lora_B)
        h = self.scaling * F.linear(self.dropout(x), A.to(x.dtype))  # (..., r)
        # one kernel multiplies by B and adds: B A x never exists as a tensor of its own. (It could scale as well, but
        # on XLA an addmm that scales runs on the CPU.)
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), B.to(h.dtype).T).view_as(y)

    @property
    def weight(self):
        """The frozen weight, where a model looks at its layer's (HunYuan-MoE's router asks for the dtype)."""
        return self.base.weight

    def delta(self):
        """The update as a matrix in the base weight's layout."""
        d = self.scaling * (self.lora_B @ self.lora_A)
        return d.T if self.transposed else d


def layers(model):
    """(name, LoRALinear) of every adapted layer, named as in the model without adapters."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]


def apply_lora(model, r=16, alpha=32, dropout=0.1):
    """Freezes `model` and replaces, in place, every linear layer of its blocks by a LoRALinear ("all-linear": every
    nn.Linear and Conv1D but the output head; embeddings are no linear layers, nor is what inherits from nn.Linear and
    computes something else, such as PhiMoE's router)."""
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        plain = type(module).forward in (nn.Linear.forward, Conv1D.forward)
        if isinstance(module, (nn.Linear, Conv1D)) and plain and module is not head:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LoRALinear(module, r, alpha, dropout))


@torch.no_grad()
def merge(model):
    """Adds the updates into the base weights, for inference at no extra cost."""
    for _, m in layers(model):
        if not m.merged:
            m.base.weight += m.delta().to(m.base.weight.dtype)
            m.merged = True


@torch.no_grad()
def unmerge(model):
    """Subtracts the updates again. As in PEFT, the weights come back up to the rounding of their dtype."""
    for _, m in layers(model):
        if m.merged:
            m.base.weight -= m.delta().to(m.base.weight.dtype)
            m.merged = False


def merge_and_unload(model):
    """Merges, and puts the linear layers back in their places: an ordinary model again."""
    merge(model)
    for name, m in layers(model):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, m.base)


def must_not_be_merged(model):
    if any(m.merged for _, m in layers(model)):
        raise RuntimeError("the adapter is merged into the weights: unmerge() it before it is switched off or replaced")


@contextmanager
def other_adapter(model, pairs):
    """Within it `model` has another adapter of the same rank, alpha and dropout: pairs, A (r, in) and B (out, r) for
    each of layers(model), None for one without an update. Raises RuntimeError when its own is merged."""
    must_not_be_merged(model)
    for (_, m), pair in zip(layers(model), pairs):
        m.other = pair
    try:
        yield
    finally:
        for _, m in layers(model):
            m.other = ()


def adapter_off(model):
    """Within it `model` is the frozen base model. Raises RuntimeError when the adapter is merged."""
    return other_adapter(model, [None] * len(layers(model)))


def save_lora(model, folder, base_model, tensors=None):
    """Writes the adapter in PEFT's format. `base_model`: the name or folder of the model it belongs to. `tensors`: the
    parameters by their names in `model`, where it holds but a part of each itself (FSDP2)."""
    tensors = tensors or dict(model.named_parameters())
    adapted = layers(model)
    tensors = {f"base_model.model.{name}.{part}.weight": tensors[f"{name}.{part}"].detach().cpu()
               for name, _ in adapted for part in ("lora_A", "lora_B")}
    m = adapted[0][1]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "bias": "none",
        "r": m.lora_A.shape[0], "lora_alpha": m.alpha, "lora_dropout": m.dropout.p, "fan_in_fan_out": m.transposed,
        "target_modules": sorted({name.rpartition(".")[2] for name, _ in adapted}), "inference_mode": True,
    }
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(folder, "adapter_config.json"), "w") as f:
        json.dump(config, f, indent=2)


@torch.no_grad()
def load_lora(model, folder):
    """Loads an adapter saved by save_lora() or by PEFT into a model that apply_lora() has prepared.

    Raises ValueError, and changes nothing, when the file's layers, rank or shapes are not the model's, or when it is a
    variant of LoRA that LoRALinear is not; RuntimeError when an adapter is merged."""
    must_not_be_merged(model)
    config = read_json(os.path.join(folder, "adapter_config.json"))
    check_plain_lora(config, folder)
    own = {f"base_model.model.{name}.{part}.weight": getattr(m, part)
           for name, m in layers(model) for part in ("lora_A", "lora_B")}
    tensors = load_tensors(os.path.join(folder, "adapter_model.safetensors"), own)
    for key, p in own.items():
        p.copy_(tensors[key])
    for _, m in layers(model):
        m.alpha = config["lora_alpha"]
        m.scaling = m.alpha / config["r"]
