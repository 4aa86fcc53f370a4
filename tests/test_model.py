"""The prompt against the chat template, the loss against transformers' own, generation against generate()."""

import json
import os
import shutil
from contextlib import nullcontext

import pytest
import torch
import transformers as tf
from conftest import CHATML, DECODER, EXAMPLES, save_tokenizer
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, BloomConfig

import generate
import lora
from distributed import enable_gradient_checkpointing
from flops import StepFlops
from generate import KVCache, nearest_tokens
from model import ScaleDown, ScaleDownConfig
from prompt import SYSTEM, Prompt

GENERATORS = ["llama", "mistral", "qwen2", "gemma2", "gpt2"]


def build(tiny, generator="llama", **kwargs):
    if "compressor_model" in kwargs:
        kwargs.update(compressor_type="modernbert", compressor_model=tiny(kwargs["compressor_model"]))
    generator = tiny(generator)  # draws its weights the first time that it is asked for
    torch.manual_seed(0)
    model = ScaleDown(ScaleDownConfig(generator=generator, **{**dict(
        num_layers=2, num_memory_tokens=3, projection_hidden=20, answer_tokens=12, lora_dropout=0.0), **kwargs}))
    with torch.no_grad():  # an adapter that does something
        for _, m in lora.layers(model.generator):
            m.lora_B.normal_(std=0.1)
    return model.eval()


# ---- prompt

@pytest.mark.parametrize("name", GENERATORS)
def test_prompt_is_the_chat_templates_own_rendering(tiny, name):
    t = AutoTokenizer.from_pretrained(tiny(name))
    documents, query, answer = ["Mara keeps a hound.", "Loku\nA town."], "who is it?", "Mara's hound"
    user = "Background:\nMara keeps a hound.\n\nLoku\nA town.\n\nQuestion: who is it?"
    prompt = Prompt(t)
    if name == "gpt2":  # no template
        whole = f"<s>{SYSTEM}\n\n{user}\n\nAnswer: {answer}</s>"
    else:
        messages = ([dict(role="user", content=f"{SYSTEM}\n\n{user}")] if name in ("mistral", "gemma2") else
                    [dict(role="system", content=SYSTEM), dict(role="user", content=user)])
        assert prompt.text(query, documents) == t.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = t.apply_chat_template(messages + [dict(role="assistant", content=answer)], tokenize=False)
    ids = t(whole, add_special_tokens=False).input_ids
    end = "<|im_end|>" if name in ("llama", "qwen2") else "</s>"
    ids = ids[:len(ids) - ids[::-1].index(t.convert_tokens_to_ids(end))]  # up to the end of the assistant's turn
    assert prompt.ids(prompt.text(query, documents)) + prompt.answer_ids([answer], 99)[0] == ids


@pytest.mark.parametrize("name", GENERATORS)
def test_compressed_prompt_is_the_text_prompt_with_embeddings_for_documents(tiny, name, examples):
    model = build(tiny, name)
    batch = model.collate(examples[:1], 3)
    memory, _ = model.compressor(**batch["compressor"])
    x, mask = model.prompt_embeddings(memory, batch)
    embed = model.generator.get_input_embeddings()
    # the template's own tokens, with a word where the documents stand
    p = model.prompt
    ids = p.ids(p.text(examples[0]["query"], ["stone"])) + p.answer_ids(["Tuson"], 99)[0]
    head = p.ids(p.before)
    assert ids[:len(head)] == head
    word = model.tokenizer("\nstone", add_special_tokens=False).input_ids[-len(p.ids_after("\n", ["stone"])[0]):]
    assert ids[len(head):len(head) + len(word)] == word
    expected = torch.cat([embed(torch.tensor(head)), memory[0, 0], model.sep, memory[0, 1], model.sep, memory[0, 2],
                          embed(torch.tensor(ids[len(head) + len(word):]))])
    assert mask.all()
    torch.testing.assert_close(x[0], expected)


def test_documents_and_query_are_cut_alike_in_every_mode(tiny):
    model = build(tiny, doc_tokens=5, query_tokens=3)
    text, = model.full_prompts(["who is the mayor of Loku?"], [["Mara keeps a red hound near the river."]])
    t = model.tokenizer
    document = t.decode(t("Mara keeps a red hound near the river.", add_special_tokens=False).input_ids[:5])
    query = t.decode(t("who is the mayor of Loku?", add_special_tokens=False).input_ids[:3])
    assert text == model.prompt.text(query, [document])


