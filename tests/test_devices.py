"""Which device, precision and number of processes and threads a run takes, with those of other machines imitated."""
import re
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import devices
import utils
from devices import check_cuda_graph, choose_speed, loader_processes, pick_device, threads_beside
from runners import SharedRunner
from utils import InputError, ahead


@pytest.fixture
def cards(monkeypatch):
    """cards(2) imitates a machine with two CUDA cards; returns the list of those that were made the current one."""
    chosen = []

    def imitate(count):
        def empty(size, device):
            if device.type == "cuda" and (device.index or 0) >= count:
                raise RuntimeError("CUDA error: invalid device ordinal\nand more lines")

        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return imitate


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1"])
def test_each_process_of_a_machine_takes_its_own_card(cards, monkeypatch, name):
    chosen = cards(2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert pick_device(name) == chosen[-1] == torch.device(f"cuda:{rank}")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match=rf"--device {name}: .* \(cpu, cuda:0, cuda:1\), and one for each of"):
        pick_device(name)


def test_one_process_takes_the_card_that_is_named(cards, monkeypatch):
    cards(2)
    assert pick_device("cuda:1") == torch.device("cuda:1") and pick_device("cuda") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # as torchrun --nproc_per_node=1 says
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_card_that_others_have_filled_is_not_said_to_be_absent(cards, monkeypatch, name):
    def full(size, device):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    cards(1)
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(InputError, match=f"^--device {name}: cuda:0 cannot be used .CUDA error: out of memory.; exp"):
        pick_device(name)


