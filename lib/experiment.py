"""
An experiment, for compare.py: the rows that a TOML file of experiments/ describes, and the commands
that train and ask them. lib/measured.py keeps what came out.

    title = "Are 16 slots enough?"
    preset = "config/babilong_qa1.toml"   # of train.py
    seeds = [1, 2, 3]
    tasks = "qa1"
    ask = { "0k,1k,4k" = 100, "64k" = 30 }   # lengths, and how many questions of each task

    [[row]]
    name = "32 slots"

    [[row]]
    name = "16 slots"
    flags = "--mem_slots=16"
"""
import ast
import hashlib
import json
import math
import shlex
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from data.babilong import parse_length, parse_lengths, parse_tasks
from data.files import read_utf8
from lib.config import from_dict, load_preset

ROOT = Path(__file__).resolve().parent.parent
CODE = ("lm2.py", "train.py", "baselines/[!.]*.py", "data/text.py", "data/tokenizer.py",
        "lib/optim.py")  # what makes a run what it is; and of a data set:
CODE_OF_DATA = {"babilong": ("data/babi.py", "data/babilong.py", "data/curriculum.py"),
                "pairs": ("data/pairs.py", "data/curriculum.py"),
                "text": ("data/corpus.py",)}
RAG = "baselines/rag.py"  # has a part in answers alone
OWN_FLAGS = {"config", "seed", "out_dir", "resume", "overwrite"}  # that compare.py gives train.py
OWN_ASK_FLAGS = {"runs", "tasks", "lengths", "n_samples", "out_dir"}
COPIED = ("lm2.py", "train.py", "eval_babilong.py", "look.py", "sample.py")  # for a `change`
DERIVED = shutil.ignore_patterns("__pycache__", "*.bin", "*.json")  # token ids and bytecode


@dataclass
class Row:
    """A line of the table, and how it differs from the preset."""
    name: str
    flags: str = ""        # of train.py
    preset: str = ""       # instead of the experiment's
    seeds: list = field(default_factory=list)  # instead of the experiment's
    match: str = ""        # a row: the MLP is widened to as many parameters as that one has
    init_from: str = ""    # a row: training begins with the weights of its run of the same seed
    run_of: str = ""       # a row: nothing is trained, its runs answer
    code: str = ""         # folder of another checkout, whose train.py and eval_babilong.py run
    change: list = field(default_factory=list)  # of the code: [[file, old text, new text], ...]
    ask: dict = field(default_factory=dict)  # lengths and questions, besides the experiment's
    ask_flags: str = ""    # of eval_babilong.py
    longest: str = ""      # the last length that is asked
    asked: bool = True     # false: it is trained for another row's init_from alone

    @property
    def checkout(self):
        """The folder of its code, before its change."""
        return Path(self.code or ROOT)


