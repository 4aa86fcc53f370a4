"""A compressor of one's own, docs/mean_pooling.py: trained, saved, loaded and asked, in one process and in two."""

import json
import os
import re
import sys

import pytest
import torch
from conftest import EXAMPLES, ROOT, run, torchrun
from test_scripts import losses

from data import document_text
from model import ScaleDown, ScaleDownConfig


@pytest.fixture
def own(job, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.path.join(ROOT, "docs"))  # of torchrun's processes
    monkeypatch.syspath_prepend(os.path.join(ROOT, "docs"))
    return [*job[0], "--compressor_type=mean_pooling.MeanPooling", "--enable_reranking=False", "--max_iters=20",
            "--eval_interval=10", "--lora_dropout=0.0"]


def test_a_compressor_of_ones_own_is_trained_saved_and_asked(own, job, tmp_path):
    _, _, folder = job
    run("train.py", *own, f"--out_dir={tmp_path}/one")
    torchrun(2, "train.py", *own, f"--out_dir={tmp_path}/two")
    a, b = losses(f"{tmp_path}/one"), losses(f"{tmp_path}/two")
    assert a == pytest.approx(b, abs=1e-5) and max(a) == 20
    model = ScaleDown.from_pretrained(f"{tmp_path}/one/best")
    fresh = ScaleDown(model.config)
    x = EXAMPLES[0]
    memory, scores = model.compress([x["query"]], [x["documents"]])
    # by hand: the mean of each slice of a document's embeddings, padded on the left
    c = model.compressor
    for i, document in enumerate(x["documents"]):
        ids = c.tokenizer(document_text(document), add_special_tokens=False).input_ids
        first = -(-len(ids) // 2)
        halves = [c.embed.weight[part].mean(0) for part in (ids[:first], ids[first:])]
        torch.testing.assert_close(memory[0, i], c.linear(torch.stack(halves)))
    assert scores is None and (c.linear.weight - fresh.compressor.linear.weight).abs().max() > 1e-4
    assert len(model.generate([x["query"]], [x["documents"]])) == 1
    out = run("sample.py", f"--out_dir={tmp_path}/one/best", f"--data={folder / 'val.jsonl'}", "--device=cpu", "--dtype=bfloat16")
    assert json.loads(out.splitlines()[-1]).keys() == {"compressed", "full", "none"}


def test_a_run_with_a_parameter_that_is_never_used_goes_on(own, tmp_path, monkeypatch):
    (tmp_path / "unused.py").write_text("from mean_pooling import MeanPooling, nn\n\n\nclass Unused(MeanPooling):\n"
                                        "    def __init__(self, *args):\n        super().__init__(*args)\n"
                                        "        self.unused = nn.Linear(3, 3)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}/docs")
    monkeypatch.syspath_prepend(tmp_path)
    args = [*own, "--compressor_type=unused.Unused"]
    run("train.py", *args, "--max_iters=10", f"--out_dir={tmp_path}/parts")
    said = run("train.py", *args, "--init_from=resume", f"--out_dir={tmp_path}/parts")
    assert "resuming" in said and max(losses(f"{tmp_path}/parts")) == 20


def test_lora_takes_a_backbone(own, tmp_path):
    why = "compressor_lora_r takes a compressor with a backbone, unlike mean_pooling.MeanPooling"
    assert why in run("train.py", *own, "--compressor_lora_r=4", f"--out_dir={tmp_path}/out", ok=False)


@pytest.mark.parametrize("returned, reranking, message", [
    ("memory, None", True, "NoneType as scores of one query and one document, not (1, 1)"),
    ("memory, memory[..., 0]", True, "(1, 1, 2) as scores of one query and one document, not (1, 1)"),
    ("memory[0], None", False, "(1, 2, 32) as memory of one query and one document, not (1, 1, 2, 32)")])
def test_what_a_compressor_must_return_is_said(tiny, tmp_path, monkeypatch, returned, reranking, message):
    monkeypatch.syspath_prepend(f"{ROOT}/docs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wrong", raising=False)
    (tmp_path / "wrong.py").write_text("from mean_pooling import MeanPooling\n\n\nclass Wrong(MeanPooling):\n"
                                       "    def forward(self, **batch):\n        memory, _ = super().forward(**batch)\n"
                                       f"        return {returned}\n")
    with pytest.raises(ValueError, match=re.escape(f"compressor_type=wrong.Wrong returns {message}")):
        ScaleDown(ScaleDownConfig(generator=tiny("llama"), compressor_type="wrong.Wrong", num_memory_tokens=2,
                                  enable_reranking=reranking))


def test_a_class_that_is_not_there_is_named(tiny):
    for name, why in (("mean_pooling_.X", "No module named 'mean_pooling_'"), ("json.X", "has no attribute 'X'")):
        with pytest.raises(ValueError, match=f"compressor_type is .*, not '{name}': .*{why}"):
            ScaleDown(ScaleDownConfig(generator=tiny("llama"), compressor_type=name))
