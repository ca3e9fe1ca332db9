"""The ablation trains every choice of terms and measures all of them on pairs that none has seen."""
import json

import numpy as np
import pytest

import ablation
from conftest import make_pairs, photo, save


def figures(table):
    """[of each set of pairs: [of each row: (figures, seeds) array]] of a table's text."""
    sections = table.split("## ")[1:]
    rows = [[line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| pixel")] for text in sections]
    return [[np.array([cell.strip(" |").split(" / ") for cell in row], float) for row in section] for section in rows]


@pytest.mark.slow
def test_each_run_is_measured_on_the_pairs_that_it_held_out(run, shared, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "RUNS", {name: ablation.RUNS[name] for name in ("pixel", "pixel + PCL + LPISL")})
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        save(tmp_path / f"{'clean' if number < 4 else 'others'}/{number}.png", photo(number))
    assert run("rain", "--clean", "clean", "--out", "pairs", "--per_image", 2).status == 0
    assert run("rain", "--clean", "others", "--out", "further").status == 0
    command = [
        "ablation", "--data_path", "pairs", "--val_pairs", 2, "--val_path", "further", "--max_steps", 1,
        "--backbone_dir", shared / "weights", "--logs", "logs", "--output", "table.md",
        "--patch_size", 40, "--recurrent_iter", 1, "--batch_size", 2, "--num_workers", 0, "--device", "cpu",
    ]
    assert run(*command).status == 0
    table = (tmp_path / "table.md").read_text()
    assert "2 pairs held out of pairs" in table and "2 pairs of further" in table and "--val_pairs 2" in table
    held_out, further = figures(table)
    assert len(held_out) == len(further) == 2 and (held_out[0] != held_out[1]).any()
    for number, both in enumerate(zip(held_out, further)):
        (psnr, ssim, lpips, pcl), = np.mean(both, axis=0).T
        validated = json.loads((tmp_path / f"logs/seed0/run{number}/log.jsonl").read_text().splitlines()[-1])
        assert psnr == pytest.approx(validated["val_psnr_y"], abs=0.002), "measured on other pairs than train.py"
        assert ssim == pytest.approx(validated["val_ssim_y"], abs=2e-4) and lpips > 0 and pcl > 0

    # It goes on with a run that is missing, and leaves those alone that are done.
    monkeypatch.setattr(ablation, "RUNS", {"pixel": ablation.RUNS["pixel"]})
    assert run(*command).status == 2, "two ablations in one folder"
    for option, value in (("--max_steps", 2), ("--patch_size", 48)):
        others = list(command)
        others[others.index(option) + 1] = value
        assert run(*others, "--resume").status == 2, f"{option} of the other runs is another"
    before = (tmp_path / "logs/seed0/run0/log.jsonl").read_text()
    assert run(*command, "--resume", "--seeds", 0, 1).status == 0
    (row,), _ = figures((tmp_path / "table.md").read_text())
    assert np.array_equal(row[:, :1], held_out[0]) and (row[:, 0] != row[:, 1]).any(), "the seed changes nothing"
    assert (tmp_path / "logs/seed0/run0/log.jsonl").read_text() == before


@pytest.mark.parametrize("preprocess", [(), ("--preprocess", "False"), ("--preprocess=True",)])
def test_packed_patches_that_cannot_be_told_from_what_is_held_out_are_refused(
    refused, pairs_dir, tmp_path, preprocess
):
    for name in ("train_input.h5", "train_target.h5"):
        (pairs_dir / name).touch()
    options = "--val_pairs", 0, "--val_path", pairs_dir, "--backbone_dir", tmp_path / "none", *preprocess
    names = ["--backbone_dir"] if "True" in str(preprocess) else [pairs_dir, "PReNet's"]
    refused("ablation", "--data_path", pairs_dir, *options, "--logs", tmp_path / "logs", names=names)


@pytest.mark.parametrize("text", ["mine", "[1]", '{"max_steps": 3}'])
@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_file_of_somebody_else_is_not_replaced(refused, tmp_path, text, resume):
    make_pairs(tmp_path / "pairs")
    kept = tmp_path / "logs/options.json"
    kept.parent.mkdir()
    kept.write_text(text)
    refused("ablation", "--data_path", tmp_path / "pairs", "--logs", kept.parent, *resume, names=[kept])
    assert kept.read_text() == text


@pytest.mark.slow
def test_options_with_which_no_run_has_begun_do_not_bind(refused, tmp_path):
    """As here, where the weights of the backbones are missing, or where train.py refuses one of its own options."""
    command = "ablation", "--data_path", make_pairs(tmp_path / "pairs"), "--val_pairs", 1, "--logs", tmp_path / "logs"
    for number, resume in ((1, ()), (2, ()), (3, ("--resume",))):
        missing = tmp_path / f"none{number}"
        refused(*command, "--pach_size", number, "--backbone_dir", missing, *resume, names=[missing])
    begun = tmp_path / "logs/seed0/run0/args.json"
    begun.parent.mkdir(parents=True)
    begun.write_text("{}")
    refused(*command, "--pach_size", 4, "--backbone_dir", missing, "--resume", names=["passed on was", "options.json"])
    refused(*command, "--pach_size", 3, "--backbone_dir", missing, names=["--logs", "--resume"])


def test_a_seed_given_twice_is_refused(refused, tmp_path):
    refused("ablation", "--data_path", tmp_path, "--seeds", 0, 0, names=["--seeds"])


def test_nothing_to_measure_on_is_refused(refused, tmp_path):
    refused("ablation", "--data_path", tmp_path, "--val_pairs", 0, names=["--val_pairs", "--val_path"])


@pytest.mark.parametrize(
    "option",
    ["--exclude_test", "--clean_path=clean", "--save_path", "--excl", "--val_pair", "--w_lpips", "--stop_after",
     "--epoch", "--init_weights"],
)
def test_options_that_would_change_the_pairs_are_refused(refused, tmp_path, option):
    names = [option.partition("=")[0], "train.py"]
    refused("ablation", "--data_path", tmp_path, option, tmp_path, names=names)


def test_a_folder_without_pairs_is_named(refused, tmp_path):
    refused("ablation", "--data_path", tmp_path, names=["--data_path", tmp_path])