def test_another_program_keeps_its_current_card(cards, monkeypatch):
    chosen = cards(3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for name, card in (("auto", 2), ("cuda", 2), ("cuda:1", 1)):
        assert pick_device(name, own_process=False) == torch.device("cuda", card)
    with pytest.raises(InputError, match=r"^--device cuda:3: expected auto or a device of this machine \([^()]*\)$"):
        pick_device("cuda:3", own_process=False)
    assert not chosen


@pytest.mark.parametrize("name", ["cuda", "cuda:99", "mps", "hpu", "privateuseone", "meta", "gpu", ""])
def test_a_device_that_is_not_there_is_refused_in_a_short_sentence(name):
    if name == "cuda" and torch.cuda.is_available() or name == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    with pytest.raises(InputError, match=r"^--device .*: expected auto or a device of this machine \(cpu") as caught:
        pick_device(name)
    assert len(str(caught.value)) < 120


GIB = 2**30
V2, V1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
NO_LIMIT = 9223372036854771712  # as version 1 writes it


@pytest.mark.parametrize(
    ("group", "names", "files", "free"),
    [
        ("0::/", V2, {}, 64 * GIB),
        ("0::/a/b", V2, {"a/b": (8 * GIB, 5 * GIB, "inactive_file", GIB), "a": ("max", GIB, "file", 0)}, 4 * GIB),
        ("0::/a/b", V2, {"a/b": ("max", GIB, "file", 0), "a": (6 * GIB, 5 * GIB, "inactive_file", 0)}, GIB),
        ("0::/job", V2, {"job": (2 * GIB, 3 * GIB, "file", GIB)}, 0),
        ("0::/job", V2, {"job": (900 * GIB, 0, "file", 0)}, 64 * GIB),
        ("4:cpu:/\n3:hugetlb,memory:/d\n0::/", V1, {"memory": (3 * GIB, GIB, "total_inactive_file", 9)}, 2 * GIB + 9),
        ("3:memory:/x", V1, {"memory": (NO_LIMIT, 0, "file", 0), "memory/x": (4 * GIB, GIB, "file", 0)}, 3 * GIB),
    ],
)
def test_free_memory_is_within_the_limits_of_a_container_or_a_job(monkeypatch, tmp_path, group, names, files, free):
    monkeypatch.setattr(devices, "PROC", tmp_path / "proc")
    monkeypatch.setattr(devices, "CONTROL_GROUPS", tmp_path / "groups")
    assert devices.free_memory() == float("inf"), "no Linux"
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:  {64 * 2**20} kB\n")
    assert devices.free_memory() == 64 * GIB, "no control groups"
    (tmp_path / "proc/self/cgroup").write_text(f"{group}\n")
    for folder, (*sizes, name, count) in files.items():
        folder = tmp_path / "groups" / folder
        folder.mkdir(parents=True, exist_ok=True)
        for file, size in zip(names, sizes):
            (folder / file).write_text(f"{size}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{name} {count}\n")
    assert devices.free_memory() == free


@pytest.mark.parametrize("cuda, mps, chosen", [(True, True, "cuda:0"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_takes_the_gpu_there_is(cards, monkeypatch, cuda, mps, chosen):
    cards(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto") == torch.device(chosen)


@pytest.mark.parametrize(
    "bfloat16, capability, asked, given",
    [
        (True, (9, 0), None, "bf16"), (False, (7, 5), None, "fp16"), (False, (6, 1), None, False),
        (False, (7, 5), True, "fp16"), (False, (6, 1), True, "bf16"), (True, (9, 0), "fp16", "fp16"),
        (True, (9, 0), False, False),
    ],
)
def test_mixed_precision_is_that_of_the_card(monkeypatch, capsys, bfloat16, capability, asked, given):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    args = SimpleNamespace(amp=asked, compile=False, cuda_graph=None, channels_last=True, num_workers=2)
    choose_speed(args, torch.device("cuda:0"), 10)
    assert args.amp == given and f"mixed precision {given}" in capsys.readouterr().out
    assert torch.backends.cudnn.benchmark


def test_a_cuda_graph_is_for_one_process_with_a_card():
    args = SimpleNamespace(amp=False, compile=False, channels_last=True, num_workers=2)
    for device, processes, asked, given in (
        ("cuda:0", 1, None, True), ("cuda:0", 2, None, False), ("cpu", 1, None, False), ("cuda:0", 1, False, False)
    ):
        args.cuda_graph = asked
        choose_speed(args, torch.device(device), 10, processes)
        assert args.cuda_graph is given
    check_cuda_graph(None, torch.device("cpu"), 2)
    check_cuda_graph(True, torch.device("cuda:0"), 1)
    for device, processes in (("cpu", 1), ("cuda:0", 2)):
        with pytest.raises(InputError, match="--cuda_graph: expected a CUDA card, and a single process"):
            check_cuda_graph(True, torch.device(device), processes)


def test_compile_is_refused_where_there_is_no_compiler(monkeypatch, refused, pairs_dir, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused("train", "--data_path", pairs_dir, "--save_path", tmp_path / "run", "--compile", names=["--compile", "C++"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cores, processes, loaders", [(1, 1, 1), (2, 1, 2), (16, 1, 16), (64, 1, 16), (64, 8, 8)])
def test_loader_processes_share_the_cores(monkeypatch, cores, processes, loaders):
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert loader_processes() == loaders and threads_beside(torch.device("mps")) == 0
    assert threads_beside(torch.device("cpu")) == 0 and threads_beside(torch.device("cuda:0")) == min(8, loaders)


# Threads beside the network


@pytest.mark.parametrize("threads", [0, 3])
def test_ahead_keeps_the_order_and_is_not_far_ahead(threads):
    begun, largest = [], 0

    def square(number):
        begun.append(number)
        time.sleep(0.01 * (number % 2))
        return number**2

    for count, result in enumerate(ahead(square, range(20), threads)):
        assert result == count**2
        largest = max(largest, len(begun) - count)
    assert largest <= threads + 1


def test_ahead_hands_on_an_exception_and_starts_no_more():
    begun = []

    def fail(number):
        begun.append(number)
        if number == 1:
            raise ZeroDivisionError

    results = ahead(fail, range(100), 2)
    next(results)
    with pytest.raises(ZeroDivisionError):
        list(results)
    assert len(begun) < 10


class Listening:
    """A network that doubles its images; the first call waits until ``others`` threads are waiting behind it."""

    def __init__(self, others, fail=None):
        self.batches, self.others, self.fail, self.shared = [], others, fail, None

    def __call__(self, rainy):
        while not self.batches and len(self.shared.waiting) <= self.others:
            time.sleep(0.001)
        self.batches.append(tuple(rainy.shape))
        if self.fail and len(rainy) > 1:
            raise self.fail
        return 2 * rainy


def call_together(runner, images):
    """The results of one thread an image; the first one begins alone."""
    results = {}

    def call(number):
        results[number] = runner(images[number]), runner.seconds()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(images))]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    return [results[number] for number in range(len(images))]


@pytest.mark.parametrize("fail", [None, torch.OutOfMemoryError()], ids=["", "out of memory"])
def test_threads_get_their_images_and_those_of_one_size_go_together(fail):
    images = [torch.rand(1, 3, 4, 5) for _ in range(4)] + [torch.rand(1, 3, 6, 5)]
    network = Listening(4, fail)
    network.shared = SharedRunner(network, lambda height, width: 2)
    results = call_together(network.shared, images)
    for image, (derained, seconds) in zip(images, results):
        assert torch.equal(derained, 2 * image) and seconds > 0
    sizes = [shape[0] for shape in network.batches]
    assert sizes[0] == 1 and max(sizes) == 2, "the first one began alone"
    assert sum(sizes) == 5 if fail is None else sizes.count(1) == 5
    assert not network.shared.waiting


def test_a_thread_that_fails_does_not_cost_the_others():
    def network(rainy):
        if rainy.max() > 1:
            raise ValueError("too bright")
        return rainy

    listening = Listening(4)
    listening.shared = runner = SharedRunner(lambda rainy: network(listening(rainy) / 2), lambda height, width: 2)
    results = {}

    def call(number, size, value):
        try:
            results[number] = runner(torch.full((1, 3, size, size), value)).max().item()
        except ValueError as error:
            results[number] = str(error)

    # Of two sizes, so that others wait ahead of the one that fails.
    jobs = [(2, 0.5), (3, 0.75), (2, 2.0), (3, 0.25), (4, 0.125)]
    threads = [threading.Thread(target=call, args=(number, *job)) for number, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert results == {0: 0.5, 1: 0.75, 2: "too bright", 3: 0.25, 4: 0.125} and not runner.waiting


@pytest.mark.parametrize("total, line", [(4, r"work: 1/4, about \d+ s left"), (0, "work: 1"), (None, "work: 1")])
def test_the_estimate_is_left_out_where_nobody_knows_the_number(monkeypatch, capsys, total, line):
    """Such as of a bare stream of H.264, and of a video with more frames than it declares."""
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(utils.time, "monotonic", lambda: next(clock))
    items = (number for number in range(4)) if total is None else range(4)
    assert list(utils.progress(items, "work", total or 0)) == [0, 1, 2, 3]
    first, *_ = capsys.readouterr().out.splitlines()
    assert re.fullmatch(line, first)
