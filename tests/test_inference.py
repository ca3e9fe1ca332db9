"""The strip runner against the plain network: same numbers, whatever the size, the strips and the memory."""
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import inference
import strips
from checkpoints import load_network
from conftest import THOROUGH
from images import read_rgb
from inference import StripRunner, dense_kernel, dilated_conv, relu, to_image, to_tensor, window_sums
from metrics import luma, psnr
from networks import RESIDUAL_CONVS, SAPNet
from runners import self_ensemble
from strips import FeatureMap, column_sums
from utils import RunError

VARIANTS = [
    {}, {"use_dilation": False}, {"residual_conv": "separable"}, {"residual_conv": "split"},
    {"use_dilation": False, "use_cra": False},
]


def network(seed=0, recurrent_iter=3, **variant):
    torch.manual_seed(seed)
    return SAPNet(recurrent_iter, **variant).eval()


def difference(net, image, dtype=torch.float32, **options):
    with torch.inference_mode():
        expected = net(image)
    result = StripRunner(net, dtype, **options)(image)
    assert result.dtype == torch.float32 and result.shape == expected.shape
    return (result - expected).abs().max().item()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_level_survives_the_way_to_a_tensor_and_back(dtype):
    levels = np.arange(0, np.iinfo(dtype).max + 1, dtype=dtype).reshape(16, -1)
    image = np.stack((levels, levels[::-1], levels.T.reshape(levels.shape)), 2)
    tensor = to_tensor(image)
    assert tensor.shape == (1, 3, *levels.shape) and tensor.dtype == torch.float32
    assert tensor.min() == 0 and tensor.max() == 1
    assert to_image(tensor, dtype).dtype == dtype and np.array_equal(to_image(tensor, dtype), image)


def test_an_image_is_clamped_and_rounded_to_the_nearest_level():
    values = torch.tensor([-3, -0.001, 0.4 / 255, 0.6 / 255, 254.4 / 255, 1.001, 7])
    image = to_image(values[None, None, None].expand(1, 3, 2, 7))
    assert image.shape == (2, 7, 3) and (image == np.array([0, 0, 0, 1, 254, 255, 255])[None, :, None]).all()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 1000])
def test_equals_the_network(variant, rows, monkeypatch):
    def cut(features, small=False):
        return [(top, min(top + rows, features.height)) for top in range(0, features.height, rows)]

    monkeypatch.setattr(strips.FeatureMap, "strips", cut)
    assert difference(network(**variant), torch.rand(1, 3, 37, 53)) < 1e-5


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (5, 9), (15, 17), (33, 31)])
def test_equals_the_network_where_the_dilation_exceeds_the_image(size):
    assert difference(network(), torch.rand(1, 3, *size)) < 1e-5


def test_the_memory_of_an_image_goes_back_to_the_system():
    """Malloc keeps freed blocks below others that are in use, so the process would grow by images of many sizes."""

    def resident():
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except FileNotFoundError:
            pytest.skip("no /proc, to read the process's memory from")
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))

    def size(features):
        return features.data.numel() * features.data.element_size()

    for _ in range(2):  # malloc keeps blocks of a size that it has seen freed before
        before = resident()
        maps = [FeatureMap(32, height, 400, torch.float32, "cpu") for height in range(100, 400, 50)]
        for features in maps:
            features.data.fill_(1)
        taken, expected = resident() - before, sum(map(size, maps))
        kept = maps.pop()
        del maps, features
        left = resident() - before
    assert taken > 0.9 * expected and left < size(kept) + 0.1 * expected


def test_a_temporary_file_instead_of_memory_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    net, image = network(), torch.rand(1, 3, 40, 50)
    mapped = []
    monkeypatch.setattr(
        torch, "from_file", lambda *args, real=torch.from_file, **kw: mapped.append(args) or real(*args, **kw)
    )
    assert torch.equal(StripRunner(net, max_memory=0)(image), StripRunner(net)(image))
    assert len(mapped) == 5 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision_stays_close(dtype, bound):
    assert 0 < difference(network(), torch.rand(1, 3, 48, 64), dtype) < bound


