"""Every script's commands are those of golden text, and secrets never stand in them."""

import pathlib
import re
import shutil
import subprocess

import pytest

from tests.launch import scripts

_GOLDEN = pathlib.Path(__file__).parent / "golden"
_POD = ("--name", "a", "--type", "v5p-64", "--zone", "us-east5-a", "--dry-run")
_SLICES = ("--name=b", "--type=v5litepod-16", "--zone=us-west4-a", "--project=p", "--slices=2")
_STAGE = ("--", "sft", "--config=configs/sft.py:8b", "--config.data.train=a b's;$HOME")
_GKE = ("--name", "a", "--image", "i", "--type")
_CHAIN = (
    *("--size", "8b", "--root", "gs://b/r", "--base", "gs://b/m", "--demonstrations", "d.json#x"),
    *("--demonstrations", "e.json", "--align-prompts", "a.parquet", "--rl-prompts", "r.parquet"),
    *("--test-prompts", "t.parquet", "--options", "rlvr=dapo", "--dry-run"),
    *("--args", "rlvr=--config.mesh.rules=(('a', None),)", "--args", "rlvr=--config.seed=1", "--"),
)
_CASES = {
    "pod_up": ("pod.sh", "up", *_POD, "--spot", "--valid-until", "6h"),
    "pod_up_reserved": ("pod.sh", "up", *_POD, "--reserved"),
    "pod_up_existing": ("pod.sh", "up", *_POD, "--existing"),
    "pod_up_slices": (
        *("pod.sh", "up", *_SLICES, "--dry-run", "--flex", "--max-run=2d"),
        *("--create-flag=--internal-ips", "--create-flag", "--scopes=cloud-platform"),
    ),
    "pod_run": ("pod.sh", "run", *_POD, *_STAGE),
    "pod_run_slices": ("pod.sh", "run", *_SLICES, "--dry-run", "--detach", *_STAGE),
    "pod_run_single": ("pod.sh", "run", *_POD, "--single", "--", "export", "--to=x"),
    "pod_logs": ("pod.sh", "logs", *_POD, "--ssh-flag=--tunnel-through-iap"),
    "pod_status": ("pod.sh", "status", *_POD, "--workdir", "gs://b/r"),
    "pod_stop": ("pod.sh", "stop", *_POD),
    "pod_down": ("pod.sh", "down", *_POD),
    "gke_v5p": ("gke.sh", "render", *_GKE, "v5p", "--topology", "2x4x4", *_STAGE),
    "gke_v6e_one_host": ("gke.sh", "render", *_GKE, "v6e", "--topology=2x4", "--spot", *_STAGE),
    "gke_tpu7x": (
        *("gke.sh", "render", *_GKE, "tpu7x", "--topology=2x2x2", "--slices=2"),
        *("--secret=prism-secrets", "--gcsfuse=bucket=/data", "--service_account=k", *_STAGE),
    ),
    "gke_gcluster": ("gke.sh", "render", *_GKE, "v5p", "--topology=2x4x4", "--gcluster", *_STAGE),
    "gke_run_single": (
        *("gke.sh", "run", *_GKE, "v5p", "--single", "--suffix=export", "--dry-run", "--context=c"),
        *("--", "export", "--to=gs://b/r"),
    ),
    "gke_logs": ("gke.sh", "logs", "--name=a", "--dry-run"),
    "gke_delete": ("gke.sh", "delete", "--name=a", "--namespace=n", "--dry-run"),
    "slurm": (
        *("slurm.sh", "submit", "--name=a", "--nodes=2", "--partition=p", "--account=q"),
        *("--dry-run", *_STAGE),
    ),
    "slurm_single": ("slurm.sh", "render", "--name=a", "--single", "--", "export", "--to=x"),
    "local_pod": ("local_pod.sh", "2", "--devices", "4", "--dry-run", *_STAGE),
    "pipeline_pod": ("pipeline.sh", *_CHAIN, "pod.sh", "--name=a", "--type=v5p-64"),
    "pipeline_gke": ("pipeline.sh", "--from=align", "--to=rlvr", *_CHAIN, "gke.sh", "--name=a"),
    "pipeline_local": ("pipeline.sh", "--from=evaluate", *_CHAIN, "local_pod.sh", "4"),
}


@pytest.mark.parametrize("case", _CASES)
def test_the_commands_are_those_of_the_golden_text(cloud, case):
    code, out, err = cloud.run(*_CASES[case])
    assert (code, err) == (0, "")
    assert scripts.plain(out, (scripts.ROOT, cloud.folder)) == (_GOLDEN / f"{case}.txt").read_text()
    assert cloud.calls() == []  # a dry run calls nothing


