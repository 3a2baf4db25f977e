"""The device mesh and the ONE table from logical to mesh axes.

Models and batches name logical axes only; nothing else in the project writes
a PartitionSpec.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from stepsearch_jax import types

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. A dimension that does not divide stays whole, which
# is logged; no mesh axis may split two dimensions of one array. `mesh.rules`
# changes single entries.
RULES = (
  ("batch", ("data", "fsdp")),
  ("slots", ("data", "fsdp")),
  ("vocab", ("tensor",)),
  ("heads", ("tensor",)),
  ("kv_heads", ("tensor",)),
  ("mlp", ("tensor",)),
  ("embed", ("fsdp",)),
  ("act_embed", ()),
  ("norm", ()),
  ("head_dim", ()),
  ("length", ()),
  ("layers", ()),
  ("rank", ()),
)


def mesh_shape(
  devices: int, data: int = -1, fsdp: int = 1, tensor: int = 1
) -> tuple[int, int, int]:
  """Sizes of the (data, fsdp, tensor) axes over a number of devices.

  Args:
    devices: how many there are.
    data: data-parallel copies; -1 takes the devices that the others leave.
    fsdp: shards of parameters and optimizer states; -1 likewise.
    tensor: shards of heads, MLP and vocabulary.

  Raises:
    UserError: the product is not the number of devices.
  """
  if data == -1:
    data = max(devices // (fsdp * tensor), 1)
  elif fsdp == -1:
    fsdp = max(devices // (data * tensor), 1)
  if data * fsdp * tensor != devices:
    raise types.UserError(
      f"mesh data={data} x fsdp={fsdp} x tensor={tensor} needs "
      f"{data * fsdp * tensor} devices, there are {devices}"
    )
  return data, fsdp, tensor


@dataclasses.dataclass(frozen=True)
class DeviceMesh:
  """Devices in a grid, and which logical axis is split over which of its axes.

  Attributes:
    mesh: jax's mesh with the axes `AXES`.
    rules: (logical axis, mesh axes) of every logical axis.
  """

  mesh: Mesh | AbstractMesh
  rules: tuple[tuple[str, tuple[str, ...]], ...]

  @property
  def size(self) -> int:
    """Number of devices."""
    return self.mesh.size

  @property
  def shape(self) -> dict[str, int]:
    """Devices along each axis of `AXES`."""
    return dict(self.mesh.shape)


def make_mesh(
  data: int = -1, fsdp: int = 1, tensor: int = 1, rules: str = "",
  devices: Sequence[jax.Device] | np.ndarray | None = None,
) -> DeviceMesh:
  """Returns a mesh over all devices, or the given ones.

  Args:
    data, fsdp, tensor: see `mesh_shape`.
    rules: see `parse_rules`.
    devices: None = all of the run.

  Raises:
    UserError: another number of devices is needed, or a rule names an unknown
      axis.
  """
  devices = np.asarray(jax.devices() if devices is None else devices)
  shape = mesh_shape(devices.size, data, fsdp, tensor)
  # Neighbors in the grid are neighbors in the machine, where it has a shape.
  grid = mesh_utils.create_device_mesh(
    shape, devices.ravel().tolist(), allow_split_physical_axes=True
  )
  return DeviceMesh(Mesh(grid, AXES), parse_rules(rules))


def abstract_mesh(
  data: int, fsdp: int, tensor: int, rules: str = ""
) -> DeviceMesh:
  """Returns a mesh without devices, for questions about shapes."""
  mesh = AbstractMesh((data, fsdp, tensor), AXES)
  return DeviceMesh(mesh, parse_rules(rules))


def parse_rules(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
  """Returns the rules table with changes.

  Args:
    text: changes such as "vocab=fsdp,mlp=tensor+fsdp,embed=": a logical axis
      and the mesh axes that split it, none of them for whole.

  Raises:
    UserError: an axis that does not exist, or one that is named twice.
  """
  table = dict(RULES)
  changes = [part.strip() for part in text.split(",") if part.strip()]
  for change in changes:
    name, equals, given = (part.strip() for part in change.partition("="))
    axes = tuple(axis.strip() for axis in given.split("+") if axis.strip())
    if not equals or name not in table:
      raise types.UserError(
        f"mesh.rules: expected AXIS=MESH_AXES with AXIS one of "
        f"{', '.join(table)}, got {change!r}"
      )
    if not set(axes) <= set(AXES) or len(set(axes)) < len(axes):
      raise types.UserError(
        f"mesh.rules: {name} must be split over axes of "
        f"{' + '.join(AXES)}, each once, got {given!r}"
      )
    table[name] = axes
  return tuple(table.items())


def _as_flax(rules):
  """The table as flax writes it: a name alone, or None, where it can."""
  return tuple(
    (name, axes if len(axes) > 1 else (*axes, None)[0]) for name, axes in rules
  )


def _rules_in_scope():
  """The table that `scope` has set, as `DeviceMesh.rules`."""
  return tuple(
    (name, (axes,) if isinstance(axes, str) else axes or ())
    for name, axes in nn.get_logical_axis_rules()
  )


def _spec(mesh, rules, names, shape) -> PartitionSpec:
  """Spec of one array.

  Raises:
    UserError: a logical axis without a rule, or a mesh axis that would split
      two dimensions.
  """
  table, used, out = dict(rules), {}, []
  for name, size in zip(names, shape, strict=True):
    if name is not None and name not in table:
      raise types.UserError(f"logical axis {name!r} is not in sharding.RULES")
    axes = table.get(name, ())
    for axis in axes:
      if axis in used:
        raise types.UserError(
          f"mesh.rules: an array with the axes {tuple(names)} cannot split "
          f"both {used[axis]} and {name} over the mesh axis {axis}"
        )
      used[axis] = name
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if size % shards:
      _say_whole(name, size, "*".join(axes), shards)
    if shards == 1 or size % shards:
      out.append(None)
    else:
      out.append(axes if len(axes) > 1 else axes[0])
  return PartitionSpec(*out)


@functools.cache  # Once for every dimension, not for every array and trace.
def _say_whole(name: str, size: int, axes: str, shards: int) -> None:
  logging.warning(
    "%s = %d is not divisible by mesh %s = %d: every device holds all of it",
    name, size, axes, shards,
  )


def named(
  mesh: DeviceMesh, names: Sequence[str | None], shape: Sequence[int]
) -> NamedSharding:
  """Returns the sharding of an array with logical axis `names`."""
  return NamedSharding(mesh.mesh, _spec(mesh.mesh, mesh.rules, names, shape))


def by_axes(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
  """Returns the sharding of an array over axes of a mesh that is not ours."""
  return NamedSharding(mesh, PartitionSpec(*axes))


def tree_shardings(
  mesh: DeviceMesh, axes: types.Tree, shapes: types.Tree
) -> types.Tree:
  """Shardings of a parameter tree.

  Args:
    mesh: from `make_mesh`.
    axes: tree of logical-name tuples (`models.heads.logical_axes`).
    shapes: tree of arrays or shapes with the same structure.
  """
  return jax.tree.map(
    lambda leaf, names: named(mesh, names, leaf.shape),
    shapes,
    axes,
    is_leaf=lambda x: hasattr(x, "shape"),
  )


def decode_shardings(
  mesh: DeviceMesh, axes: types.Tree, shapes: types.Tree
) -> types.Tree:
  """Like `tree_shardings`, but whole along `fsdp`.

  Decoding reads every weight for every token: gathering them over `fsdp` once
  an update beats gathering them in every step.
  """
  def gathered(axes):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    kept = tuple(axis for axis in axes if axis != "fsdp")
    return kept if len(kept) > 1 else (*kept, None)[0]

  return jax.tree.map(
    lambda where: NamedSharding(
      mesh.mesh, PartitionSpec(*map(gathered, where.spec))
    ),
    tree_shardings(mesh, axes, shapes),
  )


def batch(mesh: DeviceMesh) -> NamedSharding:
  """Returns the sharding of rows, split as the rule of "batch" says."""
  axes = dict(mesh.rules)["batch"]
  return NamedSharding(mesh.mesh, PartitionSpec(axes or None))


def batch_shards(mesh: DeviceMesh) -> int:
  """Returns the parts into which a mesh splits the rows of a batch."""
  return mesh.size // batch(mesh).shard_shape((mesh.size,))[0]


def replicated(mesh: DeviceMesh) -> NamedSharding:
  """Returns the sharding under which every device holds all of it."""
  return NamedSharding(mesh.mesh, PartitionSpec())


def put(tree: types.Tree, shardings: types.Tree) -> types.Tree:
  """Places arrays on the mesh, in buffers of their own.

  Args:
    tree: host or device arrays; host arrays must be the same in every process.
    shardings: one sharding for all, or a tree of them.
  """

  def place(x, where):
    if isinstance(x, jax.Array):
      if not (x.is_fully_addressable and where.is_fully_addressable):
        return jax.jit(jnp.copy, out_shardings=where)(x)
      # From device to device: a large model never passes through the host.
      # Copied first: a replica on the source's own device shares its buffer,
      # may_alias=False or not, and donating it would free the source.
      return jax.device_put(jnp.copy(x), where)
    x = np.asarray(x)
    return jax.make_array_from_callback(
      x.shape, where, lambda part: np.array(x[part])
    )

  if isinstance(shardings, jax.sharding.Sharding):
    return jax.tree.map(lambda x: place(x, shardings), tree)
  return jax.tree.map(place, tree, shardings)


def abstract(shapes: types.Tree, shardings: types.Tree) -> types.Tree:
  """Shapes that know where their arrays would live, for lowering programs."""

  def place(x, where):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  if isinstance(shardings, jax.sharding.Sharding):
    return jax.tree.map(lambda x: place(x, shardings), shapes)
  return jax.tree.map(place, shapes, shardings)


@contextlib.contextmanager
def scope(mesh: DeviceMesh) -> Iterator[None]:
  """Makes the models' logical constraints mean this mesh while tracing."""
  # An abstract mesh serves as well; jax says so of `use_abstract_mesh` only.
  concrete: Any = mesh.mesh
  with jax.set_mesh(concrete), nn.logical_axis_rules(_as_flax(mesh.rules)):
    yield


