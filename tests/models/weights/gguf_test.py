"""GGUF files that the gguf package writes, against the same weights from HF."""

import fakes
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import normalizers, pre_tokenizers

from stepsearch_jax.models import decoder, heads, rope
from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.models.weights import gguf as gguf_weights
from stepsearch_jax.models.weights import hf
from stepsearch_jax.types import UserError

HEADS, KV, DIM, WIDTH = 4, 2, 8, 32
EPSILON = 2.0**-20  # Files hold it in float32.


def pairs_apart(weight, heads):
  """llama.cpp's order of rotary dimensions, as its converter writes it."""
  rows = weight.reshape(heads, 2, DIM // 2, -1)
  return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(weight.shape)


def tensors(policy):
  """(GGUF name, array) of a llama with biases, from our own parameters."""
  trunk = jax.tree.map(np.asarray, policy["trunk"])
  yield "token_embd.weight", trunk["embedding"]
  yield "output_norm.weight", trunk["final_norm"]["scale"]
  layers = trunk["layers"]
  for i in range(2):
    attention, mlp = layers["attention"], layers["mlp"]
    yield f"blk.{i}.attn_norm.weight", layers["attention_norm"]["scale"][i]
    yield f"blk.{i}.ffn_norm.weight", layers["mlp_norm"]["scale"][i]
    for letter, count in (("q", HEADS), ("k", KV), ("v", KV)):
      kernel = attention[f"{letter}_kernel"][i].reshape(WIDTH, -1).T
      bias = attention[f"{letter}_bias"][i].reshape(-1)
      if letter != "v":
        kernel, bias = pairs_apart(kernel, count), pairs_apart(bias, count)
      yield f"blk.{i}.attn_{letter}.weight", kernel
      yield f"blk.{i}.attn_{letter}.bias", bias
    yield (f"blk.{i}.attn_output.weight",
           attention["o_kernel"][i].reshape(-1, WIDTH).T)
    yield f"blk.{i}.attn_output.bias", attention["o_bias"][i]
    for name in ("gate", "up", "down"):
      yield f"blk.{i}.ffn_{name}.weight", mlp[f"{name}_kernel"][i].T
      yield f"blk.{i}.ffn_{name}.bias", mlp[f"{name}_bias"][i]


TOKENS = [chr(33 + i) for i in range(94)] + ["\u0120", "\u010a"]
MERGES = ["h e", "l l", "he ll"]
SPECIALS = ["<s>", "</s>", "<eot>", "<think>"]


def write(path, model=None, policy=None, tables=None, pre="smollm", extra=()):
  """Writes a llama file: tokenizer, and weights where they are given."""
  writer = gguf.GGUFWriter(str(path), "llama")
  tokens = TOKENS + ["he", "ll", "hell", "hello"] + SPECIALS
  kinds = [1] * (len(TOKENS) + 4) + [3, 3, 3, 4]
  writer.add_context_length(4096)
  writer.add_embedding_length(WIDTH)
  writer.add_block_count(2)
  writer.add_feed_forward_length(48)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV)
  writer.add_rope_freq_base(model.rope_theta if model else 10000.0)
  writer.add_layer_norm_rms_eps(EPSILON)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_types(kinds)
  writer.add_token_merges(MERGES)
  writer.add_bos_token_id(tokens.index("<s>"))
  writer.add_eos_token_id(tokens.index("</s>"))
  writer.add_eot_token_id(tokens.index("<eot>"))
  for method, value in extra:
    getattr(writer, method)(value)
  for name, value in tensors(policy) if policy else ():
    writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
  for name, value in (tables or {}).items():
    writer.add_tensor(name, np.asarray(value, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return str(path)


def make(scaling=None):
  config = decoder.DecoderConfig(
    "llama", len(TOKENS) + 8, WIDTH, 48, 2, HEADS, KV, DIM, rope_theta=1e3,
    rope_scaling=scaling, qkv_bias=True, o_bias=True, mlp_bias=True,
    rms_norm_eps=EPSILON, max_positions=4096,
  )
  return config, fakes.disturbed(fakes.make_policy(config))


def logits(config, policy):
  tokens = jnp.arange(60, dtype=jnp.int32)[None] % config.vocab_size
  hidden, _ = jax.jit(decoder.Decoder(config).apply)(
    {"params": policy["trunk"]}, tokens, jnp.arange(60, dtype=jnp.int32)[None]
  )
  return np.asarray(heads.logits(policy, hidden))


def divisors(scaling):
  base, _ = rope.frequencies(DIM, 1e3, None)
  return np.asarray(base / rope.frequencies(DIM, 1e3, scaling)[0])


OTHER = rope.RopeScaling("factors", 1.0, 4096, factors=(1.0, 1.5, 2.0, 7.0))


@pytest.mark.parametrize(("scaling", "extra", "table"), [
  (None, (), None),
  (None, (), [1.0, 1.0, 1.0, 1.0]),
  (OTHER, (), [1.0, 1.5, 2.0, 7.0]),
  (rope.RopeScaling("linear", 4.0, 4096),
   (("add_rope_scaling_type", gguf.RopeScalingType.LINEAR),
    ("add_rope_scaling_factor", 4.0)), None),
  (rope.RopeScaling("yarn", 4.0, 1024, 1.0, 32.0),
   (("add_rope_scaling_type", gguf.RopeScalingType.YARN),
    ("add_rope_scaling_factor", 4.0),
    ("add_rope_scaling_orig_ctx_len", 1024)), None),
])
def test_weights_biases_and_rotary_scaling_are_read(
  tmp_path, scaling, extra, table
):
  config, policy = make(scaling)
  tables = {} if table is None else {"rope_freqs.weight": table}
  path = write(tmp_path / "m.gguf", config, policy, tables, extra=extra)
  found = hf.load_config(path)
  assert found == config
  np.testing.assert_allclose(
    logits(found, hf.load_policy(path, found)), logits(config, policy),
    atol=1e-6,
  )
  unscaled, _ = make(None)
  if scaling:  # What was computed before, and silently.
    assert np.abs(logits(unscaled, policy) - logits(config, policy)).max() > .01


def test_a_file_is_parsed_once_until_it_changes(tmp_path, monkeypatch):
  config, policy = make()
  path = write(tmp_path / "m.gguf", config, policy)
  opened = []
  reader = gguf.GGUFReader
  monkeypatch.setattr(
    gguf_weights.gguf, "GGUFReader", lambda path: (
      opened.append(path) or reader(path))
  )
  tokenizer_lib.load(path)
  assert gguf_weights.load_config(path).max_positions == 4096
  first = {
    name: np.array(value) for name, value in gguf_weights.read(path, config)
  }
  assert len(gguf_weights.names(path)) == len(first) and opened == [path]
  gguf_weights.fields(path).clear()  # What is handed out is the caller's.
  assert gguf_weights.fields(path)["general.architecture"] == "llama"
  write(path, config, jax.tree.map(lambda x: x + 1, policy))
  second = dict(gguf_weights.read(path, config))
  assert opened == [path] * 2
  for name, value in first.items():
    np.testing.assert_allclose(second[name], value + 1, rtol=1e-6)


def test_llama_3s_table_becomes_its_formula(tmp_path):
  scaling = rope.RopeScaling("llama3", 8.0, 256, 1.0, 4.0)
  table = {"rope_freqs.weight": divisors(scaling)}
  config, policy = make()
  extra = [("add_rope_scaling_orig_ctx_len", 256)]
  path = write(tmp_path / "a.gguf", config, policy, table, extra=extra)
  assert hf.load_config(path).rope_scaling == scaling


@pytest.mark.parametrize(("extra", "words"), [
  ((("add_rope_scaling_type", gguf.RopeScalingType.LONGROPE),),
   "rope.scaling.type must be none, linear or yarn, got 'longrope'"),
  ((("add_rope_scaling_type", gguf.RopeScalingType.YARN),),
   "rope.scaling.factor must be a positive number"),
  ((("add_expert_count", 8),), "expert_count must be 0, got 8"),
  ((("add_rope_dimension_count", 4),), "rope.dimension_count must be 8, got 4"),
  ((("add_sliding_window", 128),), "sliding_window must be absent, got 128"),
])
def test_what_is_not_computed_is_refused_by_name(tmp_path, extra, words):
  config, policy = make()
  path = write(tmp_path / "m.gguf", config, policy, extra=extra)
  with pytest.raises(UserError) as error:
    hf.load_config(path)
  assert words in str(error.value) and path in str(error.value)


def test_other_files_are_refused(tmp_path):
  (tmp_path / "m.gguf").write_bytes(b"not a model")
  with pytest.raises(UserError, match="not a GGUF file"):
    gguf_weights.fields(str(tmp_path / "m.gguf"))


class TestTokenizer:
  """Tokenizers of GGUF files against tokenizers built by hand."""

  def test_user_defined_tokens_are_one_token_and_text(self, tmp_path):
    tokenizer = tokenizer_lib.load(write(tmp_path / "m.gguf"))
    think = len(TOKENS) + 7
    assert tokenizer.encode("<think>") == [think]
    assert tokenizer.decode([think]) == "<think>"
    assert tokenizer.token_bytes()[think] == b"<think>"
    # Control tokens are no text, and nobody can write them.
    assert think - 1 not in tokenizer.encode("<eot>")
    assert tokenizer.token_bytes()[think - 1] is None

  def test_the_turns_end_ends_a_text_too(self, tmp_path):
    tokenizer = tokenizer_lib.load(write(tmp_path / "m.gguf"))
    names = {tokenizer.hf.convert_ids_to_tokens(i) for i in tokenizer.eos_ids}
    assert names == {"</s>", "<eot>"}

  @pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm"])
  def test_llama_3_takes_whole_words_from_its_vocabulary(self, tmp_path, pre):
    tokenizer = tokenizer_lib.load(write(tmp_path / "m.gguf", pre=pre))
    pieces = tokenizer.hf.convert_ids_to_tokens(tokenizer.encode("hello"))
    # No merge leads to "hello": only ignore_merges finds it.
    assert pieces == (["hello"] if pre == "llama-bpe" else ["hell", "o"])

  def test_qwen2_normalizes_to_nfc(self, tmp_path):
    tokenizer = tokenizer_lib.load(write(tmp_path / "m.gguf", pre="qwen2"))
    state = tokenizers.Tokenizer.from_str(
      tokenizer.hf.backend_tokenizer.to_str()
    )
    assert isinstance(state.normalizer, normalizers.NFC)
    assert isinstance(state.pre_tokenizer, pre_tokenizers.Sequence)
    assert tokenizer.splits_like_qwen2
    assert not tokenizer_lib.load(
      write(tmp_path / "s.gguf")
    ).splits_like_qwen2

  @pytest.mark.parametrize(("pre", "flag", "adds"), [
    ("llama-bpe", None, True), ("llama-bpe", False, False),
    ("smollm", None, False), ("smollm", True, True),
  ])
  def test_prompts_of_base_models_begin_as_the_file_says(
    self, tmp_path, pre, flag, adds
  ):
    extra = () if flag is None else (("add_add_bos_token", flag),)
    tokenizer = tokenizer_lib.load(
      write(tmp_path / "m.gguf", pre=pre, extra=extra)
    )
    bos = tokenizer.hf.bos_token_id
    assert (tokenizer.encode_prompt("hello")[0] == bos) == adds
    assert bos not in tokenizer.encode("hello")


def test_safetensors_and_gguf_of_one_model_agree(tmp_path):
  config, policy = make()
  path = write(tmp_path / "m.gguf", config, policy)
  ours = {}
  for entry in hf.weight_table(config):
    leaf = jax.device_get(policy)
    for key in entry.path:
      leaf = leaf[key]
    leaf = leaf if entry.layer is None else leaf[entry.layer]
    ours[entry.name] = np.ascontiguousarray(entry.to_theirs(leaf))
  (tmp_path / "hf").mkdir()
  safetensors.numpy.save_file(ours, tmp_path / "hf/model.safetensors")
  jax.tree.map(
    np.testing.assert_array_equal,
    hf.load_policy(str(tmp_path / "hf"), config), hf.load_policy(path, config),
  )
