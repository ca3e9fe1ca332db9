"""Muon against torch's own optimizers."""
import pytest
import torch

from muon import Muon, build_optimizers, is_dense_kernel, orthogonalise
from networks import RESIDUAL_CONVS, SAPNet


def take_steps(optimizer, parameters, gradients):
    """Step through a list of gradients, each a list of one tensor a parameter."""
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.reshape(parameter.shape).clone()
        optimizer.step()


def test_orthogonalised_matrices_keep_their_directions_and_lose_their_scales():
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(3, size, 8)).Q for size in (8, 40))
    scales = torch.logspace(-2, 3, 8)
    result = orthogonalise(left * scales @ right.mT)
    inner = left.mT @ result @ right  # diagonal where the directions are kept
    values = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-3
    assert (values[:, 3:] > 0.6).all() and (values < 1.3).all(), values  # a thousandth of the largest is still raised
    assert (values[:, 0] > 20 * scales[0] / scales.norm()).all()


@pytest.mark.parametrize("weight_decay", [0, 3])
def test_a_kernels_steps_are_those_of_torchs_muon_on_its_matrix(weight_decay):
    torch.manual_seed(0)
    start, gradients = torch.randn(8, 4, 3, 3), [[torch.randn(8, 4, 3, 3)] for _ in range(4)]
    kernel = torch.nn.Parameter(start.clone(memory_format=torch.channels_last))
    matrix = torch.nn.Parameter(start.flatten(1).clone())
    take_steps(Muon([kernel], lr=0.01, weight_decay=weight_decay), [kernel], gradients)
    take_steps(
        torch.optim.Muon([matrix], lr=0.01, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"), [matrix],
        gradients,
    )
    moved, expected = kernel.detach().flatten(1) - start.flatten(1), matrix.detach() - start.flatten(1)
    assert (moved - expected).norm() < 0.02 * expected.norm()  # torch orthogonalises in bfloat16
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_kernels_of_one_shape_do_not_mix():
    torch.manual_seed(0)
    gradients = [[torch.randn(8, 4, 3, 3), 100 * torch.randn(8, 4, 3, 3)] for _ in range(3)]
    together = [torch.nn.Parameter(torch.zeros(8, 4, 3, 3)) for _ in range(2)]
    take_steps(Muon(together, lr=0.01), together, gradients)
    for k, parameter in enumerate(together):
        alone = torch.nn.Parameter(torch.zeros(8, 4, 3, 3))
        take_steps(Muon([alone], lr=0.01), [alone], [step[k : k + 1] for step in gradients])
        torch.testing.assert_close(parameter, alone)


def train_on_noise(net, optimizers, steps=3):
    """Steps through gradients that are the same whatever the optimizers; the weights afterwards, by name."""
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=random)
        for optimizer in optimizers:
            optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("kind", RESIDUAL_CONVS)
def test_the_dense_kernels_take_muons_steps_and_all_else_takes_adams(kind):
    """Adam's are the biases, the last convolution, the bottleneck of CRA, and depthwise kernels."""
    results = {}
    for name in ("muon", "adam", "only muon"):
        torch.manual_seed(0)
        net = SAPNet(residual_conv=kind)
        optimizers = build_optimizers(name.split()[-1], net, 0.01)
        results[name] = train_on_noise(net, optimizers[:1] if name == "only muon" else optimizers)
    torch.manual_seed(0)
    net = SAPNet(residual_conv=kind)
    start = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    torch_adam = train_on_noise(net, [torch.optim.Adam(net.parameters(), lr=0.01, fused=True)])
    for name in start:
        of_adam = name.endswith("bias") or name == "conv.0.weight" or "conv_du" in name or "depth_conv" in name
        assert is_dense_kernel(net.get_parameter(name)) != of_adam, name
        assert torch.equal(results["adam"][name], torch_adam[name])
        assert torch.equal(results["muon"][name], torch_adam[name]) == of_adam, name
        assert torch.equal(results["only muon"][name], start[name]) == of_adam, name


def test_a_parameter_without_a_gradient_stays():
    kernels = [torch.nn.Parameter(torch.ones(8, 4, 3, 3)) for _ in range(2)]
    optimizer = Muon(kernels, lr=0.01)
    kernels[0].grad = torch.randn(8, 4, 3, 3)
    optimizer.step()
    assert not torch.equal(kernels[0], torch.ones(8, 4, 3, 3)) and torch.equal(kernels[1], torch.ones(8, 4, 3, 3))


def test_a_state_that_is_loaded_goes_on_to_the_bit():
    torch.manual_seed(0)
    gradients = [[torch.randn(8, 4, 3, 3)] for _ in range(4)]
    whole, cut = (torch.nn.Parameter(torch.ones(8, 4, 3, 3)) for _ in range(2))
    take_steps(Muon([whole], lr=0.01), [whole], gradients)
    first = Muon([cut], lr=0.01)
    take_steps(first, [cut], gradients[:2])
    second = Muon([cut], lr=0.01)
    second.load_state_dict(first.state_dict())
    take_steps(second, [cut], gradients[2:])
    assert torch.equal(cut, whole)
