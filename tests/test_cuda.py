"""What only a CUDA GPU can show: its precisions, its memory, and training on it."""
import subprocess
import sys

import numpy as np
import pytest
import torch

from checkpoints import load_network, load_weights
from conftest import ROOT, make_pairs
from inference import StripRunner, to_image
from networks import SAPNet
from runners import SharedRunner
from strips import strip_pixels
from test_train import options, read_lines, read_state, without

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.slow,
]
# Against the golden outputs of a CPU in float32: float32 sums up in another order, the others round each layer.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


def on_gpu(precision, weights):
    if precision == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this card has no bfloat16")
    return StripRunner(load_network(weights).cuda(), precision)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "strips"])
@pytest.mark.parametrize("precision", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["sapnet_published_2021-09", "prenet_rain100h"])
def test_every_precision_agrees_with_the_golden_outputs(shared, monkeypatch, name, precision, whole):
    monkeypatch.setattr("inference.runs_whole", lambda image: whole)
    golden = np.load(shared / "reference" / "golden.npz")
    runner = on_gpu(precision, shared / "weights" / f"{name}.pth")
    for image, expected in zip(torch.from_numpy(golden["rainy"]).cuda(), golden[name]):
        difference = np.abs(runner(image[None])[0].cpu().numpy() - expected)
        assert difference.max() < TOLERANCES[precision] and difference.mean() < TOLERANCES[precision] / 10


def test_tf32_is_off_for_images_and_as_it_was_afterwards():
    torch.manual_seed(0)
    net, image = SAPNet(), torch.rand(1, 3, 64, 96)
    expected = StripRunner(net)(image)
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    try:
        assert (StripRunner(net.cuda())(image.cuda()).cpu() - expected).abs().max() < 1e-5
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("precision", TOLERANCES, ids=str)
def test_twelve_megapixels_in_bounded_memory(precision):
    """700 bytes a pixel and the strips' two gigabytes, however the card's memory is filled."""
    runner, image = StripRunner(SAPNet(recurrent_iter=2).cuda(), precision), torch.rand(1, 3, 2848, 4288).cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner(image)
    used = torch.cuda.max_memory_allocated() - before
    print(f"{precision}: {used / image[0, 0].numel():.0f} bytes a pixel")
    assert used < 700 * image[0, 0].numel() + 2**31


def test_a_full_card_gets_smaller_strips():
    runner, image = StripRunner(SAPNet(recurrent_iter=1).cuda()), torch.rand(1, 3, 1200, 1600).cuda()
    expected = to_image(runner(image))
    maps = runner.memory(1200, 1600)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    filler = torch.empty(max(1, free - maps - 2**29), dtype=torch.uint8, device="cuda")
    try:
        assert strip_pixels(image.device, maps) < 2**20
        assert np.abs(to_image(runner(image)).astype(int) - expected).max() <= 1
    finally:
        del filler
        torch.cuda.empty_cache()


def test_images_of_a_batch_are_those_of_one_at_a_time():
    runner, images = StripRunner(SAPNet().cuda()), torch.rand(4, 3, 100, 120).cuda()
    shared_runner = SharedRunner(runner, runner.images_at_once)
    singly = torch.cat([shared_runner(image) for image in images.split(1)])
    torch.testing.assert_close(runner(images).cpu(), singly, atol=1e-4, rtol=0)


def gpu_options(folder, save_path, *extra, **changes):
    return options(folder, save_path, *extra, **{"device": "cuda", "max_steps": 20, "epochs": 100, **changes})


@pytest.mark.parametrize("amp", ["False", "bf16", "fp16"])
@pytest.mark.parametrize("compiled", ["False", "True"])
def test_twenty_steps_of_training(run, tmp_path, amp, compiled):
    pairs, val = make_pairs(tmp_path / "pairs"), make_pairs(tmp_path / "val", (4,))
    flags = {"amp": amp, "compile": compiled, "optimizer": "muon", "ema": 0.9, "val_path": val}
    result = run("train", *gpu_options(pairs, tmp_path / "run", **flags))
    assert result.status == 0, result
    losses = [line["loss"] for line in read_lines(tmp_path / "run") if "epoch" not in line]
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5])
    tested = run("test", "--save_path", tmp_path / "run", "--test_data_path", pairs, "--output_path", tmp_path / "o")
    assert tested.status == 0, tested


