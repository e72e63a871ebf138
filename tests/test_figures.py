"""docs/figures.py: the pictures in results/ are those of the CSV files beside them."""
import re

import numpy as np
import pytest
from conftest import REPO, is_one_line
from PIL import Image

from docs import figures
from lib import tables


def call(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["docs/figures.py", *args])
    figures.main()


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_pictures_are_those_of_results(monkeypatch, tmp_path):
    call(monkeypatch, f"--out={tmp_path}")
    assert {path.stem for path in tmp_path.iterdir()} == {*tables.experiments()}
    for path in tmp_path.iterdir():
        drawn, kept = pixels(path), pixels(REPO / "results" / path.name)
        assert drawn.shape == kept.shape, f"call python -m docs.figures for {path.name}"
        apart = (abs(drawn - kept).max(axis=2) > 40).mean()  # a font may differ by a shade
        assert apart < 0.002, f"call python -m docs.figures for {path.name}"


def test_each_picture_is_shown_on_a_page():
    text = "".join(page.read_text(encoding="utf-8")
                   for page in [REPO / "README.md", *(REPO / "docs").glob("*.md")])
    shown = {path.split("/")[-1] for path in re.findall(r"!\[[^\]]*\]\(([^)]+\.png)\)", text)}
    pictures = [*(REPO / "results").glob("*.png"), *(REPO / "docs").glob("*.png")]
    assert {path.name for path in pictures} == shown


def test_what_is_no_folder_is_told_in_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as e:
        call(monkeypatch, f"--out={tmp_path / 'file'}")
    assert is_one_line(e.value.code, capsys.readouterr().err, "file")
