"""
Makes data/ladder/gold.train.jsonl, gold.dev.jsonl and the dev questions that are scored, gold.test.jsonl (the last 800)
and gold.last400.jsonl: every question of ../shared/data/wiki with the passage that the qrels name and its first gold
answer, in an order drawn with seed 0.

    python docs/ladder/questions.py
"""

import csv
import json
import os
import random

D = "../shared/data/wiki"


def write(name, rows):
    with open(f"data/ladder/{name}.jsonl", "w") as f:
        f.writelines(json.dumps(x) + "\n" for x in rows)


os.makedirs("data/ladder", exist_ok=True)
corpus = {d["_id"]: d for d in map(json.loads, open(f"{D}/corpus.jsonl"))}
for split in "train", "dev":
    gold, rows = {}, []
    for row in csv.DictReader(open(f"{D}/qrels/{split}.tsv"), delimiter="\t"):
        gold.setdefault(row["query-id"], corpus[row["corpus-id"]])
    for q in map(json.loads, open(f"{D}/queries.{split}.jsonl")):
        d, answers = gold[q["_id"]], q["metadata"]["answers"]
        rows.append(dict(_id=q["_id"], query=q["text"], documents=[dict(title=d["title"], text=d["text"])],
                         answer=answers[0], answers=answers))
    random.Random(0).shuffle(rows)
    write(f"gold.{split}", rows)
write("gold.test", rows[-800:])
write("gold.last400", rows[-400:])
