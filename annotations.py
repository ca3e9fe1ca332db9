"""The boxes that people drew: labels of a data set in COCO's JSON or in YOLO's text files, for detect.py.

    python -c "from annotations import find_labels; print(find_labels('datasets/test/RainSample', []))"

COCO: a file with "images", "annotations" (bbox x y width height in px, iscrowd) and "categories". YOLO: for each image
a text file of its name, with a line "class x y width height" an object, centre and size as parts of the image's, or
"class x1 y1 x2 y2 x3 y3 ..." with the corners of an outline.
"""
import json
import math
import re
from collections import Counter, defaultdict
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from layouts import result_stems
from pairs import pair_size
from utils import InputError, natural_key, printable

CLASS_FILE = "classes.txt"  # of YOLO: a name a line
NAME = r"""'[^']*'|"[^"\\]*"|\w[^'"#\[\]{},:]*"""  # of a class in a YAML file, in quotes or plain


class Labels(NamedTuple):
    """The ground truth of one image."""

    boxes: np.ndarray  # (M, 5): x1 y1 x2 y2 in px, number of the class
    crowds: np.ndarray  # (C, 5): boxes around many objects of a class


def as_boxes(rows):
    """(M, 5) float64, also of an empty list."""
    return np.array(rows, np.float64).reshape(-1, 5)


def stems_of(pairs):
    """The names without suffix, in lower case, by which labels may belong to each pair."""
    shared = Counter(pair[1:] for pair in pairs)
    return [[stem.lower() for stem in result_stems(pair, shared[pair[1:]] > 1)] for pair in pairs]


