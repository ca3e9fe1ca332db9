"""What test.py leaves: the names of the results, the refusal to write over anything else, and the report.

    python -c "from outputs import model_name; print(model_name(None, 'weights/light.pth'))"

Apart from test.py, which reads as the course of a picture from its file to its result. Here is what that file needs
to be safe in a folder with files of other people: a result carries ``images.MARK``, by which a later run knows it.
"""
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checkpoints import BUNDLED
from images import WRITTEN, content_of, is_marked
from layouts import Pair
from metrics import METRICS
from utils import InputError, counted, printable
from video_input import clip_name, is_pattern
from video_output import SUFFIXES, read_mark

COLUMNS = ("image", *METRICS, "seconds")  # of metrics.csv
NO_REFERENCE = {  # metric of --no_reference: (its further columns in metrics.csv, what has no value)
    "NIQE": (("niqe_rainy", "niqe_derained"), "under 192x96 px, or without structure"),
    "PIQE": (("piqe_rainy", "piqe_derained"), "under 16 px, or without detail"),
}
# How metrics.csv begins, a video's table, and those of detect.py.
REPORTS = (",".join(COLUMNS), "frame,seconds,static,", "pictures,class,objects,", "pictures,class,pixels,")
SHEET = "contact_sheet.jpg"
OVERVIEWS = {SHEET, "detection.png", "segmentation.png"}  # pictures of ours that are no result of one picture
EXTENSIONS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "TIFF": ".tif"}  # of the formats that can be written


# Names


def default_output(args):
    """results/SET/MODEL: named after --test_data_path, and after the checkpoint or the folder of --results_path."""
    source = Path(os.path.abspath(args.test_data_path))
    model = f"measured-{Path(os.path.abspath(args.results_path)).name}" if args.results_path else None
    name = clip_name(source) if source.is_file() or is_pattern(source) else source.name
    return Path("results", name, model or model_name(args.save_path, args.checkpoint))


def model_name(save_path, checkpoint):
    """The name of the ``checkpoint`` that ``save_path`` means, for its folder under results/.

    That is the name of its run's folder; FOLDER-STEM where --save_path is a file, as a run's folder has several; and
    STEM alone for the bundled weights.
    """
    checkpoint = Path(os.path.abspath(checkpoint))
    if checkpoint.resolve().parent == BUNDLED:
        return checkpoint.stem
    from_folder = save_path is None or save_path.is_dir()
    return checkpoint.parent.name if from_folder else f"{checkpoint.parent.name}-{checkpoint.stem}"


def extension(path, form):
    """The suffix of a picture's result under --format ``form``.

    "same" is the picture's own where its content fits it, and .png where its format cannot be written.
    """
    if form != "same":
        return f".{form}"
    kind = content_of(path)
    return path.suffix if WRITTEN.get(path.suffix.lower()) == kind else EXTENSIONS.get(kind, ".png")


def name_outputs(places, endings):
    """Where each picture's result goes, relative to --output_path.

    Args:
        places: (folder below --output_path, path of the picture) of each.
        endings: what each result's name has instead of the picture's suffix. Where two would collide, even where
            upper and lower case are the same, they have it behind the suffix.
    """
    names = [folder / f"{path.stem}{ending}" for (folder, path), ending in zip(places, endings)]
    counts = Counter(str(name).lower() for name in names)
    return [
        folder / f"{path.name}{ending}" if counts[str(name).lower()] > 1 else name
        for name, (folder, path), ending in zip(names, places, endings)
    ]


def name_clips(clips, suffix=""):
    """Where each video's result goes: (folder below --output_path, name without a suffix).

    Where two would collide, each name is that of the video with its suffix.

    Args:
        clips: (path of the video, folder below --output_path) of each.
        suffix: that of --suffix, which comes behind each name.
    """
    places = [(folder, clip_name(path)) for path, folder in clips]
    counts = Counter((folder, name.lower()) for folder, name in places)
    return [
        (folder, (path.name if counts[folder, name.lower()] > 1 else name) + suffix)
        for (folder, name), (path, _) in zip(places, clips)
    ]


