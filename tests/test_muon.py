"""Muon against torch's own optimizers."""
import torch

from muon import Muon, is_dense_kernel, orthogonalise
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


def test_a_kernels_steps_are_those_of_torchs_muon_on_its_matrix():
    torch.manual_seed(0)
    start, gradients = torch.randn(8, 4, 3, 3), [[torch.randn(8, 4, 3, 3)] for _ in range(4)]
    kernel = torch.nn.Parameter(start.clone(memory_format=torch.channels_last))
    matrix = torch.nn.Parameter(start.flatten(1).clone())
    take_steps(Muon([kernel], lr=0.01), [kernel], gradients)
    take_steps(
        torch.optim.Muon([matrix], lr=0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw"), [matrix], gradients
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


def test_all_else_takes_adams_steps():
    torch.manual_seed(0)
    shapes = (16,), (3, 32, 3, 3), (32, 1, 3, 3), (2, 32, 1, 1)
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(5)]
    results = []
    for optimizer in (Muon, torch.optim.Adam):
        parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        take_steps(optimizer(parameters, lr=0.01), parameters, gradients)
        results.append([parameter.detach() for parameter in parameters])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_the_dense_kernels_are_found_in_each_network():
    for kind in RESIDUAL_CONVS:
        for name, parameter in SAPNet(residual_conv=kind).named_parameters():
            adams = name.endswith("bias") or name == "conv.0.weight" or "conv_du" in name or "depth_conv" in name
            assert is_dense_kernel(parameter) != adams, name
