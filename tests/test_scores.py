"""lib/scores.py: means over tasks and seeds, and how sure they are, against other computations."""
import math

import numpy as np
import pytest
from made_up import COMMIT, answered, figure

from lib import scores


def random_answers(rng, n, share, seeds, alike=0.7):
    """Answers of several seeds to n questions, some of which are hard for all: texts of 0 and 1."""
    easy = rng.random(n) < share
    own = rng.random((seeds, n)) < share
    answers = np.where(rng.random((seeds, n)) < alike, easy, own)
    return ["".join("1" if right else "0" for right in seed) for seed in answers]


def half_of_bootstrap(statistic, n, rng, draws=2000):
    """Half of the 95% interval of a statistic of drawn questions, a list of index arrays."""
    found = [statistic([rng.integers(size, size=size) for size in n]) for _ in range(draws)]
    return 1.96 * np.std(found)


def mean_of(tasks):
    """The statistic of half_of_bootstrap that is the mean over tasks, each an array of outcomes."""
    return lambda drawn: 100 * np.mean([task[i].mean() for task, i in zip(tasks, drawn)])


def array(text):
    return np.array([int(answer) for answer in text])


# --- Accuracy

def test_tasks_weigh_alike_and_so_do_seeds():
    rows = [answered("LM2", 1, "1" * 10), answered("LM2", 2, "1100"),
            answered("LM2", 1, "0" * 90 + "1" * 10, task="qa2"),
            answered("LM2", 2, "1" * 3 + "0" * 7, task="qa2")]
    found = scores.accuracy(rows)
    assert found.mean == pytest.approx(100 * ((1 + 0.5) / 2 + (0.1 + 0.3) / 2) / 2)
    assert found.seeds == pytest.approx([55, 40])


def test_a_seed_that_was_not_asked_all_tasks_is_neither_the_worst_nor_the_best():
    rows = [answered("LM2", seed, "10", task=task) for seed in (1, 2) for task in ("qa1", "qa2")]
    found = scores.accuracy([*rows, answered("LM2", 3, "11")])
    assert found.seeds == [50, 50]
    assert found.mean == pytest.approx(100 * ((0.5 + 0.5 + 1) / 3 + 0.5) / 2)


@pytest.mark.parametrize("n, right", [(30, 30), (100, 93), (10, 0), (7, 3)])
def test_one_task_and_one_seed_have_the_interval_of_agresti_and_coull(n, right):
    found = scores.accuracy([answered("LM2", 1, "1" * right + "0" * (n - right))])
    p = (right + 2) / (n + 4)
    assert found.half == pytest.approx(100 * 1.96 * math.sqrt(p * (1 - p) / (n + 4)))
    assert found.half > 1


@pytest.mark.parametrize("n, least", [(10, 0.79), (30, 0.9), (100, 0.92)])
def test_how_often_the_interval_holds_whatever_the_true_share(n, least):
    halves = [scores.accuracy([answered("a", 1, "1" * right + "0" * (n - right))]).half
              for right in range(n + 1)]
    for share in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98):
        holds = sum(math.comb(n, right) * share ** right * (1 - share) ** (n - right)
                    for right, half in enumerate(halves) if abs(right / n - share) <= half / 100)
        assert holds > least


def test_the_interval_is_that_of_drawing_other_questions():
    rng = np.random.default_rng(1)
    sizes = {"qa1": (500, 0.9), "qa2": (300, 0.4)}
    texts = {task: random_answers(rng, n, share, 3) for task, (n, share) in sizes.items()}
    rows = [answered("LM2", seed, text, task=task) for task, found in texts.items()
            for seed, text in enumerate(found)]
    means = [np.mean([array(text) for text in found], axis=0) for found in texts.values()]
    half = half_of_bootstrap(mean_of(means), [500, 300], rng)
    assert scores.accuracy(rows).half == pytest.approx(half, rel=0.06)


