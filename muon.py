"""Muon, the optimizer of ``train.py --optimizer muon``, for the dense convolution kernels of a network.

    python train.py --optimizer muon --data_path datasets/test/RainSample --max_steps 20 --save_path logs/Muon \
--use_contrast False --use_lpips False --use_seg_stage1 False

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the length of its steps is that
of Liu et al., arXiv 2502.16982.
"""
import math

import torch

COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # Jordan's, of the Newton-Schulz iteration


def orthogonalise(matrices):
    """(B, M, N), M <= N -> the same shape: each matrix U S V' becomes nearly U V', with singular values around 1."""
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def is_dense_kernel(parameter):
    """Whether a parameter is a convolution's kernel (O, I, K, K) with more than three channels on both sides."""
    return parameter.ndim == 4 and min(parameter.shape[:2]) > 3


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum of convolution kernels (O, I, K, K) with O <= I * K * K.

    A step changes a kernel's (O, I*K*K) matrix by the same amount in each direction that the gradient spans, and in all
    by about as much as Adam's would, so that Adam's learning rates fit. All other parameters are for Adam;
    ``build_optimizers`` divides them.

    Args:
        kernels: the parameters.
        lr: the learning rate.
        momentum: decay of the average of a kernel's gradients.
        weight_decay: before each step, a kernel is multiplied by 1 - lr * weight_decay.
    """

    def __init__(self, kernels, lr, momentum=0.95, weight_decay=0):
        super().__init__(kernels, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        """Move the kernels; those of one shape are orthogonalised together."""
        for group in self.param_groups:
            shapes = {}
            for kernel in group["params"]:
                if kernel.grad is not None:
                    shapes.setdefault(kernel.shape, []).append(kernel)
            for shape, kernels in shapes.items():
                gradients = [kernel.grad for kernel in kernels]
                for kernel in kernels:
                    if not self.state[kernel]:
                        self.state[kernel]["exp_avg"] = torch.zeros_like(kernel)
                averages = [self.state[kernel]["exp_avg"] for kernel in kernels]
                torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
                updates = torch._foreach_lerp(gradients, averages, group["momentum"])  # Nesterov's momentum
                updates = orthogonalise(torch.stack(updates).flatten(2))
                if group["weight_decay"]:
                    torch._foreach_mul_(kernels, 1 - group["lr"] * group["weight_decay"])
                length = 0.2 * math.sqrt(max(updates.shape[1:]))  # the root mean square of Adam's updates
                torch._foreach_add_(kernels, list(updates.view(-1, *shape)), alpha=-length * group["lr"])


def build_optimizers(name, net, lr, weight_decay=0):
    """The optimizers of a network: "adam" for all of its parameters, or "muon" for its dense kernels and Adam beside.

    Args:
        name: "adam" or "muon".
        net: any network.
        lr: the learning rate.
        weight_decay: as for ``Muon``; Adam's parameters do not decay.

    Returns:
        A list, each of which is to step after every backward pass.
    """
    parameters = list(net.parameters())
    if name == "adam":
        return [torch.optim.Adam(parameters, lr=lr, fused=True)]
    kernels = [parameter for parameter in parameters if is_dense_kernel(parameter)]
    others = [parameter for parameter in parameters if not is_dense_kernel(parameter)]
    return [Muon(kernels, lr=lr, weight_decay=weight_decay), torch.optim.Adam(others, lr=lr, fused=True)]
