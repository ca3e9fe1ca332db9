"""The fixed networks of detect.py: what they find in an image, by torchvision's names or from an ONNX file.

    python -c "from detectors import DETECTORS, SEGMENTERS; print(DETECTORS, SEGMENTERS)"

A detector's boxes are x1 y1 x2 y2 in px of the image, the score from 0 to 1 and the number of the class.
"""
import ast
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torchvision.models import detection, get_model, get_model_weights, list_models, segmentation

from agreement import suppress
from backbones import load_published
from inference import to_tensor
from utils import InputError

DETECTORS = list_models(module=detection)
SEGMENTERS = list_models(module=segmentation)
NO_EPSILON = {f"{kind}_resnet50_fpn" for kind in ("fasterrcnn", "keypointrcnn", "maskrcnn", "retinanet")}
PADDING = 114  # grey level beside an image that is not square, as Ultralytics trains and runs its detectors
COCO = (  # the classes of a detector or of label files that do not name theirs, in COCO's order
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
END_TO_END = "expected boxes as N x 6 (x1 y1 x2 y2 score class), as Ultralytics exports them with nms=True"


class Network(NamedTuple):
    """A fixed network, ready to use."""

    name: str
    classes: tuple  # their names, by number
    run: callable  # (H, W, 3) uint8 RGB -> (N, 6) float64 boxes, or (H, W) integer labels


def tidy(boxes, height, width):
    """(N, 6) boxes cut at the borders of the image, without those that are empty, not finite or of score 0."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 6)
    boxes = boxes[np.isfinite(boxes).all(1) & (boxes[:, 4] > 0) & (boxes[:, 5] >= 0)]
    boxes[:, :4] = boxes[:, :4].clip(0, (width, height, width, height))
    return boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]


# torchvision's


def load_torchvision(name, option, backbone_dir, device):
    """A network of torchvision with its published weights, and what describes these weights."""
    # The classes decide the shapes of the last layers.
    published = get_model_weights(name).DEFAULT
    classes = tuple(published.meta["categories"])
    net = get_model(name, weights=None, weights_backbone=None, num_classes=len(classes))
    if name in NO_EPSILON:  # as torchvision does with these weights, which an older version trained
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eps = 0
    load_published(net, name, backbone_dir, "DEFAULT", (f"{option} {{}}", ""))
    return net.to(device).eval().requires_grad_(False), classes, published


def load_detector(name, backbone_dir, device, fit="letterbox"):
    """A ``Network`` that finds boxes.

    Args:
        name: one of ``DETECTORS``, or the path of an ONNX file.
        backbone_dir: folder of torchvision's weights; see ``backbones.find_backbone``.
        device: for torchvision's networks; an ONNX file runs on the CPU.
        fit: a key of ``FITS``, how an image becomes the input of an ONNX file.

    Raises:
        InputError: no such detector, no file of its weights, or an ONNX file of another kind.
    """
    if Path(name).suffix.lower() == ".onnx":
        return load_onnx(Path(name), fit)
    if name not in DETECTORS:
        raise InputError(f"--detector {name}: expected an ONNX file or one of {', '.join(DETECTORS)}")
    net, classes, _ = load_torchvision(name, "--detector", backbone_dir, device)

    @torch.inference_mode()
    def find(image):
        found = net([to_tensor(image)[0].to(device)])[0]
        boxes = torch.cat((found["boxes"], found["scores"][:, None], found["labels"][:, None]), 1)
        return tidy(boxes.cpu(), *image.shape[:2])

    return Network(name, classes, find)


def load_segmenter(name, backbone_dir, device):
    """A ``Network`` that labels each pixel; arguments and errors as for ``load_detector``, of ``SEGMENTERS``."""
    if name not in SEGMENTERS:
        raise InputError(f"--segmenter {name}: expected one of {', '.join(SEGMENTERS)}")
    net, classes, published = load_torchvision(name, "--segmenter", backbone_dir, device)
    prepare = published.transforms()

    @torch.inference_mode()
    def label(image):
        logits = net(prepare(to_tensor(image)).to(device))["out"]
        logits = torch.nn.functional.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)
        return logits[0].argmax(0).cpu().numpy()

    return Network(name, classes, label)


# ONNX


def letterbox(image, height, width):
    """Fit an image into a network's input as Ultralytics does: shrunk or enlarged as a whole, and padded evenly.

    Args:
        image: (H, W, 3) uint8.
        height, width: of the input.

    Returns:
        ((height, width, 3) uint8, (x scale, y scale), (left, top) in px): a point p of the image is at
        scale * p + (left, top).
    """
    scale = min(height / image.shape[0], width / image.shape[1])
    inner = [max(1, round(side * scale)) for side in image.shape[:2]]
    top, left = ((outer - side) // 2 for outer, side in zip((height, width), inner))
    canvas = np.full((height, width, 3), PADDING, np.uint8)
    canvas[top : top + inner[0], left : left + inner[1]] = cv2.resize(
        image, inner[::-1], interpolation=cv2.INTER_LINEAR
    )
    return canvas, (inner[1] / image.shape[1], inner[0] / image.shape[0]), (left, top)


def stretch(image, height, width):
    """Fit an image into a network's input without regard to its proportions; as ``letterbox`` otherwise."""
    canvas = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return canvas, (width / image.shape[1], height / image.shape[0]), (0, 0)


FITS = {"letterbox": letterbox, "stretch": stretch}


def load_onnx(path, fit="letterbox"):
    """A ``Network`` from an ONNX file with an end-to-end detector.

    Its input is (1, 3, H, W) RGB in [0, 1], with H and W in the file or in Ultralytics' metadata; its output is
    (1, N, 6) or (N, 6), with boxes in px of the input. ``suppress`` drops what is left of duplicates. The names of the
    classes come from Ultralytics' metadata, else they are ``COCO``.
    """
    try:
        import onnxruntime
    except ImportError:
        raise InputError(f"--detector {path}: onnxruntime is missing; expected it: pip install onnxruntime") from None
    if not path.is_file():
        raise InputError(f"--detector {path}: no such file; expected an ONNX file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a type for each reason, and none for all of them
        raise InputError(f"--detector {path}: no readable ONNX file ({str(error).splitlines()[0][:200]})") from None
    metadata = session.get_modelmeta().custom_metadata_map
    shape, kind = input_size(path, session, metadata)
    classes = class_names(metadata.get("names"))

    def find(image):
        canvas, scale, corner = FITS[fit](image, *shape)
        batch = (canvas.transpose(2, 0, 1)[None] / np.float32(255)).astype(kind)
        output = session.run(None, {session.get_inputs()[0].name: batch})[0]
        if output.ndim not in (2, 3) or output.shape[-1] != 6 or output.ndim == 3 and len(output) != 1:
            raise InputError(f"--detector {path}: its output is {'x'.join(map(str, output.shape))}; {END_TO_END}")
        boxes = np.array(output.reshape(-1, 6), np.float64)
        boxes[:, :4] = (boxes[:, :4] - corner * 2) / (scale * 2)
        boxes = suppress(tidy(boxes, *image.shape[:2]))
        if boxes[:, 5].max(initial=0) >= len(classes):
            number = int(boxes[:, 5].max())
            raise InputError(f"--detector {path}: it found class {number}; expected 0 to {len(classes) - 1}")
        return boxes

    return Network(path.stem, classes, find)


def input_size(path, session, metadata):
    """((height, width), dtype) of the one input of an ONNX file."""
    inputs = session.get_inputs()
    shape = list(inputs[0].shape)
    if len(shape) == 4 and not all(isinstance(side, int) for side in shape[2:]) and "imgsz" in metadata:
        try:
            shape[2:] = ast.literal_eval(metadata["imgsz"])
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass  # damaged: the sides stay free, which is refused below
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    fits = len(inputs) == 1 and len(shape) == 4 and shape[1] == 3 and inputs[0].type in kinds
    several = fits and isinstance(shape[0], int) and shape[0] != 1  # images at once; their number may be left free
    if not fits or several or not all(isinstance(side, int) and side > 0 for side in shape[2:]):
        raise InputError(
            f"--detector {path}: its input is {' and '.join(f'{entry.shape}' for entry in inputs)}; expected one of 1 x"
            " 3 x height x width, float, with fixed height and width"
        )
    last = session.get_outputs()[0].shape
    if last and (len(last) not in (2, 3) or isinstance(last[-1], int) and last[-1] != 6):
        raise InputError(f"--detector {path}: its output is {last}; {END_TO_END}")
    return tuple(shape[2:]), kinds[inputs[0].type]


def class_names(text):
    """The names of the classes from Ultralytics' metadata, {0: 'person', ...} as a text; ``COCO`` without any."""
    try:
        names = ast.literal_eval(text or "")
        if isinstance(names, str):
            return COCO
        return tuple(str(names[number]) for number in range(len(names)))
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):  # damaged
        return COCO
