"""Tunix's own training and decode steps, lowered for chips that need not exist.

Model, losses, train step, sampler and shardings are Tunix's, with what it
offers to save memory: layers computed again in the backward pass
(`RematConfig.DECODER`), splash attention, weights in float32 computed with in
bfloat16, gradients accumulated over micro-batches. Only shapes exist. Two
things of Tunix's are stood in for:

  its `shard` looks for the mesh of real devices, and leaves activations alone
  where those are CPUs; here it constrains them as it does on a TPU;
  its trainer makes arrays and checkpoints when it is made; here one is set up
  without them, for its train step.

The cache of the decode step is split as the model's own activations are: rows
over fsdp, heads over tp.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stepsearch_jax import types
from stepsearch_jax.bench import peers
from stepsearch_jax.models import decoder
from stepsearch_jax.parallel import sharding

PAD, END = 151643, 151645  # Of Qwen's tokenizer.


@dataclasses.dataclass(frozen=True)
class Step:
  """What the steps work on.

  Attributes:
    model: shape of the policy.
    rows, length: of a micro-batch of training.
    prompt: its first tokens, which Tunix keeps apart.
    micros: micro-batches of an optimizer step.
    slots, context: rows of the decode step, and tokens that they can hold.
    learning_rate, weight_decay, grad_clip, entropy: of the update.
  """

  model: decoder.DecoderConfig
  rows: int
  length: int
  prompt: int
  micros: int
  slots: int
  context: int
  learning_rate: float
  weight_decay: float
  grad_clip: float
  entropy: float


def make_mesh(
  fsdp: int, tensor: int, devices: Sequence[jax.Device]
) -> jax.sharding.Mesh:
  """Returns a mesh with Tunix's names of the axes."""
  grid = sharding.make_mesh(1, fsdp, tensor, devices=devices).mesh.devices
  return jax.sharding.Mesh(grid[0], ("fsdp", "tp"))


def _placed(mesh, x, *axes):
  """The shape of an array with its place."""
  return sharding.abstract(x, sharding.by_axes(mesh, axes))


def _place(mesh, module) -> None:
  """Gives the variables of an abstract module the places that it names."""
  from flax import nnx

  state = nnx.state(module)
  nnx.update(
    module, sharding.abstract(state, nnx.get_named_sharding(state, mesh))
  )


def _qwen2(shape: decoder.DecoderConfig, sampling: bool):
  """Tunix's config of the model."""
  from tunix.models.qwen2 import model

  return model.ModelConfig(
    num_layers=shape.num_layers, vocab_size=shape.vocab_size,
    embed_dim=shape.hidden_size, hidden_dim=shape.intermediate_size,
    num_heads=shape.num_heads, head_dim=shape.head_dim,
    num_kv_heads=shape.num_kv_heads, rope_theta=int(shape.rope_theta),
    norm_eps=shape.rms_norm_eps, use_tied_embedding=True, dtype=shape.dtype,
    param_dtype=shape.dtype if sampling else jnp.float32,
    shd_config=model.ShardingConfig.get_default_sharding(is_sampling=sampling),
    # Its sampler does not trace a model that rematerializes (flax 0.12.12).
    remat_config=model.RematConfig["NONE" if sampling else "DECODER"],
    use_flash_attention=not sampling,
  )


@contextlib.contextmanager
def _tracing(mesh) -> Iterator[None]:
  """Constrains activations to the mesh, as Tunix does on a TPU."""
  from tunix.models.qwen2 import model

  def shard(x, axes):
    return jax.lax.with_sharding_constraint(x, sharding.by_axes(mesh, axes))

  before, model.shard = model.shard, shard
  try:
    with mesh:  # Where Tunix looks for it.
      yield
  finally:
    model.shard = before


def _optimizer(step: Step):
  import optax

  tx = optax.chain(
    optax.clip_by_global_norm(step.grad_clip),
    optax.adamw(step.learning_rate, weight_decay=step.weight_decay),
  )
  # As its trainer does for gradient_accumulation_steps.
  return optax.MultiSteps(tx, step.micros) if step.micros > 1 else tx


