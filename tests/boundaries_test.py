"""Who may import whom: the boundaries of the architecture."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "stepsearch_jax"

# Every folder and top-level module, and all that it may import of the others.
# JAX and ml_collections are listed like folders. A name that is missing here
# fails the test, so a new folder has to say where it stands.
MAY_IMPORT = {
  "__main__": set(),
  "types": set(),
  "files": {"buckets", "types"},
  "data": {"files", "types"},
  "env": {"types"},
  "rewards": {"types", "user_functions"},
  "parallel": {"jax", "types"},
  "buckets": set(),
  "user_functions": {"types"},
  "models": {"buckets", "jax", "parallel", "types"},
  "retrieval": {"buckets", "data", "files", "jax", "models", "parallel",
                "serving", "types"},
  "serving": {"files", "types"},
  "rollout": {"env", "jax", "models", "parallel", "types"},
  "ppo": {"jax", "models", "parallel", "types", "user_functions"},
  "sft": {"data", "env", "files", "jax", "models", "parallel", "ppo", "rewards",
          "rollout", "types"},
  "evaluation": {"data", "files", "parallel", "rewards", "types"},
  "supervision": {"buckets", "data", "env", "files", "jax", "models",
                  "parallel", "retrieval", "rewards", "rollout", "types"},
  "run": {"buckets", "data", "env", "evaluation", "files", "jax",
          "ml_collections", "models", "parallel", "ppo", "retrieval", "rewards",
          "rollout", "sft", "types"},
  "plan": {"jax", "ml_collections", "models", "parallel", "ppo", "rollout",
           "run", "types"},
  "cli": {"jax", "parallel", "run", "types"},
  "train": {"cli", "data", "evaluation", "files", "jax", "ml_collections",
            "parallel", "ppo", "rewards", "run", "types"},
  "evaluate": {"cli", "data", "evaluation", "files", "ml_collections",
               "parallel", "run", "types"},
  "view": {"files", "types"},
  "bench": {"cli", "data", "env", "evaluation", "files", "jax", "models",
            "parallel", "plan", "ppo", "retrieval", "rewards", "rollout",
            "run", "types"},
  "tools": {"bench", "buckets", "cli", "data", "env", "evaluation", "files",
            "jax", "ml_collections", "models", "parallel", "plan", "retrieval",
            "rewards", "run", "serving", "supervision", "train", "types",
            "view"},
}
# The rollout's device side knows no strings and no retrievers.
DEVICE_SIDE = ("device", "layout", "programs", "sampling")
PEERS = {"torch", "tensorflow", "ray", "vllm", "faiss", "sklearn"}


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def place(path):
  """Folder of the package, or module at its top, that a file belongs to."""
  parts = path.relative_to(PACKAGE).with_suffix("").parts
  return parts[0]


def reached(path):
  """Places, JAX and ml_collections that a file imports."""
  for name in imports(path):
    root, *rest = name.split(".")
    if root == "stepsearch_jax" and rest[0] != place(path):
      yield rest[0]
    elif root in ("jax", "flax", "optax", "orbax"):
      yield "jax"
    elif root == "ml_collections":
      yield root


def sources():
  return [path for path in sorted(PACKAGE.glob("**/*.py"))
          if path != PACKAGE / "__init__.py"]


def test_every_folder_says_what_it_may_import():
  assert {place(path) for path in sources()} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", sorted(MAY_IMPORT))
def test_imports_stay_inside_their_boundary(name):
  crossed = {
    (str(path.relative_to(ROOT)), target)
    for path in sources() if place(path) == name
    for target in reached(path) if target not in MAY_IMPORT[name]
  }
  assert crossed == set()


def test_tools_are_commands_and_nothing_else():
  for path in PACKAGE.glob("tools/*.py"):
    if path.name != "__init__.py":
      assert 'if __name__ == "__main__":' in path.read_text(), path


@pytest.mark.parametrize("name", DEVICE_SIDE)
def test_the_device_side_of_the_rollout_knows_no_text(name):
  text_side = {"actions", "env", "observations", "retrieval", "tokenizer"}
  for imported in imports(PACKAGE / "rollout" / f"{name}.py"):
    assert not text_side & set(imported.split(".")), imported


def test_only_the_benchmarks_import_their_peers():
  found = {
    (place(path), name.split(".")[0])
    for path in sources() for name in imports(path)
    if name.split(".")[0] in PEERS
  }
  assert found <= {("bench", "torch"), ("bench", "faiss"), ("bench", "sklearn")}


def test_only_parallel_writes_partition_specs():
  # jax.P is another name of PartitionSpec.
  words = re.compile(r"\b(PartitionSpec|NamedSharding|jax\.P|sharding\.P)\b")
  writers = {place(path) for path in sources()
             if words.search(path.read_text())}
  assert writers == {"parallel"}


def test_configs_import_ml_collections_configs_and_collections_only():
  allowed = ("ml_collections", "configs", "collections")
  for path in ROOT.glob("configs/*.py"):
    for name in imports(path):
      assert name.split(".")[0] in allowed, path
