#!/usr/bin/env python3
"""test_serve.py: `run serve` as its clients meet it: over sockets, on the committed fixtures.

Needs nothing but Python's standard library. The last line says how many checks passed and failed.
"""
import base64
import hashlib
import http.client
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from checks import Tensors, check, end

HERE = os.path.dirname(os.path.abspath(__file__))
RUN = os.environ.get("RUN", os.path.join(os.path.dirname(HERE), "run"))
FIXTURES = os.environ.get("FIXTURES", os.path.join(HERE, "fixtures"))
MODEL, GEMMA = (os.path.join(FIXTURES, name) for name in ("smol.kvz", "gemma3.kvz"))
TEXT = open(os.path.join(FIXTURES, "real", "town.txt"), encoding="utf-8").read()


class Server:
    """run serve on a free port, until the with block ends."""

    def __init__(self, *flags, model=MODEL, threads=1):
        self.p = subprocess.Popen([RUN, "serve", model, "--port", "0", "--json", "-j", str(threads), *map(str, flags)],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        line = self.p.stdout.readline()
        self.port = json.loads(line)["port"] if line else None

    def __enter__(self):
        for _ in range(200):
            if self.port is None or self.get("/health")[0] == 200:
                break
            time.sleep(0.02)
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self, sig=signal.SIGTERM):
        if self.p.poll() is None:
            self.p.send_signal(sig)
        self.err = self.p.communicate(timeout=60)[1].decode("utf-8", "replace")
        self.code = self.p.returncode
        return self.code

    def ask(self, method, path, body=None, headers=None, timeout=120):
        """status, headers, bytes"""
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        if isinstance(body, (dict, list)):
            body = json.dumps(body)
        c.request(method, path, body.encode() if isinstance(body, str) else body, headers or {})
        r = c.getresponse()
        data = r.read()
        c.close()
        return r.status, dict((k.lower(), v) for k, v in r.getheaders()), data

    def get(self, path, **more):
        status, headers, data = self.ask("GET", path, **more)
        return status, as_json(data), headers

    def post(self, path, body, **more):
        status, headers, data = self.ask("POST", path, body, **more)
        return status, as_json(data)

    def chat(self, text, **fields):
        messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
        fields = {"max_tokens": 8, "temperature": 0, **fields}
        return self.post("/v1/chat/completions", {"model": "m", "messages": messages, **fields})

    def events(self, path, body):
        """The events of a stream, its comments, and its last line."""
        status, headers, data = self.ask("POST", path, dict(body, stream=True))
        check(status == 200 and headers["content-type"].startswith("text/event-stream"), "%s streams" % path)
        blocks = data.decode("utf-8").split("\n\n")
        check(blocks.pop() == "", "%s: the stream ends with an empty line" % path)
        data = [b[6:] for b in blocks if b.startswith("data: ")]
        return [json.loads(b) for b in data if b != "[DONE]"], data[-1:]

    def socket(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)


def as_json(data):
    try:
        return json.loads(data)
    except ValueError:
        return data.decode("utf-8", "replace")


def read_answer(s):
    """One answer with a Content-Length from a socket: status, body. b"" at its end."""
    head = b""
    while b"\r\n\r\n" not in head:
        byte = s.recv(1)
        if not byte:
            return 0, head
        head += byte
    n = int(re.search(rb"content-length: (\d+)", head, re.I).group(1)) if b"ontent-Length" in head else 0
    body = b""
    while len(body) < n:
        body += s.recv(n - len(body))
    return int(head.split()[1]), body


# ---- endpoints ----

def test_models(s):
    status, health, headers = s.get("/health")
    check(status == 200 and health == {"status": "ok"}, "health")
    check("access-control-allow-origin" not in headers, "no CORS without --cors")
    status, models, _ = s.get("/v1/models")
    check(status == 200 and models["object"] == "list", "models are a list")
    check([m["id"] for m in models["data"]] == ["smol"], "the model is called after its file")
    check(s.get("/v1/models/smol")[1]["id"] == "smol" and s.get("/v1/models/x")[0] == 404, "one model")
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405), ("PUT", "/health", 405)):
        got, _, data = s.ask(method, path)
        error = json.loads(data)["error"]
        check(json.loads(data)["type"] == "error", "%s %s: an error for Anthropic's clients as well" % (method, path))
        check(got == status and set(error) == {"message", "type", "param", "code"}, "%s %s: %d" % (method, path, got))
    status, headers, data = s.ask("HEAD", "/health")
    check(status == 200 and data == b"" and int(headers["content-length"]) > 0, "HEAD sends no body")


