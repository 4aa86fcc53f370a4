"""bench.py in short: that it runs, and that both sides gave the same before anything was timed."""

import json
import re

from test_scripts import run


def test_prepare_beside_the_usual_way(tiny, tmp_path):
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(dict(_id=str(i), text="the mayor of Loku " * (i + 1))) + "\n" for i in range(6)))
    out = run("bench.py", "--what=prepare", f"--splade={tiny('splade')}", f"--corpus={tmp_path / 'c.jsonl'}", "--texts=5",
              "--passages=3000", "--queries=8", "--repeats=2", "--device=cpu", "--dtype=float32")
    assert "encoding 5 passages" in out and "searching 3,000 synthetic passages for 8 queries, the 50 best" in out
    assert len(re.findall(r"/s  \(", out)) == 6


def test_bad_input(tmp_path):
    assert "--corpus=FILE" in run("bench.py", "--corpus=nowhere.jsonl", ok=False)
    assert "what is prepare, not 'x'" in run("bench.py", "--what=x", ok=False)