@dataclass
class Experiment:
    """A TOML file, its name, and its path as it was typed."""
    name: str
    path: str
    title: str
    preset: str
    seeds: list
    row: list              # Rows, in the order of the table; all are compared to the first one
    tasks: str = ""        # of BABILong, as in qa1,qa2
    ask: dict = field(default_factory=dict)    # {"0k,1k,4k": questions of each task}
    measure: list = field(default_factory=list)  # tokens_per_s, columns of log.csv at the best step
    until: dict = field(default_factory=dict)   # {column: figure}: minutes until it is reached
    curve: str = ""        # one of measure: the picture shows it over the tokens of training

    def __post_init__(self):
        """Raises ValueError, one line that names what is wrong."""
        if not all(isinstance(row, dict) for row in self.row):
            raise ValueError("a row is not a table: begin it with a line [[row]]")
        self.row = [row_of(row) for row in self.row]
        names = [row.name for row in self.row]
        for row in self.row:
            if names.count(row.name) > 1:
                raise ValueError(f"two rows have the name {row.name!r}: give each its own")
            for key in ("match", "init_from", "run_of"):
                wanted = getattr(row, key)
                if wanted and wanted not in names[:names.index(row.name)]:
                    raise ValueError(f"row {row.name!r} has {key}={wanted!r}, which is no row "
                                     "above it: name one")
            if row.run_of and self.named(row.run_of).run_of:
                raise ValueError(f"row {row.name!r} has run_of={row.run_of!r}, which has no run of "
                                 "its own: name the row that has")
            for seed in self.seeds_of(row):
                if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2 ** 31:
                    raise ValueError(f"seed {seed!r} is no whole number from 0 to 2147483647")
            self.cells(row)
        if not self.row or not self.seeds:
            raise ValueError("it needs at least one row and one seed")
        if not (self.ask or self.measure or self.until):
            raise ValueError("it measures nothing: give ask, measure or until")
        if self.ask or any(row.ask for row in self.row):
            parse_tasks(self.tasks)
        if not all(isinstance(name, str) for name in self.measure):
            raise ValueError(f"measure={self.measure} should be names of columns in quotes")
        if self.curve and self.curve not in self.measure:
            raise ValueError(f"curve={self.curve!r} is not measured: put it into measure as well")
        for figure in self.until.values():
            if not isinstance(figure, (int, float)) or not math.isfinite(figure):
                raise ValueError(f"until has the figure {figure!r}: use a number")

    def named(self, name):
        return next(row for row in self.row if row.name == name)

    def seeds_of(self, row):
        return row.seeds or (self.named(row.run_of).seeds if row.run_of else []) or self.seeds

    def cells(self, row):
        """{length: questions of each task} that a row is asked, the shortest first."""
        found = {}
        for lengths, n in {**self.ask, **row.ask}.items():
            if not isinstance(n, int) or isinstance(n, bool) or n < 1:
                raise ValueError(f"ask has {n!r} questions of {lengths}: use a number from 1 on")
            found |= {length: n for length in parse_lengths(lengths)}
        longest = parse_length(row.longest) if row.longest else float("inf")
        return {length: found[length] for length in sorted(found, key=parse_length)
                if parse_length(length) <= longest and row.asked}

    def answering_row(self, row):
        """The row whose runs answer for a row: itself, mostly."""
        return self.named(row.run_of) if row.run_of else row

    def preset_of(self, row):
        return ROOT / (row.preset or self.preset)

    def wanted(self, row, seed):
        """What is to be measured of a row and a seed: the keys (measure, task, length, n)."""
        tasks = parse_tasks(self.tasks) if self.tasks else []
        keys = [("accuracy", task, length, n) for length, n in self.cells(row).items()
                for task in tasks]
        if row.asked and not row.run_of:
            keys += [(name, "", "", 0) for name in self.measure]
            keys += [(minutes_until(column, figure), "", "", 0)
                     for column, figure in self.until.items()]
        return keys


def row_of(values):
    """The Row of a table [[row]]. Raises ValueError that names it."""
    name = values.get("name")
    if not isinstance(name, str) or not name.strip() or "," in name or "\n" in name:
        raise ValueError(f"each row needs a name, in one line and without a comma, not {name!r}")
    try:
        row = from_dict(Row, values)
        for flags, own in ((row.flags, OWN_FLAGS), (row.ask_flags, OWN_ASK_FLAGS)):
            if taken := sorted(own & set(flags_of(flags))):
                raise ValueError(f"compare.py itself says --{taken[0]}: leave it out")
        if row.run_of:
            for key in ("flags", "preset", "match", "init_from", "code", "change"):
                if getattr(row, key):
                    raise ValueError(f"run_of trains nothing: leave out {key}, or run_of")
        for change in row.change:
            if not (isinstance(change, list) and len(change) == 3
                    and all(isinstance(part, str) for part in change)):
                raise ValueError(f"the change {change!r} should be [file, old text, new text]")
    except ValueError as e:
        raise ValueError(f"row {name!r}: {e}") from None
    return row


