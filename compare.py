"""
Compares answers to the same questions, of one checkpoint or several, as evaluate.py has written them:

    python compare.py --answers=out/smollm/best.wiki.dev.jsonl,out/full/best.wiki.dev.jsonl --groups=nq,c

prints the scores of every way of answering and, against the first one, the difference in F1 with its 95% interval and
the p of a paired bootstrap test.
"""

from configurator import at_least, configure, fail, fail_on
from formats import records
from metrics import describe, paired_test

# -----------------------------------------------------------------------------
answers = ""  # files that evaluate.py has written, with commas
groups = ""  # beginnings of _id, with commas: a table of these questions alone, too
score = "f1"  # what the test is about: f1, em, match or judge
resamples = 10_000
# -----------------------------------------------------------------------------
configure(globals())
at_least(globals(), resamples=1)
if score not in ("f1", "em", "match", "judge"):
    fail(f"score is f1, em, match or judge, not '{score}'")


def read_ways(paths):
    """-> the questions' rows, and {"FILE MODE": [what evaluate.py has written about each answer]}. The plain LLM's
    answers are those of every file: where they are the same, they are taken once."""
    questions, ways = None, {}
    for path in paths:
        rows = [row for _, row in records(path)]
        questions = questions or rows
        for name, what in (("query", "answers to other questions"), ("references", "scores against other references")):
            if [row.get(name) for row in rows] != [row.get(name) for row in questions]:
                fail(f"{path} has {what} than {paths[0]}")
        modes = [name for name, value in (rows[0] if rows else {}).items() if isinstance(value, dict)]
        scored = [isinstance(row.get(mode), dict) and score in row[mode] for row in rows for mode in modes]
        if not modes or not all(scored):
            fail(f"{path} is no file of answers by evaluate.py with a {score} in every line")
        for mode in modes:
            found = [row[mode] for row in rows]
            if mode not in ("full", "none") or found not in ways.values():
                ways[f"{path} {mode}"] = found
    return questions, ways


def compare(title, ways):
    """ways: {name: [scores of every answer]}"""
    print(f"{title} ({len(next(iter(ways.values())))} questions)")
    base = None
    for name, rows in ways.items():
        said = [describe(kind, [row[kind] for row in rows])[2] for kind in ("em", "f1", "match")]
        values = [row[score] for row in rows]
        if base:
            mean, (low, high), p = paired_test(values, base, resamples)
            said.append(f"{score} {mean:+.3f} [{low:+.3f}, {high:+.3f}], p = {p:.4f}")
        base = base or values
        print(f"{name:{max(map(len, ways))}}  {'  '.join(said)}")


paths = [path for path in answers.split(",") if path]
if not paths:
    fail("--answers=FILE,FILE: what evaluate.py has written")
with fail_on(OSError):
    questions, ways = read_ways(paths)
compare("all", ways)
for group in filter(None, groups.split(",")):
    chosen = [i for i, row in enumerate(questions) if str(row.get("_id", "")).startswith(group)]
    if not chosen:
        fail(f"no question has an _id that begins with {group}")
    compare(f"\n{group}..", {name: [rows[i] for i in chosen] for name, rows in ways.items()})
