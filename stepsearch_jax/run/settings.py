"""From a ConfigDict to one frozen, checked record: the settings of a run.

`Settings.from_config` is the first line of every command and the last place
that sees a ConfigDict. Each record checks its own fields; what spans several
sections is checked here. A wrong value ends in one line within a second:
`field: expected ..., got ...`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_collections

from stepsearch_jax.data import world
from stepsearch_jax.env import prompts
from stepsearch_jax.models import adapters, decoder
from stepsearch_jax.ppo import estimators
from stepsearch_jax.ppo import specs as ppo_specs
from stepsearch_jax.retrieval import factory, remote
from stepsearch_jax.retrieval.index import encoding
from stepsearch_jax.rewards import probe_rewards, step_rewards, user_reward
from stepsearch_jax.rollout import device, records
from stepsearch_jax.run import identity, methods, monitor, signs, specs
from stepsearch_jax.sft import scripted
from stepsearch_jax.types import UserError, expect

_Spec = TypeVar("_Spec")


def spec_of(
  cls: type[_Spec], section: Mapping[str, Any], **computed: Any
) -> _Spec:
  """Builds a record: fields of a config section by name, others computed.

  This is the one way in which config becomes a record; a record has no
  defaults, so a field that neither side provides is an error.
  """
  record: Any = cls
  names = [
    field.name for field in dataclasses.fields(record)
    if field.name not in computed
  ]
  values = {name: section[name] for name in names}
  return cls(**{
    name: tuple(value) if isinstance(value, list) else value
    for name, value in values.items()
  }, **computed)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Every setting of a run, checked.

  Attributes:
    seed: of every random draw.
    method: name of the method; what it chose stands in the other fields.
    schedule, model, data, batch, protocol, warm_start, evaluation,
      checkpoint, monitor, mesh, log: see `specs`.
    retrieval: how a run searches.
    sampler, rollout: shapes of the rollout programs, and its limits.
    reward: the preset with its switches.
    config: all fields as nested plain values, for the run's config.json,
      with what the method chose.
  """

  seed: int
  method: str
  schedule: specs.Schedule
  model: specs.ModelSpec
  data: specs.DataSpec
  batch: specs.BatchSpec
  protocol: specs.ProtocolSpec
  warm_start: specs.WarmStartSpec
  evaluation: specs.EvalSpec
  checkpoint: specs.CheckpointSpec
  monitor: monitor.MonitorSpec
  mesh: specs.MeshSpec
  log: specs.LogSpec
  retrieval: factory.RetrievalSpec
  sampler: device.ProgramSpec
  rollout: records.EngineSpec
  reward: step_rewards.RewardSpec
  config: dict[str, Any]

  @classmethod
  def from_config(
    cls, config: ml_collections.ConfigDict, devices: int | None = None
  ) -> Settings:
    """Checks a config and freezes it.

    Args:
      config: the ConfigDict of `configs/common.py`.
      devices: how many the run will have; None for those of this machine.

    Raises:
      UserError: naming the field, what was expected and what was given.
    """
    try:
      return cls._from_config(config, devices)
    except (AttributeError, KeyError) as error:
      lacking = str(error).strip("\"'")
      if lacking.isidentifier():  # What ml_collections says of a field.
        raise UserError(
          f"the config has no field {lacking!r}: it was written by another "
          "version (a run's config.json), or is not built on "
          "configs/common.py"
        ) from error
      raise

  @classmethod
  def _from_config(cls, config: ml_collections.ConfigDict,
                   devices: int | None) -> Settings:
    """See `from_config`."""
    config = methods.filled(config)
    _check_numbers(config.to_dict())
    settings = cls(
      seed=config.seed,
      method=config.method,
      schedule=specs.Schedule(config.total_steps, config.total_epochs),
      model=spec_of(
        specs.ModelSpec, config.model,
        size=spec_of(specs.SizeSpec, config.model.size),
        chat=dict(config.model.chat),
      ),
      data=spec_of(
        specs.DataSpec, config.data,
        world=spec_of(world.WorldSpec, config.data.world),
      ),
      batch=spec_of(specs.BatchSpec, config.batch),
      protocol=spec_of(
        specs.ProtocolSpec, config.rollout, topk=config.retrieval.topk
      ),
      warm_start=spec_of(
        specs.WarmStartSpec, config.warm_start,
        habits=spec_of(scripted.Habits, config.warm_start),
      ),
      evaluation=spec_of(specs.EvalSpec, config.eval),
      checkpoint=spec_of(specs.CheckpointSpec, config.checkpoint),
      monitor=spec_of(
        monitor.MonitorSpec, config.sentinel,
        limits=spec_of(signs.Limits, config.sentinel),
      ),
      mesh=spec_of(specs.MeshSpec, config.mesh),
      log=spec_of(specs.LogSpec, config.log),
      retrieval=spec_of(
        factory.RetrievalSpec, config.retrieval,
        patience=spec_of(remote.RemoteSpec, config.retrieval.patience),
        encoding=spec_of(
          encoding.EncodingSpec, config.retrieval.encoding
        ),
      ),
      sampler=spec_of(device.ProgramSpec, config.rollout),
      rollout=spec_of(
        records.EngineSpec, config.rollout, probe=_probe(config)
      ),
      reward=_reward(config),
      config=config.to_dict(),
    )
    _check_together(
      settings, jax.device_count() if devices is None else devices
    )
    settings.learner(steps=1)  # Its records check themselves.
    return settings

  def learner(self, steps: int) -> ppo_specs.LearnerSpec:
    """Settings of the update in a run of `steps` training steps."""
    return _learner(self, steps)

  def total_steps(self, questions: int) -> int:
    """Training steps of a run over so many training questions."""
    return self.schedule.total(questions, self.batch.questions)

  def decoder(self, vocab_size: int) -> decoder.DecoderConfig:
    """Shape of a policy that starts from random weights."""
    size = self.model.size
    return decoder.DecoderConfig(
      family=size.family,
      vocab_size=vocab_size,
      hidden_size=size.hidden,
      intermediate_size=size.mlp,
      num_layers=size.layers,
      num_heads=size.heads,
      num_kv_heads=size.kv_heads,
      head_dim=size.hidden // size.heads,
      tie_embeddings=size.tied,
      dtype=jnp.dtype(self.model.dtype),
      remat=decoder.Remat(self.model.remat),
    )


