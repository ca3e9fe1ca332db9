"""What test.py reads: the pictures, their clean images and the videos that --test_data_path names.

    python -c "from inputs import find_in_folder; print(find_in_folder)"

Each file of a folder is used, or named as left out because no pair fits it, or named as neither picture nor video. Only
hidden files, unfinished ones and this program's own go unnamed.
"""
import os
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from images import NoImages, is_image, is_shadow, is_video
from layouts import (
    CLEAN_FOLDERS, Pair, best_match, candidate_folders, find_pairs, match_results, pictures_below, plain_name,
    report_left_out, tell_of_unread,
)
from outputs import is_result, without_overviews
from utils import InputError, natural_key, printable
from video_input import is_pattern


def common_path(paths):
    """The path of --test_data_path where it is one, else the folder that they all are in."""
    if len(paths) == 1:
        return paths[0]
    return Path(os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths]))


class Inputs(NamedTuple):
    """What --test_data_path names."""

    pictures: list  # of (``Pair``, the folder of its result below --output_path, its result by another method or None)
    clips: list  # of (path of a video, the folder of its result below --output_path)
    unused: list  # paths of images left out, which must not be overwritten either
    others: list  # paths of files that are neither used nor left out by their names
    missing: list  # paths of images that the other method has no result of


def is_clip(path):
    """Whether the one file of the command line goes to the video reader, as all that is no image does."""
    return is_pattern(path) or is_video(path) or not is_image(path)


def files_in(folder):
    """The files directly in ``folder``, without those that macOS leaves beside others."""
    files = (path for path in Path(folder).iterdir() if not path.is_dir() and not is_shadow(path))
    return sorted(files, key=natural_key)


def files_below(folder, left_out):
    """``files_in`` for ``folder`` and the folders below, linked ones too, without the folder ``left_out`` below it."""
    paths, seen = [], {os.path.realpath(left_out)} - {os.path.realpath(folder)}
    unread = []
    for place, folders, names in os.walk(folder, followlinks=True, onerror=unread.append):
        real = os.path.realpath(place)
        if real in seen:  # a link may lead back up
            folders.clear()
            continue
        seen.add(real)
        paths += [path for name in names if not is_shadow(path := Path(place, name))]
    for error in unread:
        tell_of_unread(error.filename, error.strerror)
    return sorted(paths, key=natural_key)


def earlier_results(files, folder, args):
    """Those pictures and videos of an input folder that an earlier run has made, where the results go there too."""
    if os.path.realpath(folder) != os.path.realpath(args.output_path):
        return []
    return [path for path in files if (is_image(path) or is_video(path)) and is_result(path)]


def find_set(folder, earlier, clean, args):
    """Find the pairs of a folder, and say which of them are not measured and which images are left out.

    Args:
        folder: of --test_data_path.
        earlier: real paths of ``earlier_results``, which are no inputs.
        clean: {real path: ...} of the clean images of other folders, which are left out.

    Returns:
        (list of ``Pair``, whose clean image is None where there is none; paths of the images left out).
    """
    rainy_half = args.side_by_side
    found = find_pairs(folder, "--test_data_path", args.clean_path, rainy_half, required=False, known=earlier)
    if rainy_half and not all(pair.rainy_half for pair in found.pairs):
        raise InputError(
            f"--side_by_side {rainy_half}: {folder} has rainy and clean images in files of their own,"
            f" such as {found.pairs[0].rainy.name} and {found.pairs[0].clean.name}; expected both in one"
        )
    alone = [path for path in found.alone if os.path.realpath(path) not in clean]
    named = {os.path.realpath(path) for path in args.inputs}  # by themselves, so that they are not left out
    unused = [path for path in found.unused if os.path.realpath(path) not in named]
    report_left_out(folder, unused)
    if alone and found.pairs:
        names = ", ".join(printable(image.name) for image in alone)
        print(f"{printable(folder)}: {len(alone)} without a clean image, derained but not measured: {names}")
    elif alone:
        which = "the one is" if len(alone) == 1 else f"all {len(alone)} are"
        print(f"{printable(folder)}: no clean images, so {which} derained but not measured")
    pairs = [*found.pairs, *(Pair(image, None) for image in alone)]
    return sorted(pairs, key=lambda pair: natural_key(pair.rainy)), unused


