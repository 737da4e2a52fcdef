"""A whole run of the loop on a toy model, as a library for tests and as a killable program."""

import functools
import json
import os
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prism_jax import batches, metrics, progress
from prism_jax.checkpoints import checkpoint, lock
from prism_jax.checkpoints import meta as checkpoint_meta
from prism_jax.losses import reduce
from prism_jax.running import goodput, loop, metric_writers
from prism_jax.setup import agreement
from prism_jax.training import optim, optim_kinds, schedules, train_state, train_step

NUM_FEATURES = 4


class Toy(nnx.Module):
    """Two layers, with the names and logical axes of real ones."""

    def __init__(self, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.5)
        self.kernel = nnx.Param(normal(rngs.params(), (NUM_FEATURES, 8)), axes=("embed", "mlp"))
        self.bias = nnx.Param(jnp.zeros(8), axes=("mlp",))
        self.head = nnx.Param(normal(rngs.params(), (8, 1)), axes=("mlp", None))

    def __call__(self, x):
        return (jnp.tanh(x @ self.kernel[...] + self.bias[...]) @ self.head[...])[..., 0]


def loss_fn(model, batch, key):
    """Return squared errors over kept tokens, and a term with another weight: one a row."""
    del key
    errors = jnp.where(batch["mask"], (model(batch["x"]) - batch["y"]) ** 2, 0.0)
    per_row = errors.sum(-1) / jnp.maximum(batch["mask"].sum(-1), 1)
    terms = {
        "token": reduce.Sum(total=errors.sum(), weight=batch["mask"].sum()),
        "row": reduce.Sum(total=per_row.sum(), weight=per_row.size),
    }
    return terms, {"loss/token": metrics.Mean.of(errors, batch["mask"])}


def weights_fn(batch):
    """Return the weights of both terms over the whole batch."""
    rows = batch["mask"].shape[0] * batch["mask"].shape[1]
    return {"token": batch["mask"].sum(dtype=jnp.float32), "row": jnp.float32(rows)}


