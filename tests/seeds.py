"""seeds.py: valid inputs that the fuzz targets start from, made of the repository's fixtures.

usage: seeds.py RUN FOLDER

FOLDER gets a folder for each target of tests/fuzz_*.c, whose first comment says what its input is. RUN is the program.
"""
import json
import os
import random
import subprocess
import sys

from mutate import FIXTURES, ROOT, TEXT, read_container, tasks_text, write_container

PIECES = ["chat." + name for name in (
    "begin", "default_system", "system_prefix", "system_suffix", "user_prefix", "user_suffix", "user_prefix_after_system",
    "assistant_prefix", "assistant_suffix", "generation", "system_refused")] + ["kvzip.prefix", "kvzip.postfix"]
TEXTS = [TEXT[:100], "Él sang 12,345 lieder\r\n\tdans l’été — 東京、ａ\u0301 ﬁ\n\n  x", "<|im_start|>user\n</s><bos>[INST]",
         "def f(x):\n    return x ** 2  # 42\n", "\u1100\u1161\u11a8 \u2581\u00a0\u3000 \U0001f468\u200d\U0001f469"]


def read(*names):
    with open(os.path.join(ROOT, *names), "rb") as f:
        return f.read()


def fixture(name):
    return os.path.join(FIXTURES, name + ".kvz")


def works(*args):
    return subprocess.run(args, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=300).stdout


def changes(rng):
    """A few places and values (fuzz.h)."""
    return bytes(rng.randrange(256) for _ in range(4 * rng.choice([1, 2, 4])))


def documents():
    """JSON: headers, settings, lines."""
    header = json.dumps(read_container(read("tests", "fixtures", "smol-q4.kvz"))[0]).encode()
    odd = b'{"a": [1, -2.5e-3, true, null, "\\u00e9\\n\\ud83d\\ude00"], "b": {"c": [[], {}]}}'
    return [header, odd, read("tests", "fixtures", "smol", "config.json")] + tasks_text("f1", "exact").splitlines()


def containers():
    return [write_container({"format": "x", "n": str(n)}, [[name, dtype, shape, bytearray(64 * n)]])
            for n, name, dtype, shape in ((1, "tok_embed", "F32", [4, 4]), (2, "k", "F16", [2, 4, 8]), (3, "len", "U8", [192]))]


def results(run, folder):
    """Two shards, alone and beside each other."""
    tasks, shards = os.path.join(folder, "tasks.jsonl"), []
    with open(tasks, "wb") as f:
        f.write(tasks_text("contained", "choice"))
    for shard in ("1/2", "2/2"):
        path = os.path.join(folder, "shard" + shard[0])
        if os.path.exists(path):
            os.remove(path)
        works(run, "eval", fixture("smol-q8"), tasks, "--ratio", "1,0.5", "--shard", shard, "-o", path, "-q")
        shards.append(read(path))
    return shards + [shards[0] + b"\0" + shards[1], shards[0] + b"\0" + shards[0]]


def templates():
    for family, name in enumerate(("smol", "qwen3", "mistral")):
        meta = read_container(read("tests", "fixtures", name + ".kvz"))[0]
        words = [meta.get(key, "") for key in PIECES] + ["Be short.", "Who kept <|im_end|> geese?", "It was"]
        for how in (0, 1, 6, 8, 16, 32):
            yield bytes([family, how]) + "\0".join(words).encode() + b"\0"


def requests():
    head = b" /v1/documents?name=x+y&a=%41%2f HTTP/1.1\r\nHost: a\r\n"
    known = b"POST" + head + b"Content-Length: 5\r\nExpect: 100-continue\r\nX-Api-Key: \t k \r\n\r\nhello"
    chunked = b"POST" + head + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0003;a=\"b\"\r\nabc\r\n0\r\nA: b\r\n\r\n"
    old = b"GET http://a/ HTTP/1.0\r\nConnection: x, keep-alive\r\n\r\n"
    for how, text in enumerate((known, chunked, old, known + chunked + old + known, chunked * 3, b"\r\n" + old + b"GET / HTTP/1.1\r\n\r\n",
                                known.replace(b"5", b"5000"), b"OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nGET")):
        yield bytes([how]) + text


def lines():
    questions = read("demo", "questions.tsv")[:300]
    pasted = b"\x1b[200~first\nsecond\x1b[201~\nthird\n"
    for text in (questions, b"\xef\xbb\xbfWho?\tIt was\r\nWhen?", pasted, b"a\rb\n", b"\xff\xfeW\0\n"):
        for how in (2, 70, 130):
            yield bytes([how]) + text


def all_seeds(run, folder):
    rng = random.Random(1)
    ids = [works(run, "tokenize", fixture(name), "-p", TEXT[:80]) for name in ("smol", "llama", "gemma3")]
    some = [changes(rng) for _ in range(8)]
    return {"json": documents(), "http": requests(), "tensors": containers(), "model": [b""] + some, "tasks": [tasks_text("contained", "exact", "f1"),
            tasks_text("choice")], "tokenizer": [bytes([family | flags]) + text.encode() for family in range(6)
                                                 for flags in (0, 64, 192) for text in TEXTS] + [b"\6abcd" * 9, b"\7" + b"abcd" * 9],
            "cache": [bytes([i]) + part for i in range(3) for part in [b""] + some], "profile": [b"\x1d" + part for part in [b""] + some],
            "results": results(run, folder), "ids": [bytes([i]) + text for i, text in enumerate(ids)],
            "lines": lines(), "chat": templates()}


def main():
    run, folder = os.path.abspath(sys.argv[1]), sys.argv[2]
    os.makedirs(folder, exist_ok=True)
    for target, seeds in all_seeds(run, folder).items():
        os.makedirs(os.path.join(folder, target), exist_ok=True)
        for i, seed in enumerate(seeds):
            with open(os.path.join(folder, target, "%03d" % i), "wb") as f:
                f.write(seed)


if __name__ == "__main__":
    main()