# ---- loss

@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("compressor", [{}, dict(compressor_model="bert")])
def test_loss_is_transformers_own(tiny, name, compressor, examples):
    """One example at a time, no padding, whole-sequence labels, against our padded batch."""
    model = build(tiny, name, **compressor)
    total = tokens = 0
    for x in examples:
        batch = model.collate([x])  # as many documents as there are: nothing is missing
        memory, _ = model.compressor(**batch["compressor"])
        embeds, mask = model.prompt_embeddings(memory, batch)
        assert mask.all()
        labels = torch.full(embeds.shape[:2], -100)
        labels[:, -batch["labels"].shape[1]:] = batch["labels"]
        n = batch["labels"].shape[1]
        total += model.generator(inputs_embeds=embeds, labels=labels).loss * n
        tokens += n
    loss, parts = model(model.collate(examples, num_documents=4))
    torch.testing.assert_close(loss, total / tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts["generation"], loss)


ENDS = dict(bos_token_id=3, eos_token_id=4, pad_token_id=0)
WINDOWS = dict(
    mistral=lambda **k: tf.MistralConfig(**k, sliding_window=8),
    gemma2=lambda **k: tf.Gemma2Config(**k, head_dim=8, sliding_window=8),
    gemma3=lambda **k: tf.Gemma3TextConfig(**k, head_dim=8, sliding_window=8, sliding_window_pattern=2),
    qwen2=lambda **k: tf.Qwen2Config(**k, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    olmo3=lambda **k: tf.Olmo3Config(**k, sliding_window=8),
    cohere2=lambda **k: tf.Cohere2Config(**k, sliding_window=8),
    gpt_oss=lambda **k: tf.GptOssConfig(**k, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    modernbert_decoder=lambda **k: tf.ModernBertDecoderConfig(**k, local_attention=8, global_attn_every_n_layers=2))


@pytest.mark.parametrize("name", WINDOWS)
def test_attention_windows_shorter_than_the_prompt_count_positions(tmp_path, name):
    """The loss and its gradient of a batch with missing documents are those of one example at a time, without padding."""
    V = max(300, save_tokenizer(tmp_path, CHATML))
    torch.manual_seed(0)
    generator = AutoModelForCausalLM.from_config(WINDOWS[name](vocab_size=V, **DECODER, **ENDS))
    with torch.no_grad():
        for p in generator.parameters():
            if p.dim() >= 2:
                p.mul_(5)
    generator.save_pretrained(tmp_path)
    model = build(lambda folder: folder, str(tmp_path))
    total = 0
    n = sum(len(a) for a in model.prompt.answer_ids([x["answer"] for x in EXAMPLES], 12))
    for x in EXAMPLES:
        batch = model.collate([x])
        embeds, mask = model.prompt_embeddings(model.compressor(**batch["compressor"])[0], batch)
        assert mask.all() and mask.shape[1] > 8
        labels = torch.full(embeds.shape[:2], -100)
        labels[:, -batch["labels"].shape[1]:] = batch["labels"]
        total += model.generator(inputs_embeds=embeds, labels=labels).loss * batch["labels"].shape[1] / n
    gradient, = torch.autograd.grad(total, model.sep)
    loss, _ = model(model.collate(EXAMPLES, num_documents=4))
    torch.testing.assert_close(loss, total, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, model.sep)[0], gradient, atol=1e-4, rtol=1e-3)
    # as transformers writes them, one at a time; the answers of a batch are theirs
    questions = [x["query"] for x in EXAMPLES], [x["documents"] for x in EXAMPLES]
    answers = []
    for query, documents in zip(*questions):
        embeds, mask = model.embed_prompts([query], [documents])
        ids = model.generator.generate(inputs_embeds=embeds, attention_mask=mask.long(), max_new_tokens=6, do_sample=False,
                                       eos_token_id=model.stop_ids, pad_token_id=0)
        answers.append(model.tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    assert model.generate(*questions, max_new_tokens=6) == answers


def test_reranking_loss(tiny, examples):
    model = build(tiny, enable_reranking=True, rerank_lambda=0.3)
    batch = model.collate(examples, num_documents=4)
    loss, parts = model(batch)
    _, scores = model.compress([x["query"] for x in examples], [x["documents"] for x in examples])
    by_hand = sum((scores[b, i].item() - s) ** 2 for b, x in enumerate(examples) for i, s in enumerate(x["reranking_scores"]))
    assert parts["reranking"].item() == pytest.approx(by_hand / 3, rel=1e-4)
    assert loss.item() == pytest.approx(parts["generation"].item() + 0.3 * parts["reranking"].item(), rel=1e-5)


def test_parts_of_a_batch_add_up_to_the_whole(tiny, examples):
    model = build(tiny, enable_reranking=True)
    whole, _ = model(model.collate(examples, 3))
    tokens = sum(len(a) for a in model.prompt.answer_ids([x["answer"] for x in examples], 12))
    parts = sum(model(model.collate(part, 3), tokens, 3)[0] for part in (examples[:1], examples[1:]))
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("kwargs", [{}, dict(compressor_model="modernbert"), dict(compressor_model="roberta")])
def test_fixed_shapes_change_no_loss(tiny, name, kwargs, examples):
    model = build(tiny, name, query_tokens=12, doc_tokens=24, enable_reranking=True, **kwargs)
    shapes = []
    for i in range(3):
        loose, fixed = (model.collate(examples[i:i + 1] * 2, 3, fixed) for fixed in (False, True))
        shapes.append({k: t.shape for k, t in {**fixed, **fixed.pop("compressor")}.items() if k != "compressor"})
        fixed = model.collate(examples[i:i + 1] * 2, 3, fixed=True)
        torch.testing.assert_close(model(fixed)[0], model(loose)[0])
        assert StepFlops(model).count(fixed) == StepFlops(model).count(loose)
    answer, tokens, flops = StepFlops(model).count(model.collate(examples[1:2], 1))  # a missing document is not read
    assert StepFlops(model).count(model.collate(examples[1:2], 3)) == (answer, tokens, flops)
    long = dict(query="mayor river bridge " * 40, documents=["stone hound " * 80] * 5, answer="red " * 90, reranking_scores=[1.0] * 5)
    fixed = model.collate([long] * 2, 3, fixed=True)
    assert shapes == [{k: t.shape for k, t in {**fixed, **fixed.pop("compressor")}.items() if k != "compressor"}] * 3


def test_everything_trained_gets_a_gradient_and_nothing_else(tiny, examples):
    for kwargs in ({}, dict(compressor_model="bert"), dict(compressor_model="modernbert")):
        model = build(tiny, enable_reranking=True, **kwargs).train()
        model(model.collate(examples, 3))[0].backward()
        unused = ("word_embeddings", "tok_embeddings", "pooler")  # rows of words that do not occur
        for name, p in model.named_parameters():
            frozen = name.startswith("generator.") and "lora_" not in name or name == "compressor.backbone.embed_tokens.weight"
            assert p.requires_grad != frozen and (p.grad is None) == frozen, name
            assert frozen or p.grad.abs().sum() > 0 or any(u in name for u in unused), name


@pytest.mark.parametrize("kwargs", [{}, dict(compressor_model="modernbert")])
def test_gradient_checkpointing_changes_no_gradient(tiny, examples, kwargs):
    grads = []
    for checkpointing in (False, True):
        model = build(tiny, enable_reranking=True, **kwargs).train()
        if checkpointing:
            enable_gradient_checkpointing(model)
        model(model.collate(examples, 3))[0].backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(*(g[name] for g in grads))


# ---- generation

@pytest.mark.parametrize("name", GENERATORS)
def test_greedy_generation_is_transformers_own(tiny, name, examples):
    model = build(tiny, name)
    no_tokens = [*range(len(model.tokenizer), model.generator.config.vocab_size)] or None  # rows of the head without one
    queries, documents = [x["query"] for x in examples], [x["documents"] for x in examples]
    for mode in ("compressed", "full", "none"):
        ours = model.generate(queries, documents, 12, mode=mode)
        x, mask = model.embed_prompts(queries, documents, mode)
        for b in range(len(queries)):  # row by row, without any padding
            if mode == "compressed":
                row = model.generator.generate(inputs_embeds=x[b:b + 1, mask[b]], max_new_tokens=12, do_sample=False,
                                               eos_token_id=model.stop_ids, pad_token_id=0, suppress_tokens=no_tokens)[0]
            else:  # plain text, plain model, no adapter anywhere
                plain = AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32)
                ids = model.prompt.ids(model.full_prompts(queries, documents, mode)[b])
                row = plain.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12,
                                     do_sample=False, eos_token_id=model.stop_ids, pad_token_id=0, suppress_tokens=no_tokens)[0, len(ids):]
            assert model.tokenizer.decode(row, skip_special_tokens=True).strip() == ours[b]