def _check_numbers(config: Mapping[str, Any]) -> None:
  """Checks what no comparison finds: NaN, infinity, words among numbers."""
  for field, value in identity.flat(config).items():
    if isinstance(value, float):
      expect(math.isfinite(value), field, "a finite number", value)
    # A chat template may take what it likes.
    elif isinstance(value, (list, tuple)) and not field.startswith("model."):
      expect(all(isinstance(number, int) for number in value), field,
             "integers", value)


def _probe(config: ml_collections.ConfigDict) -> records.ProbeSpec | None:
  """What is probed; None where no reward needs it."""
  section = config.probe
  if section.reward == probe_rewards.Kind.NONE:
    return None
  sets = section.ig_search_sets
  expect(sets >= 1, "probe.ig_search_sets", "1 or more", sets)
  tries = section.reward == probe_rewards.Kind.IG_SEARCH
  return spec_of(
    records.ProbeSpec, section, others=sets if tries else 0, seed=config.seed
  )


def _reward(config: ml_collections.ConfigDict) -> step_rewards.RewardSpec:
  """The preset with the config's switches."""
  section = config.reward
  expect(section.preset in step_rewards.PRESETS, "reward.preset",
         f"one of {sorted(step_rewards.PRESETS)}", section.preset)
  switches = {
    k: v for k, v in section.items() if k != "preset" and v is not None
  }
  user_reward.check(section.function)
  if section.function:  # It pays for everything.
    switches["outcome_only"] = True
    expect(not section.search_bonus, "reward.search_bonus",
           "0 with a reward.function of your own", section.search_bonus)
    expect(config.probe.reward == probe_rewards.Kind.NONE, "probe.reward",
           "none with a reward.function of your own", config.probe.reward)
  return dataclasses.replace(
    step_rewards.PRESETS[section.preset](), **switches,
    probe=spec_of(probe_rewards.ProbeRewardSpec, config.probe),
  )


def _adapter(role: str, section) -> adapters.AdapterSpec | None:
  """Size of the adapters of the policy or value model; None trains all."""
  small = {"policy": "lora", "value": "adapter"}[role]
  kind = section["kind"]
  expect(kind in ("full", small), f"{role}.kind", f"full or {small}", kind)
  if kind == "full":
    return None
  return adapters.AdapterSpec(section["rank"], section["alpha"])


