#!/usr/bin/env python3
"""hostile.py: requests with something wrong, as nobody means them or somebody does, to `run serve` under the sanitizers.

usage: hostile.py RUN [REQUESTS [SEED]]

Each is a valid request with a few things changed: values, bytes, heads, lengths, chunks, several one behind the other, how and
how far it is sent. Every answer must be HTTP, none 500 (that is our fault), every body that is whole must be what its head
says; after every hundred a good request gets its answer, and at the end the server stops with status 0, which leaks and
reports of the sanitizers would change. With one seed the requests are the same.
"""
import json
import os
import random
import select
import socket
import struct
import sys
import tempfile
import time

RUN, REQUESTS, SEED = [*sys.argv[1:], *("./run", "300", "1")[len(sys.argv) - 1:]]
os.environ["RUN"] = os.path.abspath(RUN)

from checks import check, end
from test_serve import TEXT, Server

CHAT = {"model": "m", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
                                   {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Who?"}],
        "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "seed": 5, "stop": ["a", "b"], "n": 2, "logprobs": True,
        "top_logprobs": 2, "stream": True, "stream_options": {"include_usage": True}, "logit_bias": {"5": 1.5}, "repeat_penalty": 1.1,
        "repeat_last_n": 20, "frequency_penalty": 0.5, "presence_penalty": 0.5, "ignore_eos": False, "document": None, "user": "me"}
FORM = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "response_format": {"type": "json_schema", "json_schema": {
    "name": "x", "schema": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", None, 1.5]},
                                                             "c": {"type": "array", "items": {"$ref": "#/$defs/d"}, "maxItems": 2}},
                            "required": ["a"], "additionalProperties": False, "$defs": {"d": {"anyOf": [{"type": "string"}, {"const": [1]}]}}}}}}
BODIES = [  # method, path, body: JSON, a text or None
    ("POST", "/v1/chat/completions", CHAT), ("POST", "/v1/chat/completions", FORM),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "document": "town"}),
    ("POST", "/v1/completions", {"prompt": ["Hello there", "Who"], "max_tokens": 2, "echo": True, "logprobs": 2, "n": 1, "temperature": 0}),
    ("POST", "/v1/completions", {"prompt": [[1, 2, 3], [4, 5]], "max_tokens": 1, "stream": True}),
    ("POST", "/v1/messages", {"max_tokens": 2, "system": [{"type": "text", "text": "Be brief."}], "stop_sequences": ["a"], "stream": True,
                              "messages": [{"role": "user", "content": "Hello"}]}),
    ("POST", "/v1/messages/count_tokens", {"system": "Be brief.", "messages": [{"role": "user", "content": "Hello"}]}),
    ("POST", "/v1/documents?name=a%2Db&ratio=0.5&policy=knorm", TEXT[:120]),
    ("POST", "/v1/documents", {"name": "b", "text": TEXT[:90], "ratio": 0.5, "policy": "kvzip", "level": "pair", "kv": "f16"}),
    ("GET", "/v1/documents", None), ("GET", "/v1/documents/town", None), ("DELETE", "/v1/documents/b", None),
    ("POST", "/tokenize", {"content": "Hello there", "with_pieces": True, "add_special": True, "parse_special": False}),
    ("POST", "/detokenize", {"tokens": [1, 2, 3, 639]}), ("POST", "/apply-template", {"messages": [{"role": "user", "content": "Hello"}]}),
    ("GET", "/health", None), ("GET", "/v1/models/smol", None), ("GET", "/slots", None), ("GET", "/props", None), ("GET", "/metrics", None),
    ("GET", "/tokenizer_info", None), ("HEAD", "/health", None), ("OPTIONS", "/v1/models", None)]
GOOD = {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 4, "temperature": 0}
KNOWN = {200, 204, 400, 401, 403, 404, 405, 408, 413, 417, 431, 501, 503, 505, 507}


class Raw(str):
    """What stands in JSON as it is, right or wrong."""


def write(v):
    """JSON, but for what is Raw; bytes that are no UTF-8 as surrogates."""
    if isinstance(v, Raw):
        return str(v)
    if isinstance(v, dict):
        return "{" + ", ".join((k if isinstance(k, Raw) else json.dumps(k)) + ": " + write(x) for k, x in v.items()) + "}"
    if isinstance(v, list):
        return "[" + ", ".join(map(write, v)) + "]"
    return json.dumps(v)


