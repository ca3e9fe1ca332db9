"""Measure speed and memory, and compare with another implementation in the same run.

    python bench.py --sizes 160x240 --repeats 1 --steps 1 --data_path datasets/test/RainSample

prints one table: inference at each size and precision, a training step by its phases, packing and loading. That is a
trial; docs/performance.md has figures. Times are medians, and what is compared takes turns, so that both feel it when a
machine is busy.
"""
import argparse
import importlib.util
import inspect
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from DerainDataset import ShuffledBatches, TrainingPatches, open_patches
from devices import HALF_PRECISIONS, PeakMemory, can_compile, fast_bfloat16, loader_processes, pick_device
from engines import check_packages, compare_engines
from inference import FullFloat32, StripRunner
from losses import DerainLoss
from muon import build_optimizers
from networks import SAPNet
from rain import TrainingRain
from training_sets import find_training_sets
from utils import (
    InputError, a_path, add_flag, at_least, begins_with, check_file, cores, counted, run_script, write_text,
)

PRECISIONS = {"fp32": torch.float32, **HALF_PRECISIONS}
BATCH, PATCH, STRIDE = 12, 100, 80  # as published: patches a step, their side in px and the distance between them
CONVOLUTION_FLOPS = 2 * 6 * 168_480  # a pixel in six stages: what share of the processor's peak "teraflops" are
WARM_UP_ROWS = 321  # each network derains so many rows before it is timed, as kernels are compiled when first used
WARM_UP_STEPS = 2  # training steps that are not timed, for the same reason
LOADER_SECONDS = 10  # that a loader is timed for
JSON_START = '{\n  "machine": {\n    "device"'  # of the file of --json, by which a later run knows it
BASELINE_PIXELS = 3e6  # --baseline is left out for larger images: it would take minutes and tens of gigabytes


