import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prism_jax.checkpoints import checksum


def _sums(x):
    found = checksum.checksums({"x": jnp.asarray(x)})["x"]
    return found.plain, found.weighted


def test_sums_are_those_worked_out_by_hand():
    x = np.array([[1, 2], [3, 4]], np.int32)
    weights = [(i * 2654435761 + 1) % 2**32 for i in range(4)]
    assert _sums(x) == (10, sum(w * v for w, v in zip(weights, [1, 2, 3, 4], strict=True)) % 2**32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
def test_every_flipped_bit_changes_the_checksum(dtype):
    x = np.asarray(jnp.asarray(np.arange(6).reshape(2, 3) % 2, dtype))
    before = _sums(x)
    for byte in range(x.nbytes):
        for bit in range(1 if dtype == "bool" else 8):
            bits = np.frombuffer(x.tobytes(), np.uint8).copy()
            bits[byte] ^= 1 << bit
            assert _sums(bits.view(x.dtype).reshape(x.shape)) != before


def test_swapped_elements_change_the_checksum():
    x = np.arange(8, dtype=np.float32)
    y = x.copy()
    y[[2, 5]] = y[[5, 2]]
    assert _sums(x)[0] == _sums(y)[0]
    assert _sums(x)[1] != _sums(y)[1]


def test_checksum_does_not_depend_on_the_sharding():
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    for shape, spec in [((8, 1), ("a", "b")), ((2, 4), ("b", "a")), ((4, 2), (("a", "b"), None))]:
        mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        assert _sums(sharded) == _sums(x)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_seen(bad):
    good = np.ones((3, 2), np.float32)
    assert checksum.checksums({"x": jnp.asarray(good)})["x"].is_finite
    good[1, 1] = bad
    assert not checksum.checksums({"x": jnp.asarray(good)})["x"].is_finite


def test_arrays_without_a_checksum_are_refused_by_name():
    with pytest.raises(TypeError, match="no checksum for key"):
        checksum.checksums({"key": jax.random.key(0)})
