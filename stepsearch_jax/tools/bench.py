"""Measures this project beside its peers, in one run, on the same work.

  pip install -e ".[bench]"
  stepsearch bench --suite=rewards --json=rewards.json

Suites with a peer: rewards, retrieval, rollout (replay, decode, prefill),
update (and its memory), step (whole steps of PPO and GRPO), tpu_programs
(compiled for a TPU that need not be there). Without one: growth (of cost with
tokens), training (reads a finished run, on the machine where it ran),
accelerator (shares of a device's peaks), attention (kernels side by side),
parity (this device beside the CPU).

Ours and the peer alternate; medians and ratios of at least three repeats are
printed with the workload and the versions, after the results were found equal.
A figure that fails is named, with what it raised, and the others are taken.
Speeds are ratios on this machine, not promises. Tunix joins the rollout suite
where it is installed, and is the peer of tpu_programs; its pins clash with this
project's, so that takes

  pip install --no-deps google-tunix==0.1.7 qwix==0.1.8 google-metrax==0.2.4 \\
    jaxtyping==0.3.11 wadler_lindig==0.1.8 clu==0.0.12 perfetto==0.59.1 \\
    sentencepiece==0.2.3 pandas==3.1.1
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
import traceback

from absl import flags, logging

from stepsearch_jax import cli, types
from stepsearch_jax.bench import duel, report
from stepsearch_jax.evaluation import card as evaluation
from stepsearch_jax.plan import machines

# Suite: module of bench and its function. One suite's packages need not be
# there for another.
_SUITES = {
  "rewards": ("rewards", "duels"),
  "retrieval": ("retrieval", "duels"),
  "rollout": ("rollout", "duels"),
  "update": ("update", "duels"),
  "step": ("update", "steps"),
  "growth": ("growth", "growths"),
  "training": ("training", "readings"),
  "accelerator": ("accelerator", "readings"),
  "attention": ("attention", "readings"),
  "parity": ("parity", "readings"),
  "tpu_programs": ("tpu_programs", "duels"),
}
_SUITE = flags.DEFINE_enum("suite", None, sorted(_SUITES), "What to measure.")
_INPUT = flags.DEFINE_string(
  "input", None,
  "rewards: JSONL of trajectories as tools/score takes them, default made-up "
  "ones; retrieval: passage files, separated by commas, default none; "
  "rollout, step and accelerator: recorded workloads (JSON), default made-up "
  "ones; training: the folder of a finished run; tpu_programs: a folder that "
  "keeps what was compiled; accelerator, attention, parity and tpu_programs: "
  "`tiny` rehearses them at sizes that any machine can do.",
)
_PEER = flags.DEFINE_string(
  "peer", "", "Only comparisons whose peer's name contains this."
)
_WHAT = flags.DEFINE_string(
  "what", "", "Only figures whose description contains this."
)
_REPEATS = flags.DEFINE_integer(
  "repeats", duel.MIN_REPEATS, "Alternating repeats.", duel.MIN_REPEATS
)
_JSON = flags.DEFINE_string(
  "json", None,
  "Also write the figures here, at every repeat; the same command goes on from "
  "a file of the same commit, versions and machine.",
)


def _versions() -> dict[str, str]:
  found = {"python": platform.python_version(), "cores": str(os.cpu_count()),
           "machine": machines.here(), "commit": evaluation.commit()}
  for name in ("jax", "flax", "libtpu", "numpy", "scikit-learn", "torch",
               "scann", "faiss-cpu", "transformers", "google-tunix"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def _items(suite: str):
  module, function = _SUITES[suite]
  module = importlib.import_module(f"stepsearch_jax.bench.{module}")
  return getattr(module, function)(_INPUT.value)


def main() -> int:
  """Entry; see the module docstring.

  Returns:
    The exit code: 1 if a figure could not be taken.
  """
  versions = _versions()
  print("  ".join(f"{k} {v}" for k, v in versions.items()))
  kept = report.Report(_JSON.value, {
    "suite": _SUITE.value, "input": _INPUT.value, "versions": versions,
  })
  if len(kept):
    print(f"{_JSON.value} has figures ({len(kept)}); only repeats they lack "
          "are taken. For new ones give --json another file.")
  failed = 0
  for item in _items(_SUITE.value):
    if _PEER.value in getattr(item, "peer", "") and (
      _WHAT.value in f"{item.what} ({item.work})"
    ):
      failed += not _taken(kept, item)
  return int(failed > 0)


def _taken(kept: report.Report, item) -> bool:
  """Measures one figure and prints it, or what it raised."""
  try:
    result = kept.measure(item, _REPEATS.value)
  except Exception as error:  # noqa: BLE001 - the next figure may well work
    logging.debug("where it happened", exc_info=True)
    kept.failed(item, error)
    print(f"FAILED {item.what} ({item.work}): {report.brief(error)}",
          flush=True)
    if not isinstance(error, types.UserError):
      traceback.print_exception(error, limit=-4, file=sys.stderr)
    return False
  print(_line(result), flush=True)
  return True


def _line(result: dict) -> str:
  head = f"{result['what']} ({result['work']})"
  goal = f", asked: {result['goal']}" if result["goal"] else ""
  if "peer_name" not in result:
    return f"{head}: {result['value']:.3g} {result['unit']}{goal}"
  return (f"{head} beside {result['peer_name']}: {result['ours']:.4f} and "
          f"{result['peer']:.4f} {result['unit']}, ratio "
          f"{result['ratio']:.2f}{goal}")


if __name__ == "__main__":
  cli.run(main, required=["suite"])
