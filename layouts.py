"""Find rainy images and the clean ones that belong to them in the field's folder layouts, by folders and names alone.

    python -c "from layouts import find_pairs; print(*find_pairs('datasets/test/RainSample').pairs, sep='\\n')"

prints the pairs of the bundled sample. A layout is a row of the tables below. What is in the images is for pairs.py.
"""
import os
import re
from collections import Counter, defaultdict
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple

from images import NoImages, entries_in, find_images, is_marked, list_images
from utils import InputError, natural_key, printable

# Layouts: any rainy folder below goes with any clean folder, in any case of their names; "." is the data set's own.
RAINY_FOLDERS = ("rainy", ".", "rainy_image", "input", "rain", "rain/x2", "lq", "data", "in", "rainy_images")
CLEAN_FOLDERS = (
    ".", "ground_truth", "target", "norain", "gt", "groundtruth", "clean", "no_rain", "hq", "clean_images",
)


class Names(NamedTuple):
    """How the stems of a rainy and of its clean image are written: the group is what both have in common."""

    rainy: str  # regular expression with one group
    clean: str
    one_folder: bool  # whether the names alone tell rainy from clean, so that both may lie in one folder
    several: bool = False  # whether an image may have several rainy versions


NAMES = (
    Names(r"rain[-_]?(\d+)", r"no_?rain[-_]?(\d+)", True),  # RainTrainH, RainTrainL, Rain100H, Rain100L, Rain800
    Names(r"(.+)", r"(.+)", False),  # equal names: Rain13K and its test sets, Rain200 as often repacked
    Names(r"(.+)_\d+", r"(.+)", False, True),  # several rainy versions of an image: Rain12600, Rain1400
    Names(r"norain-(\d+)x2", r"norain-(\d+)", False),  # Rain200H, Rain200L as distributed
    Names(r"(.+)", r"(.+?)[-_]?gt", False),  # SPA
    Names(r"(.+)_in", r"(.+)_gt", True),  # Rain12
    Names(r"(.+)_rain", r"(.+)_clean", True),  # RainDrop
    Names(r"(.+)_s\d+_a\d+", r"(.+)", False, True),  # Outdoor-Rain
    Names(r"(.+)_rain", r"(.+)_norain", True),
    Names(r"rain-(\d+)", r"clean-(\d+)", True),
    Names(r"rain-(\d+)x2", r"norain-(\d+)", True),  # Rain200H, Rain200L with their rainy images renamed
    Names(r"(\d+)x2", r"(\d+)", False),
    Names(r"(?:rd|rain|rd-rain)-(\d+)", r"norain-(\d+)", False, True),  # RainDS of real rain
    Names(r"pie-(?:rd|rain|rd-rain)-(\d+)", r"pie-norain-(\d+)", False, True),  # RainDS of drawn rain
    Names(r"(.+_leftImg8bit)_rain_.+", r"(.+_leftImg8bit)", True, True),  # RainCityscapes
    # GT-Rain. Of the clean images of a scene it has this one; a stereo camera may have R-001 and C-001.
    Names(r"(.+)-R-\d+", r"(.+)-C-000", True, True),
)


class Pair(NamedTuple):
    """A rainy image and its clean one, which is None where there is no ground truth."""

    rainy: Path
    clean: Path | None
    rainy_half: str | None = None  # "left" or "right": both are halves of one picture, and this one is the rainy


# Finding pairs


class Found(NamedTuple):
    """What ``find_pairs`` found in a folder, each list in natural order."""

    pairs: list  # of ``Pair``, all with a clean image
    alone: list  # paths of rainy images without a clean one
    unused: list  # paths of the other images: clean ones without a rainy one, and names that fit no layout


def without_padding(text):
    """The text with its numbers as they are without leading zeros, so that rain-1 goes with norain-001."""
    return re.sub(r"\d+", lambda match: str(int(match[0])), text)


