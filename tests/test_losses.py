"""The semantic losses against golden values, and what each must do to the derained image."""
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from torchvision.models import alexnet

import losses
from backbones import file_of, find_backbone
from checkpoints import load_checkpoint, save_checkpoint
from conftest import make_pairs
from losses import WEIGHTS, DerainLoss, LPIPSLoss, PerceptualContrastiveLoss, SegmentationLoss, focal_loss, psnr_loss
from networks import SEG_BACKBONES, UBS, SAPNet
from run_folder import STATE_FILE
from SSIM import ssim
from utils import InputError

RANDOM = {"backbone_weights": "random"}
SMALL = {"seg_backbone": "resnet18", **RANDOM}
OFF = ("--use_contrast", False, "--use_lpips", False, "--use_seg_stage1", False)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path_factory):
    """An empty cache, and downloads that fail as they do without a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch_home")))

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)


@pytest.fixture(scope="module")
def golden(shared):
    arrays = np.load(shared / "reference/golden.npz")
    names = {"derained": "sapnet_published_2021-09", "clean": "clean", "rainy": "rainy"}
    images = {name: torch.from_numpy(arrays[key]) for name, key in names.items()}
    return SimpleNamespace(**images, values=json.loads((shared / "reference/golden_losses.json").read_text()))


@pytest.fixture(scope="module")
def vgg_loss(shared):
    return PerceptualContrastiveLoss(shared / "weights")


@pytest.fixture(scope="module")
def lpips_loss(shared):
    return LPIPSLoss("alex", shared / "weights")


def random_images(count=3, side=40, dtype=torch.float32):
    """derained, clean, rainy: (count, 3, side, side) smooth images, the derained one between the others."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(count, 3, side, side, generator=generator, dtype=torch.float64)
    rainy = (clean + 0.5 * torch.rand(count, 1, side, side, generator=generator, dtype=torch.float64)).clamp(max=1)
    return [image.to(dtype) for image in (0.6 * clean + 0.4 * rainy, clean, rainy)]


def gradient(loss, image):
    image = image.clone().requires_grad_()
    loss(image).backward()
    return image.grad


def assert_useful(grad):
    """Finite, and not zero for any image of the batch."""
    assert grad.isfinite().all()
    assert (grad.abs().amax((1, 2, 3)) > 0).all()


# Golden values


def test_ssim_agrees(golden):
    for name in ("derained", "rainy"):
        expected = golden.values[f"ssim_zero_padded({name},clean)"]
        assert ssim(getattr(golden, name), golden.clean).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_pcl_and_its_layers_agree(golden, vgg_loss):
    images = golden.derained, golden.clean, golden.rainy
    expected = golden.values["pcl_layers(imagenet_normalised=True)"]
    assert [ratio.item() for ratio in vgg_loss.layer_ratios(*images)] == pytest.approx(expected, rel=1e-4)
    assert vgg_loss(*images).item() == pytest.approx(golden.values["pcl(imagenet_normalised=True)"], rel=1e-4)


@pytest.mark.parametrize("name", ["derained", "rainy"])
def test_lpips_agrees_for_each_image_and_for_the_batch(golden, lpips_loss, name):
    expected = golden.values[f"lpips_alex({name},clean) per image"]
    image = getattr(golden, name)
    values = [lpips_loss(image[k : k + 1], golden.clean[k : k + 1]).item() for k in range(len(image))]
    assert values == pytest.approx(expected, rel=1e-4)
    assert lpips_loss(image, golden.clean).item() == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("net", losses.LPIPS_NETS)
def test_lpips_agrees_with_the_package(net):
    loss = LPIPSLoss(net, **RANDOM)
    derained, clean, _ = random_images()
    expected = loss.metric(2 * derained - 1, 2 * clean - 1).mean()
    torch.testing.assert_close(loss(derained, clean), expected, rtol=1e-4, atol=0)


def test_psnr_loss_is_the_mean_of_the_images_negative_psnr():
    _, clean, _ = random_images()
    derained = clean + torch.tensor([0.02, 0.1, 0.3])[:, None, None, None] * torch.randn(clean.shape)
    expected = [-peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=1) for x, y in zip(clean, derained)]
    assert psnr_loss(derained, clean).item() == pytest.approx(np.mean(expected), abs=0.05)  # for the floor


