"""
Answers a file of questions from compressed documents, next to the same model's answers from full text and from no
documents, with scores:

    python evaluate.py --out_dir=out/smollm/best --data=examples.jsonl
    python evaluate.py --out_dir=out/rerank/best --data=examples.jsonl --candidates=50 --keep=10 --qrels=qrels/test.tsv

and, where the compressor reads documents without the query (query_dependent=False), from memory that was made before:

    python evaluate.py --out_dir=out/pisco/best --compress=corpus.jsonl --store=memory
    python evaluate.py --out_dir=out/pisco/best --data=examples.jsonl --store=memory

or, for other engines, writes the generator with its LoRA merged, as an ordinary Hugging Face folder:

    python evaluate.py --out_dir=out/smollm/best --export=generator
"""

import json
import os
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from compressor import left_pad
from configurator import at_least, configure, fail, fail_on
from data import Documents, Examples, Store, document_text
from files import file_sha256, replacing
from metrics import describe, judged_id, ndcg, read_qrels, references, score, trec_order
from modes import Modes
from pretrained import load_model, load_tokenizer, max_positions, plain_text
from prompt import render, with_system

# -----------------------------------------------------------------------------
out_dir = "out/toy/best"  # a checkpoint
generator = ""  # where the checkpoint's generator lies now, if it has moved
compressor_model = ""  # likewise
data = ""  # a file of examples: answers them all and prints scores
mode = ""  # one way to answer alone: compressed, fine-tuned, reranked, full or none; empty: all that the checkpoint has
max_samples = 0  # of data; 0 = all
candidates = 0  # the first n documents of a question; 0 = all
keep = 0  # answer twice, from the n most relevant of them and from the first n; 0 = once, from all
qrels = ""  # BEIR's, for nDCG@10 of data: queries and documents there have an "_id"
answers = ""  # data's answers with the references, as JSON Lines; default: next to out_dir
judge = ""  # an LLM that grades data's answers, by name or folder
compress = ""  # a corpus: makes its memory ..
store = ""  # .. in this folder, and answers from it
shard_size = 65536  # documents in a file of the store
export = ""  # a folder for the generator with its LoRA merged
max_new_tokens = 0  # 0 = the checkpoint's answer_tokens
temperature = 0.0  # 0 = greedy
top_k = 0  # sample from the k likeliest tokens; 0 = from all
batch_size = 32
seed = 1337
compile = False  # the step that writes a token: takes a minute for each shape, may pay on many questions
device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
dtype = ""  # float32 or bfloat16; empty: whichever is faster on the device
# -----------------------------------------------------------------------------
configure(globals())
at_least(globals(), batch_size=1, max_new_tokens=0, candidates=0, keep=0, max_samples=0, top_k=0, temperature=0, seed=0,
         shard_size=1)
if (qrels or judge or answers) and not data:
    fail("--qrels, --judge and --answers belong to the answers of a file: --data=FILE")
if compress and not store:
    fail("--compress=CORPUS goes into --store=FOLDER")
if not data and not compress and not export:
    fail("evaluate.py takes --data=FILE, --compress=CORPUS or --export=FOLDER")
if (compress or export) and data:
    fail("--compress and --export answer nothing: leave out --data")
if export and (compress or store):
    fail("--export writes the generator alone: leave out --compress and --store")
if export and os.path.exists(export):
    fail(f"{export} is there already: choose another folder, or delete it")
if data:  # next to the checkpoint, for training replaces its folder
    folder, name = os.path.split(os.path.abspath(data))
    answers = answers or f"{os.path.normpath(out_dir)}.{os.path.basename(folder)}.{Path(name).stem}.jsonl"
    if os.path.realpath(answers) in map(os.path.realpath, (data, qrels)):
        fail(f"--answers={answers} would overwrite what it is to be compared with")
torch.manual_seed(seed)


