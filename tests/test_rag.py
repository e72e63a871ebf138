"""baselines/rag.py: which sentences are near to a question."""
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
from conftest import REPO

from baselines.rag import bm25, nearest_sentences

SENTENCES = ["Mary went to the office.", "The cat sat.", "The milk is in the office of Mary."]


def test_bm25_is_the_formula_by_hand():
    def term(found_in, count, size):
        rarity = math.log(1 + (3 - found_in + 0.5) / (found_in + 0.5))
        return rarity * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * size / (16 / 3)))

    expected = [term(2, 1, 5), 0, term(2, 1, 8) + term(1, 1, 8)]
    np.testing.assert_allclose(bm25(SENTENCES, "Mary milk?"), expected)


def test_the_nearest_sentences_keep_their_order():
    assert nearest_sentences(SENTENCES, "Where is the milk of Mary?", 2) == [SENTENCES[0],
                                                                            SENTENCES[2]]
    assert nearest_sentences(SENTENCES, "milk", 1) == [SENTENCES[2]]


def test_of_equally_near_sentences_the_last_ones_are_kept():
    sentences = [f"Number {i} is near." if i % 2 else f"Number {i}." for i in range(100)]
    assert nearest_sentences(sentences, "near", 3) == [sentences[i] for i in (95, 97, 99)]


def test_more_than_there_are_is_all_of_them():
    assert nearest_sentences(SENTENCES, "milk", 99) == SENTENCES


@pytest.mark.parametrize("sentences", [[], ["..."], ["...", "!"]])
def test_a_context_without_words_has_no_nearest_sentence_and_no_warning(sentences):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bm25(sentences, "Where is Mary?").tolist() == [0.0] * len(sentences)
        assert nearest_sentences(sentences, "Where is Mary?", 5) == sentences


def test_retrieval_needs_nothing_of_the_project_and_no_torch():
    code = ("import sys, baselines.rag; "
            "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'lm2', 'data', 'lib')])")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
