"""
Memory made without any training, read by the LoRA that was trained on text (out/full/best): the loss of the first 64
dev questions with their own passage and with another question's, for 32 and 8 embeddings a passage.

    PYTHONPATH=. python docs/ladder/by_hand.py
"""

import json

import torch
from excerpts import best_start

from model import ScaleDown, ScaleDownConfig

examples = [json.loads(line) for line in open("data/ladder/gold.dev.jsonl")][:64]


def means(ids, x, l, power):
    """The means of l slices of the passage; deviations from the mean of all embeddings, summed and divided by the
    number of tokens to this power: 1 gives means, 0.5 sums as large as one token's deviation."""
    slices = [[t for j, t in enumerate(ids) if j * l // len(ids) == i] for i in range(l)]
    return torch.stack([center + (embed[s] - center).sum(0) / max(1, len(s)) ** power for s in slices])


def excerpt(ids, x, l, words):
    """The embeddings of the l tokens among which the most of the tokens of x[words] occur."""
    words = {t for row in tokens([x[words], " " + x[words]], 128) for t in row}
    start = best_start(ids, words, l)
    return torch.cat([embed[ids[start:start + l]], center.expand(max(0, l - len(ids)), -1)])


for l in 32, 8:
    model = ScaleDown(ScaleDownConfig(generator="smollm2", num_layers=1, num_memory_tokens=l, answer_tokens=32)).eval()
    model.load("out/full/best")
    embed, tokens = model.generator.get_input_embeddings().weight.data, model.compressor.layout.tokens
    model.sep.data[:] = center = embed.mean(0)
    for name, make, how in (("means", means, 1), ("centred means", means, 0.5), ("question", excerpt, "query"),
                            ("answer", excerpt, "answer")):
        loss, n = [0, 0], 0
        for i in range(0, 64, 16):
            batch = model.collate(examples[i:i + 16], 1)
            n += (batch["labels"] != -100).sum().item()
            for shuffled in 0, 1:
                passages = [examples[(j + 7 * shuffled) % 64]["documents"][0] for j in range(i, i + 16)]
                rows = tokens([f"{d['title']}\n{d['text']}" for d in passages], 128)
                memory = [make(ids, x, l, how) for ids, x in zip(rows, examples[i:])]
                memory = torch.stack(memory)[:, None]  # (16, 1, l, d)
                model.compressor.forward = lambda memory=memory, **_: (memory, None)
                with torch.no_grad():
                    loss[shuffled] += model(batch, num_answer_tokens=1)[0].item()
        print(l, name, *(round(x / n, 3) for x in loss), flush=True)
