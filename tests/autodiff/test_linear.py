"""Matrix products."""

from __future__ import annotations

import pytest

from tests.autodiff.cases import Case, floats

MATMUL = [
    ((2, 3), (3, 4)),
    ((5, 2, 3), (3, 4)),
    ((5, 2, 3), (5, 3, 4)),
    ((2, 3), (5, 3, 4)),
    ((3,), (3,)),
    ((3,), (3, 4)),
    ((2, 3), (3,)),
    ((3,), (5, 3, 4)),
    ((5, 2, 3), (3,)),
    ((1, 6, 2, 3), (5, 1, 3, 4)),
]
EINSUM = [
    ("ij,jk->ik", [(2, 3), (3, 4)]),
    ("ij,jk", [(2, 3), (3, 4)]),
    ("bij,bjk->bik", [(2, 2, 3), (2, 3, 2)]),
    ("bhqd,bhkd->bhqk", [(1, 2, 3, 2), (1, 2, 4, 2)]),
    ("i,j->ij", [(2,), (3,)]),
    ("ij->j", [(2, 3)]),
    ("ij->", [(2, 3)]),
    ("ij->ji", [(2, 3)]),
    ("ij,k->i", [(2, 3), (4,)]),
    ("i,i,i->i", [(3,), (3,), (3,)]),
    ("...ij,...jk->...ik", [(2, 2, 3), (2, 3, 2)]),
    ("...ij,...jk->...ik", [(2, 2, 3), (1, 3, 2)]),
    ("...ij,jk->...ik", [(2, 4, 2, 3), (3, 2)]),
    ("...ij->...i", [(2, 2, 3)]),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shapes", MATMUL, ids=str)
def test_matmul(shapes: tuple[tuple[int, ...], tuple[int, ...]], dynamic: bool) -> None:
    Case("MatMul", {"a": floats(*shapes[0]), "b": floats(*shapes[1], seed=1)}).check(dynamic)


@pytest.mark.parametrize("bias", [(4,), (2, 4), (2, 1), (), None], ids=str)
@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm(trans_a: int, trans_b: int, bias: tuple[int, ...] | None) -> None:
    feeds = {"a": floats(3, 2) if trans_a else floats(2, 3), "b": floats(4, 3) if trans_b else floats(3, 4)}
    if bias is not None:
        feeds["c"] = floats(*bias)
    Case("Gemm", feeds, {"transA": trans_a, "transB": trans_b, "alpha": 0.5, "beta": 2.0}).check(dynamic=bias == (4,))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("equation", "shapes"), EINSUM, ids=str)
def test_einsum(equation: str, shapes: list[tuple[int, ...]], dynamic: bool) -> None:
    feeds = {name: floats(*shape, seed=i) for i, (name, shape) in enumerate(zip("abc", shapes, strict=False))}
    Case("Einsum", feeds, {"equation": equation}).check(dynamic)
