"""skip.py: means, selected tokens and their loss by loops, what memory begins as, and batches of other shapes."""

import pytest
import torch
from conftest import EXAMPLES, curve, run, torchrun

from model import ScaleDown, ScaleDownConfig
from pretrained import embedding_std, first_layers
from skip import slice_means

SKIP, SELECT = "skip.SkipNLayersCompressor", "skip.SelectNLayersCompressor"


def build(folder, compressor=SKIP, **settings):
    torch.manual_seed(0)
    return ScaleDown(ScaleDownConfig(generator=folder, compressor_type=compressor, num_layers=2, **{
        **dict(num_memory_tokens=3, lora_dropout=0.0, answer_tokens=8), **settings}))


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 7, 9, 11])
def test_every_slice_has_its_mean(length):
    x, l = torch.randn(1, 2, 11, 5), 4
    mask = torch.arange(11) >= 11 - length
    mean = slice_means(x, torch.stack([mask, torch.ones(11, dtype=torch.bool)])[None], l)
    for k, n in ((0, length), (1, 11)):
        tokens = x[0, k, 11 - n:]
        slices = [[t for i, t in enumerate(tokens) if i * l // n == j] for j in range(l)]
        assert max(map(len, slices)) - min(map(len, slices)) <= 1 and sum(map(len, slices)) == n
        for j, part in enumerate(slices):
            torch.testing.assert_close(mean[0, k, j], torch.stack(part).mean(0) if part else torch.zeros(5))


def test_memory_begins_as_the_means_and_learns(tiny):
    model = build(tiny("llama"))
    c, (x, *_) = model.compressor, EXAMPLES
    memory, _ = model.compress([x["query"]], [x["documents"][:1]])
    ids = torch.tensor(c.layout.tokens(x["documents"][:1], 128)[0])
    means = torch.stack([model.generator.get_input_embeddings()(part).mean(0) for part in
                         (ids[[i for i in range(len(ids)) if i * 3 // len(ids) == j]] for j in range(3))])
    unit = lambda t: t / t.norm(dim=-1, keepdim=True)
    cosine = (unit(memory[0, 0]) * unit(means)).sum(-1)
    assert (cosine > 0.98).all() and (cosine < 1).all()  # a tenth is what the layers make
    std = embedding_std(model.generator.get_input_embeddings())
    torch.testing.assert_close(memory[0, 0].std(unbiased=False, dim=-1), torch.full((3,), std), rtol=0.2, atol=0)
    plain = ScaleDown(ScaleDownConfig(generator=tiny("llama"), num_layers=2, num_memory_tokens=3))
    assert (sum(p.numel() for p in c.parameters()) - sum(p.numel() for p in plain.compressor.parameters())
            == 2 * 3 * means.shape[1])
    loss, _ = model(model.collate(EXAMPLES))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in c.parameters() if p.requires_grad)


def test_selected_tokens_are_those_of_a_loop(tiny):
    """A random vector of scores, five memory tokens, documents of more and of fewer tokens and one that is missing."""
    c = build(tiny("llama"), SELECT, num_memory_tokens=5).eval().requires_grad_(False).compressor
    c.select.normal_()
    batch = c.tokenize(["where is it"], [["one two three, four of the five and six", "one"]], 3)
    memory, _ = c(**batch)
    assert batch["doc_mask"].sum(-1)[0, 0] > 5 > batch["doc_mask"].sum(-1)[0, 1]
    unit = lambda t: t / (t.pow(2).mean() + torch.finfo(t.dtype).eps).sqrt()
    embed, query = c.backbone.get_input_embeddings(), batch["query_ids"][0]
    for k in range(3):
        ids = batch["doc_ids"][0, k][batch["doc_mask"][0, k]]
        # a pass of its own, by a model that has not been told to give MEM alone
        x = torch.cat([embed(query), embed(ids), c.memory_tokens])[None]
        plain = first_layers(tiny("llama"), 2, c.config.compressor_norm)
        h = plain.eval()(inputs_embeds=x).last_hidden_state[0, len(query):].detach()
        scores = [(score.item(), i) for i, score in enumerate(h[:len(ids)] @ c.select)]
        best = [embed(ids[i]) for i in sorted(i for _, i in sorted(scores)[-5:])]
        want = torch.stack([torch.zeros(len(c.select))] * (5 - len(best)) + best)
        for got, token, made in zip(memory[0, k], want, h[len(ids):]):
            torch.testing.assert_close(got, c.generator_std * (unit(token) + 0.1 * unit(made)))


def test_auxiliary_loss_is_that_of_a_loop(tiny):
    """Tokens that differ by case or a space are the same; a token that occurs twice counts half each time."""
    model = build(tiny("llama"), SELECT).eval()
    torch.nn.init.normal_(model.compressor.select)
    examples = [dict(query="who", documents=["the red fox and the dog", "a red one"], answer="The dog, red"),
                dict(query="who", documents=["one two"], answer="9")]
    batch, spell = model.collate(examples), lambda i: model.tokenizer.decode([i]).strip().lower()
    model.compressor.same[0] = model.compressor.same[model.tokenizer.convert_tokens_to_ids("o")]  # padding's id
    loss, parts = model(batch)
    want = 0.0
    for b in range(2):
        scores, words = [], []
        for k in range(2):
            there = batch["compressor"]["doc_mask"][b, k]
            scores += model.compressor.scores[b, k][there].tolist()
            words += map(spell, batch["compressor"]["doc_ids"][b, k][there].tolist())
        logs = torch.tensor(scores).log_softmax(0)
        answer = [spell(i) for i in batch["labels"][b].tolist() if i >= 0]
        found = [sum(logs[i] for i, w in enumerate(words) if w == a) / words.count(a) for a in answer if a in words]
        want -= sum(found) / max(1, len(found))
    assert want > 0
    torch.testing.assert_close(loss - parts["generation"], want / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts["auxiliary"], want / 2)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.compressor.parameters() if p.requires_grad)


def test_the_log_has_the_auxiliary_loss_and_two_processes_share_it_out(job, tmp_path):
    args = [*job[0], f"--compressor_type={SELECT}", "--max_iters=4", "--eval_interval=4", "--lora_dropout=0.0"]
    run("train.py", *args, f"--out_dir={tmp_path}/one")
    torchrun(2, "train.py", *args, f"--out_dir={tmp_path}/two")
    one, two = curve(f"{tmp_path}/one"), curve(f"{tmp_path}/two")
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
        if "loss" in a:
            assert a["auxiliary"] > 0.1
            assert a["loss"] == pytest.approx(a["generation"] + a["auxiliary"] + 0.05 * a["reranking"], rel=1e-5)
    model = ScaleDown.from_pretrained(f"{tmp_path}/one/last")
    parts = [model(model.collate([EXAMPLES[i % 3]], 3))[1]["auxiliary"].item() for i in range(5)]
    assert one[-1]["val_auxiliary"] == pytest.approx(sum(parts) / 5, rel=1e-4)


@pytest.mark.parametrize("compressor", [SKIP, SELECT])
def test_the_largest_shape_means_the_same(tiny, compressor):
    model = build(tiny("llama"), compressor).eval()
    if compressor == SELECT:
        torch.nn.init.normal_(model.compressor.select)
    loss = [model(model.collate(EXAMPLES, 3, fixed))[0].item() for fixed in (False, True)]
    assert loss[0] == pytest.approx(loss[1], rel=1e-5)


def test_what_cannot_be_packed_is_refused(tiny):
    for compressor in SKIP, SELECT:
        with pytest.raises(ValueError, match=f"cannot be read packed, which {compressor[5:]} needs"):
            build(tiny("gemma3"), compressor, doc_tokens=300)  # longer than its window


def test_answers_in_bfloat16(tiny):
    """As evaluate.py and sample.py read a checkpoint on a GPU: the compressor in bfloat16, too."""
    x = [EXAMPLES[0]["query"]], [EXAMPLES[0]["documents"]]
    model = build(tiny("llama")).eval()
    want = model.compress(*x)[0]
    got = model.bfloat16().compress(*x)[0]
    torch.testing.assert_close(got.float(), want, rtol=0, atol=0.1 * want.abs().max().item())
    assert build(tiny("llama"), SELECT).bfloat16().compress(*x)[0].isfinite().all()  # rounding may select others
