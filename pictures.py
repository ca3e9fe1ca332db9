"""One picture: read, derained, saved and measured.

    python -c "from pictures import Saving; print(*Saving())"

prints how a result is saved by default: over an earlier one, with its metadata, and in which quality of JPEG and WebP.
"""
import errno
import time
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from comparison import panel, thumbnail
from images import MARK, WRITTEN, mark_of, read_image, read_metadata, read_rgb, to_uint8, write_image
from inference import derain_array, to_image
from metadata import Metadata
from metrics import measure, measure_alone
from pairs import check_sizes, read_clean, read_rainy
from runners import SharedRunner
from utils import InputError, RunError, memory_is_full, printable, want_of_memory

NAME_ERRORS = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)  # of a file system that cannot have such a name


class Saving(NamedTuple):
    """How results are saved: the options of these names."""

    overwrite: bool = True
    metadata: bool = True
    quality: int = 95


def derain(runner, image, device):
    """Derain an image of 8 or 16 bits.

    Args:
        runner: a ``StripRunner``, or a function like it.
        image: (H, W, 3 or 4) RGB(A) uint8 or uint16, any size.
        device: of the network.

    Returns:
        (array of the same shape and dtype, alpha unchanged; its (H, W, 3) uint8 RGB, which is measured). What is grey
        stays grey.
    """
    output = derain_array(runner, image[..., :3], device)
    derained = np.concatenate((to_image(output, image.dtype), image[..., 3:]), axis=2)
    return derained, to_image(output)


@contextmanager
def faults_of(path):
    """Make of what can go wrong with one picture, memory included, an ``InputError`` that names it."""
    try:
        with want_of_memory():
            yield
    except (RunError, OSError) as error:  # no room for its feature maps, on the disk or in memory
        raise InputError(f"{path}: {error}") from None


def save(path, picture, metadata, quality=95, mark=MARK):
    """Write a picture, with its ``mark``.

    Raises:
        InputError: this one cannot be written, for want of memory or as its name is impossible; another may be.
        RunError: it could not be written, as on a full disk.
    """
    try:
        with want_of_memory(f"{path}: "):
            write_image(path, picture, metadata._replace(software=mark), quality)
    except RunError as error:
        cause = error.__context__
        if getattr(cause, "errno", None) in NAME_ERRORS or cause and memory_is_full(cause):
            raise InputError(str(error)) from None
        raise


def mark_for(runner, job, saving):
    """The mark of the result of a ``Job``, by which --overwrite False tells it from one of another picture or options.

    ``runner`` and ``saving`` are as for ``process``.
    """
    settings = runner.settings if isinstance(runner, SharedRunner) else {}
    pair = job.pair
    return mark_of(
        pair.rainy, job.output, saving.quality, metadata=saving.metadata, rainy_half=pair.rainy_half, **settings
    )


def process(runner, job, device, saving=Saving(), no_reference=False):
    """Derain one image, save and measure it, and write its panel if it has one.

    Args:
        runner, device: as for ``derain``; without a runner the result is there already.
        job: a ``Job``.
        saving: a ``Saving``.
        no_reference: whether NIQE and PIQE are measured too.

    Returns:
        (its row of the report: name, metrics where there is a clean image, seconds of the network, "reduced" where the
        format did not take its alpha or 16 bits, "recoloured" where it cannot say what colours these are, and "renewed"
        where another result was there in spite of --overwrite False; its thumbnail for the contact sheet, or None
        without a panel).

    Raises:
        InputError: this image fails, and another may not.
        RunError: a result cannot be written.
    """
    pair = job.pair
    row = {"image": printable(job.name or pair.rainy.name)}
    result = None
    with faults_of(pair.rainy):
        # 1. Load
        image = read_rainy(pair)
        clean = read_clean(pair) if pair.clean else None
        if clean is not None:
            check_sizes(pair, image.shape, clean.shape)

        # 2. Derain, or take what is there
        mark = mark_for(runner, job, saving) if runner else None
        there = runner is None or job.output.exists() and not saving.overwrite
        row["renewed"] = there and mark is not None and read_metadata(job.output).software != mark
        if there and not row["renewed"]:
            derained = read_rgb(job.output)
            if derained.shape[:2] != image.shape[:2]:
                raise InputError(f"{job.output} is not the result of {pair.rainy}, as it has another size; remove it")
        else:
            metadata = read_metadata(pair.rainy) if saving.metadata else Metadata()
            started = time.perf_counter()
            result, derained = derain(runner, image, device)
            row["seconds"] = runner.seconds() if isinstance(runner, SharedRunner) else time.perf_counter() - started

    # 3. Save
    if result is not None:
        save(job.output, result, metadata, saving.quality, mark)
        row["recoloured"] = metadata.loses_colours(WRITTEN[job.output.suffix.lower()])

    # 4. Measure what was written, and show both
    with faults_of(pair.rainy):
        if result is not None and WRITTEN[job.output.suffix.lower()] in ("JPEG", "WEBP"):
            derained = read_image(job.output)
            row["reduced"] = result.dtype != np.uint8 or result.shape != derained.shape
            derained = derained[..., :3]
        if clean is not None:
            row |= measure(derained, clean)
        if no_reference:
            for which, picture in (("rainy", image), ("derained", derained)):
                row |= {f"{name}_{which}": value for name, value in measure_alone(picture).items()}
        if job.panel is None:
            return row, None
        rainy = to_uint8(image[..., :3])
        scores = clean is not None and {"rainy": measure(rainy, clean), "derained": row}
        sheet = panel(row["image"], rainy, derained, clean, scores)
    save(job.panel, sheet, Metadata())
    return row, thumbnail(row["image"], rainy, derained)
