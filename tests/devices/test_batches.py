"""Batches of the training example: each device gets its part, and no more is read for it."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support.meshes import Devices
from support.text_data import random_windows

from .helpers import make_mesh


@pytest.mark.parametrize("axis", [0, 1])
def test_the_parts_of_a_batch_are_read_one_by_one(axis):
    whole = np.arange(4 * 6).reshape(4, 6)
    parts = []

    def read(part):
        parts.append((part.start, part.stop))
        return whole[(slice(None),) * axis + (part,)]

    batch = Devices(make_mesh("explicit")).batch(read, whole.shape, axis)
    half = whole.shape[axis] // 2
    assert set(parts) == {(0, half), (half, 2 * half)}
    assert jax.typeof(batch).sharding.spec == P(*[None] * axis, "data", *[None] * (1 - axis))
    np.testing.assert_array_equal(batch, whole)


def test_a_part_of_random_windows_is_that_of_all():
    values = np.random.default_rng(0).integers(0, 256, 1000)
    whole = random_windows(values, 8, 5, seed=(1, 2))
    part = random_windows(values, 8, 5, seed=(1, 2), part=slice(2, 6))
    np.testing.assert_array_equal(part, whole[2:6])
