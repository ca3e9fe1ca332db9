r"""Measure what deraining is good for: do detectors and segmenters see in derained images what they see in clean ones?

    python test.py --test_data_path datasets/test/RainSample --output_path results/RainSample/general
    python detect.py --test_data_path datasets/test/RainSample --results_path results/RainSample/general \
        --detector ssdlite320_mobilenet_v3_large

The first command derains, the second runs the detector on the rainy, the derained and the clean images, and takes the
boxes on the clean ones for the truth; --segmenter does so with the label of each pixel. It writes a table, a bar chart
and a panel for each image. docs/detect.md has the protocol.
"""
import argparse
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from agreement import Curve, confusion, count, interval, judge, match, mean, overlap, rates, resample
from annotations import find_labels, read_labels
from comparison import class_colours, draw_boxes, draw_labels, tile_row
from detectors import COCO, DETECTORS, FITS, SEGMENTERS, load_detector, load_segmenter
from devices import pick_device
from images import MARK, read_rgb, write_image
from layouts import Pair, find_pairs, match_results, report_left_out
from metadata import Metadata
from outputs import check_outputs, name_outputs, without_overviews
from pairs import read_pair
from utils import (
    Gathered, InputError, RunError, a_path, add_flag, at_least, check_folder, counted, printable, progress, run_script,
    write_csv,
)