# Gradients


@pytest.mark.slow
def test_every_term_reaches_every_derained_image():
    criterion = DerainLoss("mse+ssim", {"psnr_loss": 0.02, **WEIGHTS}, **SMALL)
    derained, clean, rainy = random_images()
    names = ("ssim", "mse", "psnr_loss", "contrast", "lpips", "segmentation")
    for name in names:
        assert_useful(gradient(lambda image: criterion(image, clean, rainy)[1][name], derained))
    total, terms = criterion(derained, clean, rainy)
    assert tuple(terms) == names
    expected = terms["ssim"] + terms["mse"] + 0.4 * terms["contrast"] + terms["lpips"] + 0.1 * terms["segmentation"]
    torch.testing.assert_close(total, expected + 0.02 * terms["psnr_loss"])


def test_real_weights_give_gradients(golden, vgg_loss, lpips_loss):
    assert_useful(gradient(lambda image: vgg_loss(image, golden.clean, golden.rainy), golden.derained))
    assert_useful(gradient(lambda image: lpips_loss(image, golden.clean), golden.derained))


def test_pcl_gradient_agrees_with_differences():
    loss = PerceptualContrastiveLoss(**RANDOM).double()
    derained, clean, rainy = random_images(1, 16, torch.float64)
    grad = gradient(lambda image: loss(image, clean, rainy), derained)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        direction = torch.randn(derained.shape, generator=generator, dtype=torch.float64)
        step = 1e-8 * direction  # short: PCL has a kink wherever a ReLU or a difference changes its sign
        difference = loss(derained + step, clean, rainy) - loss(derained - step, clean, rainy)
        assert (grad * direction).sum().item() == pytest.approx(difference.item() / 2e-8, rel=1e-4)


def test_focal_loss_gradient_and_value():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(focal_loss, logits)
    p = logits.softmax(1).amax(1)
    torch.testing.assert_close(focal_loss(logits), (-((1 - p) ** 2) * p.log()).mean())
    assert focal_loss(100 * logits.sign() * torch.tensor([1, -1, -1, -1, -1]).view(5, 1, 1)).isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("real", [True, False], ids=["real", "random"])
def test_pcl_pulls_to_clean_and_pushes_from_rainy(real, request):
    if real:
        loss, images = request.getfixturevalue("vgg_loss"), request.getfixturevalue("golden")
        derained, clean, rainy = (image[..., :64, :64] for image in (images.derained, images.clean, images.rainy))
    else:
        loss, (derained, clean, rainy) = PerceptualContrastiveLoss(**RANDOM), random_images()
    to_clean = [loss(derained.lerp(clean, share), clean, rainy).item() for share in (0, 0.25, 0.5, 1)]
    to_rainy = [loss(derained.lerp(rainy, share), clean, rainy).item() for share in (0, 0.25, 0.5, 0.9)]
    assert to_clean == sorted(to_clean, reverse=True) and to_clean[-1] == 0
    assert to_rainy == sorted(to_rainy)


@pytest.mark.slow
def test_gradient_reaches_the_derained_image_only():
    criterion = DerainLoss("mse", **SMALL)
    images = [image.requires_grad_() for image in random_images()]
    criterion.contrast(*images).backward()
    criterion.lpips(*images[:2]).backward()
    assert images[1].grad is None and images[2].grad is None


def test_lpips_gradient_of_an_image_depends_on_that_image():
    loss = LPIPSLoss(**RANDOM)
    derained, clean, _ = random_images()
    before = gradient(lambda image: loss(image, clean), derained)
    assert_useful(before)
    for k in range(len(derained)):
        changed = derained.clone()
        changed[k] = clean[k].lerp(derained[k], 0.5)
        after = gradient(lambda image: loss(image, clean), changed)
        differs = [not torch.allclose(a, b, rtol=1e-3, atol=1e-9) for a, b in zip(before, after)]
        assert differs == [k == other for other in range(len(derained))]