def shards(name: str, size: int) -> int:
  """Parts into which the mesh in scope splits a logical axis."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return 1
  axes = _spec(mesh, _rules_in_scope(), (name,), (size,))[0] or ()
  axes = (axes,) if isinstance(axes, str) else axes
  return int(np.prod([mesh.shape[axis] for axis in axes]))


def cores() -> int:
  """Cores of a device of the mesh in scope; 1 where nothing is known of it."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return getattr(device, "num_cores", None) or 1


def per_device(
  function: Callable[..., jax.Array], names: Sequence[Sequence[str | None]],
  out_names: Sequence[str | None], *arrays: jax.Array,
) -> jax.Array:
  """Calls `function` on every device's own part of `arrays`.

  For kernels that the compiler cannot partition.

  Args:
    function: maps arrays to one array of the shape of the first.
    names: logical axes of each array.
    out_names: logical axes of the result.
    *arrays: global arrays.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return function(*arrays)
  rules = _rules_in_scope()
  specs = tuple(
    _spec(mesh, rules, axes, array.shape)
    for axes, array in zip(names, arrays, strict=True)
  )
  return jax.shard_map(
    function, in_specs=specs,
    out_specs=_spec(mesh, rules, out_names, arrays[0].shape), check_vma=False,
  )(*arrays)
