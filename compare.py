"""
Compares answers to the same questions, of one checkpoint or several, as evaluate.py has written them:

    python compare.py --answers=out/smollm/best.wiki.dev.jsonl,out/full/best.wiki.dev.jsonl --groups=nq,c

prints the scores of every way of answering and, against the first one, the difference in F1 with its 95% interval and
the p of a paired bootstrap test.
"""

import json
from pathlib import Path

from configurator import at_least, configure, fail, fail_on
from metrics import interval, paired_test

# -----------------------------------------------------------------------------
answers = ""  # files that evaluate.py has written, with commas
groups = ""  # beginnings of _id, with commas: the same of these questions by themselves as well
score = "f1"  # what the test is about: f1, em, match or judge
resamples = 10_000
# -----------------------------------------------------------------------------
configure(globals())
at_least(globals(), resamples=1)


def read_ways(paths):
    """-> the questions' rows, and {"FOLDER MODE": [what evaluate.py has written about each answer]}. The plain LLM's
    answers, which files have in common, are taken once. Raises OSError, ValueError."""
    questions, ways = None, {}
    for path in paths:
        with open(path, encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        if not rows or not all(isinstance(row, dict) and "query" in row for row in rows):
            raise ValueError(f"{path} holds no answers of evaluate.py")
        questions = questions or rows
        if [row["query"] for row in rows] != [row["query"] for row in questions]:
            raise ValueError(f"{path} has answers to other questions than {paths[0]}")
        for mode in rows[0]:
            found = [row[mode] for row in rows]
            if isinstance(found[0], dict) and found not in ways.values():
                ways[f"{Path(path).resolve().parent.name} {mode}"] = found
    return questions, ways


def compare(title, ways):
    """ways: {name: [scores of every answer]}"""
    width = max(map(len, ways))
    base = next(iter(ways))
    print(f"{title} ({len(ways[base])} questions)")
    for name, rows in ways.items():
        line = f"{name:{width}}"
        for kind in ("em", "f1", "match"):
            column = [row[kind] for row in rows]
            low, high = interval(column)
            line += f"  {kind} {sum(column) / len(column):.3f} [{low:.3f}, {high:.3f}]"
        if name != base:
            mean, (low, high), p = paired_test(*([row[score] for row in ways[way]] for way in (name, base)), resamples)
            line += f"  {score} {mean:+.3f} [{low:+.3f}, {high:+.3f}], p = {p:.4f}"
        print(line)


paths = [path for path in answers.split(",") if path]
if not paths:
    fail("--answers=FILE,FILE: what evaluate.py has written")
with fail_on(OSError, ValueError):
    questions, ways = read_ways(paths)
if not all(score in row for rows in ways.values() for row in rows):
    fail(f"score={score} is not in all of {answers}")
compare("all", ways)
for group in filter(None, groups.split(",")):
    chosen = [i for i, row in enumerate(questions) if str(row.get("_id", "")).startswith(group)]
    if not chosen:
        fail(f"no question has an _id that begins with {group}")
    compare(f"\n{group}..", {name: [rows[i] for i in chosen] for name, rows in ways.items()})