def strange(rng):
    """A value that is seldom what is wanted."""
    n = rng.choice((1, 2, 31, 32, 33, 64, 1000, 20000))
    return rng.choice((
        None, True, False, 0, -1, 1, 2, 1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 53, 1 << 63, 10 ** 30, 0.1, -0.5, 1e300, [], {}, "", "a" * n,
        " " * n, "\0", "é\U0001f600" * n, Raw('"\\ud800"'), Raw('"\\u0000"'), Raw('"\udcff\udcfe"'), Raw('"\udced\udca0\udc80"'), Raw("1e999"),
        Raw("-1e999"), Raw("1e-999"), Raw("-0"), Raw("NaN"), Raw("Infinity"), Raw("01"), Raw("1."), Raw("'a'"), Raw("["), Raw("[" * n),
        Raw("[" * n + "]" * n), Raw('{"a":' * n + "1" + "}" * n), Raw("9" * n), Raw("0." + "3" * n), [[]] * n, [0] * n, ["a"] * n, [-1, 10 ** 9],
        {"type": "text"}, {"role": "user", "content": "a"}, {str(i): i for i in range(min(n, 2000))}, [{"role": "user", "content": "a"}] * min(n, 300),
        "json_schema", "auto", "town", "../town", "/etc/passwd", {"type": "array", "items": {"type": "array", "minItems": n}},
        {"$ref": "#"}, {"$ref": "#/$defs/d"}, {"enum": [1, "a", None, [1], {"a": 1}]}))


def places(v, found):
    """(container, key) of every value in v."""
    for key in list(v.keys()) if isinstance(v, dict) else range(len(v)) if isinstance(v, list) else ():
        found.append((v, key))
        places(v[key], found)
    return found


def change_values(body, rng):
    body = json.loads(json.dumps(body))
    for _ in range(rng.choice((1, 1, 2, 4))):
        v, key = rng.choice(places(body, []) or [(body, "a")])
        how = rng.randrange(6)
        if how == 0 and isinstance(v, dict):
            v.pop(key, None)
        elif how == 1 and isinstance(v, dict):
            v[Raw(json.dumps(key)) if rng.random() < 0.5 else rng.choice(list(CHAT) + ["tools", "grammar", "prompt"])] = strange(rng)
        elif how == 2 and isinstance(v, list):
            v += [v[key]] * rng.choice((1, 17, 300))
        else:
            v[key] = strange(rng)
    return write(body).encode("utf-8", "surrogateescape")


