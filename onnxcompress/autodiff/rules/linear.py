"""Matrix products."""

from __future__ import annotations

from onnxcompress.autodiff.rule import Context, Grads, rule
from onnxcompress.autodiff.tensor import Tensor


@rule("MatMul")
def matmul(c: Context) -> Grads:
    """Y = A B: dA = G B^T, dB = A^T G, summed over the axes of a stack that was broadcast.

    A matrix that multiplies a whole stack from the right, the usual weight, gets its gradient in one product: all rows
    of the stack become rows of one tall matrix.
    """
    (a, b), g = c.x, c.g
    if a.rank is None and b.rank == 2:
        return [g @ b.swap(), _tall_product(a, g, b)]
    if a.rank is None or b.rank is None:  # then none of them is a vector, or the transposition fails when it runs
        return [(g @ b.swap()).unbroadcast(a), (a.swap() @ g).unbroadcast(b)]
    rank_a, rank_b = a.rank, b.rank
    # Vectors become matrices, as the operator defines: a row on the left, a column on the right.
    left = a.unsqueeze(0) if rank_a == 1 else a
    right = b.unsqueeze(1) if rank_b == 1 else b
    rank = max(rank_a, rank_b, 2)
    if rank_b == 1:
        g = g.unsqueeze(rank - 1 if rank_a > 1 else 0)
    if rank_a == 1:
        g = g.unsqueeze(rank - 2)
    da = g @ right.swap()
    db = _tall_product(left, g, right) if right.rank == 2 else stacked_product(left, g, right).unbroadcast(right)
    return [da.unbroadcast(left).reshape_like(a), db.reshape_like(b)]


def _tall_product(a: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """A^T G with all rows of a stack below each other, for a matrix B [K, N]."""
    tall = a if a.rank == 2 else a.reshape([-1, b.size(0)])
    rows = g if a.rank == 2 else g.reshape([-1, b.size(1)])
    return a.b.op("Gemm", tall, rows, transA=1, shape=b.shape)


def stacked_product(a: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """A^T G; as (G^T A)^T where G is the narrower one, which is faster, if that last transposition merges with another.

    It does where B itself came out of one. A free dimension (a length) counts as wider than a known one (a head).
    """
    producer, (rows, columns) = b.value.producer(), b.shape[-2:] if b.shape else (None, None)
    narrow = isinstance(columns, int) and (not isinstance(rows, int) or columns < rows)
    if narrow and producer is not None and producer.op_type == "Transpose":
        return (g.swap() @ a).swap()
    return a.swap() @ g


@rule("Gemm")
def gemm(c: Context) -> Grads:
    """dA = alpha g B', dB = alpha A' g, transposed where A or B was; dC = beta g"""
    a, b, g = c.x[0], c.x[1], c.g
    ta, tb, alpha, beta = c.attr("transA", 0), c.attr("transB", 0), c.attr("alpha", 1.0), c.attr("beta", 1.0)

    def product(left: Tensor, right: Tensor, trans_left: int, trans_right: int) -> Tensor:
        return c.b.op("Gemm", left, right, alpha=alpha, transA=trans_left, transB=trans_right)

    da = product(b, g, tb, 1) if ta else product(g, b, 0, 1 - tb)
    db = product(g, a, 1, ta) if tb else product(a, g, 1 - ta, 0)
    dc = None
    if c.has(2):
        dc = (g * beta if beta != 1 else g).unbroadcast(c.x[2])
    return [da, db, dc]


@rule("Einsum", refuses="an ellipsis that does not come first; a label twice in one term (a diagonal)")
def einsum(c: Context) -> Grads:
    """The gradient of a term is the sum over the others times g, with the term's own labels as the result."""
    terms, result = _equation(c)
    alike = _alike(c, terms)
    found: list[Tensor | None] = []
    for index, term in enumerate(terms):
        others = [t for i, t in enumerate(terms) if i != index]
        # A label no other term has was summed away on its own: the gradient does not depend on it.
        labels = term.replace(ELLIPSIS, "")
        present = [label for label in labels if label in result or any(label in t for t in others)]
        # What an ellipsis stands for may have been broadcast: it stays, and what this term lacks is summed at the end.
        front = ELLIPSIS if any(ELLIPSIS in t for t in (result, *others)) else ""
        equation = ",".join([result, *others]) + "->" + front + "".join(present)
        d = c.b.op("Einsum", c.g, *(x for i, x in enumerate(c.x) if i != index), equation=equation)
        missing = [i - len(labels) for i, label in enumerate(labels) if label not in present]
        if missing:
            d = c.b.op("Unsqueeze", d, c.b.ints(missing))
        if missing or not alike:
            d = c.b.op("Expand", d, c.x[index].sizes())
        found.append(d.unbroadcast(c.x[index]) if front or not alike else d)
    return found


ELLIPSIS = "..."


def _alike(c: Context, terms: list[str]) -> bool:
    """True when every label is known to have one size; ONNX Runtime lets a size of 1 go with any other."""
    sizes: dict[str, set[int | str | None]] = {}
    for term, x in zip(terms, c.x, strict=True):
        labels = term.replace(ELLIPSIS, "")
        dims = (None,) * len(labels) if x.shape is None else x.shape[len(x.shape) - len(labels) :]
        for label, dim in zip(labels, dims, strict=True):
            sizes.setdefault(label, set()).add(dim)
    shared = [label for label in sizes if sum(label in term for term in terms) > 1]
    return all(len(sizes[label]) == 1 and None not in sizes[label] for label in shared)


def _equation(c: Context) -> tuple[list[str], str]:
    """The labels of each term and of the result."""
    equation = str(c.attr("equation", "")).replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = sorted(x for x in set(left) - {",", "."} if left.count(x) == 1)
        result = (ELLIPSIS if ELLIPSIS in left else "") + "".join(letters)
    if any(ELLIPSIS in t and not t.startswith(ELLIPSIS) for t in (*terms, result)):
        raise c.refuse("an ellipsis that does not come first has no rule; write the axes out")
    if any(len(set(t)) < len(t) for t in (term.replace(ELLIPSIS, "") for term in terms)):
        raise c.refuse("a label that stands twice in one term (a diagonal) has no rule")
    return terms, result