@pytest.mark.slow
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 0.01)])
def test_the_plain_network_where_strips_would_be_slower(monkeypatch, dtype, bound):
    """As on a GPU, with its kernels' choice forced: same result, and no strip is cut."""
    monkeypatch.setattr(inference, "runs_whole", lambda image: True)
    monkeypatch.setattr(inference, "FeatureMap", None)
    assert difference(network(), torch.rand(2, 3, 48, 64), dtype) < bound


def test_strips_on_the_cpu_and_for_what_they_are_better_at():
    small, large = torch.empty(1, 3, 321, 481, device="meta"), torch.empty(1, 3, 2848, 4288, device="meta")
    assert inference.runs_whole(small) and not inference.runs_whole(large)
    assert not inference.runs_whole(torch.empty(1, 3, 8, 8))
    with torch.device("meta"):
        runner = StripRunner(SAPNet())
    assert runner.images_at_once(321, 481) == 6 and runner.images_at_once(2848, 4288) == 1
    assert StripRunner(SAPNet()).images_at_once(8, 8) == 1


@pytest.mark.slow
def test_threads_that_share_the_strips_change_nothing(monkeypatch):
    """Neither the result nor how many threads PyTorch uses afterwards."""
    monkeypatch.setattr(strips, "strip_rows", lambda width, pixels, small=False: 8)
    runner, image, before = StripRunner(network()), torch.rand(1, 3, 90, 70), torch.get_num_threads()
    expected, results = runner(image), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(runner(image))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, expected) for result in results)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_thread_for_strips_uses_one_core(two_threads):
    """Also after its first operation, with which PyTorch applies the setting of the whole process to a new thread."""
    together, used = threading.Barrier(2, timeout=60), {}

    def use(start, stop):
        together.wait()  # so that each of the two threads has a strip
        torch.rand(2**18).sigmoid_()
        used[threading.get_ident()] = torch.get_num_threads()

    strips.strip_threads.cache_clear()
    strips.for_each(use, [(0, 1), (1, 2)], torch.device("cpu"))
    assert list(used.values()) == [1, 1] and torch.get_num_threads() == 2


def test_a_thread_that_begins_while_those_for_strips_start_keeps_its_cores(two_threads):
    strips.strip_threads.cache_clear()
    begin = threading.Barrier(3, timeout=60)

    def first_call(number):
        begin.wait()
        strips.for_each(lambda start, stop: None, [(0, 1), (1, 2)], torch.device("cpu"))
        return torch.get_num_threads()

    with ThreadPoolExecutor(3) as callers:
        counts = list(callers.map(first_call, range(3)))
    assert counts == [2, 2, 2] and strips.strip_threads.cache_info().misses == 1


def test_between_the_layers_no_operation_uses_all_cores(monkeypatch, two_threads):
    """OpenMP's threads spin after it, and take the cores from the strips."""
    used, fold = set(), inference.GatedConv.fold

    def counted_fold(*arguments):
        used.add(torch.get_num_threads())
        return fold(*arguments)

    monkeypatch.setattr(inference.GatedConv, "fold", counted_fold)
    StripRunner(network())(torch.rand(1, 3, 90, 70))
    assert used == {1} and torch.get_num_threads() == 2


