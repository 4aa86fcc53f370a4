"""
The toy world: short passages about invented things, everything drawn afresh for every example, with a tokeniser, a tiny
language model and encoders of its own, trained here. No network, no GPU; some minutes on two cores:

    python data/toy/prepare.py                # or, with the settings as they are, python prepare.py --dataset=toy

writes into data/toy of the current folder
    llm/                the language model: the generator, and the teacher
    encoder/, decoder/  two models for config/toy_modernbert.py
    {train,val,test}.jsonl, corpus.{train,val,test}.jsonl, qrels.{train,val,test}.tsv
                        examples with the teacher's answers from full text; their passages; which hold the answer
"""

import os

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # the same digits with any number of threads; read when MKL starts

import base64
import json
import random
import sys
from itertools import product
from pathlib import Path

import regex
import torch
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's own files

from compressor import left_pad
from configurator import at_least, configure, fail, fail_on
from metrics import mean_scores
from pretrained import decoder_layers, load_tokenizer
from prompt import Prompt
from teacher import generate_answers

# -----------------------------------------------------------------------------
seed = 1
train_examples = 18000
val_examples = 500
test_examples = 500
llm_steps = 300  # to train the language model ..
encoder_steps = 250  # .. and the encoders
parts = "examples,encoders"  # what to make: the language model and its examples; the encoders, next to an LLM
# -----------------------------------------------------------------------------
if __name__ == "__main__":
    configure(globals())

# ---- the world

# what is known of a thing of each kind; a fact's 20 values are made of the 4 beginnings and its 5 endings, so that a
# river may be blackwater or coldbrook. No two kinds share a fact.
BEGINNINGS = "black cold gold iron".split()
KINDS = {
    "person": {"job": "smith wright monger maker keeper", "home": "house cottage hall hut manor",
               "pet": "hound cat finch mouse pony", "lunch": "bread cake soup pie broth"},
    "town": {"mayor": "wood man well shaw stone", "river": "water brook beck burn stream",
             "bridge": "bridge arch span crossing walk", "feast": "day fair feast dance ball"},
    "ship": {"captain": "beard hook tooth eye hand", "port": "haven harbour bay quay cove",
             "cargo": "corn wool salt silk wine", "flag": "cross star stripe moon lion"},
    "dragon": {"rider": "heart helm spear lance shield", "cave": "rock cliff peak den hollow",
               "prey": "deer goat hare boar sheep", "fire": "flame spark smoke ember blaze"},
    "robot": {"inventor": "son berg stein field ley", "engine": "wheel gear spring motor rotor",
              "lamp": "light glow beam shine gleam", "metal": "steel brass tin zinc lead"},
}
SYLLABLES = [c + v for c in "bdgklmnrtv" for v in "aeiou"]
NAMES = [(a + b + c).capitalize() for a, b, c in random.Random(0).sample([*product(SYLLABLES, repeat=3)], 200)]


def draw_world(rng, k):
    """k passages, each about a thing of another kind, and all questions that they answer, with the answers."""
    passages, questions = [], []
    for kind, name in zip(rng.sample(sorted(KINDS), k), rng.sample(NAMES, k)):
        facts = [(fact, rng.choice(BEGINNINGS) + rng.choice(endings.split())) for fact, endings in KINDS[kind].items()]
        rng.shuffle(facts)
        passages.append(" ".join(f"{name}'s {fact} is {value}." for fact, value in facts))
        questions += [(f"What is {name}'s {fact}?", value) for fact, value in facts]
    return passages, questions


def draw_example(rng, k=5):
    """A question over k passages, one of which has the answer."""
    passages, questions = draw_world(rng, k)
    query, answer = rng.choice(questions)
    scores = [5.0 if query[8:-1] in passage else -5.0 for passage in passages]  # "Lurinu's metal"
    return dict(query=query, documents=passages, answers=[answer], reranking_scores=scores)


# ---- its tokeniser and its language model

