"""docs/figures.py: the pictures in results/ are those of the CSV files beside them."""
import re

import numpy as np
import pytest
from conftest import REPO, is_one_line
from made_up import answered
from PIL import Image

from docs import figures
from docs.assignment import repository_files
from lib import tables
from lib.measured import write_results


def call(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["docs/figures.py", *args])
    figures.main()


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_pictures_are_those_of_results(monkeypatch, tmp_path):
    call(monkeypatch, f"--out={tmp_path}")
    assert {path.stem for path in tmp_path.iterdir()} == {*figures.experiments(), "capabilities"}
    for path in tmp_path.iterdir():
        drawn, kept = pixels(path), pixels(REPO / "results" / path.name)
        assert drawn.shape == kept.shape, f"call python -m docs.figures for {path.name}"
        apart = (abs(drawn - kept).max(axis=2) > 40).mean()  # a font may differ by a shade
        assert apart < 0.002, f"call python -m docs.figures for {path.name}"


def test_each_picture_is_shown_on_a_page():
    text = "".join(page.read_text(encoding="utf-8")
                   for page in [REPO / "README.md", *(REPO / "docs").glob("*.md")])
    shown = {path.split("/")[-1] for path in re.findall(r"!\[[^\]]*\]\(([^)]+\.png)\)", text)}
    ours = [path for path in repository_files(REPO)  # not those of a reader's own experiments
            if path.suffix == ".png" and path.parts[0] in ("results", "docs")]
    assert {path.name for path in ours} == shown


def test_an_experiment_of_a_readers_own_is_left_to_compare(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    for name in ("mine", "ours"):
        write_results(tmp_path / "results" / f"{name}.csv", [answered("LM2", 1, "10")])
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "ours.toml").touch()
    assert tables.experiments() == ["mine", "ours"] and figures.experiments() == ["ours"]


def test_capabilities_are_means_of_their_tasks(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    rows = [answered(name, seed, "1" * i + "0" * (10 - i), task=f"qa{i}", length=length)
            for name in ("LM2", "RMT") for seed in (1, 2) for length in ("0k", "4k")
            for i in range(1, 11)]
    write_results(tmp_path / "results" / "ten.csv", rows)
    seen = []
    monkeypatch.setattr(figures, "plot_bars", lambda bars, *_: seen.append(bars))
    figures.draw_capabilities(tmp_path / "a.png")
    found, = seen
    assert list(found) == ["LM2", "RMT"]
    assert list(found["RMT"].values()) == pytest.approx([10, 25, 45, 70, 95])
    tasks = [task for group in figures.CAPABILITIES.values() for task in group]
    assert tasks == [f"qa{i}" for i in range(1, 11)]


def test_what_is_no_folder_is_told_in_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as e:
        call(monkeypatch, f"--out={tmp_path / 'file'}")
    assert is_one_line(e.value.code, capsys.readouterr().err, "file")
