"""Convolutions, their transposes and their weights' gradients in the blocked layout."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import onnx_ir as ir

from onnxcompress.autodiff.rules.convolution import WeightGradient
from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.training.blocked.layout import node as blocked_node
from onnxcompress.training.blocked.layout import sizes, turned

if TYPE_CHECKING:
    from onnxcompress.training.blocked.lowering import Lowering

FLOAT = ir.DataType.FLOAT
FEW_OUTPUTS = 64


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A two-dimensional convolution whose sizes are all known. `pads`: top, left, bottom, right."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]
    group: int

    @property
    def spans(self) -> list[int]:
        """How far a dilated kernel reaches beyond its first element."""
        return [(k - 1) * d for k, d in zip(self.kernel, self.dilations, strict=True)]


def geometry(node: ir.Node, w: ir.Value) -> Geometry | None:
    """What `node` says, where it is two-dimensional and its padding a number."""
    shape = _known(w)
    if shape is None or len(shape) != 4 or node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    kernel = (shape[2], shape[3])
    strides = tuple(node.attributes.get_ints("strides", [1, 1]))
    dilations = tuple(node.attributes.get_ints("dilations", [1, 1]))
    pads = tuple(node.attributes.get_ints("pads", [0] * 4))
    if node.attributes.get_string("auto_pad", "NOTSET") == "VALID":
        pads = (0, 0, 0, 0)
    if min(pads) < 0:
        return None
    return Geometry(kernel, strides, dilations, pads, node.attributes.get_int("group", 1))  # type: ignore[arg-type]


def conv(lowering: Lowering, node: ir.Node) -> Tensor | None:
    """Conv on blocked kernels: depthwise, with few input channels straight from the plain image, or in general."""
    x, w = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    given = _usable(x, w, node.outputs[0])
    form = geometry(node, w) if given and w is not None else None
    if given is None or form is None or x is None or w is None:
        return None
    image, kernel, result = given
    layout, channels, outputs = lowering.layout, image[1], kernel[0]
    if form.group != 1 and not _depthwise(form, channels, outputs):
        return None
    group = 1
    if form.group != 1:
        source, group = lowering.enter(x), layout.padded(channels)
        filters = _once(lowering, w, "depthwise")
    elif channels < layout.size and x not in lowering.blocked:
        source, filters = lowering.b.wrap(x), _once(lowering, w, "few")
    else:
        source, filters = lowering.enter(x), _once(lowering, w, "forward")
    added = None if bias is None else lowering.b.wrap(bias)
    if added is not None and (added.shape is None or not all(isinstance(size, int) for size in added.shape)):
        added = added.reshape([outputs])  # an exporter's zeros, expanded at run time
    grown = None if added is None else layout.channels(added, 0)
    return _run(lowering, source, filters, grown, form, form.pads, (result[0], result[2], result[3]), outputs, group)


def conv_transpose(lowering: Lowering, node: ir.Node) -> Tensor | None:
    """ConvTranspose as the convolution it is, with kernels turned around.

    Strides: depthwise, the gradient is spread out with zeros first; a 1x1 kernel, the result is; else it stays.
    """
    g, w = node.inputs[0], node.inputs[1]
    given = _usable(g, w, node.outputs[0])
    form = geometry(node, w) if given and w is not None else None
    if given is None or form is None or g is None or w is None or (len(node.inputs) > 2 and node.inputs[2] is not None):
        return None
    image, _, result = given
    layout, outputs = lowering.layout, result[1]
    depthwise = form.group != 1
    if depthwise and not _depthwise(form, image[1], outputs):
        return None
    strided = max(form.strides) > 1
    pointwise = form.kernel == (1, 1) and not any(form.pads)
    if strided and not depthwise and not pointwise:
        return None
    source = lowering.enter(g)
    filters = _once(lowering, w, "depthwise turned" if depthwise else "backward")
    group = layout.padded(outputs) if depthwise else 1
    plain = dataclasses.replace(form, strides=(1, 1))
    if strided and pointwise and not depthwise:
        found = _run(lowering, source, filters, None, plain, (0,) * 4, (image[0], image[2], image[3]), outputs, group)
        return _spread(lowering, found, form.strides, result[2:])
    within = image[2:]
    if strided:
        within = [(size - 1) * s + 1 for size, s in zip(image[2:], form.strides, strict=True)]
        source = _spread(lowering, source, form.strides, within)
    before = [span - p for span, p in zip(form.spans, form.pads, strict=False)]
    after = [r - s + span - p for r, s, span, p in zip(result[2:], within, form.spans, before, strict=True)]
    if min(*before, *after) < 0:
        return None
    return _run(
        lowering, source, filters, None, plain, (*before, *after), (result[0], result[2], result[3]), outputs, group
    )


def weight_gradient(lowering: Lowering, asked: WeightGradient) -> Tensor | None:
    """dW [M, C/G, h, w] from blocked images."""
    x, dy = lowering.named.get(asked.image), lowering.named.get(asked.g)
    if x is None or dy is None or x.dtype != FLOAT or dy.dtype != FLOAT or asked.pads is None or min(asked.pads) < 0:
        return None
    image, g = _known(x), _known(dy)
    if image is None or g is None or len(image) != 4:
        return None
    if asked.group == 1:
        return _by_rows(lowering, asked, x, dy)
    if asked.group == image[1] == g[1]:
        return _depthwise_gradient(lowering, asked, x, dy)
    return None


def _by_rows(lowering: Lowering, asked: WeightGradient, x: ir.Value, dy: ir.Value) -> Tensor:
    """One product a kernel element: g [N L, M] transposed times what that element sees [N L, C].

    With channels last, what an element sees is cut out in whole rows of the image.
    """
    b, image, g = lowering.b, _known(x) or [], _known(dy) or []
    (n, c, _, _), (_, m, high, wide) = image, g
    top, left, bottom, right = asked.pads or (0,) * 4
    few = m <= FEW_OUTPUTS and asked.kernel != (1, 1)  # then products are faster with g turned beforehand
    if few:
        rows = lowering.channels_first(dy).reshape([m, n * high * wide])
    else:
        rows = lowering.channels_last(dy).reshape([n * high * wide, m])
    seen = lowering.channels_last(x)
    if any(asked.pads or ()):
        shape = (n, image[2] + top + bottom, image[3] + left + right, c)
        seen = b.op("Pad", seen, b.ints([0, top, left, 0, 0, bottom, right, 0]), shape=shape)
    taps = []
    for i in range(asked.kernel[0]):
        for j in range(asked.kernel[1]):
            starts = [i * asked.dilations[0], j * asked.dilations[1]]
            ends = [
                start + (size - 1) * stride + 1
                for start, size, stride in zip(starts, (high, wide), asked.strides, strict=True)
            ]
            whole = sizes(seen)[1:3] == [high, wide] and starts == [0, 0]
            tap = seen if whole else seen.slice([1, 2], list(starts), list(ends), asked.strides)
            product = b.op("Gemm", rows, tap.reshape([n * high * wide, c]), transA=int(not few), shape=(m, c))
            taps.append(product.reshape([m, c, 1]))
    joined = taps[0] if len(taps) == 1 else b.op("Concat", *taps, axis=2, shape=(m, c, len(taps)))
    return joined.reshape([m, c, *asked.kernel])


def _depthwise_gradient(lowering: Lowering, asked: WeightGradient, x: ir.Value, dy: ir.Value) -> Tensor:
    """A depthwise convolution of every channel of every sample by its own gradient, then the sum over the samples."""
    layout, b = lowering.layout, lowering.b
    image, g = _known(x) or [], _known(dy) or []
    n, c, size = image[0], layout.padded(image[1]), layout.size
    top, left, bottom, right = asked.pads or (0,) * 4
    room = [
        (image[2] + top + bottom - ((g[2] - 1) * asked.strides[0] + 1)) // asked.dilations[0] + 1,
        (image[3] + left + right - ((g[3] - 1) * asked.strides[1] + 1)) // asked.dilations[1] + 1,
    ]
    images = lowering.enter(x).reshape([1, n * c, image[2], image[3]])
    kernels = lowering.enter(dy).reshape([n * c, 1, g[2], g[3]])
    found = blocked_node(
        b,
        "Conv",
        images,
        kernels,
        shape=(1, n * c, *room),
        group=n * c,
        kernel_shape=g[2:],
        pads=list(asked.pads or ()),
        strides=list(asked.dilations),
        dilations=list(asked.strides),
    )
    summed = found.reshape([n, c // size, *room, size]).sum(0, keep=False)
    summed.value.shape = ir.Shape([c // size, *room, size])
    whole = summed.transpose([0, 3, 1, 2]).reshape([c, 1, *room])
    if c == image[1] and tuple(room) == asked.kernel:
        return whole
    cut = whole.slice([0, 2, 3], [0, 0, 0], [image[1], *asked.kernel])
    cut.value.shape = ir.Shape([image[1], 1, *asked.kernel])
    return cut


def _run(
    lowering: Lowering,
    source: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    form: Geometry,
    pads: tuple[int, ...],
    result: tuple[int, int, int],
    outputs: int,
    group: int,
) -> Tensor:
    n, high, wide = result
    return blocked_node(
        lowering.b,
        "Conv",
        source,
        filters,
        bias,
        shape=(n, lowering.layout.padded(outputs), high, wide),
        group=group,
        kernel_shape=list(form.kernel),
        pads=list(pads),
        strides=list(form.strides),
        dilations=list(form.dilations),
    )


def _spread(lowering: Lowering, x: Tensor, strides: tuple[int, int], within: list[int]) -> Tensor:
    """A blocked image with zeros between its rows and columns, cut or filled up to the size `within`."""
    b, layout = lowering.b, lowering.layout
    n, blocks, h, w, size = sizes(layout.open(x))
    down, across = strides
    apart = layout.open(x).reshape([n, blocks, h, 1, w, 1, size])
    pads = [0] * 7 + [0, 0, 0, down - 1, 0, across - 1, 0]
    wide = b.op("Pad", apart, b.ints(pads), shape=(n, blocks, h, down, w, across, size))
    spread = wide.reshape([n, blocks, h * down, w * across, size])
    over = [max(0, have - want) for have, want in zip((h * down, w * across), within, strict=True)]
    under = [max(0, want - have) for have, want in zip((h * down, w * across), within, strict=True)]
    if any(over):
        spread = spread.slice([2, 3], [0, 0], list(within))
    elif any(under):
        spread = b.op("Pad", spread, b.ints([0] * 7 + [*under, 0]))
    spread.value.shape = ir.Shape([n, blocks, *within, size])
    return layout.close(spread)


def _once(lowering: Lowering, w: ir.Value, form: str) -> Tensor:
    """The weight in one of its forms, made once however often it is used."""
    key = (w, form)
    if key not in lowering.weights:
        plain, layout = lowering.b.wrap(w), lowering.layout
        if form in ("depthwise", "few"):
            found = layout.weight_by_outputs(plain)
        elif form == "depthwise turned":
            found = layout.weight_by_outputs(turned(plain))
        else:
            found = layout.weight(plain, transposed=form == "backward")
        lowering.weights[key] = found
    return lowering.weights[key]


def _depthwise(form: Geometry, channels: int, outputs: int) -> bool:
    return form.group == channels == outputs


def _usable(x: ir.Value | None, w: ir.Value | None, y: ir.Value) -> tuple[list[int], list[int], list[int]] | None:
    """The three shapes, where they are those of float32 images with known sizes."""
    if x is None or w is None or x.dtype != FLOAT or w.dtype != FLOAT:
        return None
    shapes = [_known(value) for value in (x, w, y)]
    if any(shape is None or len(shape) != 4 or 0 in shape for shape in shapes):
        return None
    return shapes[0], shapes[1], shapes[2]  # type: ignore[return-value]


def _known(value: ir.Value) -> list[int] | None:
    if value.shape is None or not all(isinstance(size, int) for size in value.shape):
        return None
    return [size for size in value.shape if isinstance(size, int)]
