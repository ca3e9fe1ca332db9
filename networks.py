"""SAPNet, the segmentation-aware progressive network for single-image deraining (arXiv 2111.08892).

    python -c "import torch; from networks import SAPNet; print(SAPNet()(torch.rand(1, 3, 64, 64)).shape)"

The state-dict names are those of the published SAPNet and PReNet checkpoints and must not change.
"""
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from utils import counted, printable
from weight_gradient import conv3x3

CHANNELS = 32
DILATIONS = (1, 2, 4, 8, 16)
GATES = ("i", "f", "g", "o")


class CRA(nn.Module):
    """Channel residual attention: a gate for each channel from the mean over the whole image.

    v * sigmoid(W2 ReLU(W1 p) + W3 p), p the spatial mean of v. Shapes: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, channels=CHANNELS, reduction=16):
        super().__init__()
        self.conv_du = nn.Sequential(
            nn.Conv2d(channels, channels // reduction, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels // reduction, channels, 1, bias=False),
        )
        self.conv_1_1 = nn.Conv2d(channels, channels, 1, bias=False)

    def gate(self, pooled):
        """(N, C, 1, 1) channel means -> (N, C, 1, 1) gates in (0, 1)."""
        return torch.sigmoid(self.conv_du(pooled) + self.conv_1_1(pooled))

    def forward(self, v):
        return v * self.gate(v.mean((2, 3), keepdim=True))


class SeparableConv(nn.Module):
    """Depthwise 3x3 convolution, then 1x1: the published 101,763-parameter variant."""

    def __init__(self, in_channels, out_channels, kernel_size, padding, dilation):
        super().__init__()
        self.depth_conv = nn.Conv2d(
            in_channels, in_channels, kernel_size, padding=padding, dilation=dilation, groups=in_channels
        )
        self.point_conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, v):
        return self.point_conv(self.depth_conv(v))


class SplitConv(nn.Module):
    """One convolution for each half of the channels: the published 134,403-parameter variant."""

    def __init__(self, in_channels, out_channels, kernel_size, padding, dilation):
        super().__init__()
        half_in, half_out = in_channels // 2, out_channels // 2
        self.custom_conv1 = nn.Conv2d(half_in, half_out, kernel_size, padding=padding, dilation=dilation)
        self.custom_conv2 = nn.Conv2d(half_in, half_out, kernel_size, padding=padding, dilation=dilation)

    def forward(self, v):
        first, second = v.chunk(2, dim=1)
        return torch.cat((self.custom_conv1(first), self.custom_conv2(second)), dim=1)


class PlainConv(nn.Conv2d):
    """PyTorch's convolution, which is trained by the faster of two ways to its weights' gradient (``conv3x3``)."""

    def _conv_forward(self, v, weight, bias):
        if self.training and self.padding == self.dilation and self.padding_mode == "zeros":
            return conv3x3(v, weight, bias, self.dilation[0])
        return super()._conv_forward(v, weight, bias)


RESIDUAL_CONVS = {"plain": PlainConv, "separable": SeparableConv, "split": SplitConv}


def residual_branch(dilation, residual_conv="plain", use_cra=True):
    """[3x3 convolution, CRA, ReLU] x 2; PReNet's branch is the same without CRA."""
    layers = []
    for _ in range(2):
        layers.append(RESIDUAL_CONVS[residual_conv](CHANNELS, CHANNELS, 3, padding=dilation, dilation=dilation))
        layers += [CRA(), nn.ReLU()] if use_cra else [nn.ReLU()]
    return nn.Sequential(*layers)


def mismatch(net, state):
    """Why a network does not take a state dict, as part of a sentence: what is missing, of another shape, or too much.

    Args:
        net: any network.
        state: {name: tensor}.
    """
    wanted, reasons = net.state_dict(), []
    missing = [name for name in wanted if name not in state]
    added = [name for name in state if name not in wanted]
    reshaped = [name for name in wanted if name in state and wanted[name].shape != state[name].shape]
    if missing:
        reasons.append(f"{len(missing)} of {counted(len(wanted), 'tensor')} missing, such as {missing[0]}")
    if reshaped:
        sizes = ("x".join(map(str, tensors[reshaped[0]].shape)) or "one number" for tensors in (state, wanted))
        reasons.append("{} is {} instead of {}".format(reshaped[0], *sizes))
    if added and not missing:
        reasons.append(f"{printable(added[0][:60])} is not one of its tensors")
    return " and ".join(reasons)


