"""The training losses of SAPNet (paper, section 3; weights as published).

    python -c "import torch; from losses import focal_loss; print(focal_loss(torch.randn(1, 21, 8, 8)))"

The semantic terms compare images by the features of frozen ImageNet networks, whose weights ``load_published`` finds.
Under autocast, these networks run in its precision; what follows on their features is computed in the images' own.
torchvision and lpips are imported where a term needs them, as a run without these terms starts seconds earlier.
"""
import sys
import warnings
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from backbones import load_published
from networks import SEG_BACKBONES, UBS, ImageNetNormalise, fixed_seed
from SSIM import ssim
from utils import InputError, a_path, add_flag, at_least

PIXEL_LOSSES = ("ssim", "mse", "mse+ssim")
PSNR_FLOOR = 1e-5  # added to the MSE, so that patches of more than 50 dB have a small gradient
WEIGHTS = {"contrast": 0.4, "lpips": 1.0, "segmentation": 0.1}  # 0.1 * (4 * PCL) + 0.1 * (10 * LPISL) + 0.1 * UBS
SWITCHES = {"contrast": "--use_contrast", "lpips": "--use_lpips", "segmentation": "--use_seg_stage1"}
PCL_LAYERS = ((0, 4, 1 / 32), (4, 9, 1 / 16), (9, 16, 1 / 8), (16, 23, 1 / 4))  # first, end, w; end: relu1_2 to relu4_3
LPIPS_NETS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
SMALLEST_IMAGE = {"alex": 31, "vgg": 16, "squeeze": 17}  # px: with smaller sides, LPIPS's last layer has no pixel
BACKBONE_WEIGHTS = ("pretrained", "random")


# Backbones


def load_backbone(net, name, term, backbone_dir=None, backbone_weights="pretrained"):
    """Give ``net`` the ImageNet weights of torchvision's network ``name``.

    Args:
        net: the network or its first layers, with torchvision's names but for the prefix "features.". The file may
            hold further layers, and its numbers may have any floating type.
        name: of the network, as in ``torchvision.models``.
        term: the loss that needs the network, a key of ``WEIGHTS``. Errors name the option that switches it off.
        backbone_dir: folder to look in before torchvision's cache; with None, a missing file is downloaded.
        backbone_weights: one of ``BACKBONE_WEIGHTS``; "random" leaves ``net`` as it is and prints a warning.

    Raises:
        InputError: no such file, or not one of this network.
    """
    if backbone_weights == "random":
        print(f"WARNING: RANDOM weights for {name} of the {term} loss; for tests and dry runs only", file=sys.stderr)
        return
    use = f"{{}}, the backbone of the {term} loss", f"; {SWITCHES[term]} False does without it"
    load_published(net, name, backbone_dir, use=use)


class FrozenLoss(nn.Module):
    """Base of the losses that use a frozen network: it stays in evaluation mode, and its weights get no gradient."""

    def freeze(self):
        """Freeze all weights; called at the end of ``__init__``."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode=True):
        """Stay in evaluation mode, also where a module that holds this one is set to training mode."""
        return super().train(False)


def full_precision(images):
    """A context in which autocast is off, so that differences and sums are computed in the images' own type."""
    return torch.autocast(images.device.type, enabled=False)


# Terms


def psnr_loss(derained, clean):
    """The negative PSNR in dB, averaged over the images: (N, 3, H, W) in [0, 1] twice -> scalar.

    Source: HINet (Chen et al. 2021).
    """
    return 10 * ((derained - clean).square().mean((1, 2, 3)) + PSNR_FLOOR).log10().mean()


def batch_psnr(derained, clean):
    """The mean PSNR in dB of a batch, (N, 3, H, W) in [0, 1] each, on RGB and not rounded to 8 bits."""
    error = (derained.clamp(0, 1) - clean).square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10().mean()


