"""Run SAPNet on whole images of any size: the same result as ``SAPNet.forward``, faster and in bounded memory.

    python test.py --precision bf16 --test_data_path datasets/test/RainSample --output_path results/RainSample

derains the images of a folder with it.

``StripRunner`` computes what ``SAPNet.forward`` computes, apart from rounding, with these three changes:

1. Each layer runs over the image in horizontal strips that are small enough to stay in the CPU's cache, one at a time
   on each core. Its results go to feature maps that are allocated once and used by all stages.
2. CRA's gate depends on the mean of a convolution's output over the whole image. This mean follows from a few sums
   over the convolution's input (``window_sums``), so the gate is known before the convolution runs. It is multiplied
   into the convolution's weights and costs nothing per pixel.
3. The depthwise-separable and the split convolution are run as the dense convolution that they are equal to
   (``dense_kernel``).
"""
import copy
import math
import sys
import threading
from contextlib import ContextDecorator, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from networks import CHANNELS, DILATIONS, GATES, SeparableConv, SplitConv
from strips import MARGIN, SMALLEST_STRIP, ColumnSums, FeatureMap, column_sums, for_each, in_one_thread, strip_pixels
from utils import RunError, memory_is_full


# Images and tensors


def to_tensor(image):
    """Turn an image into a network's input.

    Args:
        image: (H, W, 3) uint8 or uint16 array.

    Returns:
        (1, 3, H, W) float32 tensor in [0, 1], on the CPU.
    """
    peak = np.iinfo(image.dtype).max
    scaled = image.astype(np.float32) / peak
    return torch.from_numpy(scaled.transpose(2, 0, 1).copy())[None]


def to_image(tensor, dtype=np.uint8):
    """Turn a network's output into an image.

    Args:
        tensor: (1, 3, H, W), any floating dtype, on any device. What lies outside [0, 1] is clamped.
        dtype: np.uint8 or np.uint16.

    Returns:
        (H, W, 3) array of ``dtype``; each value is rounded to the nearest level.

    Raises:
        RunError: the tensor has NaN or infinite values, which have no place in an image.
    """
    if not tensor.isfinite().all():
        raise RunError("the network's output is not finite; expected sound weights, or --precision fp32")
    image = tensor[0].detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return np.rint(image * np.iinfo(dtype).max).astype(dtype)


def derain_array(runner, image, device="cpu"):
    """Derain an image that is an array.

    Args:
        runner: a ``StripRunner``, or a function like it.
        image: (H, W, 3) RGB uint8 or uint16, any size.
        device: of the network.

    Returns:
        (1, 3, H, W) float32, about [0, 1]. Of an image without colour, in which each pixel has three equal values, it
        has the mean of the channels in all three, as the network would give it faint colours.
    """
    derained = runner(to_tensor(image).to(device))
    if (image == image[..., :1]).all():
        return derained.mean(1, keepdim=True).expand_as(derained)
    return derained


# What the layers compute