def change_bytes(data, rng):
    m = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(m) + 1)
        how = rng.randrange(5)
        if how == 0:
            m[at:at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            del m[at:at + rng.choice((1, 2, 10, 100))]
        elif how == 2:
            m[at:at] = bytes([rng.choice(b"\r\n\0 \t:;,\"{}[]\\%\xff\x80")]) * rng.choice((1, 2, 3, 40))
        elif how == 3:
            m[at:at] = m[at:at + rng.randrange(200)]
        else:
            m[at:at + 2] = b"\r\n"
    return bytes(m)


def chunks(body, rng):
    out, at = [], 0
    while at < len(body):
        n = rng.randrange(1, 1 + rng.choice((1, 8, 1000)))
        piece = body[at:at + n]
        size = len(piece) if rng.random() < 0.98 else rng.choice((0, 1, len(piece) + 1, 1 << 31, 1 << 64))
        out.append(b"%x%s\r\n%s\r\n" % (size, rng.choice((b"", b"", b";a=b", b" ", b";" * 300)), piece))
        at += n
    return b"".join(out) + b"0\r\n" + rng.choice((b"", b"", b"A: b\r\n", b"A" * 5000 + b"\r\n")) + b"\r\n"


def request(rng):
    """One request, with something wrong or without."""
    method, path, body = rng.choice(BODIES)
    if isinstance(body, dict):
        body = change_values(body, rng) if rng.random() < 0.7 else write(body).encode()
    elif body is not None:
        body = body.encode()
    lines = [b"%s %s HTTP/1.1" % (method.encode(), path.encode()), b"Host: localhost"]
    if rng.random() < 0.25:
        lines += [rng.choice((b"Host: localhost", b"Host: evil.example", b"Origin: http://evil.example", b"Connection: close", b"Content-Length: 5",
                              b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: 1, 1", b"Transfer-Encoding: gzip",
                              b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Expect: x", b"X: " + b"a" * rng.choice((10, 20000)),
                              b" folded", b"X : y", b"X:\0", b"\xff: y", b"Authorization: Bearer x", b"Accept-Encoding: gzip"))
                  for _ in range(rng.choice((1, 1, 2, 70)))]
    if body is not None and rng.random() < 0.3:
        lines.append(b"Transfer-Encoding: chunked")
        body = chunks(body, rng)
    elif body is not None:
        lines.append(b"Content-Length: %d" % (len(body) + rng.choice((0, 0, 0, 0, 0, 0, -1, 1, 100))))
    if rng.random() < 0.1:
        lines[0] = rng.choice((b"GET /", b"GET  / HTTP/1.1", b"GET / HTTP/1.9", b"GET / HTTP/2.0", b"PRI * HTTP/2.0", b"GET /%zz HTTP/1.1", b"\x16\x03\x01",
                               b"GET http://a/health HTTP/1.1", b"GET /v1/documents/%2e%2e%2fa HTTP/1.1", b"GET /" + b"a" * 20000 + b" HTTP/1.1",
                               b"POST /v1/documents?name=" + b"a" * 70 + b" HTTP/1.1", b"TRACE / HTTP/1.1", b"GET /health HTTP/1.0"))
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")


# ---- sending ----

def receive(c, seconds):
    """What comes within that time; whether it is all."""
    data, until = b"", time.time() + seconds
    while time.time() < until:
        if not select.select([c], [], [], max(0, until - time.time()))[0]:
            break
        piece = c.recv(65536)
        if not piece:
            return data, True
        data += piece
    return data, False


def judge(data):
    """Answers one behind the other: what is wrong with the first that is, or None."""
    while data:
        head, found, rest = data.partition(b"\r\n\r\n")
        if not data.startswith(b"HTTP/1.1 "[:len(data)]):
            return "no answer of HTTP: %r" % data[:80]
        if not found:
            return None
        lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        status = int(head[9:12])
        if status == 100:
            data = rest
            continue
        if status not in KNOWN:
            return "status %d: %r" % (status, rest[:200])
        if b"content-length" not in lines:
            return None  # a stream, or no body
        n = 0 if rest.startswith(b"HTTP/1.1 ") else int(lines[b"content-length"])  # HEAD has no body
        body, data = rest[:n], rest[n:]
        if len(body) < n:
            return None  # HEAD, or cut
        if n > 0 and lines[b"content-type"] == b"application/json":
            try:
                v = json.loads(body)
            except ValueError as e:
                return "%s: %r" % (e, body[:200])
            if status >= 400 and not v["error"]["message"]:
                return "an error without a message: %r" % body
    return None


def send(s, rng):
    """A request, or several, sent in some way. Returns what came."""
    data = b"".join(request(rng) for _ in range(rng.choice((1, 1, 1, 1, 2, 10))))
    if rng.random() < 0.4:
        data = change_bytes(data, rng)
    if rng.random() < 0.2:
        data = data[:rng.randrange(len(data) + 1)]
    with s.socket() as c:
        c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        how, got = rng.random(), b""
        try:
            if how < 0.1:  # slowly
                for at in range(0, min(len(data), 400), 8):
                    c.sendall(data[at:at + 8])
                    time.sleep(0.0005)
            elif how < 0.2:  # in pieces
                while data:
                    n = rng.randrange(1, 3000)
                    c.sendall(data[:n])
                    data = data[n:]
            else:
                c.sendall(data)
            if rng.random() < 0.5:
                c.shutdown(socket.SHUT_WR)
            got, _ = receive(c, rng.choice((0, 0.005, 0.05)))
            if rng.random() < 0.2:  # with a reset
                c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass  # refused while it was still being sent
    return got


def main():
    rng, answered = random.Random(int(SEED)), 0
    with tempfile.TemporaryDirectory() as folder, Server("--docs", folder, "--docs-size", 10 ** 7, "--compress-prompts", 40) as s:
        check(s.post("/v1/documents?name=town&ratio=0.5", TEXT[:300])[0] == 200, "a document")
        want = s.post("/v1/chat/completions", GOOD)[1]["choices"]
        for i in range(int(REQUESTS)):
            try:
                got = send(s, rng)
            except OSError as e:
                check(False, "request %d: %r" % (i, e))
                break
            answered += got.startswith(b"HTTP/1.1 ")
            wrong = judge(got)
            if wrong:
                check(False, "request %d: %s" % (i, wrong))
            if i % 100 == 99:
                status, r = s.post("/v1/chat/completions", GOOD)
                if not check_same(status, r, want, i):
                    break
    print("%s requests, %d answers" % (REQUESTS, answered))
    check(s.code == 0 and "ERROR: " not in s.err and "runtime error" not in s.err, "the end: status %s, %s" % (s.code, s.err[-3000:]))
    return end("hostile")


def check_same(status, r, want, i):
    ok = status == 200 and r["choices"] == want
    check(ok, "after %d requests a good one gets %s %s" % (i + 1, status, r))
    return ok


if __name__ == "__main__":
    sys.exit(main())
