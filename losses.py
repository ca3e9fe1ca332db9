"""The training losses of SAPNet (paper, section 3; weights as published).

    python -c "import torch; from losses import focal_loss; print(focal_loss(torch.randn(1, 21, 8, 8)))"

The semantic terms look at images through frozen ImageNet networks, whose files ``load_backbone`` finds. Called under
autocast, these networks run in its precision; everything after their features is computed in that of the images.
"""
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import lpips
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model_weights
from torchvision.models.vgg import cfgs, make_layers

from networks import UBS, ImageNetNormalise, fixed_seed
from SSIM import ssim
from utils import InputError, load_weights

PIXEL_LOSSES = ("ssim", "mse", "mse+ssim")
PSNR_FLOOR = 1e-5  # added to the MSE: beyond 50 dB a patch asks for little more
WEIGHTS = {"contrast": 0.4, "lpips": 1.0, "segmentation": 0.1}  # 0.1 * (4 * PCL) + 0.1 * (10 * LPISL) + 0.1 * UBS
SWITCHES = {"contrast": "--use_contrast", "lpips": "--use_lpips", "segmentation": "--use_seg_stage1"}
PCL_LAYERS = ((0, 4, 1 / 32), (4, 9, 1 / 16), (9, 16, 1 / 8), (16, 23, 1 / 4))  # first, end, w; end: relu1_2 to relu4_3
LPIPS_NETS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
SMALLEST_IMAGE = {"alex": 31, "vgg": 16, "squeeze": 17}  # side in px that leaves LPIPS's last layer a pixel
BACKBONE_WEIGHTS = ("pretrained", "random")


# Backbones


def find_backbone(name, backbone_dir):
    """The weights file of torchvision's network ``name`` and what to say when it is missing or wrong.

    Looks in ``backbone_dir`` for torchvision's file name, then for any file that begins with the network's name,
    then in torchvision's cache, and downloads the file only if ``backbone_dir`` is None.

    Returns:
        (path or None, advice)
    """
    url = get_model_weights(name)["IMAGENET1K_V1"].url
    file_name = url.rsplit("/", 1)[1]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if backbone_dir:
        folder = Path(backbone_dir)
        candidates = [folder / file_name, *sorted(folder.glob(f"{name}*.pth")), cached]
        path = next((path for path in candidates if path.is_file()), None)
        return path, (
            f"expected {file_name} from {url}, or without its classifier as {name}*.pth, in --backbone_dir {folder}"
        )
    if not cached.exists():
        print(f"downloading {url} to {cached.parent}", flush=True)
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(cached), hash_prefix=cached.stem.rsplit("-", 1)[1])
        except (OSError, RuntimeError) as error:
            steps = f"download {url} elsewhere, put it into a folder and name that with --backbone_dir"
            return None, f"torchvision's download failed ({error}): {steps}"
    return cached, f"expected {file_name} from {url} in {cached.parent}"


def load_backbone(net, name, term, backbone_dir=None, backbone_weights="pretrained"):
    """Give ``net`` the ImageNet weights of torchvision's network ``name``.

    Args:
        net: a module with torchvision's names, "features." left out. It may be a part of the network, and the file
            may hold more than it, in any floating type.
        term: what needs the network, a key of ``WEIGHTS``; errors name the option that switches it off.
        backbone_dir: folder to look in before torchvision's cache; None also downloads.
        backbone_weights: "random" leaves ``net`` as it is, and says so.

    Raises:
        InputError: no such file, or not one of this network.
    """
    if backbone_weights == "random":
        print(f"WARNING: RANDOM weights for {name} of the {term} loss; for tests and dry runs only", file=sys.stderr)
        return
    path, advice = find_backbone(name, backbone_dir)
    advice += f"; {SWITCHES[term]} False does without it"
    if path is None:
        raise InputError(f"{name}, the backbone of the {term} loss: no file; {advice}")
    try:
        state = {key.removeprefix("features."): value for key, value in load_weights(path).items()}
        net.load_state_dict({key: state[key] for key in net.state_dict()})
    except InputError as error:
        raise InputError(f"{error}; {advice}") from None
    except KeyError as error:
        raise InputError(f"{path}: not the weights of {name}, {error.args[0]} is missing; {advice}") from None
    except RuntimeError:
        raise InputError(f"{path}: not the weights of {name}, whose shapes differ; {advice}") from None


