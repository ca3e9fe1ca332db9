"""What changes in the course of a run: learning rate, stages and loss terms; and where it ends."""
import math

import pytest

from run_folder import Position
from schedule import Conditions, conditions, share_done
from train import parse_args


def at(done, *options, epoch=0):
    return conditions(parse_args(list(options)), epoch, done)


def test_published_schedule():
    rates = [at(epoch / 100, epoch=epoch).learning_rate for epoch in (0, 29, 30, 49, 50, 79, 80, 99)]
    assert rates == pytest.approx([1e-3, 1e-3, 2e-4, 2e-4, 4e-5, 4e-5, 8e-6, 8e-6])
    assert at(0.5, epoch=49) == Conditions(pytest.approx(2e-4), 6, frozenset({"segmentation"}))
    assert at(0.5, epoch=50).left_out == frozenset()


def test_cosine_falls_to_zero_at_the_end():
    rates = [at(done, "--schedule", "cosine", "--lr", "2").learning_rate for done in (0, 0.25, 0.5, 1)]
    assert rates == pytest.approx([2, 1 + math.sqrt(0.5), 1, 0])


def test_first_stages_and_psnr_until_change_at_their_share():
    options = "--first_stages", "2", "0.5", "--w_psnr", "1", "--psnr_until", "0.8", "--seg_start_epoch", "0"
    assert [at(done, *options).recurrent_iter for done in (0, 0.49, 0.5, 1)] == [2, 2, 6, 6]
    assert [sorted(at(done, *options).left_out) for done in (0, 0.79, 0.8, 1)] == [[], [], ["psnr_loss"], ["psnr_loss"]]


@pytest.mark.parametrize("epoch, sample, step, expected", [
    (0, 0, 0, 0), (1, 30, 13, 0.52), (1, 30, 2, 0.375), (3, 0, 30, 1.2), (0, 99, 2, 0.25),
])
def test_the_nearer_end_counts(epoch, sample, step, expected):
    """Of four epochs of 60 patches and 25 steps. An epoch never counts as more than one, whatever the batch."""
    args = parse_args(["--epochs", "4", "--max_steps", "25"])
    assert share_done(args, Position(epoch=epoch, sample=sample, step=step), 60) == pytest.approx(expected)