def flags_of(text):
    """{name: value} of flags, "--n_layer=2 --memory=none". Raises ValueError."""
    flags = {}
    for word in shlex.split(text):
        name, is_given, value = word.removeprefix("--").partition("=")
        if not (word.startswith("--") and is_given):
            raise ValueError(f"the flag {word!r} should be --name=value")
        flags[name] = value
    return flags


def minutes_until(column, figure):
    return f"minutes until {column} {figure:g}"


def load(path):
    """The Experiment of a TOML file. Raises ValueError or OSError, one line that names the file."""
    values = load_preset(path)
    try:
        missing = {"title", "preset", "seeds", "row"} - set(values)
        if missing:
            raise ValueError(f"it has no {sorted(missing)[0]}")
        for key in ("name", "path"):
            if key in values:
                raise ValueError(f"{key} is not known: leave it out, the file's name is the "
                                 "experiment's")
        found = from_dict(Experiment, {"name": Path(path).stem, "path": str(path), **values})
        for row in found.row:
            load_preset(found.preset_of(row))
            if row.code and not (Path(row.code) / "train.py").is_file():
                raise ValueError(f"row {row.name!r} has code={row.code!r}, where no train.py is")
            for name, text in changed_files(row).items():
                compile(text, name, "exec")
    except (ValueError, SyntaxError) as e:
        raise ValueError(f"{path}: {e}") from None
    return found


# --- What a run is

def digest(*parts):
    """8 hex digits that tell apart what can be written as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def code_files(row, datasets):
    """Sorted paths of the files that make a run of a row what it is, on any of the data sets."""
    folder = row.checkout
    patterns = CODE + tuple(name for dataset in datasets for name in CODE_OF_DATA[dataset])
    return sorted({path.relative_to(folder).as_posix()
                   for pattern in patterns for path in folder.glob(pattern)} - {RAG})


def changed_files(row):
    """{path: text} of the files that a row changes. Raises ValueError, OSError."""
    texts, known = {}, code_files(row, CODE_OF_DATA)
    for name, old, new in row.change:
        if name not in known:
            raise ValueError(f"row {row.name!r} changes {name}, which does not count as part of a "
                             f"run: change one of {', '.join(known)}")
        text = texts.get(name) or read_utf8(row.checkout / name)
        if text.count(old) != 1:
            raise ValueError(f"row {row.name!r} changes {old!r}, which is {text.count(old)} times "
                             f"in {name}: it must be there once")
        texts[name] = text.replace(old, new)
    return texts


@lru_cache
def meaning(text):
    """Python code without what does nothing: comments, docstrings and layout."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            first.value.value = ""  # a docstring
    return ast.unparse(tree)


def meaning_of(path, text=None):
    """The `meaning` of a file, or of what it is changed to. Raises ValueError, OSError."""
    try:
        return meaning(text or read_utf8(path))
    except SyntaxError as e:
        raise ValueError(f"{path} is no Python code ({e}): mend it") from None


def code_digest(row, dataset):
    """
    8 hex digits of what the code of a row does, as far as a data set needs it. Raises ValueError,
    OSError.
    """
    changed = changed_files(row)
    kind = dataset if dataset in CODE_OF_DATA else "text"
    return digest([(name, meaning_of(row.checkout / name, changed.get(name)))
                   for name in code_files(row, [kind])])


def code_folder(row, out_dir):
    """The folder whose programs a row runs: a checkout, or a copy of it with the row's change."""
    folder = row.checkout
    if not row.change:
        return folder
    folders = ("baselines", "data", "lib")
    programs = [folder / name for name in COPIED if (folder / name).exists()]
    paths = programs + [path for name in folders
                        for path in sorted((folder / name).glob("[!.]*.py"))]
    copy = Path(out_dir) / f"code-{digest(row.change, [read_utf8(path) for path in paths])}"
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f"{copy.name}.", dir=copy.parent))
        for path in programs:
            shutil.copy(path, aside)
        for name in folders:
            shutil.copytree(folder / name, aside / name, ignore=DERIVED)
        for name, text in changed_files(row).items():
            (aside / name).write_text(text, encoding="utf-8")
        try:
            aside.rename(copy)
        except OSError:  # another thread was faster
            shutil.rmtree(aside)
    return copy


