"""What is trained on shares no background with what is validated and tested on."""
import itertools
import re

import numpy as np
import pytest

from conftest import make_pairs, photo, save, with_rain
from DerainDataset import open_patches
from images import MARK, write_image
from layouts import find_pairs
from metadata import Metadata
from pairs import Backgrounds
from test_data import write_prenet
from train import parse_args
from training_sets import (
    counted_folder, find_training_sets, find_validation_pairs, separate, summarise_validation,
)
from utils import InputError


def find(*folders, **options):
    return find_training_sets([str(folder) for folder in folders], [], **options)


def stems(pairs):
    return [pair.rainy.stem for pair in pairs]


# The folders


def test_lists_may_be_given_in_parts():
    """As an option that is repeated; a default is replaced."""
    for _ in range(2):  # the default of the next parser must not have grown
        args = parse_args("--data_path a --data_path b c --clean_path x y --clean_path z --exclude_test t".split())
        assert (args.data_path, args.clean_path, args.exclude_test) == (["a", "b", "c"], ["x", "y", "z"], ["t"])
        assert args.val_pairs == [0]
        assert parse_args([]).data_path == ["datasets/train/RainTrainH"] and parse_args([]).clean_path == []


def test_a_folder_may_count_several_times(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "odd:3").mkdir()
    for text, expected in {
        "set": ("set", 1), "set:40": ("set", 40), f"{tmp_path}/set:2": (str(tmp_path / "set"), 2),
        "odd:3": ("odd:3", 1), "odd:3:40": ("odd:3", 40), "none:x": ("none:x", 1), "none:-1": ("none:-1", 1),
    }.items():
        folder, count = counted_folder(text)
        assert (str(folder), count) == expected
    with pytest.raises(InputError, match="--data_path set:0: expected FOLDER:COUNT with a count of 1 or more"):
        counted_folder("set:0")


def test_each_folder_becomes_a_set(pairs_dir, tmp_path, capsys):
    save(tmp_path / "photographs/1.png", photo(9))
    (pairs_dir / "norain-2.png").unlink()
    save(pairs_dir / "cat.png", photo(8))
    write_prenet(tmp_path / "prenet")
    sets = find(f"{pairs_dir}:7", tmp_path / "photographs", tmp_path / "prenet", photographs=True)
    assert [(each.folder.name, each.count, each.clean_only) for each in sets] == [
        ("pairs", 7, False), ("photographs", 1, True), ("prenet", 1, False)
    ]
    assert stems(sets[0].pairs) == ["rain-1", "rain-3"] and sets[2].pairs == []
    (pair,) = sets[1].pairs
    assert pair.rainy == pair.clean == tmp_path / "photographs/1.png"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{pairs_dir}: left out 2 (no pair by their names): rain-2.png, cat.png"
    assert "1 image without pairs, taken as clean photographs" in lines[1] and "train_input.h5" in lines[2]


def test_rainy_images_whose_clean_ones_are_results_are_no_photographs(tmp_path):
    for number in (1, 2):
        save(tmp_path / f"input/{number}.png", with_rain(photo(number)))
        (tmp_path / "clean").mkdir(exist_ok=True)
        write_image(tmp_path / f"clean/{number}.png", photo(number), Metadata(software=MARK))
    for folder in (tmp_path, tmp_path / "input"):
        with pytest.raises(InputError, match="results of an earlier run; expected others, or --clean_path"):
            find(folder, photographs=True)
    assert len(find_training_sets([str(tmp_path / "input")], [str(tmp_path / "clean")])[0].pairs) == 2


def test_photographs_alone_need_rain(tmp_path):
    save(tmp_path / "photographs/1.png", photo(9))
    with pytest.raises(InputError, match="photographs: no rainy/clean pairs.*--rain_synth for clean photographs alone"):
        find(tmp_path / "photographs")


def test_prenets_files_give_way_to_preprocess(pairs_dir):
    write_prenet(pairs_dir)
    assert find(pairs_dir)[0].pairs == [] and len(find(pairs_dir, prenet=False)[0].pairs) == 3
    (pairs_dir / "train_target.h5").unlink()
    assert len(find(pairs_dir)[0].pairs) == 3, "one of the two files is no set"


