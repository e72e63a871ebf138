"""
The RAG baseline: instead of a long text a model sees the few sentences nearest to the question.

Nearest means BM25, as in search engines: shared words count, rare ones more (Robertson and
Zaragoza 2009, The Probabilistic Relevance Framework: BM25 and Beyond).
"""
import math
import re
from collections import Counter

import numpy as np


def words(text):
    """{word: how often it occurs}, in lower case, without punctuation."""
    return Counter(re.findall(r"\w+", text.lower()))


def bm25(sentences, question, k1=1.5, b=0.75):
    """
    Okapi BM25 of each sentence for a question -> array (len(sentences),), higher is nearer.
    k1: how soon the same word counts no more; b: how much a long sentence has to have more of it.
    """
    counted = [words(sentence) for sentence in sentences]
    sizes = np.array([counts.total() for counts in counted], dtype=float)
    relative_sizes = sizes / sizes.mean() if sizes.any() else sizes
    scores = np.zeros(len(sentences))
    for word in words(question):
        counts = np.array([sentence[word] for sentence in counted], dtype=float)
        found_in = np.count_nonzero(counts)
        rarity = math.log(1 + (len(sentences) - found_in + 0.5) / (found_in + 0.5))
        scores += rarity * counts * (k1 + 1) / (counts + k1 * (1 - b + b * relative_sizes))
    return scores


def nearest_sentences(sentences, question, k):
    """
    The k sentences nearest to a question, in their original order; of equals the last ones, since
    in a story the newest fact counts.
    """
    nearest = np.argsort(bm25(sentences, question), kind="stable")[::-1][:k]
    return [sentences[i] for i in sorted(nearest)]
