"""PSNR and SSIM as PReNet's MATLAB scripts measure them.

    python -c "from metrics import luma; from images import read_rgb; print(luma(read_rgb('results/rain.jpg')).mean())"

``measure`` compares an image with its reference on the Y channel and on RGB. Training uses another SSIM, the
differentiable one of ``SSIM.py``.
"""
import numpy as np
from skimage.metrics import structural_similarity

METRICS = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")  # of ``measure``


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
        {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"}: floats.
    """
    y, y_reference = luma(image), luma(reference)
    rgb, rgb_reference = image / 255, reference / 255
    return {
        "psnr_y": psnr(y, y_reference),
        "ssim_y": ssim_255(y, y_reference),
        "psnr_rgb": psnr(rgb, rgb_reference),
        "ssim_rgb": ssim_255(rgb, rgb_reference),
    }
