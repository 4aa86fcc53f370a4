"""
Queries and documents as the token ids that a compressor reads before its memory tokens. compressor_layout decides how:

    layout     compressor               reads                                          at most
    scaledown  an encoder               [CLS] query [SEP] document [SEP]               query_tokens and doc_tokens
               a decoder                BOS query \\n document                          query_tokens and doc_tokens
    oscar      a model of its own       BOS query BOS document                         doc_tokens + 3 in all
               the first num_layers     BOS \\nQuery:\\n{query}Document:\\n{document}    doc_tokens + 8 in all

oscar is what the authors' released models (naver/oscar-*) have learned to read. There query and document share one
budget, and a long query leaves its documents little.
"""

from os.path import commonprefix

import torch

from pretrained import plain_text


def left_pad(rows, width=1):
    """Lists of token ids -> ids and mask (True = real), both (len(rows), longest), padded on the left with id 0
    (any id would do: padding is masked out). width: the least length."""
    width = max(width, max(len(row) for row in rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width) >= width - lengths[:, None]


class Layout:
    """compressor_layout=scaledown. longest_query, longest_document: the most ids that rows() returns of each; longest:
    of a query and a document together."""

    def __init__(self, tokenizer, config):
        self.tokenizer, self.config, self.plain = tokenizer, config, plain_text(tokenizer)
        t = tokenizer
        start = t.cls_token_id if t.cls_token_id is not None else t.bos_token_id
        self.start = [] if start is None else [start]
        self.end = [] if t.sep_token_id is None else [t.sep_token_id]
        # some tokenisers (SentencePiece) put a space at the start of every text: not of a newline within one
        self.between = self.end or t("x\n", add_special_tokens=False).input_ids[len(self.tokens(["x"], 9)[0]):]
        query = len(self.between) + config.query_tokens if config.query_dependent else 0
        self.longest_query = max(1, len(self.start) + query)
        self.longest_document = config.doc_tokens + len(self.end)
        self.longest = self.longest_query + self.longest_document

    def tokens(self, texts, max_tokens):
        """The first max_tokens token ids of each text, no special tokens."""
        return self.tokenizer([self.plain(text) for text in texts], add_special_tokens=False, truncation=True,
                              max_length=max_tokens).input_ids

    def rows(self, queries, documents):
        """B queries and B lists of k documents -> token ids of the B queries, each with all that comes before its
        documents, and of the B * k documents. Without query_dependent the query is left out (PISCO, arXiv
        2501.16075)."""
        docs = self.tokens([d for texts in documents for d in texts], self.config.doc_tokens)
        return self.query_rows(queries, self.config.query_tokens), [d + self.end for d in docs]

    def query_rows(self, queries, max_tokens):
        if not self.config.query_dependent:
            return [self.start] * len(queries)
        return [self.start + q + self.between for q in self.tokens(queries, max_tokens)]


class PairLayout(Layout):
    """compressor_layout=oscar of a model of its own: the tokeniser's encoding of a pair of texts."""

    def __init__(self, tokenizer, config):
        super().__init__(tokenizer, config)
        pair = tokenizer("x", "y")
        kinds = "".join("s" if i is None else "xy"[i] for i in pair.sequence_ids())  # special, first, second: sxxsyys
        first, second, rest = kinds.index("x"), kinds.index("y"), kinds.rindex("y") + 1
        self.start, self.end = pair.input_ids[:first], pair.input_ids[rest:]
        self.between = pair.input_ids[kinds.rindex("x") + 1:second]
        self.longest = self.longest_query = self.longest_document = config.doc_tokens + 3

    def rows(self, queries, documents):
        """See Layout. The document is what is cut."""
        queries = [row[:self.longest] for row in self.query_rows(queries, self.longest)]
        room = [max(0, self.longest - len(row) - len(self.end)) for row in queries]
        docs = [d[:n] + self.end for n, texts in zip(room, documents) for d in self.tokens(texts, self.longest)]
        return queries, docs


class TextLayout(Layout):
    """compressor_layout=oscar of the generator's first layers: one text."""

    def __init__(self, tokenizer, config):
        super().__init__(tokenizer, config)
        self.longest = self.longest_query = self.longest_document = config.doc_tokens + 8

    def rows(self, queries, documents):
        """See Layout. The query's part is as much as all its documents' rows have in common."""
        found = [], []
        for query, texts in zip(queries, documents):
            head = f"\nQuery:\n{self.plain(query)}Document:\n" if self.config.query_dependent else ""
            texts = self.tokenizer([head + self.plain(d) for d in texts], truncation=True, max_length=self.longest,
                                   return_offsets_mapping=True)
            n = sum(end <= len(head) for _, end in texts.offset_mapping[0])
            n = len(commonprefix([row[:n] for row in texts.input_ids]))
            found[0].append(texts.input_ids[0][:n])
            found[1].extend(row[n:] for row in texts.input_ids)
        return found
