"""Muon, the optimizer of ``train.py --optimizer muon``.

    python train.py --optimizer muon --data_path datasets/train/RainTrainH --save_path logs/Muon

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the length of its steps is that
of Liu et al., arXiv 2502.16982.
"""
import math

import torch

COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # Jordan's, of the Newton-Schulz iteration
ADAM_BETAS, ADAM_EPSILON = (0.9, 0.999), 1e-8


def orthogonalise(matrices):
    """(B, M, N), M <= N -> the same shape: each matrix U S V' becomes nearly U V', with singular values around 1."""
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def is_dense_kernel(parameter):
    """Whether a parameter is a kernel (O, I, K, K) of more than three channels on either side."""
    return parameter.ndim == 4 and min(parameter.shape[:2]) > 3


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum for dense convolution kernels, and Adam's for all else.

    A step changes a kernel's (O, I*K*K) matrix by the same amount in each direction that the gradient spans, and in all
    by about as much as Adam's would, so that Adam's learning rates fit. Biases, depthwise kernels, and convolutions
    with at most three channels on a side take Adam's steps.

    Args:
        parameters: of the network.
        lr: the learning rate.
        momentum: decay of the average of a kernel's gradients.
    """

    def __init__(self, parameters, lr, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            kernels = {}  # by shape, as those of one shape are orthogonalised together
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if is_dense_kernel(parameter):
                    kernels.setdefault(parameter.shape, []).append(parameter)
                else:
                    self.adam_step(parameter, group["lr"])
            for parameters in kernels.values():
                self.orthogonal_step(parameters, group["lr"], group["momentum"])

    def orthogonal_step(self, parameters, lr, momentum):
        """Move kernels of one shape."""
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg"].lerp_(parameter.grad, 1 - momentum)
            updates.append(parameter.grad.lerp(state["exp_avg"], momentum).flatten(1))  # Nesterov's momentum
        updates = orthogonalise(torch.stack(updates))
        length = 0.2 * math.sqrt(max(updates.shape[1:]))  # the root mean square of Adam's updates
        for parameter, update in zip(parameters, updates):
            parameter.add_(update.view(parameter.shape), alpha=-length * lr)

    def adam_step(self, parameter, lr):
        """Move one parameter as ``torch.optim.Adam`` does."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        state["exp_avg"].lerp_(parameter.grad, 1 - ADAM_BETAS[0])
        state["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - ADAM_BETAS[1])
        first, second = (1 - beta ** state["step"].item() for beta in ADAM_BETAS)
        scale = (state["exp_avg_sq"] / second).sqrt_().add_(ADAM_EPSILON)
        parameter.addcdiv_(state["exp_avg"], scale, value=-lr / first)