def test_prompts_are_read_in_few_passes(tiny, examples):
    """One row in one pass; of several the beginning, which all have, in a pass of its own."""
    model = build(tiny)
    read = []
    model.generator.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True)
    for n, first in ((1, None), (2, (1, len(model.before_ids)))):
        queries, documents = [x["query"] for x in examples[:n]], [x["documents"] for x in examples[:n]]
        P = model.embed_prompts(queries, documents)[1].shape[1]
        read.clear()
        model.generate(queries, documents, 1)
        assert read == ([(1, P)] if n == 1 else [first, (n, P - first[1])])


def test_padding_does_not_count_within_an_attention_window(tiny):
    """The logits after prompts of unequal length, and after one token more, against transformers' without padding."""
    model = build(tiny, "gemma3")
    plain = AutoModelForCausalLM.from_pretrained(tiny("gemma3"), dtype=torch.float32)
    model.generator.config.sliding_window = plain.config.sliding_window = 16
    queries, documents = ["who is it?", "what?"], [["stone hound", "Mara"], ["The mayor of Loku is Tuson. Mara keeps a hound."]]
    prompts = [model.prompt.ids(text) for text in model.full_prompts(queries, documents)]
    x, mask = model.embed_prompts(queries, documents, mode="full")
    P = mask.shape[1]
    slots = torch.arange(P)
    real = torch.nn.functional.pad(mask, (0, 1), value=True)
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    cache = KVCache(P + 1)
    with torch.no_grad(), lora.adapter_off(model.generator):
        first = model.decoder.step(x, slots, real, positions, cache)
        second = model.decoder.decode_one_token(torch.tensor([7, 7]), torch.tensor([P]), real, positions, cache)
        for b, ids in enumerate(prompts):
            logits = plain(torch.tensor([ids + [7]])).logits[0]
            torch.testing.assert_close(first[b], logits[-2], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(second[b], logits[-1], atol=1e-4, rtol=1e-4)
    assert len({*map(len, prompts)}) == 2
    x, mask = model.embed_prompts(queries, documents)  # the second lacks a document in its middle
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model.decoder.step(x, torch.arange(x.shape[1]), mask, positions, KVCache(x.shape[1]))
        for b in range(2):
            alone = model.generator(inputs_embeds=x[b:b + 1, mask[b]]).logits[0, -1]
            torch.testing.assert_close(logits[b], alone, atol=1e-4, rtol=1e-4)


def test_what_all_prompts_begin_with_is_read_once(tiny, examples, monkeypatch):
    model = build(tiny)
    asked, reads, step = ([x["query"] for x in examples], [x["documents"] for x in examples]), [], model.decoder.step
    monkeypatch.setattr(model.decoder, "step", lambda x, slots, *rest: reads.append((len(x), slots.tolist())) or step(x, slots, *rest))
    model.generate(*asked, 4)
    before = len(model.before_ids)
    assert reads[0] == (1, list(range(before))) and reads[1][0] == 3 and reads[1][1][0] == before
    assert all(len(slots) == 1 for _, slots in reads[2:])


@pytest.mark.parametrize("state", ["plain", "off", "scaled", "merged", "trained", "bfloat16"])
def test_answers_follow_the_adapter(tiny, examples, state):
    """Whatever has happened to the weights since the last answers, these are transformers' own."""
    model = build(tiny)
    with torch.no_grad():
        for _, m in lora.layers(model.generator):
            m.lora_B.mul_(3)
    asked = [x["query"] for x in examples], [x["documents"] for x in examples]
    first = model.generate(*asked, 6)
    if state == "scaled":
        for _, m in lora.layers(model.generator):
            m.scaling *= -2
    if state == "merged":
        lora.merge(model.generator)
    if state == "trained":
        optimizer = model.configure_optimizers(1e-1, 1e-1, 0.0, (0.9, 0.999))
        model(model.collate(examples, 3))[0].backward()
        optimizer.step()
    if state == "bfloat16":
        model.to(torch.bfloat16)
    with lora.adapter_off(model.generator) if state == "off" else nullcontext():
        answers = model.generate(*asked, 6)
        x, mask = model.embed_prompts(*asked)
        ids = model.generator.generate(inputs_embeds=x, attention_mask=mask.long(), max_new_tokens=6, do_sample=False,
                                       eos_token_id=model.stop_ids, pad_token_id=0)
    assert answers == [a.strip() for a in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert (answers == first) == (state in ("plain", "merged")) or state == "bfloat16"


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_the_step_of_a_token_is_compiled_whole_and_once(tiny, examples, name, monkeypatch):
    """sample.py --compile=True. By TorchDynamo alone, for a machine without a compiler; the second batch has other
    documents, and what the first has left in the cache."""
    model = build(tiny, name)
    asked = [x["query"] for x in examples], [x["documents"] for x in examples]
    again = asked[0], [docs[:1] for docs in asked[1]]
    answers = [model.generate(*q, 6) for q in (asked, again)]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, **kwargs: compile(f, fullgraph=True, backend=backend, **kwargs))
    model.decoder.compile()
    assert [model.generate(*q, 6) for q in (asked, again)] == answers
    caches = [t for cache in model.decoder.static_caches.values() for layer in cache.layers.values() for t in layer]
    assert len(graphs) == 1 and len(caches) == 8
    assert all(hasattr(t, "_dynamo_static_input_type") for t in caches)


def test_documents_that_were_compressed_before(tiny, examples):
    model = build(tiny)
    asked = [x["query"] for x in examples], [x["documents"] for x in examples]
    memory, _ = model.compress(*asked)
    x, mask = model.embed_prompts(*asked)
    model.compressor.forward = None  # is not called
    again, mask_again = model.embed_prompts(*asked, memory=memory)
    assert again.equal(x) and mask_again.equal(mask)
    assert not model.embed_prompts(*asked, memory=memory.flip(1))[0].equal(x)


def test_sampling(tiny, examples):
    model = build(tiny)
    queries, documents = [x["query"] for x in examples], [x["documents"] for x in examples]
    greedy = model.generate(queries, documents, 8)
    assert model.generate(queries, documents, 8, temperature=5.0, top_k=1) == greedy
    assert model.generate(queries, documents, 8, temperature=5.0) != greedy
    # the first token follows softmax(logits / temperature) over the top k
    x, mask = model.embed_prompts(queries[:1], documents[:1])
    logits = model.generator(inputs_embeds=x).logits[0, -1]
    top = logits.topk(3)
    torch.manual_seed(0)
    rows = model.decoder.generate(x.expand(4000, -1, -1), mask.expand(4000, -1), 1, [], 2.0, 3)
    for token, p in zip(top.indices.tolist(), (top.values / 2.0).softmax(0).tolist()):
        assert abs(rows.count([token]) / 4000 - p) < 0.04


def test_decoding_keeps_no_gradient_and_reads_no_token_too_many(tiny, examples, monkeypatch):
    model, drawn, sample = build(tiny), [], generate.sample
    monkeypatch.setattr(generate, "sample", lambda logits, *args: drawn.append(logits) or sample(logits, *args))
    steps, decode = [], model.decoder.decode_one_token
    model.decoder.decode_one_token = lambda *args: steps.append(1) or decode(*args)
    with torch.no_grad():
        x, mask = model.embed_prompts([examples[0]["query"]], [examples[0]["documents"]])
    assert len(model.decoder.generate(x, mask, 5, [])[0]) == 5
    assert len(drawn) == 5 and len(steps) == 4 and not any(logits.requires_grad for logits in drawn)
    sizes, cache = [], generate.KVCache
    monkeypatch.setattr(generate, "KVCache", lambda length: sizes.append(length) or cache(length))
    model.decoder.generate(x, mask, 100, [])
    assert sizes == [256] and 128 < x.shape[1] + 100 < 256  # of few different sizes: a step is compiled for each
    with pytest.raises(ValueError, match=r"prompt and answer \(\d+ tokens\) are longer than the generator's 512"):
        model.decoder.generate(x, mask, 500, [])
    assert 500 | x.shape[1] < 512


def test_positions_are_counted_exactly(tiny, examples, monkeypatch):
    model, counted = build(tiny), []
    monkeypatch.setattr(generate, "check_length", lambda _, n, *whose: counted.append(n))
    batch = model.collate(examples)
    _, mask = model.prompt_embeddings(model.compressor(**batch["compressor"])[0], batch)
    assert counted == [mask.sum(1).max().item()]


def test_the_least_sizes_and_the_papers(tiny):
    sizes = ("num_memory_tokens", "query_tokens", "doc_tokens", "answer_tokens", "lora_r")
    build(tiny, **dict.fromkeys(sizes, 1))
    for name in sizes:
        with pytest.raises(ValueError, match="must be at least 1"):
            build(tiny, **{name: 0})
    c = ScaleDownConfig()  # Table 7
    assert (c.num_layers, c.num_memory_tokens, c.doc_tokens, c.answer_tokens) == (8, 8, 128, 128)
    assert (c.lora_r, c.lora_alpha, c.lora_dropout, c.projection_hidden, c.rerank_lambda) == (16, 32, 0.1, 8096, 0.05)


def test_weights_of_a_checkpoint_have_the_dtype_asked_for(tiny, tmp_path):
    build(tiny).save(tmp_path / "x")
    for dtype, want in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        assert {p.dtype for p in ScaleDown.from_pretrained(tmp_path / "x", dtype=dtype).parameters()} == {want}


def test_training_keeps_no_cache(tiny, examples):
    model, seen = build(tiny), []
    model.generator.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["use_cache"]), with_kwargs=True)
    model(model.collate(examples))
    assert seen == [False] and not model.compressor.backbone.config.use_cache


