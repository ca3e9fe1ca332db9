"""The ablation trains every choice of terms and measures all of them on pairs that none has seen."""
import pytest

import ablation
from conftest import make_pairs
from DerainDataset import find_pairs, pick_held_out


@pytest.mark.slow
def test_table_of_two_choices(run, shared, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "RUNS", {name: ablation.RUNS[name] for name in ("pixel", "pixel + PCL + LPISL")})
    pairs = make_pairs(tmp_path / "pairs", range(22))
    table = tmp_path / "table.md"
    result = run(
        "ablation", "--data_path", pairs, "--max_steps", 1, "--backbone_dir", shared / "weights", "--logs",
        tmp_path / "logs", "--output", table, "--packed_dir", tmp_path / "packed", "--patch_size", 40,
        "--recurrent_iter", 1, "--batch_size", 2, "--num_workers", 0, "--device", "cpu",
    )
    assert result.status == 0, result
    rows = [line.split(" | ") for line in table.read_text().splitlines() if line.startswith("| pixel")]
    assert len(rows) == 2
    for row in rows:
        psnr, ssim, lpips, pcl = (float(figure.rstrip(" |")) for figure in row[1:])
        assert 5 < psnr < 60 and -1 <= ssim <= 1 and lpips > 0 and pcl > 0


def test_held_out_pairs_are_distinct(pairs_dir):
    pairs, _ = find_pairs(pairs_dir)
    assert pick_held_out(pairs, 2) == [pairs[0], pairs[1]] and pick_held_out(pairs, 3) == pairs
