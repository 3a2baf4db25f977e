"""config.json: fields that change the model are read or refused by name."""

import json

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from stepsearch_jax.models import decoder, heads, rope
from stepsearch_jax.models.weights import hf, hf_config
from stepsearch_jax.types import UserError

PLAIN = {
  "model_type": "llama", "vocab_size": 50, "hidden_size": 32,
  "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
  "num_key_value_heads": 2, "max_position_embeddings": 4096,
  "rms_norm_eps": 1e-5,
}


def read(tmp_path, **changes):
  file = epath.Path(tmp_path) / "config.json"
  fields = {k: v for k, v in (PLAIN | changes).items() if v != "absent"}
  file.write_text(json.dumps(fields))
  return hf_config.read(file)


@pytest.mark.parametrize(("changes", "words"), [
  ({"rms_norm_eps": "absent"}, "rms_norm_eps must be a positive number"),
  ({"rms_norm_eps": None}, "rms_norm_eps must be a positive number, got None"),
  ({"max_position_embeddings": "absent"}, "max_position_embeddings must be"),
  ({"vocab_size": "50k"}, "vocab_size must be a positive integer, got '50k'"),
  ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
  ({"model_type": "mixtral"}, "model_type must be one of qwen2, qwen3, llama"),
  ({"use_sliding_window": True, "sliding_window": 512, "model_type": "qwen2",
    "max_window_layers": 1}, "use_sliding_window must be false"),
  ({"use_sliding_window": True, "sliding_window": 512, "model_type": "qwen3",
    "layer_types": ["full_attention", "sliding_attention"]},
   "use_sliding_window must be false"),
  ({"quantization_config": {"bits": 4}}, "quantization_config must be absent"),
  ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
  ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
   "rope type 'dynamic' is not supported"),
  ({"rope_scaling": {"type": "linear"}}, "factor must be a positive number"),
  ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
   "low_freq_factor must be a positive number, got nothing"),
  ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0],
                     "long_factor": [2.0]}}, "must be equal"),
])
def test_what_is_not_computed_is_refused_by_name(tmp_path, changes, words):
  with pytest.raises(UserError) as error:
    read(tmp_path, **changes)
  line = str(error.value)
  assert words in line and "config.json" in line and "\n" not in line


def test_files_that_are_no_json_object_are_refused(tmp_path):
  file = epath.Path(tmp_path) / "config.json"
  for text, words in (("{", "not a JSON file"), ("[]", "a JSON object")):
    file.write_text(text)
    with pytest.raises(UserError, match=words):
      hf_config.read(file)


def test_windows_that_no_layer_uses_change_nothing(tmp_path):
  plain = read(tmp_path, model_type="qwen2")
  for changes in (
    {"use_sliding_window": False, "sliding_window": 512},
    {"use_sliding_window": True, "sliding_window": None},
    {"use_sliding_window": True, "sliding_window": 512,
     "max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": 4096,
     "max_window_layers": 0},
  ):
    assert read(tmp_path, model_type="qwen2", **changes) == plain


def test_null_kv_heads_are_the_heads_and_biases_follow_the_family(tmp_path):
  assert read(tmp_path, num_key_value_heads=None).num_kv_heads == 4
  biases = {
    (family, given): (c.qkv_bias, c.o_bias, c.mlp_bias)
    for family in ("qwen2", "qwen3", "llama") for given in (False, True)
    for c in [read(tmp_path, model_type=family, attention_bias=given,
                   mlp_bias=given)]
  }
  assert biases == {
    ("qwen2", False): (True, False, False),  # It reads neither field.
    ("qwen2", True): (True, False, False),
    ("qwen3", False): (False, False, False),
    ("qwen3", True): (True, True, False),
    ("llama", False): (False, False, False),
    ("llama", True): (True, True, True),
  }


def test_yarn_reads_mscale_truncate_and_a_missing_factor(tmp_path):
  given = {"rope_type": "yarn", "factor": 4.0,
           "original_max_position_embeddings": 1024}
  scaling = read(tmp_path, rope_parameters=given).rope_scaling
  assert (scaling.attention_factor, scaling.truncate) == (0.0, True)
  scaled = read(tmp_path, rope_parameters=given | {
    "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False,
  }).rope_scaling
  # (0.1 ln 4 + 1) / (0.05 ln 4 + 1).
  np.testing.assert_allclose(scaled.attention_factor, 1.138629 / 1.069315,
                             rtol=1e-6)
  assert not scaled.truncate
  bare = {k: v for k, v in given.items() if k != "factor"}
  assert read(tmp_path, rope_scaling=bare).rope_scaling.factor == 4.0


@pytest.mark.parametrize("scaling", [
  None, rope.RopeScaling("linear", 2.0, 4096),
  rope.RopeScaling("llama3", 8.0, 1024, 1.0, 4.0),
  rope.RopeScaling("yarn", 4.0, 1024, 1.0, 32.0, 1.2, False),
  rope.RopeScaling("factors", 1.0, 4096, factors=(1.0, 2.0, 3.0, 4.0)),
])
def test_what_is_written_reads_back(tmp_path, scaling):
  class Tokenizer:
    eos_ids, pad_id = (1,), 0

  config = decoder.DecoderConfig(
    "llama", 50, 32, 48, 2, 4, 2, 8, rope_theta=5e5, rope_scaling=scaling,
    tie_embeddings=False, qkv_bias=True, o_bias=True, mlp_bias=True,
    max_positions=4096,
  )
  file = epath.Path(tmp_path) / "config.json"
  file.write_text(json.dumps(hf_config.write(config, "float32", Tokenizer)))
  assert hf_config.read(file) == config


class TestTensors:
  """Checkpoints that torch loads, under the names that it accepts."""

  @pytest.fixture
  def source(self, shared):
    return shared / "golden/models/qwen2_tied"

  def save(self, source, tmp_path, tensors, **changes):
    fields = json.loads((source / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(fields))
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    config = hf.load_config(str(tmp_path))
    return hf.load_policy(str(tmp_path), config)

  def equal(self, ours, theirs):
    np.testing.assert_array_equal(
      ours["trunk"]["layers"]["mlp"]["up_kernel"],
      theirs["trunk"]["layers"]["mlp"]["up_kernel"],
    )

  def test_a_bare_trunk_needs_no_prefix(self, source, tmp_path):
    want = hf.load_policy(str(source), hf.load_config(str(source)))
    stored = safetensors.numpy.load_file(source / "model.safetensors")
    bare = {
      name.removeprefix("model."): value for name, value in stored.items()
      if name != "lm_head.weight"
    }
    self.equal(self.save(source, tmp_path, bare), want)

  def test_an_untied_model_without_head_starts_from_its_embedding(
    self, source, tmp_path
  ):
    stored = safetensors.numpy.load_file(source / "model.safetensors")
    stored.pop("lm_head.weight", None)
    policy = self.save(source, tmp_path, stored, tie_word_embeddings=False)
    np.testing.assert_array_equal(
      heads.unembedding(policy), stored["model.embed_tokens.weight"]
    )
    assert policy["head"]["kernel"] is not policy["trunk"]["embedding"]

  def test_a_tied_flag_beside_another_head_is_refused(self, source, tmp_path):
    stored = safetensors.numpy.load_file(source / "model.safetensors")
    embedding = stored["model.embed_tokens.weight"]
    self.save(source, tmp_path, stored | {"lm_head.weight": embedding.copy()})
    with pytest.raises(UserError, match="tie_word_embeddings is true"):
      self.save(source, tmp_path, stored | {"lm_head.weight": embedding + 1})