def test_seeds_that_fail_the_same_questions_tell_no_more_than_one():
    text = "1" * 70 + "0" * 30
    one = scores.accuracy([answered("LM2", 1, text)])
    three = scores.accuracy([answered("LM2", seed, text) for seed in (1, 2, 3)])
    assert three.half == pytest.approx(one.half)


def test_a_seed_with_few_questions_widens_the_interval():
    """It has the same weight as the others, so that its few questions decide as much."""
    rng = np.random.default_rng(2)
    long, short = random_answers(rng, 1000, 0.5, 1) + random_answers(rng, 20, 0.5, 1)
    found = scores.accuracy([answered("LM2", 1, long), answered("LM2", 2, short)])
    long, short = array(long), array(short)

    def drawn_mean(drawn):
        """Questions are drawn once: the first 20 of both seeds are the same ones."""
        index = drawn[0]
        few = short[index[index < 20]]
        return 100 * (long[index].mean() + (few.mean() if len(few) else 0.5)) / 2

    half = half_of_bootstrap(drawn_mean, [1000], rng)
    assert found.mean == pytest.approx(50 * (long.mean() + short.mean()))
    assert found.half == pytest.approx(half, rel=0.25)
    assert found.half > 3 * scores.accuracy([answered("LM2", 1, "10" * 500)]).half


@pytest.mark.parametrize("change", [{"n": "5"}, {"right": "1"}, {"answers": "1012"}])
def test_answers_that_are_not_what_the_row_says_are_refused(change):
    with pytest.raises(ValueError, match="^LM2, seed 3, qa1, 4k: [^\n]+$"):
        scores.accuracy([answered("LM2", 3, "1011") | change])


# --- Differences

@pytest.mark.parametrize("both, only_a, only_b, neither", [(20, 5, 1, 4), (30, 0, 0, 0),
                                                           (0, 10, 0, 0), (3, 2, 9, 16)])
def test_one_task_and_one_seed_have_the_paired_interval_of_agresti_and_min(
        both, only_a, only_b, neither):
    a = "1" * (both + only_a) + "0" * (only_b + neither)
    b = "1" * both + "0" * only_a + "1" * only_b + "0" * neither
    found = scores.difference([answered("a", 1, a)], [answered("b", 1, b)])
    n, more, less = len(a) + 2, only_a + 0.5, only_b + 0.5
    variance = (more + less - (more - less) ** 2 / n) / n ** 2
    assert found.value == pytest.approx(100 * (only_a - only_b) / len(a))
    assert found.half == pytest.approx(100 * 1.96 * math.sqrt(variance))


def test_the_paired_interval_is_that_of_drawing_other_questions():
    rng = np.random.default_rng(3)
    sizes = {"qa1": 500, "qa2": 300}
    texts = {task: random_answers(rng, n, 0.6, 6, alike=0.8) for task, n in sizes.items()}
    ours, theirs = ([answered(name, seed, text, task=task) for task, found in texts.items()
                     for seed, text in enumerate(found[part])]
                    for name, part in (("a", slice(0, 3)), ("b", slice(3, 6))))
    means = [np.mean([array(text) for text in found[:3]], axis=0)
             - np.mean([array(text) for text in found[3:]], axis=0) for found in texts.values()]
    half = half_of_bootstrap(mean_of(means), [500, 300], rng)
    found = scores.difference(ours, theirs)
    assert found.value == pytest.approx(100 * np.mean([m.mean() for m in means]))
    assert found.half == pytest.approx(half, rel=0.06)
    apart = math.hypot(scores.accuracy(ours).half, scores.accuracy(theirs).half)
    assert found.half < 0.8 * apart  # that is what pairs are for


def test_only_questions_that_both_were_asked_are_compared():
    many = [answered("a", seed, "1010" + "0" * 96) for seed in (1, 2)]
    few = [answered("b", 1, "1100"), answered("b", 2, "110011")]
    first = [answered("a", seed, "1010") for seed in (1, 2)]
    assert scores.difference(many, few) == scores.difference(first, [answered("b", 1, "1100")])
    assert scores.difference(many, few).value == 0


