"""
MMLU (Hendrycks et al. 2021, arXiv 2009.03300): questions of 57 subjects, each with four choices.

    read_folder     from the files of the original archive, or from Parquet files as in cais/mmlu
    read_prompts    from the chain-of-thought prompts of lm-eval, which carry 281 questions
    find_exam       from a named folder, or from data/mmlu, which is fetched on first use
"""
import csv
import io
import json
import re
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from data import text
from data.download import check_sha256, download, download_wheel, from_first
from data.files import atomic_open, read_utf8

URL = "https://people.eecs.berkeley.edu/~hendrycks/data.tar"
URL_SHA256 = "bec563ba4bac1d6aaf04141cd7d1605d7a5ca833e38f994051e818489592989b"
WHEEL = "lm-eval==0.4.13"  # EleutherAI's evaluation harness, MIT licence
WHEEL_SHA256 = "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a"
WHEEL_FILE = "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
PROMPTS_SHA256 = "081478485b1d4f51e01305e19113f0e3a468f2dc787596386998e229a97b096c"
PROMPTS = f"the prompts of {WHEEL}, not of MMLU's test set"  # the source of their questions

LETTERS = "ABCD"
CATEGORIES = {  # of the subjects, as in categories.py of github.com/hendrycks/test
    "STEM": """
        abstract_algebra astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics
        electrical_engineering elementary_mathematics high_school_biology high_school_chemistry
        high_school_computer_science high_school_mathematics high_school_physics
        high_school_statistics machine_learning""",
    "humanities": """
        formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy
        prehistory professional_law world_religions""",
    "social sciences": """
        econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
    "other": """
        anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging
        management marketing medical_genetics miscellaneous nutrition professional_accounting
        professional_medicine virology""",
}
LEVELS = ("high school", "college", "professional", "general")
CATEGORY = {subject: category for category, subjects in CATEGORIES.items()
            for subject in subjects.split()}
SUBJECTS = sorted(CATEGORY)


class Question(NamedTuple):
    text: str
    choices: tuple  # four strings
    answer: int     # index of the right one


class Exam(NamedTuple):
    source: str        # where the questions are from
    questions: dict    # {subject: its Questions}
    shots: dict | None  # {subject: Questions that may stand before}; None: the subject's others

    def shots_of(self, subject, number, n):
        """
        The n Questions that stand, with their answers, before question `number` of a subject; where
        they are the subject's other questions, as many as there are up to n. Raises ValueError.
        """
        if self.shots is None:
            questions = self.questions[subject]
            return [*questions[:number], *questions[number + 1:]][:n]
        found = self.shots.get(subject, [])[:n]
        if len(found) < n:
            raise ValueError(f"shots={n}, but {self.source} has {len(found)} dev questions of "
                             f"{subject} (dev/{subject}_dev.csv, or dev-*.parquet): use "
                             f"--shots={len(found)}, or bring them back")
        return found


def level(subject):
    """Which of the LEVELS a subject belongs to, by the beginning of its name."""
    *named, others = LEVELS
    begins = (name for name in named if subject.startswith(name.replace(" ", "_") + "_"))
    return next(begins, others)


def make_exam(source, questions, shots):
    """An Exam. Raises ValueError where it has a subject that MMLU has not."""
    for subject in questions:
        if subject not in CATEGORY:
            raise ValueError(f"{source}: {subject} is not one of MMLU's {len(SUBJECTS)} subjects: "
                             "take it away, or rename it")
    return Exam(source, questions, shots)


# --- Prompts

class Item(NamedTuple):
    """A Question as it is asked."""
    shots: list       # Questions that stand before it, with their answers
    question: Question


def format_question(question, cloze):
    """
    The text of a Question up to "Answer:", and its four continuations: letters; or if cloze, where
    the text does not show the choices, their texts.
    """
    if cloze:
        continuations = [f" {choice}" for choice in question.choices]
        return f"Question: {question.text}\nAnswer:", continuations
    choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices)]
    return "\n".join((question.text, *choices, "Answer:")), [f" {letter}" for letter in LETTERS]


def make_prompt(subject, item, cloze):
    """
    What is read before the answer to an Item, and its four continuations. The heading has one space
    before the subject; in the original program two came about.
    """
    heading = ("The following are multiple choice questions (with answers) about "
               f"{subject.replace('_', ' ')}.\n\n")
    parts = [] if cloze else [heading]
    for shot in item.shots:
        text, continuations = format_question(shot, cloze)
        parts.append(f"{text}{continuations[shot.answer]}\n\n")
    text, continuations = format_question(item.question, cloze)
    return "".join((*parts, text)), continuations


# --- Files of MMLU

def read_csv(path):
    """
    The Questions of a CSV file without a header: question, four choices, letter. Raises ValueError,
    which names the line.
    """
    reader = csv.reader(io.StringIO(read_utf8(path), newline=""), strict=True)
    found, line = [], 1
    try:
        for cells in reader:
            if len(cells) != 6:
                raise ValueError(f"it has {len(cells)} columns")
            question, *choices, letter = cells
            if letter not in tuple(LETTERS):
                raise ValueError(f"its letter is {letter!r}")
            found.append(Question(question, tuple(choices), LETTERS.index(letter)))
            line = reader.line_num + 1  # where the next one begins: a question may have many lines
        if not found:
            raise ValueError("it is empty")
    except (ValueError, csv.Error) as e:
        raise ValueError(f"{path}:{line}: expected 6 columns, question, four choices and a letter "
                         f"from A to D, but {e}") from None
    return found


def read_parquet(path):
    """Pairs (subject, Question) of a Parquet file as cais/mmlu has them. Raises ValueError."""
    import pyarrow  # here, since it takes half a second
    from pyarrow import parquet
    columns = ["subject", "question", "choices", "answer"]
    try:
        rows = parquet.read_table(path, columns=columns, partitioning=None).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        raise ValueError(f"{path} is damaged, or no Parquet file ({e}): copy it again") from None
    found = []
    for number, row in enumerate(rows, 1):
        subject, question, choices, answer = (row.get(column) for column in columns)
        texts = [subject, question, *(choices if isinstance(choices, list) else [])]
        if ([*map(type, texts)] != 6 * [str] or type(answer) is not int
                or answer not in range(len(LETTERS))):
            raise ValueError(f"{path}: row {number}: expected subject, question, four choices and "
                             "an answer from 0 to 3")
        found.append((subject, Question(question, tuple(choices), answer)))
    return found


def read_csvs(folder, split):
    """{subject: Questions} of a folder of the original archive. Raises ValueError, OSError."""
    ending = f"_{split}.csv"
    return {path.name.removesuffix(ending): read_csv(path)
            for path in sorted(folder.glob(f"{split}/*{ending}"))}


def read_parquets(folder, split):
    """{subject: Questions} of a folder as cais/mmlu is, of its `all` if it is there. ValueError."""
    name, found = f"{split}-*.parquet", {}
    for path in sorted(folder.glob(f"all/{name}")) or sorted(folder.glob(f"*/{name}")):
        for subject, question in read_parquet(path):
            found.setdefault(subject, []).append(question)
    return found


def read_folder(folder, source):
    """The Exam of a folder with MMLU's files; source: its name. Raises ValueError, OSError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise OSError(f"mmlu_dir={folder} is no folder: name the one that has MMLU's files")
    for read in (read_csvs, read_parquets):
        if questions := read(folder, "test"):
            return make_exam(source, questions, read(folder, "dev"))
    raise OSError(f"mmlu_dir={folder} has no files of MMLU: name the folder with "
                  "test/*_test.csv, or with all/test-*.parquet")


# --- The prompts of lm-eval

STEM = re.compile(r"(.+)\n\(A\) (.+)\s\(B\) (.+)\s\(C\) (.+)\s\(D\) (.+)", re.DOTALL)
FIVE_CHOICES = re.compile(r"\s\(E\) ")
ANSWER = re.compile(r"The answer is \(([A-D])\)\.$")


def parse_prompt(prompt):
    """
    The Questions of a chain-of-thought prompt, without the thoughts. A question with five choices
    is left out: MMLU has none. Raises ValueError.

        Q: What is the place value of the 5 in 1523?
        (A) ones (B) tens (C) hundreds (D) thousands
        A: Let's think step by step. [...] The answer is (C).
    """
    found = []
    for piece in prompt.split("\n\nQ: ")[1:]:
        stem, _, thoughts = piece.partition("\nA: ")
        if FIVE_CHOICES.search(stem):
            continue
        parts, answer = STEM.fullmatch(stem), ANSWER.search(thoughts.rstrip())
        if not (parts and answer):
            raise ValueError(f"expected a question with four choices, and its answer: {stem[:60]}")
        question, *choices = (part.strip() for part in parts.groups())
        found.append(Question(question, tuple(choices), LETTERS.index(answer[1])))
    return found


def read_prompts(path):
    """The Exam of lm-eval's file of prompts. Raises ValueError, OSError."""
    try:
        questions = {subject: parse_prompt(prompt)
                     for subject, prompt in json.loads(read_utf8(path)).items()}
    except (ValueError, AttributeError) as e:
        raise ValueError(f"{path} is damaged ({e}): remove it, and it is fetched anew") from None
    return make_exam(PROMPTS, questions, None)


# --- Where they are from

def from_public_address(folder):
    """Of the original archive the CSV files of test and dev -> their folder."""
    archive = folder / "data.tar"
    download(URL, archive)
    check_sha256(archive, URL_SHA256)
    unpack(archive, folder / "mmlu")
    return folder / "mmlu"


def unpack(archive, folder):
    """The regular files test/*_test.csv and dev/*_dev.csv of a tar, wherever in it, and no more."""
    with tarfile.open(archive) as tar:
        for member in tar:
            name = re.fullmatch(r"(?:.*/)?((test|dev)/\w+_\2\.csv)", member.name)
            if name and member.isfile():  # the path is made of this part alone: it stays in folder
                with atomic_open(folder / name[1]) as f:
                    shutil.copyfileobj(tar.extractfile(member), f)


def from_wheel(folder):
    """The prompts of lm-eval -> their folder."""
    print(f"fetching the questions in the prompts of {WHEEL} from the package index", flush=True)
    wheel, path = download_wheel(WHEEL, WHEEL_SHA256, folder), folder / "mmlu" / "prompts.json"
    with zipfile.ZipFile(wheel) as z, atomic_open(path) as f:
        f.write(z.read(WHEEL_FILE))
    check_sha256(path, PROMPTS_SHA256)
    return path.parent


def fetch_mmlu(folder):
    """
    Put MMLU, or else the prompts of lm-eval, into a folder that is not there yet, whole or not at
    all. Raises OSError where no source answers.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        found = from_first("MMLU", (from_public_address, from_wheel), aside,
                           "name a folder with its files, --mmlu_dir=DIR")
        found.rename(folder)


def find_exam(mmlu_dir, source):
    """
    The Exam of the folder mmlu_dir, which is called source; of "", what is in data/mmlu, which is
    fetched on first use. Raises ValueError, OSError.
    """
    if mmlu_dir:
        return read_folder(mmlu_dir, source)
    folder = text.DATA_DIR / "mmlu"
    if not folder.exists():
        fetch_mmlu(folder)
    prompts = folder / "prompts.json"
    return read_prompts(prompts) if prompts.exists() else read_folder(folder, f"MMLU, {URL}")
