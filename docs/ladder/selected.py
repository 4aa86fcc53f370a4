"""
Do the selected tokens depend on the question? Of the first 128 dev questions the loss, and, of an answer's tokens that
stand in the passage, the share that is selected: where the compressor reads the question, where it reads another, and
with the embeddings of the selected tokens alone, without what the layers make.

    PYTHONPATH=. python docs/ladder/selected.py out/select32_seed2/last
"""

import json
import sys

import torch

from model import ScaleDown

with open("data/ladder/gold.dev.jsonl") as f:
    examples = [json.loads(line) for line in f][:128]
model = ScaleDown.from_pretrained(sys.argv[1])
c, l = model.compressor, model.config.num_memory_tokens
for name, shift, gain in (("its question", 0, 1), ("another question", 1, 1), ("its question, embeddings alone", 0, 0)):
    c.layers_gain.data *= gain
    loss = tokens = share = answers = 0
    for i in range(0, 128, 32):
        batch = model.collate(examples[i:i + 32], 1)
        for key in ("query_ids", "query_mask"):
            batch["compressor"][key] = batch["compressor"][key].roll(shift, 0)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            loss += model(batch, num_answer_tokens=1)[1]["generation"].item()
        tokens += (batch["labels"] != -100).sum().item()
        for ids, mask, scores, labels in zip(*(batch["compressor"][key][:, 0] for key in ("doc_ids", "doc_mask")),
                                             c.scores[:, 0], batch["labels"]):
            passage = c.same[ids[mask]]
            answer = set(c.same[labels[labels >= 0]].tolist()) & set(passage.tolist())
            best = set(passage[scores[mask].topk(min(l, len(passage))).indices].tolist())
            share, answers = share + len(answer & best) / max(1, len(answer)), answers + bool(answer)
    print(f"{name}: loss {loss / tokens:.3f}, {share / answers:.3f} of the answers' tokens selected")