def test_seeds_of_both_are_compared_and_where_there_are_none_each_row_has_its_own():
    ours = [answered("a", 1, "1111"), answered("a", 2, "0000")]
    assert scores.difference(ours, [answered("b", 2, "1100")]).value == -50
    assert scores.difference(ours, [answered("b", 3, "1100")]).value == 0


def test_tasks_of_both_are_compared_alone():
    ours = [answered("a", 1, "11"), answered("a", 1, "11", task="qa2")]
    theirs = [answered("b", 1, "10", task="qa2"), answered("b", 1, "00", task="qa3")]
    assert scores.difference(ours, theirs).value == 50
    assert scores.difference(ours, theirs[1:]) is None and scores.difference(ours, []) is None


# --- Other figures

def test_the_factors_of_student_leave_5_percent_outside():
    for degrees, factor in enumerate(scores.STUDENT, 1):
        t = np.linspace(-factor, factor, 200_001)
        density = (math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi)
                   / math.gamma(degrees / 2) * (1 + t * t / degrees) ** (-(degrees + 1) / 2))
        assert np.trapezoid(density, t) == pytest.approx(0.95, abs=1e-4)


def test_figures_are_compared_seed_by_seed_with_an_interval_of_student():
    ours = [figure("a", seed, value) for seed, value in ((1, "1.5"), (2, "1.7"), (3, "1.9"))]
    theirs = [figure("b", seed, value) for seed, value in ((3, "1.6"), (1, "1.4"), (4, "9"))]
    found = scores.figure_difference(ours, theirs)
    assert found.value == pytest.approx((0.1 + 0.3) / 2)
    assert found.half == pytest.approx(12.706 * math.sqrt(0.02) / math.sqrt(2))  # textbook
    assert scores.figure_difference(ours, theirs[:1]) == (pytest.approx(0.3), None)
    assert scores.figure_difference(ours, theirs[2:]) == (pytest.approx(1.7 - 9), None)


def test_a_figure_that_was_not_reached_is_not_compared():
    assert scores.figures([figure("a", 1, "2.5"), figure("a", 2, "")]) == {"1": 2.5, "2": None}
    assert scores.figure_difference([figure("a", 1, "2.5")], [figure("b", 1, "")]) is None
    assert scores.figure_difference([figure("a", 1, "2.5")], []) is None


# --- Runs of other code

def names(rows, current=None):
    return [row["row"] for row in scores.by_run(rows, current)]


def test_what_other_code_gave_has_a_name_of_its_own():
    rows = [answered("LM2", 1, "11", run="old"), answered("LM2", 2, "11", run="new"),
            answered("RMT", 1, "11", run="old")]
    assert names(rows, {"LM2": "new"}) == ["LM2 (as of 0123456)", "LM2", "RMT"]
    named = scores.by_run(rows)  # the place of a line does not tell which run is the newer one
    assert [row["row"] for row in named] == ["LM2 (as of 0123456, run old)",
                                             "LM2 (as of 0123456, run new)", "RMT"]
    assert scores.by_run(named) == named, "no name changes twice"
    assert names(rows, {"LM2": "old", "RMT": "new"}) == ["LM2", "LM2 (as of 0123456)",
                                                         "RMT (as of 0123456)"]


def test_old_runs_of_the_same_commit_do_not_share_a_name():
    rows = [answered("LM2", 1, "11", run=run, commit=f"{COMMIT}-dirty") for run in "abc"]
    assert names(rows, {"LM2": "c"}) == [
        "LM2 (as of 0123456-dirty, run a)", "LM2 (as of 0123456-dirty, run b)", "LM2"]


def test_lengths_come_by_size_and_measures_apart_from_answers():
    rows = [answered("a", 1, "1", length=length) for length in ("4k", "1M", "0k", "512")]
    rows += [figure("a", 1, "0.5", measure="accuracy"), figure("a", 1, "1.5")]
    assert scores.lengths_of(rows) == ["0k", "512", "4k", "1M"]
    assert scores.measures_of(rows) == ["accuracy", "val_loss"]
