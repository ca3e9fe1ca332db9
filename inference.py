"""Run SAPNet on whole images of any size: the same result as ``SAPNet.forward``, faster and in bounded memory.

    python test.py --precision bf16 --test_data_path datasets/test/RainSample --output_path results/RainSample

test.py runs it on the images of a folder.

Three facts make it lean, and none changes the result beyond rounding:

1. Each layer runs over horizontal strips that stay in the cache and writes into four feature maps that all
   stages share, so a stage allocates nothing of the image's size.
2. CRA's gate depends on the mean of a convolution over the whole image, and that mean follows from a few sums
   over the convolution's input (``window_sums``). It is known before the convolution runs, so the gate is
   multiplied into the weights and costs nothing per pixel.
3. The depthwise-separable and the split convolution are dense convolutions with structured weights.
"""
import math
import mmap
import tempfile
from contextlib import suppress

import torch
import torch.nn.functional as F

from networks import CHANNELS, DILATIONS, GATES, SeparableConv, SplitConv
from utils import RunError, reserve

MARGIN = max(DILATIONS)


def strip_rows(width, device, lean=False):
    """Rows of a strip of an image of this width.

    Enough pixels to fill a GPU. On a CPU few pixels, which stay in the cache, and many rows, which share a halo: the
    best of what was tried at the widths 481, 1920 and 4288 had 48, 16 and 16 rows; 32 instead of the 48 take 2 to 5 %
    longer and a tenth less memory. A multiple of all dilations.

    ``lean``: fewer, for a layer that needs much memory a pixel and no more than two rows beyond the strip. At 321x481,
    the LSTM in strips of 8 rows is as fast as in 32 and saves 60 bytes for each pixel of the image.
    """
    if device.type != "cpu":
        return max(1, 2**22 // width)
    return max(4, round(2**12 / width)) if lean else MARGIN * max(1, round(2**10 / width))


def runs_whole(image, dtype):
    """Whether to run the plain network, not strips: on a GPU, which small images occupy for less time than it takes to
    start the kernels, of which the strips have three times as many. Not in bfloat16, which would round the image."""
    return image.device.type != "cpu" and image.shape[2] * image.shape[3] <= 2**20 and dtype != torch.bfloat16


class FeatureMap:
    """(1, C, H, W) channels-last features between rows of zeros, which are the padding of every convolution.

    A strip's rows are contiguous in memory, so that no operation on a strip copies it.
    """

    def __init__(self, channels, height, width, dtype, device, on_disk=False, margin=MARGIN):
        shape = (1, height + 2 * margin, width, channels)
        size = math.prod(shape) * dtype.itemsize
        if on_disk:
            # The file has no name left once it is mapped, so it goes with the process, however that ends.
            with tempfile.NamedTemporaryFile() as file:
                try:
                    reserve(file, size)
                except OSError as error:
                    raise RunError(
                        f"{file.name}: no room for a feature map of {width}x{height} ({error.strerror}); expected a"
                        " larger --max_memory, or TMPDIR to name a folder with room"
                    ) from None
                flat = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype)
        elif torch.device(device).type == "cpu":
            memory = mmap.mmap(-1, size)
            with suppress(AttributeError, OSError):  # Linux: pages of 2 MiB; large images take 15 % less time
                memory.madvise(mmap.MADV_HUGEPAGE)
            flat = torch.frombuffer(memory, dtype=dtype)
        else:
            flat = torch.empty(math.prod(shape), dtype=dtype, device=device)
        self.data = flat.view(shape).permute(0, 3, 1, 2)
        self.height, self.margin = height, margin
        self.data[:, :, :margin] = self.data[:, :, margin + height :] = 0

    def rows(self, start, stop, halo=0):
        """View of the rows [start - halo, stop + halo)."""
        return self.data[:, :, self.margin + start - halo : self.margin + stop + halo]

    def strips(self, lean=False):
        """(start, stop) of the horizontal strips, of ``strip_rows`` each."""
        step = strip_rows(self.data.shape[3], self.data.device, lean)
        return [(start, min(start + step, self.height)) for start in range(0, self.height, step)]


def column_sums(rows):
    """(1, C, R, W) -> (W, C) float32: the sum over the rows."""
    _, channels, height, width = rows.shape
    # On this flat view the sum is ten times as fast as over the rows' own dimension. A sum in bfloat16 is accumulated
    # in float32 and rounded once, at its end; asking for float32 would convert all rows first, which takes five times
    # as long.
    flat = rows.permute(0, 2, 3, 1).reshape(height, width * channels)
    dtype = torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float32
    return flat.sum(0, dtype=dtype).float().view(width, channels)