def make_batch(seed, *, num_rows):
    """Return rows of unequal lengths: x [B, T, 4], y [B, T], mask [B, T]."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 7, num_rows)
    x = rng.normal(size=(num_rows, 6, NUM_FEATURES)).astype(np.float32)
    return {
        "x": x,
        "y": np.sin(x.sum(-1)),
        "mask": np.arange(6) < lengths[:, None],
    }


def make_optimizer(params, **changes):
    """Return AdamW over all parameters of the toy, with some arguments changed."""
    arguments = {
        "schedule": schedules.learning_rate_schedule(
            "constant",
            peak=1e-2,
            num_steps=100,
            warmup_steps=2,
            warmup_fraction=None,
            end_factor=1.0,
        ),
        "kind": "adamw",
        "numbers": optim_kinds.Numbers(
            b1=0.9, b2=0.95, eps=1e-8, mu_dtype="float32", nu_dtype="float32"
        ),
        "weight_decay": 0.1,
        "no_decay": ("bias",),
        "groups": ((".*", 1.0),),
        "clip_norm": 1.0,
        "rounding": "nearest",
        "memory": "device",
    }
    return optim.make(params, **(arguments | changes))


class Counted:
    """Batches that depend on their number alone, which is the position."""

    def __init__(self, *, num_microbatches, sleep_seconds=0.0):
        self.position = 0
        self._num_microbatches = num_microbatches
        self._sleep_seconds = sleep_seconds

    def __next__(self):
        time.sleep(self._sleep_seconds)
        batch = make_batch(self.position, num_rows=8)
        self.position += 1
        return batches.split(batch, self._num_microbatches)

    def get_state(self):
        """Return the position."""
        return {"next_index": self.position}

    def set_state(self, state):
        """Go to the position."""
        self.position = state["next_index"]


def identity(**changes):
    """Return the identity of the toy run."""
    arguments = {
        "project_version": "0",
        "stage": "toy",
        "config": {"optim": {"peak": 1e-2}, "mesh": {"data": 1}},
        "model_config": {"features": NUM_FEATURES},
        "may_differ": ("mesh",),
    }
    return checkpoint_meta.RunIdentity(**(arguments | changes))


def open_checkpointer(workdir, **changes):
    """Return the checkpointer of the toy run, which saves every 3 steps."""
    arguments = {
        "identity": identity(),
        "seed": 0,
        "save_every_steps": 3,
        "num_kept": 3,
        "allow_mismatch": False,
    }
    return checkpoint.Checkpointer(str(workdir), **(arguments | changes))


@functools.cache
def setup(*, num_microbatches=2, **optimizer_changes):
    """Return (abstract state, function that makes the state, train step), compiled only once."""
    graphdef, params = train_state.abstract_params(Toy, param_dtype=jnp.float32)
    optimizer = make_optimizer(params, **optimizer_changes)

    @functools.cache
    def first_state():
        return jax.device_get(
            train_state.init(
                Toy, optimizer, jax.random.key(0), param_dtype=jnp.float32, shardings=None
            )
        )

    def make_state():
        return jax.tree.map(jnp.array, first_state())

    step = train_step.make_train_step(
        graphdef,
        loss_fn,
        optimizer,
        weights_fn=weights_fn,
        coefficients={"token": 1.0, "row": 0.1},
        num_microbatches=num_microbatches,
        shardings=None,
    )
    return train_state.abstract_state(params, optimizer), make_state, step


def run(
    workdir,
    *,
    num_steps,
    sleep_seconds=0.0,
    experience=loop.learn_from_data,
    evaluate=None,
    update=None,
    data=None,
    save_every_minutes=None,
):
    """Run or continue the toy stage in `workdir`; return its last state."""
    workdir = pathlib.Path(workdir)
    begun = time.monotonic()
    abstract_state, make_state, step = setup()
    data = data or Counted(num_microbatches=2, sleep_seconds=sleep_seconds)
    with lock.hold(str(workdir), beat_seconds=5.0), open_checkpointer(workdir) as checkpointer:
        state, first_step = loop.restore_or_make(
            checkpointer, data, abstract_state=abstract_state, make_state=make_state, step=None
        )
        lines = metric_writers.JsonLines(workdir / "metrics.jsonl", last_step=first_step)
        board = metric_writers.TensorBoard(workdir / "tensorboard", last_step=first_step)
        account = goodput.Goodput(
            workdir / "goodput.jsonl", begun=begun, lost_steps=lines.num_dropped
        )
        shown = progress.Progress(
            None,
            title="toy",
            first_step=first_step,
            num_steps=num_steps,
            watched=("loss/total",),
            line_every_steps=10,
        )
        writers = metric_writers.Writers([lines, board])
        try:
            state = loop.run(
                loop.Stage(
                    experience=experience,
                    update=update or step,
                    evaluate=evaluate,
                    skip_counters=("optim/skipped_in_row",),
                ),
                state,
                data,
                key=jax.random.key(1),
                first_step=first_step,
                limits=loop.Limits(
                    num_steps=num_steps, evaluate_every_steps=4, max_skipped_in_row=3
                ),
                checkpointer=checkpointer,
                save_every_minutes=save_every_minutes,
                inputs=agreement.Inputs(),
                logs=loop.Logs(writers=writers, progress=shown, goodput=account),
            )
            checkpointer.finish({"steps": num_steps})
        finally:
            writers.close()
            account.close()
    return state


def _serve():
    """Fork a run for each line of standard input, signal it, and answer with its exit code.

    A line is {"workdir", "num_steps", "rows", "delay_seconds", "signal"}: the signal is sent that
    long after `metrics.jsonl` has that many rows; null sends none. Forking before the first use of
    a device costs no new imports.
    """
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run(order["workdir"], num_steps=order["num_steps"], sleep_seconds=0.01)
                code = 0
            except SystemExit as exit_:
                code = exit_.code
            finally:
                os._exit(code)
        if order["signal"] is not None:
            _wait_for_rows(pathlib.Path(order["workdir"]) / "metrics.jsonl", order["rows"], pid)
            time.sleep(order["delay_seconds"])
            os.kill(pid, getattr(signal, order["signal"]))
        _, status = os.waitpid(pid, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


def _wait_for_rows(path, rows, pid):
    while not path.exists() or path.read_bytes().count(b"\n") < rows:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)


if __name__ == "__main__":
    _serve()
