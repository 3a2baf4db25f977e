"""The command that serves an agent, from its flags to SIGTERM."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import fakes
import httpx2
import pytest

from stepsearch_jax.models.weights import export


@pytest.mark.slow
def test_a_model_folder_is_served_until_the_command_is_told_to_stop(tmp_path):
  tokenizer = fakes.make_tokenizer()
  model = fakes.make_model(tokenizer.vocab_size, max_positions=512)
  export.save_policy(tmp_path / "model", fakes.make_policy(model), model,
                     tokenizer, "float32")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  process = subprocess.Popen(
    [sys.executable, "-m", "stepsearch_jax", "serve-agent",
     "--config=quickstart:runlocal", f"--workdir={tmp_path}/served",
     f"--config.model.reference={tmp_path}/model",
     "--config.rollout.max_prompt=64", f"--port={port}", "--waiting=2"],
    env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=tmp_path,
  )
  url = f"http://127.0.0.1:{port}"
  try:
    for _ in range(1200):
      with contextlib.suppress(httpx2.ConnectError):
        if httpx2.get(f"{url}/health").status_code == 200:
          break
      assert process.poll() is None
      time.sleep(0.1)
    (model,) = httpx2.get(f"{url}/v1/models").json()["data"]
    assert model["id"] == "served"
    row = httpx2.post(f"{url}/v1/chat/completions", timeout=120, json={
      "model": "served", "max_tokens": 5,
      "messages": [{"role": "user", "content": "Who founded Larn?"}],
    }).json()
    assert 0 < row["usage"]["completion_tokens"] <= 5
    assert len(row["trace"]["turns"]) >= 1
  finally:
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=60)
  assert code in (0, -signal.SIGTERM)
