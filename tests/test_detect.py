"""detect.py: agreement of boxes and label maps, average precision, detectors of torchvision and in ONNX files."""
import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_model, get_model_weights

from agreement import (
    RECALLS, THRESHOLDS, Curve, confusion, count, interval, iou, judge, match, mean, overlap, rates, resample, suppress,
)
from checkpoints import save_checkpoint
from conftest import contents, photo, save
from detect import difference, view_names
from detectors import COCO, class_names, letterbox
from images import MARK, write_image
from metadata import Metadata

NONE = np.empty((0, 6))
PERSON, CAR = 0, 2


def box(left, top, right, bottom, score=0.9, name=PERSON):
    return [left, top, right, bottom, score, name]


def boxes(*rows):
    return np.array(rows, float).reshape(-1, 6)


# Boxes


def test_iou_of_boxes():
    a = boxes(box(0, 0, 10, 10), box(5, 5, 5, 9))
    b = boxes(box(0, 0, 10, 10), box(5, 0, 15, 10), box(10, 0, 20, 10), box(2, 2, 4, 4))
    assert np.allclose(iou(a, b), [[1, 50 / 150, 0, 0.04], [0, 0, 0, 0]])
    assert np.allclose(iou(b, a, of_first=True)[:, 0], [1, 0.5, 0, 1])
    assert iou(NONE, a).shape == (0, 2) and iou(a, NONE).shape == (2, 0)


def test_each_box_is_matched_once_and_the_best_score_chooses_first():
    reference = boxes(box(0, 0, 10, 10), box(20, 0, 30, 10))
    found = boxes(
        box(0, 0, 10, 9, 0.5), box(0, 0, 10, 10, 0.4), box(0, 1, 10, 10, 0.8), box(20, 0, 30, 10, 0.3),
    )
    # Two further boxes on the first object are duplicates, though one of them fits better than the one with 0.8.
    assert match(found, reference, [0.5]).tolist() == [[-1, -1, 0, 1]]
    assert match(found[:2], reference, [0.5]).tolist() == [[0, -1]]


def test_ties_and_limits_of_matching():
    same = boxes(box(0, 0, 10, 10), box(0, 0, 10, 10))
    assert match(same, same[:1], [0.5]).tolist() == [[0, -1]], "of equal scores the first chooses"
    assert match(same[:1], same, [0.5]).tolist() == [[1]], "of equal IoU the last is taken, as by COCO"
    half = boxes(box(0, 0, 10, 5))
    assert match(half, same[:1], [0.5, 0.55]).tolist() == [[0], [-1]], "an IoU of the threshold is enough"
    assert match(boxes(box(0, 0, 10, 10, 0.9, CAR)), same, [0.5]).tolist() == [[-1]], "of another class"


def test_suppression_is_by_class():
    kept = suppress(boxes(
        box(0, 0, 10, 9, 0.5), box(0, 0, 10, 10, 0.9), box(0, 0, 10, 10, 0.8, CAR), box(0, 0, 10, 5, 0.7),
    ))
    assert kept[:, 4].tolist() == [0.9, 0.8, 0.7], "an IoU of just 0.5 is not over it"


@pytest.mark.parametrize(
    ("found", "reference", "expected"),
    [
        (boxes(), boxes(), (np.nan, np.nan, np.nan)),
        (boxes(), boxes(box(0, 0, 9, 9)), (np.nan, 0, 0)),
        (boxes(box(0, 0, 9, 9)), boxes(), (0, np.nan, 0)),
        (boxes(box(0, 0, 9, 9)), boxes(box(0, 0, 9, 9)), (1, 1, 1)),
        (boxes(box(0, 0, 9, 9, 0.9, CAR)), boxes(box(0, 0, 9, 9)), (0, 0, 0)),
        (boxes(box(0, 0, 9, 9), box(0, 0, 9, 9, 0.8)), boxes(box(0, 0, 9, 9)), (1 / 2, 1, 2 / 3)),
        (boxes(box(0, 0, 9, 9)), boxes(box(0, 0, 9, 9), box(20, 0, 29, 9)), (1, 1 / 2, 2 / 3)),
    ],
    ids=["both empty", "nothing found", "nothing there", "equal", "other class", "duplicate", "missed"],
)
def test_precision_recall_and_f1(found, reference, expected):
    total = count(found, reference, 3).sum(0)
    assert np.allclose([values[0] for values in rates(total)], expected, equal_nan=True)


