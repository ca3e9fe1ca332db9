"""The GPU path without a GPU: what a step and an image launch on a device, and that nothing waits for the device.

Tensors without data stand in for those of the device. They are not called "cuda", as PyTorch's backward pass asks the
driver of such.
"""
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT
from inference import StripRunner
from networks import SAPNet

BLOCKING = "_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item"
FREE = "device", "detach", "alias", "view", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty_strided"


class Traffic(TorchDispatchMode):
    """Counts the operations on one type of device, and lists those that make the program wait for it."""

    def __init__(self, device_type):
        super().__init__()
        self.device_type, self.launches, self.waits = device_type, Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        tensors = [leaf for leaf in _pytree.tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if self.device_type in devices:
            copy = name in ("_to_copy", "copy_") and len(devices) > 1
            asynchronous = (kwargs or {}).get("non_blocking") or name == "copy_" and args[2:] == (True,)
            if name in BLOCKING or copy and not asynchronous:
                self.waits.append(f"{name} {sorted(devices)}")
            if not function.is_view and name not in FREE:
                self.launches[name] += 1
        return result


STEPS = """
import copy, json, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("standin")
torch.standin.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]

from losses import build_criterion
from muon import build_optimizers
from test_accelerator import Traffic
from schedule import conditions
from train import build_network, parse_args, update_average
from training_step import build_pass, take_step

DEVICE, CPU = torch.device("standin:0"), torch.device("cpu")


def without_data(module):
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=DEVICE)
                    trained = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(empty, tensor.requires_grad) if trained else empty


args = parse_args([
    "--backbone_weights", "random", "--seg_backbone", "resnet18", "--seg_start_epoch", "0", "--pixel_loss", "mse+ssim",
    "--w_psnr", "0.02", "--optimizer", "muon", "--ema", "0.9", "--clip_grad", "1", "--amp", "False",
    "--cuda_graph", "False",
])
net, criterion = build_network(args, CPU, None), build_criterion(args, CPU, args.epochs)
averaged, counts = copy.deepcopy(net), []
with FakeTensorMode():
    for module in (net, averaged, criterion):
        without_data(module)
    optimizers, scaler = build_optimizers("muon", net, 1e-3), torch.amp.GradScaler("cpu", enabled=False)
    differentiated = build_pass(args, net, net, criterion, scaler)
    for step in (1, 2):
        rainy, clean = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
        with Traffic("standin") as traffic:
            batch = rainy.to(DEVICE, non_blocking=True), clean.to(DEVICE, non_blocking=True)
            now = conditions(args, 0, 0.5)
            derained, terms = take_step(args, net, differentiated, optimizers, scaler, batch, now)
            update_average(averaged, net, 0.9, step)
        counts.append([sum(traffic.launches.values()), traffic.waits])
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Traffic("standin") as traffic:
        for optimizer in optimizers:
            optimizer.step()
        update_average(averaged, net, 0.9, 3)
    counts.append([sum(traffic.launches.values()), traffic.waits])
print(json.dumps({{"terms": sorted(terms), "counts": counts}}))
"""


@pytest.mark.slow
def test_a_training_step_never_waits_for_the_device():
    """Forward, all losses, backward, clipping, Muon and Adam, EMA. In a process of its own, which names a device."""
    code = STEPS.format(root=str(ROOT), tests=str(Path(__file__).parent))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert set(found["terms"]) >= {"ssim", "mse", "psnr_loss", "contrast", "lpips", "segmentation", "loss", "psnr"}
    (_, first_waits), (step, waits), (optimizers, optimizer_waits) = found["counts"]
    assert first_waits == ["_to_copy ['cpu', 'standin']"], "SSIM's matrix, which later steps find on the device"
    assert waits == optimizer_waits == []
    print(f"launches: {step} a step, {optimizers} of them Muon, Adam and EMA")
    assert optimizers < 200


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_whole_image_never_waits_for_the_device(dtype):
    """In strips, as of a large image."""
    with torch.device("meta"):
        net, image = SAPNet(), torch.empty(1, 3, 1200, 1000)
    runner = StripRunner(net, dtype)
    with Traffic("meta") as traffic:
        assert runner(image).shape == image.shape
    print(f"launches: {sum(traffic.launches.values())} an image")
    assert traffic.waits == [] and traffic.launches["conv2d"] >= 6 * 16
