import dataclasses
import logging
import pathlib
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prism_jax import errors, tree_paths
from prism_jax.checkpoints import checkpoint, checksum
from prism_jax.checkpoints import files as checkpoint_files
from prism_jax.training import train_state
from tests import toy_run


@pytest.fixture(scope="module")
def toy():
    """Return (abstract state, state after one step)."""
    abstract, make_state, step = toy_run.setup(num_microbatches=1)
    batch = next(toy_run.Counted(num_microbatches=1))
    return abstract, step(make_state(), batch, jax.random.key(0))[0]


def _sharded(abstract, mesh):
    def one(leaf):
        spec = [None] * leaf.ndim
        for dim in range(leaf.ndim):
            if leaf.shape[dim] % mesh.size == 0:
                spec[dim] = mesh.axis_names[0]
                break
        return NamedSharding(mesh, PartitionSpec(*spec))

    return train_state.with_shardings(abstract, jax.tree.map(one, abstract))


def _assert_equal_bits(one, other):
    one, other = tree_paths.named_leaves(one), tree_paths.named_leaves(other)
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[name], err_msg=name)


def _save(workdir, steps, state, **changes):
    with toy_run.open_checkpointer(workdir, **changes) as checkpointer:
        for step in steps:
            checkpointer.save(step, state, data_position={"next_index": step})
            checkpointer.wait()