def window_sums(features, columns, dilation):
    """What the nine taps of a zero-padded 3x3 convolution see of its input, summed over the image.

    Args:
        features: the ``FeatureMap`` that is convolved.
        columns: its ``column_sums`` over the whole height.
        dilation: of the convolution.

    Returns:
        (3, 3, C) float64: the sum of the input under each tap, over all positions of the output.
    """
    reach = min(dilation, features.height)
    top = column_sums(features.rows(0, reach))
    bottom = column_sums(features.rows(features.height - reach, features.height))
    # The upper taps never see the last rows, the lower taps never the first; likewise left and right.
    seen = torch.stack((columns - bottom, columns, columns - top)).double()
    total = seen.sum(1)
    return torch.stack((total - seen[:, -dilation:].sum(1), total, total - seen[:, :dilation].sum(1)), 1)


def dense_kernel(conv):
    """(weight, bias) of the dense 3x3 convolution that equals ``conv``, one of ``networks.RESIDUAL_CONVS``."""
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
    """3x3 convolution (1, C, R + 2 * dilation, W) -> (1, O, R, W), zero-padded on the left and on the right.

    Where rows are wide, oneDNN takes up to six times as long in bfloat16 for taps that are many rows apart. There, the
    first ``dilation`` rows are taken as one long row, the next as the one below it, and so on: the taps are then one
    row apart. Only at the edges, which saw the end of another row, is the result computed again.
    """
    height, width = rows.shape[2:]
    wide = dilation > 1 and dilation * width >= 2**13 and rows.dtype == torch.bfloat16 and rows.device.type == "cpu"
    if not wide or height % dilation:
        return F.conv2d(rows, weight, bias, padding=(0, dilation), dilation=dilation)

    def reshape(features, height):
        return features.permute(0, 2, 3, 1).view(1, height, -1, features.shape[1]).permute(0, 3, 1, 2)

    long = F.conv2d(reshape(rows, height // dilation), weight, bias, padding=(0, dilation), dilation=(1, dilation))
    output = reshape(long, height - 2 * dilation)
    edges = torch.cat((rows[..., : 2 * dilation], rows[..., -2 * dilation :]))
    left, right = F.conv2d(edges, weight, bias, padding=(0, dilation), dilation=dilation)
    output[..., :dilation], output[..., -dilation:] = left[..., :dilation], right[..., dilation:]
    return output


def relu(features, out):
    """ReLU, of 16-bit numbers as of integers, which have the same sign bit and take a quarter of the time."""
    features = features.to(out.dtype)
    if features.dtype.itemsize == 2:
        features, out = features.view(torch.int16), out.view(torch.int16)
    torch.clamp_min(features, 0, out=out)


def tanh_of_half_(features):
    """tanh(features / 2) in place, as 2 sigmoid(features) - 1: on a CPU, PyTorch's sigmoid is six times as fast as its
    tanh. The error is absolute, not relative: 2e-7."""
    return features.sigmoid_().mul_(2).sub_(1)


class GatedConv:
    """The [3x3 convolution, CRA] of a residual branch as one convolution whose weights depend on the image."""

    def __init__(self, conv, cra, dilation):
        self.weight, self.bias = dense_kernel(conv)
        self.cra, self.dilation = cra, dilation

    def fold(self, features, columns, dtype):
        """(weight, bias) with CRA's gate for this input (a ``FeatureMap`` and its column sums) multiplied in."""
        weight, bias = self.weight, self.bias
        if self.cra is not None:
            sums = window_sums(features, columns, self.dilation)
            pixels = features.height * len(columns)
            mean = torch.einsum("oikl,kli->o", weight.double(), sums) / pixels + bias
            gate = self.cra.gate(mean.to(weight.dtype)[None, :, None, None]).flatten()
            weight, bias = weight * gate[:, None, None, None], bias * gate
        return weight.to(dtype, memory_format=torch.channels_last), bias.to(dtype)


class StripRunner:
    """SAPNet's weights prepared for inference in one precision.

    Args:
        net: a ``SAPNet``, any variant, on any device.
        dtype: of the feature maps and the convolutions between them; the images and the LSTM's cell stay float32,
            and so do the convolutions between float16 maps on a CPU: faster than float16's, with half the error.
        max_memory: bytes. Where an image needs more on the CPU, its feature maps are mapped to a temporary file
            (in the folder that TMPDIR names): the result is the same, at the speed of the disk.
    """

    @torch.inference_mode()
    def __init__(self, net, dtype=torch.float32, max_memory=math.inf):
        self.net, self.dtype, self.max_memory = net, dtype, max_memory
        on_cpu = net.conv[0].weight.device.type == "cpu"
        self.conv_dtype = torch.float32 if on_cpu and dtype == torch.float16 else dtype
        self.branches = []
        for k in range(1, len(DILATIONS) + 1):
            branch = getattr(net, f"res_conv{k}")
            step = len(branch) // 2
            self.branches.append(
                [
                    GatedConv(branch[start], branch[start + 1] if step == 3 else None, net.dilations[k - 1])
                    for start in (0, step)
                ]
            )
        # Four convolutions of 32 channels: their results are contiguous, which halves the time of the sigmoids.
        self.gates = {gate: self.cast(getattr(net, f"conv_{gate}")[0]) for gate in GATES}
        self.gates["g"] = tuple(2 * parameter for parameter in self.gates["g"])  # exact; what tanh_of_half_ takes
        self.conv0 = net.conv0[0].weight, net.conv0[0].bias
        self.conv = net.conv[0].weight, net.conv[0].bias

    def cast(self, conv):
        dtype = self.conv_dtype
        return conv.weight.to(dtype, memory_format=torch.channels_last), conv.bias.to(dtype)

    def memory(self, height, width):
        """Bytes that an image of this size takes, beside its strips and itself."""
        pixels = (height + 2 * MARGIN) * width
        return pixels * (3 * CHANNELS * self.dtype.itemsize + (CHANNELS + 9) * 4)

    @torch.inference_mode()
    def __call__(self, rainy):
        """Derain one image.

        Args:
            rainy: (1, 3, H, W) float32 in [0, 1].

        Returns:
            (1, 3, H, W) float32, not clamped.
        """
        if runs_whole(rainy, self.dtype):
            with torch.autocast(rainy.device.type, self.dtype, enabled=self.dtype != torch.float32):
                return self.net(rainy.contiguous(memory_format=torch.channels_last)).float()
        height, width = rainy.shape[2:]
        on_disk = rainy.device.type == "cpu" and self.memory(height, width) > self.max_memory

        def feature_map(channels, dtype, margin):
            return FeatureMap(channels, height, width, dtype, rainy.device, on_disk, margin)

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
            for start, stop in features.strips(lean=True):
                estimate = F.conv2d(features.rows(start, stop, 1).float(), *self.conv, padding=(0, 1))
                torch.add(estimate, rainy[:, :, start:stop], out=images.rows(start, stop)[:, 3:])
        return images.rows(0, height)[:, 3:].contiguous()

    def lstm(self, images, hidden, cell, output, first_stage):
        """conv0 and the LSTM: update ``cell``, write the new hidden state to ``output``, return its column sums."""
        columns = 0
        for start, stop in output.strips(lean=True):
            f = self.gate_input(images, None if first_stage else hidden, start, stop)
            rows = output.rows(start, stop)
            rows.copy_(self.step_cell(f, cell.rows(start, stop), first_stage))
            columns += column_sums(rows)
            del f  # else it lives until the next strip's is made
        return columns

    def gate_input(self, images, hidden, start, stop):
        """What the gates' convolutions of a strip see: conv0's features, and the hidden state if there is one."""
        f = F.conv2d(images.rows(start, stop, 2), *self.conv0, padding=(0, 1)).relu_().to(self.conv_dtype)
        # Rows of f outside the image are padding of the gates, not convolutions of padding.
        if start == 0:
            f[:, :, 0] = 0
        if stop == images.height:
            f[:, :, -1] = 0
        return f if hidden is None else torch.cat((f, hidden.rows(start, stop, 1).to(f.dtype)), 1)

    def step_cell(self, f, cell, first_stage):
        """Update a strip of the cell from the gates' input ``f``; return the new hidden state."""

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
        """ReLU(conv(source)), and with a residual ReLU of the sum with it, to ``output``; return its column sums."""
        weight, bias = conv.fold(source, columns, self.conv_dtype)
        dilation, columns = conv.dilation, 0
        for start, stop in source.strips():
            seen = source.rows(start, stop, dilation).to(weight.dtype)
            v = dilated_conv(seen, weight, bias, dilation)
            rows = output.rows(start, stop)
            if residual is None:
                relu(v, out=rows)
            else:
                relu(v, out=v)
                total = rows if rows.dtype == v.dtype else v
                torch.add(v, residual.rows(start, stop).to(v.dtype), out=total)
                if residual is not output:  # the hidden state; later residuals are sums of ReLUs
                    relu(total, out=total)
                if total is v:
                    rows.copy_(v)
            columns += column_sums(rows)
            del seen, v  # else they live until the next strip's are made
        return columns


def self_ensemble(runner):
    """A function like ``runner`` that returns its mean over the image, its mirror image, and both upside down.

    Not over quarter turns: a network that was trained on falling rain takes lying rain for texture.
    """
    flips = (), (2,), (3,), (2, 3)
    return lambda rainy: sum(runner(rainy.flip(dims)).flip(dims) for dims in flips) / len(flips)