def train_id(experiment, row):
    """What the runs of a row have in common, whatever their seed: code, preset and flags."""
    row = experiment.answering_row(row)
    preset = {key: value for key, value in load_preset(experiment.preset_of(row)).items()
              if key != "out_dir"}
    before = [name and train_id(experiment, experiment.named(name))
              for name in (row.match, row.init_from)]
    code = code_digest(row, flags_of(row.flags).get("dataset", preset.get("dataset")))
    return digest(code, preset, sorted(shlex.split(row.flags)), before)


def run_id(experiment, row):
    """What the results of a row have in common: how its runs were trained, and asked."""
    trained = train_id(experiment, row)
    rag = experiment.answering_row(row).checkout / RAG
    if "rag" in flags_of(row.ask_flags) and rag.exists():
        return digest(trained, row.ask_flags, meaning_of(rag))
    return digest(trained, row.ask_flags) if row.ask_flags else trained


def folder_of(experiment, row, seed, out_dir):
    """The folder of a run, the same one for rows of any experiments that are trained alike."""
    row = experiment.answering_row(row)
    preset = experiment.preset_of(row).stem
    return Path(out_dir) / f"{preset}-{seed}-{train_id(experiment, row)}"


def needs(experiment, row, seed, out_dir):
    """{row: folder of its run} of the rows that a row matches, begins with, or answers for."""
    names = [name for name in (row.match, row.init_from, row.run_of) if name]
    return {name: folder_of(experiment, experiment.named(name), seed, out_dir) for name in names}


def train_flags(experiment, row, seed, folder, needs, size=""):
    """
    The flags of train.py that train the run in a folder, or go on with it. needs: see there. size:
    the parameters of the row to match; where they are not known, its run tells them.
    """
    if (folder / "ckpt.pt").exists():
        return ["--resume", f"--out_dir={folder}"]
    # a run that goes on from another one sees other stories than that one did
    seed_now = seed + 1000 if row.init_from else seed
    flags = [f"--config={experiment.preset_of(row)}", *shlex.split(row.flags),
             f"--seed={seed_now}", f"--out_dir={folder}", "--overwrite"]
    if row.match:
        flags.append(f"--match_params={size or needs[row.match]}")
    if row.init_from:
        flags.append(f"--init_from={needs[row.init_from]}")
    return flags


def ask_flags(experiment, row, folder, length, n):
    """The flags of eval_babilong.py that ask a run n questions of each task at a length."""
    return [str(folder), f"--tasks={experiment.tasks}",
            f"--lengths={length}", f"--n_samples={n}", *shlex.split(row.ask_flags),
            f"--out_dir={answers_folder(experiment, row, folder)}"]


def answers_folder(experiment, row, folder):
    return folder / (f"answers-{run_id(experiment, row)}" if row.ask_flags else "answers")


def planned_tokens(experiment, row, run_config=None):
    """
    The tokens that training a row takes: those of all its steps. run_config: `train` of its run's
    config.json, once it is there, since a run has the shape of the one that it begins with.
    """
    usual = {"max_iters": 1500, "batch_size": 6, "n_segments": 4, "block_size": 64,
             "gradient_accumulation_steps": 1}
    config = usual | load_preset(experiment.preset_of(row)) | flags_of(row.flags)
    config |= run_config or {}
    return math.prod(int(config[name]) for name in usual)


def steps(folder):
    """Steps that a run has made, and is to make: (0, 1) where it has not begun."""
    try:
        lines = read_utf8(folder / "log.csv").splitlines()
        about = json.loads(read_utf8(folder / "config.json"))
        return int(lines[-1].split(",")[0]), int(about["train"]["max_iters"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0, 1


def is_trained(folder):
    step, last = steps(folder)
    return step >= last and (folder / "best.pt").exists()
