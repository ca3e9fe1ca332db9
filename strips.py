"""The strips of an image, the feature maps that they are part of, and the threads that share them.

    python -c "from strips import strip_rows; print(*(strip_rows(width) for width in (481, 1920, 4288)))"

prints how many rows a strip has in images of these widths; fewer where there are many cores.
"""
import math
import mmap
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

from devices import free_memory
from networks import DILATIONS
from utils import RunError, reserve

MARGIN = max(DILATIONS)  # rows of zeros above and below a feature map, as padding for any of the convolutions
STRIP_BYTES = 2048  # for each pixel of a strip on a GPU: 768 of the LSTM's tensors in float32, and cuDNN's workspace
SMALLEST_STRIP = 2**14  # pixels


# How large a strip is


def strip_rows(width, pixels=None, small=False):
    """Number of rows of a strip, for an image of this width in pixels.

    On a GPU, ``pixels`` says how many pixels a strip may have: ``strip_pixels``.

    On a CPU a strip should be small, to stay in the cache, but have many rows, because each strip also reads the
    rows around it that its convolution sees (up to 16 above and below). The fastest numbers of rows that were found
    for widths of 481, 1920 and 4288 are 48, 16 and 16, and so is the rule. At 481, 32 rows are 5 % slower. The number
    is a multiple of every dilation, as ``dilated_conv`` wants it.

    Args:
        width: of the image.
        pixels: of a strip on a GPU; None on a CPU.
        small: whether the layer needs much memory a pixel and reads at most two rows around a strip, as the LSTM
            does. Its strips are smaller: at 321x481 it is as fast in 8 rows as in 32, and the whole run takes 60
            bytes less for each pixel of the image.
    """
    if pixels:
        return max(1, pixels // width)
    return max(4, round(2**12 / width)) if small else MARGIN * max(1, round(1.5 * 2**10 / width))


def strip_pixels(device, maps):
    """Pixels of a strip on a GPU: a million, which keep it busy, or as many as its free memory has room for.

    Args:
        device: a torch.device.
        maps: bytes of the feature maps, which take their part of the memory.

    Returns:
        The number of pixels, less than ``SMALLEST_STRIP`` where the maps themselves do not fit; None on a CPU.
    """
    if device.type == "cpu":
        return None
    return int(max(1, min(2**20, (free_memory(device) - maps) / STRIP_BYTES)))


# Feature maps


class FeatureMap:
    """The features of a whole image, with rows of zeros above and below that serve convolutions as zero padding.

    They are stored channels-last, so that the rows of a strip are contiguous in memory and no layer copies them.

    Args:
        channels, height, width: of the features.
        dtype, device: of the features.
        on_disk: map them to a temporary file instead of taking memory (CPU only).
        margin: number of rows of zeros above, and below.

    Raises:
        RunError: ``on_disk``, and the file system has no room for the file.
    """

    strip_pixels = None  # of a strip, on a GPU

    def __init__(self, channels, height, width, dtype, device, on_disk=False, margin=MARGIN):
        shape = (1, height + 2 * margin, width, channels)
        if on_disk:
            # The file loses its name as soon as it is mapped, so it goes with the process, however that ends.
            with tempfile.NamedTemporaryFile() as file:
                try:
                    reserve(file, math.prod(shape) * dtype.itemsize)
                except OSError as error:
                    raise RunError(
                        f"{file.name}: no room for a feature map of {width}x{height} ({error.strerror}); expected a"
                        " larger --max_memory, or TMPDIR to name a folder with room"
                    ) from None
                flat = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype)
        elif torch.device(device).type == "cpu":
            # A mapping of its own goes back to the system when the map is deleted. What torch.empty gets from malloc
            # stays with the process in pieces: after images of several sizes, five times as much memory.
            # Private memory, where there is the choice (not on Windows): it is less work for the system than shared.
            private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
            flat = torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **private), dtype=dtype)
        else:
            flat = torch.empty(math.prod(shape), dtype=dtype, device=device)
        self.data = flat.view(shape).permute(0, 3, 1, 2)  # (1, channels, height + 2 * margin, width)
        self.height, self.margin = height, margin
        self.data[:, :, :margin] = self.data[:, :, margin + height :] = 0

    def rows(self, start, stop, halo=0):
        """(1, C, stop - start + 2 * halo, W) view of the rows [start - halo, stop + halo); ``halo`` <= margin."""
        return self.data[:, :, self.margin + start - halo : self.margin + stop + halo]

    def strips(self, small=False):
        """List of (start, stop), the first row of each strip and the row after its last."""
        step = strip_rows(self.data.shape[3], self.strip_pixels, small)
        if self.data.device.type == "cpu":  # low enough that each core has one, down to what the dilations allow
            step = min(step, MARGIN * max(1, self.height // (MARGIN * torch.get_num_threads())))
        return [(start, min(start + step, self.height)) for start in range(0, self.height, step)]


# Threads


@lru_cache
def strip_threads(count):
    """``count`` threads that each use one core, for whole strips of an image.

    PyTorch would use all cores within each operation instead. An operation on a strip takes less than a millisecond,
    and at the end of each the cores wait for one another, spinning: beside another program, which takes a core for
    longer than that, an image then takes ten times as long. These threads wait for one another once a layer, asleep.
    """
    ready = threading.Barrier(count + 1)

    def begin():
        torch.get_num_threads()  # the first use of the setting in a thread would replace what is set before it
        torch.set_num_threads(1)
        ready.wait()

    threads = ThreadPoolExecutor(count, "strip", initializer=begin)
    try:
        for _ in range(count):
            threads.submit(int)
        ready.wait()
    except BaseException:
        ready.abort()  # or the threads would wait for ever
        raise
    finally:
        torch.set_num_threads(count)  # what a thread sets holds for later ones too
    return threads


STARTING = threading.Lock()  # held while threads start, as a thread that first looks at the setting then would keep 1


def threads_of(device):
    """The ``strip_threads`` for maps on a device, and their count: (None, 1) on a GPU or where there is one thread."""
    with STARTING:
        count = torch.get_num_threads()
        return (strip_threads(count), count) if device.type == "cpu" and count > 1 else (None, 1)


def in_one_thread(device, function, *arguments):
    """Call function(*arguments), on a CPU in one of the ``strip_threads``, and return its result.

    The caller's own operations would use all cores, however short they are, and after each of them OpenMP's threads
    go on spinning for some milliseconds: once a layer, that took a tenth of an image's time from the strips.
    """
    threads, _ = threads_of(device)
    if threads is None:
        return function(*arguments)
    return threads.submit(torch.inference_mode()(function), *arguments).result()


def for_each(function, strips, device):
    """Call function(start, stop) for each strip; on a CPU, each core has one strip at a time.

    Each core takes the next strip when it has done one, and the caller is woken once, at the end: a future for each
    strip would take a tenth of the time. Where there are fewer strips than cores, all cores work within the
    operations on each strip.
    """
    threads, count = threads_of(device)
    if threads is None or len(strips) < count:
        for strip in strips:
            function(*strip)
        return
    waiting = iter(strips)

    @torch.inference_mode()  # the mode is that of a thread
    def work():
        for strip in waiting:
            function(*strip)

    try:
        for worker in [threads.submit(work) for _ in range(count)]:
            worker.result()
    finally:
        for _ in waiting:  # after an error or Ctrl-C the other threads find no further strip
            pass


# Sums over all strips


def column_sums(rows):
    """Sum over the rows of a strip: (1, C, R, W), channels-last -> (W, C) float32."""
    _, channels, height, width = rows.shape
    # The sum over this view with two dimensions is ten times as fast as rows.sum(2). Rows in bfloat16 are summed up
    # in float32 inside the kernel and rounded once, at the end; asking for a float32 sum would convert all rows
    # first, which takes five times as long.
    flat = rows.permute(0, 2, 3, 1).reshape(height, width * channels)
    dtype = torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float32
    return flat.sum(0, dtype=dtype).float().view(width, channels)


class ColumnSums:
    """Adds up the ``column_sums`` of a layer's strips, in the order of the strips, whichever core is done first.

    So the total is the same each time, and what has been added takes no more memory.
    """

    def __init__(self):
        self.total, self.row, self.early, self.adding = 0, 0, {}, threading.Lock()

    def add(self, start, stop, rows):
        """Add the sums of a strip: its first row, the row after its last, and (1, C, stop - start, W) its features."""
        sums = column_sums(rows)
        with self.adding:
            self.early[start] = stop, sums
            while self.row in self.early:
                self.row, sums = self.early.pop(self.row)
                self.total = self.total + sums