def test_clean_folders_are_given_in_the_order_of_the_sets(tmp_path):
    for number in (1, 2):
        save(tmp_path / f"wet{number}/{number}.png", photo(1))
        save(tmp_path / f"dry{number}/{number}.png", photo(1))
    folders, clean = ([tmp_path / f"{kind}{number}" for number in (1, 2)] for kind in ("wet", "dry"))
    sets = find_training_sets([str(folder) for folder in folders], clean)
    assert [each.pairs[0].clean for each in sets] == [tmp_path / "dry1/1.png", tmp_path / "dry2/2.png"]
    with pytest.raises(InputError, match="--clean_path .*dry2: no image goes by its name"):
        find_training_sets([str(folder) for folder in folders], clean[::-1])


def test_a_missing_folder_says_where_data_are_to_be_had(tmp_path):
    with pytest.raises(InputError, match=f"--data_path {tmp_path / 'none'}: no such folder; README.md"):
        find(tmp_path / "none")


# Held out


def assert_apart(sets, validation):
    for training_set in sets:
        assert not any(Backgrounds().partners(training_set.pairs, validation))


def test_other_versions_of_a_held_out_image_leave_training(shared, tmp_path, capsys):
    """Also in the packed file."""
    (training_set,) = sets = find(shared / "cases/val_leak/Rain12600")
    (held_out,) = separate(sets, [1], [], [])
    assert len(training_set.pairs) == 4 and held_out.clean not in {pair.clean for pair in training_set.pairs}
    assert_apart(sets, [held_out])
    number = held_out.clean.stem
    assert capsys.readouterr().out.splitlines() == [
        f"{training_set.folder}: holds out 1 of its backgrounds for validation",
        f"{training_set.folder}: left out 2 (background held out for validation):"
        f" rainy_image/{number}_1.jpg, rainy_image/{number}_14.jpg",
    ]
    names = open_patches(training_set, tmp_path, 32, 32).names
    assert names == [pair.rainy.name for pair in training_set.pairs]


def test_copies_of_a_held_out_image_leave_training(run, tmp_path):
    """What rain.py --per_image 3 writes: each version has a clean image of its own."""
    for number in range(5):
        save(tmp_path / f"clean/{number}.png", photo(number))
    out = tmp_path / "drawn"
    assert run("rain", "--clean", tmp_path / "clean", "--out", out, "--per_image", 3).status == 0
    (training_set,) = sets = find(out)
    held_out = separate(sets, [2], [], [])
    assert len(held_out) == 2 and len(training_set.pairs) == 9
    assert_apart(sets, held_out)


def test_what_is_held_out_of_one_folder_leaves_the_others(tmp_path, capsys):
    """Pairs of the same photographs with other rain, and the photographs themselves."""
    light, heavy = make_pairs(tmp_path / "light", range(1, 7)), make_pairs(tmp_path / "heavy", range(4, 10))
    for number in (1, 4, 20):
        save(tmp_path / f"photographs/{number}.jpg", photo(number)[:, ::-1])
    sets = find(light, heavy, tmp_path / "photographs", photographs=True)
    held_out = separate(sets, [2, 0, 2], [], [])
    assert stems(held_out) == ["rain-1", "rain-4"] and {pair.rainy.parent for pair in held_out} == {light}
    assert [stems(each.pairs) for each in sets] == [
        [f"rain-{n}" for n in (2, 3, 5, 6)], [f"rain-{n}" for n in (5, 6, 7, 8, 9)], ["20"]
    ]
    out = capsys.readouterr().out
    for folder, named in ((light, "rain-1.png, rain-4.png"), (heavy, "rain-4.png"), ("photographs", "1.jpg, 4.jpg")):
        assert any(str(folder) in line and line.endswith(f": {named}") for line in out.splitlines())


def test_a_folder_given_twice_holds_out_the_same(pairs_dir):
    sets = find(pairs_dir, f"{pairs_dir}:4")
    assert len(separate(sets, [1, 1], [], [])) == 1
    assert stems(sets[0].pairs) == stems(sets[1].pairs) == ["rain-2", "rain-3"]