def match_names(rainy_paths, clean_paths, names):
    """Match the images of a rainy and of a clean folder, which may be the same, by one row of ``NAMES``.

    Returns:
        (``Found``, two paths of which it is not clear which belongs to a pair, or None).
    """
    exact, unpadded = defaultdict(list), defaultdict(list)
    for path in clean_paths:
        match = re.fullmatch(names.clean, path.stem, re.DOTALL | re.IGNORECASE)
        if match:
            exact[match[1]].append(path)
            unpadded[without_padding(match[1].lower())].append(path)
    pairs, alone, stems, used = [], [], defaultdict(list), set()
    for path in rainy_paths:
        match = re.fullmatch(names.rainy, path.stem, re.DOTALL | re.IGNORECASE)
        if match is None:
            continue
        partners = exact.get(match[1]) or unpadded.get(without_padding(match[1].lower()), ())
        stems[path.stem if names.several or not partners else partners[0]].append(path)
        used.update((path, *partners))
        if partners:
            pairs.append((path, partners))
        else:
            alone.append(path)
    twins = next((paths for paths in (*stems.values(), *(both for _, both in pairs)) if len(paths) > 1), None)
    unused = sorted({*rainy_paths, *clean_paths} - used, key=natural_key)
    return Found([Pair(path, partners[0]) for path, partners in pairs], alone, unused), twins


@cache  # so that a folder that is looked at twice is told of once
def tell_of_unread(folder, reason):
    """Say that a folder could not be read, which costs nothing else."""
    print(f"{printable(folder)}: could not be read ({reason})", flush=True)


def look_into(folder, look):
    """The list that ``look(folder)`` returns; an empty one where the folder may not be read, which is told of."""
    try:
        return look(folder)
    except OSError as error:
        tell_of_unread(folder, error.strerror)
        return []


def folders_in(folder):
    """The folders directly in ``folder``, in the order of their names."""
    return look_into(folder, lambda folder: sorted(entries_in(folder, folders=True)))


def plain_name(name):
    """A folder's name in lower case, with _ for a space or a hyphen."""
    return re.sub("[ -]", "_", name.lower())


def subfolders(folder, names):
    """{name: folder} of those ``names`` that ``folder`` has by ``plain_name``; "." is ``folder`` itself."""
    there = {}
    for name in names:
        places = [folder]
        for part in name.split("/") if name != "." else ():
            places = sorted(child for place in places for child in folders_in(place) if plain_name(child.name) == part)
        if places:
            there[name] = places[0]
    return there


def candidate_folders(folder):
    """Yield (rainy folder, clean folder) where the data set ``folder`` may keep its images.

    ``folder`` may also be the data set's folder of rainy images, such as Rain100H/rainy.
    """
    roots = {folder: RAINY_FOLDERS}
    # A link may stand beside the clean images, or lead to a folder beside them.
    places = {Path(os.path.abspath(folder)), folder.resolve()}
    for place, name in product(sorted(places), RAINY_FOLDERS):
        parts = name.split("/")
        for depth in range(1, len(parts) + 1):
            if [plain_name(part) for part in place.parts[-depth:]] == parts[:depth]:
                roots.setdefault(place.parents[depth - 1], []).append(name)
    for root, rainy_folders in roots.items():
        clean_folders = subfolders(root, CLEAN_FOLDERS).values()
        for rainy in subfolders(root, rainy_folders).values():
            yield from ((rainy, clean) for clean in clean_folders)


def most_pairs(candidates, images):
    """The ``Found`` with the most pairs over all (rainy folder, clean folder) and ``NAMES``.

    Args:
        candidates: the (rainy folder, clean folder)s.
        images: {folder: paths of its images}, to which those that are looked at are added.

    Returns:
        (``Found``, two files of one stem in it); None for each where there is none.
    """
    best, best_twins = None, None
    for folders in candidates:
        images.update({place: look_into(place, list_images) for place in folders if place not in images})
        rainy, clean = (images[place] for place in folders)
        for names in NAMES:
            if folders[0] == folders[1] and not names.one_folder:
                continue
            found, twins = match_names(rainy, clean, names)
            if len(found.pairs) > (len(best.pairs) if best else 0):
                best, best_twins = found, twins
    return best, best_twins


