"""How good an image is: PSNR and SSIM against a clean one, NIQE and PIQE without, as MATLAB or its ports compute them.

    python -c "from images import read_rgb; from metrics import piqe; print(piqe(read_rgb('results/rain.jpg')))"

``measure`` compares an image with its reference on the Y channel and on RGB, by PReNet's protocol. Training uses
another SSIM, the differentiable one of ``SSIM.py``. ``measure_alone`` needs no reference: docs/real.md says what its
figures can tell and what they cannot. NIQE's parameters are those of the NIQE Software Release by the Laboratory for
Image and Video Engineering (LIVE), The University of Texas at Austin; its notice is in weights/niqe_parameters.txt.
"""
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from scipy.ndimage import correlate1d
from scipy.special import gamma
from skimage.metrics import structural_similarity

METRICS = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")  # of ``measure``
RGB_TO_GREY = 0.298936021293775, 0.587043074451121, 0.114020904255103  # of MATLAB's rgb2gray
NIQE_PARAMETERS = Path(__file__).resolve().parent / "weights/niqe_parameters.npz"
NIQE_BLOCK = 96  # px, a side of the blocks whose statistics NIQE compares
NIQE_SHIFTS = (0, 1), (1, 0), (1, 1), (1, -1)  # px, from each pixel to the neighbour that it is multiplied by
PIQE_BLOCK = 16  # px
PIQE_SEGMENT = 6  # px, the length of the pieces in which PIQE looks at the edges of a block


# With a reference


def luma(image):
    """The Y channel of MATLAB's ``rgb2ycbcr`` on doubles.

    Args:
        image: (H, W, 3) uint8 RGB.

    Returns:
        (H, W) float64 in [16/255, 235/255].
    """
    return (16 + image.astype(np.float64) / 255 @ (65.481, 128.553, 24.966)) / 255


def psnr(image, reference):
    """The peak signal-to-noise ratio in dB of two float arrays in [0, 1]; infinite for equal arrays."""
    error = np.mean(np.square(image - reference))
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def ssim_255(image, reference):
    """SSIM as in MATLAB: an 11x11 Gaussian window, sigma 1.5, only where the window lies inside the image.

    Args:
        image, reference: float arrays in [0, 1] of one shape, (H, W) or (H, W, C). They are scaled to [0, 255].

    Returns:
        The mean over the image, and over the channels where there are several. NaN where a side is under 11 px, so
        that no window fits.
    """
    if min(image.shape[:2]) < 11:
        return float("nan")
    return float(
        structural_similarity(
            255 * image, 255 * reference, data_range=255, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, channel_axis=2 if image.ndim == 3 else None,
        )
    )


def measure(image, reference):
    """PSNR in dB and SSIM, on Y and on RGB, by the protocol of PReNet's MATLAB scripts.

    Args:
        image, reference: (H, W, 3) uint8 RGB.

    Returns:
        {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"}: floats. PSNR is infinite for equal images; SSIM is NaN where a
        side is under 11 px.

    Raises:
        ValueError: the sizes differ.
    """
    y, y_reference = luma(image), luma(reference)
    rgb, rgb_reference = image / 255, reference / 255
    return {
        "psnr_y": psnr(y, y_reference),
        "ssim_y": ssim_255(y, y_reference),
        "psnr_rgb": psnr(rgb, rgb_reference),
        "ssim_rgb": ssim_255(rgb, rgb_reference),
    }


# Without a reference


def measure_alone(image):
    """NIQE and PIQE of one image, (H, W, 3) uint8 RGB: {"niqe", "piqe"}, floats, lower is better, or NaN."""
    return {"niqe": niqe(image), "piqe": piqe(image)}


def to_rgb8(image):
    """An image as both metrics take it.

    Args:
        image: (H, W) grey, or (H, W, C) grey, RGB or RGBA for C = 1, 3 or 4; uint8 or uint16. Alpha is left out, and 16
            bits are rounded to 8, as in the other figures of test.py.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: an array of another shape or type.
    """
    shapes = (), (1,), (3,), (4,)
    if image.dtype not in (np.uint8, np.uint16) or image.ndim < 2 or image.shape[2:] not in shapes or not image.size:
        raise ValueError(f"{image.dtype} {image.shape}: expected uint8 or uint16, (H, W) or (H, W, 1, 3 or 4)")
    if image.shape[2:] in shapes[:2]:
        image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    image = image[..., :3]
    return image if image.dtype == np.uint8 else np.rint(image / 257).astype(np.uint8)


