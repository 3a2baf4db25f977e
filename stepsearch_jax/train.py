"""Trains a search agent: rollout, rewards, advantages, update, repeat.

  stepsearch train --config=quickstart --workdir=runs/quickstart

The same command resumes a run that was interrupted; --workdir alone is enough
then. Every config field can be overridden: `--config.ppo.policy_lr=1e-6`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence

import jax
import ml_collections
from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from stepsearch_jax import cli, files, types
from stepsearch_jax.data import input_pipeline
from stepsearch_jax.parallel import distributed
from stepsearch_jax.ppo import batching, records
from stepsearch_jax.ppo import learner as learner_lib
from stepsearch_jax.run import (
  checkpoints,
  filling,
  identity,
  live,
  metrics,
  monitor,
  plots,
  probing,
  reporting,
  starting,
  trackers,
  wall_clock,
  warm_start,
)
from stepsearch_jax.run import trajectories as trajectories_lib
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.interrupts import Interrupts, PreemptedError
from stepsearch_jax.run.settings import Settings
from stepsearch_jax.run.state import RunState

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Run settings, for instance configs/quickstart.py."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder (local or bucket) for checkpoints and metrics; the "
  "same folder resumes a run."
)
_ALLOW_CHANGES = flags.DEFINE_list(
  "allow_changes", [], "Fields that may differ from those that the run in "
  "--workdir started with, for instance ppo.policy_lr,total_steps."
)


def train(
  config: ml_collections.ConfigDict, workdir: epath.Path,
  interrupts: Interrupts | None = None, allow_changes: Sequence[str] = (),
) -> dict:
  """Runs (or resumes) one training job.

  Args:
    config: see `configs/common.py`.
    workdir: receives checkpoints, metrics, predictions and summary.json.
    interrupts: requests to save and stop; None never stops early.
    allow_changes: fields that may differ from an earlier start's.

  Returns:
    The summary that is also written to `summary.json`.

  Raises:
    UserError: a setting, a file or the work directory is not usable.
    PreemptedError: a request to stop came before the last step.
    CollapseError: the monitor halted the run.
  """
  # Settings before anything else: a wrong one costs a second here, and a day
  # if it is found at the first checkpoint.
  settings = Settings.from_config(config)
  workdir.mkdir(parents=True, exist_ok=True)
  with identity.locked(workdir):
    experiment = Experiment(settings, workdir)
    return _train(experiment, interrupts or Interrupts(), allow_changes)


def _train(
  experiment: Experiment, interrupts: Interrupts,
  allow_changes: Sequence[str],
) -> dict:
  """The run itself, in a work directory that nobody else uses."""
  settings, workdir = experiment.settings, experiment.workdir
  clock = wall_clock.WallClock(workdir, active=distributed.is_primary())
  starting.check(experiment)

  # 1. Questions. The work directory is claimed as soon as they are known,
  #    because their content tells whether this is the same run.
  questions = experiment.train_questions
  steps = settings.total_steps(len(questions))
  distributed.in_turn(lambda: identity.claim(
    workdir, settings.config, identity.questions_hash(questions),
    allow_changes,
  ))

  # 2. Rollout engine. A prompt that does not fit stops the run now, and
  #    programs are compiled before models take the memory.
  experiment.describe(steps)
  probing.check_questions(experiment)
  if settings.config["rollout"]["compile_ahead"]:
    clock.lap("start")
    experiment.engine.compile_ahead()
    clock.lap(wall_clock.COMPILE)

  # 3. Learner and state: the newest checkpoint if there is one, else fresh
  #    models and the warm start, saved at once, so that no signal loses it.
  job = Job.build(experiment, steps, interrupts, clock)
  job.save()
  job.saver.wait()
  warm_start.forget(workdir)
  if job.state.baseline is None:
    job.writer.write(job.state.step, job.evaluate())

  # 4. The loop, and 5. the summary.
  _loop(job)
  job.close()
  summary = reporting.summary(settings, job.state) | clock.summary(steps)
  if distributed.is_primary():
    files.write_text(
      workdir / "summary.json", json.dumps(summary, indent=2) + "\n"
    )
    plots.learning_curves(workdir)
    plots.step_time(workdir)
  return summary


def _loop(job: Job) -> None:
  """Steps until the last one; a signal waits for the end of its step.

  Only the first step, which compiles for long, is stopped at once.
  """
  while job.state.step < job.steps:
    try:
      values = job.step()
    except types.UserError:  # A user's function: it can be mended.
      job.save()
      job.close()
      raise
    job.interrupts.defer()  # From here on a signal would cost a step or more.
    if job.has_collapsed(values):
      job.roll_back()
      continue
    stopping = job.report(values)
    job.show(values)
    if stopping:
      job.close()
      raise PreemptedError(
        f"stopped after step {job.state.step} and saved; the same command "
        "goes on"
      )


@dataclasses.dataclass
class Job:
  """A run in progress: its parts, where it writes, and its state.

  Attributes:
    experiment: questions, tokenizer, engine.
    steps: training steps in all.
    interrupts: requests to stop.
    stream: the questions in the order of asking.
    learner: scores and updates the models.
    saver, writer: checkpoints and metrics.
    state: all that training changes.
    sentinel, rollbacks: collapse alarms, and how often the run went back.
    profiler, compilations: what is watched for speed.
    view: shows the steps.
    clock: where the time goes, over all starts.
    began: when the seconds of `state` were last brought up to date.
  """

  experiment: Experiment
  steps: int
  interrupts: Interrupts
  stream: input_pipeline.QuestionStream
  learner: learner_lib.Learner
  saver: checkpoints.Checkpointer
  writer: metrics.MetricsWriter
  state: RunState
  sentinel: monitor.Sentinel
  rollbacks: monitor.Rollbacks
  profiler: metrics.Profiler
  compilations: metrics.Compilations
  view: live.View
  clock: wall_clock.WallClock
  began: float

  @classmethod
  def build(
    cls, experiment: Experiment, steps: int, interrupts: Interrupts,
    clock: wall_clock.WallClock,
  ) -> Job:
    """Opens the run's files and reads, or makes, its state."""
    began, settings = time.time(), experiment.settings
    workdir, model = experiment.workdir, experiment.model
    log, primary = settings.log, distributed.is_primary()
    learner = learner_lib.Learner(
      model, model, settings.learner(steps), experiment.mesh
    )
    saver = checkpoints.Checkpointer(workdir, settings.checkpoint.keep)
    state = starting.start(experiment, learner, saver, interrupts, clock)
    job = cls(
      experiment, steps, interrupts,
      stream=input_pipeline.QuestionStream(
        experiment.train_questions, settings.seed
      ),
      learner=learner,
      saver=saver,
      writer=metrics.MetricsWriter(
        workdir, state.step + (state.baseline is not None),
        trackers.start(
          log.tracker if primary else "", log.project, workdir, settings.config
        ), primary,
      ),
      state=state,
      sentinel=monitor.Sentinel(settings.monitor.limits, state.monitor),
      rollbacks=monitor.Rollbacks(workdir / "rollbacks.json"),
      profiler=metrics.Profiler(workdir / "profile", log.profile),
      compilations=metrics.Compilations(),
      view=live.View("step", steps, primary),
      clock=clock,
      began=began,
    )
    if job.rollbacks.pending is not None:  # Killed in the middle of one.
      job.roll_back()
    clock.lap("start")
    return job

  def step(self) -> dict[str, float]:
    """Plays and learns one batch; returns the step's metrics."""
    settings, state = self.experiment.settings, self.state
    watch = metrics.Stopwatch()
    # An array that comes to the host unasked is a hidden wait.
    guard = jax.transfer_guard_device_to_host("disallow")
    with self.profiler.step(state.step + 1), guard:
      filled = filling.play_batch(
        self.experiment, self.stream, state.asked,
        lambda: self.learner.whole_policy(state.learner),
        state.learner.reference, watch,
      )
      with watch.time("reward"):
        tokenizer = self.experiment.tokenizer
        batch = batching.trajectories_to_batch(
          filled.batch.trajectories,
          [reward.tokens for reward in filled.batch.rewards],
          settings.sampler.context, tokenizer.pad_id, settings.batch.rollouts,
          settings.reward.untrained(tokenizer.eos_ids),
        )
      with watch.time("adv"):
        experience, seen = self.learner.prepare(state.learner, batch)
      with watch.time("update"):
        state.learner, updated = self.learner.update(
          state.learner, experience,
          settings.monitor.lr_factor ** len(self.rollbacks),
        )
    state.step += 1
    state.asked += filled.asked
    self.clock.lap(wall_clock.STEP, state.step)
    self._keep(filled.batch, experience)
    values = {
      **seen, **updated,
      **reporting.step_metrics(settings, filled, batch, watch),
      "perf/compilations": self.compilations.take(),
    }
    metrics.check_finite(
      state.step, values,
      lambda: monitor.first_nonfinite_of(experience, state.learner),
    )
    return values

  def _keep(
    self, batch: filling.Rollouts, experience: records.Experience
  ) -> None:
    """Writes some rollouts of the step down, for people to look at."""
    log, step = self.experiment.settings.log, self.state.step
    if not (log.keeps_rollouts(step, self.steps) and distributed.is_primary()):
      return
    kept = slice(log.trajectories)
    rows = trajectories_lib.describe(
      batch.trajectories[kept], batch.rewards[kept],
      self.experiment.tokenizer, experience,
    )
    files.write_text(
      self.experiment.workdir / "trajectories" / f"step_{step:06d}.jsonl",
      files.to_jsonl(rows),
    )
    self.writer.write_rollouts(step, [trajectories_lib.brief(r) for r in rows])

  def has_collapsed(self, values: dict[str, float]) -> bool:
    """Reports alarms of a step; returns whether the run has to go back."""
    spec = self.experiment.settings.monitor
    alarms = self.sentinel.observe(self.state.step, values)
    try:
      return monitor.must_roll_back(spec, alarms, len(self.rollbacks))
    except monitor.CollapseError:
      self.writer.write(self.state.step, values)  # It shows what happened.
      self.close()
      raise

  def roll_back(self) -> None:
    """Returns to the newest checkpoint before the trouble began."""
    primary = distributed.is_primary()
    if self.rollbacks.pending is None:
      self.rollbacks.begin(self.sentinel.trouble_since, primary)
    like = RunState(0, dataclasses.replace(
      self.learner.abstract_state(), reference=self.state.learner.reference
    ))
    del self.state  # The memory that the older one needs.
    self.state = self.saver.rewind(like, self.rollbacks.pending)
    self.rollbacks.finish(primary)
    self.sentinel = monitor.Sentinel(
      self.experiment.settings.monitor.limits, self.state.monitor
    )
    self.writer.rewind(self.state.step + 1)
    logging.warning("rolled back to step %d", self.state.step)
    self.clock.lap("rollback")

  def report(self, values: dict[str, float]) -> bool:
    """Evaluates, writes and saves what is due; returns whether to stop."""
    settings, state = self.experiment.settings, self.state
    last, best = state.step == self.steps, state.best
    if last or settings.evaluation.is_due(state.step):
      values |= self.evaluate()
    self.writer.write(state.step, values)
    stopping = not last and distributed.any_process(self.interrupts.requested)
    improved = state.best is not best
    if last or stopping or improved or settings.checkpoint.is_due(state.step):
      self.save()
    return stopping

  def evaluate(self) -> dict[str, float]:
    """Plays the held-out questions; returns the metrics, named val/..."""
    state, workdir = self.state, self.experiment.workdir
    self.view.pause()  # An evaluation has a bar of its own.
    card = reporting.evaluate(
      self.experiment, self.learner.whole_policy(state.learner),
      f"{workdir} step {state.step}",
      workdir / "evaluations" / f"step_{state.step:06d}",
      about=reporting.training_settings(self.experiment.settings, state.step),
    )
    state.note_evaluation(card["metrics"])
    self.clock.lap("evaluation")
    return {f"val/{name}": x for name, x in card["metrics"].items()}

  def show(self, values: dict[str, float]) -> None:
    """Shows the numbers of a step that one watches, and what is wrong."""
    quiet = self.experiment.settings.monitor.action == "off"
    self.view.update(
      self.state.step, live.training(values, self.state),
      [] if quiet else [alarm.message for alarm in self.sentinel.alarms],
    )

  def save(self) -> None:
    """Writes a checkpoint, unless the step has one."""
    now = time.time()
    self.state.seconds += now - self.began
    self.began = now
    self.state.monitor = self.sentinel.state
    self.writer.flush()  # A resumed run writes no step before its checkpoint.
    self.saver.save(self.state)
    self.clock.lap("checkpoint")

  def close(self) -> None:
    """Waits for what is being written and ends the search threads."""
    for part in (self.view, self.profiler, self.writer, self.saver,
                 self.experiment.engine, self.clock):
      part.close()


def main() -> None:
  """Entry; see the module docstring."""
  logging.info(
    "config %s", config_flags.get_config_filename(flags.FLAGS[_CONFIG.name])
  )
  summary = train(
    _CONFIG.value, epath.Path(_WORKDIR.value), Interrupts().install(),
    _ALLOW_CHANGES.value,
  )
  print()
  for name, value in summary.items():
    shown = f"{value:.4f}" if isinstance(value, float) else value
    print(f"{name:>22}  {shown}")


if __name__ == "__main__":
  cli.run(main, required=["config", "workdir"])
