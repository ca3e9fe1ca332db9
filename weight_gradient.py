"""The weight gradient of a 3x3 convolution, for processors on which PyTorch's own takes most of a training step.

    python -c "import weight_gradient; print('used here:', weight_gradient.SLOW)"

On x86 processors with AVX2 and without AVX-512, oneDNN, which computes PyTorch's convolutions there, takes three to
four times as long for the weight gradient of channels-last maps as for the convolution itself. Here it is a product of
matrices, which takes about as long as the convolution.
"""
import torch
import torch.nn.functional as F

SLOW = torch.backends.cpu.get_cpu_capability() == "AVX2"
PIXELS = 1024  # as many as a core multiplies at a time: their matrix stays in its cache


def weight_gradient(images, gradient, dilation):
    """The gradient of the weights of ``conv3x3``.

    Args:
        images: (N, C, H, W) float32, what the convolution was given.
        gradient: (N, K, H, W) float32, that of what it returned.
        dilation: of the kernel.

    Returns:
        (K, C, 3, 3) float32.
    """
    (count, channels, height, width), kernels = images.shape, gradient.shape[1]
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, dilation, dilation, dilation, dilation)).contiguous()
    gradient = gradient.permute(0, 2, 3, 1).reshape(count, height * width, kernels)
    # taps[n, y, x, ky, kx] is what the tap (ky, kx) sees in image n for the output at (x, y).
    of_image, of_row, of_pixel, of_channel = padded.stride()
    strides = of_image, of_row, of_pixel, dilation * of_row, dilation * of_pixel, of_channel
    taps = padded.as_strided((count, height, width, 3, 3, channels), strides)
    rows, group = max(1, PIXELS // width), min(count, torch.get_num_threads())  # a core has an image to itself
    buffer = images.new_empty(group, rows * width, 9 * channels)
    totals = images.new_zeros(group, 9 * channels, kernels)
    for first in range(0, count, group):
        for top in range(0, height, rows):
            seen = taps[first : first + group, top : top + rows]
            right = gradient[first : first + group, top * width : (top + rows) * width]
            left = buffer[: len(seen), : right.shape[1]]
            left.view(seen.shape).copy_(seen)
            totals[: len(seen)].baddbmm_(left.mT, right)
    return totals.sum(0).view(3, 3, channels, kernels).permute(3, 2, 0, 1).contiguous()


def operator():
    """``weight_gradient`` as an operator of PyTorch, which ``torch.compile`` calls and does not look into.

    A process has one, as this file may be imported under several names (``hubconf.py``), and an operator that was
    defined again would be lost to those who hold the first.
    """
    name = "sapnet::weight_gradient"
    if not hasattr(torch.ops.sapnet, "weight_gradient"):
        torch.library.define(name, "(Tensor images, Tensor gradient, int dilation) -> Tensor")
        torch.library.impl(name, "CPU", weight_gradient)
        torch.library.register_fake(
            name, lambda images, gradient, dilation: images.new_empty(gradient.shape[1], images.shape[1], 3, 3)
        )
    return torch.ops.sapnet.weight_gradient.default


OPERATOR = operator()


class Convolution(torch.autograd.Function):
    """``conv3x3`` with ``weight_gradient`` behind it."""

    @staticmethod
    def forward(images, weight, bias, dilation):
        return F.conv2d(images, weight, bias, padding=dilation, dilation=dilation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        images, weight, _, ctx.dilation = inputs
        ctx.save_for_backward(images, weight)

    @staticmethod
    def backward(ctx, gradient):
        images, weight = ctx.saved_tensors
        around, wanted = [ctx.dilation, ctx.dilation], list(ctx.needs_input_grad[:3])
        # Those who want to differentiate once more (create_graph=True) need PyTorch's own gradient, which has one.
        ours = wanted[1] and not torch.is_grad_enabled()
        of_images, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient, images, weight, [len(weight)], [1, 1], around, around, False, [0, 0], 1,
            [wanted[0], False, False] if ours else wanted,
        )
        if ours:
            of_weight = OPERATOR(images, gradient, ctx.dilation)
            of_bias = gradient.sum((0, 2, 3)) if wanted[2] else None
        return of_images, of_weight, of_bias, None


def conv3x3(images, weight, bias, dilation=1):
    """A 3x3 convolution of stride 1, padded to keep the size.

    Args:
        images: (N, C, H, W), any floating type and device.
        weight, bias: (K, C, 3, 3) and (K,).
        dilation: of the kernel.

    Returns:
        (N, K, H, W).
    """
    if (
        SLOW and torch.is_grad_enabled() and weight.requires_grad and images.device.type == "cpu"
        and images.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        and images.is_contiguous(memory_format=torch.channels_last)
    ):
        return Convolution.apply(images, weight, bias, dilation)
    return F.conv2d(images, weight, bias, padding=dilation, dilation=dilation)
