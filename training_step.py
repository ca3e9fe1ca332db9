"""One step of training: forward and backward pass, on a GPU as a CUDA graph, then clipping and the optimizers.

    python -c "from training_step import CudaGraph; help(CudaGraph)"
"""
from functools import partial

import torch

from devices import HALF_PRECISIONS
from losses import batch_psnr

WARM_UP = 3  # passes before a graph is recorded: cuDNN chooses kernels, and torch.compile compiles


def differentiate(args, model, criterion, scaler, rainy, clean, now):
    """The forward and backward pass of a batch, which leaves its gradients in ``.grad`` of the parameters.

    None of its numbers is looked at, as that would wait for the device.

    Args:
        args: of train.py; its ``amp`` has been resolved by ``devices.choose_speed``.
        model, criterion: the network and ``losses.DerainLoss``.
        scaler: a ``GradScaler``, enabled with fp16 only.
        rainy, clean: (N, 3, P, P) float32 in [0, 1] on the device.
        now: ``schedule.Conditions``.

    Returns:
        (derained, terms): (N, 3, P, P) and {name: scalar tensor} of all terms, "loss" and "psnr", without gradient.
    """
    with torch.autocast(rainy.device.type, HALF_PRECISIONS.get(args.amp), enabled=bool(args.amp)):
        *earlier, derained = model(rainy, return_stages=True, recurrent_iter=now.recurrent_iter)[1]
        derained = derained.float()
        loss, terms = criterion(derained, clean, rainy, now.left_out, earlier)
    scaler.scale(loss).backward()
    derained = derained.detach()
    terms |= {"loss": loss, "psnr": batch_psnr(derained, clean)}
    return derained, {name: value.detach() for name, value in terms.items()}


class CudaGraph:
    """``differentiate`` recorded as a CUDA graph, so that the card need not wait until Python has queued each kernel.

    It is recorded anew where the number of stages, the loss terms or the shape of the batch change.

    Args:
        parameters: those that get a gradient.
        function: called with ``rainy``, ``clean`` and ``now`` as ``differentiate`` is. What it launches must depend on
            nothing else that changes.
    """

    def __init__(self, parameters, function):
        self.parameters, self.function, self.recorded = list(parameters), function, None

    def __call__(self, rainy, clean, now):
        """As ``differentiate``; the next call overwrites what is returned."""
        of = now.recurrent_iter, now.left_out, rainy.shape
        if of != self.recorded:
            self.record(rainy, clean, now)
            self.recorded = of
        for kept, given in zip(self.batch, (rainy, clean)):
            kept.copy_(given)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients):
            parameter.grad = gradient
        return self.results

    def forget_gradients(self):
        """So that the next backward pass writes new ones instead of adding to these."""
        for parameter in self.parameters:
            parameter.grad = None

    def record(self, rainy, clean, now):
        """Run ``function`` a few times on copies of the batch, then record it; no weight changes."""
        self.graph = self.results = self.gradients = None  # gives back their memory
        self.batch = rainy.clone(), clean.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.forget_gradients()
                self.function(*self.batch, now)
            self.forget_gradients()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, which bring the next batch to the device, may go on with that.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.results = self.function(*self.batch, now)
        self.gradients = [parameter.grad for parameter in self.parameters]


def build_pass(args, net, model, criterion, scaler):
    """How a run differentiates a batch: ``differentiate``, with ``args.cuda_graph`` as a ``CudaGraph``.

    Args:
        net: the network itself, whose parameters get the gradients.
        model: ``net``, or what torch.compile or DistributedDataParallel has made of it.
    """
    function = partial(differentiate, args, model, criterion, scaler)
    return CudaGraph(net.parameters(), function) if args.cuda_graph else function


def take_step(args, net, differentiated, optimizers, scaler, batch, now):
    """Take a step on a batch, without waiting for the device (but by the scaler, which with fp16 looks whether a
    gradient has overflowed).

    Args:
        net: the network.
        differentiated: from ``build_pass``.
        optimizers, scaler: of its parameters.
        batch, now: as for ``differentiate``.

    Returns:
        As ``differentiate``.
    """
    results = differentiated(*batch, now)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = now.learning_rate
        scaler.unscale_(optimizer)
    if args.clip_grad:
        torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip_grad)
    for optimizer in optimizers:
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return results
