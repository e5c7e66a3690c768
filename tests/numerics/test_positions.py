"""Tables that are computed from positions, told from noise and from learned tables that look much like them."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.numerics.positions import is_table_of_positions


def sinusoids(positions: int, width: int) -> np.ndarray:
    """A. Vaswani et al., 2017: sine and cosine of position / 10000^(2 i / width), [positions, width]."""
    angle = np.arange(positions)[:, None] / 10_000 ** (np.arange(0, width, 2) / width)
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(positions, width).astype(np.float32)


def plane(height: int, width: int, channels: int) -> np.ndarray:
    """Sinusoids of the row beside those of the column, [height, width, 2 channels]."""
    rows = np.repeat(sinusoids(height, channels)[:, None], width, axis=1)
    columns = np.repeat(sinusoids(width, channels)[None], height, axis=0)
    return np.concatenate([rows, columns], axis=-1)


def slopes(heads: int, positions: int) -> np.ndarray:
    """O. Press et al., 2022: -distance / 2^head, [heads, positions, positions]."""
    away = np.abs(np.arange(positions)[:, None] - np.arange(positions))
    return np.asarray(-away * 0.5 ** np.arange(1, heads + 1)[:, None, None], np.float32)


GRID = np.stack(np.meshgrid(np.linspace(0, 1, 5), np.linspace(0, 1, 4))).astype(np.float32)
COMPUTED = {
    "sinusoids": sinusoids(40, 32)[None],
    "half": sinusoids(40, 32).astype(np.float16),
    "many": sinusoids(4096, 64),
    "plane": plane(7, 10, 16).transpose(2, 0, 1)[None],
    "flattened plane": plane(7, 10, 16).reshape(1, 70, 32),
    "grid": GRID[None],
    "slopes": slopes(8, 32)[None],
}


@pytest.mark.parametrize("name", COMPUTED)
def test_computed(name: str) -> None:
    assert is_table_of_positions(COMPUTED[name])


@pytest.mark.parametrize("shape", [(1, 17, 32), (12, 8), (1, 4, 16, 16), (1, 7, 4), (4, 16), (4, 4), (2, 4), (256, 4)])
def test_noise(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    assert sum(is_table_of_positions(generator.normal(size=shape).astype(np.float32)) for _ in range(100)) == 0


def test_a_learned_table_near_to_sinusoids_is_learned() -> None:
    noise = np.random.default_rng(0).normal(size=(512, 64))
    assert not is_table_of_positions((sinusoids(512, 64) + 0.01 * noise).astype(np.float32))
    walk = np.cumsum(np.cumsum(noise, axis=0), axis=0)  # as smooth as a table may become
    assert not is_table_of_positions((walk / np.abs(walk).max()).astype(np.float32))


def test_a_table_without_any_course_is_not_computed() -> None:
    assert not is_table_of_positions(np.zeros((40, 32), np.float32))
    assert not is_table_of_positions(np.full((40, 32), 0.3, np.float32))
    assert not is_table_of_positions(np.arange(6, dtype=np.float32).reshape(2, 3))  # too short to tell


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("shape", [(2000, 64), (1, 128, 32), (64, 8)])
def test_a_learned_table_that_was_pruned_is_learned(shape: tuple[int, ...], sparsity: float) -> None:
    generator = np.random.default_rng(0)
    table = generator.normal(size=shape) * (generator.random(shape) >= sparsity)
    assert not is_table_of_positions(table.astype(np.float32))
    uneven = generator.normal(size=shape) * (generator.random(shape) >= generator.random((shape[-1],)) ** 0.1)
    assert not is_table_of_positions(uneven.astype(np.float16))
