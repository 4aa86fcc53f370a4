"""
Answers a question from compressed documents, next to the same model's answers from full text and from no documents:

    python sample.py                                                  # the toy: one validation question
    python sample.py --out_dir=out/smollm/best --query="who wrote Emma?" --docs=passages.txt

A whole file with scores, stores and export are evaluate.py's; its settings (--data=FILE ..) hand the command on to it.
"""

import os
import random
import runpy
import sys

import torch

from configurator import at_least, configure, fail, fail_on
from data import Documents, Examples, document_text
from generate import nearest_tokens
from modes import Modes

# -----------------------------------------------------------------------------
out_dir = "out/toy/best"  # a checkpoint
generator = ""  # where the checkpoint's generator lies now, if it has moved
compressor_model = ""  # likewise
query = ""  # a question of your own ..
docs = ""  # .. with a file of documents: one a line, or (.jsonl) strings or {"title", "text"} objects
val_data = "data/toy/val.jsonl"  # without query: one question from here
candidates = 0  # the first n documents of a question; 0 = all
keep = 0  # answer twice, from the n most relevant of them and from the first n; 0 = once, from all
store = ""  # a folder with the documents' memory (evaluate.py --compress)
show_memory = False  # the vocabulary tokens nearest to each memory embedding
max_new_tokens = 0  # 0 = the checkpoint's answer_tokens
temperature = 0.0  # 0 = greedy
top_k = 0  # sample from the k likeliest tokens; 0 = from all
seed = 1337
compile = False  # the step that writes a token: takes a minute for each shape, may pay on many questions
device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
dtype = ""  # float32 or bfloat16; empty: whichever is faster on the device
# -----------------------------------------------------------------------------
given = {arg[2:].split("=")[0] for arg in sys.argv[1:] if arg.startswith("--")}
if given & {"data", "qrels", "answers", "judge", "compress", "export"}:
    if given & {"query", "docs"}:
        fail("--data has queries and documents of its own, --compress and --export answer nothing: leave out --query "
             "and --docs")
    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "evaluate.py"), run_name="__main__")
    sys.exit()
configure(globals())
at_least(globals(), max_new_tokens=0, candidates=0, keep=0, top_k=0, temperature=0, seed=0)
if bool(query) != bool(docs):
    fail("--query and --docs go together")
if query and not query.strip():
    fail("empty query")
torch.manual_seed(seed)

with fail_on(ValueError, OSError):
    if query:
        x = dict(query=query, documents=[*Documents(docs)])
    else:
        examples = Examples(val_data, need_answer=False)
        x = examples[random.Random(seed).randrange(len(examples))]
    x["documents"] = x["documents"][:candidates or None]
    modes = Modes(out_dir, device, dtype, keep, store, generator, compressor_model)
    if store:
        modes.open_store(store)
    model = modes.model
    if show_memory and model.config.mode != "compressed":
        fail(f"{out_dir} was trained with mode={model.config.mode}: it has no memory to show")
    if compile:
        model.decoder.compile()
    read = {mode: modes.reads([x], mode) for mode in modes.names}
    memory, scores = read[modes.names[0]][2], None
    if memory is None and model.config.mode == "compressed":
        memory, scores = model.compress([x["query"]], [x["documents"]])  # (1, k, l, d), (1, k)
    for i, document in enumerate(x["documents"]):
        label = f"[{i + 1}]" if scores is None else f"[{i + 1}, relevance {scores[0, i].item():.2f}]"
        print(f"{label} {document_text(document)}")
    print(f"\nquestion: {x['query']}\n")
    for mode, (queries, documents, stored) in read.items():
        kind = "compressed" if mode == "reranked" else mode
        n = model.embed_prompts(queries, documents, kind, memory=stored)[1].sum().item()
        answer, = modes.answer(mode, queries, documents, stored, max_new_tokens, temperature, top_k)
        print(f"{mode:10}  {n:5} positions read by the generator   {answer}")
if "answer" in x:
    print(f"{'teacher':10}  {'':36}   {x['answer']}")
if x.get("answers"):
    print(f"{'gold':10}  {'':36}   {' / '.join(x['answers'])}")
if show_memory:
    print("\nnearest tokens of each memory embedding:")
    for i, document in enumerate(nearest_tokens(model.generator, model.tokenizer, memory)[0]):
        for j, tokens in enumerate(document):
            print(f"document {i + 1}, memory {j + 1}: {' '.join(tokens)}")
