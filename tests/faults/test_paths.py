"""Names that are hard on a program: each is read and written, and nothing is written outside --output_path."""
import csv
import os

import pytest

from conftest import contents, photo, run_subprocess, save, with_rain
from images import read_rgb
from test_train import options

STEMS = (
    "new\nline", "tab\tand \r", "single ' double \" back `", "back\\slash", "\U0001f327\ufe0f \u96e8", "e\u0301 \xe9",
    "-rf", "--output_path", "..", "...", ".hidden", "~", "$HOME", "%s %d {0} {}", "*?[a]", "a;b|c&d", " ", "CON",
    "x.png", "C:\\", "\x1b[31mred", "\u202egnp", "#", "x" * 251, "\U0001f327" * 62 + "abc", os.fsdecode(b"\xff"),
)


def hard_names(folder):
    """A small image under each name; {stem: path}."""
    paths = {}
    for number, stem in enumerate(STEMS):
        path = folder / f"{stem}.png"
        assert len(os.fsencode(path.name)) <= 255
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(save(folder.parent / "plain.png", photo(number, 12, 12)).read_bytes())
        paths[stem] = path
    (folder.parent / "plain.png").unlink()
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("recursive", [False, True])
def test_hard_names_are_derained_and_stay_inside(run, checkpoint, tmp_path, recursive):
    folder = tmp_path / "in"
    paths = hard_names(folder / "below\n\U0001f327" if recursive else folder)
    before = contents(tmp_path)
    arguments = ("--save_path", checkpoint, "--test_data_path", folder, "--output_path", tmp_path / "out")
    result = run("test", *arguments, *["--recursive"] * recursive)
    assert result.status == 0, result
    after = contents(tmp_path)
    written = after.keys() - before.keys()
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("out/") for name in written), written
    assert len(written) == len(paths) + 1 and "out/metrics.csv" in written
    for stem, path in paths.items():
        target = tmp_path / "out" / path.relative_to(folder)
        assert read_rgb(target).shape == (12, 12, 3), stem
    assert not any(letter in result.out for letter in "\x1b\r\t")
    with open(tmp_path / "out/metrics.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(paths) + 1


@pytest.mark.slow
def test_hard_names_are_trained_on(run, tmp_path):
    for number, stem in enumerate(STEMS):
        for kind, image in (("target", photo(number, 12, 12)), ("input", with_rain(photo(number, 12, 12)))):
            data = save(tmp_path / "plain.png", image).read_bytes()
            (tmp_path / "set \n\udcff" / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / "set \n\udcff" / kind / f"{stem}.png").write_bytes(data)
    chosen = {"patch_size": 11, "stride": 1, "recurrent_iter": 1, "epochs": 1, "val_pairs": 3}
    result = run("train", *options(tmp_path / "set \n\udcff", tmp_path / "run \n\udcfe", **chosen))
    assert result.status == 0, result
    assert f"{4 * (len(STEMS) - 3)} patches" in result.out


def test_links_in_circles_end(run, checkpoint, tmp_path):
    folder = tmp_path / "in"
    save(folder / "a/b/image.png", photo(1, 12, 12))
    (folder / "a/b/up").symlink_to(folder)
    (folder / "a/b/here").symlink_to(".")
    (folder / "a/other").symlink_to("b")
    (folder / "self").symlink_to("self")
    (folder / "self.png").symlink_to("self.png")
    (folder / "nowhere.png").symlink_to("/nowhere/at all.png")
    (folder / "folder.png").mkdir()
    result = run(
        "test", "--save_path", checkpoint, "--test_data_path", folder, "--output_path", tmp_path / "out", "--recursive"
    )
    assert result.status == 1 and "2 of 3 images failed: " in result.err, result
    assert len(list((tmp_path / "out").rglob("*.png"))) == 1


def test_linked_image_is_written_inside(run, checkpoint, tmp_path):
    """A link's own name counts, not that of what it leads to, and nothing is written through one."""
    outside = save(tmp_path / "outside/image.png", photo(1, 12, 12))
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/deep/link.png").symlink_to("../../outside/image.png")
    (tmp_path / "in/folder").symlink_to("../outside")
    before = contents(tmp_path)
    arguments = ("--save_path", checkpoint, "--test_data_path", tmp_path / "in", "--output_path", tmp_path / "out")
    assert run("test", *arguments, "--recursive").status == 0
    after = contents(tmp_path)
    assert after.keys() - before.keys() == {"out/deep/link.png", "out/folder/image.png", "out/metrics.csv"}
    assert outside.read_bytes() == before["outside/image.png"]
    link, other = tmp_path / "out/deep/link.png", tmp_path / "outside/other.png"
    link.unlink()
    link.symlink_to("../../outside/other.png")
    result = run("test", *arguments, "--recursive")
    assert result.status == 2 and "deep/link.png would be overwritten" in result.err
    assert link.is_symlink() and not other.exists(), "nobody knows what it is for"
    other.write_bytes(after["out/deep/link.png"])  # as an earlier run may have left it
    (tmp_path / "in/folder").unlink()  # in which it would be an input
    assert run("test", *arguments, "--recursive").status == 0
    assert not link.is_symlink() and other.read_bytes() == after["out/deep/link.png"], "it is replaced, not followed"


def test_a_name_that_becomes_too_long_does_not_cost_the_others(run, checkpoint, tmp_path):
    for name in ("a.png", f"{'x' * 251}.png", "z.png"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(save(tmp_path / "plain.png", photo(1, 12, 12)).read_bytes())
    arguments = ("--save_path", checkpoint, "--test_data_path", tmp_path / "in", "--output_path", tmp_path / "out")
    for _ in range(2):  # the second time the folder is there, which then says that the name is too long
        result = run("test", *arguments, "--suffix", "_derained", "--comparison")
        assert result.status == 1 and result.err.strip().endswith(f"1 of 3 images failed: {'x' * 251}.png"), result
    assert {*contents(tmp_path / "out")} == {
        "a_derained.png", "z_derained.png", "comparison/a.jpg", "comparison/z.jpg", "contact_sheet.jpg", "metrics.csv",
    }


@pytest.mark.parametrize("recursive", [False, True])
def test_pipes_are_not_waited_for(run, checkpoint, tmp_path, recursive):
    save(tmp_path / "in/a.png", photo(1, 12, 12))
    for name in ("b.png", "c"):
        os.mkfifo(tmp_path / "in" / name)
    arguments = ("--save_path", checkpoint, "--test_data_path", tmp_path / "in", "--output_path", tmp_path / "out")
    result = run("test", *arguments, *["--recursive"] * recursive)
    assert result.status == 1 and result.err == "test.py: error: 1 of 2 images failed: b.png\n", result
    assert "b.png: not a readable image (not a file)" in result.out and "not processed: c\n" in result.out


@pytest.mark.slow
def test_names_that_are_no_text_reach_a_console_that_is_strict(tmp_path, checkpoint):
    path = save(tmp_path / "in/a.png", photo(1, 12, 12))
    path.rename(path.with_name("\udcff\U0001f327.png"))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    child = run_subprocess(
        "test.py", "--save_path", checkpoint, "--test_data_path", tmp_path / "in", "--output_path", tmp_path / "out",
        env=environment,
    )
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, (out, err)
    assert len(os.listdir(tmp_path / "out")) == 2
