"""
The open questions of compression, asked of the toy world: each table of docs/experiments.md. It trains
what it needs (a checkpoint that is there already is taken as it is) and answers data/toy/test.jsonl from it:

    python experiments.py --table=rate
    python experiments.py --table=rate --steps=2 --pretrain_steps=2 --max_samples=8 --rows=1  # does it run?
"""

import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

from configurator import at_least, configure, fail
from data import Examples, document_text

# -----------------------------------------------------------------------------
table = "compressors"  # or rate, length, documents, query, training, reranking
steps = 600  # of 32 examples, of each run
pretrain_steps = 300  # of 64 chunks
max_samples = 0  # of the 500 test questions; 0 = all
rows = 0  # only the first n of a table; 0 = all
seed = 1337  # of the training runs, not of the toy world
out_dir = "out/experiments"
plot = ""  # a folder for the drawing of table rate
# -----------------------------------------------------------------------------


def run(*command):
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), command[0])
    done = subprocess.run([sys.executable, script, *command[1:]], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        fail(f"python {' '.join(command)} failed")
    return done.stdout


def train(name, *settings, config="config/toy.py", steps=None):
    """-> the best checkpoint of a run, made now or before"""
    steps = steps or globals()["steps"]
    folder = f"{out_dir}/{name}-{steps}-{seed}"
    if not os.path.exists(f"{folder}/done"):
        shutil.rmtree(folder, ignore_errors=True)
        run("train.py", config, f"--out_dir={folder}", f"--max_iters={steps}", f"--seed={seed}",
            "--eval_interval=200", "--log_interval=100", *settings)
        Path(f"{folder}/done").touch()
    return f"{folder}/best"


def ask(checkpoint, *settings, data="data/toy/test.jsonl"):
    """-> the scores that evaluate.py prints"""
    return json.loads(run("evaluate.py", f"--out_dir={checkpoint}", f"--data={data}", f"--max_samples={max_samples}",
                          "--device=cpu", "--dtype=float32", *settings).splitlines()[-1])


def exact_match(scores, mode="compressed"):
    low, high = scores[mode]["em_interval"]
    return f"{scores[mode]['em']:.3f} [{low:.3f}, {high:.3f}]"


def rewritten(name, rewrite, splits=("train", "val", "test")):
    """data/toy's files, each list of documents rewritten: rewrite(number, example, all examples) -> documents."""
    for split in splits:
        path = f"{out_dir}/{name}.{split}.jsonl"
        with open(f"{path}.{os.getpid()}", "w") as f:  # another table may be reading it, or writing it
            for n, x in enumerate(examples := Examples(f"data/toy/{split}.jsonl")):
                x["documents"] = rewrite(n, x, examples)
                x.pop("reranking_scores")
                f.write(json.dumps(x) + "\n")
        os.replace(f"{path}.{os.getpid()}", path)
    return {split: f"{out_dir}/{name}.{split}.jsonl" for split in splits}


def joined(m):
    """Every m of a question's five passages as one document."""
    def join(n, x, examples):
        texts = [document_text(d) for d in x["documents"]]
        return [" ".join(texts[i:i + m]) for i in range(0, len(texts), m)]
    return rewritten(f"joined{m}", join)


def compressors():
    """ModernBERT against N layers and a small decoder, with and without pretraining."""
    yield "compressor", "pretrained", "exact match"
    yield "first 2 of the LLM's 4 layers", "no", exact_match(ask(train("n_layers")))
    for name, label in (("encoder", "encoder (ModernBERT), 2 layers"), ("decoder", "decoder (Llama), 2 layers")):
        model = f"--compressor_model=data/toy/{name}"
        checkpoint = train(name, model, config="config/toy_modernbert.py")
        yield label, "no", exact_match(ask(checkpoint))
        begin = train(f"pretrain_{name}", model, config="config/pretrain_toy_modernbert.py", steps=pretrain_steps)
        checkpoint = train(f"{name}_pretrained{pretrain_steps}", model, f"--init_from={begin}",
                           config="config/toy_modernbert.py")
        yield label, "yes", exact_match(ask(checkpoint))


def rate():
    """Exact match against the rate of compression, one document of 100 tokens a question."""
    files = joined(5)
    yield "memory tokens", "rate", "exact match"
    points = []
    for l in (25, 12, 6, 3, 2, 1):
        checkpoint = train(f"rate{l}", f"--train_data={files['train']}", f"--val_data={files['val']}",
                           "--doc_tokens=120", "--num_documents=1", f"--num_memory_tokens={l}")
        scores = ask(checkpoint, data=files["test"])
        points.append((100 / l, scores["compressed"]["em"], scores["compressed"]["em_interval"]))
        yield l, f"{100 / l:.0f}x", exact_match(scores)
    if plot:
        draw(points)


def draw(points):
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    rates, em, intervals = zip(*points)
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    axes.errorbar(rates, em, yerr=[[m - low for m, (low, _) in zip(em, intervals)],
                                   [high - m for m, (_, high) in zip(em, intervals)]], marker="o", capsize=3)
    axes.set(xscale="log", xticks=rates, xticklabels=[f"{r:.0f}x" for r in rates], ylim=(0, 1.02),
             xlabel="tokens of a document per memory token", ylabel="exact match (toy)")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    os.makedirs(plot, exist_ok=True)
    figure.savefig(f"{plot}/rate.svg", metadata={"Date": None})


def length():
    """Longer documents, with the same number of memory tokens and with proportionally more."""
    yield "documents of a question", "memory tokens of each", "rate", "exact match"
    for m, tokens, counts in ((1, 20, (2,)), (2, 40, (2, 4)), (5, 100, (2, 10))):
        files = joined(m)
        for l in counts:
            checkpoint = train(f"length{m}-{l}", f"--train_data={files['train']}", f"--val_data={files['val']}",
                               "--doc_tokens=120", f"--num_documents={-(-5 // m)}", f"--num_memory_tokens={l}")
            yield (f"{-(-5 // m)} of up to {tokens} tokens", l, f"{tokens // l}x",
                   exact_match(ask(checkpoint, data=files["test"])))


def documents():
    """Trained with 5 documents, asked with 1 to 50."""
    def several(k):
        def documents(n, x, examples):
            """The passage with the answer and k - 1 others without the fact that is asked for, of other questions."""
            mine = x["query"].removeprefix("What is ").rstrip("?")  # "Lurinu's metal"
            fact = f"'s {mine.split()[1]} is "
            found = [document_text(d) for d in x["documents"] if mine in document_text(d)]
            i = n
            while len(found) < k:
                i = (i + 1) % len(examples)
                found += [text for text in map(document_text, examples[i]["documents"]) if fact not in text]
            found = found[:k]
            at = n % k
            found[0], found[at] = found[at], found[0]
            return found
        return documents
    yield "documents", "compressed", "full text"
    checkpoint = train("n_layers")
    for k in (1, 2, 5, 10, 20, 50):
        scores = ask(checkpoint, data=rewritten(f"documents{k}", several(k), ["test"])["test"])
        yield k, exact_match(scores), exact_match(scores, "full")


def query():
    """The compressor with the query and without it, at the same rate."""
    yield "memory tokens", "rate", "with the query", "without"
    for l in (1, 2, 4):
        both = [train("n_layers" if l == 2 and dependent else f"query{l}-{dependent}", f"--num_memory_tokens={l}",
                      f"--query_dependent={dependent}") for dependent in (True, False)]
        yield l, f"{20 // l}x", *(exact_match(ask(checkpoint)) for checkpoint in both)


def training():
    """One learning rate or two; the whole compressor or LoRA on it."""
    yield "compressor", "its learning rate", "the generator's LoRA's", "exact match"
    for lr, lora_lr, r in ((1e-3, 2e-3, 0), (1e-3, 1e-3, 0), (2e-3, 2e-3, 0), (2e-4, 2e-4, 0), (1e-3, 2e-3, 16),
                           (2e-3, 2e-3, 16)):
        name = "n_layers" if (lr, lora_lr, r) == (1e-3, 2e-3, 0) else f"training-{lr}-{lora_lr}-{r}"
        checkpoint = train(name, f"--compressor_lr={lr}", f"--generator_lr={lora_lr}", f"--compressor_lora_r={r}")
        yield f"LoRA, r = {r}" if r else "all of it", f"{lr:g}", f"{lora_lr:g}", exact_match(ask(checkpoint))


def reranking():
    """The reranking loss: what it costs, how well RR ranks, and answers from the best by its score."""
    yield "trained", "answered from", "exact match", "nDCG@10 of RR", "of the teacher"
    yield "without the reranking loss", "all 5", exact_match(ask(train("n_layers"))), "", ""
    checkpoint = train("reranking", "--enable_reranking=True")
    for keep in (5, 2, 1):
        scores = ask(checkpoint, f"--keep={keep}", "--qrels=data/toy/qrels.test.tsv")
        yield ("with it", f"the {keep} best of 5", exact_match(scores, "reranked"),
               *(f"{scores['ndcg@10'][name]:.3f}" for name in ("reranked", "teacher")))
    yield "with it", "the first 2 of 5 as given", exact_match(ask(checkpoint, "--candidates=2")), "", ""


TABLES = {f.__name__: f for f in (compressors, rate, length, documents, query, training, reranking)}

if __name__ == "__main__":
    configure(globals())
    at_least(globals(), steps=1, pretrain_steps=1, max_samples=0, rows=0, seed=0)
    if table not in TABLES:
        fail(f"table is one of {', '.join(TABLES)}, not '{table}'")
    if plot and (table != "rate" or rows):
        fail("--plot=FOLDER draws the whole table rate: it takes --table=rate and no rows")
    os.makedirs(out_dir, exist_ok=True)
    if not all(map(os.path.exists, ("data/toy/train.jsonl", "data/toy/qrels.test.tsv"))):
        run("prepare.py", "--dataset=toy")
    if not os.path.exists("data/toy/decoder"):
        run("data/toy/prepare.py", "--parts=encoders")
    print(TABLES[table].__doc__, end="\n\n")
    for number, row in enumerate(islice(TABLES[table](), rows + 1 if rows else None)):  # the first row is the head
        print(f"| {' | '.join(map(str, row))} |", flush=True)
        if number == 0:
            print("| --- " * len(row) + "|", flush=True)