def find_in_folder(folder, below, args, clean):
    """The ``Inputs`` of one folder, whose results go to the folder ``below`` under --output_path.

    ``clean`` are the real paths of the clean images of folders that came before: they are no inputs, except with
    --recursive.
    """
    # By default a folder for each model, all of which are left out.
    output = args.output_path if args.given_output else args.output_path.parent
    files = files_below(folder, output) if args.recursive else files_in(folder)
    results = earlier_results(files, folder, args)
    report_left_out(folder, results, "results of an earlier run")
    earlier, pairs, unused = {os.path.realpath(path) for path in results}, [], []
    if args.recursive:
        pairs = [Pair(path, None) for path in files if is_image(path) and os.path.realpath(path) not in earlier]
    else:
        with suppress(NoImages):  # there may be videos
            pairs, unused = find_set(folder, earlier, clean, args)
        places = {os.path.realpath(pair.rainy.parent): pair.rainy.parent for pair in pairs}
        places.pop(os.path.realpath(folder), None)
        files += [path for place in places.values() for path in files_in(place)]
    disguised = {pair.rainy for pair in pairs if pair.clean is None and is_video(pair.rainy)}  # such as a video.gif
    pairs = [pair for pair in pairs if pair.rainy not in disguised]
    used = {os.path.realpath(path) for path in (*paths_of(pairs), *unused)} | earlier
    rest = [path for path in files if os.path.realpath(path) not in used]
    theirs = {os.path.realpath(path) for path in rest} & clean.keys()
    rest = [path for path in rest if os.path.realpath(path) not in theirs]
    clips = [path for path in rest if is_video(path)]
    if not pairs and not clips and not theirs:
        where, advice = " or below it" if args.recursive else "", ""
        if not args.recursive and (places := pictures_below(folder)):
            advice = f", but pictures in {places}; expected the folder of the rainy ones, and --clean_path with that of"
            advice += " the clean ones where there are some, or --recursive, which takes all as rainy"
        raise NoImages(f"--test_data_path {folder}: neither images nor videos in this folder{where}{advice}")
    named = {os.path.realpath(path) for path in args.inputs}  # by themselves, so that their turn comes

    def place_of(path):
        return below / path.parent.relative_to(folder) if args.recursive else below

    return Inputs(
        [(pair, place_of(pair.rainy), None) for pair in pairs], [(path, place_of(path)) for path in clips], unused,
        [path for path in rest if path not in clips and not is_of_no_interest(path)
         and os.path.realpath(path) not in named], [],
    )


def is_of_no_interest(path):
    """Whether a file need not be named: it is hidden, half written, or one of this program's own."""
    return path.name.startswith(".") or path.suffix == ".tmp" or is_result(path)


def paths_of(pairs):
    """The paths of all images of ``pairs``."""
    return [path for pair in pairs for path in (pair.rainy, pair.clean) if path]


def find_file(path, below, args):
    """The ``Inputs`` of one file, whose result goes to the folder ``below`` under --output_path."""
    if len(args.inputs) > 1 and earlier_results([path], path.parent, args):
        report_left_out(path.parent, [path], "result of an earlier run")
        return Inputs([], [], [], [], [])
    if is_video(path) or is_pattern(path) or len(args.inputs) == 1 and is_clip(path):
        return Inputs([], [(path, below)], [], [], [])
    if is_image(path):
        half = args.side_by_side
        return Inputs([(Pair(path, path if half else None, half), below, None)], [], [], [], [])
    return Inputs([], [], [], [path], [])


def without_known(inputs, known):
    """``inputs`` without the files that are in ``known``, to which the others are added."""

    def is_new(path):
        # By folder and name: two links to one picture are two pictures, as they are within a folder.
        place = os.path.join(os.path.realpath(path.parent), path.name)
        new = place not in known
        known.add(place)
        return new

    return inputs._replace(
        pictures=[picture for picture in inputs.pictures if is_new(picture[0].rainy)],
        clips=[clip for clip in inputs.clips if is_new(clip[0])],
        others=[path for path in inputs.others if is_new(path)],
    )