@pytest.mark.slow
def test_equal_images_give_no_nan():
    criterion = DerainLoss("mse+ssim", {"psnr_loss": 0.02, **WEIGHTS}, **SMALL)
    _, clean, rainy = random_images(1, 32)  # small: a processor without bfloat16 takes long for it
    black = torch.zeros_like(clean)
    for images in ((rainy, clean, rainy), (clean, clean, rainy), (clean, clean, clean), (black, black, black)):
        for mixed in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                grad = gradient(lambda image: criterion(image, *images[1:])[0], images[0])
            assert grad.isfinite().all()


def test_lpips_gradient_is_finite_where_all_features_are_zero():
    loss = LPIPSLoss(**RANDOM)
    last = [layer for layer in loss.metric.net.modules() if isinstance(layer, torch.nn.Conv2d)][-1]
    last.bias.fill_(-1e6)
    derained, clean, _ = random_images()
    assert_useful(gradient(lambda image: loss(image, clean), derained))


@pytest.mark.slow
def test_autocast_runs_the_backbones_and_leaves_the_sums_in_float32(golden, shared):
    criterion = DerainLoss(weights={"contrast": 0.4, "lpips": 1.0}, backbone_dir=shared / "weights")
    images = [image[:1, :, :32, :32] for image in (golden.derained, golden.clean, golden.rainy)]
    _, exact = criterion(*images)
    with torch.autocast("cpu", torch.bfloat16):
        total, mixed = criterion(*images)
    assert total.dtype == torch.float32 and all(value.dtype == torch.float32 for value in mixed.values())
    assert mixed["ssim"] == exact["ssim"]
    for name in ("contrast", "lpips"):
        assert mixed[name] != exact[name]
        torch.testing.assert_close(mixed[name], exact[name], rtol=0.03, atol=0)


# Frozen networks


@pytest.mark.slow
def test_frozen_networks_do_not_move_and_stay_in_evaluation_mode():
    criterion = DerainLoss("mse", **SMALL)
    criterion.train()
    frozen = [module for module in criterion.modules() if module is not criterion]
    assert not any(module.training for module in frozen)
    assert not any(parameter.requires_grad for parameter in criterion.parameters())
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    derained, clean, rainy = random_images()
    image = derained.clone().requires_grad_()
    optimizer = torch.optim.Adam([image], lr=1e-2)
    values = []
    for _ in range(10):
        value = criterion.segmentation(image) + criterion.contrast(image, clean, rainy) + criterion.lpips(image, clean)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]
    assert all(torch.equal(before[name], value) for name, value in criterion.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet18", pytest.param("resnet101", marks=pytest.mark.slow)])
def test_ubs_reaches_the_image_and_is_the_same_each_time(backbone):
    random_state = torch.get_rng_state()
    loss, again = (SegmentationLoss(7, backbone, **RANDOM) for _ in range(2))
    assert torch.equal(random_state, torch.get_rng_state())
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(loss.state_dict().values(), again.state_dict().values()))
    derained, _, _ = random_images(2, 38)
    assert loss.network(derained).shape == (2, 7, 10, 10)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    image = derained.clone().requires_grad_()
    optimizer = torch.optim.SGD([image], lr=1.0)
    for _ in range(10):
        optimizer.zero_grad()
        loss(image).backward()
        assert_useful(image.grad)
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())


def test_ubs_head():
    head = UBS(21, "resnet18").head
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert head.weight.shape[0] == 21 and not head.bias.any()


def test_zero_weights_build_and_compute_nothing(monkeypatch):
    for name in ("PerceptualContrastiveLoss", "LPIPSLoss", "SegmentationLoss"):
        monkeypatch.setattr(losses, name, None)
    criterion = DerainLoss(weights={"contrast": 0, "lpips": 0.0, "psnr_loss": 0})
    assert not list(criterion.parameters())
    derained, clean, rainy = random_images()
    total, terms = criterion(derained, clean, rainy)
    assert list(terms) == ["ssim"] and torch.equal(total, terms["ssim"])


def test_skipped_term_is_not_computed():
    criterion = DerainLoss(weights={"segmentation": 0.1}, **SMALL)
    criterion.segmentation.forward = None
    assert list(criterion(*random_images(), left_out={"segmentation"})[1]) == ["ssim"]


