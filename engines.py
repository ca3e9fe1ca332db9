"""The programs that could derain an image in place of ``StripRunner``, each timed in a process of its own.

    pip install openvino onnxruntime onnxscript
    python bench.py --engines --sizes 160x240 --repeats 2 --busy 1

compares plain PyTorch, ``StripRunner``, onnxruntime and OpenVINO, alone and beside one busy process.
"""
import math
import multiprocessing
import statistics
import tempfile
import time
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from checkpoints import BUNDLED, load_network
from devices import HALF_PRECISIONS, resident_memory
from export import write_onnx
from inference import StripRunner, to_tensor
from rain import draw_rain, sample_photograph
from utils import InputError, RunError, cores

ENGINES = {  # name: (the packages that it needs, its precisions)
    "plain PyTorch": (("torch",), ("fp32", "bf16")),
    "here": (("torch",), ("fp32", "bf16")),
    "onnxruntime": (("onnxruntime",), ("fp32",)),
    "OpenVINO": (("openvino",), ("fp32", "bf16")),
}
PLAIN_PIXELS = 1e6  # plain PyTorch and onnxruntime are left out for larger images: 100 s and 14 GB at 1440x1920


def build(name, precision, onnx):
    """A function (1, 3, H, W) float32 -> the same, arrays in [0, 1], that runs the bundled network with an engine."""
    if name == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.enable_mem_pattern = False
        options.intra_op_num_threads = cores()
        session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        return lambda image: session.run(["derained"], {"rainy": image})[0]
    if name == "OpenVINO":
        import openvino

        hint = {"fp32": "f32", "bf16": "bf16"}[precision]
        options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": cores()}
        model = openvino.Core().compile_model(onnx, "CPU", options)
        return lambda image: model(image)["derained"]
    net, half = load_network(BUNDLED / "general.pth"), HALF_PRECISIONS.get(precision)
    if name == "here":
        runner = StripRunner(net, half or torch.float32)
    else:
        net = net.to(memory_format=torch.channels_last)

        def runner(image):
            with torch.inference_mode(), torch.autocast("cpu", half, enabled=half is not None):
                return net(image.contiguous(memory_format=torch.channels_last)).float()

    return lambda image: runner(torch.from_numpy(image)).clamp(0, 1).numpy()


def serve(name, precision, onnx, connection):
    """In a process of its own: answer each image that comes with (seconds, output), and None with the peak memory."""
    torch.set_num_threads(cores())
    run = build(name, precision, onnx)
    while (image := connection.recv()) is not None:
        started = time.perf_counter()
        derained = run(image)
        connection.send((time.perf_counter() - started, derained))
    try:
        connection.send(resident_memory("VmHWM"))
    except OSError:  # systems without /proc
        connection.send(math.nan)


def spin():
    """Keep a core busy."""
    while True:
        pass


@contextmanager
def processes(count, function, arguments=()):
    """``count`` processes that run a function, ended with the context."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=function, args=arguments, daemon=True) for _ in range(count)]
    try:
        for process in started:
            process.start()
        yield
    finally:
        for process in started:
            process.kill()
            process.join()


def rainy_image(height, width):
    """(1, 3, H, W) float32: one of the sample's photographs, repeated, under drawn rain."""
    photograph = sample_photograph("coffee")
    tiles = -(-height // photograph.shape[0]), -(-width // photograph.shape[1]), 1
    clean = np.tile(photograph, tiles)[:height, :width]
    return to_tensor(draw_rain(clean, "heavy", np.random.default_rng(0))).numpy()


def time_engines(names, precision, size, busy, repeats, onnx):
    """Time engines in turn, beside ``busy`` processes that do nothing but take a core each.

    Returns:
        {name: (median seconds, bytes that its process has had at most, largest difference to the first one)}.

    Raises:
        RunError: the process of an engine has ended, whose own message stands above.
    """
    image, results, connections = rainy_image(*size), {}, {}

    def ask(name, question):
        try:
            connections[name].send(question)
            return connections[name].recv()
        except (EOFError, ConnectionError):
            raise RunError(f"{name}: its process has ended; expected it to derain {size[0]}x{size[1]}") from None

    with ExitStack() as stack:
        for name in names:
            connections[name], other = multiprocessing.get_context("spawn").Pipe()
            stack.enter_context(processes(1, serve, (name, precision, onnx, other)))
            other.close()  # or a process that has died would be waited for: this one could still write to it
        seconds, outputs = {name: [] for name in names}, {}
        for repetition in range(repeats + 1):
            if repetition == 1:  # the first one of each, which is not timed, was alone
                stack.enter_context(processes(busy, spin))
            for name in names:
                taken, outputs[name] = ask(name, image)
                if repetition:
                    seconds[name].append(taken)
        for name in names:
            difference = float(np.abs(outputs[name] - outputs[names[0]]).max())
            results[name] = statistics.median(seconds[name]), ask(name, None), difference
    return results


def check_packages():
    """{package: version} of all that the engines need.

    Raises:
        InputError: one is not installed.
    """
    wanted = [package for packages, _ in ENGINES.values() for package in packages] + ["onnxscript"]
    try:
        return {package: metadata.version(package) for package in wanted}
    except metadata.PackageNotFoundError as error:
        raise InputError(
            f"--engines: {error.name} is missing; expected: pip install openvino onnxruntime onnxscript"
        ) from None


def compare_engines(args, precisions, report):
    """Time all engines at each of --sizes, in each precision, alone and beside --busy processes.

    Args:
        args: with ``sizes``, ``busy`` and ``repeats``.
        precisions: "fp32", and "bf16" where the processor has units for it.
        report: is called with each row.

    Returns:
        The rows: {"what", "seconds", "ratio to OpenVINO", "gigabytes", "difference"}, the last one to
        the first engine in the same precision.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        onnx = str(Path(folder) / "sapnet.onnx")
        write_onnx(load_network(BUNDLED / "general.pth"), onnx)
        for height, width in args.sizes:
            for precision in precisions:
                names = [
                    name for name, (_, possible) in ENGINES.items() if precision in possible
                    and (height * width <= PLAIN_PIXELS or name in ("here", "OpenVINO"))
                ]
                for busy in sorted({0, *args.busy}):
                    results = time_engines(names, precision, (height, width), busy, args.repeats, onnx)
                    for name, (seconds, peak, difference) in results.items():
                        beside = f", beside {busy} busy" if busy else ""
                        rows.append({
                            "what": f"{height}x{width} {precision} {name}{beside}", "seconds": seconds,
                            "ratio to OpenVINO": seconds / results["OpenVINO"][0], "gigabytes": peak / 1e9,
                            "difference": difference,
                        })
                        report(rows[-1])
    return rows
