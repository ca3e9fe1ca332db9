"""demo.ipynb: it holds no results, and runs from a checkout."""
import shutil
import subprocess

import pytest

from conftest import ROOT, photo, save, with_rain
from images import read_image

nbformat = pytest.importorskip("nbformat", reason="nbformat is missing: pip install nbclient ipykernel")


def read():
    return nbformat.read(ROOT / "demo.ipynb", as_version=4)


def test_it_is_valid_and_holds_no_results():
    notebook = read()
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or cell.outputs == [] and cell.execution_count is None, cell.source


def files_below(folder):
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture
def checkout(tmp_path):
    """A copy of the files that git has or would add; the sample is cut to small pictures, to save time."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip(f"git does not say what is tracked: {names.stderr.strip()}")
    folder = tmp_path / "checkout"
    for name in names.stdout.split("\n")[:-1]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for path in folder.glob("datasets/test/RainSample/**/*.png"):
        save(path, read_image(path)[100:180, 100:200])
    return folder


@pytest.mark.slow
def test_it_runs_from_a_checkout(checkout, tmp_path, monkeypatch):
    """It needs nothing but those files, and leaves nothing among them."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is missing: pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="ipykernel is missing: pip install nbclient ipykernel")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    picture = save(tmp_path / "photo.png", with_rain(photo(1)))
    notebook, before = read(), files_below(checkout)
    for start, end in (('PICTURE = ""', f"PICTURE = {str(picture)!r}"), ("STEPS = 20", "STEPS = 2")):
        (cell,) = [cell for cell in notebook.cells if cell.source.startswith(start)]
        cell.source = cell.source.replace(start, end, 1)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": checkout}}).execute()

    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    pictures = [sum("image/png" in output.get("data", {}) for output in cell) for cell in outputs]
    assert pictures == [0, 1, 1, 0, 1], outputs
    assert "step 2, " in outputs[3][0].text
    assert files_below(checkout) == before
    (derained,) = (tmp_path / "temporary").glob("*/photo_derained.png")
    assert read_image(derained).shape == photo(1).shape