def test_each_core_has_a_strip(monkeypatch):
    features = strips.FeatureMap(1, 321, 481, torch.float32, torch.device("cpu"))
    counts = []
    for threads in (1, 2, 4, 8, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        cut = features.strips()
        assert [start for start, _ in cut[1:]] == [stop for _, stop in cut[:-1]] and cut[-1][1] == 321
        counts.append(len(cut))
    assert counts == [7, 7, 7, 11, 21]


def test_a_strip_that_fails_ends_the_image(monkeypatch, two_threads):
    monkeypatch.setattr(strips, "strip_rows", lambda width, pixels, small=False: 8)
    monkeypatch.setattr(inference, "dilated_conv", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        StripRunner(network())(torch.rand(1, 3, 90, 70))


def test_after_a_strip_that_fails_no_further_one_begins(two_threads):
    begun = []

    def fail_once(start, stop):
        begun.append(start)
        if start == 0:
            raise KeyError
        time.sleep(0.01)

    with pytest.raises(KeyError):
        strips.for_each(fail_once, [(row, row + 1) for row in range(100)], torch.device("cpu"))
    time.sleep(0.1)
    assert len(begun) < 50


def test_sums_are_added_in_the_order_of_the_strips():
    rows = torch.rand(1, 2, 3, 4).to(memory_format=torch.channels_last)
    parts = [(0, 1), (1, 2), (2, 3)]
    ordered, shuffled = strips.ColumnSums(), strips.ColumnSums()
    for sums, order in ((ordered, (0, 1, 2)), (shuffled, (2, 0, 1))):
        for number in order:
            start, stop = parts[number]
            sums.add(start, stop, rows[:, :, start:stop])
        assert not sums.early
    assert torch.equal(ordered.total, shuffled.total)
    torch.testing.assert_close(ordered.total, rows[0].sum(1).T)


def test_images_of_a_batch_do_not_meet():
    runner, images = StripRunner(network()), torch.rand(3, 3, 20, 30)
    assert torch.equal(runner(images), torch.cat([runner(image) for image in images.split(1)]))


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8"), (torch.zeros(1, 1, 8, 8), "torch.float32"),
        (torch.zeros(3, 8, 8), "torch.float32"), (255 * torch.eye(8).expand(1, 3, 8, 8), "0 to 255"),
    ],
    ids=["bytes", "grey", "no batch", "0 to 255"],
)
def test_what_is_no_batch_of_float_images_is_refused(image, found):
    with pytest.raises(ValueError, match=f"expects RGB images .* got {found}"):
        StripRunner(network())(image)


FULL = [
    torch.OutOfMemoryError(), RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), RuntimeError("Invalid buffer size: 8.21 GB"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("room", "error"), [*zip([2**20, 100, 2**16, 2**15], FULL)])
def test_a_gpu_that_is_too_full_gets_smaller_strips_and_then_the_cpu(monkeypatch, room, error, capsys):
    """The memory of a GPU, imitated: a convolution of more than ``room`` pixels does not fit."""
    net, image = network(recurrent_iter=2), torch.rand(1, 3, 300, 500)
    expected, convolve, tried = StripRunner(net)(image), F.conv2d, []

    def conv2d(rows, *args, **options):
        tried.append(rows.shape[2] * rows.shape[3])
        if tried[-1] > room:
            raise error
        return convolve(rows, *args, **options)

    runner = StripRunner(net)
    runner.host = lambda image: monkeypatch.undo() or StripRunner(net)(image)
    monkeypatch.setattr(inference, "strip_pixels", lambda device, maps: 2**17)
    monkeypatch.setattr(F, "conv2d", conv2d)
    torch.testing.assert_close(runner(image), expected, atol=1e-5, rtol=0)
    assert ("it is derained on the CPU" in capsys.readouterr().err) == (room == 100)
    assert (max(tried) > room) == (room < 2**17)


def test_the_strips_of_a_gpu_follow_its_free_memory(monkeypatch):
    for free, pixels in ((80e9, 2**20), (7e9, 488281), (6e9 + 1e6, 488), (1e9, 1)):
        monkeypatch.setattr(strips, "free_memory", lambda device, free=free: free)
        assert strips.strip_pixels(torch.device("cuda:0"), 6e9) == pixels
    assert strips.strip_pixels(torch.device("cpu"), 6e9) is None


