"""Compiles an update for a mesh and counts what its projection exchanges.

  python tests/ppo/vocabulary_worker.py DATA FSDP

Prints, as JSON, the rows of every product with the vocabulary and the
collectives of the computations that hold one.
"""

import json
import re
import sys

import fakes
from ppo import parts

from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import learner

COLLECTIVE = re.compile(
  r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
  r"(?:-start)?\("
)


def main(data, fsdp):
  tokenizer = fakes.make_tokenizer()
  model = fakes.make_model(tokenizer.vocab_size + 1)
  spec = parts.learner_spec(
    batch__mini_batch=8, batch__micro_rows=8, batch__row_length=192,
  )
  ours = learner.Learner(
    model, model, spec, sharding.make_mesh(int(data), int(fsdp), 1)
  )
  text = ours.lowered()["policy_update"].compile().as_text()
  logits = re.compile(rf"\[(\d+),{model.vocab_size}\]\S* dot\(")
  weights = re.compile(rf"\[{model.vocab_size},\d+\]\S* dot\(")
  rows, collectives = [], []
  for computation in text.split("\n\n"):
    rows += [int(n) for n in logits.findall(computation)]
    if logits.search(computation) or weights.search(computation):
      collectives += COLLECTIVE.findall(computation)
  print(json.dumps({"rows": rows, "collectives": collectives}))


if __name__ == "__main__":
  main(*sys.argv[1:])