def test_left_out_psnr_is_measured_and_does_not_count():
    criterion = DerainLoss(weights={"psnr_loss": 0.5})
    images = random_images()
    total, terms = criterion(*images)
    assert total.item() == pytest.approx((terms["ssim"] + 0.5 * terms["psnr_loss"]).item())
    without, same = criterion(*images, left_out={"psnr_loss"})
    assert torch.equal(without, terms["ssim"]) and torch.equal(same["psnr_loss"], terms["psnr_loss"])


@pytest.mark.parametrize("pixel_loss", losses.PIXEL_LOSSES)
def test_earlier_stages_count_by_their_mean_pixel_loss(pixel_loss):
    criterion = DerainLoss(pixel_loss, weights={"stages": 0.5, "psnr_loss": 0.02})
    derained, clean, rainy = random_images()
    earlier = [(clean + 0.1 * k * rainy).requires_grad_() for k in (1, 2)]
    total, terms = criterion(derained, clean, rainy, earlier=earlier)
    alone = [DerainLoss(pixel_loss, weights={})(estimate, clean, rainy)[0].item() for estimate in (derained, *earlier)]
    assert terms["stages"].item() == pytest.approx((alone[1] + alone[2]) / 2)
    expected = alone[0] + 0.5 * terms["stages"] + 0.02 * terms["psnr_loss"]
    assert total.item() == pytest.approx(expected.item())
    total.backward()
    assert all(estimate.grad.abs().sum() > 0 for estimate in earlier)


def test_a_single_stage_has_no_earlier_ones():
    total, terms = DerainLoss(weights={"stages": 0.5})(*random_images())
    assert list(terms) == ["ssim"] and torch.equal(total, terms["ssim"])


# Backbone files


@pytest.fixture(scope="module")
def alexnet_state():
    """AlexNet's names with random convolutions, and of its large classifier a small part."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        features = alexnet().features.state_dict()
    return {**{f"features.{name}": value for name, value in features.items()}, "classifier.6.bias": torch.zeros(1000)}


@pytest.mark.slow
def test_full_and_convolution_only_files_are_the_same(alexnet_state, tmp_path):
    state = alexnet_state
    features = {name: value for name, value in state.items() if name.startswith("features.")}
    for folder, file_name, content in (
        ("full", "alexnet-owt-7be5be79.pth", state),
        ("part", "alexnet_features.pth", features),
        ("half", "alexnet.pth", {name: value.half() for name, value in features.items()}),
    ):
        save_checkpoint(tmp_path / folder / file_name, content)
    derained, clean, _ = random_images()
    full, part, half = (LPIPSLoss("alex", tmp_path / folder)(derained, clean) for folder in ("full", "part", "half"))
    assert torch.equal(full, part)
    torch.testing.assert_close(half, full, rtol=0.01, atol=0)
    assert not torch.allclose(full, LPIPSLoss(**RANDOM)(derained, clean), rtol=1e-4)


def test_torchvision_name_comes_first(alexnet_state, tmp_path):
    save_checkpoint(tmp_path / "alexnet-owt-7be5be79.pth", alexnet_state)
    save_checkpoint(tmp_path / "alexnet-a.pth", {"features.0.weight": torch.zeros(1)})
    LPIPSLoss("alex", tmp_path)


def test_resnet_file_fills_the_body(tmp_path):
    body = UBS(backbone="resnet18").fpn.body.state_dict()
    state = {name: torch.full_like(value, 0.5) for name, value in body.items()} | {"fc.weight": torch.zeros(2, 2)}
    save_checkpoint(tmp_path / "resnet18-f37072fd.pth", state)
    loss = SegmentationLoss(backbone="resnet18", backbone_dir=tmp_path)
    assert all((value == 0.5).all() for value in loss.network.fpn.body.state_dict().values())


TERMS = {
    "contrast": (PerceptualContrastiveLoss, "vgg16", "vgg16-397923af.pth", "--use_contrast False"),
    "lpips": (LPIPSLoss, "alexnet", "alexnet-owt-7be5be79.pth", "--use_lpips False"),
    "segmentation": (SegmentationLoss, "resnet101", "resnet101-63fe2227.pth", "--use_seg_stage1 False"),
}


@pytest.mark.slow
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("folder", [True, False], ids=["backbone_dir", "download"])
def test_missing_file_is_explained(term, folder, tmp_path):
    build, name, file_name, switch = TERMS[term]
    with pytest.raises(InputError) as error:
        build(backbone_dir=tmp_path if folder else None)
    message = str(error.value)
    for part in (name, f"https://download.pytorch.org/models/{file_name}", "--backbone_dir", switch):
        assert part in message
    assert ((str(tmp_path) in message) if folder else ("no network" in message)) and "\n" not in message


@pytest.mark.slow
@pytest.mark.parametrize("content", ["other", "shapes", "garbage", "nan", "shallow"])
def test_wrong_file_is_explained(content, alexnet_state, tmp_path):
    path = tmp_path / "alexnet.pth"
    state = {name: value for name, value in alexnet_state.items() if name.startswith("features.")}
    if content == "garbage":
        path.write_bytes(b"<html>404</html>")
    else:
        changes = {
            "other": {"conv.weight": torch.ones(1)},
            "shapes": {name: value[:1] for name, value in state.items()},
            "nan": state | {"features.0.bias": torch.full((64,), torch.nan)},
            "shallow": {name: value for name, value in state.items() if "10" not in name},
        }
        save_checkpoint(path, changes[content])
    with pytest.raises(InputError) as error:
        LPIPSLoss("alex", tmp_path)
    message = str(error.value)
    for part in (path, "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", f"--backbone_dir {tmp_path}"):
        assert str(part) in message
    assert "\n" not in message


@pytest.mark.slow
def test_download_fills_the_cache(alexnet_state, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def download(url, path, hash_prefix):
        assert url.endswith("alexnet-owt-7be5be79.pth") and hash_prefix == "7be5be79"
        torch.save(alexnet_state, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    LPIPSLoss()
    assert "downloading https://download.pytorch.org/models/alexnet" in capsys.readouterr().out
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    LPIPSLoss()
    LPIPSLoss(backbone_dir=tmp_path)  # not there, but in the cache
    assert "downloading" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_of_several_processes_one_downloads(tmp_path, monkeypatch):
    """A download that failed is tried again by the next process."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def download(url, path, hash_prefix):
        with open(tmp_path / "calls", "a") as calls:
            calls.write("x")
        time.sleep(0.5)
        if (tmp_path / "calls").read_text() == "x":
            raise OSError("the network is down")
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with ProcessPoolExecutor(3, get_context("fork")) as pool:
        found = [path for path, _ in pool.map(find_backbone, ["vgg16"] * 3, [None] * 3)]
    assert (tmp_path / "calls").read_text() == "xx" and found.count(None) == 1
    (path,) = (tmp_path / "hub/checkpoints").iterdir()
    assert found.count(path) == 2, "and the lock is gone"


