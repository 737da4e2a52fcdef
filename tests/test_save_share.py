"""The benchmark of saving a host's share: what the share is, and its record."""

import jax.numpy as jnp
import pytest

from benchmarks import save_share


def test_the_hosts_of_a_slice_share_the_weights_and_both_moments():
    sizes = {name: save_share.num_bytes(one) for name, one in save_share.shares(4).items()}
    # 8.77 billion float32 weights on two hosts, and two moments of all but the frozen tower.
    whole, tower = 8.767e9, 0.576e9
    assert sum(sizes.values()) == pytest.approx((whole * 12 - tower * 8) / 2, rel=2e-3)
    layers = sum(size for name, size in sizes.items() if save_share._LAYERS in name)
    # 36 layers of 193 million.
    assert layers == pytest.approx(36 * 192.9e6 * 12 / 2, rel=2e-3)


def test_the_record_has_the_rates_of_what_was_written(tmp_path, monkeypatch):
    shape = (36, 8, 64, 1024)
    share = {f"params/{save_share._LAYERS}kernel": (shape, 1, jnp.float32)}
    monkeypatch.setattr(save_share, "shares", lambda num_devices: share)
    record = save_share.measure(tmp_path, layers=2, times=1)
    raw, (seconds,) = record["raw"], record["raw"]["seconds"]
    assert raw["share_bytes"] == 18 * raw["saved_bytes"] == 36 * 8 * 64 * 1024 * 4
    rate = raw["gigabytes_per_second"]["saved"]
    assert rate == pytest.approx(raw["saved_bytes"] / seconds["until_flushed"] / 1e9)
    assert record["ratio"]["seconds of the share at the measured rate"] == pytest.approx(
        18 * seconds["until_flushed"]
    )
    assert seconds["until_training_goes_on"] <= seconds["until_complete"]
    assert not list(tmp_path.iterdir())
