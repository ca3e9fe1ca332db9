"""What goes around a ``StripRunner``, or any function like it: threads that share it, and the average of mirror images.

    python -c "import torch, runners; print(runners.self_ensemble(torch.sqrt)(torch.rand(1, 3, 4, 5)))"
"""
import threading
import time
import zlib
from dataclasses import dataclass

import torch

from checkpoints import network_options
from utils import memory_is_full


@dataclass(eq=False)  # each is itself, whatever its image
class Call:
    """An image that a thread of ``SharedRunner`` waits for."""

    rainy: torch.Tensor
    derained: torch.Tensor = None
    seconds: float = 0


class SharedRunner:
    """A runner that several threads call at the same time. It takes turns, with images of one size together.

    Args:
        runner: a ``StripRunner``, or any function from (N, 3, H, W) to (N, 3, H, W).
        at_once: function of height and width, how many images a call of ``runner`` should have.
        settings: what its results depend on (``settings_of``).
    """

    def __init__(self, runner, at_once=lambda height, width: 1, settings=None):
        self.runner, self.at_once, self.settings = runner, at_once, settings or {}
        self.turn, self.waiting, self.own = threading.Lock(), [], threading.local()

    def __call__(self, rainy):
        """(1, 3, H, W) float32 in [0, 1], on the network's device -> (1, 3, H, W) on the CPU."""
        call = Call(rainy)
        self.waiting.append(call)
        with self.turn:
            if call.derained is None:
                alike = [other for other in self.waiting if other.rainy.shape == rainy.shape and other is not call]
                calls = [call, *alike[: self.at_once(*rainy.shape[2:]) - 1]]
                try:
                    if len(calls) == 1 or not self.fits(calls):
                        self.run([call])  # others have their turn later
                finally:
                    for done in calls:
                        if done is call or done.derained is not None:
                            self.waiting.remove(done)
        self.own.seconds = call.seconds
        return call.derained

    def fits(self, calls):
        """Run several images together, or return False where they take too much memory."""
        try:
            self.run(calls)
        except RuntimeError as error:
            if not memory_is_full(error):
                raise
            return False
        return True

    def run(self, calls):
        """Run the images of these calls together."""
        started = time.perf_counter()
        images = [call.rainy for call in calls]
        results = self.runner(torch.cat(images) if len(images) > 1 else images[0]).cpu()  # waits for the device
        for call, derained in zip(calls, results.split(1)):
            call.derained, call.seconds = derained, (time.perf_counter() - started) / len(calls)

    def seconds(self):
        """What this thread's last image took, without the time in which others had their turn."""
        return self.own.seconds


def self_ensemble(runner):
    """Average a runner's results over four views: the image, its mirror image, and both upside down.

    Quarter turns are left out: a network that was trained on falling rain takes lying rain for texture.

    Args:
        runner: a ``StripRunner``, or any function from (N, 3, H, W) to (N, 3, H, W).

    Returns:
        A function of the same kind. It takes four times as long.
    """
    flips = (), (2,), (3,), (2, 3)
    return lambda rainy: sum(runner(rainy.flip(dims)).flip(dims) for dims in flips) / len(flips)


def settings_of(runner, ensemble):
    """What the results of a ``StripRunner`` depend on beside the picture, in values that JSON can hold.

    Equal weights count as equal, whatever file they are from; ``ensemble`` is whether ``self_ensemble`` is around it.
    """
    weights = 0
    for name, tensor in runner.net.state_dict().items():
        weights = zlib.crc32(tensor.cpu().numpy().tobytes(), zlib.crc32(name.encode(), weights))
    options = network_options(runner.net)
    return {"weights": weights, **options, "precision": str(runner.dtype), "self_ensemble": bool(ensemble)}