def _example(step: Step, mesh) -> Any:
  """A micro-batch of its PPO, as shapes."""
  from tunix.rl.ppo import ppo_learner

  def rows(length, kind=jnp.float32):
    x = jax.ShapeDtypeStruct((step.rows, length), kind)
    return _placed(mesh, x, "fsdp")

  answer = step.length - step.prompt
  return ppo_learner.TrainExample(
    prompt_ids=rows(step.prompt, jnp.int32),
    prompt_mask=rows(step.prompt, jnp.int32),
    completion_ids=rows(answer, jnp.int32),
    completion_mask=rows(answer, jnp.bool_), advantages=rows(answer),
    ref_per_token_logps=rows(answer), old_per_token_logps=rows(answer),
    returns=rows(answer), old_values=rows(answer),
  )


def update(step: Step, mesh: jax.sharding.Mesh) -> Any:
  """Lowers the PPO step of the policy: one micro-batch, and AdamW.

  Every micro-batch runs the same program; the optimizer's result counts after
  the last one only. Returns flax's `Lowered`, which compiles like JAX's.
  """
  from flax import nnx
  from tunix.models.qwen2 import model as qwen2
  from tunix.rl import function_registry, trainer
  from tunix.rl.ppo import ppo_learner

  def make():
    policy = qwen2.Qwen2(_qwen2(step.model, False), rngs=nnx.Rngs(0))
    tx = _optimizer(step)
    return policy, nnx.Optimizer(policy, tx, wrt=nnx.Param)

  policy, optimizer = nnx.eval_shape(make)
  for module in (policy, optimizer):
    _place(mesh, module)
  algorithm = ppo_learner.PPOConfig(entropy_coef=step.entropy)
  actor: Any = object.__new__(trainer.Trainer)
  actor._lora_enabled = False
  actor.with_loss_fn(
    function_registry.get_policy_loss_fn(algorithm.policy_loss_fn),
    has_aux=True,
  )
  actor.with_gen_model_input_fn(lambda x: {
    "train_example": x, "algo_config": algorithm, "pad_id": PAD, "eos_id": END,
  })
  program = nnx.jit(
    actor.create_train_step_fn(), donate_argnames=("optimizer",)
  )
  with _tracing(mesh):
    return program.lower(policy, optimizer, _example(step, mesh))


def decode(step: Step, mesh: jax.sharding.Mesh) -> Any:
  """Lowers the sampler's decode loop, one token in every row per turn of it.

  Returns a `jax.stages.Lowered`.
  """
  from flax import nnx
  from tunix.generate import sampler
  from tunix.models.qwen2 import model as qwen2

  shape = step.model
  policy = nnx.eval_shape(
    lambda: qwen2.Qwen2(_qwen2(shape, True), rngs=nnx.Rngs(0))
  )
  _place(mesh, policy)
  engine = sampler.Sampler(
    policy, peers.Numbers(), sampler.CacheConfig(
      step.context, shape.num_layers, shape.num_kv_heads, shape.head_dim
    ),
  )
  engine.eos_ids = jnp.array([END])

  def start(ids):
    return engine.init_sample_state(
      ids, total_sampling_steps=step.context, include_logits=False,
      forbidden_token_ids=None, temperature=1.0, top_p=1.0, top_k=None,
      seed=jax.random.PRNGKey(0), beam_size=None, include_logprobs=True,
    )

  def place(x):
    if x.ndim == 4:
      return _placed(mesh, x, "fsdp", None, "tp")
    return _placed(mesh, x, *["fsdp"][: x.shape[:1] == (step.slots,)])

  prompt = step.context // 2
  state = jax.eval_shape(
    start, jax.ShapeDtypeStruct((step.slots, prompt), jnp.int32)
  )
  # Part of the program's name in its cache, so a number and no array.
  state = jax.tree.map(
    place, dataclasses.replace(state, num_input_tokens=prompt)
  )
  with _tracing(mesh):
    return engine._compiled_decode_fn.lower(
      engine._flattened_transformer_state, state
    )


def installed() -> str:
  """Returns Tunix's version.

  Raises:
    UserError: it is not installed.
  """
  try:
    return importlib.metadata.version("google-tunix")
  except importlib.metadata.PackageNotFoundError as error:
    raise types.UserError(
      "Tunix is not installed; `stepsearch bench --help` says how"
    ) from error
