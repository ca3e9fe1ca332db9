"""The network against the published weights' outputs, which the project did not compute itself."""
import numpy as np
import pytest
import torch

from checkpoints import load_network
from networks import SAPNet

PUBLISHED = ("sapnet_published_2021-09", "sapnet_published_2021-11", "prenet_rain100h", "prenet_rain100l")
VARIANTS = {"plain": 180_483, "separable": 101_763, "split": 134_403}


@pytest.fixture(scope="module")
def golden(shared):
    return {name: torch.from_numpy(array) for name, array in np.load(shared / "reference/golden.npz").items()}


def weights_path(shared, name):
    folder = "reference" if name.startswith("variant") else "weights"
    return shared / folder / f"{name}{'_random' if folder == 'reference' else ''}.pth"


@pytest.mark.parametrize("name", (*PUBLISHED, *(f"variant_{name}" for name in VARIANTS)))
@torch.inference_mode()
def test_output_agrees_with_the_published_network(shared, golden, name):
    # The random plain variant is the undilated one.
    net = load_network(weights_path(shared, name), use_dilation=False if name == "variant_plain" else None)
    torch.testing.assert_close(net(golden["rainy"]), golden[name], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_each_stage_agrees_with_the_published_network(shared, golden):
    net = load_network(weights_path(shared, PUBLISHED[0]))
    last, stages = net(golden["rainy"], return_stages=True)
    torch.testing.assert_close(torch.stack(stages), golden[f"{PUBLISHED[0]}_stages"], atol=1e-5, rtol=0)
    assert torch.equal(last, stages[-1])


@pytest.mark.parametrize("residual_conv, count", list(VARIANTS.items()))
def test_parameter_count(residual_conv, count):
    assert sum(parameter.numel() for parameter in SAPNet(residual_conv=residual_conv).parameters()) == count


def test_prenet_has_the_published_parameter_count():
    net = SAPNet(use_dilation=False, use_cra=False)
    assert sum(parameter.numel() for parameter in net.parameters()) == 168_963


@pytest.mark.slow
@torch.inference_mode()
def test_float64_network_follows_its_input_and_agrees(shared, golden):
    net = load_network(weights_path(shared, "variant_split")).double()
    output = net(golden["rainy"].double())
    assert output.dtype == torch.float64
    torch.testing.assert_close(output.float(), golden["variant_split"], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_network_follows_its_inputs_device():
    output, stages = SAPNet(recurrent_iter=2).to("meta")(torch.empty(2, 3, 9, 7, device="meta"), return_stages=True)
    assert all(tensor.device.type == "meta" and tensor.shape == (2, 3, 9, 7) for tensor in (output, *stages))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@torch.inference_mode()
def test_gpu_agrees_with_cpu():
    torch.backends.cudnn.allow_tf32 = False
    net, rainy = SAPNet(recurrent_iter=2), torch.rand(1, 3, 33, 47)
    expected = net(rainy)
    output = net.cuda()(rainy.cuda())
    assert output.device.type == "cuda"
    torch.testing.assert_close(output.cpu(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (2, 3), (31, 33)])
@torch.inference_mode()
def test_any_size_gives_its_own_size(size):
    output = SAPNet(recurrent_iter=2)(torch.rand(1, 3, *size))
    assert output.shape == (1, 3, *size) and output.isfinite().all()


@torch.inference_mode()
def test_images_of_a_batch_do_not_influence_each_other():
    net, rainy = SAPNet(recurrent_iter=2), torch.rand(3, 3, 20, 24)
    alone = torch.cat([net(image[None]) for image in rainy])
    torch.testing.assert_close(net(rainy), alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("count", [1, 3])
@torch.inference_mode()
def test_fewer_stages_are_the_first_of_more(count):
    torch.manual_seed(0)
    net, rainy = SAPNet(recurrent_iter=4), torch.rand(1, 3, 16, 16)
    stages = net(rainy, return_stages=True)[1]
    assert len(stages) == 4
    short = SAPNet.from_state_dict(net.state_dict(), recurrent_iter=count)
    torch.testing.assert_close(short(rainy), stages[count - 1], atol=1e-6, rtol=0)


@torch.inference_mode()
def test_use_dilation_widens_the_receptive_field():
    """One stage sees 65 px to each side with dilation (131 px in all), and 13 px without."""
    torch.manual_seed(0)
    state = SAPNet().state_dict()
    for use_dilation, reach in ((True, 65), (False, 13)):
        net = SAPNet.from_state_dict(state, recurrent_iter=1, use_dilation=use_dilation).double()
        # CRA pools over the whole image: without its gates, what is left is the convolutions' reach.
        for module in net.modules():
            if hasattr(module, "gate"):
                module.gate = lambda pooled: torch.ones_like(pooled)
        rainy = torch.rand(1, 3, 1, 201, dtype=torch.float64)
        changed = rainy.clone()
        changed[..., 100] += 1
        moved = (net(rainy) != net(changed)).any(1).flatten().nonzero().flatten()
        assert moved.min() == 100 - reach and moved.max() == 100 + reach


@pytest.mark.parametrize(
    "residual_conv, use_cra", [("plain", True), ("separable", True), ("split", True), ("plain", False)]
)
def test_architecture_is_told_from_the_names(residual_conv, use_cra):
    state = SAPNet(residual_conv=residual_conv, use_cra=use_cra).state_dict()
    net = SAPNet.from_state_dict(state, recurrent_iter=3)
    assert net.recurrent_iter == 3
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    # PReNet is published without dilation, SAPNet with it.
    block = net.res_conv5[0]
    dilation = getattr(block, "depth_conv", getattr(block, "custom_conv1", block)).dilation
    assert dilation == ((16, 16) if use_cra else (1, 1))


def test_foreign_weights_are_refused_with_the_first_difference():
    state = SAPNet().state_dict()
    del state["conv_g.0.bias"]
    with pytest.raises(ValueError, match="conv_g.0.bias"):
        SAPNet.from_state_dict(state)


@pytest.mark.parametrize("residual_conv", VARIANTS)
def test_every_parameter_gets_a_gradient(residual_conv):
    torch.manual_seed(0)
    net = SAPNet(recurrent_iter=2, residual_conv=residual_conv)
    net(torch.rand(2, 3, 24, 24)).square().mean().backward()
    silent = [name for name, parameter in net.named_parameters() if not parameter.grad.abs().sum() > 0]
    # The two hidden channels of CRA's ReLU may both be off for a random network.
    assert [name for name in silent if "conv_du" not in name] == []
    assert len(silent) < 20


@torch.inference_mode()
def test_fewer_stages_in_a_pass_are_the_first_of_all():
    net, rainy = SAPNet(recurrent_iter=3), torch.rand(1, 3, 20, 22)
    _, stages = net(rainy, return_stages=True)
    output, first = net(rainy, return_stages=True, recurrent_iter=2)
    assert net.recurrent_iter == 3 and torch.equal(torch.stack(first), torch.stack(stages[:2]))
    assert torch.equal(output, stages[1]) and torch.equal(net(rainy, recurrent_iter=1), stages[0])


def test_a_convolution_of_a_residual_block_heeds_its_own_settings():
    """Users set such things on all ``nn.Conv2d`` of a network."""
    net, v = SAPNet(recurrent_iter=1), torch.rand(1, 32, 12, 12).contiguous(memory_format=torch.channels_last)
    conv = net.res_conv2[0]
    for padding, mode in (((2, 2), "reflect"), ((0, 0), "zeros")):
        conv.padding, conv.padding_mode, conv._reversed_padding_repeated_twice = padding, mode, [2, 2, 2, 2]
        padded = torch.nn.functional.pad(v, (2, 2, 2, 2), mode="reflect") if mode == "reflect" else v
        expected = torch.nn.functional.conv2d(padded, conv.weight, conv.bias, dilation=2)
        torch.testing.assert_close(conv(v), expected)
