"""The ablation trains every choice of terms and measures all of them on pairs that none has seen."""
import json

import pytest

import ablation
from conftest import photo, save


@pytest.mark.slow
def test_each_run_is_measured_on_the_pairs_that_it_held_out(run, shared, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "RUNS", {name: ablation.RUNS[name] for name in ("pixel", "pixel + PCL + LPISL")})
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        save(tmp_path / f"clean/{number}.png", photo(number))
    assert run("rain", "--clean", "clean", "--out", "pairs", "--per_image", 2).status == 0
    result = run(
        "ablation", "--data_path", "pairs", "--val_pairs", 2, "--max_steps", 1, "--backbone_dir", shared / "weights",
        "--logs", "logs", "--output", "table.md", "--patch_size", 40, "--recurrent_iter", 1, "--batch_size", 2,
        "--num_workers", 0, "--device", "cpu",
    )
    assert result.status == 0, result
    table = (tmp_path / "table.md").read_text()
    assert "measured on 2 pairs" in table and "--val_pairs 2" in table
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| pixel")]
    assert [row[0] for row in rows] == [*ablation.RUNS]
    for number, row in enumerate(rows):
        psnr, ssim, lpips, pcl = map(float, row[1:])
        validated = json.loads((tmp_path / f"logs/run{number}/log.jsonl").read_text().splitlines()[-1])
        assert psnr == pytest.approx(validated["val_psnr_y"], abs=0.002), "measured on other pairs than train.py"
        assert ssim == pytest.approx(validated["val_ssim_y"], abs=2e-4) and lpips > 0 and pcl > 0
    assert rows[0][1:] != rows[1][1:]


@pytest.mark.parametrize("option", ["--exclude_test", "--clean_path=clean", "--save_path", "--excl"])
def test_options_that_would_change_the_pairs_are_refused(refused, tmp_path, option):
    names = [option.partition("=")[0], "train.py"]
    refused("ablation", "--data_path", tmp_path, option, tmp_path, names=names)


def test_a_folder_without_pairs_is_named(refused, tmp_path):
    refused("ablation", "--data_path", tmp_path, names=["--data_path", tmp_path])