def test_generate_leaves_the_model_as_it_was(tiny, examples):
    model = build(tiny, lora_dropout=0.5).train()
    x = examples[0]
    first = [model.generate([x["query"]], [x["documents"]], 5, mode=m) for m in ("compressed", "full", "compressed")]
    assert first[0] == first[2] and model.training and model.compressor.backbone.training
    assert all(m.other == () for _, m in lora.layers(model.generator))


def test_bad_questions(tiny):
    model = build(tiny)
    for mode in ("compressed", "full"):
        with pytest.raises(ValueError, match="documents"):
            model.generate(["who?"], [[]], mode=mode)
    for mode in ("compressed", "full", "none"):
        with pytest.raises(ValueError, match="empty query"):
            model.generate([" "], [["a"]], mode=mode)
    for queries, documents, why in ((["who?"], [["a"], ["b"]], "as many lists"), ("who?", [["a"]], "as many lists"),
                                    (["who?"], ["abcd"], "no list of documents"), (["who?"], [dict(text="a")], "no list of documents")):
        for mode in ("compressed", "full"):
            with pytest.raises(ValueError, match=why):
                model.generate(queries, documents, mode=mode)
    for documents in ([["a b c d"], ["e"]], ["abcd"], [[]]):
        with pytest.raises(ValueError, match="documents"):
            model.compress(["who?"], documents)
    with pytest.raises(ValueError, match="mode is"):
        model.generate(["who?"], [["a"]], mode="half")
    with pytest.raises(ValueError, match="longer than the generator's 512 positions"):
        model.generate(["who?"], [["the bridge " * 99] * 9], mode="full")


