"""How far two sets of boxes, or two label maps, agree: the measures of detect.py, in NumPy alone.

    python -c "from agreement import iou; print(iou([[0, 0, 2, 2]], [[1, 0, 3, 2]]))"

Boxes are rows x1 y1 x2 y2 in px, then the score, then the class; a box's width is x2 - x1. What is not defined is NaN
and is left out of every mean: the precision where nothing was found, the recall and the average precision where there
is no object, F1 where there is neither.
"""
import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the IoU, as COCO has them
RECALLS = np.linspace(0, 1, 101)  # at which COCO samples the precision
MOST_FOUND = 100  # boxes of a class in an image that the average precision looks at, as COCO's evaluation does


def divide(numerator, denominator):
    """The quotient of two arrays, NaN where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


# Boxes


def iou(boxes, others, of_first=False):
    """Intersection over union of each of ``boxes`` with each of ``others``.

    Args:
        boxes: (N, 4 or more), in the first four columns x1 y1 x2 y2.
        others: (M, 4 or more).
        of_first: divide by the area of the first box instead of the union, as COCO does for a box around a crowd.

    Returns:
        (N, M) in [0, 1]; 0 for boxes without an area.
    """
    if not len(boxes) or not len(others):
        return np.zeros((len(boxes), len(others)))
    boxes, others = np.asarray(boxes, float), np.asarray(others, float)
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:4], others[None, :, 2:4])
    shared = (high - low).clip(min=0).prod(2)
    areas = [(values[:, 2:4] - values[:, :2]).clip(min=0).prod(1) for values in (boxes, others)]
    total = areas[0][:, None] if of_first else areas[0][:, None] + areas[1][None] - shared
    return np.nan_to_num(divide(shared, total))


def by_score(boxes):
    """The indices of (N, 6) boxes from the highest score to the lowest; of equal scores the first box comes first."""
    return np.argsort(-boxes[:, 4], kind="stable")


def suppress(boxes, threshold=0.5):
    """Non-maximum suppression: from the best box on, drop each that lies over a kept box of its class.

    Args:
        boxes: (N, 6).
        threshold: the largest IoU of two boxes of a class that both stay.

    Returns:
        The (M, 6) boxes that are left, the best first. Of equal scores the first box counts as the better one.
    """
    boxes = boxes[by_score(boxes)]
    overlaps = iou(boxes, boxes) * (boxes[:, None, 5] == boxes[None, :, 5])
    kept = []
    for k in range(len(boxes)):
        if not (overlaps[k, kept] > threshold).any():
            kept.append(k)
    return boxes[kept]


def match(found, reference, thresholds=THRESHOLDS):
    """Give each found box the reference box that it stands for, as COCO's evaluation does.

    The found boxes choose in the order of ``by_score``: each takes, of the reference boxes of its class that are not
    taken and overlap it by the threshold or more, the one with the highest IoU, and of equal ones the last. So a second
    box on one object and a box of another class stand for nothing.

    Args:
        found: (N, 6).
        reference: (M, 5 or 6), whose last column is the class.
        thresholds: T numbers.

    Returns:
        (T, N) indices into ``reference``, -1 where there is none.
    """
    partners = np.full((len(thresholds), len(found)), -1)
    if not len(found) or not len(reference):
        return partners
    overlaps = np.where(found[:, None, 5] == reference[None, :, -1], iou(found, reference), -1)
    for row, threshold in zip(partners, thresholds):
        free = overlaps.copy()
        for k in by_score(found):
            best = free.shape[1] - 1 - free[k, ::-1].argmax()
            if free[k, best] >= threshold - 1e-10:
                row[k] = best
                free[:, best] = -1
    return partners


def count(found, reference, classes):
    """Count what agrees in one image, by class.

    Args:
        found, reference: (N, 6) and (M, 5 or 6) boxes, all of which count.
        classes: K, how many there are.

    Returns:
        (K, 12) integers: the found boxes that stand for a reference box at each of the ten ``THRESHOLDS``; the found
        boxes; the reference boxes.
    """
    numbers = found[:, 5].astype(int)
    hits = [np.bincount(numbers[partners >= 0], minlength=classes) for partners in match(found, reference)]
    totals = [np.bincount(boxes[:, -1].astype(int), minlength=classes) for boxes in (found, reference)]
    return np.stack([*hits, *totals], 1).astype(np.int32)


def rates(counts):
    """Precision, recall and F1 from sums of ``count``.

    Args:
        counts: (..., 12).

    Returns:
        Three (..., 10) arrays, a value for each of the ``THRESHOLDS``: hits / found, hits / reference and
        2 hits / (found + reference). Where only one of both sets is empty, F1 is 0.
    """
    counts = np.asarray(counts)
    hits, found, reference = counts[..., :-2], counts[..., -2, None], counts[..., -1, None]
    return divide(hits, found), divide(hits, reference), divide(2 * hits, found + reference)


# Average precision


def judge(found, labels, crowds):
    """Which of the boxes found in one image are right, for ``average_precision``.

    Args:
        found: (N, 6).
        labels, crowds: (M, 5) and (C, 5) boxes of the ground truth, with the class in the last column. A crowd is one
            box around many objects: what is found in it is neither right nor wrong.

    Returns:
        (boxes, verdicts): (N', 6), the ``MOST_FOUND`` best of each class, and (10, N') for the ``THRESHOLDS``: 1 right,
        0 wrong, -1 not counted.
    """
    found = found[by_score(found)]
    rank = np.zeros(len(found), int)
    for number in np.unique(found[:, 5]):
        of_class = found[:, 5] == number
        rank[of_class] = np.arange(of_class.sum())
    found = found[rank < MOST_FOUND]
    verdicts = (match(found, labels) >= 0).astype(int)
    inside = (iou(found, crowds, of_first=True) * (found[:, None, 5] == crowds[None, :, 4])).max(1, initial=0)
    verdicts[(verdicts == 0) & (inside >= THRESHOLDS[:, None] - 1e-10)] = -1
    return found, verdicts


class Curve:
    """The precision-recall curve of one class over all images, at each of the ``THRESHOLDS``.

    Args:
        judged: a pair (boxes, verdicts) as ``judge`` returns it for each image.
        objects: how many labels of the class each image has.
        number: of the class.
    """

    def __init__(self, judged, objects, number):
        parts = [boxes[:, 5] == number for boxes, _ in judged]
        scores = np.concatenate([boxes[part, 4] for (boxes, _), part in zip(judged, parts)])
        order = np.argsort(-scores, kind="stable")
        self.images = np.repeat(np.arange(len(judged)), [part.sum() for part in parts])[order]
        self.verdicts = np.concatenate([verdicts[:, part] for (_, verdicts), part in zip(judged, parts)], 1)[:, order]
        self.objects = np.asarray(objects)

    def average_precision(self, repeats=None):
        """COCO's average precision: the mean, over 101 recalls, of the best precision at that recall or a higher one.

        Args:
            repeats: how often each image counts, for the bootstrap; once by default.

        Returns:
            (10,) in [0, 1], a value for each of the ``THRESHOLDS``; NaN where there is no object.
        """
        repeats = np.ones(len(self.objects), int) if repeats is None else repeats
        total = repeats @ self.objects
        if total == 0:
            return np.full(len(THRESHOLDS), np.nan)
        times = repeats[self.images]
        right = np.cumsum(times * (self.verdicts == 1), 1)
        precision = right / np.maximum(np.cumsum(times * (self.verdicts >= 0), 1), 1)
        best = np.pad(np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1], ((0, 0), (0, 1)))
        return np.array([row[np.searchsorted(recall, RECALLS)].mean() for row, recall in zip(best, right / total)])


# Label maps


def confusion(labels, reference, classes):
    """Count the pixels of one image by both labels.

    Args:
        labels, reference: (H, W) integers from 0 to ``classes`` - 1.

    Returns:
        (classes, classes) integers; rows are the reference's labels.
    """
    joint = reference.astype(np.int64).ravel() * classes + labels.ravel()
    return np.bincount(joint, minlength=classes**2).reshape(classes, classes)


def overlap(counts):
    """Pixel agreement and IoU from sums of ``confusion``.

    Args:
        counts: (..., K, K).

    Returns:
        (agreement, IoU): (...), the part of the pixels with equal labels, and (..., K); NaN for a class that neither
        label map has.
    """
    same = np.diagonal(counts, axis1=-2, axis2=-1)
    union = counts.sum(-1) + counts.sum(-2) - same
    return divide(same.sum(-1), counts.sum((-2, -1))), divide(same, union)


# Means and intervals


def mean(values, axis=-1):
    """The mean of what is not NaN along an axis; NaN where nothing is left."""
    values = np.asarray(values, float)
    return divide(np.nansum(values, axis), (~np.isnan(values)).sum(axis))


def resample(images, times, seed=0):
    """How often each image is drawn in each of ``times`` bootstrap samples: (times, images) integers."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), times)


def interval(values):
    """The central 95 % of the values of bootstrap samples, without NaN: (low, high), NaN where nothing is left."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return tuple(np.percentile(values, (2.5, 97.5)).tolist()) if len(values) else (float("nan"),) * 2
