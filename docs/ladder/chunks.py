"""
Makes data/ladder/chunksN.train.jsonl and chunksN.val.jsonl: "Repeat it." over chunks of N tokens of the passages of
../shared/data/wiki, 100 of them to validate, of passages of their own.

    python docs/ladder/chunks.py 16
"""

import json
import os
import random
import sys

from transformers import AutoTokenizer

n, tokenizer, rng = int(sys.argv[1]), AutoTokenizer.from_pretrained("smollm2"), random.Random(0)
documents = [" ".join(json.loads(line)["text"].split()) for line in open("../shared/data/wiki/corpus.jsonl")]
rng.shuffle(documents)
os.makedirs("data/ladder", exist_ok=True)
for name, part, most in (("val", documents[:100], 100), ("train", documents[100:], None)):
    chunks = []
    for text in part:
        at = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        chunks += [text[at[i][0]:at[i + n - 1][1]].strip() for i in range(0, len(at) - n + 1, n)]
    rng.shuffle(chunks)
    with open(f"data/ladder/chunks{n}.{name}.jsonl", "w") as f:
        f.writelines(json.dumps(dict(query="Repeat it.", documents=[c], answer=c)) + "\n" for c in chunks[:most])