@pytest.mark.parametrize("dilation, width", [(16, 600), (8, 1024), (2, 4096)])
@pytest.mark.parametrize("rows", [1, 2, 3, 2.5])
def test_wide_rows_are_convolved_as_the_definition_says(monkeypatch, dilation, width, rows):
    torch.manual_seed(0)
    shapes = (1, 4, int((rows + 2) * dilation), width), (6, 4, 3, 3)
    features, weight = (torch.randn(shape).bfloat16().to(memory_format=torch.channels_last) for shape in shapes)
    bias = torch.randn(6).bfloat16()
    expected = F.conv2d(features.float(), weight.float(), bias.float(), padding=(0, dilation), dilation=dilation)
    used, conv2d = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args, **named: used.append(named["dilation"]) or conv2d(*args, **named))
    result = dilated_conv(features, weight, bias, dilation)
    assert result.shape == expected.shape and result.is_contiguous(memory_format=torch.channels_last)
    assert ((result.float() - expected).abs() <= 2**-8 * expected.abs() + 1e-3).all()
    assert used == ([dilation] if rows == 2.5 else [(1, dilation), dilation]), "not the way that is to be tested"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_relu_of_numbers_of_any_width(dtype):
    values = torch.tensor([-torch.inf, -3.5, -1e-7, -0.0, 0.0, 1e-7, 2.25, torch.inf]).to(dtype)
    expected, out = values.clamp_min(0), torch.empty_like(values)
    relu(values, out=out)
    assert torch.equal(out, expected)
    relu(values, out=values)
    assert torch.equal(values, expected)
    for sign in (1, -1):  # what a processor makes of inf - inf is a NaN with the sign bit set
        broken = torch.full((40,), sign * torch.nan, dtype=dtype)
        relu(broken, out=broken)
        assert broken.isnan().all()


def break_image(net, image):
    image[0, 1, 10, 12] = torch.nan


def break_image_by_inf(net, image):
    image[0, 1, 10, 12] = torch.inf


def break_bias(net, image):
    net.res_conv1[0].bias.data[0] = torch.inf  # inf * 0 and inf - inf in the gates


def break_weight(net, image):
    net.res_conv5[0].weight.data[0] = torch.nan


def break_scale(net, image):
    for parameter in net.parameters():
        parameter.data.mul_(1e10)  # finite weights, but infinite features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spoil", [break_image, break_image_by_inf, break_bias, break_weight, break_scale])
def test_a_nan_on_the_way_reaches_the_whole_output(dtype, spoil):
    """Through CRA's mean it reaches every pixel of the plain network's output, and must in every precision."""
    net, image = network(), torch.rand(1, 3, 20, 24)
    spoil(net, image)
    with torch.inference_mode():
        assert not net(image).isfinite().any(), "no case of what is tested"
    assert not StripRunner(net, dtype)(image).isfinite().any()


