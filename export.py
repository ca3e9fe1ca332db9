"""Export a network as one ONNX file, checked against PyTorch at three sizes in onnxruntime.

    pip install onnxscript onnxruntime
    python export.py --output sapnet.onnx

Without --save_path it exports the weights of your run, or the bundled general ones. The file's input ``rainy`` and
output ``derained`` are (N, 3, H, W) float32 RGB in [0, 1], with N, H and W free; the output is clamped to that range.
"""
import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from torch import nn

from checkpoints import add_network_options, find_checkpoint, load_network
from inference import to_tensor
from metrics import psnr
from rain import SAMPLE_PHOTOGRAPHS, add_rain, sample_photograph, streak_layer
from utils import InputError, RunError, a_path, atomic_write, check_file, counted, run_script

OPSET = 18
# The type of the weights and features, and the largest difference to PyTorch's float32 that is accepted.
PRECISIONS = {"fp32": (torch.float32, 1e-4), "fp16": (torch.float16, 0.02)}
METADATA = {"checkpoint", "recurrent_iter", "dilations"}  # what the file says of its network
CHECKED_SHAPES = ((2, 33, 47), (1, 128, 96), (1, 7, 5))  # N, H, W: a batch, even sides, sides below the dilation


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_options(parser)
    parser.add_argument(
        "--output", type=a_path(), default=Path("sapnet.onnx"), metavar="FILE",
        help="the file to write (default: %(default)s)",
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32",
        help="of the weights and features; input and output are float32 with both (default: %(default)s)",
    )
    return parser.parse_args(argv)


class ImageToImage(nn.Module):
    """What the ONNX file holds: the network in ``dtype``, which takes and returns float32 images and clamps them."""

    def __init__(self, net, dtype=torch.float32):
        super().__init__()
        self.net, self.dtype = copy.deepcopy(net).to(dtype), dtype

    def forward(self, rainy):
        return self.net(rainy.to(self.dtype)).float().clamp(0, 1)


def write_onnx(net, path, dtype=torch.float32, **metadata):
    """Write a network as one ONNX file. The weights are in it, once for all stages.

    Args:
        net: a ``SAPNet``, which stays as it is.
        path: the file to write.
        dtype: of weights and features; input and output are float32.
        metadata: {name: text} that the file carries.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript.optimizer import fold_constants

    program = torch.onnx.export(
        ImageToImage(net, dtype).eval(), (torch.rand(2, 3, 20, 24),), dynamo=True, opset_version=OPSET, verbose=False,
        input_names=["rainy"], output_names=["derained"],
        dynamic_shapes={"rainy": {0: "batch", 2: "height", 3: "width"}},
    )
    # The four gates' weights as one tensor: the exporter folds small ones only.
    fold_constants(program.model, input_size_limit=2**20, output_size_limit=2**20)
    ClearMetadataAndDocStringPass()(program.model)  # half the file, with the paths of this machine
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)


def is_export(path):
    """Whether an ONNX file is one that ``main`` has written, by the metadata that it carries."""
    import onnx_ir

    try:
        return METADATA <= onnx_ir.load(path).metadata_props.keys()
    except Exception:  # a file of another kind can fail at any point of the decoder
        return False


def rainy_batch(count, height, width):
    """Corners of photographs under drawn rain: (count, 3, height, width) in [0, 1], the same in every run."""
    rng = np.random.default_rng(0)
    cleans = [sample_photograph(name)[:height, :width] for name in SAMPLE_PHOTOGRAPHS[:count]]
    return torch.cat([to_tensor(add_rain(clean, streak_layer(height, width, "heavy", rng))) for clean in cleans])


@torch.inference_mode()
def check(path, net, tolerance):
    """Run an ONNX file in onnxruntime on rainy images of three sizes, and print how far it is from ``net``.

    Raises:
        RunError: a value differs by more than ``tolerance`` from the clamped output of PyTorch, in float32.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    reference = ImageToImage(net)
    for count, height, width in CHECKED_SHAPES:
        rainy = rainy_batch(count, height, width)
        expected = reference(rainy).numpy()
        derained = session.run(["derained"], {"rainy": rainy.numpy()})[0]
        difference = np.abs(derained - expected).max()
        size = f"{count}x3x{height}x{width}"
        print(f"{size:12} largest difference to PyTorch {difference:.1e}, PSNR {psnr(derained, expected):.1f} dB")
        if not difference <= tolerance:  # NaN too
            raise RunError(
                f"{size}: onnxruntime differs from PyTorch by {difference:.1e}, expected {tolerance:g} or less;"
                " nothing was written"
            )


def main():
    args = parse_args()
    if args.output.suffix != ".onnx":
        raise InputError(f"--output {args.output}: expected a file name that ends in .onnx")
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is missing; expected both of: pip install onnxscript onnxruntime") from None
    check_file("--output", args.output, is_export)
    checkpoint = find_checkpoint(args.save_path)
    net = load_network(checkpoint, args.recurrent_iter, args.use_dilation)
    dtype, tolerance = PRECISIONS[args.precision]
    print(f"exporting {checkpoint}: {counted(net.recurrent_iter, 'stage')}, dilations {net.dilations}")
    with atomic_write(args.output) as temporary:
        write_onnx(
            net, temporary, dtype, checkpoint=checkpoint.name, recurrent_iter=str(net.recurrent_iter),
            dilations=str(net.dilations),
        )
        check(temporary, net, tolerance)
    size = args.output.stat().st_size / 1e6
    print(f"{args.output}: {size:.2f} MB, opset {OPSET}, {args.precision}, within {tolerance:g} of PyTorch")


if __name__ == "__main__":
    run_script(main)
