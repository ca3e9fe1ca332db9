"""main.sh: which sets it tests with which weights."""
import os
import shutil
import subprocess

import pytest

import test as test_script
from conftest import ROOT


@pytest.fixture
def commands(tmp_path):
    """commands(sets, *arguments) -> the arguments of each test.py that main.sh starts, and what main.sh prints."""
    shutil.copy(ROOT / "main.sh", tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/link.sh").symlink_to(tmp_path / "main.sh")
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "run $@"\n')
    python.chmod(0o755)

    def start(sets, *arguments):
        for name in (*sets, "RainSample"):
            (tmp_path / "datasets/test" / name).mkdir(parents=True, exist_ok=True)
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", tmp_path / "elsewhere/link.sh", *arguments], env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE, text=True, check=True,
        )
        lines = [line.split() for line in done.stdout.splitlines()]
        started = [line[1:] for line in lines if line[0] == "run"]
        assert all(script == "test.py" for script, *_ in started)
        return [test_script.parse_args(words) for _, *words in started], done.stdout

    return start


def sets_and_weights(started):
    return [(args.test_data_path.name, args.save_path and str(args.save_path)) for args in started]


def test_each_set_is_tested_with_its_weights(commands):
    started, output = commands(["Rain100H", "Rain100L"], "--device", "cpu")
    assert sets_and_weights(started) == [("Rain100H", "weights/heavy.pth"), ("Rain100L", "weights/light.pth")]
    assert all(args.device == "cpu" for args in started)
    assert all((ROOT / args.save_path).stat().st_size < 10**6 for args in started)
    assert "test.py --test_data_path datasets/test/Rain100L --save_path weights/light.pth --device cpu" in output


def test_a_run_of_ones_own_is_taken_for_both_sets(commands, tmp_path):
    run = tmp_path / "logs/SAPNet/Model11"
    run.mkdir(parents=True)
    (run / "net_latest.pth").touch()
    started, _ = commands(["Rain100H", "Rain100L"])
    assert sets_and_weights(started) == [("Rain100H", "logs/SAPNet/Model11"), ("Rain100L", "logs/SAPNet/Model11")]


def test_a_checkpoint_given_by_the_user_wins(commands):
    started, _ = commands(["Rain100H", "Rain100L"], "--save_path", "mine.pth")
    assert sets_and_weights(started) == [("Rain100H", "mine.pth"), ("Rain100L", "mine.pth")]


@pytest.mark.parametrize("option", ["--output_path", "--output_path=mine", "--test_data_path", "--results_path"])
def test_a_folder_for_one_set_is_refused(commands, capfd, option):
    """The second set's metrics.csv, and its images where names agree, would replace those of the first."""
    with pytest.raises(subprocess.CalledProcessError) as caught:
        commands(["Rain100H", "Rain100L"], "--device", "cpu", option, "mine")
    out, err = capfd.readouterr()
    name = option.partition("=")[0]
    assert caught.value.returncode == 2 and not caught.value.stdout
    assert err == f"main.sh: error: {name}: each set here has its own; expected this option for test.py\n"


def test_a_missing_set_is_named_and_the_sample_tested(commands):
    started, output = commands(["Rain100L"])
    assert sets_and_weights(started) == [("Rain100L", "weights/light.pth"), ("RainSample", None)]
    assert "datasets/test/Rain100H is not there" in output


def test_the_sample_is_tested_once(commands):
    started, _ = commands([])
    assert sets_and_weights(started) == [("RainSample", None)]
