"""Trains a search agent: rollout, rewards, advantages, update, repeat.

  python -m stepsearch_jax.train --config=configs/quickstart.py \\
    --workdir=runs/quickstart

The same command resumes a run that was interrupted. Every config field can be
overridden: `--config.ppo.policy_lr=1e-6`.
"""

from __future__ import annotations

import functools
import json
import threading
import time

import jax
from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from stepsearch_jax import cli, files
from stepsearch_jax.data import input_pipeline
from stepsearch_jax.evaluation import card as evaluation
from stepsearch_jax.parallel import distributed, sharding
from stepsearch_jax.ppo import batching
from stepsearch_jax.ppo import learner as learner_lib
from stepsearch_jax.rewards import token_rewards
from stepsearch_jax.run import (
  checkpoints,
  experiment,
  metrics,
  plots,
  reporting,
  settings,
)
from stepsearch_jax.run import monitor as sentinel

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Run settings, for instance configs/quickstart.py."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder (local or bucket) for checkpoints and metrics; the "
  "same folder resumes a run."
)


def train(
  config, workdir: epath.Path, stop: threading.Event | None = None
) -> dict:
  """Runs (or resumes) one training job.

  Args:
    config: see `configs/common.py`.
    workdir: receives checkpoints, metrics, predictions and summary.json.
    stop: once set, the run saves after the step in progress and stops.

  Returns:
    The summary that is also written to `summary.json`.

  Raises:
    PreemptedError: `stop` was set before the last step.
    CollapseError: the sentinel halted the run.
  """
  began = time.time()
  settings.validate(config)
  workdir.mkdir(parents=True, exist_ok=True)

  #################################################################
  # Data, retrieval, tokenizer                                    #
  #################################################################
  data = distributed.in_turn(lambda: experiment.load_data(config, workdir))
  tokenizer = distributed.in_turn(
    lambda: experiment.load_tokenizer(config, workdir, data)
  )
  env = experiment.build_env(config)
  retriever = experiment.load_retriever(config, workdir, data)
  stream = input_pipeline.QuestionStream(
    data.train, config.batch.questions, seed=config.seed
  )
  steps = settings.total_steps(config, len(data.train))
  logging.info(
    "%d training questions, %d held out, %d passages, %d steps",
    len(data.train), len(data.heldout), len(data.corpus), steps,
  )

  #################################################################
  # Models, learner, rollout engine                               #
  #################################################################
  mesh = sharding.make_mesh(**config.mesh)
  model = experiment.decoder_config(config, tokenizer)
  engine = experiment.build_engine(
    config, model, env, retriever, tokenizer, mesh
  )
  for question in data.train + data.heldout:
    engine.prompt_tokens(question)  # A prompt that does not fit stops us now.
  if config.rollout.compile_ahead:
    engine.compile_ahead()
  rewards = settings.reward_spec(config)
  spec = settings.learner_spec(config, steps)
  learner = learner_lib.Learner(model, model, spec, mesh)

  #################################################################
  # Resume, or initialise and warm-start                          #
  #################################################################
  saver = checkpoints.Checkpointer(
    workdir, experiment.identity(config, model, data), config.checkpoint.keep
  )
  state, reference, step, meta = _begin(
    config, workdir, data, tokenizer, env, retriever, mesh, learner, model,
    saver,
  )
  writer = metrics.MetricsWriter(
    workdir,
    step + ("before" in meta),
    config.log.wandb_project,
    config.to_dict(),
    active=distributed.is_primary(),
  )
  guard = sentinel.Sentinel(
    settings.sentinel_limits(config), meta.get("sentinel")
  )
  rollbacks = sentinel.Rollbacks(workdir / "rollbacks.json")

  def evaluate(at: int) -> dict[str, float]:
    described = reporting.card_settings(
      config, retriever, f"{workdir} step {at}"
    )
    card = evaluation.evaluate(
      engine, learner.policy(state, reference), data.heldout, tokenizer,
      described,
      workdir / "eval", workdir / "predictions" / f"step_{at:06d}.jsonl",
    )
    return card["metrics"]

  def save() -> None:
    nonlocal began
    meta["seconds"] = meta.get("seconds", 0.0) + time.time() - began
    meta["sentinel"] = guard.state
    began = time.time()
    saver.save(step, state.policy, state.replace(policy=None), meta)

  if "before" not in meta:
    meta["before"] = evaluate(step)
    writer.write(
      step, {f"val/{name}": value for name, value in meta["before"].items()}
    )
    meta["best"] = {"step": step, "em": meta["before"]["em"]}
    save()

  #################################################################
  # The loop                                                      #
  #################################################################
  compilations = metrics.Compilations()
  bar = metrics.Progress(steps, step, active=distributed.is_primary())
  shown = {"EM": meta["before"]["em"]}
  while step < steps:
    watch = metrics.Stopwatch()
    with watch.time("gen"):
      questions = [
        question
        for question in stream.batch(step)
        for _ in range(config.batch.rollouts)
      ]
      first = step * len(questions)
      trajectories, rollout = engine.run(
        learner.policy(state, reference),
        questions,
        range(first, first + len(questions)),
        config.rollout.temperature,
      )
    with watch.time("reward"):
      scores, per_token = token_rewards.score_trajectories(
        rewards, trajectories, tokenizer
      )
      batch = batching.trajectories_to_batch(
        trajectories, per_token, config.rollout.context, tokenizer.pad_id,
        dropped_ids=tokenizer.eos_ids if rewards.eos == "dropped" else (),
      )
    with watch.time("adv"):
      experience, seen = learner.prepare(state, reference, batch)
    with watch.time("update"):
      state, updated = learner.update(
        state, experience,
        lr_scale=config.sentinel.lr_factor ** len(rollbacks),
      )

    step += 1
    values = {
      **seen,
      **updated,
      **reporting.reward_metrics(trajectories, scores),
      **reporting.rollout_metrics(rollout),
      **watch.metrics(),
      "perf/compilations": compilations.take(),
    }
    metrics.check_finite(
      step, values, functools.partial(_first_nonfinite, experience, state)
    )
    alarms = guard.observe(step, values)
    if _collapsed(config.sentinel, alarms, len(rollbacks)):
      since = min(alarm.since for alarm in alarms)
      step, state, meta = _roll_back(saver, state, since, rollbacks)
      guard = sentinel.Sentinel(
        settings.sentinel_limits(config), meta["sentinel"]
      )
      writer.rewind(step + 1)
      bar.rewind(step)
      continue
    last = step == steps
    new_best = False
    if last or (config.eval.every and step % config.eval.every == 0):
      after = evaluate(step)
      values |= {f"val/{name}": value for name, value in after.items()}
      shown["EM"] = after["em"]
      new_best = after["em"] > meta["best"]["em"]
      if new_best:
        meta["best"] = {"step": step, "em": after["em"]}
      if last:
        meta["after"] = after
    writer.write(step, values)
    preempted = not last and distributed.any_process(
      stop is not None and stop.is_set()
    )
    if last or preempted or new_best or step % config.checkpoint.every == 0:
      save()
    bar.update(
      reward=values["critic/score/mean"],
      searches=values["env/searches_per_question"],
      tok_s=values["perf/tokens_per_second"],
      **shown,
    )
    if preempted:
      saver.close()
      raise cli.PreemptedError(
        f"stopped after step {step} and saved; the same command goes on"
      )

  #################################################################
  # Summary                                                       #
  #################################################################
  bar.close()
  writer.close()
  saver.close()
  engine.close()
  summary = reporting.summary(config, meta, steps)
  if distributed.is_primary():
    files.write_text(
      workdir / "summary.json", json.dumps(summary, indent=2) + "\n"
    )
    plots.learning_curves(workdir)
    plots.step_time(workdir)
  return summary


