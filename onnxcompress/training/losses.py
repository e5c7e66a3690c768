"""Losses, written as nodes of the training graph in the notation of `autodiff.tensor`.

All take `weight`, one number a position (a sample, a token, a pixel): 0 leaves it out. A loss is the weighted mean over
positions. `axis` is that of the classes; `z` are the student's logits, `t` the teacher's.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.autodiff.tensor import Operand, Tensor

TOTAL = ".total"
LEAST = 1e-6  # of a sum of weights


def mean(loss: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over positions, a scalar; 0 where every weight is 0."""
    return (loss * weight).sum(keep=False) / total(weight)


def total(weight: Tensor) -> Tensor:
    """The sum of the weights, a scalar.

    Where they are fed, their sum is fed, too (`<name>.total`): it is over all calls of a step, so that their losses and
    gradients add up to those of the whole batch, however its positions are spread over the calls.
    """
    b, value = weight.b, weight.value
    if not value.is_graph_input():
        return b.op("Max", weight.sum(keep=False), b.constant(LEAST, weight.dtype), shape=())
    name = f"{value.name}{TOTAL}"
    found = next((other for other in b.graph.inputs if other.name == name), None)
    if found is None:
        found = ir.Value(name=name, type=value.type, shape=ir.Shape([]))
        b.graph.inputs.append(found)
    return b.wrap(found)


def cross_entropy(z: Tensor, labels: Tensor, weight: Tensor, axis: int, smoothing: float = 0.0) -> Tensor:
    """-log softmax(z)[label]; `labels` int64, shaped like `z` without `axis`.

    With smoothing s the target is (1 - s) onehot + s / classes (Szegedy et al., 2016).
    """
    logs = z.b.op("LogSoftmax", z, shape=z.shape, axis=axis)
    hot = one_hot(labels, z, axis)
    picked = -_sum(logs * hot, axis)
    if smoothing:
        uniform = -logs.reduce("ReduceMean", [axis], keep=False)
        picked = picked * (1 - smoothing) + uniform * smoothing
    return mean(picked, weight)


def cross_entropy_of(z: Tensor, labels: Tensor, weight: Tensor, axis: int, smoothing: float = 0.0) -> Tensor:
    """-sum of label * log softmax(z), for labels that are distributions over the classes, shaped like `z`."""
    logs = z.b.op("LogSoftmax", z, shape=z.shape, axis=axis)
    loss = -_sum(logs * labels, axis)
    if smoothing:
        loss = loss * (1 - smoothing) - logs.reduce("ReduceMean", [axis], keep=False) * smoothing
    return mean(loss, weight)


def soft_targets(z: Tensor, t: Tensor, weight: Tensor, axis: int, temperature: float, squared: bool = True) -> Tensor:
    """T^2 KL(softmax(t / T) || softmax(z / T)) (Hinton, Vinyals, Dean, 2015).

    T^2 keeps the gradient's size the same for every temperature; `squared=False` leaves it out.
    """
    b = z.b
    p = b.op("Softmax", t / temperature, shape=t.shape, axis=axis)
    log_p = b.op("LogSoftmax", t / temperature, shape=t.shape, axis=axis)
    log_q = b.op("LogSoftmax", z / temperature, shape=z.shape, axis=axis)
    loss = mean(_sum(p * (log_p - log_q), axis), weight)
    return loss * (temperature * temperature) if squared else loss


def binary_cross_entropy(z: Tensor, target: Tensor, weight: Tensor, axis: int, smoothing: float = 0.0) -> Tensor:
    """Sum over labels of log(1 + e^z) - z * target: each entry along `axis` is a yes or no by itself.

    With smoothing s the target is (1 - s) target + s / 2.
    """
    if smoothing:
        target = target * (1 - smoothing) + smoothing / 2
    return mean(_sum(z.map("Softplus") - z * target, axis), weight)


def binary_soft_targets(
    z: Tensor, t: Tensor, weight: Tensor, axis: int, temperature: float, squared: bool = True
) -> Tensor:
    """The binary cross-entropy of sigmoid(z / T) against sigmoid(t / T), times T^2, less its least value.

    That is subtracted number by number: the rounding of a sum over many labels would be all that is left near it.
    """
    mine, theirs = z / temperature, t / temperature
    apart = mine.map("Softplus") - theirs.map("Softplus") - theirs.map("Sigmoid") * (mine - theirs)
    loss = mean(_sum(apart, axis), weight)
    return loss * (temperature * temperature) if squared else loss


def squared_error(z: Tensor, t: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Mean over `axis` of (z - t)^2."""
    difference = z - t
    return mean((difference * difference).reduce("ReduceMean", [axis], keep=False), weight)


def cosine_distance(z: Tensor, t: Tensor, weight: Tensor, axis: int) -> Tensor:
    """1 - cos(z, t) along `axis`."""
    inner = _sum(z * t, axis)
    norms = (_sum(z * z, axis) * _sum(t * t, axis) + 1e-12).map("Sqrt")
    return mean(1 - inner / norms, weight)


def l1_penalty(w: Tensor) -> Tensor:
    """Sum of |w|, which pushes weights to zero."""
    return w.map("Abs").sum(keep=False)


def mix(hard: Tensor | None, soft: Tensor | None, alpha: float) -> Tensor:
    """alpha * hard + (1 - alpha) * soft; the one there is where the other is missing."""
    if hard is None or soft is None:
        found = soft if hard is None else hard
        assert found is not None
        return found
    return hard * alpha + soft * (1 - alpha)


def one_hot(labels: Tensor, z: Tensor, axis: int) -> Tensor:
    """1 at the label's place along `axis`, 0 elsewhere, in the shape and type of `z`."""
    b, depth = z.b, z.size(axis % (z.rank or 1))
    count: Operand = b.constant(depth) if isinstance(depth, int) else depth.reshape([])
    assert isinstance(count, Tensor)
    values = b.op("Cast", b.ints([0, 1]), dtype=z.dtype, to=int(z.dtype))
    return b.op("OneHot", labels, count, values, dtype=z.dtype, shape=z.shape, axis=axis)


def _sum(x: Tensor, axis: int) -> Tensor:
    return x.reduce("ReduceSum", [axis], keep=False)
