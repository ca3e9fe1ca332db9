"""SAPNet for programs that load their networks with spandrel, such as ComfyUI and chaiNNer: importing this file is all.

    pip install spandrel
    python -c "import spandrel_sapnet, spandrel; print(spandrel.ModelLoader().load_from_file('weights/light.pth').tags)"

It registers an architecture in spandrel's main registry, which finds SAPNet and PReNet by the names of their tensors.
These tell neither the number of stages nor the dilation, so spandrel's loader takes the published ones: 6 stages, and
dilation for SAPNet. ``load`` is for checkpoints with other ones. ``docs/python.md`` says how ComfyUI and chaiNNer come
to import this file, which may lie elsewhere as a link.
"""
import copy
import importlib.util
from pathlib import Path

import torch

try:
    import spandrel
except ImportError:
    raise ImportError("spandrel is missing; expected: pip install spandrel") from None


def import_apart():
    """``hubconf``, which imports our files so that they do not meet those of the same names of this program."""
    path = Path(__file__).resolve().parent / "hubconf.py"
    spec = importlib.util.spec_from_file_location("_sapnet_hubconf", path)
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    return hubconf


hub = import_apart()
module = hub._module
REQUIRED = ("conv0.0.weight", *(f"conv_{gate}.0.weight" for gate in "ifgo"), "conv.0.weight")  # names of tensors


def is_sapnet(state_dict):
    """Whether spandrel's state dict holds SAPNet, in any of its variants, or PReNet, also within other dictionaries."""
    weights = module("checkpoints").unwrap(state_dict)
    blocks = [any(name.startswith(f"res_conv{k}.") for name in weights) for k in range(1, 6)]
    return all(name in weights for name in REQUIRED) and all(blocks) and weights[REQUIRED[0]].shape == (32, 6, 3, 3)


def run(net, image):
    """Derain with ``inference.StripRunner``: the result of the whole picture, in bounded memory.

    Args:
        net: a ``SAPNet`` in float32, bfloat16 or float16.
        image: (N, 3, H, W) in [0, 1], of the type and on the device of ``net``.

    Returns:
        The same shape and type, not clamped.
    """
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"a tensor of {tuple(image.shape)}: expected (N, 3, H, W), RGB")
    # The runner itself goes down to half precision where that is exact enough.
    runner = module("inference").StripRunner(
        copy.deepcopy(net).float(), image.dtype, 0.75 * module("devices").free_memory()
    )
    return torch.cat([runner(picture[None]) for picture in image.float()]).to(image.dtype)


class SAPNetArchitecture(spandrel.Architecture):
    """SAPNet (plain, depthwise-separable, split) and PReNet as spandrel's loader wants to be told of them."""

    def __init__(self):
        super().__init__(id="SAPNet", detect=is_sapnet)

    def load(self, state_dict):
        """The ``ImageModelDescriptor`` of a state dict for which ``is_sapnet`` holds.

        Raises:
            ValueError: some names or shapes are of another network.
        """
        weights = module("checkpoints").unwrap(state_dict)
        return self.describe(module("networks").SAPNet.from_state_dict(weights).float().eval())

    def describe(self, net):
        """The ``ImageModelDescriptor`` of a ``SAPNet``."""
        options = module("checkpoints").network_options(net)
        stages = module("utils").counted(net.recurrent_iter, "stage")
        tags = ["SAPNet" if options["use_cra"] else "PReNet", options["residual_conv"], stages]
        return spandrel.ImageModelDescriptor(
            net, net.state_dict(), architecture=self, purpose="Restoration", tags=tags, supports_half=True,
            supports_bfloat16=True, scale=1, input_channels=3, output_channels=3,
            # Its attention averages over the whole picture: cut into tiles, the result would be another.
            tiling=spandrel.ModelTiling.INTERNAL, call_fn=run,
        )


def load(weights, recurrent_iter=None, use_dilation=None):
    """The ``ImageModelDescriptor`` of any checkpoint that ``test.py`` takes, with its own stages and dilation.

    ``spandrel.ModelLoader`` hands an architecture the tensors alone. Here the metadata of a .safetensors file and the
    args.json of a training run count too, and a file may hold other objects beside the weights.

    Args:
        weights: the path of a checkpoint or of the folder of a training run, or the name of a bundled one ("light").
        recurrent_iter, use_dilation: the number of stages, and whether the residual blocks are dilated; None takes
            what is stored with the weights, else what is published.

    Returns:
        The descriptor, on the CPU, in float32.

    Raises:
        FileNotFoundError, TypeError, ValueError: as for ``hubconf.sapnet``.
    """
    return SAPNetArchitecture().describe(hub.sapnet(weights, recurrent_iter, use_dilation))


class DerainWhole:
    """A node of ComfyUI. Its own, "Upscale Image (using Model)", cuts pictures of more than 512 px a side."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "derain", "image"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("UPSCALE_MODEL",), "image": ("IMAGE",)}}

    def derain(self, model, image):
        """Derain a batch.

        Args:
            model: what ComfyUI's "Load Upscale Model" gives: the descriptor, with a ``patcher`` that knows the device.
            image: (N, H, W, 3 or 4) float32 in [0, 1]; alpha is not changed.

        Returns:
            (the same kind,), as ComfyUI wants it.
        """
        patcher = getattr(model, "patcher", None)
        model.to(model.device if patcher is None else patcher.load_device, torch.float32)
        derained = model(image[..., :3].movedim(3, 1).to(model.device, torch.float32)).movedim(1, 3).to(image)
        return (torch.cat((derained, image[..., 3:]), 3),)


NODE_CLASS_MAPPINGS = {"SAPNetDerainWhole": DerainWhole}  # where ComfyUI looks
NODE_DISPLAY_NAME_MAPPINGS = {"SAPNetDerainWhole": "Derain whole picture (SAPNet)"}
spandrel.MAIN_REGISTRY.add(spandrel.ArchSupport.from_architecture(SAPNetArchitecture()), ignore_duplicates=True)