def _begin(config, workdir, data, tokenizer, env, retriever, mesh, learner,
           model, saver):
  """Returns (state, reference policy, step, meta), fresh or resumed."""
  key = jax.random.key(config.seed)
  policy = experiment.initial_policy(config, model)
  state = learner.start(policy, key)
  restored = saver.restore(state.policy, state.replace(policy=None))
  if restored is not None:
    step, policy, rest, meta = restored
    logging.info("resumed at step %d", step)
    reference = checkpoints.load_reference(
      workdir, learner.abstract_reference()
    )
    return rest.replace(policy=policy), reference, step, meta
  if config.warm_start.steps:
    policy = experiment.warm_start(
      config, data, tokenizer, env, retriever, mesh, model, policy
    )
    state = learner.start(policy, key)
  checkpoints.save_reference(workdir, policy, model.dtype)
  reference = checkpoints.load_reference(
    workdir, learner.abstract_reference()
  )
  return state, reference, 0, {}


def _first_nonfinite(experience, state) -> str:
  """The first tensor of a step that is not finite, in data-flow order."""
  return sentinel.first_nonfinite(
    token_rewards=experience.batch.token_rewards,
    logp=experience.logp,
    reference_logp=experience.reference_logp,
    values=experience.values,
    advantages=experience.advantages,
    policy=state.policy,
    value=state.value,
  )


def _collapsed(limits, alarms, rollbacks: int) -> bool:
  """Reports alarms; True if the run has to go back.

  Raises:
    CollapseError: it has to halt.
  """
  if limits.action == "off":
    return False
  for alarm in alarms:
    logging.warning("collapse? %s", alarm.message)
  if not alarms or limits.action == "warn":
    return False
  spent = rollbacks >= limits.rollbacks
  if limits.action == "halt" or spent:
    raise sentinel.CollapseError(
      f"{alarms[0].message}: halted"
      + (f" after {rollbacks} rollbacks" if rollbacks else "")
      + "; the last checkpoints stand (limits: config.sentinel)"
    )
  return True


def _roll_back(saver, state, since: int, rollbacks):
  """(step, state, meta) of the newest checkpoint before step `since`."""
  found = saver.rewind(state.policy, state.replace(policy=None), since)
  step, policy, rest, meta = found
  rollbacks.add(since, step, write=distributed.is_primary())
  logging.warning("rolled back to step %d", step)
  return step, rest.replace(policy=policy), meta


def main() -> None:
  """Entry; see the module docstring."""
  summary = train(
    _CONFIG.value, epath.Path(_WORKDIR.value), cli.stop_on_sigterm()
  )
  print()
  for name, value in summary.items():
    shown = f"{value:.4f}" if isinstance(value, float) else value
    print(f"{name:>22}  {shown}")


if __name__ == "__main__":
  cli.run(main, required=["config", "workdir"])
