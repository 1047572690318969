#!/usr/bin/env python3
"""Checkpoints of llama2.c: what export.py makes of them gives the ids and logits of llama2.c itself.

Both are written here: random weights in the three layouts, and a small reader of its own that does
what llama2.c's run.c does (neighbouring pairs rotate, the best pair of pieces is merged first).
"""

import os
import struct
import subprocess
import sys
import tempfile

import numpy as np
from checks import Tensors, check, end

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUN = os.path.join(ROOT, "run")
DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, SEQ = 32, 56, 3, 4, 2, 64
HEAD = DIM // HEADS
WORDS = "once upon a time there was a little dog and the dog had a big red ball é the cat saw it".split()


# ---- what llama2.c reads and does ----


def vocabulary():
    """[(bytes, score)]: three special tokens, 256 bytes, characters and the parts of some words."""
    tokens = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    tokens += [(b"<0x%02X>" % i, 0.0) for i in range(256)]
    parts = dict.fromkeys([" "] + sorted(set("".join(WORDS))))
    for word in WORDS:
        for n in range(2, len(word) + 2):
            parts.setdefault((" " + word)[:n])
    return tokens + [(p.encode(), -float(i)) for i, p in enumerate(parts)]


def encode(text, tokens):
    ids = {t: i for i, (t, _) in enumerate(tokens)}
    out = [1] + ([ids[b" "]] if text else [])
    for c in text:
        c = c.encode()
        out += [ids[c]] if c in ids else [b + 3 for b in c]
    while True:
        pairs = [(tokens[i][1], -at, i) for at in range(len(out) - 1)
                 if (i := ids.get(tokens[out[at]][0] + tokens[out[at + 1]][0])) is not None]
        if not pairs:
            return out
        _, at, i = max(pairs)
        out[-at:2 - at] = [i]


def weights(rng, vocab, tied):
    kv = KV_HEADS * HEAD
    shapes = dict(wq=(DIM, DIM), wk=(kv, DIM), wv=(kv, DIM), wo=(DIM, DIM), w1=(HIDDEN, DIM), w2=(DIM, HIDDEN),
                  w3=(HIDDEN, DIM))
    w = {n: rng.standard_normal((LAYERS, *s), np.float32) * 1.4 / np.sqrt(s[1]) for n, s in shapes.items()}
    w.update({n: 1 + rng.standard_normal((LAYERS, DIM), np.float32) / 5 for n in ("att", "ffn")},
             embed=rng.standard_normal((vocab, DIM), np.float32), norm=1 + rng.standard_normal(DIM, np.float32) / 5,
             out=None if tied else rng.standard_normal((vocab, DIM), np.float32) / 4)
    return {n: None if x is None else x.astype(np.float32) for n, x in w.items()}


def rmsnorm(x, w):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w


def rotated(x, heads):
    """[tokens][heads * HEAD], pairs of neighbours."""
    x = x.reshape(len(x), heads, HEAD // 2, 2)
    angle = np.arange(len(x))[:, None] / 10000.0 ** (np.arange(0, HEAD, 2) / HEAD)
    c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.stack([x[..., 0] * c - x[..., 1] * s, x[..., 0] * s + x[..., 1] * c], -1).reshape(len(x), heads, HEAD)


def logits(w, ids):
    w = {n: x if x is None else x.astype(np.float64) for n, x in w.items()}
    x, unseen = w["embed"][ids], np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for l in range(LAYERS):
        h = rmsnorm(x, w["att"][l])
        q, k = rotated(h @ w["wq"][l].T, HEADS), rotated(h @ w["wk"][l].T, KV_HEADS)
        v = (h @ w["wv"][l].T).reshape(len(ids), KV_HEADS, HEAD)
        k, v = (np.repeat(y, HEADS // KV_HEADS, 1) for y in (k, v))
        p = np.exp(np.einsum("ihd,jhd->hij", q, k) / np.sqrt(HEAD) + unseen)
        out = np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v)
        x = x + out.reshape(len(ids), DIM) @ w["wo"][l].T
        h = rmsnorm(x, w["ffn"][l])
        gate = h @ w["w1"][l].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][l].T)) @ w["w2"][l].T
    return rmsnorm(x, w["norm"]) @ (w["embed"] if w["out"] is None else w["out"]).T


# ---- its files ----


def numbers(vocab):
    return struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, vocab, SEQ)


def legacy(w, vocab):
    tables = np.zeros(SEQ * HEAD, np.float32)
    parts = [w[n] for n in ("embed", "att", "wq", "wk", "wv", "wo", "ffn", "w1", "w2", "w3", "norm")] + [tables]
    parts += [] if w["out"] is None else [w["out"]]
    return numbers(vocab if w["out"] is None else -vocab) + b"".join(p.tobytes() for p in parts)


def modern(w, vocab, group=0):
    """Versions 1 and 2; the weights become what version 2 holds of them."""
    head = b"24ka" + struct.pack("<i", 2 if group else 1) + numbers(vocab) + bytes([w["out"] is None])
    data = (head + struct.pack("<i", group)).ljust(256, b"\0")
    data += b"".join(w[n].tobytes() for n in ("att", "ffn", "norm"))
    for n in ("embed", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "out"):
        for x in ([] if w[n] is None else w[n] if w[n].ndim == 3 else [w[n]]):
            if group:
                g = x.reshape(-1, group)
                scale = (np.abs(g).max(-1) / 127).astype(np.float32)
                codes = np.rint(g / scale[:, None]).astype(np.int8)
                x[:] = (codes * scale[:, None]).reshape(x.shape)
                data += codes.tobytes() + scale.tobytes()
            else:
                data += x.tobytes()
    return data