def best_match(candidates, images=None, results=None):
    """The ``Found`` of ``most_pairs``, without this program's own results; None where no image has a clean one.

    A result looks like a rainy or a clean image by its folder and its name, and is neither. Where nothing but results
    would be clean images, their rainy images are ``alone`` in what is returned, and there is no pair.

    Args:
        candidates, images: as for ``most_pairs``.
        results: {path of a result that has been left out: whether its folder was taken for that of clean images}, to
            which more are added.

    Raises:
        InputError: it has two files of one stem.
    """
    candidates, images = list(candidates), {} if images is None else images
    results, marked, best = {} if results is None else results, cache(is_marked), None
    while True:
        before = best
        best, twins = most_pairs(candidates, images)
        # Marks are read of what would be taken only, as that takes a while in a long folder.
        pairs = best.pairs if best else []
        clean = {pair.clean.parent for pair in pairs if marked(pair.clean)}
        rainy = [*(pair.rainy for pair in pairs), *(best.alone if best else ()), *(twins or ())]
        places = clean | {path.parent for path in rainy if marked(path)}
        if not places:
            break
        for place in places:
            results |= {path: place in clean for path in images[place] if marked(path)}
            images[place] = [path for path in images[place] if path not in results]
    refuse_twins(twins)
    if best is None and before:
        bare = {*(pair.rainy for pair in before.pairs), *before.alone} - results.keys()
        return Found([], sorted(bare, key=natural_key), []) if bare else None
    return best


def refuse_twins(paths):
    """Refuse two or more files of which it is not clear which belongs to a pair; ``paths`` is None where all is."""
    if paths:
        raise InputError(
            f"{paths[0]} and {paths[1].name} have one name, or one clean image, in common; expected one file for each"
            " image"
        )


