"""The chat API over a real server and a real rollout, good days and bad."""

import gzip
import json
import threading
import time

import httpx2
import pytest
import tiny_agent
from retrieval.servers import serving

from stepsearch_jax.serving import chat

QUESTION = "Who founded Larn?"
LIMITS = chat.ChatLimits(body_bytes=2000, question_chars=200, waiting=2,
                         timeout_seconds=30)


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
  with tiny_agent.scripted(tmp_path_factory.mktemp("run")) as made:
    yield made


@pytest.fixture(scope="module")
def url(agent):
  with serving(chat.make_app(agent, "tiny", LIMITS)) as url:
    yield url


class Held:
  """An agent that lets the real one go on when it is told to."""

  def __init__(self, agent):
    self.agent, self.go = agent, threading.Event()
    self.begun, self.ended = [], []

  def ask(self, text, temperature, tell, max_tokens):
    def slowly(happening):
      assert self.go.wait(30)
      tell(happening)

    self.begun.append(text)
    try:
      return self.agent.ask(text, temperature, slowly, max_tokens)
    finally:
      self.ended.append(text)


def asked(text=QUESTION, **more):
  return {"model": "tiny", "messages": [{"role": "user", "content": text}],
          **more}


def post(url, row, **more):
  return httpx2.post(f"{url}/v1/chat/completions", json=row, timeout=60, **more)


def counted(url, name):
  lines = httpx2.get(f"{url}/metrics").text.splitlines()
  return sum(float(line.rsplit(" ", 1)[1]) for line in lines
             if line.startswith(name))


def until(condition):
  for _ in range(600):
    if condition():
      return
    time.sleep(0.05)
  raise AssertionError("it never happened")


def streamed(url, row):
  """Objects of a stream, and whether it ended as streams do."""
  rows = []
  with httpx2.stream("POST", f"{url}/v1/chat/completions", json=row,
                     timeout=60) as response:
    assert response.headers["content-type"].startswith("text/event-stream")
    for line in response.iter_lines():
      if line:
        assert line.startswith("data: ")
        rows.append(line.removeprefix("data: "))
  return [json.loads(row) for row in rows[:-1]], rows[-1] == "[DONE]"


def test_the_answer_is_the_content_and_the_trace_says_how(agent, url):
  expected = agent.ask(QUESTION)
  row = post(url, asked()).json()
  assert row["object"] == "chat.completion" and row["model"] == "tiny"
  assert row["id"].startswith("chatcmpl-")
  assert abs(row["created"] - time.time()) < 300
  assert row["choices"] == [{
    "index": 0, "logprobs": None, "finish_reason": "stop",
    "message": {"role": "assistant", "content": "Ada Brandt",
                "refusal": None},
  }]
  length = len(expected.trajectory.tokens)
  assert row["usage"] == {
    "prompt_tokens": length - expected.tokens,
    "completion_tokens": expected.tokens, "total_tokens": length,
  }
  search, answer = row["trace"]["turns"]
  assert search["thought"] == "I look."
  assert (search["action"], search["content"]) == ("search",
                                                   "founder of Larn")
  found = expected.trajectory.turns[0].documents
  assert search["titles"] == [passage.title for passage in found] != []
  assert (answer["action"], answer["titles"]) == ("answer", [])
  assert search["seconds"] > 0 and row["trace"]["seconds"] > 0
  assert row["trace"]["stop_reason"] == "answer"


def test_a_stream_tells_turns_then_the_answer(url):
  whole = post(url, asked()).json()
  chunks, done = streamed(url, asked(
    stream=True, stream_options={"include_usage": True}
  ))
  assert done
  assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
  assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
  *parts, last, usage = chunks
  assert usage["choices"] == [] and usage["usage"] == whole["usage"]
  assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
  content = [c["choices"][0]["delta"].get("content", "") for c in parts]
  assert "".join(content) == "Ada Brandt"
  assert last["choices"][0]["finish_reason"] == "stop"
  told = [chunk["event"] for chunk in parts if "event" in chunk]
  assert [event["kind"] for event in told] == ["turn", "documents", "turn"]
  turns = whole["trace"]["turns"]
  assert told[0]["content"] == turns[0]["content"]
  assert told[1]["titles"] == turns[0]["titles"]
  assert [t["content"] for t in last["trace"]["turns"]] == [
    t["content"] for t in turns
  ]
  assert "usage" not in str(streamed(url, asked(stream=True))[0])


def test_the_last_user_message_is_the_question(url):
  def messages(*rows):
    return asked() | {"messages": [
      {"role": role, "content": content} for role, content in rows
    ]}

  def read(row):
    return post(url, row).json()["usage"]["prompt_tokens"]

  alone = read(messages(("user", QUESTION)))
  parts = [{"type": "text", "text": "Who founded "},
           {"type": "text", "text": "Larn?"}]
  assert read(messages(
    ("system", "Be brief, polite and thorough."), ("user", "Who was Talara?"),
    ("assistant", "A warden of a large city."), ("user", parts),
  )) == alone
  assert read(messages(("user", "Who founded Larn, and why?"))) > alone


