"""The convolution with a weight gradient of its own, which is tried here also where PyTorch's is as fast."""
import gc
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import weight_gradient
from networks import SAPNet
from weight_gradient import conv3x3


@pytest.fixture
def ours(monkeypatch):
    """Have it used on this machine; the list of the (images, gradient, dilation) that it is called with."""
    calls, operator = [], weight_gradient.OPERATOR
    monkeypatch.setattr(weight_gradient, "SLOW", True)
    monkeypatch.setattr(weight_gradient, "OPERATOR", lambda *inputs: calls.append(inputs) or operator(*inputs))
    return calls


def channels_last(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def gradients(function, tensors):
    """Those of a sum of what ``function`` returns, weighted so that little cancels out."""
    output = function(*tensors)
    return torch.autograd.grad((output * (torch.arange(output.numel()).view(output.shape).cos() + 1)).sum(), tensors)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (5, 6), (40, 33)])
@pytest.mark.parametrize("dilation", [1, 2, 16])
def test_all_gradients_are_those_of_float64(ours, monkeypatch, size, dilation):
    monkeypatch.setattr(weight_gradient, "PIXELS", 100)  # a block of three rows, and a last one of fewer
    torch.manual_seed(0)
    tensors = channels_last(2, 6, *size), torch.randn(5, 6, 3, 3), torch.randn(5)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    double = [tensor.detach().double().requires_grad_() for tensor in tensors]

    def reference(images, weight, bias):
        return F.conv2d(images, weight, bias, padding=dilation, dilation=dilation)

    measured = gradients(lambda *inputs: conv3x3(*inputs, dilation), tensors)
    assert len(ours) == 1
    for gradient, expected in zip(measured, gradients(reference, double)):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_the_networks_gradients_are_the_same_with_it_and_without(ours, monkeypatch):
    torch.manual_seed(0)
    net = SAPNet(recurrent_iter=2).to(memory_format=torch.channels_last)
    rainy = torch.rand(2, 3, 24, 20).contiguous(memory_format=torch.channels_last)
    parameters = dict(net.named_parameters())
    measured = torch.autograd.grad(net(rainy).square().mean(), list(parameters.values()))
    assert len(ours) == 2 * 11  # the gates and ten convolutions in residual blocks, in each stage
    monkeypatch.setattr(weight_gradient, "SLOW", False)
    expected = torch.autograd.grad(net(rainy).square().mean(), list(parameters.values()))
    assert len(ours) == 2 * 11
    for name, gradient, other in zip(parameters, measured, expected):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5 * other.abs().max().item(), msg=name)


def test_a_frozen_bias_or_input_gets_no_gradient(ours):
    images, weight, bias = channels_last(1, 4, 6, 6), torch.randn(4, 4, 3, 3, requires_grad=True), torch.randn(4)
    conv3x3(images, weight, bias).sum().backward()
    assert len(ours) == 1 and weight.grad is not None and images.grad is None and bias.grad is None


@pytest.mark.parametrize("case", ["no gradient", "float64", "bfloat16", "another order"])
def test_what_it_is_not_made_for_goes_pytorchs_way(ours, case):
    dtype = torch.float64 if case == "float64" else torch.float32
    images, weight = channels_last(1, 4, 6, 6, dtype=dtype), torch.randn(4, 4, 3, 3, dtype=dtype, requires_grad=True)
    if case == "another order":
        images = images.contiguous()
    half = torch.autocast("cpu", torch.bfloat16, enabled=case == "bfloat16")
    with half, torch.set_grad_enabled(case != "no gradient"):
        output = conv3x3(images, weight, torch.zeros(4, dtype=dtype))
    if case != "no gradient":
        output.float().square().sum().backward()
        assert weight.grad.abs().min() > 0
    assert ours == []


def test_second_derivatives_are_those_of_pytorch(ours):
    def second(convolution):
        (first,) = torch.autograd.grad(convolution(images, weight, bias).square().mean(), weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    images, weight, bias = channels_last(1, 4, 6, 6), torch.randn(4, 4, 3, 3, requires_grad=True), torch.randn(4)
    expected = second(lambda *tensors: F.conv2d(*tensors, padding=1))
    torch.testing.assert_close(second(conv3x3), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


class Calls(TorchDispatchMode):
    """Counts the calls of the operator."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is weight_gradient.OPERATOR
        return function(*arguments, **(options or {}))


@pytest.mark.slow
def test_a_compiled_network_uses_it_with_any_number_of_stages(monkeypatch):
    monkeypatch.setattr(weight_gradient, "SLOW", True)
    net = SAPNet(recurrent_iter=2).to(memory_format=torch.channels_last)
    rainy = torch.rand(1, 3, 8, 9).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(net, backend="aot_eager")
    for stages in (1, 2):
        gradients = []
        for run in (net, compiled):
            with Calls() as calls:
                gradients.append(torch.autograd.grad(run(rainy, recurrent_iter=stages).sum(), list(net.parameters())))
            assert calls.count == 11 * stages
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
def test_a_network_that_is_not_in_training_can_be_traced(monkeypatch):
    monkeypatch.setattr(weight_gradient, "SLOW", True)
    net = SAPNet(recurrent_iter=1).to(memory_format=torch.channels_last).eval()
    rainy = torch.rand(1, 3, 8, 9).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.jit.trace(net, rainy)(rainy), net(rainy))


def test_torch_compile_can_rely_on_the_operators_description():
    images, gradient = channels_last(2, 4, 9, 8), channels_last(2, 3, 9, 8)
    torch.library.opcheck(weight_gradient.OPERATOR, (images, gradient, 2))


def test_the_file_can_be_imported_again_under_another_name_and_forgotten(ours):
    def again():
        spec = importlib.util.spec_from_file_location("another_name", weight_gradient.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.OPERATOR(images, gradient, 1).shape == (3, 4, 3, 3)

    images, gradient = channels_last(1, 4, 9, 8), channels_last(1, 3, 9, 8)
    again()
    gc.collect()
    conv3x3(images, torch.randn(3, 4, 3, 3, requires_grad=True), torch.zeros(3)).sum().backward()
    assert len(ours) == 1