def test_the_mean_over_thresholds():
    counts = count(boxes(box(0, 0, 100, 72)), boxes(box(0, 0, 100, 100)), 3)
    assert counts[PERSON].tolist() == [1] * 5 + [0] * 5 + [1, 1] and not counts[1:].any()
    assert np.isclose(mean(rates(counts[PERSON])[2]), 0.5)
    assert np.allclose(THRESHOLDS, [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95])


# Average precision


def labels_of(*rows):
    return boxes(*rows)[:, [0, 1, 2, 3, 5]]


def average_precision(found, labels, crowds=labels_of(), name=PERSON):
    """Of one image at IoU 0.5."""
    objects = [np.count_nonzero(labels[:, 4] == name)]
    return Curve([judge(found, labels, crowds)], objects, name).average_precision()[0]


def test_average_precision_by_hand():
    """Right, wrong, right of three objects: precision 1 up to recall 1/3, then 2/3 up to 2/3, then 0."""
    labels = labels_of(*(box(left, 0, left + 10, 10) for left in (0, 20, 40)))
    found = boxes(box(0, 0, 10, 10, 0.9), box(60, 0, 70, 10, 0.8), box(20, 0, 30, 10, 0.7))
    # Of the 101 recalls 0, 0.01, ..., 1 there are 34 up to 1/3 and 33 more up to 2/3.
    assert len(RECALLS) == 101 and np.isclose(average_precision(found, labels), (34 + 33 * 2 / 3) / 101)
    assert average_precision(NONE, labels) == 0
    assert np.isnan(average_precision(found, labels, name=CAR)), "no object of this class"
    worse = np.concatenate((found, boxes(box(0, 0, 10, 10, 0.95))))
    assert average_precision(worse, labels) < average_precision(found, labels), "a duplicate is wrong"


def test_what_is_found_in_a_crowd_does_not_count():
    labels, crowds = labels_of(box(0, 0, 10, 10)), labels_of(box(50, 0, 90, 40))
    found = boxes(box(60, 0, 70, 10, 0.9), box(0, 0, 10, 10, 0.8))
    assert average_precision(found, labels, crowds) == 1 and average_precision(found, labels) == 0.5


def drawn_scene():
    """[(boxes found, labels, crowds)] of twelve images with duplicates, ties, crowds and three classes."""
    rng, scene = np.random.default_rng(3), []
    for image in range(12):
        number = int(rng.integers(0, 6))
        corner, size = rng.integers(0, 60, (number, 2)), rng.integers(15, 50, (number, 2))
        labels = np.column_stack((corner, corner + size, rng.integers(0, 3, number))).astype(float)
        crowd = rng.random(number) < 0.2
        rows = []
        for label in np.repeat(labels, 2, 0):
            name = label[4] if rng.random() < 0.8 else rng.integers(0, 3)
            rows.append([*(label[:4] + rng.integers(-6, 7, 4)), rng.integers(1, 12) / 12, name])
        for _ in range(150 if image == 0 else 2):  # more than the hundred that count
            corner = rng.integers(0, 60, 2)
            rows.append([*corner, *(corner + rng.integers(5, 40, 2)), rng.integers(1, 12) / 12, 0])
        scene.append((boxes(*rows), labels[~crowd], labels[crowd]))
    return scene


# For each class, at the IoUs 0.5, 0.65, 0.8 and 0.95; computed once by pycocotools 2.0.11.
COCO_VALUES = [
    [0.05910056, 0.04379393, 0.01103865, 0.0],
    [0.5854314, 0.46958982, 0.08274399, 0.0],
    [0.54072907, 0.54072907, 0.0, 0.0],
]


def test_average_precision_is_that_of_pycocotools():
    scene = drawn_scene()
    judged = [judge(*image) for image in scene]
    for name, expected in enumerate(COCO_VALUES):
        objects = [np.count_nonzero(labels[:, 4] == name) for _, labels, _ in scene]
        curve = Curve(judged, objects, name)
        assert np.allclose(curve.average_precision()[::3], expected, atol=1e-8)
        # In a bootstrap sample an image counts as often as it was drawn.
        assert np.allclose(curve.average_precision(np.full(12, 3)), curve.average_precision())
        half, part = np.repeat((1, 0), 6), Curve(judged[:6], objects[:6], name)
        assert np.allclose(curve.average_precision(half), part.average_precision())


