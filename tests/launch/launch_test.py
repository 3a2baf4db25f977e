"""Launchers print what they would run, and refuse what they do not know."""

import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def launch(script, *arguments):
  return subprocess.run(
    ["bash", str(ROOT / "launch" / script), *arguments],
    capture_output=True, text=True,
  )


TPU = ("--name=a", "--zone=b", "--type=v5litepod-16", "--bucket=gs://b/run")


def test_tpu_launcher_installs_and_trains_on_all_workers():
  done = launch("run_tpu.sh", *TPU, "--spot", "--dry_run", "--",
                "--config=configs/x.py", "--config.data.train=a b")
  assert done.returncode == 0, done.stderr
  create, copy, install, train = done.stdout.splitlines()[1:]
  assert "create a --accelerator-type=v5litepod-16" in create
  assert "--spot" in create
  assert all("--worker=all" in line for line in (copy, install, train))
  plain = train.replace("\\", "")
  assert "stepsearch_jax.train --multihost --workdir=gs://b/run" in plain
  assert "--config=configs/x.py --config.data.train=a b" in plain


@pytest.mark.parametrize("arguments, message", [
  (TPU[:3], "--bucket is missing"),
  ((*TPU, "--color=red"), "unknown argument --color=red"),
])
def test_tpu_launcher_names_bad_arguments(arguments, message):
  done = launch("run_tpu.sh", *arguments)
  assert done.returncode == 1 and message in done.stderr


def test_slurm_job_requeues_itself_when_preempted():
  done = launch("run_gpu.sh", "--slurm", "--nodes=2", "--gpus=4", "--dry_run",
                "--", "--workdir=w", "--config=configs/x.py")
  assert done.returncode == 0, done.stderr
  assert "#SBATCH --nodes=2" in done.stdout
  assert "#SBATCH --gpus-per-node=4" in done.stdout
  assert "--workdir=w --config=configs/x.py --multihost" in done.stdout
  assert 'if [ "$code" = 75 ]; then scontrol requeue' in done.stdout


def test_gpu_launcher_on_one_machine_passes_flags_on():
  done = launch("run_gpu.sh", "--dry_run", "--workdir=w", "--config=c")
  assert done.stdout.strip().endswith(
    "-m stepsearch_jax.train --workdir=w --config=c"
  )


@pytest.mark.parametrize("argument, message", [
  ("--stages=parity,replays", "no stage replays"),
  ("--limits=updates:3", "no stage updates"),
  ("--color=red", "unknown argument --color=red"),
])
def test_gpu_check_names_bad_arguments_before_it_starts(
  argument, message, tmp_path
):
  done = launch("gpu_check.sh", f"--out={tmp_path / 'out'}", argument)
  assert done.returncode == 1 and message in done.stderr
  assert not (tmp_path / "out").exists()