class FrozenLoss(nn.Module):
    """A loss that looks through a frozen network: always in evaluation mode, and its weights get no gradient."""

    def freeze(self):
        self.requires_grad_(False)
        self.eval()

    def train(self, mode=True):
        """Stay in evaluation mode, whatever ``mode`` the owner is set to."""
        return super().train(False)


def full_precision(images):
    """A context without autocast: differences and sums are taken in the images' own type."""
    return torch.autocast(images.device.type, enabled=False)


# Terms


def psnr_loss(derained, clean):
    """The negative PSNR in dB, averaged over the images: (N, 3, H, W) in [0, 1] twice -> scalar.

    Source: HINet (Chen et al. 2021).
    """
    return 10 * ((derained - clean).square().mean((1, 2, 3)) + PSNR_FLOOR).log10().mean()


class PerceptualContrastiveLoss(FrozenLoss):
    """PCL (paper, section 3): derained features near the clean ones and far from the rainy ones.

    sum over l of w_l * L1(phi_l(derained), phi_l(clean)) / (L1(phi_l(derained), phi_l(rainy)) + 1e-7), with phi_l the
    features of ImageNet VGG-16 after relu1_2, relu2_2, relu3_3, relu4_3 and w = 1/32, 1/16, 1/8, 1/4.

    Args:
        backbone_dir, backbone_weights: as for ``load_backbone``.
    """

    def __init__(self, backbone_dir=None, backbone_weights="pretrained"):
        super().__init__()
        with fixed_seed():
            layers = make_layers(cfgs["D"])[: PCL_LAYERS[-1][1]]
        load_backbone(layers, "vgg16", "contrast", backbone_dir, backbone_weights)
        self.normalise = ImageNetNormalise()
        self.slices = nn.ModuleList(layers[first:end] for first, end, _ in PCL_LAYERS)
        self.freeze()

    def features(self, images):
        """(N, 3, H, W) -> four (N, C, h, w) in the images' own type."""
        x, features = self.normalise(images), []
        for layers in self.slices:
            x = layers(x)
            features.append(x.to(images.dtype))
        return features

    def layer_ratios(self, derained, clean, rainy):
        """The four ratios that ``forward`` weighs and adds, shallowest layer first."""
        with torch.no_grad():
            fixed = [features.chunk(2) for features in self.features(torch.cat((clean, rainy)))]
        return [
            F.l1_loss(features, positive) / (F.l1_loss(features, negative) + 1e-7)
            for features, (positive, negative) in zip(self.features(derained), fixed)
        ]

    def forward(self, derained, clean, rainy):
        """(N, 3, H, W) RGB in [0, 1] each, sides of 8 px or more -> scalar >= 0 with gradient to ``derained`` only."""
        ratios = self.layer_ratios(derained, clean, rainy)
        return sum(weight * ratio for (_, _, weight), ratio in zip(PCL_LAYERS, ratios))