def tokenizer(tokens):
    longest = max(len(t) for t, _ in tokens)
    return struct.pack("<i", longest) + b"".join(struct.pack("<fi", s, len(t)) + t for t, s in tokens)


# ---- comparing ----


def convert(source, *more):
    return subprocess.run([sys.executable, os.path.join(ROOT, "export.py"), source, "-o", source + ".kvz", *more],
                          capture_output=True, text=True)


def main():
    rng, tokens = np.random.default_rng(1), vocabulary()
    vocab = len(tokens)
    with tempfile.TemporaryDirectory() as folder:
        def put(name, data):
            with open(os.path.join(folder, name), "wb") as f:
                f.write(data)
            return os.path.join(folder, name)

        put("tokenizer.bin", tokenizer(tokens))
        for name, tied, group in (("legacy", True, None), ("untied", False, None), ("one", True, 0), ("one-untied", False, 0),
                                  ("two", True, 32), ("two-untied", False, 16)):
            w = weights(rng, vocab, tied)
            source = put(name + ".bin", legacy(w, vocab) if group is None else modern(w, vocab, group))
            p = convert(source, "--type", "f32")
            check(p.returncode == 0 and not p.stderr, f"{name}: {p.stderr}")
            check_model(name, source + ".kvz", w, tokens, folder)
        check_kept(put, w, vocab)
        check_refusals(put, folder, w, vocab, tokens)
    sys.exit(end("test_llama2c"))


def check_model(name, kvz, w, tokens, folder):
    for text in ("once upon a time", "the  dog, été <s>\n", " a red ball"):
        ids = encode(text, tokens)
        p = subprocess.run([RUN, "tokenize", kvz, "--bos", "-p", text], capture_output=True, text=True)
        check([int(i) for i in p.stdout.split()] == ids, f"{name}: ids of {text!r}: {p.stdout} {p.stderr} not {ids}")
        out = os.path.join(folder, "logits")
        with open(out + ".ids", "w") as f:
            f.write(" ".join(map(str, ids)))
        p = subprocess.run([RUN, "logits", kvz, "--ids", out + ".ids", "--kv", "f32", "-q", "-o", out], capture_output=True,
                           text=True)
        check(p.returncode == 0, f"{name}: {p.stderr}")
        theirs = logits(w, ids)
        ours = np.array(Tensors(out)["logits"]).reshape(theirs.shape)
        far = np.abs(ours - theirs).max() / np.abs(theirs).max()
        check(far < 1e-5, f"{name}: logits of {text!r} differ by {far}")


def check_kept(put, w, vocab):
    """Without --type weights stay what they are: f32, or q8 of codes."""
    for name, data, kind in (("kept1.bin", legacy(w, vocab), "F32"), ("kept2.bin", modern(w, vocab, 32), "I8")):
        source = put(name, data)
        p = convert(source)
        check(p.returncode == 0 and Tensors(source + ".kvz").dtype["layers.0.wq"] == kind, f"{name}: {p.stderr}")
        check(Tensors(source + ".kvz").meta["tokenizer.stop_ids"] == "1,2", f"{name}: stories end with BOS")


def check_refusals(put, folder, w, vocab, tokens):
    good, words = legacy(w, vocab), tokenizer(tokens)
    bad = os.path.join(folder, "other.bin")
    for what, data, vocabulary_bytes, word in (
            ("cut", good[:-4], words, "is cut"), ("longer", good + bytes(4), words, "expected"),
            ("version", b"24ka" + struct.pack("<i", 3) + bytes(300), words, "version 3"),
            ("group", modern(w, vocab, 16)[:37] + struct.pack("<i", 0) + modern(w, vocab, 16)[41:], words, "damaged"),
            ("codes", modern(w, vocab, 16)[:37] + struct.pack("<i", 7) + modern(w, vocab, 16)[41:], words, "groups of 7"),
            ("tokens", good, words[:-1], "damaged"), ("more tokens", good, words + bytes(9), "another model"),
            ("score", good, words[:4] + struct.pack("<f", np.nan) + words[8:], "token 0")):
        p = convert(put("bad.bin", data), "--tokenizer", put("other.bin", vocabulary_bytes))
        check(p.returncode == 1 and word in p.stderr and p.stderr.count("\n") == 1, f"{what}: {p.stderr}")
    os.unlink(os.path.join(folder, "tokenizer.bin"))
    p = convert(put("alone.bin", good))
    check(p.returncode == 1 and "tokenizer.bin is missing" in p.stderr, f"no tokenizer: {p.stderr}")
    check(convert(put("alone.bin", good), "--tokenizer", put("other.bin", words)).returncode == 0, "--tokenizer")
    p = convert(os.path.join(ROOT, "tests/fixtures/smol"), "--tokenizer", bad)
    check(p.returncode == 1 and "--tokenizer is for" in p.stderr, f"--tokenizer of a folder: {p.stderr}")


if __name__ == "__main__":
    main()