def is_coco(path):
    """Whether a JSON file holds COCO's labels."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def find_labels(folder, pairs):
    """Find the labels of a data set in its folder, in those of its images, or in labels/ or annotations/ in or beside.

    Args:
        folder: of the data set.
        pairs: its ``Pair``s.

    Returns:
        The path of a JSON file or of a folder of text files; None where there is neither.

    Raises:
        InputError: there are several.
    """
    places = [Path(folder), *(path.parent for pair in pairs[:1] for path in (pair.rainy, pair.clean))]
    places += [place / name for place in list(places) for name in ("labels", "annotations")]
    places += [place.parent / name for place in places[:3] for name in ("labels", "annotations")]
    places = {place.resolve(): place for place in places if place.is_dir()}.values()
    stems = {stem for group in stems_of(pairs) for stem in group}
    found = [path for place in places for path in sorted(place.glob("*.json")) if is_coco(path)]
    found += [place for place in places if any(path.stem.lower() in stems for path in place.glob("*.txt"))]
    if len(found) > 1:
        names = ", ".join(printable(path) for path in found)
        raise InputError(f"{folder}: has several labels, {names}; expected --labels to say which")
    return found[0] if found else None


def read_labels(path, pairs, classes, file_classes):
    """Read the labels of the images of ``pairs``.

    Args:
        path: a COCO file or a folder of YOLO's text files.
        pairs: a list of ``Pair``.
        classes: the names of the detector's classes, by number. Labels are matched to them by name.
        file_classes: the names of the classes of YOLO's files where no file names them (``find_classes``).

    Returns:
        (a list with ``Labels`` for each pair, or None where a COCO file has no such image; {name: number of boxes} of
        the classes that the detector does not have, which are left out). An image without a text file has no objects.

    Raises:
        InputError: a file that cannot be read or is of another kind; no class that the detector has; no image.
    """
    numbers = {name.lower(): number for number, name in reversed(list(enumerate(classes)))}
    path = Path(path)
    if not path.exists():
        raise InputError(f"--labels {path}: no such file or folder; expected COCO's JSON, or a folder of YOLO's files")
    if path.is_dir():
        labels, unknown = read_yolo(path, pairs, numbers, file_classes)
    else:
        labels, unknown = read_coco(path, pairs, numbers)
    if not any(entry is not None and len(entry.boxes) for entry in labels):
        there = f"only boxes of {', '.join(unknown)}" if unknown else "no boxes"
        raise InputError(f"--labels {path}: {there} in these images; expected boxes of classes that the detector knows")
    return labels, unknown


def read_coco(path, pairs, numbers):
    """``read_labels`` from a COCO file; ``numbers`` are {class in lower case: number}."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        images = {}
        for entry in content["images"]:
            twin = images.setdefault(Path(entry["file_name"]).stem.lower(), entry)
            if twin is not entry:
                raise InputError(
                    f"--labels {path}: {twin['file_name']} and {entry['file_name']} have one name; expected one image"
                    " for each"
                )
        boxes = defaultdict(list)
        for entry in content["annotations"]:
            x, y, width, height = map(float, entry["bbox"])
            name = names[entry["category_id"]]
            boxes[entry["image_id"]].append((name, bool(entry.get("iscrowd")), (x, y, x + width, y + height)))
            if not math.isfinite(x + y + width + height):
                raise ValueError("a box that is not finite")
        labels, unknown = [], Counter()
        for pair, stems in zip(pairs, stems_of(pairs)):
            image = next((images[stem] for stem in stems if stem in images), None)
            if image is None:
                labels.append(None)
                continue
            size, declared = pair_size(pair), (image.get("height"), image.get("width"))
            if None not in declared and size != declared:
                raise InputError(
                    f"--labels {path}: {image['file_name']} is {declared[1]}x{declared[0]} there, and {pair.rainy} is"
                    f" {size[1]}x{size[0]}; expected labels of these images"
                )
            kinds = ([], [])
            for name, crowd, box in boxes[image["id"]]:
                if name.lower() in numbers:
                    kinds[crowd].append((*box, numbers[name.lower()]))
                else:
                    unknown[name] += 1
            labels.append(Labels(*map(as_boxes, kinds)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"--labels {path}: not COCO's JSON ({reason}); expected images, annotations, categories") \
            from None
    return labels, unknown


def read_yolo(folder, pairs, numbers, file_classes):
    """``read_labels`` from a folder of text files."""
    named, found = find_classes(folder)
    file_classes = found if named else file_classes
    print(f"classes: {printable(named) if named else f'the {len(file_classes)} of COCO, as there is no {CLASS_FILE}'}")
    files = {path.stem.lower(): path for path in sorted(folder.glob("*.txt"), key=natural_key)}
    labels, unknown = [], Counter()
    for pair, stems in zip(pairs, stems_of(pairs)):
        path = next((files[stem] for stem in stems if stem in files), None)
        height, width = pair_size(pair)
        rows = []
        for line, number, box in read_boxes(path) if path else ():
            if number >= len(file_classes):
                known = f"{named}" if named else f"the {len(file_classes)} classes of COCO; {CLASS_FILE} names others"
                raise InputError(f"--labels {path}: line {line}: class {number} is none of {known}")
            name = file_classes[number].strip()
            if name.lower() in numbers:
                rows.append((*(box * (width, height, width, height)), numbers[name.lower()]))
            else:
                unknown[name] += 1
        labels.append(Labels(as_boxes(rows), as_boxes([])))
    return labels, unknown


def find_classes(folder):
    """Find the names of the classes of YOLO's text files, in their folder or up to two above it.

    Returns:
        (path, names): of ``CLASS_FILE``, or else of a YAML file with "names", as Ultralytics and Roboflow write it;
        (None, None) where there is neither.

    Raises:
        InputError: the names in a YAML file cannot be read, or two files beside one another name different ones.
    """
    places = (folder, *list(folder.absolute().parents)[:2])
    for path in (place / CLASS_FILE for place in places):
        if path.is_file():
            return path, path.read_text(encoding="utf-8", errors="replace").split("\n")
    for place in places:
        files = sorted([*place.glob("*.yaml"), *place.glob("*.yml")])
        texts = {path: path.read_text(encoding="utf-8-sig", errors="replace") for path in files if path.is_file()}
        found = {path: read_names(text) for path, text in texts.items() if re.search("^names *:", text, re.MULTILINE)}
        if found:
            (path, names), *others = found.items()
            if names is None or any(other != names for _, other in others):
                paths = ", ".join(printable(path) for path in found)
                reason = "names its classes in another form than is read" if len(found) == 1 else "name other classes"
                raise InputError(f"{paths}: {reason}; expected also {printable(place / CLASS_FILE)} with a name a line")
            return path, names
    return None, None


def read_names(text):
    """The names of the classes in a YAML file: a list in brackets, or a block with a line "- name" or "0: name" each.

    This is no reader of YAML, as PyYAML is not needed for these: anything else gives None.
    """
    lines = [re.sub(r"(^|\s)#.*", "", line).rstrip() for line in text.splitlines()]
    start = next(number for number, line in enumerate(lines) if re.match("names *:", line))
    block = [line.strip() for line in takewhile(re.compile(r"[\s-]|$").match, lines[start + 1 :]) if line]
    first = lines[start].partition(":")[2].strip()
    if first:
        whole = " ".join([first, *block])
        names = re.findall(NAME, whole) if re.fullmatch(rf"\[( *({NAME}) *,)* *({NAME}) *,? *\]", whole) else []
    else:
        rows = [re.fullmatch(rf"(-|\d+ *:) +({NAME})", row) for row in block]
        keys = [row and row[1].rstrip(" :") for row in rows]
        names = [row[2] for row in rows] if keys in (["-"] * len(rows), [*map(str, range(len(rows)))]) else []
    return [name[1:-1] if name[0] in "'\"" else name.strip() for name in names] or None


def read_boxes(path):
    """[(line, number of the class, x1 y1 x2 y2 as parts of the image)] of a text file."""
    found = []
    for line, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not text.strip():
            continue
        try:
            number, *values = text.split()
            number, values = int(number), np.array(values, float)
            if number < 0 or len(values) < 4 or len(values) % 2 or not (abs(values) < 10).all():
                raise ValueError
        except ValueError:
            raise InputError(
                f"--labels {path}: line {line} is {printable(text[:60])!r}; expected class x y width height, the last"
                " four from 0 to 1"
            ) from None
        if len(values) == 4:
            box = np.concatenate((values[:2] - values[2:] / 2, values[:2] + values[2:] / 2))
        else:
            points = values.reshape(-1, 2)
            box = np.concatenate((points.min(0), points.max(0)))
        found.append((line, number, box))
    return found
