"""
Does the compressor with pointers read? The loss of the first 128 dev questions where the hidden states that make the
pointers are the mean of those of 32 questions, so that they know no question and no passage, and with plain means.

    PYTHONPATH=. python docs/ladder/static.py
"""

import json

import torch

from model import ScaleDown, ScaleDownConfig
from skip import PointerNLayersCompressor, slice_means

with open("data/ladder/gold.dev.jsonl") as f:
    examples = [json.loads(line) for line in f][:128]
model = ScaleDown(ScaleDownConfig(generator="smollm2", compressor_type="skip.PointerNLayersCompressor", num_layers=10,
                                  num_memory_tokens=32, query_tokens=48, answer_tokens=32, lora_dropout=0.0)).eval()
model.load("out/pointer32_seed2/last")
means = PointerNLayersCompressor.means


def loss():
    total = n = 0
    for i in range(0, 128, 32):
        batch = model.collate(examples[i:i + 32], 1)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            total += model(batch, num_answer_tokens=1)[0].item()
        n += (batch["labels"] != -100).sum().item()
    return round(total / n, 4)


print("pointers", loss())
PointerNLayersCompressor.means = lambda c, h, x, mask: means(c, h.mean((0, 1), keepdim=True).expand_as(h), x, mask)
print("pointers that know no question and no passage", loss())
model.compressor.layers_gain.data.zero_()
print(".. and nothing of the layers added", loss())
PointerNLayersCompressor.means = lambda c, h, x, mask: slice_means(x, mask, h.shape[2])
print("plain means, nothing of the layers added", loss())
