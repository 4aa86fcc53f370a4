"""
Scores: exact match, F1 and match of answers, nDCG of rankings, and confidence intervals. Notable: ties are ranked as
trec_eval ranks them.
"""

import math
import re
import string
from collections import Counter

import numpy as np


def normalize(text):
    """SQuAD's: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def score(answer, golds):
    """(exact match, F1, match), each the best over the gold answers; match: the gold answer is contained in the
    answer. All on normalised text, as SQuAD's evaluation script (EM, F1) and BERGEN (match) count them."""
    a = normalize(answer)
    em = f1 = match = 0.0
    for g in map(normalize, golds):
        em = max(em, float(a == g))
        match = max(match, float(g in a if g else a == g))
        common = sum((Counter(a.split()) & Counter(g.split())).values())
        if common:
            f1 = max(f1, 2 * common / (len(a.split()) + len(g.split())))
        elif not g and not a:
            f1 = 1.0
    return em, f1, match


def references(example):
    """What answers are scored against: the gold answers or, where there are none, the teacher's answer."""
    return example.get("answers") or [example["answer"]]


def mean_scores(answers, examples):
    """The mean of score() over examples: {"em", "f1", "match"}."""
    rows = [score(a, references(x)) for a, x in zip(answers, examples)]
    return {name: sum(column) / len(rows) for name, column in zip(("em", "f1", "match"), zip(*rows))}


def bootstrap_means(values, resamples):
    """The means of bootstrap resamples (Efron, 1979)."""
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(0)
    return np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)])


def interval(values, resamples=1000):
    """The 95% confidence interval of a mean: percentiles of the means of bootstrap resamples."""
    return np.percentile(bootstrap_means(values, resamples), [2.5, 97.5]).tolist()


def describe(name, values):
    """A score's mean and 95% interval: as numbers, and in words."""
    mean, (low, high) = sum(values) / len(values), interval(values)
    return mean, (low, high), f"{dict(em='exact match', f1='F1').get(name, name)} {mean:.3f} [{low:.3f}, {high:.3f}]"


def paired_test(a, b, resamples=10_000):
    """Scores of the same questions in two ways -> the mean of a - b, its 95% interval, and p of the two-sided paired
    bootstrap test (Efron and Tibshirani, 1993, section 16.4): how often the mean of resampled differences, shifted to a
    mean of 0, lies as far from 0 as theirs."""
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    mean, means = difference.mean(), bootstrap_means(difference, resamples)
    far = abs(means - mean) >= abs(mean) - 1e-12
    return mean, np.percentile(means, [2.5, 97.5]).tolist(), (far.sum() + 1) / (resamples + 1)


def read_qrels(path):
    """{query id: {document id: relevance}} of BEIR's tab-separated qrels, with a header. Raises OSError, ValueError."""
    qrels = {}
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        for number, line in enumerate(f, 1):
            row = line.rstrip("\n").split("\t")
            if number == 1 and row == ["query-id", "corpus-id", "score"] or not line.strip():
                continue
            try:
                query, document, relevance = row
                qrels.setdefault(query, {})[document] = int(relevance)
            except ValueError:
                raise ValueError(f"{path}, line {number}: not query-id, corpus-id, score between tabs") from None
    return qrels


def judged_id(id, judged):
    """What qrels over the ids `judged` call a passage: prepare.py names the chunks of a document ID#0, ID#1, .."""
    return id if id in judged else id.rpartition("#")[0] or id


def trec_order(ids, scores):
    """Indices of documents, best first, as trec_eval ranks them: by score in float32, equals by id, descending."""
    return sorted(range(len(ids)), key=lambda i: (np.float32(scores[i]), ids[i]), reverse=True)


def ndcg(ranking, relevance, k=10):
    """nDCG@k of one query, as trec_eval's ndcg_cut: ids of documents, best first, and {id: relevance}, of which the
    ideal ranking is made, too."""
    gain = lambda relevances: sum(max(r, 0) / math.log2(i + 2) for i, r in enumerate(relevances[:k]))
    ideal = gain(sorted(relevance.values(), reverse=True))
    return gain([relevance.get(id, 0) for id in ranking]) / ideal if ideal else 0.0