class PerceptualContrastiveLoss(FrozenLoss):
    """PCL (paper, section 3) pulls the derained image's features to the clean image's and away from the rainy image's.

    sum over l of w_l * L1(phi_l(derained), phi_l(clean)) / (L1(phi_l(derained), phi_l(rainy)) + 1e-7), with phi_l the
    features of ImageNet VGG-16 after relu1_2, relu2_2, relu3_3, relu4_3 and w = 1/32, 1/16, 1/8, 1/4.

    Args:
        backbone_dir, backbone_weights: as for ``load_backbone``.
    """

    def __init__(self, backbone_dir=None, backbone_weights="pretrained"):
        from torchvision.models.vgg import cfgs, make_layers

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
        """The ratio of the two L1 distances in each of the four layers, the first layer first."""
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
    """LPISL (paper, section 3): learned perceptual image patch similarity (Zhang et al. 2018), mean over the batch.

    Args:
        net: a key of ``LPIPS_NETS``.
        backbone_dir, backbone_weights: as for ``load_backbone``; the linear layers come with the lpips package.
    """

    def __init__(self, net="alex", backbone_dir=None, backbone_weights="pretrained"):
        import lpips

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
        """(N, 3, H, W) in [0, 1] -> a list of (N, C, h, w); the C channels of each pixel have unit length."""
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
            # The spatial mean comes before the linear layer: the result is the same, with less to compute.
            differences = [(x - y).square().mean((2, 3), keepdim=True) for x, y in zip(features, reference)]
            return sum(layer(difference).mean() for layer, difference in zip(self.metric.lins, differences))


def focal_loss(logits, gamma=2):
    """Softmax focal loss (Lin et al. 2017; paper, section 3), whose target is the likeliest class of each pixel.

    Args:
        logits: (N, K, h, w), any floating type.

    Returns:
        Scalar >= 0: the mean of -(1 - p)^gamma log p over the pixels, p the probability of the likeliest class.
    """
    log_p = F.log_softmax(logits, dim=1).max(dim=1).values
    return -((-torch.expm1(log_p)) ** gamma * log_p).mean()


class SegmentationLoss(FrozenLoss):
    """Unsupervised segmentation loss (paper, section 3): how uncertain the frozen UBS is about the derained image.

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
    """The training loss: the pixel loss plus the weighted sum of the other terms.

    Args:
        pixel_loss: one of ``PIXEL_LOSSES``; "ssim" is the negative SSIM.
        weights: {name: weight} of the other terms: those of ``WEIGHTS``, "psnr_loss", and "stages", the pixel loss of
            the stages before the last, on average. A term that is absent or has the weight 0 is neither built nor
            computed.
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

    def pixel_terms(self, derained, clean):
        """{name: scalar} of the parts of the pixel loss."""
        terms = {}
        if "ssim" in self.pixel_loss:
            terms["ssim"] = -ssim(derained, clean)
        if "mse" in self.pixel_loss:
            terms["mse"] = F.mse_loss(derained, clean)
        return terms

    def forward(self, derained, clean, rainy, left_out=(), earlier=()):
        """Measure a batch.

        Args:
            derained, clean, rainy: (N, 3, H, W) float32 in [0, 1]; ``derained`` may leave the range.
            left_out: names of terms that do not count this time. Semantic ones are not computed either.
            earlier: what the stages before the last have estimated, each like ``derained`` and of any floating type.

        Returns:
            (total, terms): the loss, a scalar with gradient to ``derained`` and ``earlier``, and {name: scalar} of all
            terms as they are before they are weighted.
        """
        with full_precision(derained):
            terms = self.pixel_terms(derained, clean)
            if "psnr_loss" in self.weights:
                terms["psnr_loss"] = psnr_loss(derained, clean)
            if "stages" in self.weights and earlier:
                before = [sum(self.pixel_terms(estimate.float(), clean).values()) for estimate in earlier]
                terms["stages"] = torch.stack(before).mean()
        images = {"contrast": (derained, clean, rainy), "lpips": (derained, clean), "segmentation": (derained,)}
        for name in self.weights:
            if name in images and name not in left_out:
                terms[name] = getattr(self, name)(*images[name])
        total = sum(self.weights.get(name, 1) * value for name, value in terms.items() if name not in left_out)
        return total, terms