def widest(device):
    """The widest floating type of a device: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def window_sums(features, columns, dilation):
    """Sum of the input values that each of the nine taps of a zero-padded 3x3 convolution is multiplied with.

    The sum of the convolution's output over the image is the sum over taps and channels of weight times this, and
    the bias for each pixel. So the mean of the output is known without running the convolution.

    Args:
        features: the ``FeatureMap`` that is convolved, C channels.
        columns: (W, C) its ``column_sums`` over the whole height.
        dilation: of the convolution; its padding is the same.

    Returns:
        (3, 3, C), ``widest`` type: for each tap (row, column of the kernel), its sum over all pixels of the output.
    """
    reach = min(dilation, features.height)
    top = column_sums(features.rows(0, reach))
    bottom = column_sums(features.rows(features.height - reach, features.height))
    # A tap of the kernel's upper row never meets the image's last rows, one of its lower row never the first;
    # likewise left and right.
    seen = torch.stack((columns - bottom, columns, columns - top)).to(widest(columns.device))
    total = seen.sum(1)
    return torch.stack((total - seen[:, -dilation:].sum(1), total, total - seen[:, :dilation].sum(1)), 1)


def dense_kernel(conv):
    """The dense 3x3 convolution that gives the same output as ``conv``, one of ``networks.RESIDUAL_CONVS``.

    Returns:
        (weight, bias): (O, I, 3, 3) and (O,).
    """
    if isinstance(conv, SeparableConv):
        point = conv.point_conv.weight
        weight = point * conv.depth_conv.weight.transpose(0, 1)
        return weight, point[..., 0, 0] @ conv.depth_conv.bias + conv.point_conv.bias
    if isinstance(conv, SplitConv):
        first, second = conv.custom_conv1, conv.custom_conv2
        outputs, inputs = first.weight.shape[:2]
        weight = first.weight.new_zeros(2 * outputs, 2 * inputs, 3, 3)
        weight[:outputs, :inputs], weight[outputs:, inputs:] = first.weight, second.weight
        return weight, torch.cat((first.bias, second.bias))
    return conv.weight, conv.bias


def dilated_conv(rows, weight, bias, dilation):
    """3x3 convolution of a strip, zero-padded on the left and right but not above and below.

    In bfloat16 on a CPU, oneDNN takes up to six times as long where wide rows have a dilation. There, the strip is
    regrouped so that the convolution is not dilated from row to row: each group of ``dilation`` neighbouring rows is
    taken as one long row. What was ``dilation`` rows below a pixel is then one long row below it. Only the pixels
    near the left and right edge come out wrong, because they see the end of a neighbouring row instead of padding;
    they are computed again.

    Args:
        rows: (1, C, R + 2 * dilation, W), channels-last.
        weight, bias: (O, C, 3, 3) and (O,).

    Returns:
        (1, O, R, W), channels-last.
    """
    height, width = rows.shape[2:]
    slow = dilation > 1 and dilation * width >= 2**13 and rows.dtype == torch.bfloat16 and rows.device.type == "cpu"
    if not slow or height % dilation:
        return F.conv2d(rows, weight, bias, padding=(0, dilation), dilation=dilation)

    def regroup(features, height):
        return features.permute(0, 2, 3, 1).view(1, height, -1, features.shape[1]).permute(0, 3, 1, 2)

    long = F.conv2d(regroup(rows, height // dilation), weight, bias, padding=(0, dilation), dilation=(1, dilation))
    output = regroup(long, height - 2 * dilation)
    edges = torch.cat((rows[..., : 2 * dilation], rows[..., -2 * dilation :]))
    left, right = F.conv2d(edges, weight, bias, padding=(0, dilation), dilation=dilation)
    output[..., :dilation], output[..., -dilation:] = left[..., :dilation], right[..., dilation:]
    return output


def relu(features, out):
    """Write ReLU(features) to ``out``: a tensor of any dtype, or ``features`` itself. NaN stays NaN."""
    torch.clamp_min(features.to(out.dtype), 0, out=out)


def tanh_of_half_(features):
    """tanh(features / 2), in place.

    It is computed as 2 * sigmoid(features) - 1: on a CPU, PyTorch's sigmoid is six times as fast as its tanh. The
    absolute error is up to 2e-7, also where the result is close to zero.
    """
    return features.sigmoid_().mul_(2).sub_(1)


class FullFloat32(ContextDecorator):
    """While this is open, CUDA computes float32 convolutions and matrix products in float32, never in TF32.

    TF32 keeps ten bits of each factor, which would show in the third digit of the output. Nor does cuDNN try out its
    kernels, as training lets it: each size of image would begin with that. The settings are those of the whole
    process, and change nothing on a CPU. The first thread that opens this makes them, the last one that leaves
    restores what was there.
    """

    lock, users, before = threading.Lock(), 0, None
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul

    def __enter__(self):
        with self.lock:
            if FullFloat32.users == 0:
                precisions = [setting.fp32_precision for setting in self.settings]
                FullFloat32.before = torch.backends.cudnn.benchmark, precisions
                torch.backends.cudnn.benchmark = False
                for setting in self.settings:
                    setting.fp32_precision = "ieee"
            FullFloat32.users += 1

    def __exit__(self, *_):
        with self.lock:
            FullFloat32.users -= 1
            if FullFloat32.users == 0:
                torch.backends.cudnn.benchmark, precisions = FullFloat32.before
                for setting, precision in zip(self.settings, precisions):
                    setting.fp32_precision = precision


def exact_types(device):
    """A context in which layers compute in the types of their tensors, also within a program's ``torch.autocast``."""
    known = torch.amp.is_autocast_available(device.type)  # not for "meta"
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


# The network


