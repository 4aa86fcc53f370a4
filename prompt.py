"""
The generator's chat prompt, rendered once by its chat template and cut where documents, query and answer go:

    before | documents | between | query | after | answer_start | answer | end

With SmolLM2's template (ChatML), for example: before is "<|im_start|>system\\nExtract the facts ..<|im_end|>\\n
<|im_start|>user\\nBackground:\\n", between is "\\n\\nQuestion: ", after is "<|im_end|>\\n<|im_start|>assistant\\n",
answer_start is empty, end is "<|im_end|>\\n".

Notable: documents, query and answer are text from outside, in which nothing becomes a control token.
"""

from functools import partial

from configurator import first_line
from pretrained import plain_text

SYSTEM = "Extract the facts that matter from the background and answer as briefly as possible."
SYSTEM_NO_DOCUMENTS = "Answer the question as briefly as possible."
# what the authors' released models were trained with, which write "Question:" without a space after it, too
SYSTEM_OSCAR = ("You are a helpful assistant. Your task is to extract relevant information from provided documents and "
                "to answer to questions as briefly as possible.")


def chat_messages(query, documents=None, system_role=True, style="scaledown"):
    """The chat of every prompt: documents before query, each once. documents: their texts as one string, None for a
    prompt without any. style: scaledown, or oscar, the authors' own."""
    question = f"Question: {query}" if style == "scaledown" else f"Question:{query}"
    if documents is None:
        return with_system(SYSTEM_NO_DOCUMENTS, question, system_role)
    system, gap = (SYSTEM, "\n\n") if style == "scaledown" else (SYSTEM_OSCAR, "\n")
    return with_system(system, f"Background:\n{documents}\n\n{question}", system_role, gap)


def with_system(system, user, system_role=True, gap="\n\n"):
    """The messages of one turn; without a system role the system line comes first in the user's turn."""
    if system_role:
        return [dict(role="system", content=system), dict(role="user", content=user)]
    return [dict(role="user", content=f"{system}{gap}{user}")]


def render(tokenizer, messages, answer):
    """Writes a chat by the tokeniser's template. messages: a function of whether there is a system role. Returns
    (text up to the answer, the answer and all that follows it, whether there is a system role). In ChatML:

        render(tokenizer, partial(with_system, "Be brief.", "Who?"), "Mara") -> (
            "<|im_start|>system\\nBe brief.<|im_end|>\\n<|im_start|>user\\nWho?<|im_end|>\\n<|im_start|>assistant\\n",
            "Mara<|im_end|>\\n", True)

    A tokeniser without a template gives plain text. Raises ValueError for a template that fails, or that writes
    something else than it is given."""
    if tokenizer.chat_template is None:
        bos = tokenizer.bos_token if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else None
        return f"{bos or ''}{messages(False)[0]['content']}\n\nAnswer:", f" {answer}", False
    # enable_thinking: models that can reason aloud first (Qwen3) answer at once; others ignore it
    template = partial(tokenizer.apply_chat_template, tokenize=False, enable_thinking=False)
    for system_role in (True, False):
        chat = messages(system_role)
        try:
            text = template(chat, add_generation_prompt=True)
            whole = template(chat + [dict(role="assistant", content=answer)])
        except Exception as e:  # a template refuses a role by raising, each in its own way
            if not system_role:
                raise ValueError(f"the chat template fails: {first_line(e)}") from e
            continue
        if whole.startswith(text) and all(text.count(m["content"]) == 1 for m in chat) and whole.count(answer) == 1:
            return text, whole[len(text):], system_role
    raise ValueError("the chat template does not write the messages once and as they are, and an answer after its own "
                     "generation prompt")


class Prompt:
    """The parts of a prompt (see above), and the texts and token ids that are made with them. kept: the parts() of a
    prompt that was rendered before, to be used as it was. style: see chat_messages(). Raises what render() raises."""

    after_special = False  # the question is tokenised as it stands after a special token (the authors' SEP)

    def __init__(self, tokenizer, with_documents=True, kept=None, style="scaledown"):
        self.tokenizer, self.plain = tokenizer, plain_text(tokenizer)
        if kept:
            vars(self).update(kept)
            return
        D, Q, A = "[[documents]]", "[[query]]", "[[answer]]"
        messages = partial(chat_messages, Q, D if with_documents else None, style=style)
        if style == "oscar":
            self.after_special = True
        text, rest, self.system_role = render(tokenizer, messages, A)
        # what a template puts between its generation prompt and an answer, such as a space
        self.answer_start, end = rest.split(A)
        self.before, rest = text.split(D) if with_documents else ("", text)
        self.between, self.after = rest.split(Q)
        special = [t for t in self.ids(end.strip())[:1] if t in tokenizer.get_added_vocab().values()]
        self.end_id = special[0] if special else tokenizer.eos_token_id
        if self.end_id is None:
            raise ValueError("the generator's tokeniser has neither an end-of-turn token nor an eos_token")

    def parts(self):
        """What was rendered, for a checkpoint: a template may write another prompt tomorrow (today's date)."""
        return {name: value for name, value in vars(self).items() if name not in ("tokenizer", "plain")}

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def ids_after(self, before, texts):
        """Token ids of each text where it follows another: many tokenisers write a word differently at the start of a
        text."""
        skip = len(self.ids(before))
        return [row[skip:] for row in self.ids([before + text for text in texts])]

    def cut(self, texts, max_tokens):
        """Each text cut after its first max_tokens tokens, or before the character that this would split."""
        texts = [self.plain(text) for text in texts]
        offsets = self.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=max_tokens + 1,
                                 return_offsets_mapping=True).offset_mapping
        ends = [min(o[-2][1], o[-1][0]) if len(o) > max_tokens else o[-1][1] if o else 0 for o in offsets]
        return [text[:end] for text, end in zip(texts, ends)]

    def text(self, query, documents=()):
        """The whole prompt as text, up to where the answer begins."""
        documents = "\n\n".join(self.plain(document) for document in documents)
        return self.before + documents + self.between + self.plain(query) + self.after

    def question_ids(self, query, max_tokens):
        """Token ids of `between query after`, as they stand after a document. The query has at most max_tokens of them:
        a text that was cut can have more tokens when it is read again."""
        longest = len(self.ids(self.between + self.after)) + max_tokens
        for n in range(max_tokens, -1, -1):
            ids, = self.ids_after("" if self.after_special else "x", [self.between + query + self.after])
            if len(ids) <= longest or not n:
                return ids
            query, = self.cut([query], n - 1) if n > 1 else [""]

    def answer_ids(self, answers, max_tokens):
        """Token ids of each answer and its end of turn, at most max_tokens."""
        rows = self.ids_after(self.after, [self.answer_start + self.plain(a) for a in answers])
        return [(row + [self.end_id])[:max_tokens] for row in rows]


def render_prompts(tokenizer, eos_token_id, style="scaledown"):
    """The generator's prompts, with documents and without, as a checkpoint keeps them: all that depends on its chat
    template. eos_token_id: a number, several or None, which end an answer as its end of turn does. Raises what render()
    raises."""
    prompts = {name: Prompt(tokenizer, name == "documents", style=style) for name in ("documents", "no_documents")}
    stop = eos_token_id if isinstance(eos_token_id, list) else [] if eos_token_id is None else [eos_token_id]
    whole = prompts["documents"]
    return {name: prompt.parts() for name, prompt in prompts.items()} | dict(
        before_ids=whole.ids(whole.before), stop_ids=[whole.end_id, *stop])