def find_pairs(
    folder, option="--data_path", clean_folder=None, rainy_half=None, required=True, ways_out=(), known=frozenset()
):
    """Find the image pairs of a data set from its folder (``RAINY_FOLDERS``, ``CLEAN_FOLDERS``, ``NAMES``).

    Args:
        folder: the data set's folder, or the folder of its rainy images.
        option: the option that the folder comes from, which an error names.
        clean_folder: where the clean images are, if no layout finds them; ``folder`` then has the rainy ones.
        rainy_half: "left" or "right": where no layout fits, each image holds the rainy and the clean one side by side.
        required: whether there must be pairs. If not, a folder without any is real rain: all of it is ``alone``.
        ways_out: which of "--clean_path" and "--rain_synth" the script has for this folder; an error advises these.
        known: real paths of results of an earlier run that are no inputs, and need not be told of.

    Returns:
        ``Found``, whose ``pairs`` can be empty only where none are ``required``.

    Raises:
        InputError: no such folder; nothing to use in it; two files of one stem.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{option} {folder}: no such folder; expected a folder of rainy and clean images")
    paths = [path for path in list_images(folder) if not known or os.path.realpath(path) not in known]
    if clean_folder is not None:
        if not Path(clean_folder).is_dir():
            raise InputError(f"--clean_path {clean_folder}: no such folder; expected the clean images of {folder}")
        return match_clean_folder(folder, paths, Path(clean_folder))
    images, results = {folder: paths}, {}
    found, paths = best_match(candidate_folders(folder), images, results), images[folder]
    report_results(folder, {path: results[path] for path in results if os.path.realpath(path) not in known})
    if found and found.pairs:
        return found._replace(unused=sorted([*found.unused, *strays(folder, images, found)], key=natural_key))
    if found and (required or "--rain_synth" in ways_out):  # the rainy images are no photographs to put rain on
        places = sorted({path.parent for path, as_clean in results.items() if as_clean})
        advice = f", or --clean_path {places[0]} for those" if places and "--clean_path" in ways_out else ""
        raise InputError(
            f"{option} {folder}: no rainy/clean pairs, as the clean images are results of an earlier run; expected"
            f" others{advice}"
        )
    if not found and (required or not paths):  # a folder of photographs may well have a data set below it
        refuse_parent_of_sets(folder, option)
    if rainy_half and (paths or found):
        return side_by_side(found.alone if found else paths, rainy_half)
    if found:
        return found._replace(unused=sorted(strays(folder, images, found), key=natural_key))
    if required:
        refuse_without_pairs(folder, option, paths, ways_out)
    hint, misfit = hint_at_clean_images(folder, paths)
    if hint or misfit:
        told = f"{hint} takes the images there for them" if hint else misfit
        print(printable(f"{folder}: no clean images found by name; {told}"))
    if not paths:
        raise NoImages(f"{option} {folder}: no images in this folder")
    return Found([], paths, [])


def side_by_side(paths, rainy_half):
    """The ``Found`` of pictures that hold both images of a pair."""
    stems = defaultdict(list)
    for path in paths:
        stems[path.stem].append(path)
    refuse_twins(next((both for both in stems.values() if len(both) > 1), None))
    return Found([Pair(path, path, rainy_half) for path in paths], [], [])


def refuse_without_pairs(folder, option, paths, ways_out):
    """Say that there are no pairs in a folder, and what may be done; the arguments are those of ``find_pairs``."""
    hint, misfit = hint_at_clean_images(folder, paths)
    hints = {"--clean_path": hint and f"{hint} if the clean images are those"}
    hints["--rain_synth"] = "--rain_synth for clean photographs alone"
    advice = "".join(f"; or {text}" for name, text in hints.items() if text and name in ways_out)
    expected = "expected for example rain-1.png beside norain-1.png, or input/ and target/ with equal names"
    reason = f" ({misfit})" if misfit else ""
    if not paths and (below := pictures_below(folder)):
        reason, expected = f" in this folder, but pictures in {below}", "expected the folder of the rainy ones"
        advice = ", and --clean_path with that of the clean ones" if "--clean_path" in ways_out else ""
    raise InputError(f"{option} {folder}: no rainy/clean pairs{reason}; {expected}{advice}")


def match_clean_folder(folder, paths, clean_folder):
    """The ``Found`` of the images at ``paths`` in ``folder`` and those of --clean_path, which may be any pictures."""
    results = {path: False for path in paths if is_marked(path)}
    rainy = [path for path in paths if path not in results]
    if rainy:  # a folder of nothing but results is meant by who names it
        report_results(folder, results)
    images = {clean_folder: list_images(clean_folder), folder: rainy or paths}
    found, twins = most_pairs([(folder, clean_folder)], images)
    refuse_twins(twins)
    if found is None:
        clean = images[clean_folder]
        example = f" ({clean[0].name}, {paths[0].name})" if clean and paths else ""
        raise InputError(f"--clean_path {clean_folder}: no image goes by its name with one in {folder}{example}")
    return found


def report_results(folder, results):
    """Name the ``results`` of ``best_match`` in a data set, which are neither rainy nor clean images."""
    report_left_out(folder, [path for path, as_clean in results.items() if not as_clean], "results of an earlier run")
    for place in sorted({path.parent for path, as_clean in results.items() if as_clean}):
        name = printable(os.path.relpath(place, folder))
        print(f"{printable(folder)}: the pictures in {name} are results of an earlier run and no clean images")


def strays(folder, images, found):
    """The images in and below ``folder`` of which ``found`` says nothing, as they are of another layout, or of none.

    Args:
        folder: the data set's.
        images: {folder: paths of its images} that were looked at.
        found: the ``Found`` of the layout that was taken.
    """
    known = [path for pair in found.pairs for path in (pair.rainy, pair.clean)] + found.alone + found.unused
    known = {os.path.realpath(path) for path in known}
    below = (paths for place, paths in images.items() if place.is_relative_to(folder))
    return {os.path.realpath(path): path for paths in below for path in paths
            if os.path.realpath(path) not in known}.values()


def pairs_directly_in(folder):
    """The ``Found`` of the pairs whose rainy images lie directly in ``folder``; None where there is none.

    Raises:
        InputError: it has two files of one stem.
    """
    found = best_match(folders for folders in candidate_folders(Path(folder)) if folders[0].samefile(folder))
    return found if found and found.pairs else None


def refuse_parent_of_sets(folder, option):
    """Refuse a folder that holds data sets and is none itself, naming them."""
    sets = [child.name for child in folders_in(folder) if best_match(candidate_folders(child))]
    if sets:
        raise InputError(f"{option} {folder}: holds several data sets; expected one of them: {', '.join(sets)}")


def hint_at_clean_images(folder, paths):
    """What to say of a folder in or beside ``folder`` whose name is one of ``CLEAN_FOLDERS``.

    Args:
        folder: of rainy images.
        paths: of the images in it.

    Returns:
        (the option that takes the images there for the clean ones, if some go by their names with the rainy ones; else
        how the names differ); "" for what there is not.
    """
    misfit = ""
    for root in (folder, folder.resolve().parent) if paths else ():
        for name, place in subfolders(root, CLEAN_FOLDERS).items():
            if name == "." or place.resolve() == folder.resolve():
                continue
            images = {folder: paths}
            if most_pairs([(folder, place)], images)[0]:
                return f"--clean_path {place}", ""
            if images[place] and not misfit:
                misfit = f"{images[place][0]} and {paths[0].name} do not go together by their names"
    return "", misfit


def pictures_below(folder, levels=3, limit=3):
    """Which folders below ``folder`` hold pictures, as words: "A, B, C and others"; "" where none does."""

    def look(place, level):
        for child in folders_in(place):
            if not child.name.startswith("."):
                if look_into(child, list_images):
                    yield printable(child.relative_to(folder))
                if level < levels:
                    yield from look(child, level + 1)

    names = list(islice(look(Path(folder), 1), limit + 1))
    names[limit:] = ["others"] * (len(names) > limit)
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else ""


def report_left_out(folder, paths, reason="no pair by their names"):
    """Name the images of ``folder`` that are not used."""
    if paths:
        names = ", ".join(printable(os.path.relpath(path, folder)) for path in paths)
        print(f"{printable(folder)}: left out {len(paths)} ({reason}): {names}", flush=True)


# Results of another method


def result_stems(pair, clean_is_shared):
    """The names, without suffix, under which the result of a pair may be saved.

    That is the rainy image's, and the clean one's or what both have in common by ``NAMES``, unless ``clean_is_shared``
    by several pairs or there is none.
    """
    stems = [pair.rainy.stem]
    if not clean_is_shared:
        stems.append(pair.clean.stem)
        for names in NAMES:
            matches = [
                re.fullmatch(pattern, path.stem, re.DOTALL | re.IGNORECASE)
                for pattern, path in ((names.rainy, pair.rainy), (names.clean, pair.clean))
            ]
            if all(matches) and len({without_padding(match[1]) for match in matches}) == 1:
                stems += [match[1] for match in matches]
                break
    return stems


def match_results(pairs, folder):
    """Find the pictures that another method made of the rainy images of ``pairs``, by their names without suffix.

    Args:
        pairs: of a data set. A rainy image without a clean one has its result under its own name.
        folder: of the pictures.

    Returns:
        (a list with a path or None for each pair, paths of the pictures that belong to none).

    Raises:
        InputError: no such folder, or no picture in it that goes with a pair; it is not clear which goes with a pair.
    """
    exact, unpadded, shared = defaultdict(set), defaultdict(set), Counter(pair[1:] for pair in pairs)
    paths = find_images(folder, "--results_path")
    for path in paths:
        exact[path.stem.lower()].add(path)
        unpadded[without_padding(path.stem.lower())].add(path)
    results, owners = [], {}
    for pair in pairs:
        stems = [stem.lower() for stem in result_stems(pair, not pair.clean or shared[pair[1:]] > 1)]
        found = set().union(*(exact.get(stem, ()) for stem in stems))
        found = sorted(found or set().union(*(unpadded.get(without_padding(stem), ()) for stem in stems)))
        if len(found) > 1:
            raise InputError(
                f"--results_path {folder}: {found[0].name} and {found[1].name} may both be the result of"
                f" {pair.rainy.name}; expected one picture for each image"
            )
        results.append(found[0] if found else None)
        if found and owners.setdefault(found[0], pair) is not pair:
            raise InputError(
                f"--results_path {folder}: {found[0].name} may be the result of {owners[found[0]].rainy.name} and of"
                f" {pair.rainy.name}; expected one picture for each image"
            )
    if not owners:
        raise InputError(f"--results_path {folder}: no picture goes by its name with {pairs[0].rainy}")
    return results, [path for path in paths if path not in owners]
