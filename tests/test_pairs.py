"""Finding pairs by their folders and names, reading them, and telling which show the same background."""
import errno
import itertools
import os
import random
import re
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, make_pairs, photo, run_subprocess, save, with_rain
from images import MARK, NoImages, list_images, read_rgb, write_image
from layouts import CLEAN_FOLDERS, RAINY_FOLDERS, Pair, find_pairs, report_left_out
from metadata import Metadata
from pairs import Backgrounds, hold_out, pair_size, read_pair
from utils import InputError

# Layouts: the folders of public sets as files, and the pairs that must come out, in this order.
LAYOUTS = {
    "RainTrainH": (
        ["rain-10.png", "rain-2.PNG", "rain-1800.png", "norain-1800.png", "norain-2.png", "norain-10.png"],
        [("rain-2.PNG", "norain-2.png"), ("rain-10.png", "norain-10.png"), ("rain-1800.png", "norain-1800.png")],
    ),
    "Rain100H": (
        ["rainy/rain-001.png", "rainy/rain-003.png", "norain-001.png", "norain-003.png"],
        [("rainy/rain-001.png", "norain-001.png"), ("rainy/rain-003.png", "norain-003.png")],
    ),
    "Rain1400": (
        [
            *(f"rainy_image/{n}_{k}.jpg" for n in (901, 1000) for k in (1, 2, 14)),
            "ground_truth/901.jpg", "ground_truth/1000.jpg",
        ],
        [(f"rainy_image/{n}_{k}.jpg", f"ground_truth/{n}.jpg") for n in (901, 1000) for k in (1, 2, 14)],
    ),
    "Rain1400 in two folders": (
        ["rain/901_1.jpg", "rain/902_1.jpg", "norain/901.jpg", "norain/902.jpg"],
        [("rain/901_1.jpg", "norain/901.jpg"), ("rain/902_1.jpg", "norain/902.jpg")],
    ),
    "Rain13K": (
        ["input/10.jpg", "input/9.jpg", "input/street.jpg", "target/9.jpg", "target/10.png", "target/street.JPG"],
        [("input/9.jpg", "target/9.jpg"), ("input/10.jpg", "target/10.png"), ("input/street.jpg", "target/street.JPG")],
    ),
    "AllWeather": (["input/1.png", "gt/1.png"], [("input/1.png", "gt/1.png")]),
    "Input and Target": (["Input/1.png", "Target/1.png"], [("Input/1.png", "Target/1.png")]),
    "GT and LQ": (["LQ/rain-1.png", "GT/norain-1.png"], [("LQ/rain-1.png", "GT/norain-1.png")]),
    "Rain200H": (
        ["rain/X2/norain-1x2.png", "rain/X2/norain-12x2.png", "norain/norain-12.png", "norain/norain-1.png"],
        [("rain/X2/norain-1x2.png", "norain/norain-1.png"), ("rain/X2/norain-12x2.png", "norain/norain-12.png")],
    ),
    "Rain200H with equal names": (
        ["rain/norain-1x2.png", "rain/norain-12x2.png", "norain/norain-12x2.png", "norain/norain-1x2.png"],
        [("rain/norain-1x2.png", "norain/norain-1x2.png"), ("rain/norain-12x2.png", "norain/norain-12x2.png")],
    ),
    "Rain800 in two folders": (
        ["rain/rain-001.png", "rain/rain-002.png", "norain/norain-001.png", "norain/norain-002.png"],
        [("rain/rain-001.png", "norain/norain-001.png"), ("rain/rain-002.png", "norain/norain-002.png")],
    ),
    "SPA": (
        ["rain/001.png", "rain/002.png", "gt/001gt.png", "gt/002gt.png"],
        [("rain/001.png", "gt/001gt.png"), ("rain/002.png", "gt/002gt.png")],
    ),
    "Rain12": (
        ["02_in.png", "11_in.png", "02_GT.png", "11_GT.png"],
        [("02_in.png", "02_GT.png"), ("11_in.png", "11_GT.png")],
    ),
    "RainDrop": (
        ["data/0_rain.png", "data/10_rain.png", "gt/0_clean.png", "gt/10_clean.png"],
        [("data/0_rain.png", "gt/0_clean.png"), ("data/10_rain.png", "gt/10_clean.png")],
    ),
    "Outdoor-Rain": (
        ["in/im_0001_s80_a04.png", "in/im_0001_s95_a06.png", "gt/im_0001.png"],
        [("in/im_0001_s80_a04.png", "gt/im_0001.png"), ("in/im_0001_s95_a06.png", "gt/im_0001.png")],
    ),
    "Rain200H renamed": (
        ["rain/X2/rain-1x2.png", "rain/X2/rain-12x2.png", "norain/norain-12.png", "norain/norain-1.png"],
        [("rain/X2/rain-1x2.png", "norain/norain-1.png"), ("rain/X2/rain-12x2.png", "norain/norain-12.png")],
    ),
    "Rain200H by numbers": (
        ["rain/1x2.png", "rain/12x2.png", "norain/12.png", "norain/1.png"],
        [("rain/1x2.png", "norain/1.png"), ("rain/12x2.png", "norain/12.png")],
    ),
    "RainDS": (
        ["rain/rd-1.png", "rain/rd-rain-1.png", "rain/rd-2.png", "gt/norain-1.png", "gt/norain-2.png"],
        [("rain/rd-1.png", "gt/norain-1.png"), ("rain/rd-2.png", "gt/norain-2.png"),
         ("rain/rd-rain-1.png", "gt/norain-1.png")],
    ),
    "RainDS of drawn rain": (
        ["rain/pie-rd-1.png", "rain/pie-rain-1.png", "gt/pie-norain-1.png"],
        [("rain/pie-rain-1.png", "gt/pie-norain-1.png"), ("rain/pie-rd-1.png", "gt/pie-norain-1.png")],
    ),
    "RainCityscapes": (
        [*(f"rain/a_0001_leftImg8bit_rain_alpha_0.0{k}_beta_0.005_pattern_{k}.png" for k in (1, 2)),
         "gt/a_0001_leftImg8bit.png"],
        [(f"rain/a_0001_leftImg8bit_rain_alpha_0.0{k}_beta_0.005_pattern_{k}.png", "gt/a_0001_leftImg8bit.png")
         for k in (1, 2)],
    ),
    "GT-Rain": (
        ["Street_0-0-Webcam-R-001.png", "Street_0-0-Webcam-R-002.png", "Street_0-0-Webcam-C-000.png"],
        [("Street_0-0-Webcam-R-001.png", "Street_0-0-Webcam-C-000.png"),
         ("Street_0-0-Webcam-R-002.png", "Street_0-0-Webcam-C-000.png")],
    ),
    "1_rain and 1_norain": (["1_rain.png", "1_norain.png"], [("1_rain.png", "1_norain.png")]),
    "rain-1 and clean-1": (["rain-1.png", "clean-1.png"], [("rain-1.png", "clean-1.png")]),
    "lq and hq": (["lq/1.png", "hq/1.png"], [("lq/1.png", "hq/1.png")]),
    "rainy_images": (["rainy_images/1.png", "clean_images/1.png"], [("rainy_images/1.png", "clean_images/1.png")]),
    "numbers padded differently": (
        ["rain-1.png", "rain-20.png", "norain-001.png", "norain-020.png"],
        [("rain-1.png", "norain-001.png"), ("rain-20.png", "norain-020.png")],
    ),
    "equal names padded differently": (
        ["input/img7_0003.png", "target/img07_3.jpg"], [("input/img7_0003.png", "target/img07_3.jpg")]
    ),
    "versions padded differently": (
        ["rain/0901_1.jpg", "rain/0901_2.jpg", "norain/901.jpg"],
        [("rain/0901_1.jpg", "norain/901.jpg"), ("rain/0901_2.jpg", "norain/901.jpg")],
    ),
    "both paddings": (  # the equal one is meant
        ["input/1.png", "input/02.png", "target/1.png", "target/01.png", "target/2.png", "target/02.png"],
        [("input/1.png", "target/1.png"), ("input/02.png", "target/02.png")],
    ),
    "names in capitals": (
        ["RAIN-1.PNG", "NoRain-1.png", "Rain_2.png", "NO_RAIN_2.png"],
        [("RAIN-1.PNG", "NoRain-1.png"), ("Rain_2.png", "NO_RAIN_2.png")],
    ),
    "brackets and line breaks": (
        ["input/a [1]\n(2).png", "input/ä.png", "target/a [1]\n(2).png", "target/ä.png"],
        [("input/a [1]\n(2).png", "target/a [1]\n(2).png"), ("input/ä.png", "target/ä.png")],
    ),
}