def test_random_weights_are_loud_and_the_same_each_time(capsys):
    first, second = (PerceptualContrastiveLoss(**RANDOM).state_dict() for _ in range(2))
    assert capsys.readouterr().err.count("WARNING: RANDOM weights for vgg16") == 2
    assert all(torch.equal(first[name], second[name]) for name in first)


# In train.py


@pytest.fixture
def small_run(tmp_path, run):
    """Train on made pairs with small frozen networks: small_run("--epochs", 2) -> result, folder."""
    data = make_pairs(tmp_path / "data")

    def train_briefly(*options, name="run"):
        folder = tmp_path / name
        result = run(
            "train", "--data_path", data, "--packed_dir", tmp_path / "packed", "--save_path", folder,
            "--patch_size", 32, "--stride", 32, "--recurrent_iter", 1, "--batch_size", 4, "--num_workers", 0,
            "--device", "cpu", "--compile", False, "--log_interval", 1, "--backbone_weights", "random",
            "--seg_backbone", "resnet18", *options,
        )
        return result, folder

    return train_briefly


def records(folder):
    """The lines of the log that end an epoch."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "epoch" in line]


@pytest.mark.slow
def test_terms_are_logged_and_segmentation_joins_late(small_run):
    result, folder = small_run("--epochs", 2, "--seg_start_epoch", 1, "--w_psnr", 0.02)
    assert result.status == 0, result.err
    assert result.err.count("WARNING: RANDOM weights") == 3
    assert "loss: ssim + 0.02 psnr_loss + 0.4 contrast + 1 lpips + 0.1 segmentation" in result.out
    first, second = records(folder)
    for name in ("ssim", "psnr_loss", "contrast", "lpips"):
        assert name in first and name in second
    assert "segmentation" not in first and second["segmentation"] > 0
    events = b"".join(path.read_bytes() for path in folder.glob("events*"))
    assert all(f"train/{name}".encode() in events for name in ("ssim", "contrast", "lpips", "segmentation"))
    for file in ("net_latest.pth", "net_epoch1.pth"):
        assert set(load_checkpoint(folder / file)) == set(SAPNet().state_dict())
    state = load_checkpoint(folder / STATE_FILE)
    assert set(state["net"]) == set(SAPNet().state_dict())
    assert len(state["optimizers"][0]) == len(list(SAPNet().parameters()))


@pytest.mark.slow
def test_resume_with_all_terms_is_exact(small_run):
    options = "--epochs", 3, "--seg_start_epoch", 1
    _, whole = small_run(*options, name="whole")
    _, stopped = small_run(*options, "--stop_after", 4, name="parts")
    result, _ = small_run(*options, "--resume", name="parts")
    assert result.status == 0, result.err
    assert (whole / "net_latest.pth").read_bytes() == (stopped / "net_latest.pth").read_bytes()
    for a, b in zip(records(whole), records(stopped), strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


@pytest.mark.slow
def test_only_used_terms_need_files(small_run, refused, tmp_path):
    pretrained = "--backbone_weights", "pretrained", "--backbone_dir", tmp_path / "none", "--epochs", 1
    result, folder = small_run(*pretrained, *OFF, name="off")
    assert result.status == 0, result.err
    result, _ = small_run(*pretrained, "--use_contrast", False, "--w_lpips", 0, name="late")
    assert result.status == 0 and "segmentation loss: not used" in result.out
    short = "--epochs", 9, "--max_steps", 1, "--seg_start_epoch", 1
    result, _ = small_run(*pretrained[:4], *short, *OFF[:4], name="short")
    assert result.status == 0 and "no epoch after --seg_start_epoch 1" in result.out
    result, folder = small_run(*pretrained, *OFF[:4], "--seg_start_epoch", 0, name="on")
    assert result.status == 2 and "resnet18-f37072fd.pth" in result.err and "--use_seg_stage1 False" in result.err
    assert not folder.exists()
    result, _ = small_run(*pretrained, "--use_stage1", False, name="untrained")
    assert result.status == 0, result.err


def test_patch_too_small_for_lpips(small_run):
    result, _ = small_run("--patch_size", 24, "--stride", 24)
    assert result.status == 2 and "--patch_size 24: expected 31 or more for --lpips_net alex" in result.err


@pytest.mark.slow
@pytest.mark.parametrize("net", losses.LPIPS_NETS)
def test_smallest_image(net):
    loss, smallest = LPIPSLoss(net, **RANDOM), losses.SMALLEST_IMAGE[net]
    assert loss(*random_images(1, smallest)[:2]).isfinite()
    with pytest.raises(RuntimeError):
        loss(*random_images(1, smallest - 1)[:2])


@pytest.mark.parametrize(
    ("name", "version", "wrong"),
    [
        ("resnet101", "IMAGENET1K_V1", "resnet101-cd907fc2.pth"), ("vgg16", "IMAGENET1K_V1", "vgg16_bn.pth"),
        ("fasterrcnn_resnet50_fpn", "DEFAULT", "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth"),
        ("resnet50", "IMAGENET1K_V1", "resnet50_fbgemm_bf931d71.pth"),
    ],
)
def test_the_file_of_another_version_is_not_taken(tmp_path, name, version, wrong):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / wrong).touch()
    path, advice = find_backbone(name, folder, version)
    assert path is None and "another version" in advice
    (folder / f"{name}.pth").touch()
    assert find_backbone(name, folder, version)[0] == folder / f"{name}.pth"
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file_of(name, version)[1]
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert find_backbone(name, folder, version)[0] == cached, "of the published name"
    (folder / cached.name).touch()
    assert find_backbone(name, folder, version)[0] == folder / cached.name


def test_every_seg_backbone_is_torchvisions():
    for name in SEG_BACKBONES:
        assert file_of(name)[1].startswith(name)
