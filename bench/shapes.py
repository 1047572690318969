#!/usr/bin/env python3
"""shapes.py: GGUF files with random weights in the shapes of models that people run. Called by peer.sh.

usage: shapes.py SHAPE TYPE -o FILE     TYPE: q8_0 or q4_0

Speed and memory depend on shapes and types, not on what the numbers are: both programs read such a file as they would the
real one. Rows are scaled so that activations keep their size; norms are 1; the vocabulary is the bytes and names that no text has.
"""
import argparse
import math
import os
from typing import NamedTuple

import gguf
import numpy as np


class Shape(NamedTuple):
    """The published model's numbers."""
    arch: str
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    theta: float
    context: int

    @property
    def biases(self):
        return self.arch == "qwen2"


SHAPES = {
    "0.5b": Shape("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True, 1e6, 32768),       # Qwen2.5-0.5B
    "1b": Shape("llama", 2048, 8192, 16, 32, 8, 64, 128256, True, 5e5, 131072),       # Llama 3.2 1B
    "3b": Shape("llama", 3072, 8192, 28, 24, 8, 128, 128256, True, 5e5, 131072),      # Llama 3.2 3B
    "7b": Shape("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False, 1e6, 131072),    # Qwen2.5-7B
    "8b": Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256, False, 5e5, 131072),    # Llama 3.1 8B
}
GROUP = 32  # numbers that share a scale
TYPES = {  # bytes of a group, and the spread of its codes
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, 34, 73.9),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, 18, 4.6),
}


def tensors(s):
    """(name, rows, columns); a vector has no rows, and is 1 where it is a norm, else 0."""
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    yield "token_embd.weight", s.vocab, s.dim
    if not s.tied:
        yield "output.weight", s.vocab, s.dim
    yield "output_norm.weight", None, s.dim
    for l in range(s.layers):
        for name, rows, cols in (("attn_q", q, s.dim), ("attn_k", kv, s.dim), ("attn_v", kv, s.dim), ("attn_output", s.dim, q),
                                 ("ffn_gate", s.hidden, s.dim), ("ffn_up", s.hidden, s.dim), ("ffn_down", s.dim, s.hidden),
                                 ("attn_norm", None, s.dim), ("ffn_norm", None, s.dim)):
            yield f"blk.{l}.{name}.weight", rows, cols
        for name, n in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)) if s.biases else ():
            yield f"blk.{l}.{name}.bias", None, n


def tokens(s):
    """Bytes as GPT-2 writes them, one merge, and names."""
    known = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in known]
    chars = [chr(b) for b in known] + [chr(256 + i) for i in range(len(others))]
    words = [*chars, "\u0120a"]
    return words + [f"<|{i}|>" for i in range(s.vocab - len(words))], len(words)


def write(path, name, kind):
    s, (number, size, spread) = SHAPES[name], TYPES[kind]
    rng = np.random.default_rng(1)
    w = gguf.GGUFWriter(path, s.arch)
    w.add_name(f"random weights of the shape {name}")
    for add, value in ((w.add_embedding_length, s.dim), (w.add_feed_forward_length, s.hidden), (w.add_block_count, s.layers),
                       (w.add_head_count, s.heads), (w.add_head_count_kv, s.kv_heads), (w.add_key_length, s.head_dim),
                       (w.add_value_length, s.head_dim), (w.add_context_length, s.context), (w.add_rope_freq_base, s.theta),
                       (w.add_rope_dimension_count, s.head_dim), (w.add_layer_norm_rms_eps, 1e-5), (w.add_vocab_size, s.vocab)):
        add(value)
    words, n_words = tokens(s)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2" if s.arch == "qwen2" else "llama-bpe")
    w.add_token_list(words)
    w.add_token_types([gguf.TokenType.NORMAL] * n_words + [gguf.TokenType.CONTROL] * (s.vocab - n_words))
    w.add_token_merges(["\u0120 a"])
    w.add_bos_token_id(s.vocab - 2)
    w.add_eos_token_id(s.vocab - 1)
    for tensor, rows, cols in tensors(s):
        if rows is None:
            w.add_tensor_info(tensor, [cols], np.dtype(np.float32), cols * 4)
        else:
            row = cols // GROUP * size
            w.add_tensor_info(tensor, [rows, row], np.dtype(np.uint8), rows * row, raw_dtype=number)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    for tensor, rows, cols in tensors(s):
        if rows is None:
            w.write_tensor_data(np.full(cols, 1 if "norm" in tensor else 0, np.float32))
            continue
        groups = rng.integers(0, 256, (rows * cols // GROUP, size), dtype=np.uint8)
        scale = np.float16(1 / (spread * math.sqrt(cols)))
        groups[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
        w.write_tensor_data(groups.reshape(rows, -1))
    w.close()


def main():
    p = argparse.ArgumentParser(usage=__doc__)
    p.add_argument("shape", choices=SHAPES)
    p.add_argument("type", choices=TYPES)
    p.add_argument("-o", dest="out", required=True)
    a = p.parse_args()
    partial = a.out + ".tmp"
    write(partial, a.shape, a.type)
    os.replace(partial, a.out)


if __name__ == "__main__":
    main()
