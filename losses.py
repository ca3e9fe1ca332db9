"""The training losses of SAPNet (paper, section 3; weights as published).

    python -c "import torch; from losses import DerainLoss; x = torch.rand(1, 3, 64, 64); print(DerainLoss()(x, x, x))"
"""
import torch.nn.functional as F
from torch import nn

from SSIM import ssim

PIXEL_LOSSES = ("ssim", "mse", "mse+ssim")


class DerainLoss(nn.Module):
    """The weighted sum of the terms, and each term by name.

    Args:
        pixel_loss: one of ``PIXEL_LOSSES``; "ssim" is the negative SSIM.
    """

    def __init__(self, pixel_loss="ssim"):
        super().__init__()
        self.pixel_loss = pixel_loss

    def forward(self, derained, clean, rainy):
        """Measure a batch.

        Args:
            derained, clean, rainy: (N, 3, H, W) float32 in [0, 1].

        Returns:
            (total, terms): a scalar with gradient to ``derained``, and {name: unweighted scalar}.
        """
        terms = {}
        if "ssim" in self.pixel_loss:
            terms["ssim"] = -ssim(derained, clean)
        if "mse" in self.pixel_loss:
            terms["mse"] = F.mse_loss(derained, clean)
        return sum(terms.values()), terms
