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
    keys: dict = {}  # what else the kind's metadata say

SHAPES = {
    "0.5b": Shape("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True, 1e6, 32768),       # Qwen2.5-0.5B
    "1b": Shape("llama", 2048, 8192, 16, 32, 8, 64, 128256, True, 5e5, 131072),       # Llama 3.2 1B
    "3b": Shape("llama", 3072, 8192, 28, 24, 8, 128, 128256, True, 5e5, 131072),      # Llama 3.2 3B
    "7b": Shape("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False, 1e6, 131072),    # Qwen2.5-7B
    "8b": Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256, False, 5e5, 131072),    # Llama 3.1 8B
    "qwen3.5-2b": Shape("qwen35", 2048, 6144, 24, 8, 2, 256, 248320, True, 1e7, 262144, {
        "rope.dimension_count": 64, "rope.dimension_sections": [11, 11, 10, 0], "full_attention_interval": 4,
        "ssm.conv_kernel": 4, "ssm.state_size": 128, "ssm.group_count": 16, "ssm.time_step_rank": 16,
        "ssm.inner_size": 2048}),
    "gemma4-e2b": Shape("gemma4", 1536, [6144] * 15 + [12288] * 20, 35, 8, 1, 512, 262144, True, 1e6, 131072, {
        "rope.freq_base_swa": 1e4, "rope.dimension_count_swa": 256, "attention.sliding_window": 512,
        "attention.sliding_window_pattern": [l % 5 != 4 for l in range(35)], "attention.shared_kv_layers": 20,
        "attention.key_length_swa": 256, "attention.value_length_swa": 256, "final_logit_softcapping": 30.0,
        "embedding_length_per_layer_input": 256}),
}
GROUP = 32  # numbers that share a scale
TYPES = {  # bytes of a group, and the spread of its codes
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, 34, 73.9),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, 18, 4.6),
}


def attention(s, head_dim, gates=1, caches=True):
    q, kv = s.heads * head_dim, s.kv_heads * head_dim
    yield "attn_q.weight", q * gates, s.dim
    if caches:
        yield "attn_k.weight", kv, s.dim
        yield "attn_v.weight", kv, s.dim
    yield "attn_output.weight", s.dim, q


def plain_layer(s, _):
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    yield from attention(s, s.head_dim)
    yield "ffn_norm.weight", None, s.dim
    for name, n in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)) if s.arch == "qwen2" else ():
        yield f"{name}.bias", None, n


def qwen35_layer(s, l):
    """Three layers of a gated delta net to one of gated attention."""
    n = s.keys["ssm.inner_size"]
    yield "post_attention_norm.weight", None, s.dim
    if (l + 1) % s.keys["full_attention_interval"] == 0:
        yield from attention(s, s.head_dim, gates=2)
        yield from ((f"attn_{x}_norm.weight", None, s.head_dim) for x in "qk")
        return
    heads, channels = s.keys["ssm.time_step_rank"], 3 * n  # as many of keys as of values
    yield from (("attn_qkv.weight", channels, s.dim), ("attn_gate.weight", n, s.dim), ("ssm_out.weight", s.dim, n),
                ("ssm_alpha.weight", heads, s.dim), ("ssm_beta.weight", heads, s.dim),
                ("ssm_conv1d.weight", None, (channels, s.keys["ssm.conv_kernel"])), ("ssm_dt.bias", None, heads),
                ("ssm_a", None, heads), ("ssm_norm.weight", None, s.keys["ssm.state_size"]))


def gemma4_layer(s, l):
    """Windows and full attention, the last layers on the caches of others, an embedding for each layer."""
    slides, own = s.keys["attention.sliding_window_pattern"][l], l < s.layers - s.keys["attention.shared_kv_layers"]
    head_dim, embed = s.keys["attention.key_length_swa"] if slides else s.head_dim, s.keys["embedding_length_per_layer_input"]
    yield from attention(s, head_dim, caches=own)
    for name, n in (("attn_q_norm", head_dim), ("post_attention_norm", s.dim), ("ffn_norm", s.dim), ("post_ffw_norm", s.dim),
                    ("post_norm", s.dim), ("layer_output_scale", 1)) + ((("attn_k_norm", head_dim),) if own else ()):
        yield f"{name}.weight", None, n
    yield "inp_gate.weight", embed, s.dim
    yield "proj.weight", s.dim, embed