@pytest.mark.parametrize("case", _CASES)
def test_a_secret_in_an_argument_is_refused_and_not_repeated(cloud, case):
    secret = {"WANDB_API_KEY": "not-to-be-seen", "HF_TOKEN": "nor-is-this-one"}
    code, out, err = cloud.run(*_CASES[case], **secret)
    assert (code, err) == (0, "")
    assert not any(value in out for value in secret.values())
    if "--" in _CASES[case]:
        code, out, err = cloud.run(*_CASES[case], "--token=nor-is-this-one", **secret)
        assert code == 2
        assert (
            err
            == "error: an argument holds the value of HF_TOKEN: secrets stay off command lines\n"
        )
        assert "nor-is-this-one" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pod.sh",), "the command must be up, run, logs, status, stop or down"),
        (("pod.sh", "up", "--name=A"), "--name=A: must be lower-case letters"),
        (("pod.sh", "up", "--name=a", "--zone=us"), "--zone=us: must be a zone"),
        (("pod.sh", "up", *_POD[:2], *_POD[4:], "--type=v7x-8"), "use launch/gke.sh"),
        (
            ("pod.sh", "up", *_POD[:2], *_POD[4:], "--type=v4-8"),
            "must be v5litepod-N, v5p-N",
        ),
        (("pod.sh", "up", *_POD[:2], *_POD[4:], "--type=v5p-63"), "counts cores, of which a chip"),
        (("pod.sh", "up", *_POD, "--spot", "--flex"), "--flex: at most one of"),
        (("pod.sh", "up", *_POD, "--flex"), "--flex: --max-run must say"),
        (("pod.sh", "up", *_POD, "--valid-until=6"), "--valid-until=6: must be a duration"),
        (("pod.sh", "up", *_POD, "--typo=6"), "unknown option --typo"),
        (("pod.sh", "run", *_POD), "a command of prism_jax must follow --"),
        (("pod.sh", "down", *_POD, "--existing"), "did not make a and does not delete it"),
        (("gke.sh", "render", *_GKE, "v5p", "--topology=4x4", *_STAGE), "must be AxBxC for v5p"),
        (("gke.sh", "render", *_GKE, "v5e", "--topology=3x5", *_STAGE), "has 15 chips, not"),
        (("gke.sh", "submit", *_GKE, "v5p", "--topology=2x2x1"), "must follow --"),
        (
            ("slurm.sh", "submit", "--name=a", "--time=soon", *_STAGE),
            "--time=soon: must be as",
        ),
        (("slurm.sh", "submit", "--name=a", "--"), "slurm.sh submit: a command of prism_jax must"),
        (("local_pod.sh", "0", *_STAGE), "local_pod.sh N=0: must be a whole number >= 1"),
        (("pipeline.sh", "--size=9b"), "--size=9b: must be tiny, demo, small, 4b or 8b"),
        (("pipeline.sh", "--size=8b", "--", "pod.sh"), "--root must be given"),
        (("pipeline.sh", *_CHAIN, "ssh.sh"), "got ssh.sh"),
        (("pipeline.sh", "--size=8b", "--from=rlvr", "--to=sft"), "--to sft: comes before --from"),
        (("pipeline.sh", "--args", "rl=x"), "--args rl=x: must be STEP=..., a step of sft"),
        (("libtpu_flags.sh", "v4"), "the generation must be v5e, v5p, v6e or tpu7x"),
    ],
)
def test_a_wrong_option_is_one_line_and_calls_nothing(cloud, arguments, message):
    code, out, err = cloud.run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert cloud.calls() == []


@pytest.mark.parametrize("path", ["a b", "a%j", "a'b"])
def test_a_folder_that_sbatch_would_misread_is_refused(cloud, path):
    folder = cloud.folder / path
    arguments = ("slurm.sh", "submit", "--name=a", *_STAGE)
    code, out, err = cloud.run(*arguments, PRISM_SLURM_STATE=str(folder))
    assert (code, out, cloud.calls()) == (2, "", [])
    assert err == (
        f"error: slurm.sh: the folder {folder} must have no space, %, quote or backslash in its"
        " path\n"
    )


@pytest.mark.parametrize("script", ["pod.sh", "gke.sh", "slurm.sh", "local_pod.sh", "pipeline.sh"])
def test_help_shows_an_example_and_every_option(cloud, script):
    code, out, err = cloud.run(script, "--help")
    assert (code, err) == (0, "")
    assert f"bash launch/{script} " in out
    source = (scripts.ROOT / "launch" / script).read_text()
    options = set(re.findall(r"^ +((?:--[a-z_-]+(?: \| )?)+)\)", source, re.M))
    names = {name for group in options for name in group.split(" | ")} - {"--help", "--"}
    absent = {n for n in names if n not in out and 'others+=("$option' not in source}
    assert not absent, absent


def test_a_flag_of_libtpu_in_xla_flags_is_refused(cloud):
    for arguments in (
        ("libtpu_flags.sh", "v5e"),
        ("local_pod.sh", "2", *_STAGE),
        _CASES["pod_run"],
    ):
        code, _, err = cloud.run(*arguments, XLA_FLAGS="--xla_tpu_x=1")
        assert (code, "libtpu's flags belong into LIBTPU_INIT_ARGS" in err) == (2, True)


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=str(scripts.ROOT / ".venv/bin")) or shutil.which(
        "shellcheck"
    )
    assert program, "shellcheck is part of the extra `test`"
    files = sorted(str(path) for path in (scripts.ROOT / "launch").glob("*.sh"))
    done = subprocess.run(
        [program, "-x", *files], cwd=scripts.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
