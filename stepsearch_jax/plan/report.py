"""What a plan says: whether a run fits, what binds it, what would help.

The numbers are `arithmetic`'s; this module only compares them with the machine
and writes them down.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import ml_collections

from stepsearch_jax.models import decoder
from stepsearch_jax.parallel import sharding
from stepsearch_jax.plan import arithmetic, remat
from stepsearch_jax.plan.machines import GB, Machine


def _changes(config):
  """Field changes that save memory: (text, changed config)."""
  shards = config.mesh.data * config.mesh.fsdp
  def changed(path, value):
    other = copy.deepcopy(config)
    with other.unlocked():
      node = other
      *parents, last = path.split(".")
      for name in parents:
        node = node[name]
      node[last] = value
    return f"{path} = {value}", other

  if config.rollout.slots // 2 >= shards:
    yield changed("rollout.slots", config.rollout.slots // 2)
  if config.ppo.micro_rows // 2 >= shards:
    yield changed("ppo.micro_rows", config.ppo.micro_rows // 2)
  if config.rollout.context > 1024:
    yield changed("rollout.context", config.rollout.context // 2)
  if config.model.remat == decoder.Remat.NONE:
    yield changed("model.remat", "dots")
  if config.model.remat != decoder.Remat.FULL:
    yield changed("model.remat", "full")
  if config.rollout.extend_tokens[-1] > 128:
    yield changed("rollout.extend_tokens", config.rollout.extend_tokens[:-1])
  if config.policy.kind == "full":
    yield changed("policy.kind", "lora")
  if config.value.kind == "full" and arithmetic.needs_values(config):
    yield changed("value.kind", "adapter")
  if config.mesh.fsdp % 2 == 0:
    text, other = changed("mesh.tensor", config.mesh.tensor * 2)
    other.mesh.fsdp //= 2
    yield f"{text} (mesh.fsdp = {other.mesh.fsdp})", other


def advice(
  config: ml_collections.ConfigDict, machine: Machine, peak: float
) -> list[tuple[str, float]]:
  """Up to three field changes, one upon the other, until the run fits.

  Args:
    config: run settings that do not fit.
    machine: where they do not.
    peak: their bytes per chip.

  Returns:
    (change, bytes per chip after it), the largest saving first.
  """
  def needs(config):
    return max(arithmetic.program_peaks(config, machine, {}).values())

  before = needs(config)
  found = []
  while peak > machine.usable and len(found) < 3:
    options = [
      (needs(other), text, other) for text, other in _changes(config)
    ]
    if not options:
      break
    after, text, config = min(options, key=lambda option: option[0])
    if after >= before:
      break
    peak, before = peak + after - before, after
    found.append((text, peak))
  return found


def _remat_choices(config, machine, programs, updates, tokens, share):
  """{model.remat: what the run needs with it}, the slowest first."""
  found = {}
  for word in reversed(remat.FASTEST_FIRST):
    choice = remat.choose(config, machine, word, programs, updates.get(word))
    phases = arithmetic.step_times(
      remat.with_remat(config, word), machine, tokens, share
    )
    found[str(word)] = dataclasses.asdict(choice) | {
      "seconds": phases["updates"]["seconds"]
    }
  return found


def make_plan(
  config: ml_collections.ConfigDict, machine: Machine, programs: dict,
  tokens: int, share: float,
  updates: Mapping[remat.Remat, remat.Programs] | None = None,
) -> dict:
  """Everything that `render` prints, JSON-able.

  Args:
    config: run settings with a resolved mesh.
    machine: where the run is to be.
    programs: from `tpu_compiler.compile_programs`, or none.
    tokens: mean tokens of a trajectory.
    share: part of them that the policy writes.
    updates: from `tpu_compiler.compile_faster`, or none.
  """
  peaks = arithmetic.program_peaks(config, machine, programs)
  peak = max(peaks.values())
  phases = arithmetic.step_times(config, machine, tokens, share)
  seconds = sum(phase["seconds"] for phase in phases.values())
  trajectories = config.batch.questions * config.batch.rollouts
  choices = _remat_choices(
    config, machine, programs, updates or {}, tokens, share
  )
  fitting = [word for word, choice in choices.items() if choice["fits"]]
  return {
    "machine": dataclasses.asdict(machine),
    "shape": arithmetic.shape_source(config),
    "parameters": arithmetic.parameter_count(arithmetic.model_shape(config)),
    "mesh": {axis: config.mesh[axis] for axis in sharding.AXES},
    "compiled": bool(programs),
    "tokens_per_trajectory": tokens,
    "policy_share": share,
    "resident": arithmetic.resident(config),
    "programs": programs,
    "peaks": peaks,
    "peak": peak,
    "fits": peak <= machine.usable,
    "remat": choices,
    "remat_set": str(config.model.remat),
    "remat_fastest": min(
      fitting, key=lambda word: choices[word]["seconds"], default=None
    ),
    "rows": {
      phase: dataclasses.asdict(rows) | {"padding_share": rows.padding_share}
      for phase, rows in arithmetic.step_rows(config, tokens).items()
    },
    "phases": phases,
    "step_seconds": seconds,
    "tokens_per_second": trajectories * tokens / seconds,
    "binds": max(phases, key=lambda name: phases[name]["seconds"]),
    "advice": advice(config, machine, peak),
  }


def render(plan: dict) -> str:
  """A plan as text."""
  machine = plan["machine"]
  mesh = " x ".join(f"{k} {v}" for k, v in plan["mesh"].items())
  lines = [f"{machine['name']}: {machine['chips']} chips of "
           f"{machine['memory'] / GB:.0f} GB, mesh {mesh}",
           f"policy of {plan['parameters'] / 1e6:,.0f}M parameters "
           f"({plan['shape']})", "",
           f"{'resident on a chip':28}{'GB':>8}"]
  lines += [f"{k:28}{v / GB:8.2f}" for k, v in plan["resident"].items()]
  how = "compiled" if plan["compiled"] else "estimated"
  lines += ["", f"{'peak during (' + how + ')':28}{'GB':>8}"]
  lines += [f"{k:28}{v / GB:8.2f}" for k, v in plan["peaks"].items()]
  lines += ["", *_render_remat(plan)]
  title = f"rows of {plan['rows']['updates']['length']:,} tokens"
  lines += ["", f"{title:28}{'filled':>8}{'computed':>10}  padding"]
  lines += [
    f"{name:28}{r['filled']:8.1f}{r['computed']:10}{r['padding_share']:9.0%}"
    for name, r in plan["rows"].items()
  ]
  lines += ["", f"{'roofline of a step':28}{'PFLOP':>8}{'s':>9}  bound"]
  lines += [
    f"{name:28}{p['flops'] / 1e15:8.2f}{p['seconds']:9.2f}  {p['bound']}"
    for name, p in plan["phases"].items()
  ]
  lines += [
    "",
    f"step {plan['step_seconds']:.1f} s, {plan['tokens_per_second']:.0f} "
    f"tokens/s at best ({plan['tokens_per_trajectory']} tokens a trajectory, "
    f"{plan['policy_share']:.0%} the policy's); {plan['binds']} binds",
    f"peak {plan['peak'] / GB:.2f} GB of {machine['memory'] / GB:.0f} GB: "
    + ("fits" if plan["fits"] else "does not fit"),
  ]
  if plan["advice"]:
    last = plan["advice"][-1][1]
    helps = last <= Machine(**machine).usable
    lines.append(
      ("would fit with " if helps else "would still not fit with ")
      + "; ".join(f"{text} ({size / GB:.1f} GB)"
                  for text, size in plan["advice"])
    )
  return "\n".join(lines)


def _render_remat(plan):
  """Lines about what each `model.remat` needs, and the one to take."""
  own, fastest = plan["remat_set"], plan["remat_fastest"]
  lines = [f"{'model.remat':28}{'update':>8}{'run GB':>8}{'update s':>10}"]
  for word, choice in plan["remat"].items():
    name = word + (" (compiled)" if choice["compiled"] else " (estimated)")
    lines.append(
      f"{name:28}{choice['update'] / GB:8.2f}{choice['peak'] / GB:8.2f}"
      f"{choice['seconds']:10.2f}  "
      + ("fits" if choice["fits"] else "does not fit")
      + (", as set" if word == own else "")
    )
  if fastest is None:
    return [*lines, "no model.remat fits"]
  best = f"model.remat = {fastest} is the fastest that fits"
  if fastest != own:
    saved = plan["remat"][own]["seconds"] - plan["remat"][fastest]["seconds"]
    if plan["remat"][own]["fits"]:
      best += f": {saved:.2f} s less for the updates of a step"
  return [*lines, best]
