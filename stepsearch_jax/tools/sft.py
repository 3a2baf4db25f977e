"""Trains on demonstrations alone: traces of a file, or a run's own successes.

  stepsearch sft --input=traces.jsonl --config=musique_smollm2 \\
    --workdir=runs/sft

imitates what agents did, ours or others' (rollouts of this project, Search-R1
and verl, message lists with tool calls, ReAct, R1-Searcher): only their own
words, with the documents that they were shown. The run is like any other:
checkpoint, evaluation, `--config.warm_start.policy=runs/sft` to go on from it.

  stepsearch sft --rejection=4 --rounds=2 --workdir=runs/quickstart

asks every training question of a run four times, imitates the right rollouts,
starting from the run's policy, and does so twice. Round N is a run of its own,
runs/quickstart/rejection/round_N. The same command goes on where it stopped,
and with more --rounds behind the last one; other settings are refused unless
--allow_changes names them. SIGTERM and Ctrl-C end it as they end a training.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence

import ml_collections
from absl import flags
from etils import epath

from stepsearch_jax import cli, train, types
from stepsearch_jax.parallel import distributed
from stepsearch_jax.run import identity, rejection
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.interrupts import Interrupts
from stepsearch_jax.run.settings import Settings

# Those of training.
flags.declare_key_flag("config")
flags.declare_key_flag("workdir")
flags.declare_key_flag("allow_changes")
_INPUT = flags.DEFINE_string("input", None, "File of traces to imitate.")
_REJECTION = flags.DEFINE_integer(
  "rejection", None, "Rollouts per training question, of which the right ones "
  "are imitated; needs a run in --workdir."
)
_ROUNDS = flags.DEFINE_integer(
  "rounds", 1, "Rounds of rejection sampling.", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 1.0, "Of rejection sampling.", lower_bound=0.0
)


def imitation_of(
  config: ml_collections.ConfigDict, traces: str
) -> ml_collections.ConfigDict:
  """Returns the config of a run that only imitates a file of traces."""
  config = copy.deepcopy(config)
  config.total_steps, config.total_epochs = 0, 0.0
  config.warm_start.traces = traces
  return config


def reject(
  config: ml_collections.ConfigDict, workdir: epath.Path, attempts: int,
  rounds: int, temperature: float, interrupts: Interrupts | None = None,
  allow_changes: Sequence[str] = (),
) -> dict:
  """Runs rounds of rejection sampling from the run in `workdir`.

  What is finished stays as it is, sampled rollouts as well as rounds.

  Args:
    config: of the run.
    workdir: of the run; rounds go to its folder rejection/.
    attempts: rollouts per training question.
    rounds: how many there are to be in the end.
    temperature: of the sampling.
    interrupts: requests to stop; None never stops early.
    allow_changes: fields, or rejection and temperature, that may differ from
      those of the rounds that are there.

  Returns:
    The summary of the last round.

  Raises:
    UserError: the folder holds no checkpoint, no rollout is right, or earlier
      rounds were made with other settings.
    PreemptedError: a request to stop came; the same call goes on.
  """
  if not (workdir / "checkpoints").exists():
    raise types.UserError(f"--workdir={workdir} has no checkpoints to sample "
                          "from")
  settings, place = Settings.from_config(config), workdir / "rejection"
  sampling = [rejection.Sampling(attempts, temperature, number)
              for number in range(1, rounds + 1)]
  place.mkdir(parents=True, exist_ok=True)
  with identity.locked(place):
    distributed.in_turn(lambda: rejection.claim(
      place, Experiment(settings, workdir), sampling[0], allow_changes
    ))
    before, summary = workdir, {}
    for current in sampling:
      folder = place / f"round_{current.number}"
      samples = place / f"samples_{current.number}.jsonl"
      if not samples.exists():
        experiment = Experiment(settings, before)
        _, policy = experiment.trained_policy()
        rejection.sample(experiment, policy, current, samples)
        experiment.engine.close()
      imitating = imitation_of(config, str(samples))
      imitating.warm_start.policy = str(before)
      done = folder / "summary.json"
      summary = (
        json.loads(done.read_text()) if done.exists()
        else train.train(imitating, folder, interrupts, allow_changes)
      )
      before = folder
  return summary


def main() -> None:
  """Entry; see the module docstring."""
  config, workdir = flags.FLAGS.config, epath.Path(flags.FLAGS.workdir)
  if (_INPUT.value is None) == (_REJECTION.value is None):
    raise types.UserError("need either --input or --rejection")
  if config is None:
    raise types.UserError(
      f"--workdir={workdir} holds no run; give a --config as well"
    )
  interrupts, changes = Interrupts().install(), flags.FLAGS.allow_changes
  if _INPUT.value is not None:
    summary = train.train(
      imitation_of(config, _INPUT.value), workdir, interrupts, changes
    )
  else:
    summary = reject(config, workdir, _REJECTION.value, _ROUNDS.value,
                     _TEMPERATURE.value, interrupts, changes)
  for name, value in summary.items():
    shown = f"{value:.4f}" if isinstance(value, float) else value
    print(f"{name:>22}  {shown}")


if __name__ == "__main__":
  cli.run(main, required=["workdir"])
