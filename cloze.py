"""
Training examples made of passages alone, for a compressor that has too few questions to learn to read from:

    python cloze.py --corpus=data/mine/corpus.jsonl --mix=data/mine/train.jsonl --repeats=3 --out=data/mixed

A query asks for a part of its one passage: half of them for the words in a gap, a quarter for the words that follow
some others, a quarter for a short piece as it is. Answering takes what a real question takes, to find the place and to
hand it over, and a corpus has as many such examples as one likes. (Our own; docs/ladder.md tells what they give.)

writes out/train.jsonl, the examples of `mix` as often as `repeats` says and then the new ones, and out/val.jsonl, 256
more of 100 other passages. The new ones have no reranking_scores: they are not for enable_reranking.
"""

import json
import os
import random

from configurator import at_least, configure, fail, fail_on
from data import Chunks, Documents, Examples
from files import replacing
from metrics import judged_id, read_qrels

# -----------------------------------------------------------------------------
corpus = ""  # BEIR's or prepare.py's corpus.jsonl, or a file of plain text, a passage a line
examples = 20000  # how many to make
mix = ""  # a file of examples to put before them
repeats = 1  # how often
leave_out = ""  # BEIR's qrels of the questions to test with: their passages are left out
most_words = 85  # longer passages are cut to as many; with doc_tokens=128, 4% of Wikipedia's answers lie after the cut
out = ""  # a folder
seed = 0
# -----------------------------------------------------------------------------


def cloze(rng, passage):
    """An example of a passage {"title", "text"}; None where it has too few words for what was drawn."""
    words, kind = passage["text"].split(), rng.random()
    if kind < 0.25:
        n = min(len(words), rng.randint(4, 24))
        start = rng.randrange(len(words) - n + 1)
        piece = " ".join(words[start:start + n])
        return dict(query=Chunks.REPEAT, documents=[piece], answer=piece)
    if len(words) < 12:
        return None
    start = rng.randrange(max(1, len(words) - most_words + 1))
    words = words[start:start + most_words]
    documents = [dict(title=passage.get("title"), text=" ".join(words))]
    if kind < 0.5:
        m, n = rng.randint(2, 6), rng.randint(1, 8)
        start = rng.randrange(len(words) - m)
        said, answer = words[start:start + m], words[start + m:start + m + n]
        return dict(query=f'What follows "{" ".join(said)}"?', documents=documents, answer=" ".join(answer))
    n = rng.randint(1, 5)
    start = rng.randrange(1, len(words) - n)
    # a question has not all of the words around its answer
    before = [w for w in words[max(0, start - 8):start] if rng.random() < 0.7]
    after = [w for w in words[start + n:start + n + 8] if rng.random() < 0.7]
    answer = " ".join(words[start:start + n]).strip(",.;:()\"'")
    if len(before) + len(after) < 3 or not answer:
        return None
    return dict(query=" ".join([*before, "___", *after]), documents=documents, answer=answer)


def passage(document):
    return document if isinstance(document, dict) else dict(text=document)


def draw(rng, documents, numbers, n):
    """n lines of examples of the documents with these numbers."""
    while n:
        if x := cloze(rng, passage(documents[rng.choice(numbers)])):
            yield json.dumps(x) + "\n"
            n -= 1


if __name__ == "__main__":
    configure(globals())
    at_least(globals(), examples=1, repeats=1, most_words=12, seed=0)
    if not corpus or not out:
        fail("cloze.py takes --corpus=FILE and --out=FOLDER")
    for name in "train", "val":
        if os.path.exists(f"{out}/{name}.jsonl"):
            fail(f"{out}/{name}.jsonl is there already: choose another --out, or delete it")
    with fail_on(OSError, ValueError):
        judged = {id for found in read_qrels(leave_out).values() for id in found} if leave_out else set()
        documents, others = Documents(corpus), Examples(mix) if mix else []
        ids = {i: str(d.get("_id")) for i, d in enumerate(map(passage, documents)) if (d["text"] or "").strip()}
        kept = [i for i, id in ids.items() if judged_id(id, judged) not in judged]
        if leave_out and len(kept) == len(ids):
            fail(f"{leave_out} names no passage of {corpus}: their \"_id\"s are to be those of its second column")
        n = sum(len(passage(documents[i])["text"].split()) >= 12 for i in kept)
        if n < 200:
            fail(f"{corpus} has {n} passages of 12 words or more, with white space between them, to ask about, of at "
                 "least 200: 100 are to validate")
        rng = random.Random(seed)
        rng.shuffle(kept)
        os.makedirs(out, exist_ok=True)
        with replacing(f"{out}/val.jsonl", "w") as f:
            f.writelines(draw(rng, documents, kept[:100], 256))
        with replacing(f"{out}/train.jsonl", "w") as f:
            for _ in range(repeats):
                f.writelines(json.dumps(x) + "\n" for x in others)
            f.writelines(draw(rng, documents, kept[100:], examples))
    print(f"{out}: {repeats * len(others):,} examples of yours and {examples:,} new ones to train, 256 to validate; "
          f"{len(ids) - len(kept):,} passages left out")
