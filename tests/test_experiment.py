"""lib/experiment.py: what a TOML file of experiments/ describes, and what tells runs apart."""
import math
import shutil
from pathlib import Path

import pytest

from lib import experiment as ex
from lib.experiment import ROOT
from train import TrainConfig

HEAD = """
title = "A title"
preset = "config/babilong_qa1.toml"
seeds = [1, 2]
tasks = "qa1,qa6"
ask = { "1k,0k" = 20, "4k" = 10 }
"""
ROWS = """
[[row]]
name = "LM2"
ask = { "1M" = 5 }

[[row]]
name = "RMT"
flags = "--memory=rmt"
match = "LM2"
longest = "1k"

[[row]]
name = "RAG"
run_of = "RMT"
ask_flags = "--rag=10"
"""


@pytest.fixture
def load(tmp_path):
    def of(text):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return ex.load(path)
    return of


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/*.toml")), ids=lambda p: p.stem)
def test_experiments_of_this_repository_load(path):
    experiment = ex.load(path)
    assert experiment.name == path.stem and len(experiment.row) > 1
    assert len({ex.run_id(experiment, row) for row in experiment.row}) == len(experiment.row)


def test_a_row_is_asked_what_the_experiment_and_it_say_shortest_first(load):
    experiment = load(HEAD + ROWS)
    lm2, rmt, rag = experiment.row
    assert experiment.name == "mine"
    assert list(experiment.cells(lm2).items()) == [("0k", 20), ("1k", 20), ("4k", 10), ("1M", 5)]
    assert experiment.cells(rmt) == {"0k": 20, "1k": 20}
    assert ("accuracy", "qa6", "4k", 10) in experiment.wanted(rag, 1)
    assert experiment.answering_row(rag) is rmt and experiment.seeds_of(rag) == [1, 2]


def test_five_lines_add_a_row(load):
    before, after = load(HEAD + ROWS), load(HEAD + ROWS + """
[[row]]
name = "sigmoid instead of tanh"
change = [["lm2.py", "wide(C).tanh()", "wide(C).sigmoid()"]]
""")
    assert [row.name for row in after.row][:3] == [row.name for row in before.row]
    assert ex.run_id(after, after.row[0]) == ex.run_id(before, before.row[0])


@pytest.mark.parametrize("text, message", [
    ("x", "is not a TOML file"),
    (HEAD, "it has no row"),
    (ROWS, "it has no "),
    (HEAD.replace("config/babilong_qa1", "config/nothing") + ROWS, "nothing.toml is not there"),
    (HEAD.replace("tasks", "task") + ROWS, "task is not known"),
    (HEAD.replace("qa6", "qa16") + ROWS, "task qa16"),
    (HEAD.replace('"4k" = 10', '"4k" = 0') + ROWS, "ask has 0 questions of 4k"),
    (HEAD.replace('"4k" = 10', '"long" = 1') + ROWS, "length 'long' is not known"),
    (HEAD.replace("[1, 2]", "[]") + ROWS, "at least one row and one seed"),
    (HEAD.replace("[1, 2]", "[-1]") + ROWS, "seed -1 is no whole number"),
    (HEAD.replace("[1, 2]", "3") + ROWS, "seeds=3"),
    (HEAD.replace("ask =", "until =") + ROWS.replace("ask =", "until ="), "until is not known"),
    (HEAD.replace('ask = { "1k,0k" = 20, "4k" = 10 }', "") + '[[row]]\nname = "a"', "nothing"),
    (HEAD + ROWS + '[[row]]\nname = "RAG"', "two rows have the name 'RAG'"),
    (HEAD + ROWS + '[[row]]\nflags = ""', "each row needs a name, in one line and without a comma"),
    (HEAD + ROWS + '[[row]]\nname = "a, b"', "without a comma, not 'a, b'"),
    (HEAD + ROWS + '[[row]]\nname = "a"\nflag = "b"', "flag is not known"),
    (HEAD + ROWS + '[[row]]\nname = "a"\nflags = 3', "flags=3"),
    ("row = [1]\n" + HEAD, "begin it with a line [[row]]"),
    (HEAD + ROWS.replace('match = "LM2"', 'match = "RAG"'), "match='RAG', which is no row above"),
    (HEAD + ROWS + '[[row]]\nname = "a"\ncode = "nowhere"', "code='nowhere', where no train.py is"),
    (HEAD + ROWS + '[[row]]\nname = "a"\nchange = ["lm2.py"]', "should be [file, old text, new"),
    (HEAD + ROWS + '[[row]]\nname = "a"\nchange = [["lm2.py", "self", "me"]]', "be there once"),
    (HEAD + ROWS + '[[row]]\nname = "a"\nchange = [["lm2.py", "self", 2]]', "[file, old text, new"),
    (HEAD + ROWS + '[[row]]\nname = "a"\nchange = [["/tmp/x.py", "a", "b"]]', "changes /tmp/x.py"),
    (HEAD + ROWS + '[[row]]\nname = "a"\nchange = [["baselines/rag.py", "a", "b"]]', "rag.py"),
    (HEAD + ROWS + '[[row]]\nname = "a"\nchange = [["lm2.py", "wide(C).tanh()", "("]]', "lm2.py"),
    (HEAD + ROWS + '[[row]]\nname = "a"\nflags = "--mem_slots 8"', "should be --name=value"),
    (HEAD + ROWS + '[[row]]\nname = "a"\nflags = "--corpus=\'x"', "row 'a': No closing"),
    (HEAD + ROWS + '[[row]]\nname = "a"\nrun_of = "RAG"', "which has no run of its own"),
    (HEAD + ROWS + '[[row]]\nname = "a"\nrun_of = "LM2"\nflags = "--n=1"', "leave out flags"),
    (HEAD.replace('"4k" = 10', '"4k" = true') + ROWS, "ask has True questions of 4k"),
    (HEAD.replace('ask = { "1k,0k" = 20, "4k" = 10 }', 'until = { val_loss = "low" }') + ROWS,
     "until has the figure 'low'"),
    ("measure = [3]" + HEAD + ROWS, "measure=[3] should be names"),
    ('measure = [["val_loss"]]' + HEAD + ROWS, "should be names of columns in quotes"),
    (HEAD + ROWS + '[[row]]\nname = "a"\nflags = "--seed=7"', "compare.py itself says --seed"),
    (HEAD + ROWS + '[[row]]\nname = "a"\nask_flags = "--n_samples=2"', "itself says --n_samples"),
    ('curve = "val_loss"' + HEAD + ROWS, "curve='val_loss' is not measured"),
    ('name = "other"\n' + HEAD + ROWS, "name is not known"),
    ('path = "other"\n' + HEAD + ROWS, "path is not known"),
    (HEAD.replace('tasks = "qa1,qa6"', "") + ROWS, "tasks= lists nothing"),
])
def test_a_bad_file_is_refused_in_one_line_that_names_it(load, text, message):
    with pytest.raises((ValueError, OSError)) as error:
        load(text)
    assert message in str(error.value) and "\n" not in str(error.value)
    if isinstance(error.value, ValueError):
        assert "mine.toml" in str(error.value)


# --- What tells runs apart

def ids(load, change=None, text=HEAD + ROWS):
    for old, new in change or ():
        assert old in text
        text = text.replace(old, new)
    experiment = load(text)
    return [ex.run_id(experiment, row) for row in experiment.row]


def test_code_preset_and_flags_tell_runs_apart_and_the_rest_does_not(load):
    lm2, rmt, rag = ids(load)
    assert len({lm2, rmt, rag}) == 3
    assert ids(load, [("A title", "Another"), ("[1, 2]", "[3]"), ("= 20", "= 30")]) == [lm2, rmt,
                                                                                     rag]
    changed = ids(load, [("--memory=rmt", "--memory=none")])
    assert changed[0] == lm2 and changed[1] != rmt and changed[2] != rag
    changed = ids(load, [("--rag=10", "--rag=5")])
    assert changed[:2] == [lm2, rmt] and changed[2] != rag
    # the parameters of LM2 are those of RMT
    changed = ids(load, [('name = "LM2"', 'name = "LM2"\nflags = "--n_layer=2"')])
    assert changed[0] != lm2 and changed[1] != rmt


def test_a_new_model_in_baselines_is_other_code_and_retrieval_counts_where_it_answers(
        load, tmp_path):
    shutil.copytree(ROOT / "baselines", tmp_path / "baselines")
    (tmp_path / "train.py").touch()
    code = f'code = "{tmp_path}"\n'
    text = HEAD + (f'[[row]]\nname = "LM2"\n{code}[[row]]\nname = "RAG"\nrun_of = "LM2"\n'
                   'ask_flags = "--rag=10"')
    def answers():
        experiment = load(text)
        return [ex.answers_folder(experiment, row, tmp_path) for row in experiment.row]

    first, asked = ids(load, text=text), answers()
    with open(tmp_path / "baselines/rag.py", "a") as f:
        f.write("K = 2\n")
    second = ids(load, text=text)
    assert second[0] == first[0] and second[1] != first[1]
    assert answers()[0] == asked[0] and answers()[1] != asked[1], "what it said is not taken over"
    (tmp_path / "baselines/.#rmt.py").symlink_to("an editor's lock")
    assert ids(load, text=text) == second
    (tmp_path / "baselines/delta.py").write_text("K = 2\n")
    assert not {*ids(load, text=text)} & {*first, *second}
    (tmp_path / "baselines/delta.py").write_text("K =\n")
    with pytest.raises(ValueError, match="delta.py is no Python code .* mend it"):
        ids(load, text=text)


def test_the_code_of_the_data_counts_whichever_flag_names_them(load, tmp_path):
    for name in ("data/curriculum.py", "data/corpus.py", "train.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    rows = [f'[[row]]\nname = "{name}"\ncode = "{tmp_path}"\nflags = "--dataset={name}"\n'
            for name in ("babilong", "shakespeare")]
    first = ids(load, text=HEAD + "".join(rows))
    for number, name in enumerate(("curriculum", "corpus")):
        with open(tmp_path / f"data/{name}.py", "a") as f:
            f.write("K = 2\n")
        changed = [a != b for a, b in zip(first, ids(load, text=HEAD + "".join(rows)))]
        assert changed == [True, number == 1]


def test_comments_and_docstrings_do_not_change_what_code_does():
    one = ex.meaning('"""About."""\ndef f(x):\n    """It."""\n    return x + 1  # one more\n')
    other = ex.meaning('"""Of."""\n\n\ndef f( x ):\n    """That."""\n    return (x + 1)\n')
    assert one == other != ex.meaning('"""About."""\ndef f(x):\n    """It."""\n    return x + 2\n')


def test_a_changed_checkout_is_another_row_and_its_own_programs_run(load, tmp_path):
    for name in ("lm2.py", "train.py", "eval_babilong.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("baselines", "data", "lib"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("shakespeare"))
    text = HEAD + ROWS + f'[[row]]\nname = "mine"\ncode = "{tmp_path}"'
    assert ids(load, text=text)[3] == ids(load)[0], "the code does the same"
    lm2 = tmp_path / "lm2.py"
    lm2.write_text(lm2.read_text().replace("wide(C).tanh()", "wide(C).sigmoid()"))
    assert ids(load, text=text)[3] != ids(load)[0]
    experiment = load(text)
    assert ex.code_folder(experiment.row[3], tmp_path / "out") == tmp_path
    assert ex.code_folder(experiment.row[0], tmp_path / "out") == ROOT


SIGMOID = HEAD + """
[[row]]
name = "sigmoid"
change = [["lm2.py", "wide(C).tanh()", "wide(C).sigmoid()"]]
"""


def test_a_change_of_the_code_is_made_in_a_copy(load, tmp_path):
    before, experiment = (ROOT / "lm2.py").read_text(), load(SIGMOID)
    folder = ex.code_folder(experiment.row[0], tmp_path / "out")
    assert (folder / "lm2.py").read_text() == before.replace("wide(C).tanh()", "wide(C).sigmoid()")
    assert (ROOT / "lm2.py").read_text() == before and (folder / "data/babi.py").exists()
    assert (folder / "look.py").exists(), "the run is opened with the code that trained it"
    assert ex.code_folder(experiment.row[0], tmp_path / "out") == folder
    assert [path.name for path in (tmp_path / "out").iterdir()] == [folder.name]


def test_two_that_copy_at_once_leave_one_copy(load, tmp_path, monkeypatch):
    row, real = load(SIGMOID).row[0], ex.tempfile.mkdtemp

    def slower(**where):
        monkeypatch.setattr(ex.tempfile, "mkdtemp", real)
        ex.code_folder(row, tmp_path / "out")  # another thread
        return real(**where)

    monkeypatch.setattr(ex.tempfile, "mkdtemp", slower)
    folder = ex.code_folder(row, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [folder.name]


def test_tokens_are_planned_with_the_defaults_of_train(load, monkeypatch):
    experiment = load(HEAD + ROWS)
    monkeypatch.setattr(ex, "load_preset", lambda path: {})  # it says nothing of them
    usual = TrainConfig()
    assert ex.planned_tokens(experiment, experiment.row[0]) == math.prod((
        usual.max_iters, usual.batch_size, usual.n_segments, usual.block_size,
        usual.gradient_accumulation_steps))
    shape = {"block_size": 3 * usual.block_size}  # of a pretrained model that the run begins with
    assert ex.planned_tokens(experiment, experiment.row[0], shape) == 3 * ex.planned_tokens(
        experiment, experiment.row[0])


def test_rows_that_are_trained_alike_share_their_runs(load, tmp_path):
    experiment = load(HEAD + ROWS)
    folder = ex.folder_of(experiment, experiment.row[0], 1, tmp_path)
    assert folder.name.startswith("babilong_qa1-1-")
    other = load(HEAD + ROWS.replace('"LM2"', '"Base"'))
    assert ex.folder_of(other, other.row[0], 1, tmp_path) == folder
    assert ex.folder_of(other, other.row[0], 2, tmp_path) != folder
    assert ex.folder_of(other, other.row[2], 1, tmp_path) == ex.folder_of(other, other.row[1], 1,
                                                                          tmp_path)


def test_flags_train_and_ask_what_the_rows_say(load, tmp_path):
    experiment = load(HEAD + ROWS + '[[row]]\nname = "more"\ninit_from = "LM2"')
    lm2, rmt, rag, more = experiment.row
    folders = {row.name: ex.folder_of(experiment, row, 2, tmp_path) for row in experiment.row}

    def train_flags(row, size=""):
        needs = ex.needs(experiment, row, 2, tmp_path)
        return ex.train_flags(experiment, row, 2, folders[row.name], needs, size)

    flags = train_flags(rmt)
    assert flags == [f"--config={ROOT}/config/babilong_qa1.toml", "--memory=rmt", "--seed=2",
                     f"--out_dir={folders['RMT']}", "--overwrite",
                     f"--match_params={folders['LM2']}"]
    assert train_flags(rmt, "1000")[-1] == "--match_params=1000"
    flags = train_flags(more)
    assert f"--init_from={folders['LM2']}" in flags and "--seed=2" not in flags, \
        "a run that goes on sees other stories"
    folders["RMT"].mkdir()
    (folders["RMT"] / "ckpt.pt").touch()

    def train_flags(row, size=""):
        needs = ex.needs(experiment, row, 2, tmp_path)
        return ex.train_flags(experiment, row, 2, folders[row.name], needs, size)

    flags = train_flags(rmt)
    assert flags == ["--resume", f"--out_dir={folders['RMT']}"]
    flags = ex.ask_flags(experiment, rag, folders["RMT"], "4k", 10)
    assert flags[:4] == [str(folders["RMT"]), "--tasks=qa1,qa6", "--lengths=4k",
                         "--n_samples=10"] and "--rag=10" in flags
    assert flags[-1] != ex.ask_flags(experiment, rmt, folders["RMT"], "4k", 10)[-1]
    assert Path(flags[-1].removeprefix("--out_dir=")).parent == folders["RMT"]


def test_steps_of_a_run_are_read_from_its_log(tmp_path):
    assert ex.steps(tmp_path) == (0, 1) and not ex.is_trained(tmp_path)
    (tmp_path / "config.json").write_text('{"train": {"max_iters": 20}}')
    (tmp_path / "log.csv").write_text("step,loss\n0,1.0\n1,0.5\n")
    (tmp_path / "best.pt").touch()
    assert ex.steps(tmp_path) == (1, 20) and not ex.is_trained(tmp_path)
    (tmp_path / "log.csv").write_text("step,loss\n0,1.0\n20,\n")
    assert ex.is_trained(tmp_path)