def _learner(settings: Settings, steps: int) -> ppo_specs.LearnerSpec:
  """See `Settings.learner`."""
  config = settings.config
  ppo = config["ppo"]
  released = config["reward"]["preset"] == "released"
  return ppo_specs.LearnerSpec(
    estimator=spec_of(
      ppo_specs.EstimatorSpec, ppo,
      name=config["estimator"],
      scope="attended" if released else "policy",
    ),
    loss=spec_of(
      ppo_specs.LossSpec, ppo,
      micro_weighting="micro_mean" if released else "token",
    ),
    kl=ppo_specs.KlSpec(
      in_reward=ppo["kl_in_reward"],
      coef=ppo["kl_coef"],
      estimator=ppo["kl_estimator"],
      loss_estimator=ppo["kl_loss_estimator"],
      controller=ppo["kl_controller"],
      target=ppo["kl_target"],
      horizon=ppo["kl_horizon"],
    ),
    policy=_optimizer("policy", settings, steps),
    value=_optimizer("value", settings, steps),
    batch=spec_of(
      ppo_specs.BatchSpec, ppo, row_length=settings.sampler.context
    ),
    temperature=config["rollout"]["temperature"],
    critic_warmup=ppo["critic_warmup"],
  )


def _optimizer(
  role: str, settings: Settings, steps: int
) -> ppo_specs.OptimizerSpec:
  """Optimizer of a model; its warm-up ratio becomes optimizer steps."""
  ppo = settings.config["ppo"]
  minis = settings.batch.trajectories // max(ppo["mini_batch"], 1)
  updates = steps * ppo["epochs"] * minis
  return spec_of(
    ppo_specs.OptimizerSpec, ppo,
    role=role,
    learning_rate=ppo[f"{role}_lr"],
    warmup=int(updates * ppo[f"{role}_warmup_ratio"]),
    first_rate_zero=settings.config["reward"]["preset"] == "released",
    adapter=_adapter(role, settings.config[role]),
  )


def _check_together(settings: Settings, devices: int) -> None:
  """Checks that span several sections; raises UserError."""
  batch, ppo = settings.batch, settings.config["ppo"]
  estimator = estimators.find(settings.config["estimator"])
  start = settings.warm_start
  expect(
    settings.schedule.trains or start.steps > 0 or bool(start.policy),
    "total_steps, total_epochs", "one of the two to be positive where "
    "warm_start has neither steps nor a policy to evaluate", (0, 0),
  )
  expect(
    not estimator.needs_groups or batch.rollouts > 1, "batch.rollouts",
    f"2 or more, because {estimator.name} compares rollouts of one question",
    batch.rollouts,
  )
  mini = ppo["mini_batch"]
  expect(
    mini > 0 and batch.trajectories % mini == 0, "ppo.mini_batch",
    f"a divisor of batch.questions * batch.rollouts = {batch.trajectories}",
    mini,
  )
  expect(ppo["micro_rows"] > 0, "ppo.micro_rows", "a positive number",
         ppo["micro_rows"])
  if ":" in estimator.name:  # A user's: its first step may be hours away.
    estimator.try_out(settings.learner(1).estimator, batch.trajectories)
  rollout = settings.config["rollout"]
  cut = rollout["top_k"] > 0 or rollout["top_p"] < 1
  expect(
    not cut or ppo["old_logp"] == "recompute", "ppo.old_logp",
    "recompute, because with rollout.top_k or rollout.top_p tokens are sampled "
    "from another distribution than the trained one", ppo["old_logp"],
  )
  for field, value, axis in (
    ("rollout.slots", settings.sampler.slots, "slots"),
    ("ppo.micro_rows", ppo["micro_rows"], "batch"),
  ):
    shards = settings.mesh.shards(axis, devices)
    split = " * ".join(f"mesh.{name}" for name in settings.mesh.axes(axis))
    expect(
      value % shards == 0, field,
      f"a multiple of the {shards} parts into which the mesh splits it "
      f"({split})", value,
    )
  expect(settings.protocol.template in prompts.TEMPLATES, "rollout.template",
         f"one of {sorted(prompts.TEMPLATES)}", settings.protocol.template)
  probe = settings.rollout.probe
  expect(
    probe is None or probe.tokens[-1] < settings.sampler.context,
    "probe.tokens", f"less than rollout.context = {settings.sampler.context}",
    probe and probe.tokens,
  )
  room = settings.rollout.answer_room
  expect(
    settings.sampler.context > room, "rollout.context",
    f"more than rollout.answer_room = {room}", settings.sampler.context,
  )
