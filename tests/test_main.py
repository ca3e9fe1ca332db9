"""main.sh: which sets it tests with which weights."""
import os
import shutil
import subprocess

import pytest

from conftest import ROOT


@pytest.fixture
def commands(tmp_path):
    """commands(sets, *arguments) -> the commands that main.sh starts where these test sets are there."""
    shutil.copy(ROOT / "main.sh", tmp_path)
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "run $@"\n')
    python.chmod(0o755)

    def start(sets, *arguments):
        for name in sets:
            (tmp_path / "datasets/test" / name).mkdir(parents=True, exist_ok=True)
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", tmp_path / "main.sh", *arguments], env={**os.environ, "PATH": path}, stdout=subprocess.PIPE,
            text=True, check=True,
        )
        return [line for line in done.stdout.splitlines() if line.startswith("run ")], done.stdout

    return start


def expected(name, model, *arguments):
    return " ".join((f"run test.py --save_path logs/SAPNet/{model} --test_data_path datasets/test/{name}", *arguments))


def test_each_set_is_tested_with_its_weights(commands):
    started, _ = commands(["Rain100H", "Rain100L"], "--device", "cpu")
    assert started == [
        expected("Rain100H", "Model11", "--device", "cpu"), expected("Rain100L", "Rain100L", "--device", "cpu")
    ]
    for line in started:
        folder = line.split()[3]
        assert (ROOT / folder / "net_latest.pth").stat().st_size < 10**6


def test_a_missing_set_is_named_and_the_sample_tested(commands):
    started, output = commands(["Rain100L"])
    assert started == [expected("Rain100L", "Rain100L"), expected("RainSample", "Model11")]
    assert "datasets/test/Rain100H is not there" in output


def test_the_sample_is_tested_once(commands):
    started, _ = commands([])
    assert started == [expected("RainSample", "Model11")]