# Options


def add_loss_options(group):
    """Add train.py's options of the losses."""
    group.add_argument("--pixel_loss", choices=PIXEL_LOSSES, default="ssim", help="ssim is the negative SSIM")
    group.add_argument("--w_psnr", type=at_least(0, float), default=0, help="weight of the negative PSNR in dB")
    group.add_argument(
        "--w_stages", type=at_least(0, float), default=0, help="weight of the earlier stages' mean pixel loss"
    )
    add_flag(group, "--use_contrast", True, "add the perceptual contrastive loss (PCL)")
    add_flag(group, "--use_lpips", True, "add the learned perceptual image similarity loss (LPISL)")
    add_flag(group, "--use_seg_stage1", True, "add the loss of the background segmentation network (UBS)")
    group.add_argument("--w_contrast", type=at_least(0, float), default=WEIGHTS["contrast"], help="weight of PCL")
    group.add_argument("--w_lpips", type=at_least(0, float), default=WEIGHTS["lpips"], help="weight of LPISL")
    group.add_argument("--w_seg", type=at_least(0, float), default=WEIGHTS["segmentation"], help="weight of UBS")
    group.add_argument("--seg_start_epoch", type=at_least(0), default=50, metavar="EPOCH", help="UBS joins after it")
    group.add_argument("--lpips_net", choices=LPIPS_NETS, default="alex", help="backbone of LPISL")
    group.add_argument("--num_of_SegClass", type=at_least(2), default=21, metavar="N", help="classes of UBS")
    group.add_argument("--seg_backbone", choices=SEG_BACKBONES, default="resnet101", help="backbone of UBS")
    group.add_argument(
        "--backbone_dir", type=a_path(), metavar="DIR",
        help="folder with torchvision's weights of the backbones (default: torchvision's cache, filled by download)",
    )
    group.add_argument(
        "--backbone_weights", choices=BACKBONE_WEIGHTS, default="pretrained",
        help="random is for tests and dry runs only",
    )


def build_criterion(args, device, epochs):
    """Build a run's ``DerainLoss`` from train.py's options, on ``device``, and print its terms.

    Args:
        epochs: number of the run's last epoch, from 1. If UBS would join only after it, UBS is not built.

    Raises:
        InputError: --patch_size is too small for --lpips_net, or a backbone's file is missing or another one.
    """
    weights = {
        "psnr_loss": args.w_psnr,
        "stages": args.w_stages,
        "contrast": args.w_contrast if args.use_stage1 and args.use_contrast else 0,
        "lpips": args.w_lpips if args.use_stage1 and args.use_lpips else 0,
        "segmentation": args.w_seg if args.use_stage1 and args.use_seg_stage1 else 0,
    }
    if weights["segmentation"] and args.seg_start_epoch >= epochs:
        print(f"segmentation loss: not used, as the run has no epoch after --seg_start_epoch {args.seg_start_epoch}")
        weights["segmentation"] = 0
    smallest = SMALLEST_IMAGE[args.lpips_net]
    if weights["lpips"] and args.patch_size < smallest:
        expected = f"expected {smallest} or more for --lpips_net {args.lpips_net}, or --use_lpips False"
        raise InputError(f"--patch_size {args.patch_size}: {expected}")
    criterion = DerainLoss(
        args.pixel_loss, weights, args.lpips_net, args.num_of_SegClass, args.seg_backbone, args.backbone_dir,
        args.backbone_weights,
    )
    terms = [args.pixel_loss, *(f"{weight:g} {name}" for name, weight in criterion.weights.items())]
    print("loss:", " + ".join(terms), flush=True)
    return criterion.to(device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
