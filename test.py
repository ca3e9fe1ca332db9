"""Derain pictures, folders of pictures and videos, and report PSNR and SSIM where there are clean images.

    python test.py --test_data_path datasets/test/RainSample

Writes one PNG an image and metrics.csv. The figures follow PReNet's MATLAB protocol, on the 8-bit images written. With
--results_path it measures by this protocol what another method made.
"""
import argparse
import math
import os
import sys
import threading
import zlib
from contextlib import closing, nullcontext
from datetime import timedelta
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoints import add_network_options, find_checkpoint, load_network
from comparison import MAX_THUMBNAILS, contact_sheet
from devices import HALF_PRECISIONS, fast_precision, free_memory, pick_device, threads_beside
from images import content_of, image_size
from inference import StripRunner
from inputs import common_path, find_inputs, find_results, is_clip, paths_of
from metadata import Metadata
from outputs import (
    COLUMNS, NO_REFERENCE, SHEET, Job, average, check_outputs, default_output, describe, explain_no_reference,
    extension, name_clips, name_outputs,
)
from pictures import Saving, derain, process, save
from processes import (
    AmongProcesses, as_one_run, from_first, join_processes, processes_here, rank_of_run, to_first,
)
from runners import SharedRunner, self_ensemble, settings_of
from utils import (
    Gathered, InputError, Parser, RunError, a_path, add_flag, ahead, at_least, check_folder, counted, printable,
    progress, run_script, want_of_memory, write_csv,
)
from video import VideoOptions, check_crf, derain_video, write_report
from video_form import CODECS
from video_input import is_pattern

LARGE = 2**22  # px; of larger images only one at a time is in memory


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_options(parser, "general.pth, and where there are no clean images real.pth,")
    parser.add_argument(
        "--test_data_path", action=Gathered, type=a_path(), nargs="+", default=[Path("datasets/test/Rain100H")],
        metavar="PATH",
        help="images, videos and folders of them; clean images beside the rainy ones are found"
        " (default: datasets/test/Rain100H)",
    )
    parser.add_argument(
        "--clean_path", type=a_path(), metavar="DIR",
        help="folder of the clean images, where --test_data_path has the rainy ones and their place does not tell",
    )
    parser.add_argument(
        "--side_by_side", choices=("left", "right"),
        help="each picture holds a rainy and a clean image side by side; this half is the rainy one",
    )
    add_flag(parser, "--recursive", False, "take the files of all folders below too; no clean images are looked for")
    parser.add_argument(
        "--results_path", type=a_path(), metavar="DIR",
        help="measure the pictures of this folder, which another method made of those of --test_data_path; they are"
        " named as the rainy or the clean images",
    )
    parser.add_argument(
        "--output_path", type=a_path(), metavar="DIR",
        help="folder of the derained images (default: results/SET/MODEL, after --test_data_path and --save_path)",
    )
    parser.add_argument(
        "--format", choices=("png", "jpg", "webp", "same"), default="png",
        help="of the derained images; same is the input's, or png where that cannot be written (default: %(default)s)",
    )
    parser.add_argument(
        "--quality", type=at_least(1), default=95, metavar="N", help="of jpg and webp, 1 to 100 (default: %(default)s)"
    )
    parser.add_argument("--suffix", default="", metavar="TEXT", help="added to the names of the derained images")
    add_flag(
        parser, "--metadata", True,
        "keep the colour profile, and of EXIF the date, the place and the camera; False leaves all of it out",
    )
    add_flag(parser, "--overwrite", True, "derain again what is there already; False goes on with a folder or a video")
    add_flag(parser, "--comparison", False, "write a labelled panel for each image too, and a contact sheet")
    add_flag(
        parser, "--self_ensemble", False,
        "average over the image, its mirror image, and both upside down: four times as long",
    )
    add_flag(
        parser, "--no_reference", False,
        "measure NIQE and PIQE too, of the rainy and the derained image; they need no clean one",
    )
    parser.add_argument("--codec", choices=tuple(CODECS), help="of a video (default: h264)")
    parser.add_argument(
        "--crf", type=at_least(0), metavar="N",
        help="quality of a video, from 0, the best, to 51, with vp9 and av1 to 63 (default: 16, 18 with hevc, 20 with"
        " vp9 and av1)",
    )
    parser.add_argument(
        "--frames", type=frame_range, metavar="A:B",
        help="derain frames A to B of a video only, counted from 1; the sound is cut to them",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=("fp32", *HALF_PRECISIONS, "auto"), default="fp32",
        help="of the convolutions; auto is the fastest of the device (default: %(default)s)",
    )
    parser.add_argument(
        "--max_memory", type=at_least(0, float), metavar="GIB",
        help="an image that needs more on the CPU, 0.6 GiB a megapixel in fp32, works on disk"
        " (default: 3/4 of what is free; none on macOS and Windows)",
    )
    args = parser.parse_args(argv)
    args.inputs = list(dict.fromkeys(args.test_data_path))
    args.test_data_path = common_path(args.inputs)
    args.given_output = args.output_path
    fill_in_defaults(args, photographs=True)
    return args