class LPIPSLoss(FrozenLoss):
    """LPISL: learned perceptual image patch similarity (Zhang et al. 2018; paper, section 3), the batch's mean.

    Args:
        net: a key of ``LPIPS_NETS``.
        backbone_dir, backbone_weights: as for ``load_backbone``; the linear layers come with the lpips package.
    """

    def __init__(self, net="alex", backbone_dir=None, backbone_weights="pretrained"):
        super().__init__()
        with fixed_seed(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torchvision")  # lpips uses an old name of an argument
            metric = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        # The package cuts the backbone into slices, whose layers keep torchvision's numbers.
        layers = OrderedDict(layer for part in metric.net.children() for layer in part.named_children())
        load_backbone(nn.Sequential(layers), LPIPS_NETS[net], "lpips", backbone_dir, backbone_weights)
        self.metric = metric
        self.freeze()

    def features(self, images):
        """(N, 3, H, W) in [0, 1] -> a list of (N, C, h, w), of unit length over the channels."""
        features = self.metric.net(self.metric.scaling_layer(2 * images - 1))
        # Not lpips.normalize_tensor, whose gradient is NaN where all channels of a pixel are zero.
        return [F.normalize(x.to(images.dtype), dim=1, eps=1e-10) for x in features]

    def forward(self, derained, clean):
        """(N, 3, H, W) RGB in [0, 1] each, sides of ``SMALLEST_IMAGE`` or more -> scalar >= 0.

        The gradient reaches ``derained`` only.
        """
        with torch.no_grad():
            reference = self.features(clean)
        features = self.features(derained)
        with full_precision(derained):
            # The linear layer and the spatial mean commute, and the mean leaves less to do.
            differences = [(x - y).square().mean((2, 3), keepdim=True) for x, y in zip(features, reference)]
            return sum(layer(difference).mean() for layer, difference in zip(self.metric.lins, differences))


def focal_loss(logits, gamma=2):
    """Softmax focal loss on the logits' own argmax (Lin et al. 2017; paper, section 3).

    Args:
        logits: (N, K, h, w), any floating type.

    Returns:
        Scalar >= 0: the mean of -(1 - p)^gamma log p over the pixels, p the probability of the likeliest class.
    """
    log_p = F.log_softmax(logits, dim=1).max(dim=1).values
    return -((-torch.expm1(log_p)) ** gamma * log_p).mean()


class SegmentationLoss(FrozenLoss):
    """Unsupervised segmentation loss (paper, section 3): how unsure a frozen UBS is about the derained image.

    Args:
        num_of_SegClass, backbone: as for ``UBS``.
        backbone_dir, backbone_weights: as for ``load_backbone``.
    """

    def __init__(self, num_of_SegClass=21, backbone="resnet101", backbone_dir=None, backbone_weights="pretrained"):
        super().__init__()
        self.network = UBS(num_of_SegClass, backbone)
        load_backbone(self.network.fpn.body, backbone, "segmentation", backbone_dir, backbone_weights)
        self.freeze()

    def forward(self, derained):
        """(N, 3, H, W) RGB in [0, 1] -> scalar >= 0 with gradient to ``derained``."""
        return focal_loss(self.network(derained).to(derained.dtype))


class DerainLoss(nn.Module):
    """The pixel loss plus the weighted further terms, and each term by name.

    Args:
        pixel_loss: one of ``PIXEL_LOSSES``; "ssim" is the negative SSIM.
        weights: {name: weight} of the semantic terms, names as in ``WEIGHTS``, and of "psnr_loss"; a term that is
            absent or zero is neither built nor computed.
        lpips_net: a key of ``LPIPS_NETS``.
        num_of_SegClass, seg_backbone: as for ``UBS``.
        backbone_dir, backbone_weights: as for ``load_backbone``.

    Raises:
        InputError: the file of a backbone is missing or wrong.
    """

    def __init__(
        self, pixel_loss="ssim", weights=WEIGHTS, lpips_net="alex", num_of_SegClass=21, seg_backbone="resnet101",
        backbone_dir=None, backbone_weights="pretrained",
    ):
        super().__init__()
        self.pixel_loss = pixel_loss
        self.weights = {name: weight for name, weight in weights.items() if weight}
        files = {"backbone_dir": backbone_dir, "backbone_weights": backbone_weights}
        if "contrast" in self.weights:
            self.contrast = PerceptualContrastiveLoss(**files)
        if "lpips" in self.weights:
            self.lpips = LPIPSLoss(lpips_net, **files)
        if "segmentation" in self.weights:
            self.segmentation = SegmentationLoss(num_of_SegClass, seg_backbone, **files)

    def forward(self, derained, clean, rainy, skip=()):
        """Measure a batch.

        Args:
            derained, clean, rainy: (N, 3, H, W) float32 in [0, 1]; ``derained`` may leave the range.
            skip: names of semantic terms to leave out this time.

        Returns:
            (total, terms): a scalar with gradient to ``derained``, and {name: unweighted scalar}.
        """
        terms = {}
        with full_precision(derained):
            if "ssim" in self.pixel_loss:
                terms["ssim"] = -ssim(derained, clean)
            if "mse" in self.pixel_loss:
                terms["mse"] = F.mse_loss(derained, clean)
            if "psnr_loss" in self.weights:
                terms["psnr_loss"] = psnr_loss(derained, clean)
        images = {"contrast": (derained, clean, rainy), "lpips": (derained, clean), "segmentation": (derained,)}
        for name in self.weights:
            if name in images and name not in skip:
                terms[name] = getattr(self, name)(*images[name])
        total = sum(self.weights.get(name, 1) * value for name, value in terms.items())
        return total, terms