AGREES, EXTRA, MISSED = (0, 158, 115), (213, 94, 0), (240, 228, 66)  # green, red, yellow, told apart by any eye
FEW = 100  # objects, or images with --segmenter, under which the report warns


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--test_data_path", type=a_path(), default=Path("datasets/test/Rain100H"), metavar="DIR",
        help="folder of rainy and clean images (default: %(default)s)",
    )
    parser.add_argument(
        "--clean_path", type=a_path(), metavar="DIR",
        help="folder of the clean images, where --test_data_path has the rainy ones and their place does not tell",
    )
    parser.add_argument(
        "--side_by_side", choices=("left", "right"),
        help="each picture holds a rainy and a clean image side by side; this half is the rainy one",
    )
    parser.add_argument(
        "--results_path", action=Gathered, type=a_path(), nargs="+", default=[], metavar="DIR",
        help="folders of derained images, one for each method; they are named as the rainy or the clean images",
    )
    parser.add_argument(
        "--detector", type=a_path(str), metavar="NAME",
        help=f"finds the objects: an ONNX file, or of torchvision {', '.join(DETECTORS)}",
    )
    parser.add_argument(
        "--segmenter", metavar="NAME", help=f"labels the pixels: of torchvision {', '.join(SEGMENTERS)}"
    )
    parser.add_argument(
        "--backbone_dir", type=a_path(), metavar="DIR",
        help="folder with torchvision's weights of them (default: torchvision's cache, filled by download)",
    )
    parser.add_argument(
        "--fit", choices=FITS, default="letterbox",
        help="how an image becomes the input of an ONNX file: padded with grey, as Ultralytics does, or stretched"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--confidence", type=at_least(0, float), default=0.3, metavar="P",
        help="score from which on a box counts (default: %(default)s)",
    )
    parser.add_argument(
        "--clean_confidence", type=at_least(0, float), metavar="P",
        help="the same for the boxes on the clean images (default: --confidence)",
    )
    parser.add_argument(
        "--labels", type=a_path(), metavar="PATH",
        help="boxes that people drew: a COCO file, or a folder of YOLO's text files (default: those that lie with the"
        " images, if there are any)",
    )
    parser.add_argument(
        "--bootstrap", type=at_least(0), default=1000, metavar="N",
        help="samples for the intervals; 0 computes none (default: %(default)s)",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of these samples (default: %(default)s)")
    add_flag(parser, "--comparison", True, "write a labelled panel for each image")
    parser.add_argument(
        "--output_path", type=a_path(), metavar="DIR",
        help="folder of the tables, charts and panels (default: results/SET/detect-NAME, after --test_data_path and the"
        " networks)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.clean_confidence is None:
        args.clean_confidence = args.confidence
    if args.output_path is None:
        networks = "-".join(Path(name).stem for name in (args.detector, args.segmenter) if name)
        args.output_path = Path("results", Path(os.path.abspath(args.test_data_path)).name, f"detect-{networks}")
    return args


def check_options(args):
    """Refuse options that do not go together."""
    if not args.detector and not args.segmenter:
        raise InputError("expected --detector or --segmenter; --help names those of torchvision")
    if args.clean_path and args.side_by_side:
        raise InputError("--clean_path and --side_by_side: expected one of them; each says where the clean images are")
    if args.labels and not args.detector:
        raise InputError("--labels: these are boxes; expected --detector with them")
    for name in ("confidence", "clean_confidence"):
        if getattr(args, name) > 1:
            raise InputError(f"--{name} {getattr(args, name):g}: expected 0 to 1")
    check_folder("--output_path", args.output_path)


# Pictures


class Scene(NamedTuple):
    """One image of the data set, and the derained versions of it."""

    pair: Pair
    results: tuple  # a path for each folder of --results_path


def view_names(folders):
    """What the folders of --results_path are called in the report: the last parts of their paths that tell them apart.

    Raises:
        InputError: one is named twice.
    """
    paths = [Path(os.path.realpath(folder)) for folder in folders]
    twins = [folder for folder, path in zip(folders, paths) if paths.count(path) > 1]
    if twins:
        raise InputError(f"--results_path {twins[0]}: named twice; expected different folders")
    depth, names = 1, [path.name for path in paths]
    while len({*names, "rainy", "clean"}) < len(names) + 2:
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path in paths]
    return names


def find_scenes(args):
    """Find the pairs and their derained versions.

    Returns:
        (list of ``Scene``, [(folder, paths of the rainy images that it has no result of)]).
    """
    found = find_pairs(
        args.test_data_path, "--test_data_path", args.clean_path, args.side_by_side, ways_out=("--clean_path",)
    )
    report_left_out(args.test_data_path, found.alone + found.unused)
    columns, missing = [], []
    for folder in args.results_path:
        results, unused = match_results(found.pairs, folder)
        report_left_out(folder, without_overviews(unused), "no image of the set by their names")
        columns.append(results)
        if lacking := [pair.rainy for pair, path in zip(found.pairs, results) if path is None]:
            missing.append((folder, lacking))
    scenes = [Scene(pair, paths) for pair, *paths in zip(found.pairs, *columns) if None not in paths]
    if not scenes:
        raise InputError(f"--results_path {args.results_path[0]}: no image has a result in all of these folders")
    return scenes, missing


def read_scene(scene):
    """The rainy, the derained and the clean images, each (H, W, 3) uint8 of the same size."""
    rainy, clean = read_pair(scene.pair)
    derained = [read_rgb(path) for path in scene.results]
    for path, image in zip(scene.results, derained):
        if image.shape != rainy.shape:
            raise InputError(
                f"{path} is {image.shape[1]}x{image.shape[0]} but {scene.pair.rainy} is"
                f" {rainy.shape[1]}x{rainy.shape[0]}; expected equal sizes"
            )
    return [rainy, *derained, clean]


# Detection and segmentation, each: add every image, then report


class Detection:
    """What a detector finds on each view of the images, compared with what it finds on the clean ones.

    Args:
        network: a ``detectors.Network`` that returns boxes.
        views: names: "rainy", those of the results, "clean".
        args: with confidence, clean_confidence, bootstrap and seed.
        labelled: whether there are labels.
    """

    kind = "detection"
    columns = (
        "pictures", "class", "objects", "found", "precision_50", "recall_50", "f1_50", "f1_50_low", "f1_50_high",
        "difference", "difference_low", "difference_high", "precision", "recall", "f1", "f1_low", "f1_high",
        "labelled", "ap_50", "ap_50_low", "ap_50_high", "ap", "ap_low", "ap_high",
    )
    shown = {"f1_50": "F1, IoU 0.5", "f1": "F1, IoU 0.5 to 0.95"}
    shown_labelled = {"ap_50": "AP, IoU 0.5", "ap": "mAP, IoU 0.5 to 0.95"}

    def __init__(self, network, views, args, labelled):
        self.network, self.views, self.args = network, views, args
        self.counts = {view: [] for view in views[:-1]}  # ``agreement.count`` of each image
        self.judged = {view: [] for view in views} if labelled else {}  # ``agreement.judge`` of each labelled image
        self.objects = []  # (K,) boxes of each class among the labels, of each labelled image
        if labelled:
            self.shown = self.shown | self.shown_labelled
        self.difference = f"F1 0.5 less {views[1]}" if len(views) > 2 else None

    def add(self, pictures, labels=None):
        """Run the detector on the views of one image.

        Args:
            pictures: (H, W, 3) uint8 of each view.
            labels: ``annotations.Labels`` or None.

        Returns:
            What ``draw`` needs: the boxes that count, of each view.
        """
        boxes, classes = [self.network.run(picture) for picture in pictures], self.network.classes
        if labels is not None:
            self.objects.append(np.bincount(labels.boxes[:, 4].astype(int), minlength=len(classes)))
            for view, found in zip(self.views, boxes):
                self.judged[view].append(judge(found, *labels))
        limits = [self.args.confidence] * (len(boxes) - 1) + [self.args.clean_confidence]
        *compared, reference = [found[found[:, 4] >= limit] for found, limit in zip(boxes, limits)]
        for view, found in zip(self.views, compared):
            self.counts[view].append(count(found, reference, len(classes)))
        return [*compared, reference]

    def draw(self, pictures, boxes):
        """The pictures with what ``add`` returned, for the panel, and a caption."""
        drawn, classes, reference = [], self.network.classes, boxes[-1]
        for picture, found in zip(pictures, boxes):
            partners = match(found, reference, [0.5])[0]
            missed = np.delete(reference, partners[partners >= 0], 0)
            colours = [AGREES if partner >= 0 else EXTRA for partner in partners] + [MISSED] * len(missed)
            texts = [f"{classes[int(box[5])]} {box[4]:.2f}" for box in found]
            texts += [classes[int(box[5])] for box in missed]
            drawn.append(draw_boxes(picture, [*found, *missed], colours, texts))
        return drawn, "green: as on clean, red: extra, yellow: missed"

    def rows(self):
        """The rows of the table: each view's sum over the classes, then each class."""
        counts = {view: np.stack(images) for view, images in self.counts.items()}
        objects = np.stack(self.objects) if self.objects else np.zeros((1, len(self.network.classes)), int)
        images = len(counts["rainy"])
        samples = resample(images, self.args.bootstrap if images > 1 else 0, self.args.seed)
        seen = objects.sum(0) + sum(values[..., -2:].sum((0, 2)) for values in counts.values())
        numbers = sorted(np.flatnonzero(seen), key=lambda number: -counts["rainy"][:, number, -1].sum())
        totals, parts, first = [], [], self.views[1] if len(self.views) > 2 else "rainy"
        for view in self.views:
            precisions = self.precisions(view, objects, numbers)
            names = [(list(range(objects.shape[1])), "all"), *(([k], self.network.classes[k]) for k in numbers)]
            for rows, (chosen, name) in zip([totals] + [parts] * len(numbers), names):
                row = {"pictures": view, "class": name}
                if view in counts:
                    row |= agreement_row(counts[view][:, chosen].sum(1), samples)
                if view in counts and view != first and name == "all":
                    row |= difference(*(counts[each].sum(1) for each in (view, first)), samples)
                if precisions:
                    own = [precisions[k] for k in (numbers if name == "all" else chosen)]
                    row |= precision_row(own, objects[:, chosen].sum(1))
                rows.append(row)
        return [row for row in totals + parts if len(row) > 2]

    def precisions(self, view, objects, numbers):
        """{class: (1 + samples, 10) average precision, of all images and of the bootstrap's}; {} without labels."""
        if not self.objects:
            return {}
        images = len(objects)
        samples = resample(images, self.args.bootstrap if images > 1 else 0, self.args.seed)
        repeats = np.concatenate((np.ones((1, images), int), samples))
        curves = {k: Curve(self.judged[view], objects[:, k], k) for k in numbers}
        return {
            k: np.stack([curve.average_precision(row) for row in repeats])
            for k, curve in progress(curves.items(), f"average precision, {view}", len(curves))
        }

    def describe(self, rows):
        """The report for the console, a list of lines."""
        rainy = [row for row in rows if row["pictures"] == "rainy"]
        objects, images = rainy[0]["objects"], len(self.counts["rainy"])
        names = [f"{row['class']} {row['objects']}" for row in rainy[1:] if row["objects"]]
        classes = ", ".join(names[:8] + ([counted(len(names) - 8, "more class")] if len(names) > 8 else []))
        lines = [
            f"{self.network.name}: {counted(objects, 'object')} on the {counted(images, 'clean image')}, score"
            f" {self.args.clean_confidence:g} or more{f': {classes}' if classes else ''}"
        ]
        if self.judged:
            labelled = counted(int(sum(map(np.sum, self.objects))), "object")
            lines.append(f"labels of {counted(len(self.objects), 'image')}, {labelled}")
        if objects == 0:
            return [*lines, "nothing can be measured without objects: a lower --confidence finds more"]
        return lines + ([few(objects, "object")] if objects < FEW else [])


def few(number, noun):
    """The report's warning of so few objects or images."""
    return f"{counted(number, noun)} {'is' if number == 1 else 'are'} few: read the intervals before the figures"


def agreement_row(counts, samples):
    """A row's part about agreement: (images, 12) of ``agreement.count``, and ``agreement.resample``."""
    total = counts.sum(0)
    precision, recall, f1 = rates(total)
    drawn = rates(samples @ counts)[2] if several(counts[:, -2:].sum(1)) else samples[:0]
    row = {
        "objects": int(total[-1]), "found": int(total[-2]), "precision_50": precision[0], "recall_50": recall[0],
        "precision": float(mean(precision)), "recall": float(mean(recall)),
    }
    return row | with_interval("f1_50", f1[0], drawn[:, :1]) | with_interval("f1", mean(f1), mean(drawn))


def difference(counts, others, samples):
    """How much larger F1 at IoU 0.5 is than that of another view, in the same bootstrap samples of the images."""
    samples = samples if several((counts + others)[:, -2:].sum(1)) else samples[:0]
    whole, drawn = (
        rates(sums(counts))[2][..., 0] - rates(sums(others))[2][..., 0]
        for sums in (lambda values: values.sum(0), lambda values: samples @ values)
    )
    return with_interval("difference", whole, drawn)


def several(values):
    """Whether two or more images have anything: a bootstrap over a single one would say that its figure is exact."""
    return np.count_nonzero(values) > 1


def precision_row(precisions, labelled):
    """A row's part about labels.

    Args:
        precisions: (1 + samples, 10) each, as in ``Detection.precisions``, of the classes to average over.
        labelled: (images,) number of their boxes among the labels.
    """
    precisions = np.stack(precisions) if precisions else np.full((1, 1, 10), np.nan)
    first, whole = mean(precisions[..., 0], 0), mean(mean(precisions), 0)
    samples = slice(1, None if several(labelled) else 1)
    row = with_interval("ap_50", first[0], first[samples]) | with_interval("ap", whole[0], whole[samples])
    return {"labelled": int(labelled.sum())} | row


def with_interval(name, value, samples):
    """{name: value, name_low: ..., name_high: ...} with the interval of bootstrap samples."""
    low, high = interval(samples)
    return {name: float(value), f"{name}_low": low, f"{name}_high": high}


class Segmentation:
    """The labels that a segmenter gives the pixels of each view, compared with those of the clean images.

    Args and methods as for ``Detection``.
    """

    kind = "segmentation"
    columns = (
        "pictures", "class", "pixels", "agreement", "agreement_low", "agreement_high", "iou", "iou_low", "iou_high",
    )
    shown = {"agreement": "pixel agreement", "iou": "mean IoU"}

    def __init__(self, network, views, args):
        self.network, self.views, self.args = network, views, args
        self.counts = {view: [] for view in views[:-1]}  # ``agreement.confusion`` of each image
        self.colours, self.difference = class_colours(len(network.classes)), None

    def add(self, pictures, labels=None):
        maps = [self.network.run(picture) for picture in pictures]
        for view, found in zip(self.views, maps[:-1]):
            self.counts[view].append(confusion(found, maps[-1], len(self.network.classes)))
        return maps

    def draw(self, pictures, maps):
        classes = self.network.classes
        drawn = [draw_labels(picture, found, self.colours, classes) for picture, found in zip(pictures, maps)]
        return drawn, f"labels by {self.network.name}"

    def rows(self):
        rows, parts = [], []
        for view, images in self.counts.items():
            counts = np.stack(images)
            samples = resample(len(counts), self.args.bootstrap if len(counts) > 1 else 0, self.args.seed)
            agreement, each = overlap(counts.sum(0))
            drawn = [overlap(np.tensordot(row, counts, 1)) for row in samples]
            drawn_each = np.stack([values for _, values in drawn]) if drawn else np.empty((0, len(each)))
            rows.append(
                {"pictures": view, "class": "all", "pixels": int(counts.sum())}
                | with_interval("agreement", agreement, [value for value, _ in drawn])
                | with_interval("iou", mean(each), mean(drawn_each))
            )
            for k in np.flatnonzero(~np.isnan(each)):
                row = {"pictures": view, "class": self.network.classes[k], "pixels": int(counts[:, k].sum())}
                has_class = counts[:, k].sum(1) + counts[:, :, k].sum(1)
                parts.append(row | with_interval("iou", each[k], drawn_each[:, k] if several(has_class) else ()))
        return rows + parts

    def describe(self, rows):
        images, total = len(self.counts["rainy"]), rows[0]["pixels"]
        classes = [row for row in rows if row["pictures"] == "rainy" and row["class"] != "all"]
        classes.sort(key=lambda row: -row["pixels"])
        parts = ", ".join(f"{row['class']} {row['pixels'] / total:.1%}" for row in classes if row["pixels"])
        lines = [f"{self.network.name}: {counted(images, 'image')}; of the clean ones' pixels are {parts}"]
        return lines + ([few(images, "image")] if images < FEW else [])


# The report


def table(rows, shown):
    """The rows of all classes as lines for the console."""
    width = max(len(printable(row["pictures"])) for row in rows) + 2
    lines = [(" " * width + "".join(f"{title:24}" for title in shown.values())).rstrip()]
    for row in (row for row in rows if row["class"] == "all"):
        cells = []
        for name in shown:
            cell = f"{row[name]:.3f}" if name in row else ""
            if not np.isnan(row.get(f"{name}_low", np.nan)):
                cell += f" [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"
            cells.append(f"{cell:24}")
        more = f"{row['found']} found" if "found" in row else ""
        lines.append((f"{printable(row['pictures']):{width}}" + "".join(cells) + more).rstrip())
    return lines


def chart(path, rows, shown, title):
    """Write the bar chart of the rows of all classes, with their intervals; ``shown`` is {column: its title}."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["class"] == "all"]
    figure = Figure(figsize=(max(5, 2.5 + 0.5 * len(rows) * len(shown)), 3.6), dpi=100, layout="constrained")
    axes, width = figure.add_subplot(), 0.8 / len(rows)
    for number, row in enumerate(rows):
        values = np.array([row.get(name, np.nan) for name in shown])
        limits = np.array([[row.get(f"{name}_{side}", np.nan) for name in shown] for side in ("low", "high")])
        errors = np.nan_to_num(np.abs(limits - values))
        places = np.arange(len(shown)) + (number - (len(rows) - 1) / 2) * width
        axes.bar(places, values, 0.9 * width, yerr=errors, capsize=3, label=printable(row["pictures"]))
    axes.set_xticks(np.arange(len(shown)), shown.values())
    axes.set(ylim=(0, 1.05), title=title)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    write_image(path, np.asarray(canvas.buffer_rgba())[..., :3].copy(), Metadata(software=MARK))


def has_matplotlib():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no bar chart, as matplotlib is missing: pip install matplotlib")
        return False
    return True


def load_tasks(args, scenes, views):
    """The ``Detection`` and ``Segmentation`` that the options ask for, and a list of labels or None of each scene."""
    device, tasks, labels = pick_device(args.device), [], [None] * len(scenes)
    if args.detector:
        network = load_detector(args.detector, args.backbone_dir, device, args.fit)
        pairs = [scene.pair for scene in scenes]
        path = args.labels or find_labels(args.test_data_path, pairs)
        if path:
            labels, unknown = read_labels(path, pairs, network.classes, COCO)
            print(f"labels: {printable(path)}")
            if unknown:
                names = ", ".join(f"{printable(name)} {number}" for name, number in unknown.items())
                print(f"labels left out, as {network.name} does not have their classes: {names}")
            if without := sum(entry is None for entry in labels):
                print(f"labels: none of {counted(without, 'image')}, which do not count in the average precision")
        tasks.append(Detection(network, views, args, path is not None))
    if args.segmenter:
        tasks.append(Segmentation(load_segmenter(args.segmenter, args.backbone_dir, device), views, args))
    return tasks, labels


def compare(scenes, labels, tasks, panels):
    """Run the networks on each image, and write its panels.

    Args:
        scenes, labels: a ``Scene``, and ``annotations.Labels`` or None, of each image.
        tasks: ``Detection`` and ``Segmentation``.
        panels: {kind of the task: a path of each scene's panel}; empty for none.

    Returns:
        [(name, reason)] of the images that could not be read.
    """
    failures = []
    for number, scene in enumerate(progress(scenes, "comparing")):
        name = printable(scene.pair.rainy.name)
        try:
            pictures = read_scene(scene)
        except InputError as error:
            failures.append((name, printable(error)))
            tqdm.write(f"error: {printable(error)}")
            continue
        for task in tasks:
            found = task.add(pictures, labels[number])
            if panels:
                drawn, caption = task.draw(pictures, found)
                sheet = tile_row(drawn, [printable(view) for view in task.views], f"{name}: {caption}")
                write_image(panels[task.kind][number], sheet, Metadata(software=MARK))
    return failures


def main():
    args = parse_args()
    check_options(args)

    # 1. Which pictures, and where the report goes
    scenes, missing = find_scenes(args)
    views = ["rainy", *view_names(args.results_path), "clean"]
    kinds = [kind for kind, name in (("detection", args.detector), ("segmentation", args.segmenter)) if name]
    names = name_outputs([(Path(), scene.pair.rainy) for scene in scenes], [".jpg"] * len(scenes))
    panels = {kind: [args.output_path / kind / name for name in names] for kind in kinds if args.comparison}
    reports = [args.output_path / f"{kind}{suffix}" for kind in kinds for suffix in (".csv", ".png")]
    read = [path for scene in scenes for path in (*scene.pair[:2], *scene.results)]
    check_outputs(sum(panels.values(), reports), read, args.output_path, "")
    charts = has_matplotlib()

    # 2. Run the networks on each
    tasks, labels = load_tasks(args, scenes, views)
    failures = compare(scenes, labels, tasks, panels)
    if len(failures) == len(scenes):
        raise RunError(f"none of {counted(len(scenes), 'image')} could be read, the first: {failures[0][1]}")

    # 3. Measure
    for task in tasks:
        rows = task.rows()
        write_csv(args.output_path / f"{task.kind}.csv", task.columns, rows)
        lines = task.describe(rows)
        differences = {"difference": printable(task.difference)} if task.difference else {}
        print("\n".join([*map(printable, lines), *table(rows, task.shown | differences)]))
        if charts:
            chart(args.output_path / f"{task.kind}.png", rows, task.shown, lines[0].partition(":")[0])
    if args.bootstrap:
        print(f"in brackets: 95 % of {counted(args.bootstrap, 'bootstrap sample')} of the images, seed {args.seed}")
    print(f"report in {printable(args.output_path)}")

    # 4. What was not done
    if failures:
        names = ", ".join(name for name, _ in failures)
        raise RunError(f"{len(failures)} of {counted(len(scenes), 'image')} could not be read: {names}")
    if missing:
        folder, paths = missing[0]
        names = ", ".join(printable(path.name) for path in paths)
        number = counted(len(paths), "image")
        raise RunError(f"--results_path {folder}: no result of {number}, left out for all folders: {names}")


if __name__ == "__main__":
    run_script(main)