def _restore(workdir, abstract, *, step=None, **changes):
    with toy_run.open_checkpointer(workdir, **changes) as checkpointer:
        return checkpointer.restore(abstract, step=step)


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_state_saved_on_four_devices_is_restored_on_any_mesh_with_its_bits(
    tmp_path, toy, num_devices
):
    abstract, state = toy
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    shardings = jax.tree.map(lambda leaf: leaf.sharding, _sharded(abstract, mesh))
    _save(tmp_path, [3], jax.device_put(state, shardings))
    devices = jax.devices()[:num_devices]
    mesh = jax.make_mesh((num_devices,), ("b",), axis_types=(AxisType.Auto,), devices=devices)
    target = _sharded(abstract, mesh)
    restored = _restore(tmp_path, target)
    assert (restored.step, restored.data_position) == (3, {"next_index": 3})
    _assert_equal_bits(restored.state, state)
    for leaf, wanted in zip(jax.tree.leaves(restored.state), jax.tree.leaves(target), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    assert restored.state.params["kernel"].get_metadata("axes") == ("embed", "mlp")


def test_two_states_are_saved_together_and_their_parameters_load_apart(tmp_path, toy):
    abstract, state = toy
    other = jax.tree.map(lambda x: x + 1, state)
    both = {"policy": state, "discriminator": other}
    _save(tmp_path, [3], both)
    restored = _restore(tmp_path, {"policy": abstract, "discriminator": abstract})
    _assert_equal_bits(restored.state, both)
    params, meta = checkpoint.load_params(
        str(tmp_path), abstract.params, item="discriminator.params", step=None
    )
    _assert_equal_bits(params, other.params)
    assert sorted(meta["leaves"]) == ["discriminator.params", "opt_state", "policy.params"]
    with pytest.raises(errors.InputError, match=r"discriminator.params.*not 'params'"):
        checkpoint.load_params(str(tmp_path), abstract.params, item="params", step=None)


def test_a_new_folder_restores_nothing(tmp_path, toy):
    assert _restore(tmp_path / "new", toy[0]) is None


def test_saves_are_due_every_interval_and_the_newest_are_kept(tmp_path, toy):
    with toy_run.open_checkpointer(tmp_path, num_kept=2) as checkpointer:
        due = []
        for step in range(1, 10):
            if checkpointer.is_due(step):
                due.append(step)
                checkpointer.save(step, toy[1], data_position=None)
        checkpointer.wait()
        assert due == [3, 6, 9]
        assert checkpointer.steps() == [6, 9]
        checkpointer.save(9, toy[1], data_position=None)  # there already: nothing happens


def _flip_a_bit(folder):
    """Flip one bit in the middle of the largest file of an item."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found_and_the_step_before_is_offered_and_can_be_taken(tmp_path, toy):
    abstract, state = toy
    # Random numbers do not compress, so that a flipped bit is one bit of one weight.
    noise = jax.random.normal(jax.random.key(0), (64, 1024))
    abstract, state = (
        {"toy": abstract, "noise": jax.eval_shape(lambda: noise)},
        {
            "toy": state,
            "noise": noise,
        },
    )
    _save(tmp_path, [3, 6, 9], state)
    _flip_a_bit(tmp_path / "checkpoints" / "9" / "opt_state")
    with pytest.raises(
        checkpoint_files.CheckpointError, match=r"(?s)step 9 .*start from step 6 .*noise"
    ):
        _restore(tmp_path, abstract)
    restored = _restore(tmp_path, abstract, step=6)
    assert restored.step == 6
    assert (tmp_path / "set_aside" / "9").is_dir()
    _save(tmp_path, [9], state)
    assert _restore(tmp_path, abstract).step == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "rlvr"}, "stage: 'toy' in the checkpoint, 'rlvr' here"),
        ({"config": {"optim": {"peak": 0.5}}}, "config.optim.peak: 0.01 in the checkpoint, 0.5"),
        ({"model_config": {}}, "model.features: 4 in the checkpoint, 'absent' here"),
    ],
)
def test_a_folder_of_another_run_is_refused_with_the_keys_that_differ(
    tmp_path, toy, change, message, caplog
):
    abstract, state = toy
    _save(tmp_path, [3], state)
    other = toy_run.identity(**change)
    with pytest.raises(errors.InputError, match=message):
        _restore(tmp_path, abstract, identity=other)
    restored = _restore(tmp_path, abstract, identity=other, allow_mismatch=True)
    assert restored.step == 3
    assert message in caplog.text


def test_another_seed_is_refused(tmp_path, toy):
    _save(tmp_path, [3], toy[1])
    with pytest.raises(errors.InputError, match="seed: 0 in the checkpoint, 1 here"):
        _restore(tmp_path, toy[0], seed=1)


def test_keys_that_may_differ_do_not_refuse_a_folder(tmp_path, toy):
    _save(tmp_path, [3], toy[1])
    other = toy_run.identity(config={"optim": {"peak": 1e-2}, "mesh": {"data": 8}})
    assert _restore(tmp_path, toy[0], identity=other).step == 3
    assert other.config_hash() == toy_run.identity().config_hash()


def test_a_state_of_another_shape_is_refused_with_every_leaf_that_differs(tmp_path, toy):
    abstract, state = toy
    _save(tmp_path, [3], state)
    wrong = jax.tree.map(lambda x: x, abstract)
    wrong.params["kernel"] = wrong.params["kernel"].replace(jax.ShapeDtypeStruct((9, 9), "int8"))
    del wrong.params["head"]
    with pytest.raises(
        errors.InputError,
        match=r"(?s)params: head: only in the checkpoint.*"
        r"params: kernel: float32\(4, 8\) in the checkpoint, int8\(9, 9\) here",
    ):
        _restore(tmp_path, wrong)


def test_unfinished_steps_are_ignored_and_removed(tmp_path, toy):
    _save(tmp_path, [3], toy[1])
    partial = tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "3", partial)
    with toy_run.open_checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(toy[0], step=None).step == 3
        # They are removed beside what the run does; its first save waits for that.
        checkpointer.save(4, toy[1], data_position={"next_index": 4})
        checkpointer.wait()
    assert not partial.exists()


def test_a_step_copied_without_its_meta_is_refused_by_name(tmp_path, toy):
    _save(tmp_path, [3], toy[1])
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "meta")
    with pytest.raises(checkpoint_files.CheckpointError, match="not a whole checkpoint"):
        _restore(tmp_path, toy[0])


@pytest.mark.parametrize("item", ["position", "meta", "digests"])
def test_a_changed_bit_of_the_texts_is_noticed(tmp_path, toy, item):
    _save(tmp_path, [3], toy[1])
    path = tmp_path / "checkpoints" / "3" / item / "metadata"
    whole = path.read_bytes()
    with checkpoint_files.opened(epath.Path(tmp_path)) as manager:

        def read():
            return checkpoint_files.read_meta_and_position(manager, epath.Path(tmp_path), 3)

        wanted = read()
        for bit in range(0, 8 * len(whole), 1 + 8 * len(whole) // 200):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            try:
                found = read()
            except checkpoint_files.DamagedError as error:
                assert "checkpoints/3" in str(error)
            else:
                assert found == wanted, f"bit {bit}"  # 1e-05 and 1E-05 are one number


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("position", "{}"),
        ("position", '{"step": 3, "seed": 0, "data": {"next_index": 4}}'),
        ("meta", "{}"),
        ("meta", "[" * 10**5),
        ("digests", "[]"),
    ],
)
def test_texts_of_another_kind_are_refused_by_name(tmp_path, toy, item, text):
    _save(tmp_path, [3], toy[1])
    (tmp_path / "checkpoints" / "3" / item / "metadata").write_text(text)
    with pytest.raises(checkpoint_files.DamagedError, match=r"checkpoints/3.*damaged|not a whole"):
        _restore(tmp_path, toy[0])


def test_a_step_of_before_there_were_digests_is_read_with_a_warning(tmp_path, toy, caplog):
    _save(tmp_path, [3], toy[1])
    step = tmp_path / "checkpoints" / "3"
    shutil.rmtree(step / "digests")
    with pytest.raises(checkpoint_files.DamagedError, match="its digests are missing"):
        _restore(tmp_path, toy[0])
    meta = step / "meta" / "metadata"
    meta.write_text(meta.read_text().replace('"format": 2', '"format": 1'))
    assert _restore(tmp_path, toy[0]).data_position == {"next_index": 3}
    assert "read unchecked" in caplog.text
    meta.write_text(meta.read_text().replace('"stage": "toy"', '"stage": 7'))
    with pytest.raises(checkpoint_files.DamagedError, match="meta is damaged: stage must be str"):
        _restore(tmp_path, toy[0])


def test_parameters_that_are_not_finite_are_refused_whoever_wrote_them(tmp_path, toy, monkeypatch):
    bad = dataclasses.replace(toy[1], params=jax.tree.map(lambda x: x / 0, toy[1].params))
    sums = checksum.checksums
    with monkeypatch.context() as patch:
        patch.setattr(
            checksum,
            "checksums",
            lambda leaves: {
                name: dataclasses.replace(one, is_finite=True) for name, one in sums(leaves).items()
            },
        )
        _save(tmp_path, [3], bad)
    with pytest.raises(checkpoint_files.DamagedError, match=r"(?s)holds NaN or infinity.*kernel"):
        _restore(tmp_path, toy[0])


def test_a_missing_data_file_is_refused_by_item(tmp_path, toy):
    _save(tmp_path, [3], toy[1])
    item = tmp_path / "checkpoints" / "3" / "params"
    for path in [*item.glob("d/*"), *item.glob("ocdbt.process_0/d/*")]:
        path.unlink()
    with pytest.raises(checkpoint_files.CheckpointError, match="cannot read params of step 3"):
        _restore(tmp_path, toy[0])


def test_a_state_that_is_not_finite_is_never_saved(tmp_path, toy):
    _save(tmp_path, [3], toy[1])
    bad = dataclasses.replace(toy[1], params=jax.tree.map(lambda x: x / 0, toy[1].params))
    with toy_run.open_checkpointer(tmp_path) as checkpointer:
        with pytest.raises(
            checkpoint_files.CheckpointError, match=r"(?s)not finite.*params/kernel"
        ):
            checkpointer.save(6, bad, data_position=None)
        assert checkpointer.steps() == [3]


def test_a_step_that_is_not_there_is_refused_with_those_that_are(tmp_path, toy):
    _save(tmp_path, [3, 6], toy[1])
    with pytest.raises(errors.InputError, match=r"of step 4 .*there are \[3, 6\]"):
        _restore(tmp_path, toy[0], step=4)


@pytest.fixture
def small_files():
    """Let no file grow beyond 64 KiB, which fails a write as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_failed_write_names_path_and_bytes_and_leaves_the_older_step(tmp_path, small_files):
    def state(size):
        return {"x": jax.random.normal(jax.random.key(0), (size,))}

    with toy_run.open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state(8), data_position=None)
        checkpointer.wait()
        checkpointer.save(6, state(2**17), data_position=None)
        with pytest.raises(
            checkpoint_files.CheckpointError,
            match=r"writing step 6 of 524,288 bytes to .*bytes free\) failed.*there: \[3\]",
        ):
            checkpointer.wait()
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3"]
        assert checkpointer.restore(jax.eval_shape(lambda: state(8)), step=None).step == 3