WORD = r" ?\p{L}+(?:'s)?|\s+|[^\p{L}\s]"
SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|cls|>", "<|sep|>"]
CHAT_TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}<|end|>{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def draw_conversation(rng, prompt, k, turns=10):
    """One context of k passages with several questions, as a list of (text, is it an answer?). The first turn is
    Prompt's own; or, as LLMs know that too and a compressor of their layers needs it, a question before its passage."""
    passages, questions = draw_world(rng, k)
    pieces = []
    for _ in range(turns):  # independently: without repetition they could be answered by elimination
        query, answer = rng.choice(questions)
        text = f"<|user|> {query}{prompt.after}"
        if not pieces and k == 1 and rng.random() < 0.5:
            text = f"{query}\n{passages[0]}{prompt.after}"
        elif not pieces:
            text = prompt.text(query, passages)
        pieces += [(text, False), (f"{prompt.answer_start}{answer}<|end|>", True)]
    return pieces


def make_tokenizer(folder, rng):
    """A tokeniser with one token a word: tiktoken looks a whole word up before it merges bytes, so bytes and words are
    all it needs."""
    ranks = {bytes([b]): b for b in range(256)}
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # tiktoken would keep the file it reads first, by its path, for ever
    os.makedirs(folder, exist_ok=True)
    for learn in (False, True):  # the prompt is part of the world's text, and it takes a tokeniser to render it
        with open(f"{folder}/tokenizer.tiktoken", "wb") as f:  # tiktoken's format: a token in base64 and its rank
            f.writelines(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
        converter = TikTokenConverter(f"{folder}/tokenizer.tiktoken", pattern=WORD, extra_special_tokens=SPECIAL)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=converter.converted(), eos_token="<|end|>",
                                            pad_token="<|end|>", chat_template=CHAT_TEMPLATE)
        if not learn:
            prompt = Prompt(tokenizer)
            text = "".join(p for _ in range(4000) for p, _ in draw_conversation(rng, prompt, rng.randint(1, 5)))
            for special in SPECIAL:
                text = text.replace(special, ".")  # not by a newline: WORD would add the space after it to it
            for word in sorted(set(regex.findall(WORD, text))):
                ranks.setdefault(word.encode(), len(ranks))
    tokenizer.save_pretrained(folder)
    return tokenizer


def train_llm(tokenizer, rng):
    """A Llama of 4 layers, trained from scratch to answer from full text: first from one passage, then from up to 5."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        initializer_range=0.08, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None))
    with torch.no_grad():
        model.model.embed_tokens.weight *= 2  # or the first MLP drowns what word it is
    prompt = Prompt(tokenizer)

    def loss(step):
        most = min(5, 1 + int(16 * max(0.0, step / llm_steps - 0.4)))
        rows = []
        for _ in range(32):
            pieces = draw_conversation(rng, prompt, rng.randint(1, most))
            rows.append([(i, answer) for text, answer in pieces for i in prompt.ids(text)])
        width = max(len(row) for row in rows)
        rows = torch.tensor([row + [(0, False)] * (width - len(row)) for row in rows])  # padding on the right: causal
        ids, is_answer = rows[:, :, 0], rows[:, 1:, 1].bool()
        # the first two layers learn to answer on their own too: in a deep LLM the early layers do such local reading
        h = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
        return sum(torch.nn.functional.cross_entropy(model.lm_head(x[:, :-1][is_answer]), ids[:, 1:][is_answer])
                   for x in (model.model.norm(h[2]), h[4]))

    return fit(model, llm_steps, loss, "training data/toy/llm")


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon) in float32. torch.optim.Muon multiplies in bfloat16, which took
    half of the time of a step on a CPU without instructions for it."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                x = p.grad.lerp(momentum, 0.95)
                x /= x.norm() + 1e-7
                for _ in range(5):  # Newton-Schulz: all singular values of x go to about 1
                    a = x @ x.T
                    x = 3.4445 * x + (2.0315 * a @ a - 4.775 * a) @ x
                p.add_(x, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def fit(model, steps, loss_of, desc):
    """Trains a model on the loss of every step, loss_of(step)."""
    # Muon learns to look answers up in a third of AdamW's steps; it is for matrices, not for the table of embeddings
    matrices = [p for p in decoder_layers(model).parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() == 1] + [model.get_input_embeddings().weight]
    optimizers = [Muon(matrices, lr=0.03), torch.optim.AdamW(others, lr=4e-3, weight_decay=0.0)]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1, (s + 1) / 20) * (1 - s / steps))
                  for o in optimizers]
    bar = tqdm(range(steps), desc=desc, mininterval=5)
    for step in bar:
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o, scheduler in zip(optimizers, schedulers):
            o.step()
            o.zero_grad()
            scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def train_encoder(folder, tokenizer, model, config, **tokens):
    """A model of two layers for config/toy_modernbert.py, with the LLM's words and embeddings of its own: it has
    learned to fill in a masked word, the answer after a question and a passage, as encoders know such things from
    their own pretraining. What it has never seen is the LLM."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokens)
    special = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    encoder = model(config(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                           num_attention_heads=4, initializer_range=0.08,
                           **{"bos_token_id": None, "eos_token_id": None, **special}))
    embeddings = encoder.get_input_embeddings().weight
    begin, separator = tokens.get("cls_token", tokens.get("bos_token")), tokens.get("sep_token", "\n")

    def loss(step):
        answers, rows = [], []
        for _ in range(64):
            passages, questions = draw_world(rng, 1)
            query, answer = rng.choice(questions)
            rows.append(f"{begin}{query}{separator}{passages[0]}{separator}{tokens['mask_token']}")
            answers.append(f" {answer}")
        ids, mask = left_pad(tokenizer(rows, add_special_tokens=False).input_ids)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        h = encoder(ids, attention_mask=mask.long(), position_ids=positions).last_hidden_state[:, -1]  # (64, 128)
        return torch.nn.functional.cross_entropy(h @ embeddings.T, torch.tensor(tokenizer(answers).input_ids)[:, 0])

    fit(encoder, encoder_steps, loss, f"training {folder}").save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def draw_split(rng, split, n, llm, tokenizer):
    """n examples, with the language model's answers, and ids of questions and passages."""
    prompt = Prompt(tokenizer)
    examples = [draw_example(rng) for _ in range(n)]
    for i in tqdm(range(0, n, 100), desc="teacher's answers", mininterval=5):
        prompts = [prompt.text(x["query"], x["documents"]) for x in examples[i:i + 100]]
        for x, answer in zip(examples[i:i + 100], generate_answers(llm, tokenizer, prompts, 8)):
            x["answer"] = answer
    for number, x in enumerate(examples):
        x["_id"] = f"{split}{number}"
        x["documents"] = [dict(_id=f"{split}{number}-{i}", text=d) for i, d in enumerate(x["documents"])]
    return examples


def write_split(split, examples):
    """Writes {split}.jsonl, which appears when it is complete, corpus.{split}.jsonl and qrels.{split}.tsv."""
    with open(f"data/toy/corpus.{split}.jsonl", "w") as f:  # to pretrain on, to store the memory of
        f.writelines(json.dumps(d) + "\n" for x in examples for d in x["documents"])
    with open(f"data/toy/qrels.{split}.tsv", "w") as f:
        f.write("query-id\tcorpus-id\tscore\n")
        f.writelines(f"{x['_id']}\t{d['_id']}\t1\n" for x in examples
                     for d, score in zip(x["documents"], x["reranking_scores"]) if score > 0)
    with open(f"data/toy/{split}.jsonl.tmp", "w") as f:
        f.writelines(json.dumps(x) + "\n" for x in examples)
    os.replace(f"data/toy/{split}.jsonl.tmp", f"data/toy/{split}.jsonl")
    print(f"data/toy/{split}.jsonl: {len(examples):,} examples; the teacher's answers from full text: exact match "
          f"{mean_scores([x['answer'] for x in examples], examples)['em']:.3f}")


if __name__ == "__main__":
    at_least(globals(), seed=0, llm_steps=1, encoder_steps=1, train_examples=1, val_examples=1, test_examples=1)
    if not parts or not {*parts.split(",")} <= {"examples", "encoders"}:
        fail(f"parts is examples, encoders or both, not '{parts}'")
    if "examples" in parts:
        # train.py takes train.jsonl as the sign that the toy is complete: it goes first and comes back last
        Path("data/toy/train.jsonl").unlink(missing_ok=True)
        rng = random.Random(seed)
        tokenizer = make_tokenizer("data/toy/llm", rng)
        llm = train_llm(tokenizer, rng)
        llm.save_pretrained("data/toy/llm")
        for split, n in (("test", test_examples), ("val", val_examples), ("train", train_examples)):
            write_split(split, draw_split(rng, split, n, llm, tokenizer))
    if "encoders" in parts:
        with fail_on(ValueError):
            tokenizer = load_tokenizer("data/toy/llm")
        train_encoder("data/toy/encoder", tokenizer, ModernBertModel, ModernBertConfig, cls_token="<|cls|>",
                      sep_token="<|sep|>", pad_token="<|end|>", mask_token="<|assistant|>")
        train_encoder("data/toy/decoder", tokenizer, LlamaModel, LlamaConfig, bos_token="<|cls|>", pad_token="<|end|>",
                      mask_token="<|assistant|>")