LAYERS = {"qwen35": qwen35_layer, "gemma4": gemma4_layer}  # of other kinds: plain_layer


def tensors(s):
    """(name, rows, columns) of a matrix, or (name, None, its shape) of what stays in f32."""
    yield "token_embd.weight", s.vocab, s.dim
    if not s.tied:
        yield "output.weight", s.vocab, s.dim
    yield "output_norm.weight", None, s.dim
    if s.arch == "gemma4":
        all_layers = s.layers * s.keys["embedding_length_per_layer_input"]
        yield "per_layer_token_embd.weight", s.vocab, all_layers
        yield "per_layer_model_proj.weight", all_layers, s.dim
        yield "per_layer_proj_norm.weight", None, s.keys["embedding_length_per_layer_input"]
        yield "rope_freqs.weight", None, s.head_dim // 2
    for l in range(s.layers):
        hidden = s.hidden[l] if isinstance(s.hidden, list) else s.hidden
        for name, rows, cols in (("attn_norm.weight", None, s.dim), ("ffn_gate.weight", hidden, s.dim),
                                 ("ffn_up.weight", hidden, s.dim), ("ffn_down.weight", s.dim, hidden),
                                 *LAYERS.get(s.arch, plain_layer)(s, l)):
            yield f"blk.{l}.{name}", rows, cols


def numbers(name, shape):
    """What an f32 tensor holds: a norm's or scale's 1, a bias of 0, a decay, what a convolution adds up."""
    if name.endswith("rope_freqs.weight"):  # three quarters of the channels do not turn
        return np.where(np.arange(shape) < shape // 4, 1, 1e30).astype(np.float32)
    value = -1 if name.endswith("ssm_a") else 0 if name.endswith("bias") else 0.5 if "conv1d" in name else 1
    return np.full(shape, value, np.float32)


def tokens(s):
    """Bytes as GPT-2 writes them, one merge, and names."""
    known = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in known]
    chars = [chr(b) for b in known] + [chr(256 + i) for i in range(len(others))]
    words = [*chars, "\u0120a"]
    return words + [f"<|{i}|>" for i in range(s.vocab - len(words))], len(words)


PRE = {"qwen2": "qwen2", "qwen35": "qwen35"}


def write(path, name, kind):
    s, (number, size, spread) = SHAPES[name], TYPES[kind]
    rng = np.random.default_rng(1)
    w = gguf.GGUFWriter(path, s.arch)
    w.add_name(f"random weights of the shape {name}")
    for add, value in ((w.add_embedding_length, s.dim), (w.add_feed_forward_length, s.hidden), (w.add_block_count, s.layers),
                       (w.add_head_count, s.heads), (w.add_head_count_kv, s.kv_heads), (w.add_key_length, s.head_dim),
                       (w.add_value_length, s.head_dim), (w.add_context_length, s.context), (w.add_rope_freq_base, s.theta),
                       (w.add_layer_norm_rms_eps, 1e-5), (w.add_vocab_size, s.vocab)):
        add(value)
    for key, value in {"rope.dimension_count": s.head_dim, **s.keys}.items():
        add = w.add_array if isinstance(value, list) else w.add_float32 if isinstance(value, float) else w.add_uint32
        add(f"{s.arch}.{key}", value)
    words, n_words = tokens(s)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(PRE.get(s.arch, "llama-bpe"))
    w.add_token_list(words)
    w.add_token_types([gguf.TokenType.NORMAL] * n_words + [gguf.TokenType.CONTROL] * (s.vocab - n_words))
    w.add_token_merges(["\u0120 a"])
    w.add_bos_token_id(s.vocab - 2)
    w.add_eos_token_id(s.vocab - 1)
    for tensor, rows, cols in tensors(s):
        if rows is None:
            x = numbers(tensor, cols)
            w.add_tensor_info(tensor, x.shape, x.dtype, x.nbytes)
        else:
            row = cols // GROUP * size
            w.add_tensor_info(tensor, [rows, row], np.dtype(np.uint8), rows * row, raw_dtype=number)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    for tensor, rows, cols in tensors(s):
        if rows is None:
            w.write_tensor_data(numbers(tensor, cols))
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
