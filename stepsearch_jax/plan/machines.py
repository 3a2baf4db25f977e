"""Chips that a run can be planned for, and the ones that are here."""

from __future__ import annotations

import dataclasses
import os
import platform
import re

import jax
import numpy as np
from etils import epath

from stepsearch_jax import types

GB = 1e9
_USABLE = 0.95  # Of a chip's memory; the runtime keeps the rest.

# Memory GB, dense bfloat16 TFLOP/s and memory GB/s per chip, from the vendors'
# data sheets; "cpu": measured in float32 on the project's 2-core machine.
CHIPS = {
  "v4": (32.0, 275.0, 1228.0),
  "v5e": (16.0, 197.0, 819.0),
  "v5p": (95.0, 459.0, 2765.0),
  "v6e": (32.0, 918.0, 1640.0),
  "gpu-a100": (80.0, 312.0, 2039.0),
  "gpu-h100": (80.0, 989.0, 3350.0),
  "gpu-h200": (141.0, 989.0, 4800.0),
  "cpu": (24.0, 0.18, 35.0),
}


@dataclasses.dataclass(frozen=True)
class Machine:
  """Chips of one kind.

  Attributes:
    name: as given on the command line.
    chips: how many.
    memory: bytes per chip.
    flops: peak per chip and second.
    bandwidth: bytes per chip and second.
    platform: "tpu", "gpu" or "cpu".
    topology: name for the TPU compiler; "" where it does not apply.
  """

  name: str
  chips: int
  memory: float
  flops: float
  bandwidth: float
  platform: str
  topology: str

  @property
  def usable(self) -> float:
    """Bytes per chip that a run can have."""
    return _USABLE * self.memory


# What a device calls itself, in the order of looking.
_KINDS = {
  "h100": "gpu-h100", "h200": "gpu-h200", "a100": "gpu-a100",
  "v6 lite": "v6e", "v5 lite": "v5e", "v5": "v5p", "v4": "v4",
}


def of_device(platform: str, kind: str) -> Machine:
  """The chip behind a device of JAX, for its peaks.

  Args:
    platform: `Device.platform`.
    kind: `Device.device_kind`, for instance "NVIDIA H100 80GB HBM3".

  Raises:
    UserError: its peaks are not known.
  """
  if platform == "cpu":
    return parse_topology("cpu")
  for part, name in _KINDS.items():
    if part in kind.lower():
      return parse_topology(f"{name}:1" if name.startswith("v") else name)
  raise types.UserError(
    f"the peaks of {kind!r} are not known; known chips: {', '.join(CHIPS)}"
  )


def parse_topology(text: str) -> Machine:
  """Reads `v5e:4x4`, `gpu-h100x8` or `cpu`.

  Raises:
    UserError: an unknown chip or shape.
  """
  kind, chips, topology = text, 1, ""
  if found := re.fullmatch(r"(v\d\w?):(\d+(?:x\d+)*)", text):
    kind, topology = found[1], text
    chips = int(np.prod([int(n) for n in found[2].split("x")]))
  elif found := re.fullmatch(r"(gpu-\w+?)x(\d+)", text):
    kind, chips = found[1], int(found[2])
  if kind not in CHIPS or chips < 1:
    raise types.UserError(
      f"--topology={text!r}: expected for instance v5e:4x4, gpu-h100x8 or cpu; "
      f"known chips: {', '.join(CHIPS)}"
    )
  memory, teraflops, bandwidth = CHIPS[kind]
  platform = "tpu" if kind.startswith("v") else kind.split("-")[0]
  return Machine(
    text, chips, memory * GB, teraflops * 1e12, bandwidth * GB, platform,
    topology,
  )


def here() -> str:
  """Returns number and kind of the devices that this process has.

  Processors go by name, family and model: names alone can be the same for
  different ones.
  """
  device = jax.local_devices()[0]
  if device.platform != "cpu":
    return f"{jax.local_device_count()} x {device.device_kind}"
  info = epath.Path("/proc/cpuinfo")
  name = processor(info.read_text() if info.exists() else "")
  return f"{os.cpu_count()} x {name}"


def processor(cpuinfo: str) -> str:
  """Returns the kind of a processor from the text of /proc/cpuinfo."""
  found = dict(re.findall(r"^([^\t:\n]+)\s*: (.*)$", cpuinfo, re.MULTILINE))
  name = found.get("model name", platform.machine())
  if "cpu family" in found:
    name += f" {found['cpu family']}/{found['model']}"
  return name