def normalise(grey):
    """Take the local mean off and divide by the local deviation + 1 (Mittal et al., equations 1 to 3).

    Both are weighted by a 7x7 Gaussian, sigma 7/6, over an image continued by its edge pixels.

    Args:
        grey: (H, W) float64 in [0, 255].

    Returns:
        (H, W) float64, exactly 0 where the window shows one grey. Rounding would leave about 1e-14 or -1e-14 there,
        and ``fit_aggd`` counts the signs.
    """
    window = np.exp(-np.square(np.arange(-3, 4)) / (2 * (7 / 6) ** 2))
    window /= window.sum()

    def blur(values):
        return correlate1d(correlate1d(values, window, 0, mode="nearest"), window, 1, mode="nearest")

    mean = blur(grey)
    deviation = np.sqrt(np.abs(blur(grey * grey) - mean * mean))
    centred = grey - mean
    centred[np.abs(centred) < 1e-9] = 0
    return centred / (deviation + 1)


def blocks_of(image, side):
    """The whole (side, side) blocks of an (H, W) array: (N, side, side), row by row."""
    rows, columns = (length // side for length in image.shape)
    cut = image[: rows * side, : columns * side].reshape(rows, side, columns, side)
    return cut.swapaxes(1, 2).reshape(-1, side, side)


def cubic(x):
    """Keys' bicubic kernel, a = -0.5, which is zero from |x| = 2 on."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def imresize(image, scale):
    """MATLAB's ``imresize(image, scale)``: bicubic, wider where it shrinks (antialiasing), mirrored at the edges.

    Args:
        image: (H, W) float64.
        scale: of both sides, above 0.

    Returns:
        (ceil(scale * H), ceil(scale * W)) float64, neither rounded nor clipped.
    """
    for axis in (0, 1):
        length = image.shape[axis]
        stretch = min(scale, 1)
        centre = (np.arange(np.ceil(scale * length)) + 0.5) / scale - 0.5  # of each new pixel among the old ones
        first = np.floor(centre - 2 / stretch).astype(int)
        taps = first[:, None] + np.arange(int(np.ceil(4 / stretch)) + 2)
        weights = cubic(stretch * (centre[:, None] - taps))
        weights /= weights.sum(1, keepdims=True)
        taps %= 2 * length
        taps = np.minimum(taps, 2 * length - 1 - taps)
        rows = np.moveaxis(image, axis, 0)
        new = sum(weight[:, None] * rows[tap] for tap, weight in zip(taps.T, weights.T))
        image = np.moveaxis(new, 0, axis)
    return image


@cache
def aggd_table():
    """Shapes alpha from 0.2 to 10, and the moment by which each is known (Mittal et al. 2012, BRISQUE)."""
    shapes = np.arange(200, 10001) / 1000
    return shapes, gamma(2 / shapes) ** 2 / (gamma(1 / shapes) * gamma(3 / shapes))


def fit_aggd(values):
    """Fit an asymmetric generalised Gaussian distribution by its moments.

    Args:
        values: an array of any shape.

    Returns:
        (shape alpha, left scale, right scale): floats; all NaN where no value is below 0 or none above.
    """
    squares = np.square(values)
    below, above = squares[values < 0], squares[values > 0]
    if not below.size or not above.size:
        return np.nan, np.nan, np.nan
    left, right = np.sqrt(below.mean()), np.sqrt(above.mean())
    ratio = left / right
    moment = np.abs(values).mean() ** 2 / squares.mean() * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
    shapes, moments = aggd_table()
    shape = shapes[np.argmin(np.abs(moments - moment))]
    scale = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
    return shape, left * scale, right * scale


def niqe_features(block):
    """The 18 statistics of a block of a ``normalise``d image: of its pixels, and of products of neighbours."""
    shape, left, right = fit_aggd(block)
    features = [shape, (left + right) / 2]
    for shift in NIQE_SHIFTS:
        shape, left, right = fit_aggd(block * np.roll(block, shift, (0, 1)))
        features += [shape, (right - left) * gamma(2 / shape) / gamma(1 / shape), left, right]
    return features


@cache
def niqe_parameters():
    """Mean (36,) and covariance (36, 36) of the statistics of natural photographs, published by the authors."""
    with np.load(NIQE_PARAMETERS) as file:
        return file["mean"], file["covariance"]


def niqe(image):
    """NIQE: how far the statistics of an image are from those of natural photographs. 0 is best, 2 to 6 is usual.

    Mittal, Soundararajan and Bovik, "Making a 'completely blind' image quality analyzer", IEEE Signal Processing
    Letters 2013, as the authors' MATLAB program has it: 18 statistics of each 96x96 block at two scales, and the
    distance of their mean and covariance from the published ones. What is no whole block, at the right and below, is
    left out, and so are blocks without structure, for which MATLAB counts rounding errors.

    Args:
        image: as for ``to_rgb8``, which raises ValueError for others.

    Returns:
        A float. NaN where fewer than two blocks count, as they have no covariance.
    """
    grey = np.rint(to_rgb8(image) @ RGB_TO_GREY)
    rows, columns = (length // NIQE_BLOCK * NIQE_BLOCK for length in grey.shape)
    if rows * columns < 2 * NIQE_BLOCK**2:
        return float("nan")
    grey = grey[:rows, :columns]
    blocks = blocks_of(normalise(grey), NIQE_BLOCK)
    halves = blocks_of(normalise(imresize(grey, 0.5)), NIQE_BLOCK // 2)
    features = np.array([niqe_features(block) + niqe_features(half) for block, half in zip(blocks, halves)])
    features = features[~np.isnan(features).any(1)]
    if len(features) < 2:
        return float("nan")
    mean, covariance = niqe_parameters()
    difference = features.mean(0) - mean
    pooled = (covariance + np.cov(features, rowvar=False)) / 2
    return float(np.sqrt(difference @ np.linalg.pinv(pooled) @ difference))


def piqe(image):
    """PIQE: how much of the detail of an image looks like noise or compression. 0 is best, 100 worst.

    Venkatanath et al., "Blind image quality evaluation using perception based features", NCC 2015, as the Python ports
    of MATLAB's ``piqe`` have it. Only 16x16 blocks with detail count. The image is continued by its mirror image to
    whole blocks, and, unlike in MATLAB, stretched until its brightest pixel is 255: where none is white, that lowers
    the value (by 1.2 to 2.4 for a photograph at 0.8 to 0.4 of its brightness), and a single white pixel raises it.

    Args:
        image: as for ``to_rgb8``, which raises ValueError for others.

    Returns:
        A float. NaN where a side is under 16 px, or where no block has detail, for which MATLAB says 100.
    """
    grey = cv2.cvtColor(to_rgb8(image), cv2.COLOR_RGB2GRAY)
    if min(grey.shape) < PIQE_BLOCK:
        return float("nan")
    grey = np.rint(255 * (grey / max(grey.max(), 1)))
    grey = np.pad(grey, [(0, -length % PIQE_BLOCK) for length in grey.shape], "symmetric")
    blocks = blocks_of(normalise(grey), PIQE_BLOCK)
    variance = blocks.var((1, 2), ddof=1)
    blocks, variance = blocks[variance > 0.1], variance[variance > 0.1]
    if not len(blocks):
        return float("nan")

    # Compression: along an edge of the block, a piece that hardly varies.
    edges = np.stack((blocks[:, 0], blocks[:, -1], blocks[:, :, 0], blocks[:, :, -1]), 1)
    pieces = np.lib.stride_tricks.sliding_window_view(edges, PIQE_SEGMENT, 2)
    compressed = (pieces.std(3, ddof=1) < 0.1).any((1, 2))

    # Noise: the middle columns vary as much as the others. For those MATLAB leaves out the 8th and, by a slip that all
    # published values contain, the 10th.
    middle = blocks[:, :, 7:9].std((1, 2), ddof=1)
    others = np.delete(blocks, (7, 9), 2).std((1, 2), ddof=1)
    ratio = np.divide(middle, others, out=np.zeros_like(middle), where=others > 0)
    deviation = np.sqrt(variance)
    noisy = deviation > 2 * np.abs(deviation - ratio) / np.maximum(deviation, ratio)

    distortion = np.sum(compressed * (1 - variance) + noisy * variance)
    return float(100 * (distortion + 1) / (len(blocks) + 1))
