"""skip.py: the means by a loop over slices, what memory begins as, and batches of other shapes."""

import pytest
import torch
from conftest import EXAMPLES

from model import ScaleDown, ScaleDownConfig
from pretrained import embedding_std
from skip import slice_means


def build(folder, **settings):
    torch.manual_seed(0)
    return ScaleDown(ScaleDownConfig(generator=folder, compressor_type="skip.SkipNLayersCompressor", num_layers=2, **{
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


def test_the_largest_shape_means_the_same(tiny):
    model = build(tiny("llama")).eval()
    loss = [model(model.collate(EXAMPLES, 3, fixed))[0].item() for fixed in (False, True)]
    assert loss[0] == pytest.approx(loss[1], rel=1e-5)


def test_what_cannot_be_packed_is_refused(tiny):
    with pytest.raises(ValueError, match="cannot be read packed"):
        build(tiny("gemma3"), doc_tokens=300)  # longer than its window
