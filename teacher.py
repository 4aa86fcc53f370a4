"""
The teacher's answers: greedy, of any causal language model, from the documents' full text.
"""

import re

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from compressor import left_pad
from configurator import fail
from parts import by_length
from pretrained import load_model, load_tokenizer, max_positions
from prompt import Prompt


@torch.no_grad()
def generate_answers(model, tokenizer, prompts, max_new_tokens):
    """The model's greedy answers to a batch of prompts."""
    ids, mask = left_pad(tokenizer(prompts, add_special_tokens=False).input_ids)
    out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                         max_new_tokens=max_new_tokens, do_sample=False)
    return [without_thoughts(a) for a in tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)]


def without_thoughts(reply):
    """The answer in the reply of a model that thinks aloud first; empty where it has not come to one."""
    tag = r"(?i:<{0}(?:think|thinking|thoughts?|reasoning)>)|\[{0}THINK\]"
    reply = re.split(tag.format("/"), reply)[-1]  # templates can open a thought in the prompt
    return re.split(tag.format(""), reply)[0].strip()


class Teacher:
    """A teacher that runs here. Raises ModelError."""

    def __init__(self, name, device, dtype):
        self.name = name
        self.model = load_model(AutoModelForCausalLM, name, dtype=dtype).eval().to(device)
        self.tokenizer = load_tokenizer(name)
        self.prompt = Prompt(self.tokenizer)
        eos = self.model.generation_config.eos_token_id
        stop = {self.prompt.end_id, *(eos if isinstance(eos, list) else [] if eos is None else [eos])}
        # greedy and nothing else: a model's own generation config may ask for a repetition penalty
        self.model.generation_config = GenerationConfig(eos_token_id=sorted(stop), pad_token_id=self.prompt.end_id)

    def answer(self, queries, done, answer_tokens, batch_tokens):
        """Yields {query id: answer} of every batch of queries, but for batches that are done already.

        queries: [(id, query, [document, ..]), ..]. done: the ids of those that need no answer. Exits where a prompt and
        its answer have more tokens than the teacher has positions.
        """
        prompts = [self.prompt.text(query, documents) for _, query, documents in queries]
        lengths = [len(ids) + answer_tokens for ids in self.prompt.ids(prompts)]
        limit = max_positions(self.model)
        if max(lengths) > limit:
            id = queries[lengths.index(max(lengths))][0]
            fail(f"teacher: prompt and answer of the query '{id}' take {max(lengths)} tokens, {self.name} has {limit} "
                 "positions: lower num_documents, doc_tokens or answer_tokens")
        for batch in by_length(lengths, batch_tokens):  # always the same, so that rounding is the same after a restart
            if not all(queries[i][0] in done for i in batch):
                answers = generate_answers(self.model, self.tokenizer, [prompts[i] for i in batch], answer_tokens)
                yield {queries[i][0]: answer for i, answer in zip(batch, answers)}
