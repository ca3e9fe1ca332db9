"""The training SSIM against its definition, written out window by window."""
import json

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import SSIM
from SSIM import ssim


def ssim_by_definition(image, reference, size=11, sigma=1.5, data_range=1.0):
    """Wang et al. 2004 in float64: one zero-padded window after the other. Arrays (N, C, H, W)."""
    offset = np.arange(size) - size // 2
    weight = np.exp(-(offset[:, None] ** 2 + offset**2) / (2 * sigma**2))
    weight /= weight.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    pad = [(0, 0), (0, 0), (size // 2, size // 2), (size // 2, size // 2)]
    x, y = np.pad(np.float64(image), pad), np.pad(np.float64(reference), pad)
    values = np.empty(image.shape)
    for n, c, row, column in np.ndindex(image.shape):
        u, v = (a[n, c, row : row + size, column : column + size] for a in (x, y))
        mean_u, mean_v = (weight * u).sum(), (weight * v).sum()
        var_u, var_v = (weight * u * u).sum() - mean_u**2, (weight * v * v).sum() - mean_v**2
        covariance = (weight * u * v).sum() - mean_u * mean_v
        luminance = (2 * mean_u * mean_v + c1) / (mean_u**2 + mean_v**2 + c1)
        values[n, c, row, column] = luminance * (2 * covariance + c2) / (var_u + var_v + c2)
    return values.mean()


def image_pair(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return image.to(dtype), (image + 0.2 * noise).clamp(0, 1).to(dtype)


@pytest.mark.parametrize("shape", [(2, 3, 13, 17), (1, 1, 11, 11), (1, 3, 4, 30), (1, 1, 1, 1)])
@pytest.mark.parametrize("options", [{}, {"window_size": 7, "sigma": 1.0}, {"data_range": 255.0}])
def test_agrees_with_the_definition(shape, options):
    x, y = image_pair(shape)
    scale = options.get("data_range", 1.0)
    parameters = {"size": options.get("window_size", 11), "sigma": options.get("sigma", 1.5), "data_range": scale}
    expected = ssim_by_definition((scale * x).numpy(), (scale * y).numpy(), **parameters)
    assert ssim(scale * x, scale * y, **options).item() == pytest.approx(expected, abs=1e-10)
    assert SSIM.SSIM(**options)(scale * x, scale * y).item() == pytest.approx(expected, abs=1e-10)


def test_agrees_with_the_published_value(shared):
    golden = np.load(shared / "reference/golden.npz")
    expected = json.loads((shared / "reference/golden_losses.json").read_text())
    clean = torch.from_numpy(golden["clean"])
    for name, key in (("derained", "sapnet_published_2021-09"), ("rainy", "rainy")):
        value = ssim(torch.from_numpy(golden[key]), clean).item()
        assert value == pytest.approx(expected[f"ssim_zero_padded({name},clean)"], abs=1e-5)


def test_float32_is_close_to_float64_on_a_patch():
    x, y = image_pair((2, 3, 100, 100))
    assert ssim(x.float(), y.float()).item() == pytest.approx(ssim(x, y).item(), abs=1e-5)


def test_identical_images_score_one_and_others_less():
    x, y = image_pair((1, 3, 20, 20))
    assert ssim(x, x).item() == pytest.approx(1, abs=1e-12)
    assert ssim(x, y).item() < 0.99


def test_gradient_is_right_and_reaches_both_images():
    x, y = image_pair((1, 2, 5, 6))
    assert torch.autograd.gradcheck(ssim, (x.requires_grad_(), y.requires_grad_()))
    ssim(x, y).backward()
    assert x.grad.abs().min() > 0 and y.grad.abs().min() > 0


def test_climbing_the_gradient_raises_the_score():
    x, y = image_pair((1, 1, 16, 16))
    x.requires_grad_()
    before = ssim(x, y)
    before.backward()
    assert ssim(x + 0.05 * x.grad / x.grad.norm(), y) > before


@pytest.mark.parametrize(
    "first, second", [((1, 3, 8, 8), (1, 3, 8, 9)), ((1, 3, 8, 8), (2, 3, 8, 8)), ((3, 8, 8), (3, 8, 8))]
)
def test_shapes_that_do_not_match_are_refused(first, second):
    with pytest.raises(ValueError, match="one shape"):
        ssim(torch.rand(first), torch.rand(second))


def test_a_window_without_a_middle_is_refused():
    with pytest.raises(ValueError, match="odd window_size, got 10"):
        ssim(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8), window_size=10)


class Operations(TorchDispatchMode):
    """The names of the operations that run while it is open."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._opname)
        return function(*args, **(kwargs or {}))


def test_the_window_is_built_once_and_stays_on_the_device(monkeypatch):
    """The second step of a run builds no matrix, converts none and copies none to the images' device."""
    built, build = [], SSIM.band_matrix
    monkeypatch.setattr(SSIM, "band_matrix", lambda length, window: built.append(length) or build(length, window))
    SSIM.blur_matrix.cache_clear()
    x, y = image_pair((1, 1, 12, 15), dtype=torch.float32)
    with Operations() as first:
        value = ssim(x, y)
    assert built == [12, 15] and {"arange", "_to_copy"} <= first.names
    with Operations() as second:
        assert ssim(x, y) == value
    assert built == [12, 15] and not second.names & {"arange", "_to_copy", "copy_"} and "mul" in second.names
    # What the matrices depend on is told apart.
    ssim(x.double(), y.double())
    ssim(x, y, sigma=1.0)
    ssim(x, y, window_size=7)
    assert built == [12, 15] * 4
    ssim(x.to("meta"), y.to("meta"))
    assert built == [12, 15] * 5


def test_a_first_call_in_inference_mode_leaves_a_window_to_train_with():
    SSIM.blur_matrix.cache_clear()
    x, y = image_pair((1, 1, 12, 15))
    with torch.inference_mode():
        value = ssim(x, y)
    z = x.clone().requires_grad_()
    ssim(z, y).backward()
    assert ssim(x, y) == value and z.grad.abs().min() > 0