# Label maps, intervals


def test_label_maps_by_hand():
    reference = np.array([[0, 0, 1, 1], [0, 0, 1, 1]])
    labels = np.array([[0, 0, 1, 2], [0, 1, 1, 2]])
    counts = confusion(labels, reference, 4)
    assert counts.tolist() == [[3, 1, 0, 0], [0, 2, 2, 0], [0] * 4, [0] * 4]
    agreement, each = overlap(counts)
    assert agreement == 5 / 8 and np.allclose(each, [3 / 4, 2 / 5, 0, np.nan], equal_nan=True)
    assert np.isclose(mean(each), (3 / 4 + 2 / 5) / 3), "a class that neither map has is left out"


def test_the_bootstrap_is_seeded_and_draws_whole_sets():
    drawn = resample(5, 400, seed=1)
    assert drawn.shape == (400, 5) and (drawn.sum(1) == 5).all() and np.array_equal(drawn, resample(5, 400, seed=1))
    assert not np.array_equal(drawn, resample(5, 400, seed=2))
    low, high = interval((drawn @ [0, 0, 1, 1, 1]) / 5)
    assert 0 < low < 0.6 < high <= 1
    assert np.isnan(interval([np.nan])).all() and interval([np.nan, 2.0, 2.0]) == (2, 2)


# The script with an ONNX file

SIDE = 64  # px of the pictures; the network's input is half of it


def write_detector(path, output=None, size=(32, 32), metadata=(), batch=1):
    """An ONNX detector whose scores follow the brightness m of the image, as ``expected_boxes`` has them."""
    onnx = pytest.importorskip("onnx", reason="onnx is missing, which makes the ONNX files of these tests")
    from onnx import TensorProto, helper

    fixed, slope = np.zeros((2, 1, 5, 6), np.float32)
    fixed[0] = [
        box(2, 2, 12, 12, 0), box(16, 16, 28, 28, -1, CAR), box(2, 2, 12, 13, -0.1), box(2, 20, 10, 30, 0.6, 16),
        [0] * 6,
    ]
    slope[0, :4, 4] = 1, 2, 1, -0.8
    constants = {"fixed": fixed, "slope": slope, "axes": np.array([1, 2, 3])}
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], ["mean"], keepdims=1),
        helper.make_node("Squeeze", ["mean", "last"], ["m"]),
        helper.make_node("Mul", ["slope", "m"], ["change"]),
        helper.make_node("Add", ["fixed", "change"], ["detections"]),
    ]
    constants["last"] = np.array([3])
    if output is not None:
        constants["other"] = output
        nodes = [helper.make_node("Identity", ["other"], ["detections"])]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    shape = (1, 5, 6) if output is None else output.shape
    graph = helper.make_graph(
        nodes, "detector", [helper.make_tensor_value_info("images", TensorProto.FLOAT, (batch, 3, *size))],
        [helper.make_tensor_value_info("detections", TensorProto.FLOAT, shape)], tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, dict(metadata))
    path.write_bytes(model.SerializeToString())
    return path


def flat(level, height=SIDE, width=SIDE):
    return np.full((height, width, 3), level, np.uint8)


@pytest.fixture
def data(tmp_path):
    """Three flat pairs, one of them without rain, and results of two methods, of which the second does nothing."""
    for number, (rainy, derained) in enumerate([(100, 180), (100, 180), (200, 200)], 1):
        save(tmp_path / f"set/norain-{number}.png", flat(200))
        save(tmp_path / f"set/rainy/rain-{number}.png", flat(rainy))
        save(tmp_path / f"good/rain-{number}.png", flat(derained))
        save(tmp_path / f"idle/norain-{number}.png", flat(rainy))
    return tmp_path


@pytest.fixture
def detect(run, data):
    """detect(*options) -> the result of a run with an ONNX file; its output is data/"out"."""
    path = write_detector(data / "tiny.onnx")

    def start(*options):
        return run(
            "detect", "--test_data_path", data / "set", "--detector", path, "--confidence", 0.25, "--output_path",
            data / "out", "--device", "cpu", "--bootstrap", 100, *options,
        )

    return start