def test_a_generator_without_position_ids_is_refused(tiny, tmp_path):
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path)
    AutoModelForCausalLM.from_config(BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="takes no position ids"):
        ScaleDown(ScaleDownConfig(generator=str(tmp_path)))


def test_training_the_compressor_leaves_the_generator_alone(tiny, examples):
    model = build(tiny).train()
    before = {name: p.clone() for name, p in model.generator.named_parameters() if not p.requires_grad}
    optimizer = model.configure_optimizers(1e-2, 1e-2, 0.1, (0.9, 0.999))
    model(model.collate(examples, 3))[0].backward()
    optimizer.step()
    after = dict(model.generator.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in before.items())
    first = model.generator.model.layers[0].mlp.up_proj.base.weight
    assert not torch.equal(model.compressor.backbone.layers[0].mlp.up_proj.weight, first)


# ---- checkpoints

@pytest.mark.parametrize("kwargs", [dict(enable_reranking=True), dict(compressor_model="modernbert")])
def test_a_checkpoint_gives_the_same_model(tiny, tmp_path, examples, kwargs):
    model = build(tiny, **kwargs)
    model.compressor.backbone.register_buffer("kept", torch.ones(3))  # comes with the backbone, is not trained
    model.save(tmp_path, get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True)))  # as train.py
    again = ScaleDown.from_pretrained(tmp_path)
    batch = model.collate(examples, 3)
    torch.testing.assert_close(again(batch)[0], model(batch)[0], rtol=0, atol=0)
    files = sorted(os.listdir(tmp_path))
    assert files == ["adapter_config.json", "adapter_model.safetensors", "compressor.safetensors", "config.json"]
    moved = shutil.copytree(tiny("llama"), tmp_path / "moved")
    again = ScaleDown.from_pretrained(tmp_path, generator=str(moved))
    torch.testing.assert_close(again(batch)[0], model(batch)[0], rtol=0, atol=0)
    half = ScaleDown.from_pretrained(tmp_path, dtype=torch.bfloat16)
    torch.testing.assert_close(half(batch)[0], model(batch)[0], atol=0.3, rtol=0.1)
    assert half.generator.model.rotary_emb.inv_freq.dtype == torch.float32