@torch.no_grad()
def fill_store():
    """The memory of a corpus, shard by shard; shards that are there already stay as they are."""
    corpus, model = Documents(compress), modes.model
    made_of = dict(modes.made_of, corpus=file_sha256(compress), shard_size=str(shard_size))
    if any(Path(store).glob("*.safetensors")):
        Store(store, **made_of)
    for number, first in enumerate(tqdm(range(0, len(corpus), shard_size), desc="shards")):
        if os.path.exists(f"{store}/{number:05d}.safetensors"):
            continue
        part = [corpus[i] for i in range(first, min(first + shard_size, len(corpus)))]
        part.sort(key=lambda d: len(document_text(d)))  # like next to like: less padding
        memory = []
        for i in range(0, len(part), batch_size):
            texts = [document_text(d) for d in part[i:i + batch_size]]
            batch = model.compressor.tokenize([""], [texts], len(texts))
            memory.append(model.compressor(**model.to_device(batch))[0][0].cpu())  # (n, l, d)
        Store.write(store, number, part, torch.cat(memory), **made_of)
    print(f"{store}: memory of {len(corpus):,} documents")


def judge_ids(text):
    return judge_tokenizer(text, add_special_tokens=False).input_ids


def judge_prompt(x, answer):
    user = (f"Question: {x['query']}\nReference answers: {' / '.join(references(x))}\nAnswer to grade: {answer}\n\n"
            "Does the answer to grade say what one of the reference answers says? A: yes. B: in part. C: no. "
            "Reply with the letter alone.")
    messages = partial(with_system, "You grade answers to questions.", plain_text(judge_tokenizer)(user))
    text, rest, _ = render(judge_tokenizer, messages, "[[A]]")
    return text + rest.split("[[A]]")[0]  # with what the template puts before a reply


@torch.no_grad()
def grades(examples, answers):
    """The judge's grade of each answer, 1, 0.5 or 0 (paper, section 4: an LLM's judgement): which of three letters is
    the likeliest to begin its reply."""
    found, at = [], judge_model.device
    for i in tqdm(range(0, len(examples), batch_size), desc="judge"):
        prompts = [judge_prompt(*pair) for pair in zip(examples[i:i + batch_size], answers[i:i + batch_size])]
        letters = [judge_ids(prompts[0] + letter)[-1] for letter in "ABC"]
        tokens, mask = left_pad([judge_ids(prompt + "A")[:-1] for prompt in prompts])
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        logits = judge_model(tokens.to(at), attention_mask=mask.to(at), position_ids=positions.to(at),
                             logits_to_keep=1).logits[:, -1, letters]  # (B, 3)
        found += [(1.0, 0.5, 0.0)[j] for j in logits.argmax(-1).tolist()]
    return found


def ranking_scores(examples):
    """Mean nDCG@10 by qrels of the given order, of the scores that the examples come with, and of the compressor's;
    {} without qrels, and queries that they do not judge are left out."""
    rows, known = {}, {id for row in relevance.values() for id in row}
    for x in examples:
        if not isinstance(x.get("_id"), str) or x["_id"] not in relevance:
            continue
        ids = [judged_id(d["_id"], known) for d in x["documents"]]  # of a document its best chunk counts
        orders = dict(given=range(len(ids)), reranked=x.get("relevance") and trec_order(ids, x["relevance"]))
        if x.get("reranking_scores"):
            orders["teacher"] = trec_order(ids, x["reranking_scores"])
        for name, order in orders.items():
            if order is not None:
                ranking = [*dict.fromkeys(ids[i] for i in order)]
                rows.setdefault(name, []).append(ndcg(ranking, relevance[x["_id"]]))
    judged = len(rows.get("given", ()))  # a mean over some of them would stand next to means over all
    return {name: round(sum(row) / len(row), 4) for name, row in rows.items() if len(row) == judged}