def read_table(path):
    """{(pictures, class): row}, numbers as such."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (row.pop("pictures"), row.pop("class")): {name: float(value) for name, value in row.items() if value}
        for row in rows
    }


@pytest.mark.slow
def test_the_table_of_several_methods(detect, data):
    """On a clean picture (m = 0.78) a person and a car; on a rainy one (m = 0.39) the person, and a dog too much."""
    result = detect("--results_path", data / "good", data / "idle")
    assert result.status == 0, result
    table = read_table(data / "out/detection.csv")
    assert {view for view, _ in table} == {"rainy", "good", "idle"}
    rainy, good = table["rainy", "all"], table["good", "all"]
    # Twice 1 of 2 found and 1 of 2 there, once 2 of 2.
    assert rainy["objects"] == rainy["found"] == 6 and table["idle", "all"] == rainy
    for name in ("precision_50", "recall_50", "f1_50", "precision", "recall", "f1"):
        assert np.isclose(rainy[name], 4 / 6, atol=1e-6) and good[name] == 1
    # In a sample with the third picture n times, F1 of the rainy ones is (3 + n) / 6.
    assert [rainy[f"difference{end}"] for end in ("", "_low", "_high")] == pytest.approx([-1 / 3, -0.5, 0], abs=1e-6)
    assert "difference" not in good
    assert table["rainy", "car"]["recall_50"] == pytest.approx(1 / 3, abs=1e-6)
    assert table["rainy", "dog"] | {"found": 2, "f1_50": 0} == table["rainy", "dog"]
    assert np.isnan(table["rainy", "dog"]["recall_50"]) and np.isnan(table["good", "dog"]["f1_50"])
    assert 0.5 <= rainy["f1_50_low"] < rainy["f1_50"] < rainy["f1_50_high"] == 1
    for text in ("6 objects on the 3 clean images", "person 3, car 3", "few", "0.667 [0.500, 1.000]", "seed 0"):
        assert text in result.out, result.out
    first = contents(data / "out")
    assert detect("--results_path", data / "good", data / "idle").status == 0 and contents(data / "out") == first
    assert detect("--results_path", data / "idle", "--bootstrap", 0).status == 0
    assert np.isnan(read_table(data / "out/detection.csv")["rainy", "all"]["f1_50_low"])


def test_panels_and_chart(detect, data):
    assert detect("--results_path", data / "good").status == 0
    names = {f"detection/rain-{number}.jpg" for number in (1, 2, 3)} | {"detection.csv", "detection.png"}
    assert set(contents(data / "out")) == names
    sheet = np.asarray(Image.open(data / "out/detection/rain-1.jpg")).astype(int)
    assert sheet.shape[1] >= 3 * SIDE
    third = [sheet[:, k * (SIDE + 6) : (k + 1) * (SIDE + 6)] for k in range(3)]

    def has(picture, colour):
        return (np.abs(picture - colour).sum(2) < 60).any()

    red, yellow = (213, 94, 0), (240, 228, 66)
    assert has(third[0], red) and has(third[0], yellow) and not has(third[1], red) and not has(third[2], yellow)
    assert Image.open(data / "out/detection.png").info["Software"] == "SAPNet"
    before = contents(data / "out")
    assert detect("--comparison", False, "--output_path", data / "other").status == 0
    assert set(contents(data / "other")) == {"detection.csv", "detection.png"} and contents(data / "out") == before


def test_nothing_found_and_a_single_image_have_no_interval(detect, data):
    for number in (2, 3):
        (data / f"set/norain-{number}.png").unlink()
    assert detect().status == 0
    row = read_table(data / "out/detection.csv")["rainy", "all"]
    assert row["f1_50"] == 0.5 and np.isnan(row["f1_50_low"])
    result = detect("--confidence", 1)
    assert result.status == 0 and " 0 objects on the 1 clean image," in result.out
    row = read_table(data / "out/detection.csv")["rainy", "all"]
    assert row["found"] == 0 and all(np.isnan(row[name]) for name in ("precision_50", "recall_50", "f1_50", "f1"))


@pytest.mark.parametrize("images, exact", [(1, False), (2, True)])
def test_a_difference_seen_on_one_image_alone_has_no_interval(images, exact):
    counts, others = np.zeros((2, 20, 12), int)
    counts[:images], others[:images] = 2, 1
    counts[:images, -1] = others[:images, -1] = 2
    row = difference(counts, others, resample(20, 50))
    assert row["difference"] == 1 - 2 / 3 and np.isfinite(row["difference_low"]) == exact


def test_the_thresholds_are_options(detect, data):
    assert detect("--clean_confidence", 0.7).status == 0  # the car has 0.57 on the clean picture
    row = read_table(data / "out/detection.csv")["rainy", "all"]
    assert row["objects"] == 3 and row["found"] == 6


def test_the_scores_are_those_of_the_picture_in_its_proportions(tmp_path):
    """A wide picture is padded, not stretched, and its boxes come back in its own px."""
    pytest.importorskip("onnxruntime")
    from detectors import load_onnx

    canvas, scale, corner = letterbox(flat(200, 32, 64), 32, 32)
    assert scale == (0.5, 0.5) and corner == (0, 8) and (canvas[:8] == 114).all() and (canvas[8:24] == 200).all()
    names = {"names": str(dict(enumerate("abcdefghijklmnopq")))}
    path = write_detector(tmp_path / "tiny.onnx", metadata=names.items())
    network = load_onnx(path)
    assert network.classes == tuple("abcdefghijklmnopq")
    found = network.run(flat(200, 32, 64))
    m = (114 + 200) / 2 / 255
    # In the input 2 2 12 12, of which the rows from 8 on are picture; suppression keeps one of the two persons.
    expected = [[4, 0, 24, 8, m, 0], [32, 16, 56, 32, 2 * m - 1, 2]]
    assert np.allclose(found[:2], expected, atol=1e-5)
    found = load_onnx(path, "stretch").run(flat(200, 32, 64))
    assert np.allclose(found[0], [4, 2, 24, 12, 200 / 255, 0], atol=1e-5)


# Labels


def coco(path, changes=()):
    """A COCO file for the pictures of ``data``: person and car where they are found, a cat that is not, a unicorn."""
    names = {7: "Person", 8: "car", 9: "cat", 10: "unicorn"}
    shown = {7: [4, 4, 20, 20], 8: [32, 32, 24, 24], 9: [0, 50, 9, 9], 10: [0, 0, 9, 9]}
    content = {
        "images": [{"id": k, "file_name": f"x/norain-{k}.png", "width": SIDE, "height": SIDE} for k in (1, 2, 3)],
        "categories": [{"id": number, "name": name} for number, name in names.items()],
        "annotations": [
            {"id": 9 * k + number, "image_id": k, "category_id": number, "bbox": area, "iscrowd": 0}
            for k in (1, 2, 3) for number, area in shown.items()
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | dict(changes)))
    return path


def yolo(folder):
    """The same as ``coco``, as text files."""
    folder.mkdir(parents=True)
    lines = ["0 0.21875 0.21875 0.3125 0.3125", "2 0.5 0.5 0.875 0.5 0.875 0.875 0.5 0.875", "15 0.07 0.85 0.1 0.1"]
    for number in (1, 2, 3):
        (folder / f"norain-{number}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("kind", ["coco", "yolo"])
def test_average_precision_against_labels(kind, detect, data):
    path = coco(data / "set/annotations/boxes.json") if kind == "coco" else yolo(data / "set/labels")
    result = detect("--results_path", data / "good")
    assert result.status == 0 and f"labels: {path}" in result.out, result
    assert ("unicorn 3" in result.out) == (kind == "coco") and "labels of 3 images, 9 objects" in result.out
    table = read_table(data / "out/detection.csv")
    # The car is found on one of three rainy pictures, so at 34 of 101 recalls; the cat never.
    for view, car in (("clean", 1), ("good", 1), ("rainy", 34 / 101)):
        for name, expected in (("person", 1), ("car", car), ("cat", 0), ("all", (1 + car) / 3)):
            row = table[view, name]
            assert row["ap_50"] == pytest.approx(expected, abs=1e-6) and row["ap"] == pytest.approx(expected, abs=1e-6)
        assert row["labelled"] == 9
    assert table["rainy", "all"]["ap_50_low"] <= table["rainy", "all"]["ap_50"] <= table["rainy", "all"]["ap_50_high"]
    assert "objects" not in table["clean", "all"]


def test_labels_of_two_images_of_one_name_are_refused(detect, data):
    images = [{"id": number, "file_name": f"{folder}/norain-1.png"} for number, folder in ((1, "train"), (2, "val"))]
    result = detect("--labels", coco(data / "boxes.json", {"images": images}.items()))
    assert result.status == 2 and "train/norain-1.png and val/norain-1.png have one name" in result.err


@pytest.mark.parametrize("text", ["'person'", "(" * 10**5, "{1: 'a'}", "", None, "[1"])
def test_damaged_names_of_classes_are_those_of_coco(text):
    assert class_names(text) == COCO


def test_images_without_labels_and_classes_of_ones_own(detect, data):
    images = [{"id": 2, "file_name": "rain-2.jpg"}]
    result = detect("--labels", coco(data / "boxes.json", {"images": images}.items()))
    assert result.status == 0 and "none of 2 images" in result.out and "labels of 1 image, 3 objects" in result.out
    folder = yolo(data / "own")
    (folder / "norain-2.txt").unlink()  # without objects
    (folder / "classes.txt").write_text("\n".join(["car", "x", "Person", *"abcdefghijklm"]))
    result = detect("--labels", folder)
    assert result.status == 0 and "m 2" in result.out and "labels of 3 images, 4 objects" in result.out
    assert read_table(data / "out/detection.csv")["clean", "all"]["ap_50"] == 0, "the two classes changed places"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"annotations": [{"image_id": 1}]}, "not COCO's JSON"),
        ({"images": [{"id": 1, "file_name": "norain-1.png", "width": 9, "height": 9}]}, "9x9"),
        ({"images": []}, "expected boxes of classes"),
        ({"categories": [{"id": k, "name": "unicorn"} for k in (7, 8, 9, 10)]}, "only boxes of unicorn in"),
    ],
)
def test_wrong_coco_files_are_named(change, named, refused, detect, data):
    path = coco(data / "boxes.json", change.items())
    result = detect("--labels", path)
    assert result.status == 2 and str(path) in result.err and named in result.err and "Traceback" not in result.err


@pytest.mark.parametrize(
    "text",
    [
        "names: ['car', x, \"Person\", d, e, f, g, h,  # of our own\n  i, j, k, l, m, n, o, traffic light]\nval: v",
        "names:\n  0: car\n  1: x\n  2: 'Person'\n" + "".join(f"  {k}: name {k}\n" for k in range(3, 16)) + "nc: 16\n",
        "names:\n- car\n- x\n- Person\n" + "- other\n" * 13 + "train: t\n",
    ],
    ids=["in brackets", "numbered", "listed"],
)
def test_the_classes_of_a_yaml_file_count(text, detect, data):
    folder = yolo(data / "own/labels/test")
    (data / "own/data.yaml").write_text(text)
    (data / "own/other.yml").write_text("lr: 0.1\n")
    result = detect("--labels", folder)
    assert result.status == 0 and "classes: " in result.out and "data.yaml" in result.out, result
    assert read_table(data / "out/detection.csv")["clean", "all"]["ap_50"] == 0, "the two classes changed places"


@pytest.mark.slow
@pytest.mark.parametrize("text", ["names: {0: car}", "names: ['it''s']", "names:\n  1: car\n", "names: other.txt"])
def test_classes_that_are_not_read_are_not_taken_for_those_of_coco(text, detect, data):
    folder = yolo(data / "own")
    (folder / "data.yaml").write_text(text)
    result = detect("--labels", folder)
    assert result.status == 2 and "data.yaml" in result.err and "expected also" in result.err, result
    (folder / "data.yaml").unlink()
    assert "classes: the 80 of COCO, as there is no classes.txt" in detect("--labels", folder).out


@pytest.mark.parametrize("line", ["0 0.1 0.1 0.2", "person 0 0 1 1", "0 0 0 nan 1", "95 0 0 1 1", "0 10 20 30 40"])
def test_wrong_text_files_are_named(line, detect, data):
    path = yolo(data / "own") / "norain-2.txt"
    path.write_text("\n" + line)
    result = detect("--labels", path.parent)
    assert result.status == 2 and str(path) in result.err and "line 2" in result.err


def test_labels_in_two_places_are_asked_about(detect, data):
    coco(data / "set/boxes.json")
    yolo(data / "set/labels")
    result = detect()
    assert result.status == 2 and "--labels" in result.err and "boxes.json" in result.err


# torchvision's networks


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with random weights of the smallest detector and segmenter, under torchvision's names."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("ssdlite320_mobilenet_v3_large", "lraspp_mobilenet_v3_large"):
        published = get_model_weights(name).DEFAULT
        torch.manual_seed(0)
        net = get_model(name, weights=None, weights_backbone=None, num_classes=len(published.meta["categories"]))
        for module in net.modules():  # torchvision's own are so small that every picture would look the same
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
        save_checkpoint(folder / published.url.rsplit("/", 1)[1], net.state_dict())
    return folder


@pytest.mark.slow
def test_torchvisions_networks_run(run, data, weights):
    """Of the three views the derained one is the clean one once more."""
    (data / "set/norain-3.png").unlink()
    for number in (1, 2):
        for path in (f"set/norain-{number}.png", f"same/{number}.png"):
            save(data / path, photo(number, SIDE, SIDE))
    result = run(
        "detect", "--test_data_path", data / "set", "--results_path", data / "same", "--detector",
        "ssdlite320_mobilenet_v3_large", "--segmenter", "lraspp_mobilenet_v3_large", "--backbone_dir", weights,
        "--confidence", 0.01, "--output_path", data / "out", "--device", "cpu", "--bootstrap", 100,
    )
    assert result.status == 0, result
    ends = (".csv", ".png", "/rain-1.jpg", "/rain-2.jpg")
    assert set(contents(data / "out")) == {f"{kind}{end}" for kind in ("detection", "segmentation") for end in ends}
    found, labelled = read_table(data / "out/detection.csv"), read_table(data / "out/segmentation.csv")
    same, rainy = found["same", "all"], found["rainy", "all"]
    assert same["objects"] > 0 and same["f1"] == same["f1_50_low"] == 1 and 0 <= rainy["f1_50"] < 1
    same, rainy = labelled["same", "all"], labelled["rainy", "all"]
    assert same["pixels"] == 2 * SIDE**2 and same["agreement"] == same["iou"] == same["iou_low"] == 1
    assert rainy["agreement_low"] <= rainy["agreement"] <= rainy["agreement_high"] < 1 and 0 <= rainy["iou"] < 1
    for text in ("ssdlite320_mobilenet_v3_large: ", "lraspp_mobilenet_v3_large: 2 images", "pixel agreement"):
        assert text in result.out


@pytest.mark.parametrize("option", ["--detector", "--segmenter"])
def test_missing_and_wrong_weights_are_explained(option, refused, data, tmp_path, monkeypatch):
    name = {"--detector": "ssdlite320_mobilenet_v3_large", "--segmenter": "lraspp_mobilenet_v3_large"}[option]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    url = get_model_weights(name).DEFAULT.url
    command = ("detect", "--test_data_path", data / "set", "--output_path", data / "out", option, name)
    folder = tmp_path / "weights"
    refused(*command, "--backbone_dir", folder, names=[name, option, url, f"--backbone_dir {folder}", "no file"])
    folder.mkdir()
    save_checkpoint(folder / f"{name}.pth", {"a": torch.ones(2)})
    refused(*command, "--backbone_dir", folder, names=[folder / f"{name}.pth", "not the weights", url])

    def fail(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    refused(*command, names=["no network", url, "--backbone_dir"])
    refused(*command[:-1], "resnet18", names=[option, "resnet18", name])


# Wrong inputs


def test_methods_are_told_apart_by_as_much_as_it_takes(tmp_path):
    folders = [tmp_path / name for name in ("a/x", "b/x")]
    assert view_names(folders) == ["a/x", "b/x"] and view_names([tmp_path / "a/y", tmp_path / "b/x"]) == ["y", "x"]
    assert view_names([tmp_path / "a/rainy"]) == ["a/rainy"]


def test_options_that_do_not_go_together(refused, data):
    base = ("detect", "--test_data_path", data / "set")
    refused(*base, names=["--detector or --segmenter"])
    refused(*base, "--segmenter", "lraspp_mobilenet_v3_large", "--labels", data, names=["--labels", "--detector"])
    refused(*base, "--detector", data / "none.onnx", names=[data / "none.onnx", "no such file"])
    refused(*base, "--detector", "x", "--confidence", 2, names=["--confidence 2"])
    refused(*base, "--detector", "x", "--results_path", data / "good", data / "good", names=["good", "twice"])
    refused("detect", "--test_data_path", data / "nowhere", "--detector", "x", names=[data / "nowhere"])
    refused(*base, "--detector", "x", "--results_path", data / "nowhere", names=["--results_path", "nowhere"])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"none", "no readable ONNX file"), (np.zeros((1, 84, 20), np.float32), "nms=True"),
        (np.full((1, 1, 6), 99, np.float32), "class 99"), ((0, 32), "height and width"),
    ],
    ids=["no ONNX", "raw output", "class", "free size"],
)
def test_wrong_onnx_files_are_explained(content, named, detect, data):
    path = data / "tiny.onnx"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, tuple):
        write_detector(path, size=("height", "width"))
    else:
        content = np.array([[box(1, 1, 9, 9, 0.9, 99)]], np.float32) if content.shape[-1] == 6 else content
        write_detector(path, content)
    result = detect()
    assert result.status == 2 and str(path) in result.err and named in result.err and "Traceback" not in result.err
    assert not (data / "out/detection.csv").exists()


@pytest.mark.parametrize(
    ("size", "batch", "imgsz"),
    [((32, 32), 2, ""), (("h", "w"), 1, "640"), (("h", "w"), 1, "[640, 6"), (("h", "w"), 1, "[64]")],
)
def test_an_input_that_no_picture_fits_is_refused(size, batch, imgsz, detect, data):
    write_detector(data / "tiny.onnx", size=size, metadata={"imgsz": imgsz}.items(), batch=batch)
    result = detect()
    assert result.status == 2 and "expected one of 1 x 3 x height x width" in result.err, result


def test_a_size_that_the_file_leaves_free_comes_from_its_metadata(detect, data):
    write_detector(data / "tiny.onnx", size=("height", "width"), metadata={"imgsz": "[32, 32]"}.items())
    assert detect().status == 0 and read_table(data / "out/detection.csv")["rainy", "all"]["objects"] == 6


@pytest.mark.parametrize("package", ["onnxruntime", "matplotlib"])
def test_missing_packages_are_named(package, detect, data, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    result = detect()
    assert f"pip install {package}" in result.out + result.err and "Traceback" not in result.err
    assert result.status == (2 if package == "onnxruntime" else 0)
    assert (data / "out/detection.csv").exists() == (package == "matplotlib")
    assert not (data / "out/detection.png").exists()


def test_the_contact_sheet_of_the_results_is_not_worth_a_word(detect, data):
    write_image(data / "good/contact_sheet.jpg", flat(180), Metadata(software=MARK))
    result = detect("--results_path", data / "good")
    assert result.status == 0 and "left out" not in result.out, result
    save(data / "good/contact_sheet.jpg", flat(180))
    assert "left out 1 (no image of the set by their names): contact_sheet.jpg" in \
        detect("--results_path", data / "good").out, "it is somebody else's"


def test_pictures_that_are_missing_damaged_or_of_another_size(detect, data):
    (data / "good/rain-1.png").write_bytes(b"none")
    save(data / "good/rain-2.png", flat(180, 32, 32))
    result = detect("--results_path", data / "good")
    assert result.status == 1 and "2 of 3 images could not be read: rain-1.png, rain-2.png" in result.err
    assert "32x32" in result.out and read_table(data / "out/detection.csv")["rainy", "all"]["objects"] == 2
    (data / "good/rain-1.png").unlink()
    (data / "good/rain-2.png").unlink()
    result = detect("--results_path", data / "good")
    assert result.status == 1 and "no result of 2 images" in result.err and "rain-1.png, rain-2.png" in result.err


@pytest.mark.parametrize("name", ["detection.csv", "detection.png", "detection/rain-2.jpg"])
def test_nothing_else_is_overwritten(name, detect, data):
    path = data / "out" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    result = detect()
    assert result.status == 2 and f"{name} would be overwritten" in result.err and "--suffix" not in result.err
    assert contents(data / "out") == {name: b"mine"}


@pytest.mark.slow
def test_detector_of_the_shared_folder(detect, data, shared, run):
    """On its own kind of picture it finds what is there: the first pair of Rain100H shows a bear."""
    pytest.importorskip("onnxruntime")
    for path in ("norain-001.png", "rainy/rain-001.png"):
        source = shared / "data/test/Rain100H" / path
        (data / "one" / Path(path).parent).mkdir(parents=True, exist_ok=True)
        (data / "one" / path).write_bytes(source.read_bytes())
    result = run(
        "detect", "--test_data_path", data / "one", "--detector", shared / "weights/centernet_coco80.onnx",
        "--output_path", data / "out", "--confidence", 0.5,
    )
    assert result.status == 0 and read_table(data / "out/detection.csv")["rainy", "bear"]["objects"] == 1, result