def test_max_tokens_bounds_what_the_policy_writes(url):
  whole = post(url, asked()).json()["usage"]["completion_tokens"]
  for name in ("max_tokens", "max_completion_tokens"):
    row = post(url, asked(**{name: whole - 1})).json()
    assert row["usage"]["completion_tokens"] == whole - 1
    assert row["choices"][0]["finish_reason"] == "length"
    assert row["choices"][0]["message"]["content"] == ""
  row = post(url, asked(max_tokens=whole)).json()
  assert row["choices"][0]["finish_reason"] == "stop"


def test_the_agent_gets_what_the_request_asks_for(agent):
  given = []

  class Notes(Held):
    def ask(self, text, temperature, tell, max_tokens):
      given.append((text, temperature, max_tokens))
      return self.agent.ask(text, temperature, tell, max_tokens)

  with serving(chat.make_app(Notes(agent), "tiny", LIMITS)) as url:
    post(url, asked())
    post(url, asked(temperature=0.7, max_tokens=9, max_completion_tokens=8))
  assert given == [(QUESTION, 0.0, None), (QUESTION, 0.7, 8)]


def test_parameters_that_ask_for_nothing_are_accepted(url):
  row = asked(
    temperature=0, top_p=1, n=1, stop=None, seed=None, tools=[], user="u",
    logprobs=False, presence_penalty=0.0, response_format={"type": "text"},
    stream=False, metadata={"a": "b"},
  )
  assert post(url, row).status_code == 200