def touch(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def relative(pairs, folder):
    return [(str(pair.rainy.relative_to(folder)), str(pair.clean.relative_to(folder))) for pair in pairs]


def names(paths):
    return [path.name for path in paths]


@pytest.mark.parametrize("required", [True, False], ids=["training", "testing"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_found_from_the_folder(tmp_path, capsys, layout, required):
    files, expected = LAYOUTS[layout]
    found = find_pairs(touch(tmp_path, [*files, "readme.txt"]), required=required)
    assert relative(found.pairs, tmp_path) == expected
    assert found.alone == [] and capsys.readouterr().out == ""
    assert names(found.unused) == (["01.png", "2.png"] if layout == "both paddings" else [])


@pytest.mark.parametrize("layout", [layout for layout, (_, pairs) in LAYOUTS.items() if "/" in pairs[0][0]])
def test_the_rainy_folder_itself_may_be_given(tmp_path, monkeypatch, layout):
    files, expected = LAYOUTS[layout]
    touch(tmp_path, files)
    place = (tmp_path / expected[0][0]).parent
    for folder in {place, *place.parents} - {tmp_path, *tmp_path.parents}:  # rain/X2, and rain/ too
        found = find_pairs(folder)
        assert relative(found.pairs, tmp_path) == expected, folder
        assert found.alone == []
    monkeypatch.chdir(place)
    assert relative(find_pairs(".", required=False).pairs, tmp_path) == expected
    monkeypatch.chdir(tmp_path)
    assert relative(find_pairs(place.relative_to(tmp_path)).pairs, tmp_path) == expected


def test_any_rainy_folder_goes_with_any_clean_one_in_any_case(tmp_path):
    kinds = [  # rainy, clean
        ("rain-{}", "norain-{}"), ("rain{}", "norain{}"), ("rain_{}", "no_rain_{}"), ("{}", "{}"), ("{}_3", "{}"),
        ("norain-{}x2", "norain-{}"), ("{}", "{}gt"), ("{}", "{}_GT"), ("{}_in", "{}_GT"), ("{}_rain", "{}_clean"),
        ("{}_s80_a04", "{}"), ("{}_rain", "{}_norain"), ("rain-{}", "clean-{}"), ("rain-{}x2", "norain-{}"),
        ("{}x2", "{}"), ("rd-{}", "norain-{}"), ("pie-rd-rain-{}", "pie-norain-{}"),
        ("{}_leftImg8bit_rain_alpha_1", "{}_leftImg8bit"), ("{}-R-001", "{}-C-000"),
    ]
    draw = random.Random(0)
    places = [(rainy, clean) for rainy, clean in itertools.product(RAINY_FOLDERS, CLEAN_FOLDERS) if rainy != clean]
    for number, (rainy, clean) in enumerate(places):
        for kind in (kinds[number % len(kinds)], kinds[(number + 5) % len(kinds)]):
            written = [
                "".join(draw.choice((letter.lower(), letter.upper())) for letter in f"{place}/{name.format(12)}.png")
                for place, name in zip((rainy, clean), kind)
            ]
            folder = touch(tmp_path / f"{number}-{kind[0]}", written)
            ((pair,), alone, unused) = find_pairs(folder)
            assert relative([pair], folder) == [tuple(name.removeprefix("./") for name in written)]
            assert alone == unused == []


def test_public_sets_as_distributed(shared):
    layouts = shared / "cases/layouts"
    for folder in sorted(path for path in layouts.iterdir() if path.name != "test"):
        found = find_pairs(folder)
        assert len(found.pairs) == 3 and found.alone == found.unused == [], folder
        for pair in found.pairs:
            rainy, clean = (re.search(r"\d+", path.stem)[0] for path in pair[:2])
            assert rainy == clean and pair.rainy.parent != pair.clean.parent


def test_real_sets_are_found_whole(shared):
    counts = {
        "train/RainTrainL": 200, "train/RainTrainH": 18, "train/RainHeavy": 158, "val/RainHeavy": 20,
        "test/Rain100L": 20, "test/Rain100H/rainy": 20,
    }
    for folder, count in counts.items():
        found = find_pairs(shared / "data" / folder)
        assert len(found.pairs) == count and found.alone == found.unused == []


@pytest.mark.parametrize("most", ["in one folder", "in subfolders"])
def test_the_layout_with_most_pairs_is_taken(tmp_path, most):
    few, many = ((1,), (1, 2)) if most == "in subfolders" else ((1, 2), (1,))
    touch(tmp_path, [name for n in few for name in (f"rain-{n}.png", f"norain-{n}.png")])
    touch(tmp_path, [name for n in many for name in (f"input/{n}.png", f"gt/{n}.png")])
    (first, second), _, _ = find_pairs(tmp_path)
    assert {path.parent for path in (*first[:2], *second[:2])} == (
        {tmp_path} if most == "in one folder" else {tmp_path / "input", tmp_path / "gt"}
    )


# What is left out


def test_images_without_a_partner_are_told_apart(tmp_path):
    touch(tmp_path, ["rain-1.png", "norain-1.png", "rain-7.png", "norain-20.png", "cat.png", "notes.txt"])
    for required in (True, False):
        pairs, alone, unused = find_pairs(tmp_path, required=required)
        assert relative(pairs, tmp_path) == [("rain-1.png", "norain-1.png")]
        assert names(alone) == ["rain-7.png"], "a test set's image without ground truth is still to be derained"
        assert names(unused) == ["cat.png", "norain-20.png"]


def test_pairs_of_the_layout_with_fewer_are_left_out_by_name(tmp_path):
    touch(tmp_path, [f"{place}/{n}.png" for place in ("input", "target") for n in (1, 2, 3)])
    touch(tmp_path, [f"{place}/{n}.png" for place in ("rain", "norain") for n in (1, 7)])
    pairs, alone, unused = find_pairs(tmp_path)
    assert len(pairs) == 3 and alone == []
    assert [path.relative_to(tmp_path).as_posix() for path in unused] == [
        "norain/1.png", "norain/7.png", "rain/1.png", "rain/7.png"
    ]
    pairs, alone, unused = find_pairs(tmp_path / "input")
    assert len(pairs) == 3 and not alone and not unused, "nothing of the folders beside the one that was given"


def test_own_photographs_beside_a_pair_are_all_left_out(shared):
    pairs, alone, unused = find_pairs(shared / "cases/own_photos_layout/own_photos")
    assert len(pairs) == 1 and alone == []
    assert names(unused) == [f"{name}{n}.png" for name in ("beach", "holiday") for n in (1, 2, 3)]
    pairs, alone, unused = find_pairs(shared / "cases/own_photos_layout/Rain1400_stray")
    assert len(pairs) == 3 and alone == [] and names(unused) == ["901_1(1).jpg"]


def test_what_is_left_out_is_named(tmp_path, capsys):
    report_left_out(tmp_path, [])
    assert capsys.readouterr().out == ""
    report_left_out(tmp_path, [tmp_path / "input/a\nb.png", tmp_path / "c.png"], "no pair by their names")
    assert capsys.readouterr().out == f"{tmp_path}: left out 2 (no pair by their names): input/a\\nb.png, c.png\n"


# Two files of one stem


@pytest.mark.parametrize("files, twins", [
    (["rain-1.png", "rain-1.jpg", "norain-1.png"], "rain-1"),
    (["rain-1.png", "norain-1.jpg", "norain-1.webp"], "norain-1"),
    (["input/a.png", "input/a.tif", "target/a.png"], "a"),
    (["input/a.png", "target/a.png", "target/a.PNG"], "a"),
    (["input/a.png", "target/a.png", "input/b.png", "input/b.jpg"], "b"),  # neither has a clean image
    (["rain/5_1.png", "rain/5_1.jpg", "norain/5.png"], "5_1"),
    (["rain-1.png", "norain-1.png", "norain-01.jpg", "rain-001.png"], "norain"),  # each would do for rain-001
])
@pytest.mark.parametrize("required", [True, False], ids=["training", "testing"])
def test_two_files_of_one_stem_are_an_error_that_names_both(tmp_path, files, twins, required):
    touch(tmp_path, files)
    with pytest.raises(InputError) as caught:
        find_pairs(tmp_path, required=required)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path) in message
    assert all(name.rpartition("/")[2] in message for name in files if name.rpartition("/")[2].startswith(twins))


@pytest.mark.parametrize("folder, twins", [("rain_twins", "rain-1"), ("twins", "1")])
def test_case_of_twins(shared, folder, twins):
    with pytest.raises(InputError) as caught:
        find_pairs(shared / "cases/twins_one_stem" / folder)
    assert f"{twins}.png" in str(caught.value) and f"{twins}.jpg" in str(caught.value)


def test_twins_that_no_pair_needs_are_none_of_our_business(tmp_path):
    """In a layout with fewer pairs, among unused images, and on clean images without a rainy one."""
    touch(tmp_path, ["rain-1.png", "rain-1.jpg", "norain-1.png", "cat.png", "cat.jpg"])
    touch(tmp_path, [f"{folder}/{n}.png" for folder in ("input", "target") for n in (1, 2, 3)])
    touch(tmp_path, ["target/9.png", "target/9.jpg"])
    pairs, _, unused = find_pairs(tmp_path)
    assert len(pairs) == 3 and set(names(unused)) >= {"9.png", "9.jpg"}


# Where no layout fits


def test_folder_without_ground_truth_is_real_rain(tmp_path, capsys):
    touch(tmp_path, ["real_10.jpg", "real_9.PNG", "notes.txt"])
    pairs, alone, unused = find_pairs(tmp_path, required=False)
    assert pairs == unused == [] and names(alone) == ["real_9.PNG", "real_10.jpg"]
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match=f"--data_path {tmp_path}: no rainy/clean pairs; expected for example"):
        find_pairs(tmp_path)


def test_a_missing_or_empty_folder_is_named(tmp_path):
    touch(tmp_path, ["empty/notes.txt", "file"])
    for name in ("none", "file"):
        with pytest.raises(InputError, match=f"--val_path {tmp_path / name}: no such folder"):
            find_pairs(tmp_path / name, "--val_path", required=False)
    for required, reason in ((True, "no rainy/clean pairs"), (False, "no images")):
        with pytest.raises(InputError, match=f"--val_path {tmp_path / 'empty'}: {reason}"):
            find_pairs(tmp_path / "empty", "--val_path", required=required)


@pytest.mark.parametrize("required", [True, False], ids=["training", "testing"])
def test_a_folder_of_several_sets_gets_their_names(shared, tmp_path, required):
    with pytest.raises(InputError, match="holds several data sets; expected one of them: Rain100H, Rain100L$"):
        find_pairs(shared / "cases/layouts/test", required=required)
    touch(tmp_path, ["b/rain-1.png", "b/norain-1.png", "a/rainy/rain-1.png", "a/norain-1.png", "c/photo.png"])
    with pytest.raises(InputError, match=f"--val_path {tmp_path}: holds several .* one of them: a, b$"):
        find_pairs(tmp_path, "--val_path", required=required)


@pytest.mark.parametrize("files, given, clean, fits", [
    (["photos/a.png", "GroundTruth/a.png"], "photos", "GroundTruth", True),
    (["photos/rd-1.png", "photos/rd-2.png", "gt/norain-1.png"], "photos", "gt", True),
    (["photos/a.png", "clean/b.png", "gt/a.png"], "photos", "gt", True),
    (["photos/a.png", "GroundTruth/b.png"], "photos", "GroundTruth", False),
    (["a.png", "Clean/b.png"], ".", "Clean", False),
])
def test_clean_images_beside_are_hinted_at_where_they_fit(tmp_path, capsys, files, given, clean, fits):
    """What is advised works; else both are named, so that one sees why they do not go together."""
    given, clean = touch(tmp_path, files) / given, tmp_path / clean
    find_pairs(given, required=False)
    told = capsys.readouterr().out
    with pytest.raises(InputError) as caught:
        find_pairs(given, ways_out=("--clean_path",))
    for text in (told, str(caught.value)):
        assert (f"--clean_path {clean}" in text) == fits and "\n" not in text.strip()
        assert fits or f"{list_images(clean)[0]} and {list_images(given)[0].name} do not go together" in text
    with pytest.raises(InputError) as caught:
        find_pairs(given)
    assert "--clean_path" not in str(caught.value), "an option that not all scripts have"
    if fits:
        assert find_pairs(given, clean_folder=clean).pairs
    else:
        with pytest.raises(InputError, match="no image goes by its name .*b.png, a.png"):
            find_pairs(given, clean_folder=clean)


@pytest.mark.parametrize("files, named", [
    (["A/1.png", "B/1.png"], "A and B"),
    (["a/1.png", "b/1.png", "c/1.png", "d/1.png", "e/1.png"], "a, b, c and others"),
    (["input/01/1.png", "input/02/1.png"], "input/01 and input/02"), (["x/y/wet/1.png"], "x/y/wet"),
])
def test_folders_below_that_hold_pictures_are_named(tmp_path, files, named):
    touch(tmp_path, [*files, ".hidden/1.png", "notes/a.txt"])
    with pytest.raises(InputError, match=f"no rainy/clean pairs in this folder, but pictures in {named}; .*clean_path"):
        find_pairs(tmp_path, ways_out=("--clean_path",))
    with pytest.raises(NoImages):
        find_pairs(tmp_path, required=False)


@pytest.fixture
def lock(monkeypatch):
    """lock(folder): it may not be read from now on. Without patching, a test that root runs could read it."""

    def lock_folder(folder):
        for name in ("listdir", "scandir"):
            def look(path=".", really=getattr(os, name)):
                if os.path.realpath(path) == os.path.realpath(folder):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
                return really(path)

            monkeypatch.setattr(os, name, look)

    return lock_folder


@pytest.mark.parametrize("locked", ["set/clean", "set"])
def test_a_folder_that_may_not_be_read_costs_nothing_else(tmp_path, capsys, lock, locked):
    """Beside the rainy images or around them; it is told of once."""
    touch(tmp_path, ["set/input/1.png", "set/clean/1.png"])
    lock(tmp_path / locked)
    assert len(find_pairs(tmp_path / "set/input", required=False).alone) == 1
    assert capsys.readouterr().out.count(f"{tmp_path / locked}: could not be read (Permission denied)\n") == 1


def test_a_folder_below_that_may_not_be_read_costs_nothing_else(tmp_path, capsys, lock):
    """Such as lost+found, where there are videos, or a set that is not complete."""
    touch(tmp_path, ["clip.mp4", "lost+found/2.png"])
    lock(tmp_path / "lost+found")
    for required in (False, True):
        with pytest.raises(InputError, match="no images in this folder|no rainy/clean pairs; expected for example"):
            find_pairs(tmp_path, required=required)
    assert capsys.readouterr().out.count("lost+found: could not be read (Permission denied)\n") == 1


# This program's own results


def derained(path, image):
    """Write a picture as test.py writes its results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, image, Metadata(software=f"{MARK} 01234567"))
    return path


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("rainy, clean, result", [
    ("input/{}.png", "target/{}.png", "{}"),  # "." comes before "input"
    ("rain-{}.png", "norain-{}.png", "rain-{}_x"), ("rain-{}.bmp", "norain-{}.bmp", "rain-{}"),
    ("input/{}.bmp", "target/{}.bmp", "input/{}"), ("in/{}.png", "gt/{}.png", "rain/{}"),
])
def test_results_are_no_rainy_images(tmp_path, capsys, rainy, clean, result, suffix):
    """Wherever they lie, in all scripts."""
    for number in (1, 2):
        save(tmp_path / rainy.format(number), photo(number))
        save(tmp_path / clean.format(number), photo(number))
    before = find_pairs(tmp_path)
    results = [derained(tmp_path / f"{result.format(number)}.{suffix}", photo(number)) for number in (1, 2)]
    found = find_pairs(tmp_path)
    assert found.pairs == before.pairs and found.alone == [] and capsys.readouterr().err == ""
    if "_x" not in result:
        told = ", ".join(str(path.relative_to(tmp_path)) for path in results)
        find_pairs(tmp_path)
        assert found.unused == [] and f"left out 2 (results of an earlier run): {told}\n" in capsys.readouterr().out


def test_results_that_the_caller_knows_are_not_told_of(tmp_path, capsys, monkeypatch):
    save(tmp_path / "input/1.png", photo(1))
    save(tmp_path / "target/1.png", photo(1))
    known = {os.path.realpath(derained(tmp_path / "1.png", photo(1)))}
    assert relative(find_pairs(tmp_path, known=known).pairs, tmp_path) == [("input/1.png", "target/1.png")]
    known = {os.path.realpath(derained(tmp_path / "input/2.png", photo(1)))}
    (tmp_path / "1.png").unlink()
    monkeypatch.chdir(tmp_path)
    found = find_pairs("input", known=known)
    assert len(found.pairs) == 1 and found.alone == found.unused == []
    assert capsys.readouterr().out == ""


def test_results_are_no_clean_images_to_train_on(run, refused, tmp_path):
    """Unless --clean_path names their folder; and others that are there are found."""
    for number in (1, 2):
        save(tmp_path / f"set/input/{number}.png", photo(number))
        derained(tmp_path / f"set/clean/{number}.png", photo(number))
        save(tmp_path / f"set/hq/{number}.png", photo(number))
    told = "the pictures in clean are results of an earlier run and no clean images"
    result = run("pairs", "--check", tmp_path / "set", tmp_path / "set")
    assert result.status == 0 and told in result.out and "2 of 2 pairs" in result.out
    assert relative(find_pairs(tmp_path / "set").pairs, tmp_path / "set")[0] == ("input/1.png", "hq/1.png")
    shutil.rmtree(tmp_path / "set/hq")
    refused("pairs", "--check", tmp_path / "set", tmp_path / "set", names=["--check", "results of an earlier run"])
    way_out = f"--clean_path {tmp_path / 'set/clean'}"
    refused("train", "--data_path", tmp_path / "set", names=["results of an earlier run; expected others", way_out])
    found = find_pairs(tmp_path / "set/input", clean_folder=tmp_path / "set/clean")
    assert len(found.pairs) == 2


def test_a_folder_of_results_is_taken_where_it_is_named(tmp_path):
    """To derain what was derained, and to measure that."""
    for number in (1, 2):
        derained(tmp_path / f"once/{number}.png", photo(number))
        save(tmp_path / f"dry/{number}.png", photo(number))
    assert len(find_pairs(tmp_path / "once", required=False).alone) == 2
    assert len(find_pairs(tmp_path / "once", clean_folder=tmp_path / "dry").pairs) == 2


# Options of the scripts


def test_no_option_is_advised_that_the_script_does_not_have(refused, tmp_path):
    touch(tmp_path, ["photos/a.png", "photos/gt/b.png"])
    for script in ("rain_stats", "ablation"):
        message = refused(script, "--data_path", tmp_path / "photos", names=["--data_path", "no rainy/clean pairs"])
        assert "--rain_synth" not in message and "--clean_path" not in message


def test_clean_path_names_the_clean_folder(tmp_path):
    touch(tmp_path, ["wet/a.png", "wet/b.png", "wet/c.png", "elsewhere/dry/a.jpg", "elsewhere/dry/b.png", "wet/d.txt"])
    dry = tmp_path / "elsewhere/dry"
    pairs, alone, unused = find_pairs(tmp_path / "wet", clean_folder=dry)
    assert relative(pairs, tmp_path) == [("wet/a.png", "elsewhere/dry/a.jpg"), ("wet/b.png", "elsewhere/dry/b.png")]
    assert names(alone) == ["c.png"] and unused == []
    (dry / "a.png").touch()
    with pytest.raises(InputError, match="a.jpg and a.png have one name"):
        find_pairs(tmp_path / "wet", clean_folder=dry)
    with pytest.raises(InputError, match=f"--clean_path {tmp_path / 'none'}: no such folder"):
        find_pairs(tmp_path / "wet", clean_folder=tmp_path / "none")
    touch(tmp_path, ["others/x.png"])
    with pytest.raises(InputError, match=f"--clean_path {tmp_path / 'others'}: no image goes by its name with one in"):
        find_pairs(tmp_path / "wet", clean_folder=tmp_path / "others")


@pytest.mark.parametrize("twin", ["rain-01.png", "Rain-1.png", "rain_1.png"])
def test_two_rainy_images_of_one_clean_image_are_an_error_that_names_both(tmp_path, twin):
    touch(tmp_path, ["rain-1.png", twin, "norain-001.png", "rain-2.png", "norain-2.png"])
    with pytest.raises(InputError, match="one clean image|one name") as caught:
        find_pairs(tmp_path)
    assert "rain-1.png" in str(caught.value) and twin in str(caught.value)
    touch(tmp_path / "other", ["rain-1.png", "rain-01.png", "norain-1.png", "norain-01.png"])
    assert len(find_pairs(tmp_path / "other").pairs) == 2, "each has its own"


def test_twins_of_halves_are_an_error(tmp_path):
    touch(tmp_path, ["1.jpg", "1.png", "2.png"])
    with pytest.raises(InputError, match="1.jpg and 1.png"):
        find_pairs(tmp_path, rainy_half="left")


def test_folders_with_spaces_and_names_in_another_case(tmp_path):
    touch(tmp_path / "set", ["rainy image/IMG_1.JPG", "Ground Truth/img_0001.png"])
    for folder in (tmp_path / "set", tmp_path / "set/rainy image"):
        assert len(find_pairs(folder).pairs) == 1


def test_the_clean_images_beside_a_link_to_the_rainy_ones_are_found(tmp_path):
    touch(tmp_path, ["store/a/1.png", "store/b/1.png"])
    (tmp_path / "set").mkdir()
    for name, place in (("input", "a"), ("target", "b")):
        (tmp_path / "set" / name).symlink_to(tmp_path / "store" / place)
    assert relative(find_pairs(tmp_path / "set/input").pairs, tmp_path) == [("set/input/1.png", "set/target/1.png")]


def test_a_file_is_its_own_background_even_of_one_colour(tmp_path):
    save(tmp_path / "grey.png", np.full((20, 20, 3), 128, np.uint8))
    first, second = (Pair(tmp_path / name, tmp_path / "grey.png") for name in ("rain-1.png", "rain-2.png"))
    assert Backgrounds().partners([first], [second]) == [second]


def test_clean_path_may_be_the_folder_itself(tmp_path):
    touch(tmp_path, ["1_in.png", "1_gt.png", "2_in.png"])
    pairs, alone, _ = find_pairs(tmp_path, clean_folder=tmp_path)
    assert relative(pairs, tmp_path) == [("1_in.png", "1_gt.png")] and names(alone) == ["2_in.png"]


# Both images in one picture


@pytest.mark.parametrize("half", ["left", "right"])
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_halves_of_a_picture_are_a_pair(tmp_path, half, suffix):
    clean = photo(1, 40, 50)
    rainy = with_rain(clean)
    picture = np.hstack((rainy, clean) if half == "left" else (clean, rainy))
    path = tmp_path / f"1.{suffix}"
    Image.fromarray(picture).save(path, lossless=True)
    (pair,), alone, unused = find_pairs(tmp_path, rainy_half=half)
    assert pair == (path, path, half) and alone == unused == []
    assert pair_size(pair) == (40, 50)
    for image, expected in zip(read_pair(pair), (rainy, clean), strict=True):
        assert image.dtype == np.uint8 and np.array_equal(image, expected)


def test_pictures_of_16_bits_are_cut_too(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (16, 32, 3), np.uint16)
    pair = Pair(save(tmp_path / "a.png", deep), tmp_path / "a.png", "right")
    rainy, clean = read_pair(pair)
    assert np.array_equal(rainy, np.rint(deep[:, 16:] / 257)) and np.array_equal(clean, np.rint(deep[:, :16] / 257))


def test_case_of_side_by_side(shared):
    folder = shared / "cases/side_by_side/Rain800_side_by_side"
    with pytest.raises(InputError, match="no rainy/clean pairs"):
        find_pairs(folder)
    pairs, alone, unused = find_pairs(folder, rainy_half="left")
    assert len(pairs) == 3 and alone == unused == []
    for pair in pairs:
        rainy, clean = read_pair(pair)
        assert pair_size(pair) == rainy.shape[:2] == clean.shape[:2]
        assert np.array_equal(np.hstack((rainy, clean)), read_rgb(pair.rainy))


def test_an_odd_width_is_named(tmp_path):
    path = save(tmp_path / "1.png", photo(1, 40, 51))
    pair = Pair(path, path, "left")
    for look in (pair_size, read_pair):
        with pytest.raises(InputError, match=f"{path} is 51 px wide; expected an even width"):
            look(pair)


def test_a_layout_comes_before_halves(pairs_dir):
    assert find_pairs(pairs_dir, rainy_half="left") == find_pairs(pairs_dir)


# Sizes


def save_turned(path, image, orientation):
    """Write a picture with an EXIF orientation, in 16 bits where the suffix is .16.png."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    if path.name.endswith(".16.png"):
        image = image[..., 0].astype(np.uint16) * 257
    Image.fromarray(image).save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "16.png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_from_the_headers_are_those_of_the_images(tmp_path, suffix, orientation):
    """A rainy image taken upright beside a clean one that was turned for good, and one that was not."""
    rainy = save_turned(tmp_path / f"rain-1.{suffix}", photo(1, 30, 40), orientation)
    size = (40, 30) if orientation >= 5 else (30, 40)
    good = Pair(rainy, save(tmp_path / "norain-1.png", photo(2, *size)))
    images = read_pair(good)
    assert pair_size(good) == size and all(image.shape == (*size, 3) for image in images)
    bad = Pair(rainy, save(tmp_path / "other.png", photo(2, *reversed(size))))
    messages = []
    for look in (pair_size, read_pair):
        with pytest.raises(InputError) as caught:
            look(bad)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert all(part in messages[0] for part in (str(rainy), "other.png", "40x30", "30x40", "expected equal sizes"))


# Backgrounds


def views(image):
    """An image and what is made of it: {how: image}."""
    height, width = image.shape[:2]
    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 25])[1]
    made = {
        "as it is": image, "recompressed": cv2.imdecode(jpeg, cv2.IMREAD_COLOR), "mirrored": image[:, ::-1],
        "half the size": cv2.resize(image, (width // 2, height // 2)),
        "twice the size": cv2.resize(image, (2 * width, 2 * height)), "cut all around": image[5:-5, 5:-5],
        "cut at two sides": image[5:, :-5], "cut and mirrored": image[:-5, 5:][:, ::-1],
    }
    assert np.abs(made["recompressed"].astype(int) - image).max() > 5
    return made


def clean_pairs(folder):
    return [Pair(path, path) for path in list_images(folder)]


def partner_names(pairs, others):
    partners = Backgrounds().partners(pairs, others)
    assert len(partners) == len(pairs)
    return [partner and partner.clean.name for partner in partners]


@pytest.mark.parametrize("how", views(photo(0, 160, 240)))
def test_a_changed_photograph_is_recognised(tmp_path, how):
    for number in range(6):
        image = photo(number, 160, 240)
        save(tmp_path / f"all/{number}.png", image)
        save(tmp_path / f"views/{number}.png", views(image)[how])
    save(tmp_path / "views/other.png", photo(7, 160, 240))
    expected = [f"{number}.png" for number in range(6)]
    assert partner_names(clean_pairs(tmp_path / "views"), clean_pairs(tmp_path / "all")) == [*expected, None]


def test_photographs_that_are_merely_alike_are_different(tmp_path):
    """Two of BSD correlate by 0.90."""
    first, second = photo(1, 160, 240).astype(float), photo(2, 160, 240)
    alike = (first + 0.5 * second) / 1.5
    small = [cv2.resize(image.mean(2), (16, 16), interpolation=cv2.INTER_AREA).ravel() for image in (first, alike)]
    assert 0.88 < np.corrcoef(small)[0, 1] < 0.93
    save(tmp_path / "first/1.png", first.astype(np.uint8))
    save(tmp_path / "alike/1.png", alike.astype(np.uint8))
    assert partner_names(clean_pairs(tmp_path / "first"), clean_pairs(tmp_path / "alike")) == [None]


def test_changed_real_photographs_are_recognised(shared, tmp_path):
    pairs = find_pairs(shared / "data/test/Rain100L").pairs[::7]
    for pair in pairs:
        for how, image in views(read_rgb(pair.clean)).items():
            save(tmp_path / f"{how}/{pair.clean.name}", image)
    for folder in tmp_path.iterdir():
        assert partner_names(clean_pairs(folder), pairs) == [pair.clean.name for pair in pairs], folder.name


def test_nothing_shares_a_background_with_nothing(pairs_dir):
    pairs = find_pairs(pairs_dir).pairs
    assert partner_names(pairs, []) == [None] * 3 and partner_names([], pairs) == []


def test_the_clean_half_is_what_is_compared(tmp_path):
    """Of a picture with both halves."""
    for number in (1, 2):
        save(tmp_path / f"both/{number}.png", np.hstack((photo(number), photo(10 * number))))
        save(tmp_path / f"clean/{number}.png", photo(number))
    pairs = find_pairs(tmp_path / "both", rainy_half="right").pairs
    assert partner_names(pairs, clean_pairs(tmp_path / "clean")) == ["1.png", "2.png"]
    pairs = find_pairs(tmp_path / "both", rainy_half="left").pairs
    assert partner_names(pairs, clean_pairs(tmp_path / "clean")) == [None, None]


def test_each_image_is_read_once(pairs_dir):
    """Files that are gone by the second time are not missed."""
    backgrounds, pairs = Backgrounds(), find_pairs(pairs_dir).pairs
    first = backgrounds.partners(pairs, pairs[:2])
    for pair in pairs:
        pair.clean.unlink()
    assert backgrounds.partners(pairs, pairs[:2]) == first == [*pairs[:2], None]


@pytest.mark.slow
def test_real_training_photographs_are_told_from_test_backgrounds(shared):
    """RainTrainL, RainTrainH's 18 pairs and the clean photographs have no test background; Rain100H has Rain100L's."""
    data = shared / "data"
    test = find_pairs(data / "test/Rain100L").pairs
    backgrounds = Backgrounds()
    sets = [find_pairs(data / "train" / name).pairs for name in ("RainTrainL", "RainTrainH")]
    for pairs in (*sets, clean_pairs(data / "clean")):
        assert not any(backgrounds.partners(pairs, test))
    assert all(backgrounds.partners(find_pairs(data / "test/Rain100H").pairs, test))
    for number, pair in enumerate(sets[0]):  # nor do two of RainTrainL look the same
        assert backgrounds.partners([pair], sets[0][:number] + sets[0][number + 1 :]) == [None]


def test_all_backgrounds_of_raintrainh_are_among_the_clean_photographs(shared):
    """They must not be validated on where those photographs are trained on."""
    pairs, clean = find_pairs(shared / "data/train/RainTrainH").pairs, clean_pairs(shared / "data/clean")
    partners = Backgrounds().partners(pairs, clean)
    assert len(pairs) == 18 and all(partners)
    assert all(np.array_equal(read_rgb(pair.clean), read_rgb(other.clean)) for pair, other in zip(pairs, partners))


# Holding out


def test_held_out_pairs_are_evenly_spaced(tmp_path):
    pairs = find_pairs(make_pairs(tmp_path, range(1, 13))).pairs
    assert [hold_out(pairs, count) for count in (0, 1, 12, 13)] == [[], pairs[:1], pairs, pairs]
    assert hold_out(pairs, 4) == pairs[::3] and hold_out(pairs, 5) == [pairs[k] for k in (0, 2, 4, 7, 9)]


def test_rain_train_l_with_20_held_out(shared):
    """The numbers of ../shared/data/val/RainHeavy, whose backgrounds these are."""
    pairs = find_pairs(shared / "data/train/RainTrainL").pairs
    heavy = find_pairs(shared / "data/val/RainHeavy").pairs
    chosen = hold_out(pairs, 20)
    assert [pair.rainy.name for pair in chosen] == [f"rain-{n}.png" for n in range(1, 200, 10)]
    assert [pair.rainy.stem for pair in heavy] == [pair.rainy.stem for pair in chosen]
    assert Backgrounds().partners(heavy, chosen) == chosen


def test_one_version_of_each_background_is_held_out(tmp_path):
    """They take turns in which one it is."""
    for number in range(6):
        save(tmp_path / f"ground_truth/{number}.png", photo(number))
        for version in range(1, 4):
            save(tmp_path / f"rainy_image/{number}_{version}.png", photo(number))
    chosen = hold_out(find_pairs(tmp_path).pairs, 6)
    assert [pair.rainy.stem for pair in chosen] == ["0_1", "1_2", "2_3", "3_1", "4_2", "5_3"]


def test_one_background_under_several_names_is_held_out_once(tmp_path):
    """As rain.py --per_image writes them, or mirrored."""
    for number in range(8):
        clean = photo(number // 2)
        clean = clean[:, ::-1] if number % 4 == 1 else clean
        save(tmp_path / f"norain-{number}.png", clean)
        save(tmp_path / f"rain-{number}.png", with_rain(clean, number))
    pairs = find_pairs(tmp_path).pairs
    for count in (2, 3, 4, 6, 8):
        chosen = hold_out(pairs, count)
        assert len({int(pair.rainy.stem[5:]) // 2 for pair in chosen}) == len(chosen) == min(count, 4)


# The command


def test_planted_test_backgrounds_are_found(tmp_path, run):
    """Training pairs that show test background 2: in five ways; and one that shows none."""
    background = photo(100, 160, 240)
    for number in range(4):
        clean = background if number == 2 else photo(200 + number, 160, 240)
        save(tmp_path / f"test/norain-{number}.png", clean)
        save(tmp_path / f"test/rainy/rain-{number}.png", with_rain(clean))
    kinds = ("as it is", "recompressed", "mirrored", "half the size", "cut at two sides")
    for number, clean in enumerate([*(views(background)[kind] for kind in kinds), photo(300, 160, 240)]):
        save(tmp_path / f"train/target/{number}.png", clean)
        save(tmp_path / f"train/input/{number}.png", with_rain(clean, 7))
    result = run("pairs", "--check", tmp_path / "train", tmp_path / "test")
    assert result.status == 0 and result.err == ""
    *lines, last = result.out.splitlines()
    test = tmp_path / "test"
    assert lines == [f"{number}.png: {number}.png is norain-2.png of {test}" for number in range(5)]
    assert last == f"5 of 6 pairs show a background of {test}"


def test_side_by_side_sets_are_checked(tmp_path, run):
    for folder, number, name in (("train", 1, "a"), ("train", 2, "b"), ("test", 2, "1")):
        clean = photo(number, 160, 240)
        save(tmp_path / folder / f"{name}.png", np.hstack((with_rain(clean), clean)))
    result = run("pairs", "--check", tmp_path / "train", tmp_path / "test", "--side_by_side", "left")
    test = tmp_path / "test"
    assert result.out == f"b.png: b.png is 1.png of {test}\n1 of 2 pairs show a background of {test}\n", result


def test_check_names_what_is_not_compared(tmp_path, run):
    train, test = (make_pairs(tmp_path / name) for name in ("train", "test"))
    (test / "rain-2.png").unlink()
    result = run("pairs", "--check", train, test)
    assert f"{test}: left out 1 (no pair by their names): norain-2.png\n" in result.out and result.status == 0


def test_the_command_of_the_docstring_from_another_folder(tmp_path):
    sample = ROOT / "datasets/test/RainSample"
    child = run_subprocess("pairs.py", "--check", sample, sample, cwd=tmp_path)
    out, err = child.communicate(timeout=60)
    count = len(find_pairs(sample).pairs)
    assert child.returncode == 0 and err == ""
    assert out.endswith(f"{count} of {count} pairs show a background of {sample}\n")
