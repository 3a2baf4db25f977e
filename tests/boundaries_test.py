"""Who may import whom: the boundaries of the architecture."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def offenders(pattern, *banned):
  return [
    f"{path.relative_to(ROOT)}: {name}"
    for path in sorted(ROOT.glob(pattern))
    for name in imports(path)
    if any(name == b or name.startswith(b + ".") for b in banned)
  ]


OURS = "stepsearch_jax."


@pytest.mark.parametrize(
  "pattern, banned",
  [
    ("stepsearch_jax/env/*.py", ["jax", "flax", OURS + "tokenizer"]),
    ("stepsearch_jax/rewards/*.py", ["jax", "flax"]),
    ("stepsearch_jax/rollout/sampl*.py",
     [OURS + "env", OURS + "retrieval", OURS + "tokenizer"]),
    ("stepsearch_jax/rollout/slots.py",
     [OURS + "env", OURS + "retrieval", OURS + "tokenizer"]),
    ("stepsearch_jax/ppo/*.py",
     [OURS + "env", OURS + "retrieval", OURS + "tokenizer", OURS + "rewards"]),
    ("stepsearch_jax/[!et]*/**/*.py", ["ml_collections"]),
    ("stepsearch_jax/data/*.py", ["jax"]),
  ],
)
def test_imports_stay_inside_their_boundary(pattern, banned):
  assert list(ROOT.glob(pattern))
  assert offenders(pattern, *banned) == []


def test_only_the_benchmarks_import_their_peers():
  peers = ["torch", "tensorflow", "ray", "vllm", "faiss", "sklearn"]
  found = offenders("stepsearch_jax/**/*.py", *peers)
  assert [f for f in found if "/tools/bench/" not in f] == []
  assert {f.split(": ")[1].split(".")[0] for f in found} <= {
    "torch", "faiss", "sklearn"
  }


def test_only_sharding_writes_partition_specs():
  writers = [
    path.name
    for path in ROOT.glob("stepsearch_jax/**/*.py")
    if "PartitionSpec" in path.read_text()
  ]
  assert writers == ["sharding.py"]


def test_configs_import_ml_collections_and_configs_only():
  for path in ROOT.glob("configs/*.py"):
    for name in imports(path):
      assert name.split(".")[0] in ("ml_collections", "configs"), path