def tell_of_clean_images(pictures):
    """Say which pictures that are named by themselves, and so are not measured, have clean images in a known layout."""
    folders = {}
    for path in pictures:
        folders.setdefault(path.parent, []).append(path)
    for folder, paths in folders.items():
        with suppress(InputError, OSError):  # two files of one stem; a folder beside that may not be read
            found = best_match(candidate_folders(folder))
            clean = {os.path.realpath(pair.rainy): pair.clean for pair in found.pairs} if found else {}
            theirs = [clean[place] for path in paths if (place := os.path.realpath(path)) in clean]
            if theirs:
                has = "a picture has a clean image" if len(theirs) == 1 else f"{len(theirs)} pictures have clean images"
                example = os.path.relpath(theirs[0], folder)
                print(f"{printable(folder)}: {has} ({printable(example)}); name the folder to have them measured")


def order_of(path):
    """Sort key for the paths of --test_data_path, of which some say what others are.

    Of a folder and a file in it the folder comes first, as there the file may have its clean image. Of folders those of
    clean images come last, so that it is known whose clean images they are.
    """
    return not path.is_dir(), plain_name(Path(os.path.abspath(path)).name) in CLEAN_FOLDERS


def find_inputs(args):
    """The ``Inputs`` of all paths of --test_data_path, and a line about those that are not measured or left out."""
    found, known, clean = {}, set(), {}  # clean: {real path of a clean image: its path if it is named as an input too}
    for path in sorted(args.inputs, key=order_of):
        below = Path()
        if len(args.inputs) > 1:
            below = Path(os.path.relpath(path if path.is_dir() else path.parent, args.test_data_path))
        if path.is_file() and os.path.realpath(path) in clean:
            clean[os.path.realpath(path)] = path
            found[path] = Inputs([], [], [], [], [])
            continue
        try:
            new = find_in_folder(path, below, args, clean) if path.is_dir() else find_file(path, below, args)
        except NoImages:  # a glob may well name a folder without pictures
            if len(args.inputs) == 1:
                raise
            new = Inputs([], [], [], [path], [])
        found[path] = without_known(new, known)
        if path.is_dir():
            inside = [file for file in files_in(path) if os.path.realpath(file) in clean] if clean else []
            clean |= {os.path.realpath(file): file for file in inside}
        others = [pair.clean for pair, *_ in new.pictures if pair.clean not in (None, pair.rainy)]
        clean |= {os.path.realpath(path): None for path in others}
    named = sorted(filter(None, clean.values()), key=natural_key)
    report_left_out(args.test_data_path, named, "clean images of others")
    inputs = Inputs(*(list(chain(*lists)) for lists in zip(*(found[path] for path in args.inputs))))
    if not inputs.pictures and not inputs.clips:
        own = all(path.is_file() and earlier_results([path], path.parent, args) for path in args.inputs)
        what = "a result of an earlier run" if own else "neither an image nor a video"
        raise InputError(f"--test_data_path {args.inputs[0]}: {what}, as all the others")
    if not args.no_reference:
        named = {path for path in args.inputs if path.is_file()}
        tell_of_clean_images(pair.rainy for pair, *_ in inputs.pictures if pair.clean is None and pair.rainy in named)
    return inputs


def find_results(args):
    """The ``Inputs`` under --results_path: pairs, each with the picture that another method made of its rainy image.

    With --no_reference rainy images that have no clean one count too.
    """
    folder, from_folder = args.test_data_path, args.results_path
    found = find_pairs(
        folder, "--test_data_path", args.clean_path, args.side_by_side, not args.no_reference, ("--clean_path",)
    )
    if not found.pairs and not args.no_reference:
        raise InputError(f"--test_data_path {folder}: no clean images; expected --clean_path, the folder of them")
    pairs, left_out = found.pairs, found.alone + found.unused
    if args.no_reference:
        pairs, left_out = [*found.pairs, *(Pair(path, None) for path in found.alone)], found.unused
        if found.alone:
            print(f"{printable(folder)}: no clean images of {len(found.alone)}, so no PSNR and SSIM of these")
    results, unused = match_results(pairs, from_folder)
    report_left_out(folder, left_out)
    report_left_out(from_folder, without_overviews(unused), "no image of the set by their names")
    matched = list(zip(pairs, results))
    missing = [pair.rainy for pair, result in matched if not result]
    return Inputs([(pair, Path(), result) for pair, result in matched if result], [], unused, [], missing)