def test_what_is_saved_loads_where_there_is_no_gpu(run, tmp_path):
    pairs = make_pairs(tmp_path / "pairs")
    assert run("train", *gpu_options(pairs, tmp_path / "run", max_steps=2, ema=0.9)).status == 0
    for path in (tmp_path / "run").glob("*.pth"):
        places = set()
        torch.load(path, map_location=lambda storage, place: places.add(place) or storage)
        assert places == {"cpu"}, path


EVERY_LOSS = {
    "use_contrast": True, "use_lpips": True, "use_seg_stage1": True, "seg_start_epoch": 2, "seg_backbone": "resnet18",
    "backbone_weights": "random",
}


@pytest.mark.parametrize(
    ("amp", "losses"), [("False", {}), ("bf16", {}), ("fp16", {}), ("False", EVERY_LOSS)],
    ids=["fp32", "bf16", "fp16", "every loss"],
)
def test_a_cuda_graph_trains_as_its_kernels_do_one_by_one(run, tmp_path, amp, losses):
    """Through a change of stages and of loss terms; to 2 % of how far the weights move, as sums have no order here."""
    pairs = make_pairs(tmp_path / "pairs")
    flags = {"amp": amp, "recurrent_iter": 3, "first_stages": (2, 0.4), "w_psnr": 0.02, "psnr_until": 0.7, **losses}
    states = []
    for graph in (False, True):
        folder = tmp_path / str(graph)
        arguments = gpu_options(pairs, folder, schedule="cosine", cuda_graph=graph, clip_grad=1, **flags)
        assert run("train", *arguments).status == 0
        states.append(load_weights(folder / "net_latest.pth"))
    torch.manual_seed(0)
    start = SAPNet(recurrent_iter=3).state_dict()
    moved, apart = (torch.cat([(states[0][key].cpu() - other[key].cpu()).flatten() for key in start]).norm()
                    for other in (start, states[1]))
    assert apart < 0.02 * moved


@pytest.mark.parametrize("amp", ["False", "fp16"])
def test_a_resumed_run_comes_to_the_same_weights(run, tmp_path, amp):
    """To 2 % of how far training has moved them: atomic sums of the GPU have no order."""
    pairs = make_pairs(tmp_path / "pairs")
    for name, steps in (("straight", [20]), ("stopped", [7, 20])):
        for start, step in enumerate(steps):
            extra = ["--resume"] * (start > 0)
            assert run("train", *gpu_options(pairs, tmp_path / name, *extra, amp=amp, stop_after=step)).status == 0
    torch.manual_seed(0)
    start = SAPNet(recurrent_iter=2).state_dict()
    straight, stopped = (load_weights(tmp_path / name / "net_latest.pth") for name in ("straight", "stopped"))
    moved, apart = ((torch.cat([(a[key].cpu() - b[key].cpu()).flatten() for key in a])).norm()
                    for a, b in ((straight, start), (straight, stopped)))
    assert apart < 0.02 * moved
    assert without(read_state(tmp_path / "stopped")["position"], ["totals"]) == without(
        read_state(tmp_path / "straight")["position"], ["totals"]
    )


def test_a_process_for_each_card(tmp_path):
    """DDP over the cards there are: with --device cuda, LOCAL_RANK decides which."""
    cards = torch.cuda.device_count()
    pairs, val = make_pairs(tmp_path / "pairs"), make_pairs(tmp_path / "val", (4,))
    arguments = gpu_options(pairs, tmp_path / "run", batch_size=4 * cards, val_path=val)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cards}"]
    command = [*launcher, str(ROOT / "train.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert read_state(tmp_path / "run")["position"]["step"] == 20