def check(examples):
    """What would fail only when all is generated."""
    if os.path.isdir(answers) or not os.access(os.path.dirname(answers) or ".", os.W_OK):
        fail(f"{answers} cannot be written: --answers=FILE for another place")
    if not all("answer" in x or x.get("answers") for x in examples):
        fail(f"{data}: an example has neither 'answer' nor 'answers' to score against")
    if qrels and not any(isinstance(x.get("_id"), str) and x["_id"] in relevance for x in examples):
        fail(f"{qrels} judges none of the queries of {data}: their \"_id\"s are to be those of its first column")
    if qrels and not all(isinstance(d, dict) and isinstance(d.get("_id"), str)
                         for x in examples for d in x["documents"]):
        fail(f"{data}: a document has no \"_id\", a string, to find in {qrels}")
    try:
        for x in examples if modes.store else []:
            modes.store.find(x["documents"])
    except ValueError as e:
        fail(e)
    try:
        if judge:
            grades(examples[:1], ["x"])
    except Exception as e:  # a template refuses in its own way
        fail(f"{judge} cannot judge: {e}")
    for x in examples if judge else []:
        n = len(judge_ids(judge_prompt(x, ""))) + (max_new_tokens or modes.model.config.answer_tokens)
        if n > (limit := max_positions(judge_model)):
            fail(f"{judge} cannot judge: question, references and answer of '{x['query']}' take {n} tokens, it has "
                 f"{limit} positions")


def answer_all(mode, examples):
    """A mode's answers, in the examples' order; None where the full text, next to other modes, is too long."""
    length = lambda x: len(x["query"]) + sum(len(document_text(d)) for d in x["documents"])
    order, found = sorted(range(len(examples)), key=lambda i: length(examples[i])), {}  # like next to like
    try:
        for i in tqdm(range(0, len(order), batch_size), desc=mode):
            part = order[i:i + batch_size]
            read = modes.reads([examples[j] for j in part], mode)
            found |= zip(part, modes.answer(mode, *read, max_new_tokens, temperature, top_k))
    except ValueError as e:
        if mode != "full" or len(modes.names) == 1:
            fail(e)
        print(f"{mode:10}  left out: {e}")
        return None
    return [found[i] for i in range(len(examples))]


def write_answers(rows):
    """Whole or not at all, after every mode."""
    with replacing(answers) as f:
        f.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def evaluate(examples):
    """Answers in every mode and prints the scores, with 95% confidence intervals, also as JSON."""
    rows = [{name: x[name] for name in ("_id", "query") if name in x} | {"references": references(x)} for x in examples]
    scores = {}
    for mode in modes.names:
        found = answer_all(mode, examples)
        if found is None:
            continue
        for row, a in zip(rows, found):
            row[mode] = dict(zip(("answer", "em", "f1", "match"), (a, *score(a, row["references"]))))
        write_answers(rows)
        if judge:
            for row, grade in zip(rows, grades(examples, found)):
                row[mode]["judge"] = grade
            write_answers(rows)
        scores[mode], shown = {}, []
        for name in ("em", "f1", "match") + ("judge",) * bool(judge):
            mean, (low, high), words = describe(name, [row[mode][name] for row in rows])
            scores[mode] |= {name: round(mean, 4), f"{name}_interval": [round(low, 4), round(high, 4)]}
            shown.append(words)
        print(f"{mode:10}  {'  '.join(shown)}  ({len(rows)} questions)")
    if ndcg10 := ranking_scores(examples):
        scores["ndcg@10"] = ndcg10
        print("nDCG@10     " + "  ".join(f"{name} {value:.3f}" for name, value in ndcg10.items()))
    print(f"answers: {answers}")
    print(json.dumps(scores))


with fail_on(ValueError, OSError):
    examples = Examples(data, need_answer=False) if data else []
    relevance = read_qrels(qrels) if qrels else {}
    modes = Modes(out_dir, device, dtype, keep, store, generator, compressor_model, mode)
    if judge:
        judge_tokenizer = load_tokenizer(judge)
        judge_model = load_model(AutoModelForCausalLM, judge, dtype=modes.dtype).to(modes.model.device).eval()
    if store and not compress:
        modes.open_store(store)
if compile:
    modes.model.decoder.compile()
examples = [examples[i] for i in range(min(len(examples), max_samples or len(examples)))]
for x in examples:  # relevance: the compressor's scores, which Modes.reads() writes there
    x |= dict(documents=x["documents"][:candidates or None], relevance=None)
if compress:
    with fail_on(ValueError, OSError, SafetensorError):  # safetensors' own error when the disk is full
        fill_store()
elif export:
    modes.export(export)
    print(f"{export}: {modes.model.config.generator} with the LoRA of {out_dir} merged")
else:
    check(examples)
    evaluate(examples)