def test_a_failed_write_is_raised_at_the_next_step_without_waiting(tmp_path, small_files):
    state = {"x": jax.random.normal(jax.random.key(0), (2**17,))}
    with toy_run.open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state, data_position=None)
        with pytest.raises(checkpoint_files.CheckpointError, match="writing step 3"):
            for _ in range(500):
                checkpointer.is_due(4)
                time.sleep(0.01)


def test_a_folder_that_cannot_be_made_is_refused_by_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.InputError, match=r"cannot make or open .*file/run"):
        toy_run.open_checkpointer(tmp_path / "file" / "run")


def test_exported_parameters_load_with_their_bits_and_meta(tmp_path, toy):
    abstract, state = toy
    folder = str(tmp_path / "export")
    checkpoint.save_params(folder, state.params, identity=toy_run.identity(), step=7)
    params, meta = checkpoint.load_params(folder, abstract.params, item="params", step=None)
    _assert_equal_bits(params, state.params)
    assert meta["stage"] == "toy"
    assert checkpoint.read_meta(folder, step=None)["model_config"] == {"features": 4}
    assert checkpoint.finished(folder)["step"] == 7
    with pytest.raises(errors.InputError, match="holds checkpoints already"):
        checkpoint.save_params(folder, state.params, identity=toy_run.identity(), step=7)