def test_page(s):
    """The page for people: one file, and a browser is told that nothing else is part of it (test_page.py looks at it)."""
    with open(os.path.join(os.path.dirname(HERE), "serve", "page.html"), "rb") as f:
        page = f.read()
    status, headers, data = s.ask("GET", "/")
    check(status == 200 and data == page and headers["content-type"] == "text/html; charset=utf-8", "the page is served: %d" % status)
    policy = dict(p.strip().split(" ", 1) for p in headers["content-security-policy"].split(";"))
    for tag in ("style", "script"):
        inline = re.findall(rb"<%s>(.*?)</%s>" % (tag.encode(), tag.encode()), page, re.S)
        sums = ["'sha256-%s'" % base64.b64encode(hashlib.sha256(text).digest()).decode() for text in inline]
        check(len(sums) == 1 and policy.pop(tag + "-src") == sums[0], "its %s, and no other" % tag)
    check(policy == {"default-src": "'none'", "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
                     "frame-ancestors": "'none'"}, "and nothing else: %s" % policy)
    check(not re.search(rb"(?:src|href)=.(?!data:)|url\(|@import|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page),
          "it needs nothing else, and writes no HTML")
    check(headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer", "headers")
    check(headers["cache-control"] == "no-cache" and s.get("/health")[2]["cache-control"] == "no-store", "answers are not kept, but the page is")
    status, again, data = s.ask("GET", "/", headers={"If-None-Match": headers["etag"]})
    check(status == 304 and data == b"" and "content-length" not in again and again["etag"] == headers["etag"], "a page that is known is not sent")
    check(s.ask("GET", "/", headers={"If-None-Match": '"other"'})[2] == page, "an old one is")
    status, head, data = s.ask("HEAD", "/")
    check(status == 200 and data == b"" and int(head["content-length"]) == len(page), "HEAD sends no body")
    check(s.ask("POST", "/", "a")[0] == 405 and s.ask("GET", "/index.html")[0] == 404 and s.ask("GET", "//")[0] == 404, "nothing else is a page")
    check(s.ask("GET", "/", headers={"Host": "evil.example"})[0] == 403, "nor under a stranger's name")


def test_chat(s):
    status, r = s.chat("Hello there")
    check(status == 200 and r["object"] == "chat.completion" and r["model"] == "smol", "chat answers")
    check(len(r["system_fingerprint"]) > 8, "the model's fingerprint")
    choice, usage = r["choices"][0], r["usage"]
    check(choice["message"]["role"] == "assistant" and choice["finish_reason"] == "length", "a cut answer says so")
    check(usage["completion_tokens"] == 8 and usage["total_tokens"] == 8 + usage["prompt_tokens"], "usage")
    text = choice["message"]["content"]
    again = s.chat("Hello there")[1]
    check(again["choices"][0]["message"]["content"] == text, "temperature 0 repeats itself")
    check(again["usage"]["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1, "all but one id is cached")
    parts = s.chat([{"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]}])
    check(parts[1]["choices"][0]["message"]["content"] == text, "content in parts is the same text")
    events, last = s.events("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 8,
                                                     "temperature": 0, "stream_options": {"include_usage": True}})
    check(last == ["[DONE]"], "a stream ends with [DONE]")
    check(events[0]["choices"][0]["delta"]["role"] == "assistant", "the first piece has the role")
    check("".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == text, "pieces add up to the answer")
    check([e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 2) + ["length"], "one reason")
    check(events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 8, "usage is the last piece")
    check(len({e["id"] for e in events}) == 1 and events[0]["object"] == "chat.completion.chunk", "one id")
    for n in (1, 3):
        r = s.chat("Hello there", n=n, temperature=1.5, seed=5)[1]
        texts = [c["message"]["content"] for c in r["choices"]]
        check([c["index"] for c in r["choices"]] == list(range(n)) and len(set(texts)) == n, "%d choices" % n)
        check(r["usage"]["completion_tokens"] == 8 * n, "choices are counted")
        check(s.chat("Hello there", n=n, temperature=1.5, seed=5)[1]["choices"] == r["choices"], "a seed repeats itself")
    check(s.chat("x", unknown_field={"a": [1]}, user="me")[0] == 200, "unknown fields are ignored")
    system = [{"role": "system", "content": "One."}, {"role": "developer", "content": "Two."},
              {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    status, r = s.chat(system)
    check(status == 200, "system, developer, user, assistant: %s" % r)
    longer = s.chat(system + [{"role": "assistant", "content": r["choices"][0]["message"]["content"]},
                              {"role": "user", "content": "d"}])[1]
    check(longer["usage"]["prompt_tokens_details"]["cached_tokens"] >= r["usage"]["prompt_tokens"],
          "the next turn begins with the last one's ids")


def test_sharing():
    """Prompts that begin alike are read once, also those that come together; so are the choices of one request."""
    for model, flags in ((MODEL, ()), (MODEL, ("--kv", "q8")), (GEMMA, ())):
        with Server(*flags, model=model) as s:
            def computed():
                return int(re.search(r"^llamacpp:prompt_tokens_total (\d+)", s.get("/metrics")[1], re.M).group(1))

            text = TEXT[:1200]
            r = s.chat(text + " One?", n=4, temperature=1, seed=3, max_tokens=3)[1]
            n = r["usage"]["prompt_tokens"]
            check(computed() <= n + 6 and n > 200, "%s %s: %d choices of %d tokens, %d read" % (model, flags, 4, n, computed()))
            alone = s.chat(text + " Two?", max_tokens=3)[1]["choices"]
            before = computed()
            with ThreadPoolExecutor(6) as pool:
                same = list(pool.map(lambda _: s.chat("Now. " + text + " Two?", max_tokens=3)[1], range(6)))
            check(len({json.dumps(x["choices"]) for x in same}) == 1, "%s: equal prompts, equal answers" % model)
            read = computed() - before
            check(read < n + 60, "%s %s: six clients with one prompt of %d tokens, %d read" % (model, flags, n, read))
            check(alone == s.chat(text + " Two?", max_tokens=3)[1]["choices"], "%s: and others' stay" % model)


def test_drafts():
    """--draft changes no answer, alone and in company, about a document and about nothing."""
    asked = []
    for draft in (0, 5):
        with Server("--draft", draft) as s:
            s.post("/v1/documents?name=town&ratio=0.6", TEXT[:900])
            with ThreadPoolExecutor(4) as pool:
                asked.append(list(pool.map(lambda q: s.chat(q, max_tokens=60, ignore_eos=True, document="town", logprobs=True)[1]["choices"],
                                           ["What?", "Who built it?", "Why?", "When?"])))
            asked[-1].append(s.chat("One two one two one two one", max_tokens=60, ignore_eos=True)[1]["choices"])
            s.ask("DELETE", "/v1/documents/town")
    check(asked[0] == asked[1], "--draft: %s" % [a == b for a, b in zip(*asked)])


def test_stop(s):
    text = s.chat("Hello there", max_tokens=24)[1]["choices"][0]["message"]["content"]
    at = next(i for i in range(6, len(text) - 3) if text[i:i + 3] not in text[:i + 2] and "\ufffd" not in text[i:i + 3])
    for stop in (text[at:at + 3], ["nowhere", text[at:at + 3]]):
        choice = s.chat("Hello there", max_tokens=24, stop=stop)[1]["choices"][0]
        check(choice["message"]["content"] == text[:at] and choice["finish_reason"] == "stop", "%r is not shown" % (stop,))
        body = {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 24, "temperature": 0, "stop": stop}
        events = s.events("/v1/chat/completions", body)[0]
        check("".join(e["choices"][0]["delta"].get("content", "") for e in events) == text[:at], "nor in a stream")


REFUSED = [  # fields, status, param
    ({"temperature": -1}, 400, "temperature"), ({"temperature": "hot"}, 400, "temperature"), ({"top_p": 2}, 400, "top_p"),
    ({"max_tokens": 0}, 400, "max_tokens"), ({"max_tokens": 1.5}, 400, "max_tokens"), ({"n": 0}, 400, "n"), ({"n": 99}, 400, "n"),
    ({"stop": ""}, 400, "stop"), ({"stop": [1]}, 400, "stop"), ({"stop": ["a"] * 17}, 400, "stop"),
    ({"stream": "yes"}, 400, "stream"), ({"seed": 0.5}, 400, "seed"), ({"messages": []}, 400, "messages"),
    ({"messages": None}, 400, "messages"), ({"messages": [{"content": "a"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "king", "content": "a"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, 400, "messages[1].role"),
    ({"top_logprobs": 2}, 400, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"document": "nowhere"}, 404, "document"), ({"document": 5}, 400, "document"),
    ({"top_k": -2}, 400, "top_k"), ({"min_p": 2}, 400, "min_p"), ({"frequency_penalty": 3}, 400, "frequency_penalty"),
    ({"presence_penalty": "a"}, 400, "presence_penalty"), ({"repeat_penalty": -1}, 400, "repeat_penalty"),
    ({"logit_bias": 3}, 400, "logit_bias"), ({"logit_bias": {"x": 1}}, 400, "logit_bias"), ({"logit_bias": [[1]]}, 400, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, 400, "logit_bias"), ({"response_format": {"type": "xml"}}, 400, "response_format"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format"), ({"response_format": 1}, 400, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "integer", "minimum": 1}}}}, 400, "response_format"),
]


def test_refused(s):
    for fields, status, param in REFUSED:
        got, r = s.chat("Hello", **fields)
        check(got == status and r["error"]["param"] == param, "%s: %s %s" % (fields, got, r))
    for body, what in ((b"", "empty"), (b"{", "cut"), (b"[]", "a list"), (b'{"messages": [{"role": "user", "content": "\xff"}]}', "no UTF-8"),
                       (b"[" * 100, "deep"), (b'{"a":' + b"[" * 40 + b"]" * 40 + b"}", "deep")):
        got, r = s.post("/v1/chat/completions", body)
        check(got == 400 and r["error"]["message"], "a body that is %s: %d %s" % (what, got, r))
    got, r = s.chat("word " * 3000)
    check(got == 400 and r["error"]["code"] == "context_length_exceeded", "a prompt that is too long: %s" % r)
    check(s.chat("Hello", frequency_penalty=0, response_format={"type": "text"}, logit_bias={})[0] == 200,
          "values that change nothing are taken")


def test_settings(s):
    """Samplers and forms are the command line's: the same seed gives the same answer, JSON is JSON, refusals name the place."""
    how = dict(temperature=1, seed=5, max_tokens=12, top_k=3, min_p=0.05, repeat_penalty=1.3, frequency_penalty=0.5,
               presence_penalty=0.5, repeat_last_n=20)
    first, again = (s.chat("Hello", **how)[1]["choices"][0]["message"] for _ in range(2))
    check(first == again, "the same seed: %s, then %s" % (first, again))
    greedy = s.chat("Hello", logprobs=True)[1]["choices"][0]
    check(s.chat("Hello", top_k=1, temperature=2)[1]["choices"][0]["message"] == greedy["message"], "top_k 1 is greedy")
    id = s.post("/tokenize", {"prompt": greedy["logprobs"]["content"][0]["token"]})[1]["tokens"][0]
    for bias in ({str(id): -100}, [[id, -100]]):
        said = s.chat("Hello", logprobs=True, logit_bias=bias)[1]["choices"][0]["logprobs"]["content"][0]["token"]
        check(said != greedy["logprobs"]["content"][0]["token"], "logit_bias %s: still %r" % (bias, said))
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "who": {"enum": ["Ann", "Bo"]}},
              "required": ["n", "who"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(4):
        got = s.chat("Hello", response_format=form, max_tokens=200, temperature=1, seed=seed)[1]["choices"][0]
        if got["finish_reason"] == "stop":
            value = json.loads(got["message"]["content"])
            check(set(value) == {"n", "who"} and type(value["n"]) is int and value["who"] in ("Ann", "Bo"), "schema: %s" % value)
    const = {"const": [1, "a"]}
    for how in ({"response_format": {"type": "json_schema", "json_schema": {"schema": const}}}, {"json_schema": const},
                {"response_format": {"type": "json_schema", "schema": const}}, {"response_format": {"type": "json_object", "schema": const}},
                {"output_config": {"format": {"type": "json_schema", "schema": const}}}):
        got = s.chat("Hello", max_tokens=50, **how)[1]
        check(json.loads(got["choices"][0]["message"]["content"]) == [1, "a"], "%s: %s" % (how, got))


# ---- completions and tokens ----

def test_completions(s):
    status, r = s.post("/v1/completions", {"prompt": "Hello there", "max_tokens": 6, "temperature": 0})
    check(status == 200 and r["object"] == "text_completion", "completions answer: %s" % r)
    text, ids = r["choices"][0]["text"], s.post("/tokenize", {"prompt": "Hello there"})[1]["tokens"]
    check(r["usage"]["prompt_tokens"] == len(ids) and r["choices"][0]["logprobs"] is None, "usage, no logprobs")
    for prompt, n in ((ids, 1), (["Hello there", "Hello there"], 2), ([ids, ids, ids], 3)):
        r = s.post("/v1/completions", {"prompt": prompt, "max_tokens": 6, "temperature": 0})[1]
        check([c["text"] for c in r["choices"]] == [text] * n, "prompts as %s" % (prompt,))
        check(r["usage"]["prompt_tokens"] == n * len(ids) and r["usage"]["completion_tokens"] == 6 * n, "all are counted")
    long = s.post("/tokenize", {"prompt": TEXT[:600]})[1]["tokens"]
    for prompt, tokens in (("Hello there", ids), (long, long)):
        scores = []
        for limit in (0, 1):
            status, r = s.post("/v1/completions", {"prompt": prompt, "max_tokens": limit, "echo": True, "logprobs": 3, "temperature": 0})
            choice, lp = r["choices"][0], r["choices"][0]["logprobs"]
            scores.append(lp["token_logprobs"])
            check(len(lp["tokens"]) == len(tokens) + limit, "every token of the prompt, and %d" % limit)
            check(lp["token_logprobs"][0] is None and lp["top_logprobs"][0] is None, "the first has no logprob")
            check(all(x < 0 for x in lp["token_logprobs"][1:]), "the others have")
            check(all(top[token] == x and len(top) in (3, 4) and max(top.values()) <= 0 for token, x, top in
                      zip(lp["tokens"][1:], lp["token_logprobs"][1:], lp["top_logprobs"][1:])), "each is among its tops")
            check(len(lp["text_offset"]) == len(lp["tokens"]) and r["usage"]["completion_tokens"] == limit, "offsets, usage")
        check(scores[0] == scores[1][:-1], "with an answer or without one")
        check(lp["token_logprobs"][-1] == max(lp["top_logprobs"][-1].values()), "the answer is the likeliest")
    check(choice["text"].startswith(TEXT[:600]), "the prompt comes back")
    # What the command line computes for the same tokens.
    with tempfile.TemporaryDirectory() as folder:
        out, p = os.path.join(folder, "logits"), os.path.join(folder, "ids")
        with open(p, "w") as f:
            f.write(" ".join(map(str, long)))
        subprocess.run([RUN, "logits", MODEL, "--ids", p, "-o", out, "-q", "-j", "1"], check=True)
        t = Tensors(out)
        logits, vocab = t["logits"], t.shape["logits"][1]
        rows = [logits[i * vocab:(i + 1) * vocab] for i in range(len(long) - 1)]
        want = [row[id] - max(row) - math.log(sum(math.exp(x - max(row)) for x in row)) for row, id in zip(rows, long[1:])]
        far = max(abs(a - b) for a, b in zip(want, scores[0][1:]))
        check(far < 1e-3, "logprobs are those of `run logits`: %g away" % far)
    events, last = s.events("/v1/completions", {"prompt": "Hello there", "max_tokens": 6, "temperature": 0, "echo": True, "logprobs": 1})
    check("".join(e["choices"][0]["text"] for e in events) == "Hello there" + text and last == ["[DONE]"], "a stream of it")
    check(sum(len(e["choices"][0]["logprobs"]["tokens"]) for e in events) == len(ids) + 6, "with all logprobs")
    for fields, param in (({}, "prompt"), ({"prompt": ""}, None), ({"prompt": []}, "prompt"), ({"prompt": [640]}, "prompt"),
                          ({"prompt": [1, "a"]}, "prompt"), ({"prompt": {"a": 1}}, "prompt"), ({"prompt": [[1], [-1]]}, "prompt"),
                          ({"prompt": "a", "logprobs": 50}, "logprobs"), ({"prompt": ["a"] * 300}, "prompt")):
        status, r = s.post("/v1/completions", dict(fields, max_tokens=1))
        check(status == 400 and r["error"]["param"] == param or param is None, "%s: %s %s" % (str(fields)[:60], status, r))


def test_logprobs(s):
    r = s.chat("Hello there", logprobs=True, top_logprobs=2)[1]["choices"][0]
    content = r["logprobs"]["content"]
    check(len(content) == 8, "a logprob for each token")
    check(all(c["logprob"] == c["top_logprobs"][0]["logprob"] and len(c["top_logprobs"]) == 2 for c in content), "the likeliest first")
    check(b"".join(bytes(c["bytes"]) for c in content).decode("utf-8", "replace") == r["message"]["content"], "bytes add up to the text")
    check(s.chat("Hello there", logprobs=True)[1]["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == [], "none is asked for")


def test_tokens(s):
    status, r = s.post("/tokenize", {"content": "Hello there", "with_pieces": True})
    check(status == 200 and "".join(t["piece"] for t in r["tokens"]) == "Hello there", "pieces: %s" % r)
    ids = s.post("/tokenize", {"content": "Hello there"})[1]["tokens"]
    check(ids == [t["id"] for t in r["tokens"]] and r["count"] == len(ids), "the same ids")
    check(s.post("/detokenize", {"tokens": ids})[1]["content"] == "Hello there", "and back")
    for name in ("prompt", "content"):
        count = [len(s.post("/tokenize", {name: "<|im_end|>", **more})[1]["tokens"]) for more in ({}, {"parse_special": False})]
        check(count[0] == 1 < count[1], "special tokens are found in %s, unless refused: %s" % (name, count))
    check(s.post("/detokenize", {"tokens": [99999]})[0] == 400 and s.post("/tokenize", {})[0] == 400, "refused")
    info = s.get("/tokenizer_info")[1]
    check(info["eos_token"] and info["vocab_size"] == 640, "tokenizer_info: %s" % info)
    messages = [{"role": "user", "content": "Hello there"}]
    prompt = s.post("/apply-template", {"messages": messages})[1]["prompt"]
    check("Hello there" in prompt and "<|im_start|>" in prompt, "apply-template: %r" % prompt)
    check(s.post("/tokenize", {"messages": messages})[1]["count"] == s.chat("Hello there")[1]["usage"]["prompt_tokens"], "a chat's tokens")
    s.get("/slots"), time.sleep(0.3)
    slots = s.get("/slots")[1]
    check(len(slots) == 8 and not any(x["is_processing"] for x in slots), "slots")
    props = s.get("/props")[1]
    check(props["total_slots"] == 8 and props["default_generation_settings"]["n_ctx"] == 2048, "props")
    status, headers, text = s.ask("GET", "/metrics")
    figures = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if line[0] != "#")
    check(headers["content-type"].startswith("text/plain") and float(figures["llamacpp:tokens_predicted_total"]) > 8, "metrics")
    for name in ("prompt_tokens_total", "prompt_seconds_total", "tokens_predicted_seconds_total", "prompt_tokens_seconds",
                 "predicted_tokens_seconds", "requests_processing", "requests_deferred", "n_decode_total", "cached_tokens_total",
                 "document_bytes", "document_full_bytes"):
        check("llamacpp:" + name in figures, "metrics have " + name)


def test_anthropic(s):
    body = {"model": "m", "max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": "Hello there"}]}
    text = s.chat("Hello there")[1]["choices"][0]["message"]["content"]
    status, r = s.post("/v1/messages", body)
    check(status == 200 and r["type"] == "message" and r["content"] == [{"type": "text", "text": text}], "messages: %s" % r)
    check(r["stop_reason"] == "max_tokens" and r["usage"]["output_tokens"] == 8, "why it ends")
    count = s.post("/v1/messages/count_tokens", body)[1]["input_tokens"]
    check(r["usage"]["input_tokens"] + r["usage"]["cache_read_input_tokens"] == count, "count_tokens")
    _, headers, data = s.ask("POST", "/v1/messages", dict(body, stream=True))
    blocks = [b.split("\n") for b in data.decode().split("\n\n")[:-1]]
    events = [(e[7:], json.loads(d[6:])) for e, d in blocks]
    check(all(name == e["type"] for name, e in events), "events are named after their types")
    names = [name for name, _ in events]
    check(names[:3] == ["message_start", "content_block_start", "ping"], "the start of a stream: %s" % names)
    check(names[-3:] == ["content_block_stop", "message_delta", "message_stop"], "its end")
    check("".join(e["delta"]["text"] for name, e in events if name == "content_block_delta") == text, "pieces add up")
    system = s.post("/v1/messages", dict(body, system=[{"type": "text", "text": "Be brief."}]))[1]
    check(system["content"] == s.post("/v1/messages", dict(body, system="Be brief."))[1]["content"], "system in parts")
    part = next(text[i:i + 3] for i in range(5, len(text)) if "\ufffd" not in text[i:i + 3])
    r = s.post("/v1/messages", dict(body, stop_sequences=[part]))[1]
    check(r["stop_reason"] == "stop_sequence" and r["stop_sequence"] == part, "stop_sequences: %s" % r)
    for change, status in (({"max_tokens": None}, 400), ({"messages": []}, 400), ({"system": 5}, 400), ({"document": "x"}, 404)):
        got, r = s.post("/v1/messages", dict(body, **change))
        check(got == status and r["type"] == "error" and r["error"]["type"] and r["error"]["message"], "%s: %s" % (change, r))


# ---- connections ----

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_connections(s):
    with s.socket() as c:
        c.sendall(GET * 5 + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        answers = [read_answer(c) for _ in range(6)]
        check([a[0] for a in answers] == [200] * 6 and c.recv(1) == b"", "six requests at once, in order")
    body = json.dumps({"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 4, "temperature": 0}).encode()
    whole = s.post("/v1/chat/completions", body)[1]["choices"]
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    with s.socket() as c:
        c.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        for i in range(0, len(body), 7):
            c.sendall(b"%x\r\n%s\r\n" % (len(body[i:i + 7]), body[i:i + 7]))
        c.sendall(b"0\r\n\r\n" + GET)
        check(json.loads(read_answer(c)[1])["choices"] == whole and read_answer(c)[0] == 200, "a body in chunks")
    with s.socket() as c:
        c.sendall(head + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(body))
        check(c.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n\r\n"), "100 Continue")
        for i in range(len(body)):
            c.sendall(body[i:i + 1])
        check(json.loads(read_answer(c)[1])["choices"] == whole, "a body byte by byte")
    for request, status in ((b"\0\r\n\r\n", 400), (b"GET / HTTP/9\r\n\r\n", 505), (b"x" * 20000, 431),
                            (head + b"Content-Length: 99999999999\r\n\r\n", 413)):
        with s.socket() as c:
            c.sendall(request)
            check(read_answer(c)[0] == status and c.recv(1) == b"", "%r: %d" % (request[:40], status))
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        check(s.get("/v1/models", headers=headers)[0] == 403, "another site's page: %s" % headers)
    check(s.get("/v1/models", headers={"Origin": "http://localhost:1", "Host": "localhost:1"})[0] == 200, "our own page")
    with s.socket() as c:
        c.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        check(read_answer(c)[0] == 200 and c.recv(1) == b"", "HTTP/1.0 closes")


def test_mutants(s):
    """Requests with bytes changed: it goes on serving."""
    body = json.dumps({"messages": [{"role": "user", "content": "Hello \u00e9"}], "max_tokens": 1, "stop": ["a", "b"], "seed": 5})
    request = ("POST /v1/chat/completions?a=%%20 HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
               "Content-Length: %d\r\n\r\n%s" % (len(body), body)).encode()
    rand, answers = random.Random(7), 0
    for i in range(1000):
        m = bytearray(request)
        for _ in range(rand.randrange(1, 4)):
            at = rand.randrange(len(m))
            m[at:at + rand.randrange(3)] = bytes([rand.randrange(256)]) * rand.randrange(3)
        with s.socket() as c:
            try:
                c.sendall(m)
                c.shutdown(socket.SHUT_WR) if i % 2 else None
                c.settimeout(0.02)
                answers += c.recv(12).startswith(b"HTTP/1.1 ")
            except OSError:
                pass
    check(answers > 100 and s.p.poll() is None, "of 1000 mutated requests %d were answered" % answers)
    check(s.chat("Hello")[0] == 200, "and it goes on serving")


# ---- documents ----

QUESTION = "Who built the bridge?"


def ask_document(s, name, text=QUESTION, **fields):
    status, r = s.chat(text, document=name, **fields)
    check(status == 200, "asking %s: %s" % (name, r))
    usage = r["usage"]
    return r["choices"][0]["message"]["content"], usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]


def test_documents(folder):
    """A document is read once and kept; requests on it begin from its cache, also after a restart."""
    docs, cache = os.path.join(folder, "docs"), os.path.join(folder, "cli.kvc")
    town = os.path.join(folder, "town.txt")
    with open(town, "w", encoding="utf-8") as f:
        f.write(TEXT[:900])
    subprocess.run([RUN, "compress", MODEL, "-f", town, "-o", cache, "--ratio", "0.4", "-q", "-j", "1"], check=True)
    r = subprocess.run([RUN, "ask", MODEL, cache, QUESTION, "-n", "8", "--json", "-q", "-j", "1"], stdout=subprocess.PIPE, check=True)
    want = json.loads(r.stdout)["answer"]
    with Server("--docs", docs, "-c", "cli=" + cache) as s:
        text, cached, prompt = ask_document(s, "cli")
        check(text.strip() == want, "-c answers as `run ask` does: %r, not %r" % (text, want))
        status, doc = s.post("/v1/documents?name=town&ratio=0.4", TEXT[:900])
        check(status == 200 and doc["name"] == "town" and doc["tokens"] == cached, "a document is read: %s" % doc)
        check(0 < doc["bytes"] < doc["full_bytes"] and doc["seconds"] > 0 and doc["ratio"] == 0.4, "and compressed")
        check(os.listdir(docs) == ["town.kvc"] and doc["fit"] == "none", "and saved")
        fitted = os.path.join(folder, "fitted.kvc")
        subprocess.run([RUN, "compress", MODEL, "-f", town, "-o", fitted, "--ratio", "0.4", "--fit", "both", "-q", "-j", "1"], check=True)
        status, doc = s.post("/v1/documents?name=fitted&ratio=0.4&fit=both", TEXT[:900])
        check(status == 200 and doc["fit"] == "both" and doc["fit_s"] > 0, "a document is fitted: %s" % doc)
        same = subprocess.run(["cmp", fitted, os.path.join(docs, "fitted.kvc")], stdout=subprocess.DEVNULL).returncode == 0
        check(same, "to the bytes of run compress --fit both")
        status, error = s.post("/v1/documents?name=fitted&fit=much", TEXT[:900])
        check(status == 400 and error["error"]["param"] == "fit", "or refused by name: %s" % error)
        check(s.ask("DELETE", "/v1/documents/fitted")[0] == 200, "and deleted")
        check(ask_document(s, "town") == (text, cached, prompt), "it answers as the one of the command line")
        check(prompt > cached > 100, "the document's tokens are cached")
        chat = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": text}, {"role": "user", "content": "Why?"}]
        check(ask_document(s, "town", chat)[1] >= prompt, "a second question begins with the first")
        system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
        check(ask_document(s, "town", system)[2] > prompt, "a system text goes before the question")
        status, other = s.post("/v1/documents", {"name": "b.2_-", "text": TEXT[:300], "policy": "snapkv", "ratio": 1})
        check(status == 200 and other["policy"] == "snapkv" and other["bytes"] == other["full_bytes"], "from JSON: %s" % other)
        names = [d["name"] for d in s.get("/v1/documents")[1]["data"]]
        check(sorted(names) == ["b.2_-", "cli", "town"], "the list has them: %s" % names)
        check(s.get("/v1/documents/town")[1]["tokens"] == cached, "each can be seen")
        for body, path, param in ((TEXT[:50], "?name=a/b", "name"), (TEXT[:50], "?name=.a", "name"), ("", "?name=a", "text"),
                                  (b"\xff\xfe", "?name=a", "text"), ("a", "?name=a&ratio=0", "ratio"), ("a", "?name=a&ratio=x", "ratio"),
                                  ("a", "?name=a&policy=x", "policy"), ("a", "?name=a&kv=q2", "kv"), ("word " * 3000, "?name=a", "text"),
                                  ('{"text": "a"}', "", "name"), ('{"name": "a", "text": 5}', "", "text")):
            status, r = s.post("/v1/documents" + path, body)
            check(status == 400 and r["error"]["param"] == param, "%s: %s %s" % (path, status, r))
        check(s.ask("DELETE", "/v1/documents/b.2_-")[0] == 200 and os.listdir(docs) == ["town.kvc"], "DELETE ends it")
        check(s.ask("DELETE", "/v1/documents/b.2_-")[0] == 404 and s.chat("a", document="b.2_-")[0] == 404, "and it is gone")
        check(s.ask("DELETE", "/v1/documents/cli")[0] == 200 and os.path.exists(cache), "the file of -c stays")
    with open(os.path.join(docs, "broken.kvc"), "w") as f:
        f.write("no cache")
    with Server("--docs", docs) as s:
        check(until(lambda: s.get("/v1/documents/town")[1]["loaded"]), "after a restart it is loaded before anybody asks")
        check(ask_document(s, "town") == (text, cached, prompt), "and is still what it was")
        shutil.copy(cache, os.path.join(docs, "late.kvc"))
        check(ask_document(s, "late")[0] == text, "one that another process saved is found")
        check(s.chat("a", document="broken")[0] == 404, "a broken file is none")
    check("1 files are no saved caches" in s.err, "a broken file is named: %s" % s.err)


def kept_bits(page):
    """By layer and head what `run map` says of each token: the page's rows are heads, their cells layers."""
    bits = {}
    for layer, digits in re.findall(r"<td data-layer='(\d+)'[^>]*data-kept='([0-9a-f]*)'", page):
        g = sum(key[0] == int(layer) for key in bits)
        bits[int(layer), g] = [int(d, 16) >> i & 1 for d in digits for i in range(4)]
    return bits


def test_map(folder):
    """What stays of a document, as `run info` and `run map` have it."""
    docs, town, page = (os.path.join(folder, name) for name in ("maps", "part.txt", "map.html"))
    with open(town, "w", encoding="utf-8") as f:
        f.write(TEXT[:700] + " caf\u00e9 \u2603")
    how = ["-f", town, "--ratio", "0.4", "-q", "-j", "1"]
    caches = {"town": MODEL, "slides": os.path.join(FIXTURES, "gemma3.kvz")}
    for name, model in caches.items():
        subprocess.run([RUN, "compress", model, "-o", os.path.join(folder, name + ".kvc"), *how], check=True)
        subprocess.run([RUN, "map", model, "-o", page, *how], check=True)
        info = subprocess.run([RUN, "info", os.path.join(folder, name + ".kvc"), "--json"], stdout=subprocess.PIPE, check=True)
        info = json.loads(info.stdout)
        with open(page, encoding="utf-8") as f:
            bits = kept_bits(f.read())
        with Server("--docs", docs, model=model) as s:
            shutil.copy(os.path.join(folder, name + ".kvc"), docs)
            status, m, _ = s.get("/v1/documents/%s/map" % name)
            check(status == 200 and m["name"] == name and m["n_ctx"] == info["n_ctx"] and m["next"] is None, "a map: %s" % str(m)[:200])
            check(not s.get("/v1/documents/" + name)[1]["loaded"], "looking at a document does not load it")
            check(m["layers"] == sorted({l for l, g in bits}), "%s: layers that evict: %s" % (name, m["layers"]))
            check(m["kept_pairs"] == [info["kept_pairs"][l] for l in m["layers"]], "%s: pairs are those of `run info`" % name)
            check(abs(m["n_kept"] / m["n_pairs"] - info["kept"]) < 1e-6 and m["n_demoted"] == 0, "%s: and their share" % name)
            check(m["heads"] == len(bits) and m["kept"] == [sum(b[i] for b in bits.values()) for i in range(m["n_ctx"])],
                  "%s: tokens are kept by the heads of `run map`" % name)
            with open(town, encoding="utf-8") as f:
                check("".join(m["text"]) == f.read(), "%s: their texts are the document" % name)
            check(s.chat("a", document=name)[0] == 200 and s.get("/v1/documents/" + name)[1]["loaded"], "a question loads it")
            check(s.get("/v1/documents/%s/map" % name)[1] == m, "loaded it looks the same")
            layer, head = m["layers"][-1], m["kv_heads"] - 1
            for query, heads in (("layer=%d" % layer, [k for k in bits if k[0] == layer]), ("head=%d" % head, [k for k in bits if k[1] == head]),
                                 ("head=%d&layer=%d" % (head, layer), [(layer, head)])):
                part = s.get("/v1/documents/%s/map?%s" % (name, query))[1]
                check(part["kept"] == [sum(bits[k][i] for k in heads) for i in range(m["n_ctx"])] and part["heads"] == len(heads), query)
            kept, text, at = [], [], 0
            while at is not None:
                part = s.get("/v1/documents/%s/map?from=%d&tokens=100" % (name, at))[1]
                kept, text, at = kept + part["kept"], text + part["text"], part["next"]
            check(kept == m["kept"] and text == m["text"] and len(part["kept"]) <= 100, "in parts")
            for query, param in (("layer=99", "layer"), ("head=-1", "head"), ("from=x", "from"), ("tokens=0", "tokens"), ("tokens=99999", "tokens"),
                                 ("layer=%d" % min(set(range(99)) - set(m["layers"])), "layer")):
                status, r, _ = s.get("/v1/documents/%s/map?%s" % (name, query))
                check(status == 400 and r["error"]["param"] == param, "%s: %d %s" % (query, status, r))
            check(s.get("/v1/documents/%s/map?from=99999" % name)[1]["kept"] == [], "behind the end there is nothing")
            for path in ("nowhere/map", "/map", "map", "%s/map/map" % name, "map/" + name):
                check(s.get("/v1/documents/" + path)[0] == 404, "%s is not there" % path)
            check(s.ask("DELETE", "/v1/documents/%s/map" % name)[0] == 404, "a map cannot be deleted")
            shutil.copy(os.path.join(folder, name + ".kvc"), os.path.join(docs, "late.kvc"))
            check(s.get("/v1/documents/late")[0] == 200, "one more")
            with open(os.path.join(docs, "late.kvc"), "r+b") as f:
                f.truncate(1000)
            check(s.get("/v1/documents/late/map")[0] == 500, "a file that broke meanwhile says so")
        shutil.rmtree(docs)


def test_prompts(folder):
    """Long beginnings of prompts are kept compressed, by their ids; the oldest leave."""
    docs = os.path.join(folder, "prompts")
    body = [{"role": "system", "content": TEXT[:700]}, {"role": "user", "content": QUESTION}]
    with Server("--docs", docs, "--compress-prompts", 100) as s:
        first = s.chat(body)[1]
        files = os.listdir(docs)
        check(len(files) == 1 and files[0].startswith("prompt-"), "a long system text is kept: %s" % files)
        cached = first["usage"]["prompt_tokens_details"]["cached_tokens"]
        check(cached > 100, "and the answer begins from it")
        check(s.chat([{"role": "user", "content": "short"}])[0] == 200 and len(os.listdir(docs)) == 1, "a short prompt is not")
    size = os.path.getsize(os.path.join(docs, files[0]))
    with Server("--docs", docs, "--compress-prompts", 100, "--docs-size", int(2.9 * size)) as s:
        again = s.chat(body)[1]
        check(again["choices"] == first["choices"] and again["usage"] == first["usage"], "after a restart it is used")
        for i in range(3):
            check(s.chat("%d %s" % (i, TEXT[:700]))[0] == 200, "a long question")
        check(len(os.listdir(docs)) == 2 and files[0] not in os.listdir(docs), "those used longest ago leave: %s, %d" % ([(f, os.path.getsize(os.path.join(docs, f))) for f in os.listdir(docs)], size))
        status, r = s.post("/v1/documents?name=big&ratio=1", TEXT[:2500])
        check(status == 507 and "big.kvc" not in os.listdir(docs), "a document without room: %s %s" % (status, r))


def test_kill(folder):
    """kill -9 while documents are saved: each is whole afterwards or not there, and nothing else stays."""
    docs, rand, whole = os.path.join(folder, "killed"), random.Random(3), {}
    with Server("--docs", docs) as s:
        start = time.time()
        whole["first"] = s.post("/v1/documents?name=first&ratio=1", TEXT[:2000])[1]["file_bytes"]
        took = time.time() - start
    for i in range(20):
        name = ("first", "d%d" % i)[i % 2]  # an older one is replaced, or there is none
        with Server("--docs", docs) as s:
            path = "/v1/documents?name=%s&ratio=1" % name
            c = http.client.HTTPConnection("127.0.0.1", s.port, timeout=60)
            c.request("POST", path, TEXT[:2000].encode())
            time.sleep(took * rand.uniform(0.5, 1.1))
            s.stop(signal.SIGKILL)
            c.close()
    with Server("--docs", docs) as s:
        names = [d["name"] for d in s.get("/v1/documents")[1]["data"]]
        check("first" in names, "the older document is there")
        want = ask_document(s, "first")[0]
        check(all(ask_document(s, name)[0] == want for name in names), "those that are there answer: %s" % names)
        files = sorted(os.listdir(docs))
        check(files == sorted(name + ".kvc" for name in names), "nothing else stays: %s, %s" % (files, names))
        check(all(os.path.getsize(os.path.join(docs, name)) == whole["first"] for name in files), "all are whole")
    check("no saved caches" not in s.err, "none is broken: %s" % s.err)
    return len(names)


# ---- limits ----

LONG = {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 1900, "temperature": 0, "ignore_eos": True}


def begin(s, body=LONG, path="/v1/chat/completions"):
    """A stream that has begun, as a socket."""
    data = json.dumps(dict(body, stream=True)).encode()
    c = s.socket()
    c.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (path.encode(), len(data), data))
    return c


def until(what, seconds=30):
    """Whether it becomes true."""
    for _ in range(int(seconds / 0.05)):
        if what():
            return True
        time.sleep(0.05)
    return False


def busy(s):
    return sum(x["is_processing"] for x in s.get("/slots")[1])


def test_limits():
    with Server("--slots", 1, "--queue", 1) as s:
        with begin(s) as c:
            check(until(lambda: busy(s) == 1), "a stream takes the slot")
            check(c.recv(15) == b"HTTP/1.1 200 OK", "it has begun")
            with begin(s):
                check(until(lambda: s.chat("Hello")[0] == 503), "beyond slot and queue: 503")
                status, headers, data = s.ask("POST", "/v1/chat/completions", LONG)
                check(status == 503 and headers["retry-after"] == "1", "with Retry-After")
                check(json.loads(data)["error"]["code"] == "queue_full", "and why")
        check(until(lambda: busy(s) == 0), "clients that leave free their slots")
        check(s.chat("Hello")[0] == 200, "and others get them")
        with begin(s) as c:
            check(c.recv(15) == b"HTTP/1.1 200 OK", "a stream again")
            s.stop()
            rest = b""
            for piece in iter(lambda: c.recv(65536), b""):
                rest += piece
        check(b'"error": {"message": "the server is stopping"' in rest and rest.endswith(b"0\r\n\r\n"), "a cancelled stream says so")
        check(s.code == 0, "SIGTERM while it writes: exit %s" % s.code)


def test_company(folder):
    """Many at once get what each gets alone; a document that is being read does not hold them up."""
    prompts = ["%d %s" % (i, TEXT[60 * i:60 * i + 40 * (i + 1)]) for i in range(12)]
    with Server("--docs", os.path.join(folder, "company")) as s:
        alone = [s.chat(p, max_tokens=12)[1]["choices"] for p in prompts]
    with Server("--docs", os.path.join(folder, "company"), "--slots", 4) as s:
        together, document, answered = [None] * len(prompts), [], []

        def ask(i):
            together[i] = s.chat(prompts[i], max_tokens=12)[1]["choices"]
            answered.append(time.time())

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        reader = threading.Thread(target=lambda: document.append((s.post("/v1/documents?name=a", TEXT[:1800]), time.time())))
        reader.start()
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        reader.join()
        check(together == alone, "answers in company are those of one at a time")
        check(document[0][0][0] == 200 and min(answered) < document[0][1], "and come while a document is read")
        text = ask_document(s, "a")
    with Server("--docs", os.path.join(folder, "company")) as s:
        s.post("/v1/documents?name=b", TEXT[:1800])
        check(ask_document(s, "b") == text, "which is the same as one that is read alone")


def test_keys(folder):
    keys = os.path.join(folder, "keys")
    with open(keys, "w") as f:
        f.write("# ours\n\nsesame\n  open-up  \n")
    with Server("--api-key-file", keys, "--cors") as s:
        check(s.get("/health")[0] == 200, "health needs no key")
        check(s.ask("GET", "/")[0] == 200 and s.ask("HEAD", "/")[0] == 200, "nor does the page, which holds nothing")
        check(s.ask("GET", "/nowhere")[0] == 401 and s.ask("GET", "/props")[0] == 401, "all else does")
        for headers, status in (({}, 401), ({"Authorization": "Bearer sesame"}, 200), ({"x-api-key": "open-up"}, 200),
                                ({"Authorization": "Bearer sesam"}, 401), ({"Authorization": "Bearer sesamesesame"}, 401),
                                ({"x-api-key": ""}, 401), ({"Authorization": "sesame"}, 401), ({"x-api-key": "# ours"}, 401)):
            check(s.get("/v1/models", headers=headers)[0] == status, "%s: %d" % (headers, status))
        with s.socket() as c:
            c.sendall(b"POST /v1/documents HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\nabc")
            check(read_answer(c)[0] == 401, "a body is not waited for without a key")
        status, headers, data = s.ask("OPTIONS", "/v1/chat/completions", headers={"Origin": "http://x.example"})
        check(status == 204 and headers["access-control-allow-origin"] == "*" and data == b"", "CORS asks first")
        check("POST" in headers["access-control-allow-methods"] and "authorization" in headers["access-control-allow-headers"], "what")
        check("access-control-allow-origin" in s.ask("GET", "/v1/models")[1], "every answer may be read, errors too")


def test_usage(folder):
    empty = os.path.join(folder, "empty")
    open(empty, "w").close()
    for flags, what in ((["--host", "0.0.0.0"], "--api-key-file"), (["--api-key-file", empty], "no key"), (["-c", "town.kvc"], "NAME=CACHE"),
                        (["-c", "a=" + empty], "empty"), (["--compress-prompts", "100"], "--docs"), (["--port", "70000"], "--port"),
                        (["--mem", "1K"], "--mem")):
        p = subprocess.run([RUN, "serve", MODEL, "--port", "0", "-j", "1", *flags], stderr=subprocess.PIPE, timeout=60)
        check(p.returncode in (1, 2) and what in p.stderr.decode(), "%s: %d %s" % (flags, p.returncode, p.stderr))
    with Server() as s:
        p = subprocess.run([RUN, "serve", MODEL, "--port", str(s.port), "-j", "1"], stderr=subprocess.PIPE, timeout=60)
        check(p.returncode == 1 and str(s.port) in p.stderr.decode(), "a port that is taken: %s" % p.stderr)
    with Server("--mem", "6M") as s:
        status, r = s.chat("Hello", n=8, max_tokens=1900)
        check(status == 503 and "--mem" in r["error"]["message"] or status == 200, "what --mem has no room for: %s" % r)
        check(s.chat("Hello")[0] == 200, "what it has room for")


def test_docs(folder):
    """The examples of docs/serve.md."""
    with open(os.path.join(os.path.dirname(HERE), "docs", "serve.md"), encoding="utf-8") as f:
        blocks = re.findall(r"```sh\n(.*?)```", f.read(), re.S)
    check(len(blocks) == 6, "docs/serve.md has examples")
    if not shutil.which("curl"):
        return
    with open(os.path.join(folder, "town.txt"), "w", encoding="utf-8") as f:
        f.write(TEXT[:900])
    with Server("--docs", os.path.join(folder, "documents")) as s:
        for block in blocks:
            for command in re.split(r"\n(?=curl)", block.strip()):
                command = command.replace(":8080", ":%d" % s.port).replace("curl", "curl -f -S", 1)
                p = subprocess.run(command, shell=True, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
                check(p.returncode == 0 and p.stdout, "%s: %s" % (command, p.stderr))


def main():
    slow = []
    with Server() as s, s.socket() as c:
        c.sendall(GET[:20])  # and never the rest
        slow.append(time.time())
        for test in (test_models, test_page, test_chat, test_stop, test_refused, test_settings, test_completions, test_logprobs, test_tokens, test_anthropic,
                      test_connections, test_mutants):
            test(s)
        check(read_answer(c)[0] == 408 and 9 < time.time() - slow[0], "half a request is given up")
    with tempfile.TemporaryDirectory() as folder:
        test_documents(folder)
        test_map(folder)
        test_prompts(folder)
        test_kill(folder)
        test_company(folder)
        test_sharing()
        test_drafts()
        test_keys(folder)
        test_usage(folder)
        test_docs(folder)
    test_limits()
    check(s.code == 0, "SIGTERM: exit %s, %s" % (s.code, s.err))
    return end("test_serve")


if __name__ == "__main__":
    sys.exit(main())
