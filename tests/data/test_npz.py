from __future__ import annotations

import pathlib
import tracemalloc
import zipfile
from collections.abc import Callable

import numpy as np
import pytest

from onnxcompress.data.npz import NpzFile, headers
from onnxcompress.errors import DataError

Save = Callable[..., None]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rows_equal_numpy_in_any_order(tmp_path: pathlib.Path, save: Save) -> None:
    x = np.random.default_rng(0).standard_normal((100, 3, 7)).astype(np.float32)
    y = np.arange(100, dtype=">i2")
    save(tmp_path / "a.npz", x=x, y=y, s=np.int64(3))
    with NpzFile(tmp_path / "a.npz") as file:
        assert file.names == ["x", "y", "s"]
        assert (file.member("x").shape, str(file.member("x").dtype), file.member("s").shape) == (
            (100, 3, 7),
            "float32",
            (),
        )
        for start, stop in [(0, 10), (10, 25), (60, 61), (5, 9), (90, 200), (100, 110)]:
            np.testing.assert_array_equal(file.rows("x", start, stop), x[start:stop])
            np.testing.assert_array_equal(file.rows("y", start, stop), y[start:stop])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_streaming_holds_only_the_rows_asked_for(tmp_path: pathlib.Path, save: Save) -> None:
    x = np.random.default_rng(0).integers(0, 4, (4096, 4096), np.uint8)  # 16 MiB
    save(tmp_path / "a.npz", x=x)
    total, size = int(x.sum(dtype=np.int64)), x.nbytes
    del x
    tracemalloc.start()
    with NpzFile(tmp_path / "a.npz") as file:
        seen = sum(int(file.rows("x", at, at + 128).sum(dtype=np.int64)) for at in range(0, 4096, 128))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == total
    assert peak < size / 4


def test_fortran_order_is_refused(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(np.ones((3, 4))))
    with pytest.raises(DataError, match=r"a\.npz: array 'x': is stored in Fortran order"):
        headers(tmp_path / "a.npz")


def test_objects_are_never_unpickled(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}, [2]], object))
    with pytest.raises(DataError, match=r"array 'x': holds Python objects"):
        headers(tmp_path / "a.npz")


def test_structured_elements_are_refused(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3, [("a", "i4"), ("b", "f4")]))
    with pytest.raises(DataError, match="structured elements"):
        headers(tmp_path / "a.npz")


def test_missing_array_names_what_there_is(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    with NpzFile(tmp_path / "a.npz") as file, pytest.raises(DataError, match="holds no array 'z', only x"):
        file.member("z")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip at all" * 50])
def test_what_is_no_zip_names_the_file(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz: not a readable \.npz file"):
        NpzFile(tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"b\.npz: no such file"):
        NpzFile(tmp_path / "b.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_cut_or_flipped_byte_is_a_data_error_or_nothing(tmp_path: pathlib.Path, save: Save) -> None:
    x = np.random.default_rng(0).integers(0, 9, (50, 4))
    save(tmp_path / "a.npz", x=x)
    raw = (tmp_path / "a.npz").read_bytes()
    messages: list[str] = []

    def read(content: bytes) -> np.ndarray | None:
        (tmp_path / "b.npz").write_bytes(content)
        try:
            with NpzFile(tmp_path / "b.npz") as file:
                return file.rows("x", 0, 50)
        except DataError as error:
            messages.append(str(error))
            return None

    assert all(read(raw[:cut]) is None for cut in range(0, len(raw) - 22, 7))
    for at in range(0, len(raw), 5):
        found = read(raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :])
        assert found is None or found.dtype != x.dtype or np.array_equal(found, x)
    assert len(messages) > 50
    assert all("b.npz" in message and "\n" not in message for message in messages)


def test_a_header_that_lies_is_refused_before_allocating(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(8))
    lie = (tmp_path / "x.npy").read_bytes().replace(b"(8,), }       ", b"(99999999999,)")[:128]
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("x.npy", lie.ljust(128) + b"\0" * 64)
    with pytest.raises(DataError, match="array 'x'"):
        headers(tmp_path / "a.npz")
