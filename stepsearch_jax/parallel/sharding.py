"""The device mesh and the ONE table from logical to mesh axes.

Models and batches name logical axes only; nothing else in the project writes
a PartitionSpec.
"""

from __future__ import annotations

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepsearch_jax import types

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. A dimension that does not divide is replicated.
RULES = (
  ("batch", ("data", "fsdp")),
  ("slots", ("data", "fsdp")),
  ("vocab", "tensor"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("mlp", "tensor"),
  ("embed", "fsdp"),
  ("act_embed", None),
  ("norm", None),
  ("head_dim", None),
  ("length", None),
  ("layers", None),
  ("rank", None),
)


def mesh_shape(
  devices: int, data: int = -1, fsdp: int = 1, tensor: int = 1
) -> tuple[int, int, int]:
  """Sizes of the (data, fsdp, tensor) axes over a number of devices.

  Args:
    devices: how many there are.
    data: data-parallel copies; -1 takes the devices that the others leave.
    fsdp: shards of parameters and optimiser states; -1 likewise.
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


def make_mesh(
  data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None
) -> Mesh:
  """A mesh over all devices, or the given ones; see `mesh_shape`."""
  devices = np.asarray(jax.devices() if devices is None else devices)
  return Mesh(
    devices.reshape(mesh_shape(devices.size, data, fsdp, tensor)), AXES
  )


def _spec(mesh: Mesh, names, shape) -> PartitionSpec:
  """Spec of one array; mesh axes are used once and must divide."""
  table = dict(RULES)
  used: set[str] = set()
  out = []
  for name, size in zip(names, shape, strict=True):
    if name is not None and name not in table:
      raise types.UserError(f"logical axis {name!r} is not in sharding.RULES")
    axes = table.get(name)
    axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
    shards = int(np.prod([mesh.shape[axis] for axis in axes]))
    if not axes or shards == 1 or size % shards or used & set(axes):
      out.append(None)
      continue
    used |= set(axes)
    out.append(axes if len(axes) > 1 else axes[0])
  return PartitionSpec(*out)


def named(mesh: Mesh, names, shape) -> NamedSharding:
  """Sharding of an array with logical axis `names`."""
  return NamedSharding(mesh, _spec(mesh, names, shape))


def tree_shardings(mesh: Mesh, axes, shapes):
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


def decode_shardings(mesh: Mesh, axes, shapes):
  """Like `tree_shardings`, but whole along `fsdp`.

  Decoding reads every weight for every token: gathering them over `fsdp` once
  an update beats gathering them in every step.
  """
  def gathered(spec):
    return PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))

  return jax.tree.map(
    lambda where: NamedSharding(mesh, gathered(where.spec)),
    tree_shardings(mesh, axes, shapes),
  )


def batch(mesh: Mesh) -> NamedSharding:
  """Rows are split over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds all of it."""
  return NamedSharding(mesh, PartitionSpec())


def put(tree, shardings):
  """Places arrays on the mesh, in buffers of their own.

  Args:
    tree: host or device arrays; host arrays must be the same in every process.
    shardings: one sharding for all, or a tree of them.
  """

  def place(x, where):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return jax.jit(jnp.copy, out_shardings=where)(x)
    x = np.asarray(x)
    return jax.make_array_from_callback(
      x.shape, where, lambda part: np.array(x[part])
    )

  if isinstance(shardings, jax.sharding.Sharding):
    return jax.tree.map(lambda x: place(x, shardings), tree)
  return jax.tree.map(place, tree, shardings)


def abstract(shapes, shardings):
  """Shapes that know where their arrays would live, for lowering programs."""

  def place(x, where):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  if isinstance(shardings, jax.sharding.Sharding):
    return jax.tree.map(lambda x: place(x, shardings), shapes)
  return jax.tree.map(place, shapes, shardings)


@contextlib.contextmanager
def scope(mesh: Mesh):
  """Makes the models' logical constraints mean this mesh while tracing."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


def shards(name: str, size: int) -> int:
  """Parts into which the mesh in scope splits a logical axis."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return 1
  axes = _spec(mesh, (name,), (size,))[0] or ()
  axes = (axes,) if isinstance(axes, str) else axes
  return int(np.prod([mesh.shape[axis] for axis in axes]))


def per_device(function, names, out_names, *arrays):
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
  specs = tuple(
    _spec(mesh, axes, array.shape)
    for axes, array in zip(names, arrays, strict=True)
  )
  return jax.shard_map(
    function, in_specs=specs, out_specs=_spec(mesh, out_names, arrays[0].shape),
    check_vma=False,
  )(*arrays)
