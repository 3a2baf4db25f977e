"""Plans against hand arithmetic, and what the TPU compiler really made."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ppo import parts

from configs import quickstart, stepsearch_qwen2_5_3b
from stepsearch_jax import types
from stepsearch_jax.models import decoder
from stepsearch_jax.parallel import sharding
from stepsearch_jax.plan import arithmetic as planning
from stepsearch_jax.plan import machines, report, tpu_compiler
from stepsearch_jax.ppo import learner, logprobs
from stepsearch_jax.rollout import programs as rollout_programs

VOCAB = 151_936
MODEL = decoder.DecoderConfig(
  family="qwen2", vocab_size=VOCAB, hidden_size=256, intermediate_size=512,
  num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64, qkv_bias=True,
  dtype=jnp.bfloat16, remat="full", attention="splash",
)


@pytest.fixture(scope="module", autouse=True)
def as_in_a_run():
  """optax promotes types and the splash kernel multiplies in bfloat16."""
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.default_matmul_precision("default"),
  ):
    yield


def test_topologies_are_read_and_unknown_ones_refused():
  machine = machines.parse_topology("v5p:2x2x4")
  assert (machine.chips, machine.platform) == (16, "tpu")
  assert machines.parse_topology("gpu-h100x8").chips == 8
  assert machines.parse_topology("cpu").topology == ""
  for wrong in ("v9:2x2", "gpu-b1x8", "h100x8", "v5e:axb"):
    with pytest.raises(ValueError, match="expected for instance v5e:4x4"):
      machines.parse_topology(wrong)


def test_resident_bytes_of_the_3b_config_by_hand():
  config = stepsearch_qwen2_5_3b.get_config()
  planning.resolve_mesh(config, 16)
  parts = planning.resident(config)
  layer = (
    2048 * 128 * (16 + 2 + 2) + 128 * (16 + 2 + 2)  # q, k, v and biases
    + 16 * 128 * 2048 + 3 * 2048 * 11008 + 2 * 2048
  )
  weights = 36 * layer + VOCAB * 2048 + 2048
  assert weights == 3_085_938_688  # Qwen2.5-3B's published count.
  # Norms are whole on every chip, hence a little more than a sixteenth.
  np.testing.assert_allclose(parts["policy"], 4 * weights / 16, rtol=2e-3)
  assert parts["policy optimizer"] == 2 * parts["policy"]
  np.testing.assert_allclose(
    parts["decode weights"], 2 * weights / 2, rtol=2e-3
  )
  cache = 2 * 36 * 128 * 4096 * 2 * 128 * 2
  assert parts["slot cache"] == cache / 16


def test_what_does_not_fit_comes_with_changes_that_make_it_fit():
  config = stepsearch_qwen2_5_3b.get_config()
  config.mesh.tensor = 1
  machine = machines.parse_topology("gpu-h100x1")
  planning.resolve_mesh(config, machine.chips)
  made = report.make_plan(config, machine, {}, 2048, 0.15)
  assert not made["fits"]
  assert [text for text, _ in made["advice"]] == [
    "value.kind = adapter", "policy.kind = lora"
  ]
  assert "would fit with value.kind = adapter" in report.render(made)
  config.policy.kind, config.value.kind = "lora", "adapter"
  assert report.make_plan(config, machine, {}, 2048, 0.15)["fits"]


def test_a_reference_at_hand_is_planned_with_its_own_shape(shared):
  config = quickstart.get_config()
  planning.resolve_mesh(config, 1)
  machine = machines.parse_topology("cpu")
  config.model.reference = str(shared / "golden/models/qwen2_untied")
  made = report.make_plan(config, machine, {}, 256, 0.2)
  model = planning.model_shape(config)
  fields = json.loads(
    (shared / "golden/models/qwen2_untied/config.json").read_text()
  )
  assert model.hidden_size == fields["hidden_size"]
  assert model.vocab_size == fields["vocab_size"] != config.model.size.vocab
  assert made["shape"] == f"read from {config.model.reference}"
  text = report.render(made)
  assert "parameters (read from" in text
  # The reference is kept whole in the compute type, float32 here.
  assert made["resident"]["reference"] == 4 * made["parameters"]


def test_a_reference_that_is_not_here_is_said_to_be_assumed():
  config = quickstart.get_config()
  planning.resolve_mesh(config, 1)
  machine = machines.parse_topology("cpu")
  own = report.make_plan(config, machine, {}, 256, 0.2)
  assert "parameters (model.size)" in report.render(own)
  config.model.reference = "nobody/has-this-72b-model"
  made = report.make_plan(config, machine, {}, 256, 0.2)
  assert made["resident"] == own["resident"]
  assert "ASSUMED: the config.json of nobody/has-this-72b-model" in (
    report.render(made)
  )
  config.model.reference = "/no/such/folder"
  with pytest.raises(types.UserError, match="/no/such/folder"):
    report.make_plan(config, machine, {}, 256, 0.2)


def test_rematerialization_trades_memory_for_arithmetic():
  config = stepsearch_qwen2_5_3b.get_config()
  machine = machines.parse_topology("v5e:4x4")
  planning.resolve_mesh(config, machine.chips)
  peaks, flops = {}, {}
  for word in ("full", "dots", "none"):
    config.model.remat = word
    peaks[word] = planning.program_peaks(config, machine, {})["policy_update"]
    flops[word] = planning.step_times(
      config, machine, 2048, 0.15
    )["updates"]["flops"]
  assert peaks["full"] < peaks["dots"] < peaks["none"]
  np.testing.assert_allclose(flops["full"], flops["none"] * 4 / 3)
  # Attention has no weight matrix: 64 rows of 4,096 tokens meet half of 2,048
  # in 36 layers of 16 x 128, in two models.
  attention = 2 * 64 * 4096 * 4 * 36 * 16 * 128 * 1024
  np.testing.assert_allclose(flops["dots"] - flops["none"], attention)


def test_roofline_is_the_slower_of_compute_and_memory():
  config = stepsearch_qwen2_5_3b.get_config()
  machine = machines.parse_topology("v5e:4x4")
  planning.resolve_mesh(config, machine.chips)
  phases = planning.step_times(config, machine, 2048, 0.15)
  decode = phases["rollout decode"]
  parts = planning.resident(config)
  steps = 128 * 2048 * 0.15 / 128
  moved = steps * (parts["decode weights"] + parts["slot cache"] / 4)
  assert decode["bound"] == "memory"
  np.testing.assert_allclose(decode["seconds"], moved / 819e9, rtol=1e-6)


@pytest.fixture(scope="module")
def tpu():
  """Eight v5e chips that exist only for the compiler."""
  pytest.importorskip("libtpu")
  machine = machines.parse_topology("v5e:2x4")
  return sharding.make_mesh(
    1, 4, 2, devices=tpu_compiler.topology_devices(machine)
  )


def make_learner(mesh, micro_rows=8):
  spec = parts.learner_spec(
    batch__mini_batch=32, batch__micro_rows=micro_rows, batch__row_length=1024
  )
  return learner.Learner(MODEL, MODEL, spec, mesh)


@pytest.fixture(scope="module")
def compiled(tpu):
  """(HLO text, memory analysis) of every program of a small model."""
  ours = make_learner(tpu)
  programs = rollout_programs.RolloutPrograms(
    MODEL,
    rollout_programs.ProgramSpec(
      slots=8, context=1024, block=16, top_k=0, top_p=1.0
    ),
    np.zeros((8, VOCAB), np.int32), 7, tpu,
  )
  lowered = ours.lowered() | programs.lowered(
    8, 256, ours.abstract_state().policy.params
  )
  found = {}
  for name, program in lowered.items():
    done = program.compile()
    found[name] = (done.as_text(), done.memory_analysis())
  return found


def sizes(text, operation=""):
  """Element counts of results in HLO text, of one operation or of all."""
  pattern = r"= \(?((?:\w+\[[\d,]*\][^ ]*(?:, )?)+)\)? " + operation
  for match in re.finditer(pattern, text):
    for dims in re.findall(r"\[([\d,]+)\]", match[1]):
      shape = [int(d) for d in dims.split(",")]
      yield int(np.prod(shape)), shape


@pytest.mark.slow
def test_splash_attention_is_in_the_compiled_updates(compiled):
  for name in ("reference_forward", "policy_update", "value_update"):
    assert "tpu_custom_call" in compiled[name][0], name


@pytest.mark.slow
def test_no_program_holds_logits_of_all_tokens(compiled):
  chunk = logprobs.chunk_size(VOCAB)
  for name, (text, _) in compiled.items():
    if name == "decode_block":
      continue  # One token a slot: its logits are [slots, V].
    for count, shape in sizes(text):
      wide = any(side >= VOCAB // 2 for side in shape)
      rest = count / max(shape)
      assert not wide or rest <= max(chunk, MODEL.hidden_size), (name, shape)


@pytest.mark.slow
def test_no_collective_moves_a_full_parameter_tree(compiled):
  embedding = VOCAB * MODEL.hidden_size // 2
  layer = 2 * MODEL.hidden_size * MODEL.intermediate_size
  for name, (text, _) in compiled.items():
    if name == "reshard_cast":
      continue  # Its purpose: whole weights for decoding, once an update.
    gathered = [
      count for operation in ("all-gather", "all-gather-start")
      for count, _ in sizes(text, operation + r"\(")
    ]
    assert all(count <= max(embedding, layer) for count in gathered), (
      name, sorted(gathered)[-3:]
    )


@pytest.mark.slow
def test_update_memory_grows_with_the_micro_batch_not_the_batch(
  tpu, compiled
):
  # The batch is no argument of any program: the shapes are the micro-batch's.
  program = make_learner(tpu, micro_rows=32).lowered()["policy_update"]
  large = program.compile().memory_analysis().temp_size_in_bytes
  small = compiled["policy_update"][1].temp_size_in_bytes
  assert large > 1.2 * small


def test_adapters_are_merged_into_a_policy_that_only_rollouts_hold():
  config = stepsearch_qwen2_5_3b.get_config()
  config.policy.kind = "lora"
  planning.resolve_mesh(config, 16)
  parts = planning.resident(config)
  assert parts["merged policy"] == parts["reference"]
  rolling = sum(
    parts[name] for name in ("merged policy", "decode weights", "slot cache")
  )
  none = {"outputs": 0, "aliased": 0, "temporary": 0}
  peaks = planning.program_peaks(
    config, machines.parse_topology("v5e:4x4"),
    {"extend": none, "reference_forward": none},
  )
  np.testing.assert_allclose(
    peaks["extend"] - peaks["reference_forward"], rolling
  )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_plan_command_compiles_the_whole_quickstart(tmp_path, tpu, kind):
  config = quickstart.get_config()
  config.policy.kind = kind
  config.model.remat = "full"
  machine = machines.parse_topology("v5e:2x4")
  config.model.dtype = "bfloat16"
  planning.resolve_mesh(config, machine.chips)
  programs = tpu_compiler.compile_programs(config, machine)
  assert {"reshard_cast", "extend", "decode_block", "reference_forward",
          "policy_update", "value_update"} <= set(programs)
  updates = tpu_compiler.compile_faster(config, machine, programs)
  made = report.make_plan(config, machine, programs, 256, 0.2, updates)
  assert made["compiled"] and made["fits"]
  # It fits, so dots was not looked at.
  assert made["remat_fastest"] == "none"
  assert [c["compiled"] for c in made["remat"].values()] == [True, False, True]
  json.dumps(made)


def test_update_lowers_for_cuda():
  # Without cuDNN at hand; tracing its attention needs the CUDA plugin.
  mesh = sharding.make_mesh()
  model = dataclasses.replace(
    MODEL, attention="xla", vocab_size=512, num_layers=1
  )
  spec = parts.learner_spec(batch__row_length=256)
  ours = learner.Learner(model, model, spec, mesh)
  for program in ours.lowered(platforms=("cuda",)).values():
    assert "stablehlo" in program.as_text()
  assert jax.default_backend() == "cpu"