@pytest.fixture
def float32_settings():
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    yield settings
    for setting, precision in zip(settings, before):
        setting.fp32_precision = precision


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("before", ["tf32", "ieee"])
def test_float32_is_not_tf32_while_a_runner_runs(float32_settings, monkeypatch, whole, before):
    """What a GPU would be told inside a run; afterwards, also after an error, the setting is the caller's again."""

    def read():
        return [setting.fp32_precision for setting in float32_settings]

    for setting in float32_settings:
        setting.fp32_precision = before
    monkeypatch.setattr(inference, "runs_whole", lambda image: whole)
    net, seen = network(), []
    runner = StripRunner(net)
    gate = net.res_conv1[1].conv_du
    hook = gate.register_forward_hook(lambda *call: seen.append(read()))
    runner(torch.rand(1, 3, 8, 8))
    assert seen == [["ieee", "ieee"]] * 3, "once a stage"
    assert read() == [before, before]
    hook.remove()
    gate.register_forward_hook(lambda *call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner(torch.rand(1, 3, 8, 8))
    assert read() == [before, before]


@pytest.mark.parametrize("kind", RESIDUAL_CONVS)
def test_dense_kernel_is_the_same_convolution(kind):
    torch.manual_seed(0)
    conv, v = RESIDUAL_CONVS[kind](32, 32, 3, padding=4, dilation=4), torch.rand(1, 32, 20, 21)
    weight, bias = dense_kernel(conv)
    torch.testing.assert_close(F.conv2d(v, weight, bias, padding=4, dilation=4), conv(v), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dilation", [1, 3, 16])
@pytest.mark.parametrize("size", [(20, 34), (7, 5)])
def test_window_sums_give_the_mean_of_the_convolution(dilation, size):
    torch.manual_seed(0)
    features = FeatureMap(4, *size, torch.float32, "cpu")
    v = features.rows(0, size[0])
    v.copy_(torch.rand(1, 4, *size))
    weight = torch.rand(6, 4, 3, 3)
    expected = F.conv2d(v.double(), weight.double(), padding=dilation, dilation=dilation).mean((2, 3))[0]
    sums = window_sums(features, column_sums(v), dilation)
    mean = torch.einsum("oikl,kli->o", weight.double(), sums) / (size[0] * size[1])
    torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-6)


def test_sums_of_a_bfloat16_map_are_rounded_once():
    rows = torch.ones(1, 2, 1000, 3, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    assert column_sums(rows).equal(torch.full((3, 2), 1000.0))  # a sum in steps of bfloat16 would end at 256


def test_equals_the_golden_outputs(shared):
    golden = np.load(shared / "reference" / "golden.npz")
    rainy = torch.from_numpy(golden["rainy"])
    for name in ("sapnet_published_2021-09", "sapnet_published_2021-11", "prenet_rain100h", "prenet_rain100l"):
        runner = StripRunner(load_network(shared / "weights" / f"{name}.pth"))
        for image, expected in zip(rainy, golden[name]):
            assert np.abs(runner(image[None])[0].numpy() - expected).max() < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Rain100L", "Rain100H"])
def test_bfloat16_keeps_the_psnr_of_the_real_sets(shared, name):
    """All 20 images of each set; whole with THOROUGH=10, and otherwise a part of each, in a thirtieth of the time."""
    net = load_network(shared / "weights" / "sapnet_published_2021-09.pth")
    runners = [StripRunner(net, dtype) for dtype in (torch.float32, torch.bfloat16)]
    folder, changes = shared / "data" / "test" / name, []
    for path in sorted(folder.glob("rainy/*.png")):
        rainy, clean = read_rgb(path), read_rgb(folder / f"no{path.name}")
        if THOROUGH < 10:
            rainy, clean = rainy[100:164, 150:230], clean[100:164, 150:230]
        exact, half = (psnr(luma(to_image(runner(to_tensor(rainy)))), luma(clean)) for runner in runners)
        changes.append(half - exact)
    mean, largest = np.mean(changes), np.abs(changes).max()
    print(f"{name}: bf16 changes PSNR-Y by {mean:+.4f} dB, at most {largest:.4f} dB an image")
    assert len(changes) == 20 and abs(mean) < 0.02


def test_self_ensemble_averages_what_keeps_rain_upright():
    """On runners of which the answer is known: a flip is turned back, and each of the four views is seen once."""
    image = torch.rand(1, 3, 5, 7)
    assert torch.allclose(self_ensemble(lambda view: 2 * view)(image), 2 * image)
    views = []
    self_ensemble(lambda view: views.append(view) or view)(image)
    expected = (image, image.flip(3), image.flip(2), image.flip(2, 3))
    assert len(views) == 4 and all(any(torch.equal(view, other) for other in views) for view in expected)
    corner = torch.zeros(1, 3, 5, 7)
    corner[..., 0, 0] = 1
    marked = self_ensemble(lambda view: corner)(image)[0, 0]
    assert marked[0, 0] == marked[0, -1] == marked[-1, 0] == marked[-1, -1] == 0.25 and marked.sum() == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_that_is_not_finite_becomes_no_image(value):
    output = torch.zeros(1, 3, 4, 5)
    output[0, 1, 2, 3] = value
    with pytest.raises(RunError, match="not finite"):
        to_image(output)
