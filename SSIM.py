"""Differentiable structural similarity, the training loss of PReNet and SAPNet.

    python -c "import torch; from SSIM import ssim; x = torch.rand(1, 3, 64, 64); print(ssim(x, x))"

This is the zero-padded SSIM that networks are trained with. Results are reported with ``metrics.ssim_255``,
which follows MATLAB's protocol.
"""
from functools import lru_cache

import torch
from torch import nn


def gaussian_window(size, sigma):
    """(size,) float64 samples of a Gaussian that sum to one."""
    x = torch.arange(size, dtype=torch.float64) - size // 2
    window = torch.exp(-x.square() / (2 * sigma**2))
    return window / window.sum()


def band_matrix(length, window):
    """(length, length) matrix whose product with a signal is its zero-padded convolution with ``window``."""
    radius = len(window) // 2
    index = torch.arange(length)
    offset = index[:, None] - index
    return torch.where(offset.abs() <= radius, window[(offset + radius).clamp(0, 2 * radius)], 0.0)


@lru_cache(maxsize=4)  # one for each side of the images: training needs one or two
@torch.inference_mode(False)  # a call in inference mode must not leave a matrix that training cannot use
def blur_matrix(length, window_size, sigma, dtype, device):
    """The ``band_matrix`` of a Gaussian, built once and kept on the images' device."""
    return band_matrix(length, gaussian_window(window_size, sigma)).to(device, dtype)


def ssim(image, reference, window_size=11, sigma=1.5, data_range=1.0):
    """Mean structural similarity with a zero-padded Gaussian window (Wang et al. 2004, K = 0.01, 0.03).

    Args:
        image, reference: (N, C, H, W) tensors of equal shape, dtype and device, values in [0, ``data_range``].
        window_size: odd side of the Gaussian window in pixels.
        sigma: its standard deviation in pixels.
        data_range: the value of white, such as 1 or 255.

    Returns:
        A scalar tensor, at most 1; its gradient reaches both images.

    Raises:
        ValueError: the shapes differ or are not four-dimensional, or the window's side is even.
    """
    if window_size % 2 == 0:
        raise ValueError(f"ssim expects an odd window_size, got {window_size}")
    if image.shape != reference.shape or image.dim() != 4:
        raise ValueError(
            f"ssim expects two (N, C, H, W) tensors of one shape, got {tuple(image.shape)} and {tuple(reference.shape)}"
        )
    # The blur as two products with banded matrices: on patches of 100x100 four times as fast as a depthwise
    # convolution on the CPU, forward and backward.
    rows, columns = (blur_matrix(side, window_size, sigma, image.dtype, image.device) for side in image.shape[2:])
    moments = torch.cat((image, reference, image * image, reference * reference, image * reference))
    mean_x, mean_y, xx, yy, xy = (rows @ moments @ columns).chunk(5)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    variances = xx - mean_x * mean_x + yy - mean_y * mean_y
    structure = (2 * (xy - mean_x * mean_y) + c2) / (variances + c2)
    return (luminance * structure).mean()


class SSIM(nn.Module):
    """``ssim`` as a module."""

    def __init__(self, window_size=11, sigma=1.5, data_range=1.0):
        super().__init__()
        self.window_size, self.sigma, self.data_range = window_size, sigma, data_range

    def forward(self, image, reference):
        return ssim(image, reference, self.window_size, self.sigma, self.data_range)
