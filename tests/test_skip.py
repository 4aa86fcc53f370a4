"""skip.py: means and weighted means by a loop over slices, what memory begins as, and batches of other shapes."""

import pytest
import torch
from conftest import EXAMPLES

from compressor import NLayersCompressor
from model import ScaleDown, ScaleDownConfig
from pretrained import embedding_std
from skip import slice_means

SKIP, POINTER = "skip.SkipNLayersCompressor", "skip.PointerNLayersCompressor"


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


def test_pointers_begin_by_weighing_all_tokens_alike_and_learn(tiny):
    x = [EXAMPLES[0]["query"]], [EXAMPLES[0]["documents"]]
    skip, pointer = (build(tiny("llama"), name).eval() for name in (SKIP, POINTER))
    torch.testing.assert_close(pointer.compress(*x)[0], skip.compress(*x)[0])
    loss, _ = pointer(pointer.collate(EXAMPLES))
    loss.backward()
    c = pointer.compressor
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in c.parameters() if p.requires_grad)


def test_weighted_means_are_those_of_a_loop(tiny):
    """Random pointers, five memory tokens, and a document of fewer tokens, by a softmax over each slice on its own."""
    c = build(tiny("llama"), POINTER, num_memory_tokens=5).eval().requires_grad_(False).compressor
    d = c.point.shape[0]
    c.point.normal_(), c.point_bias.normal_(std=0.1)
    batch = c.tokenize(["where is it"], [["one two three, four of the five and six", "one"]], 3)
    memory, _ = c(**batch)
    h, _ = NLayersCompressor.forward(c, **batch)
    assert batch["doc_mask"].sum(-1)[0, 0] > 5 > batch["doc_mask"].sum(-1)[0, 1]
    unit = lambda t: t / (t.pow(2).mean() + torch.finfo(t.dtype).eps).sqrt()
    for k in range(3):
        ids = batch["doc_ids"][0, k][batch["doc_mask"][0, k]]
        for i in range(5):
            part = [c.backbone.get_input_embeddings().weight[t] for j, t in enumerate(ids) if j * 5 // len(ids) == i]
            made = unit(h[0, k, i])
            pointer = 4 * (c.point.T @ made / d + c.point_bias)
            weights = torch.tensor([unit(t) @ pointer for t in part]).softmax(0)
            mean = sum((w * t for w, t in zip(weights, part)), torch.zeros(d))
            torch.testing.assert_close(memory[0, k, i], c.generator_std * (unit(mean) + 0.1 * made))
            assert len(part) < 2 or weights.max() > 1.01 / len(part)  # not the plain mean


@pytest.mark.parametrize("compressor", [SKIP, POINTER])
def test_the_largest_shape_means_the_same(tiny, compressor):
    model = build(tiny("llama"), compressor).eval()
    if compressor == POINTER:
        torch.nn.init.normal_(model.compressor.point_bias)
    loss = [model(model.collate(EXAMPLES, 3, fixed))[0].item() for fixed in (False, True)]
    assert loss[0] == pytest.approx(loss[1], rel=1e-5)


def test_what_cannot_be_packed_is_refused(tiny):
    for compressor in SKIP, POINTER:
        with pytest.raises(ValueError, match=f"cannot be read packed, which {compressor[5:]} needs"):
            build(tiny("gemma3"), compressor, doc_tokens=300)  # longer than its window


def test_answers_in_bfloat16(tiny):
    """As evaluate.py and sample.py read a checkpoint on a GPU: the compressor in bfloat16, too."""
    model = build(tiny("llama"), POINTER).eval()
    torch.nn.init.normal_(model.compressor.point), torch.nn.init.normal_(model.compressor.point_bias, std=0.1)
    x = [EXAMPLES[0]["query"]], [EXAMPLES[0]["documents"]]
    want = model.compress(*x)[0]
    got = model.bfloat16().compress(*x)[0]
    torch.testing.assert_close(got.float(), want, rtol=0, atol=0.1 * want.abs().max().item())