def test_what_val_path_shows_is_not_trained_on(tmp_path, capsys):
    make_pairs(tmp_path / "train", range(1, 6))
    for number in (2, 9):
        save(tmp_path / f"val/target/{number}.jpg", photo(number))
        save(tmp_path / f"val/input/{number}.jpg", with_rain(photo(number)))
    save(tmp_path / "photographs/2.png", photo(2))
    save(tmp_path / "photographs/3.png", photo(3))
    sets = find(tmp_path / "train", tmp_path / "photographs", photographs=True)
    given = find_validation_pairs(tmp_path / "val")
    assert separate(sets, [0, 0], given, []) == given
    assert [stems(each.pairs) for each in sets] == [["rain-1", "rain-3", "rain-4", "rain-5"], ["3"]]
    out = capsys.readouterr().out
    assert "train: left out 1 (background held out for validation): rain-2.png" in out
    assert "photographs: left out 1 (background held out for validation): 2.png" in out


def test_real_backgrounds_of_raintrainh_leave_the_clean_photographs(shared, capsys):
    sets = find(shared / "data/clean", photographs=True)
    validation = find_validation_pairs(shared / "data/train/RainTrainH")
    separate(sets, [0], validation, [])
    assert len(sets[0].pairs) == 209 - 18 and len(sets[0].left_out) == 18
    assert "left out 18 (background held out for validation)" in capsys.readouterr().out


def test_test_backgrounds_are_neither_trained_nor_validated_on(tmp_path, capsys):
    folder = make_pairs(tmp_path / "train", range(1, 9))
    tests = [make_pairs(tmp_path / "test1", (1, 2)), make_pairs(tmp_path / "test2", (5, 60))]
    (training_set,) = sets = find(folder)
    held_out = separate(sets, [1], [], tests)
    assert stems(held_out) == ["rain-3"] and stems(training_set.pairs) == ["rain-4", "rain-6", "rain-7", "rain-8"]
    out = capsys.readouterr().out
    assert f"{folder}: left out 2 (background of {tests[0]}): rain-1.png, rain-2.png" in out
    assert f"{folder}: left out 1 (background of {tests[1]}): rain-5.png" in out


@pytest.mark.parametrize("how", ["--val_pairs", "--val_path", "--exclude_test"])
def test_nothing_left_to_train_on_is_refused(pairs_dir, how):
    (training_set,) = sets = find(pairs_dir)
    pairs = find_pairs(pairs_dir).pairs
    arguments = {"--val_pairs": ([3], [], []), "--val_path": ([0], pairs, []), "--exclude_test": ([0], [], [pairs_dir])}
    with pytest.raises(InputError, match=f"--data_path {pairs_dir}: 3 pairs, all of which .* none is left to train on"):
        separate(sets, *arguments[how])


@pytest.mark.parametrize("hold_out, excluded", [([1, 0], False), ([0, 1], False), ([0, 0], True)])
def test_packed_files_from_which_nothing_can_be_left_out_are_refused(pairs_dir, tmp_path, hold_out, excluded):
    write_prenet(tmp_path / "prenet")
    sets = find(tmp_path / "prenet", pairs_dir)
    with pytest.raises(InputError, match="--data_path .*prenet: no pair can be left out of PReNet's packed files"):
        separate(sets, hold_out, [], [pairs_dir] if excluded else [])
    assert separate(sets, [0, 0], [], []) == [] and len(sets[1].pairs) == 3


def test_photographs_alone_cannot_be_validated_on(tmp_path):
    save(tmp_path / "photographs/1.png", photo(1))
    sets = find(tmp_path / "photographs", photographs=True)
    with pytest.raises(InputError, match="--val_pairs: clean photographs have no pairs to hold out.*--val_path"):
        separate(sets, [1], [], [])


def test_exclude_test_names_itself(pairs_dir, tmp_path):
    with pytest.raises(InputError, match=f"--exclude_test {tmp_path / 'none'}: no such folder"):
        separate(find(pairs_dir), [0], [], [tmp_path / "none"])


