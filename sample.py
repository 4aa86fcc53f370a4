"""
Answers from compressed documents, beside the same model's answers from full text and from no documents:

    python sample.py                                                  # the toy: one validation question
    python sample.py --out_dir=out/smollm/best --query="who wrote Emma?" --docs=passages.txt
    python sample.py --out_dir=out/smollm/best --data=examples.jsonl  # a whole file, with scores
"""

import json
import os
import random

import torch
from tqdm import tqdm

from configurator import at_least, configure, fail, torch_device
from data import Examples, document_text, is_document, mean_scores
from model import ScaleDown

# -----------------------------------------------------------------------------
out_dir = "out/toy/best"  # a checkpoint
generator = ""  # where the checkpoint's generator lies now, if it has moved
compressor_model = ""  # likewise
query = ""  # a question of your own ..
docs = ""  # .. with a file of documents: one a line, or (.jsonl) strings or {"title", "text"} objects
data = ""  # or a file of examples: answers them all and prints scores
val_data = "data/toy/val.jsonl"  # without query and data: one question from here
num_documents = 0  # use only the first so many documents of a question; 0 = all
max_samples = 0  # of data; 0 = all
show_memory = False  # the vocabulary tokens nearest to each memory embedding
max_new_tokens = 0  # 0 = the checkpoint's answer_tokens
temperature = 0.0  # 0 = greedy
top_k = 0  # sample from the k likeliest tokens; 0 = from all
batch_size = 32
seed = 1337
compile = False  # the step that writes a token: takes a minute, may pay on many questions
device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
dtype = "bfloat16" if torch.cuda.is_available() else "float32"
# -----------------------------------------------------------------------------
configure(globals())
device = torch_device(device)
if dtype not in ("float32", "bfloat16"):
    fail(f"dtype is float32 or bfloat16, not '{dtype}'")
at_least(globals(), batch_size=1, max_new_tokens=0, num_documents=0, max_samples=0, top_k=0, temperature=0, seed=0)
if bool(query) != bool(docs):
    fail("--query and --docs go together")
if query and data:
    fail("--data has queries and documents of its own: leave out --query and --docs")
if query and not query.strip():
    fail("empty query")
torch.manual_seed(seed)


def read_documents(path):
    """One document a line; in a .jsonl file, strings or {"title", "text"} objects."""
    if not os.path.isfile(path):
        fail(f"{path} does not exist")
    if path.endswith(".json"):
        fail(f"{path}: documents stand one a line, in a text file or a .jsonl file")
    try:
        with open(path, encoding="utf-8-sig") as f:
            lines = [(number, line.strip()) for number, line in enumerate(f, 1) if line.strip()]
    except UnicodeDecodeError as e:
        fail(f"{path}: {e}")
    if not path.endswith(".jsonl"):
        documents = [line for _, line in lines]
    else:
        documents = []
        for number, line in lines:
            try:
                documents.append(json.loads(line))
            except ValueError as e:
                fail(f"{path}, line {number}: broken JSON: {e}")
            if not is_document(documents[-1]):
                fail(f"{path}, line {number}: neither a string nor an object with 'title' and 'text'")
    if not documents:
        fail(f"{path} holds no documents")
    return documents


try:
    moved = dict(generator=generator, compressor_model=compressor_model)
    moved = {name: value for name, value in moved.items() if value}
    if query:
        examples = [dict(query=query, documents=read_documents(docs))]
    elif data:
        examples = Examples(data, need_answer=False)
    else:
        examples = Examples(val_data, need_answer=False)
        examples = [examples[random.Random(seed).randrange(len(examples))]]
    model = ScaleDown.from_pretrained(out_dir, device, getattr(torch, dtype), **moved)
except (ValueError, OSError) as e:
    missing_toy = isinstance(e, FileNotFoundError) and out_dir == "out/toy/best"
    fail(str(e).splitlines()[0] + (": python train.py config/toy.py makes the toy" if missing_toy else ""))
if compile:
    model.compile_next()
examples = [examples[i] for i in range(min(len(examples), max_samples or len(examples)))]
for x in examples:
    x["documents"] = x["documents"][:num_documents or None]


def answer(part, mode):
    try:
        return model.generate([x["query"] for x in part], [x["documents"] for x in part], max_new_tokens or None,
                              temperature, top_k, mode)
    except ValueError as e:
        fail(e)


if data:
    if not all("answer" in x or x.get("answers") for x in examples):
        fail(f"{data}: an example has neither 'answer' nor 'answers' to score against")
    # alike beside alike: less padding
    examples.sort(key=lambda x: len(x["query"]) + sum(len(document_text(d)) for d in x["documents"]))
    scores = {}
    for mode in ("compressed", "full", "none"):
        answers = []
        for i in tqdm(range(0, len(examples), batch_size), desc=mode):
            answers += answer(examples[i:i + batch_size], mode)
        scores[mode] = {name: round(value, 4) for name, value in mean_scores(answers, examples).items()}
        print(f"{mode:10}  exact match {scores[mode]['em']:.3f}  F1 {scores[mode]['f1']:.3f}  "
              f"match {scores[mode]['match']:.3f}  ({len(examples)} questions)")
    print(json.dumps(scores))
else:
    x = examples[0]
    memory, relevance = model.compress([x["query"]], [x["documents"]])  # (1, k, l, d), (1, k)
    for i, document in enumerate(x["documents"]):
        label = f"[{i + 1}]" if relevance is None else f"[{i + 1}, relevance {relevance[0, i].item():.2f}]"
        print(f"{label} {document_text(document)}")
    print(f"\nquestion: {x['query']}\n")
    for mode in ("compressed", "full", "none"):
        positions = model.embed_prompts([x["query"]], [x["documents"]], mode)[1].sum().item()
        print(f"{mode:10}  {positions:5} positions read by the generator   {answer([x], mode)[0]}")
    if "answer" in x:
        print(f"{'teacher':10}  {'':36}   {x['answer']}")
    if "answers" in x:
        print(f"{'gold':10}  {'':36}   {' / '.join(x['answers'])}")
    if show_memory:
        print("\nnearest tokens of each memory embedding:")
        for i, document in enumerate(model.nearest_tokens(memory)[0]):
            for j, tokens in enumerate(document):
                print(f"document {i + 1}, memory {j + 1}: {' '.join(tokens)}")