def test_loading_in_another_dtype_casts_and_says_so(tmp_path, toy, caplog):
    _save(tmp_path, [3], toy[1])
    _, abstract = train_state.abstract_params(toy_run.Toy, param_dtype=jnp.bfloat16)
    with caplog.at_level(logging.INFO):
        params, _ = checkpoint.load_params(str(tmp_path), abstract, item="params", step=None)
    assert "cast parameters from float32 to bfloat16" in caplog.text
    wanted = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy[1].params)
    _assert_equal_bits(params, wanted)


def test_loading_from_a_folder_without_checkpoints_is_refused(tmp_path, toy):
    with pytest.raises(errors.InputError, match="there are no checkpoints in"):
        checkpoint.load_params(str(tmp_path), toy[0].params, item="params", step=None)


def test_a_finished_run_says_so(tmp_path, toy):
    assert checkpoint.finished(str(tmp_path)) is None
    with toy_run.open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, toy[1], data_position=None)
        checkpointer.finish({"accuracy": 0.5})
    found = checkpoint.finished(str(tmp_path))
    assert (found["step"], found["summary"]) == (3, {"accuracy": 0.5})
    assert found["config_hash"] == toy_run.identity().config_hash()
    assert pathlib.Path(tmp_path, "finished.json").read_text().endswith("}\n")