def test_relevance_has_more_digits_than_bfloat16(tiny, tmp_path, examples):
    """With weights in bfloat16 and under autocast: or many of 50 documents would tie."""
    model = build(tiny, enable_reranking=True)
    model.save(tmp_path)
    half = ScaleDown.from_pretrained(tmp_path, dtype=torch.bfloat16)
    asked = [x["query"] for x in examples], [x["documents"] for x in examples]
    for m, autocast in ((half, False), (model, True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            scores = m.compress(*asked)[1]
        assert not scores.equal(scores.bfloat16().float())


def test_checkpoints_that_do_not_fit(tiny, tmp_path):
    build(tiny).save(tmp_path)
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path / "twin")  # of the same shape
    torch.manual_seed(99)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny("llama"))).save_pretrained(tmp_path / "twin")
    for other in (tiny("qwen2"), str(tmp_path / "twin")):
        with pytest.raises(ValueError, match="trained with another generator"):
            ScaleDown.from_pretrained(tmp_path, generator=other)
    with pytest.raises(ValueError, match="trained with lora_alpha=32, this is 16"):
        build(tiny, lora_alpha=16).load(tmp_path)
    with open(tmp_path / "config.json") as f:
        config = json.load(f)
    with open(tmp_path / "config.json", "w") as f:
        json.dump({**config, "num_memory_tokens": 5}, f)
    with pytest.raises(ValueError, match=r"memory_tokens is \(3, 32\) there and \(5, 32\) here"):
        ScaleDown.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="holds no checkpoint"):
        ScaleDown.from_pretrained(tmp_path / "nothing")
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path, tmp_path / "run" / "best", ignore=lambda *_: ["run"])
    with pytest.raises(OSError, match="run/config.json does not exist; .*run/best holds one"):
        ScaleDown.from_pretrained(tmp_path / "run")
    for text in ("{", "[]", "{}"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json is (damaged|not the config.json)"):
            ScaleDown.from_pretrained(tmp_path)


def test_two_learning_rates_and_decay_only_on_matrices(tiny):
    model = build(tiny, enable_reranking=True)
    optimizer = model.configure_optimizers(1e-4, 5e-5, 0.1, (0.9, 0.999))
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(of) == sum(p.requires_grad for p in model.parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert of[id(p)]["lr"] == (1e-4 if name.startswith("generator.") else 5e-5), name
            assert of[id(p)]["weight_decay"] == (0.1 if p.dim() >= 2 else 0.0), name


def test_nearest_tokens(tiny):
    model = build(tiny)
    head = model.generator.get_output_embeddings().weight
    memory = 3 * head[[10, 20, 30, 40]].view(1, 2, 2, -1)
    assert {len(row) for row in nearest_tokens(model.generator, model.tokenizer, memory)[0][0]} == {5}
    rows = nearest_tokens(model.generator, model.tokenizer, memory, n=1)
    assert rows == [[[[model.tokenizer.decode([i]).strip()] for i in pair] for pair in ((10, 20), (30, 40))]]


def test_the_first_layers_have_the_generators_embeddings_or_the_checkpoints_own(tiny, tmp_path):
    """A released compressor has its own, and a checkpoint from before they were frozen: they are trained on."""
    model, name = build(tiny), "compressor.backbone.embed_tokens.weight"
    embed = model.get_parameter(name)
    assert embed.equal(model.generator.get_input_embeddings().weight)
    model.save(tmp_path / "ours")
    embed.requires_grad_().data += 0.01
    model.save(tmp_path / "theirs")
    kept = {folder: load_file(tmp_path / folder / "compressor.safetensors") for folder in ("ours", "theirs")}
    assert name not in kept["ours"] and kept["theirs"].keys() == {*kept["ours"], name}
    for folder in ("ours", "theirs"):
        other = build(tiny)
        other.load(tmp_path / folder)
        trained = [id(p) for group in other.configure_optimizers(1, 1, 0, (0.9, 0.999)).param_groups for p in group["params"]]
        own = other.get_parameter(name)
        assert own.equal(embed) == (id(own) in trained) == (folder == "theirs")
        other.save(tmp_path / "again")
        again = load_file(tmp_path / "again" / "compressor.safetensors")
        assert again.keys() == kept[folder].keys() and all(t.equal(kept[folder][key]) for key, t in again.items())


@pytest.mark.parametrize("compressor_type", ["n_layers", "modernbert"])
def test_lora_on_the_compressor(tiny, examples, tmp_path, compressor_type):
    """Trains LoRA, learned tokens and projection; the backbone's own weights stay. Equals a compressor whose weights
    have the updates added, and comes back from a checkpoint."""
    settings = dict(generator=tiny("llama"), compressor_type=compressor_type, num_layers=2, num_memory_tokens=2,
                    compressor_model=tiny("modernbert"), projection_hidden=16, lora_r=4, lora_dropout=0.0)
    model, plain = ScaleDown(ScaleDownConfig(**settings, compressor_lora_r=3)), ScaleDown(ScaleDownConfig(**settings))
    before = {name: p.clone() for name, p in model.compressor.named_parameters()}
    optimizer = model.configure_optimizers(1e-2, 1e-2, 0.0, (0.9, 0.95))
    for _ in range(2):  # A has a gradient once B is not 0
        model(model.collate(examples))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.compressor.named_parameters() if not p.equal(before[name])}
    assert moved == {name for name in before if "lora_" in name or not name.startswith("backbone.")}
    model.eval().save(tmp_path)
    batch = model.collate(examples)["compressor"]
    want = model.compressor(**batch)[0]
    torch.testing.assert_close(ScaleDown.from_pretrained(tmp_path).compressor(**batch)[0], want)
    if compressor_type == "modernbert":  # the same shapes, other embeddings
        shutil.copytree(tiny("modernbert"), tmp_path / "other")
        other = AutoModel.from_pretrained(tmp_path / "other")
        other.get_input_embeddings().weight.data *= -1
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="trained with another compressor"):
            ScaleDown.from_pretrained(tmp_path, compressor_model=str(tmp_path / "other"))
    weights = model.compressor.state_dict()
    for name in [name for name in weights if name.endswith("lora_A")]:
        layer = name.removesuffix("lora_A")
        weights[f"{layer}base.weight"] += (32 / 3) * weights[f"{layer}lora_B"] @ weights[name]
    weights = {name.replace(".base.", "."): t for name, t in weights.items() if "lora_" not in name}
    plain.compressor.load_state_dict(weights)
    torch.testing.assert_close(plain.eval().compressor(**batch)[0], want, atol=1e-5, rtol=1e-4)