def test_a_side_by_side_test_set_is_excluded(pairs_dir, tmp_path):
    save(tmp_path / "test/1.png", np.hstack((photo(2), with_rain(photo(2)))))
    sets = find(pairs_dir)
    separate(sets, [0], [], [tmp_path / "test"], "right")
    assert stems(sets[0].pairs) == ["rain-1", "rain-3"]


def test_train_takes_the_halves_of_exclude_test(refused, tmp_path):
    save(tmp_path / "both/1.png", np.hstack((photo(2), with_rain(photo(2)))))
    halves = "--side_by_side", "right", "--exclude_test", tmp_path / "both"
    folders = "--data_path", tmp_path / "both", "--save_path", tmp_path / "run"
    refused("train", *folders, *halves, names=["none is left to train on"])


def test_what_of_a_test_set_is_not_compared_is_named(pairs_dir, tmp_path, capsys):
    test = make_pairs(tmp_path / "test", (2, 3))
    (test / "rain-2.png").unlink()
    separate(find(pairs_dir), [0], [], [test])
    assert f"{test}: left out 1 (no pair by their names): norain-2.png\n" in capsys.readouterr().out


# The digest by which a resumed run knows its validation pairs


def test_digest_of_the_validation_pairs_is_of_their_pixels(pairs_dir, tmp_path):
    digests = [summarise_validation(find_pairs(pairs_dir).pairs)]
    pairs_dir.rename(tmp_path / "moved")
    digests.append(summarise_validation(find_pairs(tmp_path / "moved").pairs))
    assert digests[0] == digests[1] and digests[0]["pairs"] == 3
    digests.append(summarise_validation(find_pairs(tmp_path / "moved").pairs[::-1]))
    image = photo(1).copy()
    image[20, 30, 1] ^= 1
    save(tmp_path / "moved/norain-1.png", image)
    digests.append(summarise_validation(find_pairs(tmp_path / "moved").pairs))
    contents = [digest["content"] for digest in digests[1:]]
    assert all(a != b for a, b in itertools.combinations(contents, 2))


@pytest.mark.parametrize("height, width, fits", [(11, 30, True), (10, 30, False), (30, 10, False)])
def test_validation_images_must_hold_the_window_of_ssim(tmp_path, height, width, fits):
    folder = make_pairs(tmp_path, (1, 2), height, width)
    pairs = find_validation_pairs(folder)
    if fits:
        assert summarise_validation(pairs)["pairs"] == 2
    else:
        size = re.escape(f" ({width}x{height})")
        named = f"rain-1.png{size}, .*rain-2.png{size}: expected validation images of 11 px or more"
        with pytest.raises(InputError, match=named):
            summarise_validation(pairs)


def test_what_skip_small_leaves_out_is_not_held_out(tmp_path):
    """The first and the third would be too small to validate on, or to compare with the patches."""
    folder = make_pairs(make_pairs(tmp_path, (1, 3), 10, 64), (2, 4, 5), 48, 64)
    for smallest, chosen in ((0, ["rain-1", "rain-3"]), (16, ["rain-2", "rain-4"])):
        assert stems(separate(find(folder), [2], [], [], smallest=smallest)) == chosen


def test_validation_pairs_that_are_left_out_are_named(pairs_dir, capsys):
    (pairs_dir / "norain-3.png").unlink()
    assert stems(find_validation_pairs(pairs_dir)) == ["rain-1", "rain-2"]
    assert capsys.readouterr().out == f"{pairs_dir}: left out 1 (no pair by their names): rain-3.png\n"
    for path in pairs_dir.glob("rain-*"):
        path.unlink()
    with pytest.raises(InputError, match=f"--val_path {pairs_dir}: no rainy/clean pairs"):
        find_validation_pairs(pairs_dir)


def test_halves_are_taken_for_validation_too(tmp_path):
    save(tmp_path / "1.png", np.hstack((photo(1), photo(2))))
    (pair,) = find_validation_pairs(tmp_path, "right")
    assert pair.rainy_half == "right"
