"""Writers against a naive greedy loop and a real little server."""

import dataclasses
import functools
import json
import threading
from http import server

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch_jax import types
from stepsearch_jax.models import decoder, heads
from stepsearch_jax.models.weights import export as hf_export
from stepsearch_jax.retrieval import remote
from stepsearch_jax.supervision import writers


def following(params, ids, model):
  """The likeliest next token; tokens behind the last cannot change it."""
  tokens = np.zeros((1, 64), np.int32)
  tokens[0, : len(ids)] = ids
  return _likeliest(params, tokens, model)[len(ids) - 1]


@functools.partial(jax.jit, static_argnums=2)
def _likeliest(params, tokens, model):
  hidden, _ = decoder.Decoder(model).apply(
    {"params": params["trunk"]}, tokens, jnp.arange(64, dtype=jnp.int32)[None]
  )
  return jnp.argmax(heads.logits(params, hidden[0]), -1)


def test_local_writer_completes_greedily(tmp_path):
  tokenizer = fakes.make_tokenizer()
  model = fakes.make_model(tokenizer.vocab_size)
  params = fakes.make_policy(model)
  hf_export.save_policy(
    str(tmp_path / "model"), params, model, tokenizer, "float32"
  )
  writer = writers.LocalWriter(
    str(tmp_path / "model"), max_tokens=6, slots=2, context=64
  )
  prompts = ["Who directed", "the film Silent Harbor?", "Ada"]
  texts = writer.write(prompts)
  for prompt, text in zip(prompts, texts, strict=True):
    ids = tokenizer.encode_prompt(prompt)
    start = len(ids)
    while len(ids) < start + 6 and not (
      len(ids) > start and ids[-1] in tokenizer.eos_ids
    ):
      ids.append(int(following(params, ids, model)))
    assert text == tokenizer.decode(ids[start:])


@pytest.fixture
def endpoint(monkeypatch):
  """An OpenAI-compatible endpoint that echoes, and can be told to fail."""
  seen = {"keys": set(), "status": 200}

  class Handler(server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      seen["keys"].add(self.headers["Authorization"])
      self.send_response(seen["status"])
      self.end_headers()
      if seen["status"] != 200:  # Some servers repeat the key.
        self.wfile.write(f"bad {self.headers['Authorization']}".encode())
        return
      seen["temperature"] = body["temperature"]
      text = f"{body['model']}: {body['messages'][0]['content']}"
      choice = {"message": {"role": "assistant", "content": text}}
      self.wfile.write(json.dumps({"choices": [choice]}).encode())

    def log_message(self, *unused):
      pass

  monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
  http = server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=http.serve_forever, daemon=True).start()
  yield f"http://127.0.0.1:{http.server_port}/v1", seen
  http.shutdown()


def test_endpoint_writer_keeps_the_order_and_its_key(endpoint):
  url, seen = endpoint
  writer = writers.EndpointWriter(url, "big")
  assert writer.write([str(i) for i in range(20)]) == [
    f"big: {i}" for i in range(20)
  ]
  assert seen["keys"] == {"Bearer secret-key"}
  assert "secret-key" not in writer.name and seen["temperature"] == 0
  writers.EndpointWriter(url, "big", temperature=0.75).write(["x"])
  assert seen["temperature"] == 0.75
  seen["status"] = 401
  patient = dataclasses.replace(remote.PATIENCE, retries=0)
  shown = r"status 401: bad Bearer \[secret\]$"
  with pytest.raises(types.SearchError, match=shown) as error:
    writers.EndpointWriter(url, "big", spec=patient).write(["x"])
  assert "secret-key" not in str(error.value)