class GatedConv:
    """One 3x3 convolution of a residual branch with the CRA that follows it, as one convolution.

    CRA multiplies each channel of the convolution's output by a gate. The same output comes from a convolution whose
    weights and bias are multiplied by the gates, which depend on the image.

    Args:
        conv: one of ``networks.RESIDUAL_CONVS``.
        cra: a ``networks.CRA``, or None for a branch without.
        dilation: of ``conv``.
    """

    def __init__(self, conv, cra, dilation):
        self.weight, self.bias = dense_kernel(conv)
        self.cra, self.dilation = cra, dilation

    def fold(self, features, columns, dtype):
        """Weight and bias for one image, the gates multiplied in.

        Args:
            features, columns: the convolution's input, a ``FeatureMap``, and its ``column_sums``.
            dtype: of the result.

        Returns:
            (weight, bias): (O, I, 3, 3), channels-last, and (O,).
        """
        weight, bias = self.weight, self.bias
        if self.cra is not None:
            sums = window_sums(features, columns, self.dilation)
            pixels = features.height * len(columns)
            mean = torch.einsum("oikl,kli->o", weight.to(sums.dtype), sums) / pixels + bias
            gate = self.cra.gate(mean.to(weight.dtype)[None, :, None, None]).flatten()
            weight, bias = weight * gate[:, None, None, None], bias * gate
        return weight.to(dtype, memory_format=torch.channels_last), bias.to(dtype)


class Cast(nn.Module):
    """A module that computes in float32, as the image is, within a network of another ``dtype``."""

    def __init__(self, module, dtype):
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, x):
        return self.module(x.float()).to(self.dtype)


def half_network(net, dtype):
    """A copy of a ``SAPNet`` in ``dtype``, whose first and last convolution keep the image in float32."""
    half = copy.deepcopy(net).to(dtype, memory_format=torch.channels_last)
    half.conv0 = Cast(copy.deepcopy(net.conv0), dtype)
    half.conv = Cast(copy.deepcopy(net.conv), torch.float32)
    return half


def runs_whole(image):
    """Whether ``StripRunner`` runs the plain network on this image and not strips.

    It does so on a GPU for images of up to 2^20 pixels. There, a layer takes less time than it takes to start its
    kernels, and strips need three times as many kernels.
    """
    return image.device.type != "cpu" and image.shape[2] * image.shape[3] <= 2**20