def image_size(text):
    """``argparse`` type: "321x481" -> (321, 481), height first."""
    try:
        height, width = map(int, text.split("x"))
    except ValueError:
        height = width = 0
    if min(height, width) < 1:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in px, got {text!r}")
    return height, width


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--baseline", type=a_path(str), metavar="FILE[:CLASS]",
        help="Python module with a network class to compare with, which is built without arguments (default of CLASS:"
        " the only class of the module whose name ends in Net)",
    )
    parser.add_argument(
        "--sizes", type=image_size, nargs="*", default=[(321, 481), (1440, 1920), (2848, 4288)], metavar="HxW",
        help="image sizes (default: 321x481 1440x1920 2848x4288)",
    )
    parser.add_argument("--repeats", type=at_least(1), default=3, help="timed repetitions of each image (default: 3)")
    parser.add_argument(
        "--steps", type=at_least(0), default=6, help="timed training steps; 0 leaves them out (default: 6)"
    )
    parser.add_argument(
        "--data_path", type=a_path(str), metavar="DIR",
        help="also time packing this folder, and the loader on it",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add_flag(
        parser, "--engines", False,
        "instead of all else compare with plain PyTorch, onnxruntime and OpenVINO on the CPU, each in its own process",
    )
    parser.add_argument(
        "--busy", type=at_least(0), nargs="*", default=[], metavar="N",
        help="with --engines: time them beside N processes that keep a core busy too",
    )
    parser.add_argument("--json", type=a_path(str), metavar="FILE", help="also write the rows to this file")
    args = parser.parse_args(argv)
    if args.busy and not args.engines:
        parser.error("argument --busy: expected --engines with it")
    return args


def load_baseline(text):
    """The network that --baseline names, with random weights."""
    file, _, name = text.partition(":")
    if not Path(file).is_file():
        raise InputError(f"--baseline {file}: no such file; expected a Python module")
    spec = importlib.util.spec_from_file_location("baseline", file)
    if spec is None:
        raise InputError(f"--baseline {file}: expected a Python module, whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = [name] if name else [
        key for key, value in vars(module).items()
        if key.endswith("Net") and isinstance(value, type) and value.__module__ == "baseline"
    ]
    network = getattr(module, names[0], None) if len(names) == 1 else None
    if not isinstance(network, type) or not issubclass(network, torch.nn.Module):
        raise InputError(f"--baseline {text}: expected FILE:CLASS, a network class of that module")
    try:
        inspect.signature(network).bind()
    except TypeError as error:
        raise InputError(f"--baseline {text}: {error}; expected a class that is built without arguments") from None
    return network()


def check_trainable(text):
    """Refuse a --baseline whose training cannot be timed, before minutes of inference are."""
    if not any(parameter.requires_grad for parameter in load_baseline(text).parameters()):
        raise InputError(
            f"--baseline {text}: a class without parameters to train; expected a network, or --steps 0, which leaves"
            " training out"
        )


def final(output):
    """The derained images, also where a network returns them with the estimates of its stages in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def wait_for(device):
    """Wait until a GPU has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(function, device):
    """The seconds that one call takes."""
    start = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - start


def alternate(functions, repeats, device):
    """Time functions in turn, so that a machine that is busy for a while slows them all.

    Args:
        functions: {name: function without arguments}.
        repeats: how often to call each.
        device: where they run.

    Returns:
        {name: median seconds}.
    """
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(timed(function, device))
    return {name: statistics.median(values) for name, values in seconds.items()}


# Inference


def build_runner(name, baseline, device):
    """A function (1, 3, H, W) -> (1, 3, H, W): "baseline", or SAPNet in one of ``PRECISIONS``."""
    torch.manual_seed(0)
    if name == "baseline":
        net = load_baseline(baseline).to(device).eval()
        return torch.inference_mode()(FullFloat32()(lambda image: final(net(image))))
    return StripRunner(SAPNet().to(device), PRECISIONS[name])


def measure_peak(name, baseline, size, device, queue):
    """Put into ``queue`` how many bytes a pixel deraining takes, beyond the loaded program. Runs in its own process.

    Args:
        name, baseline: as for ``build_runner``.
        size: (height, width) of the image.
        device: where to run.
        queue: takes the result.
    """
    run = build_runner(name, baseline, device)
    run(torch.rand(1, 3, 64, 64, device=device))
    image = torch.rand(1, 3, *size, device=device)
    with PeakMemory(device) as memory:
        run(image)
    queue.put(memory.peak and memory.peak / (size[0] * size[1]))


def peak_memory(*job):
    """The result of ``measure_peak`` in a process of its own; None where it fails, as on systems without /proc."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure_peak, args=(*job, queue))
    process.start()
    process.join()
    return queue.get() if process.exitcode == 0 else None


def cpu_precisions():
    """The precisions worth timing on this processor: without units for it, bf16 takes many times as long as fp32."""
    return ["fp32", "bf16"] if fast_bfloat16(torch.device("cpu")) else ["fp32"]


def bench_inference(args, device):
    """Time inference at each of --sizes, print the rows and return them."""
    rows = []
    for size in args.sizes:
        names = cpu_precisions() if device.type == "cpu" else [*PRECISIONS]
        if args.baseline and size[0] * size[1] <= BASELINE_PIXELS:
            names.insert(0, "baseline")
        image = torch.rand(1, 3, *size, device=device)
        runners = {name: build_runner(name, args.baseline, device) for name in names}
        for run in runners.values():
            run(image[:, :, :WARM_UP_ROWS])
        seconds = alternate({name: lambda run=run: run(image) for name, run in runners.items()}, args.repeats, device)
        for name in names:
            row = {"what": f"inference {size[0]}x{size[1]} {name}", "seconds": seconds[name]}
            row["microseconds a pixel"] = seconds[name] / (size[0] * size[1]) * 1e6
            row["bytes a pixel"] = peak_memory(name, args.baseline, size, device)
            if name != "baseline":  # which may be another network
                row["teraflops"] = CONVOLUTION_FLOPS * size[0] * size[1] / seconds[name] / 1e12
            if "baseline" in names:
                row["ratio"] = seconds[name] / seconds["baseline"]
            rows.append(row)
            report(row)
    return rows


# Training


def training_step(net, criterion, device, amp=None, compile_mode=None, second_forward=False):
    """A function that trains one step on random patches and returns {phase: seconds}.

    Args:
        net, criterion: the network and its loss, on ``device``.
        device: where to train.
        amp: "bf16" or "fp16" for mixed precision.
        compile_mode: of torch.compile, "reduce-overhead" with CUDA graphs; None leaves the network as it is.
        second_forward: run the network once more after each step, as the published code does to print a PSNR.
    """
    (optimizer,) = build_optimizers("adam", net, 1e-3)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    model = torch.compile(net, mode=compile_mode) if compile_mode else net
    rainy, clean = (torch.rand(BATCH, 3, PATCH, PATCH, device=device) for _ in range(2))

    def step():
        marks = [time.perf_counter()]

        def mark():
            wait_for(device)
            marks.append(time.perf_counter())

        with torch.autocast(device.type, HALF_PRECISIONS.get(amp), enabled=bool(amp)):
            derained = final(model(rainy)).float()
            mark()
            loss, _ = criterion(derained, clean, rainy)
        mark()
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        mark()
        scaler.step(optimizer)
        scaler.update()
        mark()
        if second_forward:
            with torch.no_grad():
                model(rainy)
            mark()
        phases = ("forward", "loss", "backward", "optimizer", "second forward")
        return {phase: end - start for phase, start, end in zip(phases, marks, marks[1:])}

    return step


def bench_training(args, device):
    """Time the training step with the pixel loss, with all losses and of --baseline; print the rows and return them."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as train.py has it
    pixel = DerainLoss(weights={}).to(device)
    every = DerainLoss(backbone_weights="random").to(device, memory_format=torch.channels_last)

    def fast_step(criterion, *options):
        return training_step(SAPNet().to(device, memory_format=torch.channels_last), criterion, device, *options)

    compiled = can_compile(device)
    modes = (None, "default", "reduce-overhead") if compiled else (None,)
    fastest = "bf16" if fast_bfloat16(device) else None, "default" if compiled else None
    if not compiled:
        print("training without torch.compile, which needs a C++ compiler, and a CPU or a CUDA card from Volta on")
    steps = {"pixel loss": fast_step(pixel, *fastest), "all losses": fast_step(every, *fastest)}
    if device.type == "cuda":
        for half in (None, *HALF_PRECISIONS):
            for mode in modes:
                words = half or "fp32", {None: "eager", "default": "compiled"}.get(mode, "compiled with CUDA graphs")
                steps["pixel loss, " + ", ".join(words)] = fast_step(pixel, half, mode)
    if args.baseline:
        baseline = load_baseline(args.baseline).to(device)
        steps = {"baseline": training_step(baseline, pixel, device, second_forward=True), **steps}
    phases = {name: [] for name in steps}
    for repetition in range(WARM_UP_STEPS + args.steps):
        for name, step in steps.items():
            result = step()
            if repetition >= WARM_UP_STEPS:
                phases[name].append(result)
    rows = []
    for name, results in phases.items():
        medians = {phase: statistics.median(result[phase] for result in results) for phase in results[0]}
        row = {"what": f"training step, {name}", "seconds": sum(medians.values())}
        row["patches a second"] = BATCH / row["seconds"]
        if args.baseline:
            row["ratio"] = row["seconds"] / (rows[0] if rows else row)["seconds"]
        if name == "all losses":
            row["ratio to the pixel loss"] = row["seconds"] / rows[-1]["seconds"]
        rows.append({**row, **medians})
        report(rows[-1])
    return rows


def bench_data(args):
    """Time packing --data_path and loading its patches; print the rows and return them."""
    rows, (training_set,) = [], find_training_sets([args.data_path], None, prenet=False, ways_out=())
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        patches = open_patches(training_set, folder, PATCH, STRIDE, skip_small=True)
        seconds = time.perf_counter() - start
        rows.append({"what": f"packing {counted(len(patches.names), 'pair')}", "seconds": seconds})
        rows[-1]["megabytes"] = patches.paths[0].stat().st_size / 1e6
        report(rows[-1])
        if (count := len(TrainingPatches([patches]))) < 2 * BATCH:
            print(f"{args.data_path}: {counted(count, 'patch')}; expected {2 * BATCH} or more to time the loader")
            return rows
        for workers in sorted({1, 2, loader_processes()}):
            for rain in (None, TrainingRain(synth=1, preset="heavy")):
                dataset = TrainingPatches([patches], rain=rain)
                loader = DataLoader(dataset, batch_sampler=ShuffledBatches(len(dataset), BATCH), num_workers=workers)
                what = f"loader, {counted(workers, 'worker')}{', drawn heavy rain' if rain else ''}"
                rows.append({"what": what, **time_loader(loader)})
                report(rows[-1])
    return rows


def time_loader(loader):
    """How fast a loader is after its processes have started, for ``LOADER_SECONDS`` or an epoch.

    Returns:
        {"seconds", "patches a second"}.
    """
    batches, count = iter(loader), 0
    next(batches)  # waits for the workers to start
    start = time.perf_counter()
    for _, _, indices in batches:
        count += len(indices)
        if time.perf_counter() - start > LOADER_SECONDS:
            break
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "patches a second": count / seconds}


def report(row):
    """Print one row of the table."""
    figures = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float))
    print(f"{row['what']:36} {figures}", flush=True)


def main():
    args = parse_args()
    if args.json:
        check_file("--json", args.json, begins_with(JSON_START))
    if args.baseline and args.steps and not args.engines:
        check_trainable(args.baseline)
    device = pick_device("cpu" if args.engines else args.device)
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        cpu = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
        processor = f"{cpu}, {counted(cores() if args.engines else torch.get_num_threads(), 'thread')}"
    machine = {"device": processor, "torch": torch.__version__, "python": platform.python_version()}
    if args.engines:
        machine |= check_packages()
    print(*(f"{name} {value}" for name, value in machine.items()), sep=", ", flush=True)
    if args.engines:
        rows = compare_engines(args, cpu_precisions(), report)
    else:
        rows = bench_inference(args, device)
        if args.steps:
            rows += bench_training(args, device)
        if args.data_path:
            rows += bench_data(args)
    if args.json:
        write_text(args.json, json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
