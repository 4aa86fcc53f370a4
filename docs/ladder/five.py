"""
Makes data/ladder/five.dev.jsonl, five.test.jsonl and five.test200.jsonl: the first 256 dev questions of questions.py,
the last 400, and the first 200 of these, with the five passages that prepare.py has found for each.

    python docs/ladder/five.py
"""

import json


def read(path):
    return [json.loads(line) for line in open(path)]


five = {x["_id"]: x for part in ("train", "val") for x in read(f"data/wiki_dev/{part}.jsonl")}
gold = read("data/ladder/gold.dev.jsonl")
for name, part in (("dev", gold[:256]), ("test", gold[-400:]), ("test200", gold[-400:-200])):
    with open(f"data/ladder/five.{name}.jsonl", "w") as f:
        f.writelines(json.dumps(five[x["_id"]]) + "\n" for x in part)
