#!/usr/bin/env python3
"""sizes.py: files of the sizes of real models and more, most of them holes. Part of `make trust`.

    python3 tests/sizes.py [RUN [long]]     RUN: a program built with the sanitizers

A model with a vocabulary of 262,144, rows of 8,192 and a trained length of 2^20, whose matrices are zeros that take no
disk; a million ids read in a stream (a tenth of them without `long`).
"""
import json
import os
import random
import struct
import subprocess
import sys
import tempfile

from checks import check, end

HERE = os.path.dirname(os.path.abspath(__file__))
RUN = sys.argv[1] if len(sys.argv) > 1 else os.path.join(HERE, "..", "run")
LONG = "long" in sys.argv[2:]
SMOL = os.path.join(HERE, "fixtures", "smol.kvz")
SIZES = {"F32": 4, "F16": 2, "I32": 4, "I8": 1, "U8": 1}


def run(*words):
    p = subprocess.run([RUN, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    check(p.returncode == 0 and b"Sanitizer" not in p.stderr and b"runtime error" not in p.stderr,
          "%s: %d %s" % (words[0], p.returncode, p.stderr.decode()[-300:]))
    return p.stdout.decode()


def read(path):
    with open(path, "rb") as f:
        n = struct.unpack("<Q", f.read(8))[0]
        header = json.loads(f.read(n))
        data = f.read()
    meta = header.pop("__metadata__")
    return meta, {k: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for k, t in header.items()
                  if not k.startswith("pad.")}


def write(path, meta, tensors):
    """tensors: name -> dtype, shape, bytes, which may be fewer than the shape says: the rest is a hole."""
    header, at, begins = {"__metadata__": meta}, 0, []
    for name, (dtype, shape, data) in tensors.items():
        n = SIZES[dtype]
        for size in shape:
            n *= size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + n]}
        begins.append((at, data))
        at += n
        if at % 64:
            header["pad.%d" % len(begins)] = {"dtype": "U8", "shape": [-at % 64], "data_offsets": [at, at + -at % 64]}
            at += -at % 64
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for begin, data in begins:
            f.seek(8 + len(text) + begin)
            f.write(data)
        f.truncate(8 + len(text) + at)


def large_model(path):
    """smol's tokenizer and two layers of Llama-70B's shape with Gemma's vocabulary, q8."""
    dim, hidden, heads, kv_heads, d, vocab = 8192, 28672, 64, 8, 128, 262144
    meta, small = read(SMOL)
    meta.update(dim=str(dim), hidden_dim=str(hidden), n_layers="2", n_heads=str(heads), n_kv_heads=str(kv_heads),
                head_dim=str(d), rotary_dim=str(d), vocab_size=str(vocab), seq_len=str(1 << 20))
    weights = ("layers.", "layer.", "rope.", "tok_embed", "rms_final", "wcls")
    tensors = {k: t for k, t in small.items() if not k.startswith(weights)}
    tensors["rope.inv_freq"] = ("F32", [1, d // 2], struct.pack("<f", 1) * (d // 2))
    tensors["rope.scale"] = ("F32", [1], struct.pack("<f", 1))
    tensors["layer.rope"] = ("I32", [2], bytes(8))
    tensors["layer.window"] = ("I32", [2], bytes(8))
    tensors["rms_final"] = ("F32", [dim], b"")

    def matrix(name, rows, cols):
        tensors[name] = ("I8", [rows // 16, cols // 4, 16, 4], b"")
        tensors[name + ".scale"] = ("F16", [rows // 16, cols // 32, 16], b"")

    matrix("tok_embed", vocab, dim)
    for layer in ("layers.0.", "layers.1."):
        for name, rows, cols in (("wq", heads * d, dim), ("wk", kv_heads * d, dim), ("wv", kv_heads * d, dim),
                                 ("wo", dim, heads * d), ("w1", hidden, dim), ("w3", hidden, dim), ("w2", dim, hidden)):
            matrix(layer + name, rows, cols)
        tensors[layer + "rms_att"] = tensors[layer + "rms_ffn"] = ("F32", [dim], b"")
    write(path, meta, tensors)


def main():
    with tempfile.TemporaryDirectory() as folder:
        model, ids, out = (os.path.join(folder, name) for name in ("large.kvz", "ids", "out"))
        large_model(model)
        facts = json.loads(run("info", model, "--json"))
        check(facts["file"] > 3 << 30, "info says %s bytes" % facts["file"])
        run("tokenize", model, "-p", "The mill")
        run("generate", model, "-p", "a", "-n", "1", "--temp", "0")
        rng = random.Random(1)
        n = 1000000 if LONG else 100000
        with open(ids, "w") as f:
            f.write(" ".join(str(rng.randrange(10, 300)) for _ in range(n)))
        row = json.loads(run("compress", SMOL, "--ids", ids, "-o", out, "--budget", "64", "--window", "0", "--json"))
        check(row["n_ctx"] == n and row["peak_bytes"] < row["full_bytes"] / 20, "%d ids: %s" % (n, row))
        run("ask", SMOL, out, "Who?", "-n", "1")
    sys.exit(end("sizes"))


if __name__ == "__main__":
    main()
