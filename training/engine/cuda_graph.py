"""A training step as one CUDA graph: gradients of all micro-batches, clipping, the decision to skip, and the update.

A graph replays the launches of one step with no work on the host in between, on the same memory each time. So a step's shapes
must not change, nothing in it may wait for the device, and what differs between steps has a fixed place: batches are copied into
the graph's own, and the learning rate is a tensor. Whether a gradient is finite, and so the step made, is decided on the device.
"""

import math
import os

import torch

WARM_UP = 3  # steps that run as they come before one is captured: libraries load, kernels compile and are tuned


class CaptureError(RuntimeError):
    """The step cannot be captured; the message says why."""


def capture_problem(run, device, world_size):
    """Why a pre-training run with this section ``run`` cannot have its step captured, in a few words; None where it can."""
    if device.type != "cuda":
        return f"a CUDA graph needs a CUDA device, and this run is on {device.type}"
    if world_size > 1:
        return f"gradients exchanged between processes ({run.parallel}, {world_size} of them) are not captured; use one process"
    if os.environ.get("STMAE_DEBUG", "0") not in ("", "0"):
        return "STMAE_DEBUG has the host check token ids, which a capture does not allow"
    return None


def make_capturable(optimizer, device):
    """Has the optimizer read its learning rates from tensors on the device (``set_learning_rate``) and keep nothing on the host.

    Raises:
        CaptureError: an optimizer that cannot leave out an update on the device.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False) or "capturable" not in optimizer.defaults:
        name = type(optimizer).__name__
        raise CaptureError(f"run.cuda_graph: {name} cannot skip an update on the device; expected torch's AdamW with fused=True")
    for group in optimizer.param_groups:
        group["capturable"] = True
        group["lr"] = torch.full((), float(group["lr"]), dtype=torch.float32, device=device)


class GraphedStep:
    """Calls a training step, and after WARM_UP calls replays a graph of it.

    loss: micro-batch -> scalar loss, all of whose work is on ``device``.
    parameters, optimizer: what is trained, and the optimizer after ``make_capturable``.
    clip_grad: the largest gradient norm; None or 0: no clipping.
    """

    def __init__(self, loss, parameters, optimizer, *, clip_grad, device):
        self.loss, self.parameters, self.optimizer = loss, parameters, optimizer
        self.clip_grad, self.device = clip_grad, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.calls = 0
        self.inputs = None  # the graph's own micro-batches
        self.replay = self.result = None

    def __call__(self, micro_batches):
        """A step on a list of micro-batches, dicts of tensors on any device. Returns its loss and gradient norm, tensors [] on
        ``device``; where one of them is not finite, the step has changed nothing.

        Micro-batches of other shapes than the captured ones' are computed without the graph.

        Raises:
            CaptureError: the step does something that cannot be captured.
        """
        self.calls += 1
        if self.calls <= WARM_UP or (self.replay is not None and not self._fit(micro_batches)):
            return self._on_side_stream(self._moved(micro_batches))
        if self.replay is None:
            self.inputs = self._moved(micro_batches)
            self.optimizer.zero_grad(set_to_none=True)  # the graph's backward makes its own
            try:
                self.replay, self.result = self._capture(lambda: self._step(self.inputs))
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                raise CaptureError(f"run.cuda_graph: the step cannot be captured: {reason}; set it to false") from error
        for mine, given in zip(self.inputs, micro_batches, strict=True):
            for name, value in given.items():
                mine[name].copy_(value, non_blocking=True)
        self.replay()
        return self.result

    def _step(self, micro_batches):
        total = torch.zeros((), device=self.device)
        for batch in micro_batches:
            loss = self.loss(batch) / len(micro_batches)
            loss.backward()
            total = total + loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_grad or math.inf)
        finite = total.isfinite() & norm.isfinite()
        # The fused kernel reads it, as it does for a GradScaler, and leaves weights, moments and its count of steps as they are.
        self.optimizer.found_inf = finite.logical_not().float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm

    def _moved(self, micro_batches):
        return [{k: v.to(self.device, non_blocking=True, copy=True) for k, v in batch.items()} for batch in micro_batches]

    def _fit(self, micro_batches):
        return _shapes(micro_batches) == _shapes(self.inputs)

    def _on_side_stream(self, micro_batches):
        """On the stream that a capture takes: what is made once for a stream, as cuBLAS's workspace is, is then there."""
        if self.stream is None:
            return self._step(micro_batches)
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = self._step(micro_batches)
        current.wait_stream(self.stream)
        return result

    def _capture(self, step):
        """(function that replays, the tensors that each replay writes)"""
        graph = torch.cuda.CUDAGraph()
        # The loader's thread pins memory meanwhile: only this thread's calls belong to the capture.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            result = step()
        return graph.replay, result


def _shapes(micro_batches):
    return [{name: (value.shape, value.dtype) for name, value in batch.items()} for batch in micro_batches]