def test_padding_counts_for_no_position(tiny):
    """Missing documents take none of the generator's 512 positions; with all of them there it is too long."""
    model = build(tiny, num_memory_tokens=3)
    x = dict(query="who keeps it?", documents=["stone"], answer="Mara")
    model.collate([x], num_documents=200)
    with pytest.raises(ValueError, match=r"answer of the query 'who keeps it\?' \(\d+ tokens\) are longer than the generator's 512 positions"):
        model.collate([{**x, "documents": ["stone"] * 200}], num_documents=200)
    assert model.generate([x["query"]], [x["documents"]], num_documents=120) == model.generate([x["query"]], [x["documents"]])


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_fixed_shapes_are_fixed_where_a_cut_falls_inside_a_character(tiny, name):
    model = build(tiny, name, query_tokens=6, doc_tokens=10)
    shapes = set()
    for n in range(9):
        x = dict(query="the" + " mayor" * (n % 3) + "x" * n + "👩‍👩‍👧語é" * 3, documents=["é" * n + "🙂👩‍👩‍👧語" * 9], answer="🙂" * 20)
        batch = model.collate([x], 2, fixed=True)
        shapes.add((batch["tail_ids"].shape, batch["labels"].shape, *(t.shape for t in batch["compressor"].values())))
        q, = model.prompt.cut([x["query"]], 6)
        assert len(model.prompt.ids(q)) <= 6 and x["query"].startswith(q)
    assert len(shapes) == 1


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_the_compressors_final_norm_is_a_setting(tiny, name, examples):
    model, bare = (build(tiny, name, compressor_norm=norm).compressor for norm in (True, False))
    batch = model.tokenize(["who is it?"], [["Mara keeps a red hound."]], 1)
    norm = getattr(model.backbone, "norm", None) or model.backbone.ln_f
    with torch.no_grad():
        with_norm, without = model(**batch)[0], bare(**batch)[0]
        torch.testing.assert_close(norm(without), with_norm)
    assert not torch.allclose(with_norm, without, atol=0.1)