@pytest.mark.parametrize("change, status, param, reason", [
  ({"messages": []}, 400, "messages", "at least one message, got []"),
  ({"messages": None}, 400, "messages", "at least one message, got None"),
  ({"messages": "Who?"}, 400, "messages", "a list of at least one message"),
  ({"messages": [{"role": "robot", "content": "Who?"}]}, 400, "messages",
   "with a role of"),
  ({"messages": [{"role": "system", "content": "Who?"}]}, 400, "messages",
   "a message of role 'user'"),
  ({"messages": [{"role": "user", "content": " "}]}, 400, "messages",
   "text in the last user message"),
  ({"messages": [{"role": "user"}]}, 400, "messages", "got None"),
  ({"messages": [{"role": "user", "content": [
    {"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "messages",
   "parts of type 'text' only"),
  ({"messages": [{"role": "user", "content": "x" * 201}]}, 400, "messages",
   "a question of up to 200 characters, got '201'"),
  ({"model": "gpt"}, 404, "model", "expected 'tiny', the only one here"),
  ({"model": None}, 400, "model", "expected 'tiny', got None"),
  ({"temperature": 2.1}, 400, "temperature", "from 0 to 2, got 2.1"),
  ({"temperature": -1}, 400, "temperature", "from 0 to 2, got -1"),
  ({"temperature": "hot"}, 400, "temperature", "got 'hot'"),
  ({"temperature": True}, 400, "temperature", "got True"),
  ({"max_tokens": 0}, 400, "max_tokens", "at least 1, got 0"),
  ({"max_tokens": 2.5}, 400, "max_tokens", "at least 1, got 2.5"),
  ({"max_completion_tokens": True}, 400, "max_completion_tokens", "got True"),
  ({"n": 2}, 400, "n", "expected 1 (nothing else is supported), got 2"),
  ({"top_p": 0.5}, 400, "top_p", "expected 1"),
  ({"logprobs": True}, 400, "logprobs", "expected False"),
  ({"stop": ["\n"]}, 400, "stop", "expected []"),
  ({"tools": [{"type": "function"}]}, 400, "tools", "expected []"),
  ({"seed": 3}, 400, "seed", "does not support it"),
  ({"wizardry": 3}, 400, "wizardry", "does not support it"),
  ({"stream": "yes"}, 400, "stream", "a boolean"),
  ({"stream_options": {"include_usage": True}}, 400, "stream_options",
   "only with stream"),
  ({"stream": True, "stream_options": {"x": 1}}, 400, "stream_options",
   "include_usage"),
])
def test_what_is_not_supported_is_refused_in_one_line(
  url, change, status, param, reason
):
  response = post(url, asked() | change)
  error = response.json()["error"]
  assert response.status_code == status
  assert set(error) == {"message", "type", "param", "code"}
  assert (error["type"], error["param"]) == ("invalid_request_error", param)
  assert error["message"].startswith(f"{param}: ")
  assert reason in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_question_that_does_not_fit_is_refused(url, stream):
  response = post(url, asked("w " * 90, stream=stream))
  assert response.status_code == 400
  error = response.json()["error"]
  assert error["code"] == "context_length_exceeded"
  assert "prompt tokens, the limit is 36" in error["message"]
  assert post(url, asked()).status_code == 200


def test_bodies_are_read_within_their_limits(url):
  def send(body, coding="identity"):
    response = httpx2.post(
      f"{url}/v1/chat/completions", content=body, timeout=60,
      headers={"content-encoding": coding},
    )
    return response.status_code

  plain = json.dumps(asked()).encode()
  assert send(gzip.compress(plain), "gzip") == 200
  assert send(gzip.compress(plain)[:-9], "gzip") == 400
  assert send(plain, "gzip") == 400
  assert send(plain, "br") == 415
  assert send(gzip.compress(b" " * 10_000), "gzip") == 413
  assert send(b"x" * 2001) == 413
  for broken in (b"{", b"[1]", b"\xff", b"", b"[" * 1990,
                 json.dumps(asked() | {"\ud800": 1}).encode()):
    assert send(broken) == 400


def test_other_paths_and_methods_are_refused_as_clients_read_it(url):
  for response, status in (
    (httpx2.get(f"{url}/v1/chat/completions"), 405),
    (httpx2.post(f"{url}/v1/completions", json={}), 404),
  ):
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_models_health_and_metrics(url):
  (model,) = httpx2.get(f"{url}/v1/models").json()["data"]
  assert (model["id"], model["object"]) == ("tiny", "model")
  assert httpx2.get(f"{url}/health").json() == {"status": "ok", "waiting": 0}
  before = counted(url, 'chat_requests_total{status="200"}')
  post(url, asked())
  assert counted(url, 'chat_requests_total{status="200"}') == before + 1
  assert counted(url, "chat_waiting") == 0


def test_requests_queue_and_the_queue_is_bounded(agent):
  held = Held(agent)
  responses = []

  def ask(i):
    responses.append(post(url, asked(f"Who founded {i}?")))

  with serving(chat.make_app(held, "tiny", LIMITS)) as url:
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for i, thread in enumerate(threads):
      thread.start()
      until(lambda i=i: held.begun if i == 0 else
            counted(url, "chat_waiting") == i)
    refused = post(url, asked())
    held.go.set()
    for thread in threads:
      thread.join()
  assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
  assert refused.json()["error"]["type"] == "rate_limit_error"
  assert [r.status_code for r in responses] == [200] * 3
  assert held.begun == [f"Who founded {i}?" for i in range(3)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_breaks_no_other(agent, stream):
  held = Held(agent)
  with serving(chat.make_app(held, "tiny", LIMITS)) as url:
    def give_up(text):
      with pytest.raises(httpx2.TimeoutException):
        httpx2.post(f"{url}/v1/chat/completions", timeout=0.3,
                    json=asked(text, stream=stream))

    give_up("Who plays?")  # While its rollout is going on ...
    give_up("Who waits?")  # ... and while it waits behind that one.
    until(lambda: counted(url, 'chat_requests_total{status="499"}') == 2)
    held.go.set()
    assert post(url, asked()).status_code == 200
  assert held.begun == held.ended == ["Who plays?", QUESTION]


def test_a_stream_that_is_left_ends_its_rollout(agent):
  held = Held(agent)
  told = []

  class Watched(Held):
    def ask(self, text, temperature, tell, max_tokens):
      def one(happening):
        if "turn" in [h.kind for h in told]:
          assert held.go.wait(30)
        told.append(happening)
        tell(happening)

      return agent.ask(text, temperature, one, max_tokens)

  with serving(chat.make_app(Watched(agent), "tiny", LIMITS)) as url:
    with httpx2.stream("POST", f"{url}/v1/chat/completions", timeout=60,
                       json=asked(stream=True)) as response:
      lines = response.iter_lines()
      while '"kind": "turn"' not in next(lines):
        pass
    time.sleep(0.3)  # The server hears of it.
    held.go.set()
    assert post(url, asked()).status_code == 200
  assert [h.kind for h in told if h.kind != "text"] == [
    "turn", "documents",  # Ended there.
    "turn", "documents", "turn",
  ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_rollout_that_fails_is_an_error_of_one_request(agent, stream):
  class Breaks(Held):
    def ask(self, text, temperature, tell, max_tokens):
      if "bad" in text:
        raise RuntimeError("secret detail")
      return self.agent.ask(text, temperature, tell, max_tokens)

  with serving(chat.make_app(Breaks(agent), "tiny", LIMITS)) as url:
    response = post(url, asked("bad?", stream=stream))
    assert response.status_code == 500
    assert response.json()["error"] == {
      "message": "the rollout failed: RuntimeError", "type": "server_error",
      "param": None, "code": None,
    }
    assert post(url, asked()).status_code == 200


def test_a_reply_that_takes_too_long_is_given_up(agent):
  held = Held(agent)
  limits = chat.ChatLimits(timeout_seconds=0.2)
  with serving(chat.make_app(held, "tiny", limits)) as url:
    response = post(url, asked())
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "no result in 0.2 s"
    held.go.set()
    until(lambda: held.ended)
