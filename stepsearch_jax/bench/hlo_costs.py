"""What one run of a compiled program costs, read from its optimized HLO.

XLA's cost analysis counts the body of a loop once, however often it runs, and
a kernel (a custom call) not at all. Here every body is counted on its own and
multiplied by its trips:

  cost(c) = own(c) + sum over loops in c of trips * (cost(body) + own(cond))

where own(c) is XLA's count of a computation without the loops in it. A loop
against a constant bound says its trips itself; of any other the caller has to
know them. All figures are those of one chip: the text is its program.

The bytes of a loop's body are more than the compiler for a TPU would count:
its own count of a whole program is up to a quarter lower, since it knows what
an asynchronous slice leaves alone. A program that scans over its layers looks
worse for that than one that writes them out.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import re
from collections.abc import Iterator

import jax
import jaxlib

from stepsearch_jax import types

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64}
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+|c64)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"  (?:ROOT )?%")
# What stands behind the meaning of an instruction, some of it over lines.
_NOTES = re.compile(r", (?:metadata|frontend_attributes|backend_config)=\{")
_CALLED = re.compile(
  r"(?:calls|to_apply|condition|body|branch_computations|true_computation|"
  r"false_computation|called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)
_WHILE = re.compile(
  r" while\(%([\w.\-]+)\), condition=%([\w.\-]+), body=%([\w.\-]+)"
)
_COLLECTIVE = re.compile(
  r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|"
  r"collective-permute)(-start)?\("
)
# Products of matrices in a kernel of splash attention: q k; and dv's, dp's and
# either gradient's behind it.
_PRODUCTS = {"_fwd_": 2, "_dq_": 3, "_dkv_": 4}
_STARTS = 'custom_call_target="AsyncCollectiveStart"'


@dataclasses.dataclass(frozen=True)
class Costs:
  """Work of one chip.

  Attributes:
    flops: arithmetic, that of attention kernels included.
    moved: bytes that operations read and write, in memory of any kind.
    sent: bytes that leave the chip, by the algorithms of a ring.
  """

  flops: float = 0.0
  moved: float = 0.0
  sent: float = 0.0

  def __add__(self, other: Costs) -> Costs:
    """Both, one after the other."""
    return Costs(
      self.flops + other.flops, self.moved + other.moved,
      self.sent + other.sent,
    )

  def times(self, count: float) -> Costs:
    """So many runs."""
    return Costs(count * self.flops, count * self.moved, count * self.sent)


def shape_bytes(text: str) -> int:
  """Bytes of all array shapes in a piece of HLO, such as "(f32[2,3], u8[])"."""
  total = 0
  for kind, dims in _SHAPE.findall(text):
    bits = _BITS.get(kind) or int(kind[1:])
    total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
  return total


def group_size(line: str) -> int:
  """Chips that take part in a collective, by its replica groups.

  They are written as {{0,1},{2,3}}, as [groups,size]<=[...] or as
  mesh['a'=8,'b'=2] {'a'}.

  Raises:
    ValueError: in none of these ways.
  """
  if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    return len(found[1].split(","))
  if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
    return int(found[2])
  if found := re.search(r"replica_groups=(?:@?\w+)?\[(.*?)\] ?\{(.*?)\}", line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'",
                                                             found[2]))
  raise ValueError(f"no replica groups in {line[:200]}")


def sent_bytes(line: str, scattered: bool = False) -> float:
  """Bytes that a chip sends for one instruction; 0 if it is no collective.

  With n chips in a ring: (n - 1) / n of what is gathered, of what is
  scattered and of what is exchanged, twice that of what is all-reduced, and
  all of what is permuted.

  Args:
    line: an HLO instruction.
    scattered: of an all-reduce, each chip keeps only its part.
  """
  found = _COLLECTIVE.search(line)
  if not found:
    return 0.0
  result, kind, started = found.groups()
  size = shape_bytes(result)
  if kind == "collective-permute":  # Started, it names its operand first.
    return shape_bytes(result.split("]")[0] + "]") if started else size
  chips = group_size(line)
  if kind == "reduce-scatter":
    size *= chips
  if kind == "all-gather" and started:  # (operand, result)
    size = size * chips / (chips + 1)
  twice = 2 if kind == "all-reduce" and not scattered else 1
  return twice * size * (chips - 1) / chips


def kernel_costs(line: str) -> Costs:
  """Of a kernel of attention; what XLA does not count.

  Splash leaves out the blocks above the diagonal; the shape of its table of
  blocks, s8[1, n, n], says how many that are. The decode kernel does what slots
  hold: full ones are counted.

  Raises:
    ValueError: another kernel.
  """
  name, rest = line.split(" = ", 1)
  result, operands = rest.split(" custom-call(", 1)
  found = re.search(r"operand_layout_constraints=\{(.*?\})\}", operands)
  shapes = [
    (kind, [int(d) for d in dims.split(",") if d])
    for kind, dims in _SHAPE.findall(found[1] if found else "")
  ]
  wide = [dims for kind, dims in shapes if kind == "bf16" and len(dims) == 4]
  products = [n for part, n in _PRODUCTS.items() if part in name]
  if "splash" in name and products:
    blocks = shapes[0][1][-1]
    done = wide[0][2] * (blocks + 1) / (2 * blocks)
    flops = 2 * products[0] * math.prod(wide[0]) * done
  elif "decode_attention" in name:
    query, key = wide[:2]
    flops = 2 * 2 * math.prod(query) * key[2]
  else:
    raise ValueError(f"unknown kernel {name.strip()}")
  return Costs(flops, shape_bytes(found[1]) + shape_bytes(result))


@dataclasses.dataclass(frozen=True)
class _Loop:
  """A while instruction; `trips` is None where its bound is no constant."""

  condition: str
  body: str
  trips: int | None


class Program:
  """The computations of a compiled program."""

  def __init__(self, text: str):
    """Reads `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: it branches, and which way it goes is not known here.
    """
    self._lines: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
      if found := _COMPUTATION.match(line):
        lines = self._lines.setdefault(found[1], [line])
        if line.startswith("ENTRY"):
          self._entry = found[1]
      elif _INSTRUCTION.match(line) or line == "}":
        lines.append(_NOTES.split(line)[0])
    if re.search(r" conditional\(", text):
      raise ValueError("a program with branches")
    partitions = re.search(r"num_partitions=\d+", text)
    self._head = "HloModule program" + (
      f", {partitions[0]}" if partitions else ""
    )

  def costs(
    self, unknown_trips: int | None = None, counted: Costs | None = None
  ) -> Costs:
    """Costs of one run.

    Args:
      unknown_trips: of loops whose bound is computed.
      counted: the compiler's own count of the program, bodies once; None = as
        XLA counts where it does not know the device.

    Raises:
      ValueError: there is a loop of unknown trips, and no number for it.
    """
    return self._costs(self._entry, unknown_trips, counted)

  def _costs(self, name, unknown_trips, counted=None) -> Costs:
    total = (counted or self._counted(name)) + self._uncounted(name)
    for loop in self._loops(name):
      once = self._counted(loop.body) + self._counted(loop.condition)
      trips = unknown_trips if loop.trips is None else loop.trips
      if trips is None:
        raise ValueError(f"how often does {loop.body} run?")
      whole = self._costs(loop.body, unknown_trips) + self._costs(
        loop.condition, unknown_trips
      )
      total += whole.times(trips) + once.times(-1)
    return total

  def _reached(self, name: str, loops: bool) -> list[str]:
    """Computations that one calls, each once, itself first; loops or not."""
    found, todo = [], [name]
    while todo:
      name = todo.pop()
      if name in found:
        continue
      found.append(name)
      for line in self._lines[name]:
        if loops or not _WHILE.search(line):
          for names in _CALLED.findall(line):
            todo += re.findall(r"%([\w.\-]+)", names)
    return found

  def _loops(self, name: str) -> Iterator[_Loop]:
    for reached in self._reached(name, loops=False):
      for line in self._lines[reached]:
        if found := _WHILE.search(line):
          start, condition, body = found.groups()
          yield _Loop(condition, body, self._trips(reached, *found.groups()))

  def _trips(self, name, start, condition, body) -> int | None:
    """How often a loop runs from one constant to another, else None."""
    root = self._root(condition)
    found = re.search(r" compare\(%([\w.\-]+), %([\w.\-]+)\), direction=LT",
                      root)
    if not found:
      return None
    counter = self._definition(condition, found[1])
    index = re.search(r" get-tuple-element\(.*\), index=(\d+)", counter)
    bound = self._constant(condition, found[2])
    if bound is None or not index:
      return None
    first = self._element(self._definition(name, start), int(index[1]))
    last = self._element(self._root(body), int(index[1]))
    if not first or not last:
      return None
    begin = self._constant(name, first)
    added = re.search(r" add\((.*?)\)", self._definition(body, last))
    terms = _operands(added[1]) if added else []
    steps = [self._constant(body, term) for term in terms]
    step = next((x for x in steps if x is not None), None)
    if begin is None or step is None:
      return None
    return -((begin - bound) // step)

  def _root(self, name: str) -> str:
    return next(x for x in self._lines[name] if x.startswith("  ROOT "))

  def _definition(self, name: str, variable: str) -> str:
    pattern = re.compile(rf"  (?:ROOT )?%{re.escape(variable)} = ")
    return next(x for x in self._lines[name] if pattern.match(x))

  @staticmethod
  def _element(line: str, index: int) -> str | None:
    """What an element of a tuple is called in the line that makes it."""
    made = re.search(r" tuple\((.*?)\)", line)
    return _operands(made[1])[index] if made else None

  def _constant(self, name: str, variable: str) -> int | None:
    """The value of a whole number, through copies."""
    line = self._definition(name, variable)
    if found := re.search(r" constant\((-?\d+)\)", line):
      return int(found[1])
    if found := re.search(r" (?:copy|bitcast)\(%([\w.\-]+)\)", line):
      return self._constant(name, found[1])
    return None

  @functools.cache  # noqa: B019 - a program lives as long as its costs.
  def _counted(self, name: str) -> Costs:
    """XLA's count of a computation, bodies of loops counted once."""
    reached = set(self._reached(name, loops=True)) - {name}
    # In the text's order: a computation stands before those that call it.
    blocks = ["\n".join(lines).removeprefix("ENTRY ")
              for other, lines in self._lines.items() if other in reached]
    own = "\n".join(self._lines[name]).removeprefix("ENTRY ")
    found = _xla_costs("\n\n".join([self._head, *blocks, f"ENTRY {own}"]))
    return Costs(found.get("flops", 0.0), found.get("bytes accessed", 0.0))

  def _uncounted(self, name: str) -> Costs:
    """Kernels and collectives of a computation, without those of its loops."""
    total = Costs()
    for reached in self._reached(name, loops=False):
      lines = self._lines[reached]
      starts = any(_STARTS in line for line in lines)
      scattered = reached.startswith("all-reduce-scatter")
      for line in lines[1:-1]:
        if 'custom_call_target="tpu_custom_call"' in line:
          total += kernel_costs(line)
        if starts or not self._channels(line) & self._started:
          total += Costs(sent=sent_bytes(line, scattered))
    return total

  @functools.cached_property
  def _started(self) -> set[str]:
    """Collectives that run beside other work.

    They stand in every piece of that work; the piece that starts one counts.
    """
    return {
      channel for lines in self._lines.values()
      if any(_STARTS in line for line in lines)
      for line in lines for channel in self._channels(line)
    }

  @staticmethod
  def _channels(line: str) -> set[str]:
    return set(re.findall(r" channel_id=(\d+)", line))


def _operands(text: str) -> list[str]:
  """Names in a list of operands."""
  return re.findall(r"%([\w.\-]+)", text)


def _xla_costs(text: str) -> dict[str, float]:
  """XLA's cost analysis of a module's text.

  Raises:
    UserError: this jaxlib does not offer it.
  """
  try:
    hlo = importlib.import_module("jaxlib._hlo")
    analysis = importlib.import_module("jaxlib._jax").hlo_module_cost_analysis
  except (ImportError, AttributeError) as error:
    raise types.UserError(
      f"jaxlib {jaxlib.__version__} cannot read HLO text back; the suite "
      "wants that of jax 0.12"
    ) from error
  client = jax.local_devices(backend="cpu")[0].client
  return analysis(client, hlo.hlo_module_from_text(text))