class StripRunner:
    """A ``SAPNet`` prepared for inference in one precision; call it with an image.

    The weights are those that ``net`` has now: train on, and a new runner is needed.

    Args:
        net: a ``SAPNet``, any variant, on any device.
        dtype: torch.float32, bfloat16 or float16, of the feature maps and of the convolutions between them. The
            images are float32 in any case, and so is the LSTM's cell in strips. So are the convolutions between
            float16 maps on a CPU, which are faster than those in float16 and have half the error. float32 is not
            TF32, also on a GPU.
        max_memory: bytes. On a CPU, the feature maps of an image that needs more (``memory``) are mapped to a
            temporary file, in the folder that TMPDIR names. The result is the same, at the speed of the disk. An
            image whose feature maps are too large for a GPU is derained on the CPU, within the same limit.
    """

    @torch.inference_mode()
    def __init__(self, net, dtype=torch.float32, max_memory=math.inf):
        self.net, self.dtype, self.max_memory = net, dtype, max_memory
        on_cpu = net.conv[0].weight.device.type == "cpu"
        self.whole = net if dtype == torch.float32 else half_network(net, dtype)
        self.host = None  # a runner on the CPU, once an image needs it
        self.conv_dtype = torch.float32 if on_cpu and dtype == torch.float16 else dtype
        with exact_types(net.conv[0].weight.device):
            self.branches = [self.gated_convs(k) for k in range(1, len(DILATIONS) + 1)]
        # Four convolutions of 32 channels and not one of 128 as in SAPNet: each result is contiguous, which halves the
        # time of the sigmoids.
        self.gates = {gate: self.cast(getattr(net, f"conv_{gate}")[0]) for gate in GATES}
        # tanh_of_half_ takes twice the tanh's argument. Doubling a number is exact.
        self.gates["g"] = tuple(2 * parameter for parameter in self.gates["g"])
        self.conv0 = net.conv0[0].weight, net.conv0[0].bias
        self.conv = net.conv[0].weight, net.conv[0].bias

    def gated_convs(self, k):
        """The two ``GatedConv`` of the residual block of number ``k``, from 1 on."""
        branch, dilation = getattr(self.net, f"res_conv{k}"), self.net.dilations[k - 1]
        step = len(branch) // 2
        return [
            GatedConv(branch[start], branch[start + 1] if step == 3 else None, dilation) for start in (0, step)
        ]

    def cast(self, conv):
        """(weight, bias) of a convolution in the precision of the convolutions."""
        dtype = self.conv_dtype
        return conv.weight.to(dtype, memory_format=torch.channels_last), conv.bias.to(dtype)

    def memory(self, height, width):
        """Bytes of the feature maps of an image of this size.

        The strips, 5 to 50 MB for each core, and the image come on top.
        """
        pixels = (height + 2 * MARGIN) * width
        return pixels * (3 * CHANNELS * self.dtype.itemsize + (CHANNELS + 9) * 4)

    @torch.inference_mode()
    @FullFloat32()
    def __call__(self, rainy):
        """Derain images of one size.

        Args:
            rainy: (N, 3, H, W) float32 in [0, 1]. Several at a time are faster on a GPU (``images_at_once``).

        Returns:
            (N, 3, H, W) float32, not clamped. Where a NaN arises on the way, NaN is in the output too, in any dtype.

        Raises:
            ValueError: another shape or type; on a CPU also values of another range, such as 0 to 255.
            RunError: the temporary file of an image that needs more than ``max_memory`` finds no room.
            RuntimeError: several images need more memory than the GPU has; give fewer (``images_at_once``).
        """
        if rainy.dim() != 4 or rainy.shape[1] != 3 or rainy.dtype != torch.float32:
            found = f"{rainy.dtype} of shape {tuple(rainy.shape)}"
            raise ValueError(f"StripRunner expects RGB images as (N, 3, H, W) float32 in [0, 1], got {found}")
        # Looking at the values would make a GPU wait. What other programs compute may be a little outside [0, 1].
        if rainy.device.type == "cpu" and (-math.inf < rainy.amin() < -1 or 2 < rainy.amax() < math.inf):
            found = f"{rainy.amin():g} to {rainy.amax():g}"
            raise ValueError(f"StripRunner expects RGB images with values in [0, 1], got {found}")
        with exact_types(rainy.device):
            return self.run_images(rainy)

    def run_images(self, rainy):
        """Run images of one size: whole where that is faster, otherwise one by one in strips."""
        if runs_whole(rainy):
            try:
                return self.run_whole(rainy)
            except RuntimeError as error:  # one image goes on in strips, which need less; of several the caller decides
                if len(rainy) > 1 or not memory_is_full(error):
                    raise
        return self.run_one(rainy) if len(rainy) == 1 else torch.cat([self.run_one(image) for image in rainy.split(1)])

    def images_at_once(self, height, width):
        """How many images of this size a call should be given: on a GPU as many as have a million pixels, or one."""
        return 1 if self.conv[0].device.type == "cpu" else max(1, 2**20 // (height * width))

    def run_whole(self, rainy):
        """Run the plain network, in the precision of the runner."""
        return self.whole(rainy.contiguous(memory_format=torch.channels_last))

    def run_one(self, rainy):
        """Run one image in strips, on a GPU in smaller ones where its memory does not take the first."""
        pixels = strip_pixels(rainy.device, self.memory(*rainy.shape[2:]))
        if pixels is None:
            return self.run_strips(rainy, None)
        while pixels >= SMALLEST_STRIP:
            try:
                return self.run_strips(rainy, pixels)
            except RuntimeError as error:
                if not memory_is_full(error):
                    raise
            pixels //= 2
        size = f"{rainy.shape[3]}x{rainy.shape[2]}"
        print(f"{rainy.device} has no memory for an image of {size}; it is derained on the CPU", file=sys.stderr)
        if self.host is None:
            self.host = StripRunner(copy.deepcopy(self.net).cpu(), self.dtype)
        self.host.max_memory = self.max_memory
        return self.host(rainy.cpu()).to(rainy.device)

    def run_strips(self, rainy, pixels):
        """Run one image in strips of so many pixels; with None of as many as suit a CPU."""
        height, width = rainy.shape[2:]
        on_disk = rainy.device.type == "cpu" and self.memory(height, width) > self.max_memory

        def feature_map(channels, dtype, margin):
            made = FeatureMap(channels, height, width, dtype, rainy.device, on_disk, margin)
            made.strip_pixels = pixels
            return made

        images = feature_map(6, torch.float32, 2)  # the rainy image and the current estimate
        for channel in (0, 3):
            images.rows(0, height)[:, channel : channel + 3] = rainy
        hidden, features, scratch = (feature_map(CHANNELS, self.dtype, MARGIN) for _ in range(3))
        cell = feature_map(CHANNELS, torch.float32, 0)
        for stage in range(self.net.recurrent_iter):
            columns = self.lstm(images, hidden, cell, features, stage == 0)
            hidden, features = features, hidden
            source = hidden
            for first, second in self.branches:
                columns = self.convolve(first, source, columns, scratch)
                columns = self.convolve(second, scratch, columns, features, residual=source)
                source = features

            def estimate(start, stop, features=features):
                residual = F.conv2d(features.rows(start, stop, 1).float(), *self.conv, padding=(0, 1))
                torch.add(residual, rainy[:, :, start:stop], out=images.rows(start, stop)[:, 3:])

            for_each(estimate, features.strips(small=True), rainy.device)
        return images.rows(0, height)[:, 3:].contiguous()

    def lstm(self, images, hidden, cell, output, first_stage):
        """Run conv0 and the LSTM: update ``cell`` and write the new hidden state to ``output``.

        Args:
            images: ``FeatureMap`` of 6 channels, the rainy image and the current estimate.
            hidden, cell, output: ``FeatureMap`` of 32 channels; ``hidden`` and ``cell`` of the stage before.
            first_stage: whether there is no stage before; ``hidden`` and ``cell`` are then not read.

        Returns:
            (W, 32) the ``column_sums`` of ``output``.
        """

        columns = ColumnSums()

        def step(start, stop):
            f = self.gate_input(images, None if first_stage else hidden, start, stop)
            rows = output.rows(start, stop)
            rows.copy_(self.step_cell(f, cell.rows(start, stop), first_stage))
            columns.add(start, stop, rows)

        for_each(step, output.strips(small=True), output.data.device)
        return columns.total

    def gate_input(self, images, hidden, start, stop):
        """Input of the gates' convolutions for a strip, a row above and below included.

        Returns:
            (1, 64, stop - start + 2, W): conv0's features and the hidden state; without ``hidden`` only the first 32.
        """
        f = F.conv2d(images.rows(start, stop, 2), *self.conv0, padding=(0, 1)).relu_().to(self.conv_dtype)
        # The gates' convolutions are zero-padded, so rows outside the image are zero, not what conv0 gives there.
        if start == 0:
            f[:, :, 0] = 0
        if stop == images.height:
            f[:, :, -1] = 0
        return f if hidden is None else torch.cat((f, hidden.rows(start, stop, 1).to(f.dtype)), 1)

    def step_cell(self, f, cell, first_stage):
        """Update a strip of ``cell`` from the gates' input ``f`` and return the strip's new hidden state."""

        def gate(name):
            weight, bias = self.gates[name]
            # In float32 also for a half-precision map, whose sigmoid would be four times as slow.
            return F.conv2d(f, weight[:, : f.shape[1]], bias, padding=(0, 1)).float()

        update = tanh_of_half_(gate("g")).mul_(gate("i").sigmoid_())
        if first_stage:  # no hidden state, and nothing to forget
            cell.copy_(update)
        else:
            cell.mul_(gate("f").sigmoid_()).add_(update)
        return tanh_of_half_(2 * cell).mul_(gate("o").sigmoid_())

    def convolve(self, conv, source, columns, output, residual=None):
        """Write ReLU(conv(source)) to ``output``, or with a residual ReLU(ReLU(conv(source)) + residual).

        Args:
            conv: a ``GatedConv``.
            source, output: ``FeatureMap``, not the same one.
            columns: ``column_sums`` of ``source``.
            residual: ``FeatureMap``; it may be ``output``, which is then replaced.

        Returns:
            (W, 32) the ``column_sums`` of ``output``.
        """
        device = source.data.device
        weight, bias = in_one_thread(device, conv.fold, source, columns, self.conv_dtype)
        sums = ColumnSums()

        def run(start, stop):
            seen = source.rows(start, stop, conv.dilation).to(weight.dtype)
            v = dilated_conv(seen, weight, bias, conv.dilation)
            rows = output.rows(start, stop)
            if residual is None:
                relu(v, out=rows)
            else:
                relu(v, out=v)
                total = rows if rows.dtype == v.dtype else v
                torch.add(v, residual.rows(start, stop).to(v.dtype), out=total)
                # Only the first residual, the hidden state, has negative values. The later ones are results of this
                # function, which the output replaces, and need no further ReLU.
                if residual is not output:
                    relu(total, out=total)
                if total is v:
                    rows.copy_(v)
            sums.add(start, stop, rows)

        for_each(run, source.strips(), device)
        return sums.total