class SAPNet(nn.Module):
    """Progressive dilated units (PDU) with shared weights, joined by a convolutional LSTM (paper, section 3.1).

    Args:
        recurrent_iter: number of stages, each one pass through the PDU.
        use_dilation: dilation 1, 2, 4, 8, 16 in the five residual blocks; all 1 without.
        residual_conv: "plain", "separable" or "split", the 3x3 convolution of the residual blocks.
        use_cra: channel residual attention in the residual blocks. PReNet is
            ``SAPNet(use_dilation=False, use_cra=False)`` and its published weights load.
    """

    def __init__(self, recurrent_iter=6, use_dilation=True, residual_conv="plain", use_cra=True):
        super().__init__()
        self.recurrent_iter = recurrent_iter
        self.conv0 = nn.Sequential(nn.Conv2d(6, CHANNELS, 3, padding=1), nn.ReLU())
        self.dilations = DILATIONS if use_dilation else (1,) * len(DILATIONS)
        for k, dilation in enumerate(self.dilations, 1):
            setattr(self, f"res_conv{k}", residual_branch(dilation, residual_conv, use_cra))
        for gate in GATES:
            activation = nn.Tanh() if gate == "g" else nn.Sigmoid()
            setattr(self, f"conv_{gate}", nn.Sequential(nn.Conv2d(2 * CHANNELS, CHANNELS, 3, padding=1), activation))
        self.conv = nn.Sequential(nn.Conv2d(CHANNELS, 3, 3, padding=1))

    @classmethod
    def from_state_dict(cls, state, recurrent_iter=6, use_dilation=None):
        """The network that a state dict belongs to, with its weights, in float32 on the CPU.

        The names tell the residual convolution and PReNet's form. What they cannot tell are the number of
        stages and the dilation, whose default is that of the published networks: dilated, but PReNet not.

        Raises:
            ValueError: the names or shapes are of another architecture.
        """
        residual_conv = "plain"
        if "res_conv1.0.depth_conv.weight" in state:
            residual_conv = "separable"
        elif "res_conv1.0.custom_conv1.weight" in state:
            residual_conv = "split"
        use_cra = "res_conv1.1.conv_1_1.weight" in state
        # A program may have set another default, in which a half would round the weights and "meta" lose them.
        with torch.device("cpu"):
            net = cls(recurrent_iter, use_cra if use_dilation is None else use_dilation, residual_conv, use_cra).float()
        try:
            net.load_state_dict(state)
        except RuntimeError:
            raise ValueError(f"expected weights of SAPNet or PReNet ({mismatch(net, state)})") from None
        return net

    def forward(self, rainy, return_stages=False, recurrent_iter=None):
        """Derain a batch.

        Args:
            rainy: (N, 3, H, W) RGB in [0, 1], any floating dtype that matches the weights, any H, W >= 1.
            return_stages: also return the list of every stage's estimate.
            recurrent_iter: number of stages, 1 or more; that of the network by default.

        Returns:
            (N, 3, H, W) the last stage's estimate, not clamped; with ``return_stages`` a pair of it
            and the list of all stages' estimates, first stage first.
        """
        # The four gates read the same input: one 64 -> 128 convolution instead of four 64 -> 32.
        gates = [getattr(self, f"conv_{gate}")[0] for gate in GATES]
        weight = torch.cat([conv.weight for conv in gates])
        bias = torch.cat([conv.bias for conv in gates])
        # Other uses, such as tracing, want PyTorch's own.
        gate_conv = conv3x3 if self.training else partial(F.conv2d, padding=1)
        derained, stages = rainy, []
        h = c = None
        for _ in range(self.recurrent_iter if recurrent_iter is None else recurrent_iter):
            f = self.conv0(torch.cat((rainy, derained), 1))
            if h is None:  # h and c start at zero, so their terms drop out
                z = gate_conv(f, weight[:, :CHANNELS], bias)
            else:
                z = gate_conv(torch.cat((f, h), 1), weight, bias)
            i, forget, g, o = z.chunk(4, 1)
            update = torch.sigmoid(i) * torch.tanh(g)
            c = update if c is None else torch.sigmoid(forget) * c + update
            h = torch.sigmoid(o) * torch.tanh(c)
            u = h
            for k in range(1, len(DILATIONS) + 1):
                u = F.relu(getattr(self, f"res_conv{k}")(u) + u)
            derained = self.conv(u) + rainy
            stages.append(derained)
        return (derained, stages) if return_stages else derained


@contextmanager
def fixed_seed():
    """Draw initial weights that are the same in every run, and leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


class ImageNetNormalise(nn.Module):
    """RGB in [0, 1] -> the mean 0 and deviation 1 that torchvision's networks were trained on, (N, 3, H, W)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, images):
        return (images - self.mean) / self.std


SEG_BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


class UBS(nn.Module):
    """The unsupervised background segmentation network (paper, section 3): a ResNet, an FPN and a linear head.

    Its weights are drawn with a fixed seed, so that the layers that no file holds, FPN and head, are the same in
    every run; ``fpn.body`` has torchvision's names for a ResNet without ``fc`` and takes its ImageNet weights.

    Args:
        num_of_SegClass: number of logits.
        backbone: one of ``SEG_BACKBONES``.
    """

    def __init__(self, num_of_SegClass=21, backbone="resnet101"):
        # Imported here, as deraining does not need torchvision and would start seconds later.
        from torchvision.models import get_model
        from torchvision.models.detection.backbone_utils import BackboneWithFPN
        from torchvision.ops import FrozenBatchNorm2d

        super().__init__()
        self.normalise = ImageNetNormalise()
        with fixed_seed():
            # Zero residual branches: without weights from a file, a hundred random layers would saturate the logits.
            resnet = get_model(backbone, norm_layer=FrozenBatchNorm2d, zero_init_residual=True)
            channels = [resnet.inplanes // 8 * 2**k for k in range(4)]
            self.fpn = BackboneWithFPN(resnet, {f"layer{k + 1}": str(k) for k in range(4)}, channels, 256)
            self.head = nn.Conv2d(self.fpn.out_channels, num_of_SegClass, 1)
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)

    def forward(self, images):
        """Segment a batch.

        Args:
            images: (N, 3, H, W) RGB in [0, 1].

        Returns:
            (N, ``num_of_SegClass``, ceil(H / 4), ceil(W / 4)) logits, from the FPN's finest level, into which the
            coarser ones have been added.
        """
        return self.head(self.fpn(self.normalise(images))["0"])