class Job(NamedTuple):
    """One picture: what is read, and where its result goes and its panel, which is None without --comparison."""

    pair: Pair
    output: Path
    panel: Path | None
    name: Path | None = None  # in the report, if it is not that of the file alone


# Nothing else is overwritten


def is_result(path):
    """Whether this program has written a file: pictures and videos carry its mark, and a table begins as ours do."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES.values():
        return read_mark(path) is not None
    if suffix != ".csv":
        return is_marked(path)
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(100).startswith(REPORTS)
    except OSError:
        return False


def without_overviews(paths):
    """The paths of pictures in a folder of results, without this program's contact sheet and charts there."""
    return [path for path in paths if path.name not in OVERVIEWS or not is_result(path)]


def check_outputs(paths, inputs, output_path, way_out=", or a --suffix for the names"):
    """Refuse to write over an input, over another result of this run, or over anything that is no earlier result.

    Args:
        paths: of all files that will be written below ``output_path``, the folder of --output_path.
        inputs: paths of all files that are read or lie among those.
        way_out: what else than another folder the error tells to do.
    """
    inputs = {os.path.realpath(path) for path in inputs}  # unlike Path.resolve, also of a link to itself
    written, taken = set(), []
    for path in paths:
        if os.path.realpath(path) in inputs:
            raise InputError(
                f"--output_path {output_path}: {path.name} would overwrite an input; expected another folder"
            )
        if path in written:
            raise InputError(f"--output_path {output_path}: two results would be {path.name}; expected other names")
        written.add(path)
        if os.path.lexists(path) and not is_result(path):
            taken.append(printable(os.path.relpath(path, output_path)))
    if taken:
        names = ", ".join(taken[:5]) + (f" and {len(taken) - 5} more" if len(taken) > 5 else "")
        raise InputError(
            f"--output_path {output_path}: {names} would be overwritten, but no earlier run has written that;"
            f" expected another folder{way_out}"
        )


# The report


def describe(row):
    """A row of the report as one line for the console."""
    parts = []
    if "psnr_y" in row:
        parts.append(
            f"Y {row['psnr_y']:7.4f} dB {row['ssim_y']:.4f}   RGB {row['psnr_rgb']:7.4f} dB {row['ssim_rgb']:.4f}"
        )
    for metric, ((rainy, derained), _) in NO_REFERENCE.items():
        if rainy in row:
            parts.append(f"{metric} {row[rainy]:7.4f} -> {row[derained]:7.4f}")
    parts.append(f"{row['seconds']:6.2f} s" if "seconds" in row else "was there")
    return f"{row['image']:24} {'   '.join(parts)}"


def mean(values):
    """The mean without NaN, which an image under 11 px has as its SSIM; NaN where nothing is left."""
    values = [value for value in values if not np.isnan(value)]
    return float(np.mean(values)) if values else float("nan")


def has_values(row, columns):
    """Whether a row has numbers in all ``columns``, and not NaN."""
    return not any(np.isnan(row[name]) for name in columns)


def average(rows):
    """The averages of a report: metrics over the images that have them, time without the first image's warm-up.

    Those of NIQE and PIQE are over the same images, rainy and derained.
    """
    measured = [row for row in rows if "psnr_y" in row]
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    summary = {"image": f"average of {len(measured) or len(rows)}"}
    if measured:
        summary |= {name: mean(row[name] for row in measured) for name in METRICS}
    for columns, _ in NO_REFERENCE.values():
        if columns[0] in rows[0]:
            valued = [row for row in rows if has_values(row, columns)]
            summary |= {name: mean(row[name] for row in valued) for name in columns}
    return summary | ({"seconds": mean(seconds[1:] or seconds)} if seconds else {})


def explain_no_reference(rows):
    """What the figures of --no_reference mean, and which images have none: a line for each metric."""
    lines = []
    for metric, (columns, reason) in NO_REFERENCE.items():
        without = [row["image"] for row in rows if not has_values(row, columns)]
        line = f"{metric}: rainy -> derained, lower is better, over {counted(len(rows) - len(without), 'image')}"
        lines.append(line + (f"; none for {', '.join(without)} ({reason})" if without else ""))
    return lines
