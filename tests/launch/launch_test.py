"""Launchers print what they would run, and refuse what they do not know."""

import os
import pathlib
import shutil
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
  ((*TPU, "--dry_run"), "no trainer flags behind --"),
  ((*TPU[:3], "--bucket=/local/run", "--dry_run", "--", "--config=c"),
   "--bucket must begin with gs://, got /local/run"),
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


def test_slurm_tasks_are_not_killed_while_they_save():
  done = launch("run_gpu.sh", "--slurm", "--dry_run", "--workdir=w")
  assert "srun --kill-on-bad-exit=0" in done.stdout


def test_gpu_launcher_takes_values_behind_a_blank():
  done = launch("run_gpu.sh", "--slurm", "--nodes", "3", "--dry_run",
                "--workdir", "w", "--", "--config=c")
  assert "#SBATCH --nodes=3" in done.stdout
  assert "stepsearch_jax.train --workdir=w --config=c" in done.stdout


@pytest.mark.parametrize("arguments, message", [
  (("--node=2", "--workdir=w"), "unknown argument --node=2"),
  (("--workdir=w", "x"), "unknown argument x"),
  (("--workdir=w", "--nodes"), "--nodes needs a value"),
  ((), "no trainer flags"),
])
def test_gpu_launcher_names_bad_arguments(arguments, message):
  done = launch("run_gpu.sh", *arguments)
  assert done.returncode == 1 and message in done.stderr


def test_uncommitted_changes_are_not_shipped_and_that_is_said(tmp_path):
  shutil.copytree(ROOT / "launch", tmp_path / "launch")
  for command in (["init"], ["add", "."],
                  ["-c", "user.name=a", "-c", "user.email=a@b", "commit",
                   "-m", "x"]):
    subprocess.run(["git", *command], cwd=tmp_path, check=True,
                   capture_output=True)

  def tpu():
    return subprocess.run(
      ["bash", str(tmp_path / "launch/run_tpu.sh"), *TPU, "--dry_run", "--",
       "--config=c"], capture_output=True, text=True,
    ).stderr

  assert "uncommitted" not in tpu()
  (tmp_path / "launch/new.sh").write_text("")
  assert "uncommitted changes are not shipped, HEAD is" in tpu()


def test_gpu_launcher_on_one_machine_passes_flags_on():
  done = launch("run_gpu.sh", "--dry_run", "--workdir=w", "--config=c")
  assert done.stdout.strip().endswith(
    "-m stepsearch_jax.train --workdir=w --config=c"
  )


@pytest.mark.parametrize("argument, message", [
  ("--stages=parity,replays", "no stage replays"),
  ("--limits=updates:3", "no stage updates"),
  ("--color=red", "unknown argument --color=red"),
  ("--files=/nowhere", "no train.jsonl in '/nowhere'"),
])
def test_gpu_check_names_bad_arguments_before_it_starts(
  argument, message, tmp_path
):
  done = launch("gpu_check.sh", f"--out={tmp_path / 'out'}", argument)
  assert done.returncode == 1 and message in done.stderr
  assert not (tmp_path / "out").exists()


def test_the_quickstart_explains_itself_before_it_installs(tmp_path):
  shutil.copytree(ROOT / "launch", tmp_path / "launch")
  done = subprocess.run(
    ["bash", str(tmp_path / "launch/quickstart.sh"), "--help"],
    env={"PATH": os.environ["PATH"], "PYTHON": "false"}, cwd=tmp_path,
    capture_output=True, text=True,
  )
  assert done.returncode == 0 and "bash launch/quickstart.sh" in done.stdout
  assert not (tmp_path / ".venv").exists()