def fill_in_defaults(args, photographs):
    """Fill in the weights, which are others for photographs, and --output_path, whose default is named after them."""
    args.checkpoint = None if args.results_path else find_checkpoint(args.save_path, photographs)
    args.output_path = args.given_output or default_output(args)


def frame_range(text):
    """``argparse`` type for A:B, the numbers of the first and the last frame."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"expected A:B with 1 <= A <= B, got {text!r}")
    return int(first), min(int(last), sys.maxsize)  # more cannot be counted


def check_options(args):
    """Refuse paths that do not exist, and options that do not go together."""
    for path in args.inputs:
        broken_link = len(args.inputs) > 1 and path.is_symlink()  # of a glob, is one failure of many
        if not path.exists() and not is_pattern(path) and not broken_link:
            raise InputError(f"--test_data_path {path}: no such file or folder; expected an image, a folder or a video")
    source = args.test_data_path
    clip = is_pattern(source) or source.is_file() and is_clip(source)
    for name in ("comparison", "no_reference"):
        if getattr(args, name) and clip:
            raise InputError(f"--{name}: {source} is no image; expected an image or a folder of images")
    for name, default in (("format", "png"), ("quality", 95)):
        if getattr(args, name) != default and clip:
            raise InputError(f"--{name}: {source} is a video; expected images, as --codec and --crf are for videos")
    clean_options = [name for name in ("clean_path", "side_by_side") if getattr(args, name)]
    if len(clean_options) == 2:
        raise InputError("--clean_path and --side_by_side: expected one of them; each says where the clean images are")
    for name in clean_options:
        if args.recursive:
            raise InputError(f"--{name}: expected no --recursive, which looks for no clean images")
        if clip:
            raise InputError(f"--{name}: {source} is a video; expected images, as a video is not measured")
    for name in ("clean_path", "results_path"):
        if getattr(args, name) and (source.is_file() or len(args.inputs) > 1):
            kind = "one image" if source.is_file() else "no single folder"
            raise InputError(f"--{name}: {source} is {kind}; expected a folder of rainy images as --test_data_path")
    for name in ("save_path", "recursive", "self_ensemble"):
        if args.results_path and getattr(args, name):
            raise InputError(f"--results_path measures pictures that are there; expected no --{name}")
    check_crf(args.codec or "h264", args.crf)
    if args.quality > 100:
        raise InputError(f"--quality {args.quality}: expected 1 to 100")
    if Path(args.suffix).name != args.suffix:
        raise InputError(f"--suffix {args.suffix}: expected a part of a file's name")


# Pictures


def plan_jobs(pictures, args):
    """A ``Job`` for each (``Pair``, folder below --output_path, picture to measure or None)."""
    places = [(folder, pair.rainy) for pair, folder, _ in pictures]
    outputs = name_outputs(places, [f"{args.suffix}{extension(path, args.format)}" for _, path in places])
    panels = name_outputs(places, [".jpg"] * len(places))
    return [
        Job(
            pair, there or args.output_path / output,
            args.output_path / "comparison" / panel if args.comparison else None, folder / pair.rainy.name,
        )
        for (pair, folder, there), output, panel in zip(pictures, outputs, panels)
    ]


def derain_images(runner, jobs, args, device, share=(0, 1), only=False):
    """Derain, save and measure the picture of each ``Job``; a bad one does not cost the others.

    Args:
        runner, device: as for ``process``.
        jobs, args: list of ``Job``; the options.
        share: (rank, ranks): with several processes, each takes its share of the jobs, and the first one reports.
        only: whether nothing else is derained in this run; then the reason for a failure is the run's last word.

    Returns:
        [(name, reason)] of those that failed; in the first process of all.
    """
    saving = Saving(args.overwrite, args.metadata, args.quality)
    step = -(-len(jobs) // MAX_THUMBNAILS)
    (rank, ranks), threads = share, threads_beside(device)
    alone = threading.Lock()  # so that the threads have no two large images in memory

    def attempt(numbered):
        number, job = numbered
        row = small = reason = None
        try:
            large = threads and math.prod(image_size(job.pair.rainy)) > LARGE
            with alone if large else nullcontext():
                row, small = process(runner, job, device, saving, args.no_reference)
        except InputError as error:
            reason = printable(error)  # not the error, which holds all that had been computed
        return number, row, small if number % step == 0 else None, reason

    def tell(row, reason):
        if row:
            tqdm.write(describe(row))
        elif not only:
            tqdm.write(f"error: {reason}")

    mine, results = list(enumerate(jobs))[rank::ranks], []
    for result in ahead(attempt, progress(mine, "deraining"), threads):
        results.append(result)
        tell(result[1], result[3])
        if result[3] and device.type == "cuda":
            torch.cuda.empty_cache()  # of an image that was too large
    everyone = sorted((result for part in to_first(results) for result in part), key=itemgetter(0))
    for number, row, _, reason in everyone:
        if number % ranks != rank:
            tell(row, reason)

    rows = [row for _, row, _, _ in everyone if row]
    reduced = [row["image"] for row in rows if row.pop("reduced", False)]
    recoloured = [row["image"] for row in rows if row.pop("recoloured", False)]
    renewed = sum(row.pop("renewed") for row in rows)
    thumbnails = [small for _, _, small, _ in everyone if small is not None]
    if rows:
        columns = COLUMNS
        if args.no_reference:
            columns += sum((names for names, _ in NO_REFERENCE.values()), ())
        write_csv(args.output_path / "metrics.csv", columns, [*rows, average(rows)])
        print(describe(average(rows)))
        print(f"{counted(len(rows), 'image')} in {printable(args.output_path)}")
        if args.no_reference:
            print("\n".join(explain_no_reference(rows)))
    if renewed:
        results = counted(renewed, "result")
        print(f"--overwrite False: derained again {results} of other pictures, weights, options or versions")
    if reduced:
        print(f"--format {args.format} has not kept the alpha or 16 bits of {len(reduced)}: {', '.join(reduced)}")
    if recoloured:
        why = "profiles of grey or CMYK do not fit RGB, and only .png has a place for colours without a profile"
        print(f"{counted(len(recoloured), 'result')} may look different, as {why}: {', '.join(recoloured)}")
    if thumbnails:
        sheet_path, number = args.output_path / SHEET, counted(len(thumbnails), "image")
        save(sheet_path, contact_sheet(thumbnails), Metadata())
        print(f"panels in {printable(args.output_path / 'comparison')}, {number} on {sheet_path.name}")
    return [(printable(jobs[number].name), reason) for number, _, _, reason in everyone if reason]


# Videos


def video_options(args, at_once=0):
    """The ``VideoOptions`` that the options ask for, ``at_once`` as there."""
    settings = {
        "weights": zlib.crc32(args.checkpoint.read_bytes()), "recurrent_iter": args.recurrent_iter,
        "use_dilation": args.use_dilation, "precision": args.precision, "self_ensemble": args.self_ensemble,
    }
    return VideoOptions(
        args.codec or "h264", args.crf, args.frames, args.overwrite, settings, at_once, metadata=args.metadata
    )


def describe_change(average):
    """How steady a video is, from the averages of its report, as a sentence; "" where nothing in it stands still."""
    if np.isnan(average["change_rainy"]):
        return ""
    return (
        f"change between frames where the scene stands still ({average['static']:.0%} of the pixels):"
        f" {average['change_rainy']:.3f} grey levels before, {average['change_derained']:.3f} after"
    )


def derain_clip(source, place, derain_frame, args, at_once):
    """Derain a video into its ``place``, (folder below --output_path, name), and report how steady it is."""
    folder, name = place
    result = derain_video(source, args.output_path / folder, derain_frame, video_options(args, at_once), name)
    if result is None:  # it was there already
        return
    if result.rows:
        average = write_report(result.output.with_suffix(".csv"), result.rows)
        number = counted(len(result.rows), "frame")
        print(f"{number}, {average['seconds']:.2f} s a frame, in {printable(result.output)}")
        if change := describe_change(average):
            print(change)
    if args.frames and result.last < args.frames[1] and not result.stopped:
        print(f"--frames {args.frames[0]}:{args.frames[1]}: {printable(source)} ends with frame {result.last}")
    if result.stopped:
        way_on = "the same command with --overwrite False goes on from there"
        if result.kept:
            way_on = "the video that was there is kept"
        print(f"stopped after frame {result.last}; {way_on}")
        sys.exit(128 + result.stopped)
    faults = f"{printable(source)}: {'; '.join(result.faults)}" if result.faults else ""
    if result.late_signal:
        print("stopped; this video was finished already", *filter(None, [faults]), sep="\n")
        sys.exit(128 + result.late_signal)
    if faults:
        raise RunError(faults)


def derain_clips(runner, clips, args, device):
    """Derain each video of [(path, folder of its result below --output_path)]; the processes share its frames.

    Returns:
        [(name, reason)] of those that failed, in the first process.
    """
    def work_on(frame):
        try:
            with want_of_memory():
                return derain(runner, frame, device)[0]
        except OSError as error:  # a process can tell the first of no other error
            raise RunError(error.strerror or str(error)) from None

    derain_frame, failures = AmongProcesses(work_on), []
    if derain_frame.rank > 0:
        derain_frame.serve()
        return []
    # Beside a card, a thread keeps it busy while frames are read and written; a CPU is busy anyway.
    at_once = derain_frame.ranks if derain_frame.ranks > 1 else int(device.type == "cuda")
    with closing(derain_frame):
        for (path, below), place in zip(clips, name_clips(clips, args.suffix)):
            try:
                with want_of_memory(f"{path}: "):
                    derain_clip(path, place, derain_frame, args, at_once)
            except (InputError, RunError) as error:
                if len(args.inputs) == 1 and path == args.test_data_path:
                    raise
                print(f"error: {printable(error)}")
                failures.append((printable(below / path.name), printable(error)))
    return failures


def load_runner(args, device):
    """The network of --save_path, ready for whole images in the precision and memory that the options allow."""
    precision = args.precision
    if precision == "auto":
        precision = fast_precision(device)
    net = load_network(args.checkpoint, args.recurrent_iter, args.use_dilation).to(device)
    max_memory = 0.75 * free_memory() / processes_here() if args.max_memory is None else args.max_memory * 2**30
    runner = StripRunner(net, HALF_PRECISIONS.get(precision, torch.float32), max_memory)
    run = self_ensemble(runner) if args.self_ensemble else runner
    return SharedRunner(run, runner.images_at_once, settings_of(runner, args.self_ensemble))


def refuse_to_overwrite(jobs, inputs, args):
    """Look, before the work begins, at all that will be written."""
    written = [args.output_path / "metrics.csv"] if jobs else []
    if not args.results_path:
        written += [job.output for job in jobs]
    if args.comparison and jobs:
        written += [args.output_path / SHEET, *(job.panel for job in jobs)]
    # A video's own name follows from its streams, so derain_video looks at it.
    places = name_clips(inputs.clips, args.suffix)
    written += [args.output_path / folder / f"{name}.csv" for folder, name in places]
    read = [*paths_of(job.pair for job in jobs), *inputs.unused, *(path for path, _ in inputs.clips)]
    check_outputs(written, read, args.output_path)
    there = sum(map(os.path.lexists, (job.output for job in jobs))) if args.overwrite and not args.results_path else 0
    if there:  # two folders of one name have one --output_path by default
        what = f"replaces {counted(there, 'result')} of an earlier run; --overwrite False keeps those of equal pictures"
        print(f"{printable(args.output_path)}: {what}")


def plan(args):
    """Which pictures and videos there are, the weights for them, and where each result goes.

    Returns:
        (``args`` after ``fill_in_defaults``, ``Inputs``, a ``Job`` for each picture).
    """
    inputs = find_results(args) if args.results_path else find_inputs(args)
    fill_in_defaults(args, photographs=not any(pair.clean for pair, *_ in inputs.pictures))
    check_folder("--output_path", args.output_path)
    if args.checkpoint:
        print(f"weights: {printable(args.checkpoint)}")
    for name in ("codec", "crf", "frames"):
        if getattr(args, name) is not None and not inputs.clips:
            raise InputError(f"--{name}: {args.test_data_path} is no video; expected a video as --test_data_path")
    jobs = plan_jobs(inputs.pictures, args)
    refuse_to_overwrite(jobs, inputs, args)
    if args.format == "same":
        changed = [job for job in jobs if job.output.suffix == ".png" and content_of(job.pair.rainy) != "PNG"]
        if changed:
            print(f"--format same: as PNG {', '.join(printable(job.name) for job in changed)}")
    return args, inputs, jobs


def main():
    args = parse_args()
    check_options(args)
    rank, ranks = rank_of_run()
    device = pick_device(args.device)
    with as_one_run(rank, ranks):
        # On the CPU, as they exchange files' names and frames. One may have a far larger image than the others.
        join_processes(torch.device("cpu"), timedelta(days=30))

        # 1. Plan: the first process looks at the folders, before any writes
        args, inputs, jobs = from_first(lambda: plan(args))

        # 2. Derain and measure each
        runner = None if args.results_path else load_runner(args, device)
        total = len(jobs) + len(inputs.clips)
        failures = derain_images(runner, jobs, args, device, (rank, ranks), total == 1) if jobs else []
        failures += derain_clips(runner, inputs.clips, args, device) if inputs.clips else []
    if rank == 0:
        report_left_over(args, inputs, total, failures)


def report_left_over(args, inputs, total, failures):
    """Step 3: say what was not done, and end with an error if any of the ``total`` files failed."""
    if inputs.others:
        names = ", ".join(printable(os.path.relpath(path, args.test_data_path)) for path in inputs.others)
        print(f"not processed: {names}")
    if inputs.missing:
        names = ", ".join(printable(path.name) for path in inputs.missing)
        number = counted(len(inputs.missing), "image")
        raise RunError(f"--results_path {args.results_path}: no result of {number}: {names}")
    if failures and total == 1:
        raise RunError(failures[0][1])
    if failures:
        kinds = "files" if inputs.clips else "images"
        raise RunError(f"{len(failures)} of {total} {kinds} failed: {', '.join(name for name, _ in failures)}")


if __name__ == "__main__":
    run_script(main)
