#!/usr/bin/env python3
"""Convert a Hugging Face directory, a GGUF file or a checkpoint of llama2.c into the one file that
./run maps.

    export.py MODEL -o OUT [--type f32|bf16|f16|q8|q4]

This is the only place that knows model families by name. What it writes is a safetensors file
whose tensors start on 64-byte boundaries (U8 tensors "pad.N" fill the gaps), so that it can be
used in place, and whose "__metadata__" strings say everything else.

metadata                 value
  format                 "kvzip.c model 1"
  name, source, type     for people: the model's name, what it was made from, --type
  fingerprint            sha256 over the tensors and the metadata that change results (all but the
                         three above, chat.* and kvzip.*); caches and profiles carry it
  dim hidden_dim n_layers n_heads n_kv_heads head_dim vocab_size (rows of the embedding)
  seq_len                longest sequence of the training
  rotary_dim             leading dimensions of a head that rotate, in halves (i, i + rotary_dim/2)
  window_kv_heads window_head_dim   those of layers with a window, where they are others
  embed_dim table_scale mix_scale   of embeddings that each layer has of its own, if any: their
                         length, factors of the table and of what they take of the embedding
  norm_eps attn_scale embed_scale attn_softcap final_softcap (0: no cap)
  act                    "silu" or "gelu_tanh"
  n_experts n_used expert_dim shared_dim norm_topk   where layers have experts: how many, how many a
                         token uses, their width, that of the one all tokens use (0: none), whether
                         the weights of those used sum to 1
  swiglu_alpha swiglu_limit   where experts clamp: (up + 1) gate sigmoid(alpha gate), with gate at
                         most the limit and up within it
  dense_beside           1: layers with experts have a dense MLP beside them
  delta_k_heads delta_v_heads delta_k_dim delta_v_dim delta_conv   where layers keep a state: heads
                         and their lengths, tokens that the convolution sees
  delta_tiled            1: value head h reads key head h % delta_k_heads, not one of a row of them
  route_input            1: the sigmoid of the router's number weighs what an expert reads, and
                         nothing what it gives
  window_chunks          1: windows are chunks, a token sees those of its own one
  att_gate               1: what attention gives is gated (layers.N.wg)
  query_growth query_step query_first   where queries grow with their position: by a factor of
                         1 + growth * log(1 + floor((position + first) / step))
  rope_theta             for people; rope.inv_freq is what counts
  tokenizer.model        "bpe" (byte level) or "spm" (SentencePiece style, a space is U+2581)
  tokenizer.split        how text is cut before merging: "gpt2", "digits+gpt2", "llama3", "qwen2",
                         "qwen35", "o200k", "tekken", "words" (at spaces) or "none" (spm)
  tokenizer.nfc          1: text is brought into NFC first
  tokenizer.ignore_merges  1: a whole piece that is a token needs no merges
  tokenizer.add_bos, tokenizer.bos_id (-1: none), tokenizer.unk_id (-1: none)
  tokenizer.space_prefix 1: a space is put before each stretch of text, 2: only before the first,
                         and only if it does not begin with one, 3: before each that does not
  tokenizer.strip        what a decoded text loses: 0 nothing, 1 a leading space, 2 all spaces of its
                         first token; absent: 1 if space_prefix is not 0
  tokenizer.fuse_unk     1: unknown characters in a row are one token; absent: as in spm
  tokenizer.byte_fallback  1: characters without a token become byte tokens
  tokenizer.stop_ids     "1,2": any of them ends an answer
  chat.present           1: the pieces below come from a chat template (struct ChatTemplate)
  chat.begin chat.default_system chat.system_prefix chat.system_suffix chat.user_prefix
  chat.user_suffix chat.user_prefix_after_system chat.assistant_prefix chat.assistant_suffix
  chat.generation chat.trim (chat.trim_system: where it differs)
  chat.system_refused    why the template takes no system text; absent where it does
  chat.tools             1: the template shows tools, in these pieces (struct ToolForm): chat.tools_begin
                         chat.tools_system_prefix chat.tools_system_suffix chat.tools_separator
                         chat.tools_end chat.call_marker chat.call_begin chat.call_middle chat.call_end
                         chat.call_separator chat.call_name chat.call_arguments chat.result_begin
                         chat.result_separator chat.result_end, and where they hold, chat.tools_indent
                         (blanks), chat.tools_bare (the function alone), chat.call_text (what stands
                         between a text and a call), chat.call_one, chat.result_json
  chat.tools_refused     why the template's tools are left out; absent where it has none
  kvzip.prefix kvzip.postfix   what precedes a context, and the turn change after a request, as the
                         authors of KVzip (arXiv 2505.23416) write them

tensor                   dtype and shape
  rope.inv_freq          F32 [n_ropes][rotary_dim/2], after any scaling
  rope.dims              I32 [n_ropes], rotary_dim of each where they differ; the longest one's
                         inv_freq gives the rows
  rope.scale             F32 [n_ropes], multiplies cos and sin (yarn)
  layer.rope             I32 [n_layers], which of them; -1: the layer does not rotate
  layer.window           I32 [n_layers], tokens a token sees, itself included; 0: all, -1: none, the
                         layer keeps a state
  layer.owner            I32 [n_layers], whose keys and values a layer reads; absent: its own
  layer.query_grows      I32 [n_layers], 1 where queries grow; absent: in all, if in any
  layer.hidden           I32 [n_layers], rows of w1 and w3; absent: hidden_dim
  layer.sinks            F32 [n_layers][n_heads], a logit that takes part in a head's softmax; absent:
                         none does
  rms_final              F32 [dim]
  layers.N.rms_att, .rms_ffn             F32 [dim], norms before attention and MLP
  layers.N.rms_att_post, .rms_ffn_post   F32 [dim], norms of what they add (Gemma), or absent
  layers.N.q_norm, .k_norm, .v_norm      F32 [head_dim], or absent
  layers.N.scale                         F32 [1], multiplies what the layer gives, or absent
  layers.N.bq, .bk, .bv, .bo             F32 [rows of wq, wk, wv, wo], or absent
  tok_embed, wcls        matrices [vocab_size] x [dim]; no wcls: it is tok_embed
  layers.N.wq .wk .wv .wo .w1 .w2 .w3    matrices; w1 gate, w2 down, w3 up; no wk and wv where another
                         layer's keys are read; no wv where values are the keys before their norm
  layers.N.wg            matrix [rows of wq] x [dim], or absent
  layers.N.delta.qkv .z .a .b .out   matrices of a layer that keeps a state, which has no wq, wk, wv,
                         wo; .conv F32 [delta_conv][rows of qkv], .decay .dt F32 [delta_v_heads],
                         .norm F32 [delta_v_dim]
  layers.N.router        matrix [n_experts] x [dim]; such a layer has instead of w1, w2, w3 (or with
                         dense_beside, in addition)
  layers.N.experts.w1 .w2 .w3   stacks: the experts' matrices one after the other, each in panels of
                         its own, so that rows are n_experts times those of one, rounded up to 16
  layers.N.router_bias, .experts.b1 .b2 .b3   F32 [n_experts], and [n_experts times a bias], of experts
                         that clamp, or absent
  layers.N.shared.w1 .w2 .w3, .shared_scale   of the expert all tokens use, and F32 [dim], or absent
  layers.N.rms_router, .rms_experts      F32 [dim], norms before router and experts that have a dense
                         MLP beside them; .rms_dense_post, .rms_experts_post F32 [dim], of what both
                         give; .experts.scale F32 [n_experts], factors of the experts' weights
  embed_table            matrix [16 vocab_size] x [n_layers * embed_dim / 16]: a panel is a token's
                         embeddings of all layers; rms_embed F32 [embed_dim]
  layers.N.embed.gate, .mix, .up         matrices [embed_dim] x [dim] and [dim] x [embed_dim];
  layers.N.rms_embed                     F32 [dim]
  tok.bytes              U8 [total], what each id prints; tok.offsets I32 [n+1] cuts it
  tok.kind               U8 [n]: 0 normal, 1 special, 2 found in any text, 3 a single byte, 4 unused
  tok.flags              U8 [n], or absent: bits of added tokens, 1 found in the normalized text, 2
                         takes the white space before it, 4 that behind it
  tok.merges             I32 [m][3]: left id, right id, result id, best first

A matrix lies in panels of 16 rows, in which a 64-byte line holds 4 bytes of each row, k columns:
[rows/16][cols/k][16][k]. Rows are padded to 16, columns to k (q8 and q4: to 32), with zeros.
  type   dtype   k   shape of the tensor
  f32    F32     1   [rows/16][cols][16][1]
  f16    F16     2   [rows/16][cols/2][16][2]
  bf16   BF16    2   [rows/16][cols/2][16][2]
  q8     I8      4   [rows/16][cols/4][16][4], w = scale * q
  q4     U8      8   [rows/16][cols/8][16][4]; byte b: column b in the low half, 4 + b in the high;
                     w = scale * nibble + offset, or scale * (nibble - 8) without offsets
with NAME.scale F16 [rows/16][cols/32][16] for q8 and q4, and NAME.offset of the same shape.

Chapters: 1 sources  2 families  3 rope  4 panels  5 tokenizers  6 chat templates  7 the file
"""

import signal

if __name__ == "__main__":  # until main() can say so in a line, Ctrl-C is silent
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
import binascii
import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import math
import os
import re
import stat
import struct
import sys
import unicodedata
from typing import Callable, NamedTuple

try:
    import numpy as np
except ImportError as e:
    sys.exit(f"export.py: {e}; pip install -r requirements.txt")

FORMAT = "kvzip.c model 1"
PANEL, GROUP, ALIGN = 16, 32, 64
SLICE = 1 << 22  # weights held in memory at a time
MAX_HEADER = 100_000_000
MOST = 1 << 24  # the largest size in a file that C reads
MAX_EXPERTS = 1024
STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class Refusal(Exception):
    """Why this cannot be converted, in one sentence; path: the file at fault, if it is not the
    model."""

    def __init__(self, text, path=None):
        super().__init__(text)
        self.path = path


def printable(text):
    """Foreign text on one line that no terminal obeys."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def warn(text):
    if sys.stderr is not None:  # descriptor 2 may have been closed
        print(f"export.py: warning: {printable(text)}", file=sys.stderr)


@contextlib.contextmanager
def within(what):
    """The last line of defence: what nobody expected there is a refusal that names the place."""
    try:
        yield
    except (Refusal, OSError, ImportError):
        raise
    except Exception as e:
        raise Refusal(f"{what}: unexpected content ({type(e).__name__}: {e})") from e


# What files are that should be something else, by their first bytes.
FOREIGN = (
    (rb"version https://git-lfs", "a git-lfs pointer, not the file itself: run git lfs pull"),
    (rb"\s*<(!doctype|html)", "a web page, not the file itself: download it again"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text; save it as UTF-8"),
    (rb"PK\x03\x04|\x80[\x02-\x05]", "pickled weights; save the model as safetensors first"),
    (rb"(tjgg|lmgg|fmgg|algg)", "a GGML file, older than GGUF, which is not supported"),
    (rb"[\0-\xff]{8}\{\"__metadata__\":\{\"format\":\"kvzip", "converted already: ./run reads it"),
    (rb"[\0-\xff]{4}\0{4}\{", "a safetensors file; name its directory, which has config.json"),
)


def foreign(path):
    """What a file is that was taken for another, or None."""
    with open(path, "rb") as f:
        head = f.read(64)
    return next((what for pattern, what in FOREIGN if re.match(pattern, head, re.I)), None)


def check_there(path):
    """A link to nothing is not a missing file: caches of downloads are full of links."""
    if os.path.islink(path) and not os.path.exists(path):
        raise Refusal(f"{os.path.basename(path)} is a link to nothing: {os.readlink(path)}")


def unique(pairs):
    """A JSON object; a key that stands there twice is a damage."""
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [k for k, _ in pairs]
        raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)!r} stands there twice")
    return value


def read_json(path, default=None):
    check_there(path)
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except FileNotFoundError:
        if default is None:
            raise Refusal(f"{os.path.basename(path)} is missing") from None
        return default
    except (ValueError, RecursionError) as e:  # bad JSON or bad UTF-8
        found = foreign(path) or f"damaged: {e}"
        raise Refusal(f"{os.path.basename(path)} is {found}") from None
    if not isinstance(value, dict):
        raise Refusal(f"{os.path.basename(path)} is damaged: expected an object")
    return value


# ---- 1. sources ----------------------------------------------------------------------------------


class SourceFile:
    """Plain reads, no map: memory stays small however large the file is."""

    opened = []  # (device, inode) of all of them: none may become the output

    def __init__(self, path):
        self.name = os.path.basename(path)
        check_there(path)
        if os.path.exists(path) and not os.path.isfile(path):
            raise Refusal(f"{self.name} is not a regular file")
        self.file = open(path, "rb")
        st = os.fstat(self.file.fileno())
        self.size = st.st_size
        self.opened.append((st.st_dev, st.st_ino))

    def read(self, offset, n):
        try:
            self.file.seek(offset)
            data = self.file.read(n)
        except OSError as e:
            raise Refusal(f"{self.name}: {e.strerror}") from None
        if len(data) != n:
            raise Refusal(f"{self.name} is cut: {self.size} bytes, expected at least {offset + n}")
        return data

    def rows(self, offset, n_bytes, rows):
        """Some rows of n_bytes each out of those that begin at offset, as uint8 [rows][n_bytes]."""
        lo, hi = int(rows.min()), int(rows.max()) + 1
        data = self.read(offset + lo * n_bytes, (hi - lo) * n_bytes)
        return np.frombuffer(data, np.uint8).reshape(hi - lo, n_bytes)[rows - lo]


@functools.lru_cache(64)
def all_rows(n):
    """0 to n - 1; matrices of as many rows share it, for experts are many."""
    return np.arange(n)


class Tensor:
    """A matrix in a source file (a vector is one row), read in slices of rows."""

    def __init__(self, file, name, kind, shape, offset, n_bytes):
        self.file, self.name, self.kind, self.shape, self.offset = file, name, kind, shape, offset
        if 0 in shape:
            raise Refusal(f"tensor {name} of {list(shape)} holds nothing")
        self.n_rows, self.n_cols = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[-1])
        self.row_bytes = n_bytes // self.n_rows
        self.order = all_rows(self.n_rows)  # which rows of the file these are

    def pick(self, order):
        t = object.__new__(type(self))
        t.__dict__.update(self.__dict__)
        t.order = self.order[order]
        t.n_rows = len(t.order)
        t.shape = (t.n_rows, t.n_cols)
        return t

    def reshaped(self, shape):
        """The same numbers in another shape, as many a row."""
        n_bytes = self.row_bytes * self.n_rows
        return Tensor(self.file, self.name, self.kind, shape, self.offset, n_bytes)

    def raw(self, a, b):
        """Rows [a, b) as uint8 [b - a][row_bytes]. A permutation is local, so the span is short."""
        return self.file.rows(self.offset, self.row_bytes, self.order[a:b])

    def f32(self, a=0, b=None):
        """Rows [a, b) as float32 [b - a][cols]."""
        return self.decoded(self.raw(a, self.n_rows if b is None else b))

    def decoded(self, raw):
        """Bytes of the file as float32."""
        if self.kind == "F32":
            x = raw.view("<f4")
        elif self.kind == "F16":
            x = raw.view("<f2").astype(np.float32)
        elif self.kind == "BF16":
            x = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            x = dequantize(raw, self.kind)
        check_finite(self, x)
        return x

    def vector(self):
        return self.f32().reshape(-1).copy()


class Columns(Tensor):
    """Columns of expert e in a tensor [experts][inputs][outputs], as rows: n, every step-th, from
    `first` on. One expert's bytes are kept, which all that is made of it reads."""

    held = (None, None)  # where they stand, and the bytes

    def __init__(self, t, e, first, step=1, n=None):
        inputs, self.width = t.shape[1:]
        self.bytes = inputs * self.width * PLAIN[t.kind]
        super().__init__(t.file, t.name, t.kind, (n or self.width // step, inputs),
                         t.offset + e * self.bytes, self.bytes)
        self.first, self.step = first, step

    def raw(self, a, b):
        key = (self.file, self.offset)
        if Columns.held[0] != key:
            Columns.held = key, self.file.read(self.offset, self.bytes)
        x = np.frombuffer(Columns.held[1], f"u{PLAIN[self.kind]}").reshape(self.n_cols, self.width)
        part = np.ascontiguousarray(x[:, self.first + self.step * self.order[a:b]].T)
        return part.view(np.uint8).reshape(len(part), -1)


def check_finite(t, x):
    if not np.isfinite(x).all():
        raise Refusal(f"tensor {t.name} holds values that are not finite")


# Twice the value of each FP4 code (E2M1).
FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def from_mxfp4(b):
    """Half the scale 2^(e - 127), then 32 codes: i and 16 + i in the two halves of byte i."""
    e = b[:, :1].astype(np.uint32)
    half = np.where(e < 2, np.uint32(0x200000) << e, (e - np.uint32(1)) << np.uint32(23))
    codes = b[:, 1:]
    return half.astype(np.uint32).view(np.float32) * FP4[np.hstack([codes & 15, codes >> 4])]


def from_nvfp4(b):
    """Four scales (E4M3 without a sign), then their 16 codes each, in the order of MXFP4."""
    e, m = b[:, :4] >> 3 & 15, (b[:, :4] & 7).astype(np.float32)
    scale = np.where(e == 0, m * 2.0**-9, (1 + m / 8) * 2.0 ** (e.astype(np.float32) - 7)) / 2
    scale[b[:, :4] == 127] = 0
    codes = b[:, 4:].reshape(len(b), 4, 8)
    x = FP4[np.concatenate([codes & 15, codes >> 4], -1)]
    return (scale.astype(np.float32)[..., None] * x).reshape(len(b), -1)


def from_bits(b, bits, zero, step):
    """An F16 scale, then codes of so many bits from the lowest on: scale * (step * code - zero)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (b[:, 2:, None] >> shifts & ((1 << bits) - 1)).reshape(len(b), -1)
    scale = b[:, :2].copy().view("<f2").astype(np.float32)
    return scale * (step * codes.astype(np.float32) - zero)


class BlockType(NamedTuple):
    """A type of GGUF tensors that the package gguf does not know yet, as ggml-quants.c has it."""

    name: str
    columns: int  # of a block
    n_bytes: int
    values: Callable  # uint8 [blocks][n_bytes] -> float32 [blocks][columns]


BLOCK_TYPES = {
    39: BlockType("MXFP4", 32, 17, from_mxfp4),
    40: BlockType("NVFP4", 64, 36, from_nvfp4),
    41: BlockType("Q1_0", 128, 18, lambda b: from_bits(b, 1, 1, 2)),
    42: BlockType("Q2_0", 64, 18, lambda b: from_bits(b, 2, 1, 1)),
}
NO_WEIGHTS = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")


def block_type(number):
    """-> name, columns and bytes of a block of a type of GGUF tensors."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if number in BLOCK_TYPES:
        return BLOCK_TYPES[number][:3]
    kind = GGMLQuantizationType(number)
    return kind.name, *GGML_QUANT_SIZES[kind]


def dequantize(raw, kind):
    """Rows of blocks, uint8 [rows][bytes], as float32 [rows][columns]."""
    for t in BLOCK_TYPES.values():
        if t.name == kind:
            return t.values(raw.reshape(-1, t.n_bytes)).reshape(len(raw), -1)
    from gguf import GGMLQuantizationType, quants

    return quants.dequantize(raw, GGMLQuantizationType[kind]).astype(np.float32)


PLAIN = {"F32": 4, "F16": 2, "BF16": 2}


def safetensors_entry(e):
    """-> dtype, shape, begin and end of a tensor's bytes."""
    begin, end = e["data_offsets"]
    numbers = (*e["shape"], begin, end)
    if type(e["dtype"]) is not str or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise ValueError
    return e["dtype"], tuple(e["shape"]), begin, end


def open_safetensors(path):
    """-> {name: Tensor}, every range checked against the file's length and against the others."""
    f = SourceFile(path)
    (length,) = struct.unpack("<Q", f.read(0, 8))
    if length > min(MAX_HEADER, f.size - 8):
        found = foreign(path)
        raise Refusal(f"{f.name} is " + (found if found and "safetensors" not in found else
                      f"cut or no safetensors file: a header of {length} bytes"))
    try:
        header = json.loads(f.read(8, length), object_pairs_hook=unique)
        header.pop("__metadata__", None)
        entries = {name: safetensors_entry(e) for name, e in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise Refusal(f"{f.name}: the header is damaged: {e or type(e).__name__}") from None
    tensors, at = {}, 0
    for name, (kind, shape, begin, end) in sorted(entries.items(), key=lambda x: x[1][2:]):
        if not begin <= end <= f.size - 8 - length:
            raise Refusal(f"{f.name} is cut: tensor {name} ends at byte {end} of its data")
        if begin != at:
            raise Refusal(f"{f.name}: tensor {name} begins at byte {begin}, expected {at}")
        if kind in PLAIN and end - begin != math.prod(shape) * PLAIN[kind]:
            raise Refusal(f"{f.name}: tensor {name} is {end - begin} bytes, not {kind} {shape}")
        tensors[name] = Tensor(f, name, kind, shape or (1,), 8 + length + begin, end - begin)
        at = end
    return {name: tensors[name] for name in entries}


# Directories that are not a model to convert, by a file in them: a name, or an ending.
FOLDERS = (
    ("adapter_config.json", "a LoRA adapter: merge it into its model first (merge_and_unload)"),
    ("modules.json", "a sentence-transformers model: it makes embeddings and writes no text"),
    ("model_index.json", "a diffusion pipeline, not a language model"),
)
BARE = (  # those without config.json
    ("snapshots", "a cache of downloads: name the directory in its snapshots/"),
    ("params.json", "in the layout of its authors: take the one with config.json"),
    (".gguf", "a directory with GGUF files: name one of them"),
    (".safetensors", "a directory with weights and no config.json"),
)


def check_directory(path):
    """Names what a directory is that is no model."""
    names = sorted(os.listdir(path))
    check_there(os.path.join(path, "config.json"))
    for table in (FOLDERS,) if "config.json" in names else (FOLDERS, BARE):
        for end, what in table:
            if end in names or (end[0] == "." and any(n.endswith(end) for n in names)):
                raise Refusal(f"is {what}" + (f" ({end})" if end in names else ""))
    if "tokenizer.json" not in names:
        for name in names:
            if name == "tokenizer.model" or name.endswith(".tiktoken"):
                found = foreign(os.path.join(path, name))
                if found:
                    raise Refusal(f"{name} is {found}")


def open_directory(path):
    """The weights of a Hugging Face directory -> {name: Tensor}: one file, or those of the index.
    Where both are, the one file counts, as in transformers."""
    index, single = (os.path.join(path, n) for n in
                     ("model.safetensors.index.json", "model.safetensors"))
    check_there(single)
    if os.path.exists(single):
        return open_safetensors(single)
    check_there(index)
    if os.path.exists(index):
        return open_shards(path, read_json(index).get("weight_map"))
    names = sorted(os.listdir(path))
    if any(n.endswith((".bin", ".pth", ".pt")) for n in names):
        raise Refusal("only pickled weights (.bin, .pth); save the model as safetensors first")
    found = [n for n in names if n.endswith((".safetensors", ".gguf", ".h5", ".msgpack", ".onnx"))]
    raise Refusal("no model.safetensors and no model.safetensors.index.json"
                  + (f"; there is {found[0]}" if found else ""))


def open_shards(path, listed):
    if not isinstance(listed, dict) or not all(isinstance(n, str) for n in listed.values()):
        raise Refusal("model.safetensors.index.json: weight_map is no object of file names")
    tensors = {}
    for shard in sorted(set(listed.values())):
        check_there(os.path.join(path, shard))
        if not os.path.exists(os.path.join(path, shard)):
            raise Refusal(f"{shard} is missing, which the index lists")
        for name, t in open_safetensors(os.path.join(path, shard)).items():
            if name in tensors:
                raise Refusal(f"tensor {name} is in {tensors[name].file.name} and in {shard}")
            tensors[name] = t
    for name, shard in listed.items():
        if name not in tensors or tensors[name].file.name != os.path.basename(shard):
            raise Refusal(f"tensor {name} is missing in {shard}, where the index puts it")
    return tensors


# gpt-oss keeps the matrices of all experts in one tensor, input-major or in MXFP4, gate and up taking
# turns. Here they get the names that other families have, one for each expert.
PAIRED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Blocks(Tensor):
    """A matrix in MXFP4 whose blocks and scales are tensors of their own; its rows are every step-th
    from `first` on. In the file byte i of a block holds columns 2i and 2i + 1; raw() has them as a
    GGUF."""

    def __init__(self, blocks, scales, e, first, step):
        n, groups = blocks.shape[1] // step, blocks.shape[2]
        super().__init__(blocks.file, blocks.name, "MXFP4", (n, GROUP * groups), blocks.offset,
                         n * groups * 17)
        self.scales, self.first, self.step = scales, e * blocks.shape[1] + first, step

    def raw(self, a, b):
        rows, groups = self.first + self.step * self.order[a:b], self.n_cols // GROUP
        blocks = self.file.rows(self.offset, groups * GROUP // 2, rows)
        scales = self.scales.file.rows(self.scales.offset, groups, rows)
        pairs = blocks.reshape(len(rows), -1, GROUP // 2)
        codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(*pairs.shape[:2], GROUP)
        packed = codes[..., : GROUP // 2] | codes[..., GROUP // 2 :] << 4
        return np.concatenate([scales[..., None], packed], -1).reshape(len(rows), -1)


class Turns(Tensor):
    """Every step-th column of a matrix, from `first` on."""

    def __init__(self, t, first, step):
        super().__init__(t.file, t.name, t.kind, t.shape, t.offset, t.row_bytes * t.n_rows)
        self.columns = slice(first, None, step)
        self.shape = (t.n_rows, t.n_cols // step)
        self.n_cols = t.n_cols // step

    def f32(self, a=0, b=None):
        return np.ascontiguousarray(super().f32(a, b)[:, self.columns])


def take_blocks(tensors, name, step):
    """The blocks of a stack and their scales, checked against each other."""
    blocks, scales = tensors.pop(name + "_blocks"), tensors.pop(name + "_scales", None)
    if scales is None:
        raise Refusal(f"tensor {name}_scales is missing")
    for t in (blocks, scales):
        if t.kind != "U8" or t.row_bytes * t.n_rows != math.prod(t.shape):
            raise Refusal(f"tensor {t.name}: expected U8, found {t.kind} {list(t.shape)}")
    shape = (*scales.shape, GROUP // 2)
    if len(shape) != 4 or blocks.shape != shape or shape[1] % step:
        raise Refusal(f"tensor {blocks.name}: {list(blocks.shape)}, and {list(scales.shape)} scales")
    return blocks, scales


def one_by_one(tensors):
    """Takes the stacks apart, in place."""
    for name in list(tensors):
        at, dot, part = name.partition(".mlp.experts.")
        kind = part.removesuffix("_blocks").removesuffix("_bias")
        if not dot or kind not in PAIRED or name not in tensors:
            continue
        ours = PAIRED[kind]
        step, whole, at = len(ours), at + dot + kind, at + dot
        if part.endswith("_blocks"):
            t = take_blocks(tensors, whole, step)
        else:
            t = (tensors.pop(name),)
            dims = 2 if part.endswith("_bias") else 3
            if t[0].kind not in PLAIN or len(t[0].shape) != dims or t[0].shape[-1] % step:
                raise Refusal(f"tensor {name}: {t[0].kind} {list(t[0].shape)} is not supported")
        for first, new in enumerate(ours):
            if part.endswith("_bias"):
                new = {f"{at}{new}.bias": Turns(*t, first, step)}
            else:
                view = Blocks if part.endswith("_blocks") else Columns
                new = {f"{at}{e}.{new}.weight": view(*t, e, first, step)
                       for e in range(min(t[0].shape[0], MAX_EXPERTS + 1))}
            both = next((n for n in new if n in tensors), None)
            if both:
                raise Refusal(f"tensor {both} is there, and {name} as well")
            tensors.update(new)


class Cursor:
    """Reads a GGUF header front to back."""

    SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q",
               11: "<q", 12: "<d"}
    STRING, ARRAY = 8, 9

    def __init__(self, f):
        self.f, self.at, self.buffer, self.start = f, 0, b"", 0

    def take(self, n):
        if n > self.f.size - self.at:
            raise Refusal(f"{self.f.name} is cut: {self.f.size} bytes end inside the header")
        if self.at + n > self.start + len(self.buffer):
            self.start = self.at
            self.buffer = self.f.read(self.at, min(self.f.size - self.at, max(n, 1 << 20)))
        self.at += n
        return self.buffer[self.at - n - self.start : self.at - self.start]

    def scalar(self, code):
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self):
        return self.take(self.scalar("<Q")).decode("utf-8", "surrogateescape")

    def value(self, kind):
        if kind == self.STRING:
            return self.string()
        if kind != self.ARRAY:
            return self.scalar(self.code(kind))
        of, n = self.scalar("<I"), self.scalar("<Q")
        if of == self.STRING:
            return [self.string() for _ in range(n)]
        code = np.dtype(self.code(of))
        return np.frombuffer(self.take(n * code.itemsize), code).tolist()

    def code(self, kind):
        if kind not in self.SCALARS:
            raise Refusal(f"{self.f.name}: the header is damaged or newer than this program: "
                          f"a value of type {kind}")
        return self.SCALARS[kind]


# What a GGUF is that is no model, by general.type and general.architecture.
GGUF_OTHERS = {
    "adapter": "a LoRA adapter: merge it into its model first (llama-export-lora)",
    "mmproj": "the projector of a multimodal model (mmproj), without its language model",
    "clip": "the projector of a multimodal model (mmproj), without its language model",
    "imatrix": "an importance matrix, not a model",
    "controlvector": "a control vector, not a model",
}


def gguf_header(c):
    """-> metadata, [(name, shape, type, offset)]; every key and name stands there once."""
    name = c.f.name
    if c.take(4) != b"GGUF":
        found = foreign(c.f.file.name)
        raise Refusal(f"is {found}" if found else "neither a directory nor a GGUF file")
    version = c.scalar("<I")
    if version not in (2, 3):
        order = " (big-endian?)" if version & 0xFFFF == 0 else ""
        raise Refusal(f"GGUF version {version}{order} is not supported, 2 and 3 are")
    n_tensors, n_meta = c.scalar("<Q"), c.scalar("<Q")
    meta, infos = {}, {}
    for _ in range(n_meta):
        key = c.string()
        if key in meta:
            raise Refusal(f"{name}: the key {key} stands there twice")
        meta[key] = c.value(c.scalar("<I"))
    for _ in range(n_tensors):
        tensor, n_dims = c.string(), c.scalar("<I")
        if tensor in infos or not 1 <= n_dims <= 4:
            raise Refusal(f"{name}: tensor {tensor} stands there twice, or has {n_dims} dimensions")
        shape = tuple(reversed([c.scalar("<Q") for _ in range(n_dims)]))
        infos[tensor] = (shape, c.scalar("<I"), c.scalar("<Q"))
    return meta, infos


def open_gguf(path):
    """-> (metadata, {name: Tensor}), every range checked as in safetensors."""
    f = SourceFile(path)
    c = Cursor(f)
    meta, infos = gguf_header(c)
    for key in ("general.type", "general.architecture"):
        if isinstance(meta.get(key), str) and meta[key] in GGUF_OTHERS:
            raise Refusal(f"is {GGUF_OTHERS[meta[key]]}")
    if meta.get("split.count", 1) not in (0, 1):
        raise Refusal("a split GGUF; join its parts with llama-gguf-split --merge first")
    align = meta.get("general.alignment", 32)
    if type(align) is not int or align < 8 or align & (align - 1):
        raise Refusal(f"GGUF: general.alignment is {align!r}, expected a power of two")
    data, end = up(c.at, align), 0
    tensors = {}
    for name, (shape, number, offset) in sorted(infos.items(), key=lambda x: x[1][2]):
        try:
            kind, block, block_bytes = block_type(number)
        except ValueError:
            raise Refusal(f"tensor {name} is of type {number}, which is not known") from None
        n_bytes = math.prod(shape) // block * block_bytes
        if shape[-1] % block or data + offset + n_bytes > f.size:
            raise Refusal(f"{f.name} is cut or damaged: tensor {name} lies outside of it")
        if offset < end or offset % align:
            raise Refusal(f"{f.name} is damaged: tensor {name} begins at byte {offset}")
        end = offset + n_bytes
        tensors[name] = Tensor(f, name, kind, shape, data + offset, n_bytes)
    return meta, {name: tensors[name] for name in infos}


# A checkpoint of llama2.c begins with these numbers; the first layout has nothing before them and
# says by a negative vocab_size that there is an output matrix.
LLAMA2C = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
LLAMA2C_MAGIC = b"24ka"
LLAMA2C_MOST = (1 << 16, 1 << 18, 1 << 10, 1 << 10, 1 << 10, 1 << 20, 1 << 20)
# Its matrices of a layer, and their names in a GGUF, whose q and k rows lie in the same order.
LLAMA2C_NORMS = (("attn_norm", "dim"), ("ffn_norm", "dim"))
LLAMA2C_MATRICES = (
    ("attn_q", "q_dim", "dim"), ("attn_k", "kv_dim", "dim"), ("attn_v", "kv_dim", "dim"),
    ("attn_output", "dim", "q_dim"), ("ffn_gate", "hidden_dim", "dim"),
    ("ffn_down", "dim", "hidden_dim"), ("ffn_up", "hidden_dim", "dim"))


class CodedRows(Tensor):
    """A matrix of version 2: int8 codes, then a float32 scale for each `group` of them in a row of
    all."""

    def __init__(self, file, name, shape, offset, group):
        super().__init__(file, name, "llama2.c q8", shape, offset, math.prod(shape))
        self.group, self.scales = group, offset + math.prod(shape)

    def f32(self, a=0, b=None):
        b = self.n_rows if b is None else b
        places = self.order[a:b, None] * self.n_cols + np.arange(self.n_cols)
        groups = places // self.group
        lo, hi = int(groups.min()), int(groups.max()) + 1
        scale = np.frombuffer(self.file.read(self.scales + 4 * lo, 4 * (hi - lo)), "<f4")
        x = self.raw(a, b).view(np.int8).astype(np.float32) * scale[groups - lo]
        check_finite(self, x)
        return x


class Llama2c:
    """Hands out the tensors of a checkpoint of llama2.c, one after the other."""

    def __init__(self, file, at, sizes, group):
        self.file, self.at, self.sizes, self.group, self.tensors = file, at, sizes, group, {}

    def take(self, name, *dims):
        shape = tuple(self.sizes[d] for d in dims)
        n, name = math.prod(shape), name + ".weight"
        coded = self.group > 0 and len(dims) == 2
        if coded and n % self.group:
            raise Refusal(f"{self.file.name}: {name} of {n} codes in groups of {self.group}")
        n_bytes = n + n // self.group * 4 if coded else n * 4
        if self.at + n_bytes > self.file.size:
            raise Refusal(f"{self.file.name} is cut: {self.file.size} bytes, and {name} ends at "
                          f"byte {self.at + n_bytes}")
        self.tensors[name] = (CodedRows(self.file, name, shape, self.at, self.group) if coded else
                              Tensor(self.file, name, "F32", shape, self.at, n_bytes))
        self.at += n_bytes

    def layers(self, name, *dims):
        for l in range(self.sizes["n_layers"]):
            self.take(f"blk.{l}.{name}", *dims)


def llama2c_numbers(head):
    """The seven numbers, or None where these bytes are none."""
    numbers = struct.unpack("<7i", head)
    sizes = [abs(n) if i == 5 else n for i, n in enumerate(numbers)]
    fit = all(1 <= n <= most for n, most in zip(sizes, LLAMA2C_MOST))
    return numbers if fit and not sizes[0] % sizes[3] and not sizes[3] % sizes[4] else None


def is_llama2c(path):
    with open(path, "rb") as f:
        head = f.read(28)
    return head[:4] == LLAMA2C_MAGIC or (len(head) == 28 and llama2c_numbers(head) is not None)


def open_llama2c(path):
    """-> what config.json would say, {name of a GGUF: Tensor}."""
    f = SourceFile(path)
    version, at, group, numbers = 0, 28, 0, f.read(0, 28)
    if numbers[:4] == LLAMA2C_MAGIC:
        head = f.read(0, 256)
        (version,), at, numbers = struct.unpack_from("<i", head, 4), 256, head[8:36]
        if version not in (1, 2):
            raise Refusal(f"a checkpoint of llama2.c of version {version}; 1 and 2 are supported")
        tied, group = head[36] == 1, struct.unpack_from("<i", head, 37)[0] if version == 2 else 0
    numbers = llama2c_numbers(numbers)
    if numbers is None or (version == 2 and group < 1):
        raise Refusal(f"{f.name}: the header of a checkpoint of llama2.c is damaged")
    sizes = dict(zip(LLAMA2C, numbers))
    if version == 0:
        tied, sizes["vocab_size"] = sizes["vocab_size"] > 0, abs(sizes["vocab_size"])
    head_dim = sizes["dim"] // sizes["n_heads"]
    sizes.update(q_dim=sizes["dim"], kv_dim=sizes["n_kv_heads"] * head_dim)
    tensors = llama2c_tensors(Llama2c(f, at, sizes, group), version, tied, head_dim)
    config = dict(
        model_type="llama", hidden_size=sizes["dim"], intermediate_size=sizes["hidden_dim"],
        num_hidden_layers=sizes["n_layers"], num_attention_heads=sizes["n_heads"],
        num_key_value_heads=sizes["n_kv_heads"], vocab_size=sizes["vocab_size"],
        max_position_embeddings=sizes["seq_len"], rms_norm_eps=1e-5, tie_word_embeddings=tied)
    return config, tensors


def llama2c_tensors(c, version, tied, head_dim):
    """All tensors, in the order of the version; the file ends with them."""
    if version == 0:
        c.take("token_embd", "vocab_size", "dim")
        c.layers("attn_norm", "dim")
        for name, *dims in LLAMA2C_MATRICES[:4]:
            c.layers(name, *dims)
        c.layers("ffn_norm", "dim")
        for name, *dims in LLAMA2C_MATRICES[4:]:
            c.layers(name, *dims)
        c.take("output_norm", "dim")
        c.at += c.sizes["seq_len"] * (head_dim // 2) * 8  # cos and sin, which follow from the sizes
    else:
        for name, *dims in LLAMA2C_NORMS:
            c.layers(name, *dims)
        c.take("output_norm", "dim")
        c.take("token_embd", "vocab_size", "dim")
        for name, *dims in LLAMA2C_MATRICES:
            c.layers(name, *dims)
    if not tied:
        c.take("output", "vocab_size", "dim")
    if c.at != c.file.size:
        raise Refusal(f"{c.file.name} is cut, or no checkpoint of llama2.c: {c.file.size} bytes, "
                      f"expected {c.at}")
    return c.tensors


# ---- 2. families ---------------------------------------------------------------------------------

# Of one layer: our name, Hugging Face's, GGUF's. Where several of ours name one source (Phi-3),
# they are its rows one after the other.
NORMS = [
    ("rms_att", "input_layernorm.weight", "attn_norm.weight"),
    ("rms_ffn", "post_attention_layernorm.weight", "ffn_norm.weight"),
]
GEMMA_NORMS = [
    ("rms_att", "input_layernorm.weight", "attn_norm.weight"),
    ("rms_att_post", "post_attention_layernorm.weight", "post_attention_norm.weight"),
    ("rms_ffn", "pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    ("rms_ffn_post", "post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
]
QK_NORMS = [
    ("q_norm", "self_attn.q_norm.weight", "attn_q_norm.weight"),
    ("k_norm", "self_attn.k_norm.weight", "attn_k_norm.weight"),
]
BIASES = [
    ("bq", "self_attn.q_proj.bias", "attn_q.bias"),
    ("bk", "self_attn.k_proj.bias", "attn_k.bias"),
    ("bv", "self_attn.v_proj.bias", "attn_v.bias"),
]
QKV = [
    ("wq", "self_attn.q_proj.weight", "attn_q.weight"),
    ("wk", "self_attn.k_proj.weight", "attn_k.weight"),
    ("wv", "self_attn.v_proj.weight", "attn_v.weight"),
]
WO = [("wo", "self_attn.o_proj.weight", "attn_output.weight")]
GATE_UP = [
    ("w1", "mlp.gate_proj.weight", "ffn_gate.weight"),
    ("w3", "mlp.up_proj.weight", "ffn_up.weight"),
]
W2 = [("w2", "mlp.down_proj.weight", "ffn_down.weight")]
FUSED_QKV = [(ours, "self_attn.qkv_proj.weight", "attn_qkv.weight") for ours in ("wq", "wk", "wv")]
FUSED_GATE_UP = [(ours, "mlp.gate_up_proj.weight", "ffn_up.weight") for ours in ("w1", "w3")]
MATRICES = QKV + WO + GATE_UP + W2
# A star is the number of an expert. A GGUF has them in one tensor, transformers 5 in memory too.
EXPERTS = [
    ("router", "mlp.gate.weight", "ffn_gate_inp.weight"),
    ("experts.w1", "mlp.experts.*.gate_proj.weight", "ffn_gate_exps.weight"),
    ("experts.w3", "mlp.experts.*.up_proj.weight", "ffn_up_exps.weight"),
    ("experts.w2", "mlp.experts.*.down_proj.weight", "ffn_down_exps.weight"),
]
# Our name -> a stack of transformers, which stands in place of the star; which of its equal parts
# ours is, and how many those are.
STACKS = {
    "experts.w1": ("gate_up_proj", 0, 2),
    "experts.w3": ("gate_up_proj", 1, 2),
    "experts.w2": ("down_proj", 0, 1),
}
SHARED_EXPERT = [
    ("shared.w1", "mlp.shared_expert.gate_proj.weight", "ffn_gate_shexp.weight"),
    ("shared.w3", "mlp.shared_expert.up_proj.weight", "ffn_up_shexp.weight"),
    ("shared.w2", "mlp.shared_expert.down_proj.weight", "ffn_down_shexp.weight"),
    ("shared_scale", "mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight"),
]
FUSED = FUSED_QKV + WO + FUSED_GATE_UP + W2
# Gemma 4. A name that begins with ^ stands beside the layers, which take its rows in order.
LAYER_SCALE = [("scale", "layer_scalar", "layer_output_scale.weight")]
LAYER_EMBED = [
    ("embed.gate", "per_layer_input_gate.weight", "inp_gate.weight"),
    ("embed.mix", "^per_layer_model_projection.weight", "^per_layer_model_proj.weight"),
    ("embed.up", "per_layer_projection.weight", "proj.weight"),
    ("rms_embed", "post_per_layer_input_norm.weight", "post_norm.weight"),
]
BESIDE = [
    ("router", "router.proj.weight", "ffn_gate_inp.weight"),
    ("experts.w1", "experts.*.gate_proj.weight", "ffn_gate_exps.weight"),
    ("experts.w3", "experts.*.up_proj.weight", "ffn_up_exps.weight"),
    ("experts.w2", "experts.*.down_proj.weight", "ffn_down_exps.weight"),
    ("rms_router", "router.scale", "ffn_gate_inp.scale"),
    ("rms_experts", "pre_feedforward_layernorm_2.weight", "pre_ffw_norm_2.weight"),
    ("rms_dense_post", "post_feedforward_layernorm_1.weight", "post_ffw_norm_1.weight"),
    ("rms_experts_post", "post_feedforward_layernorm_2.weight", "post_ffw_norm_2.weight"),
    ("experts.scale", "router.per_expert_scale", "ffn_down_exps.scale"),
]
EMBED_TABLE = ("embed_table", "embed_tokens_per_layer.weight", "per_layer_token_embd.weight")
EMBED_NORM = ("rms_embed_all", "per_layer_projection_norm.weight", "per_layer_proj_norm.weight")
V_NORM = ("v_norm", "self_attn.v_norm.weight", "attn_v_norm.weight")

# Qwen 3.5: the rows of q_proj are each head's query, then its gate.
GATED_QKV = [*QKV, ("wg", "self_attn.q_proj.weight", "attn_q.weight")]
DELTA = [
    ("delta.qkv", "linear_attn.in_proj_qkv.weight", "attn_qkv.weight"),
    ("delta.z", "linear_attn.in_proj_z.weight", "attn_gate.weight"),
    ("delta.a", "linear_attn.in_proj_a.weight", "ssm_alpha.weight"),
    ("delta.b", "linear_attn.in_proj_b.weight", "ssm_beta.weight"),
    ("delta.out", "linear_attn.out_proj.weight", "ssm_out.weight"),
    ("delta.conv", "linear_attn.conv1d.weight", "ssm_conv1d.weight"),
    ("delta.decay", "linear_attn.A_log", "ssm_a"),
    ("delta.dt", "linear_attn.dt_bias", "ssm_dt.bias"),
    ("delta.norm", "linear_attn.norm.weight", "ssm_norm.weight"),
]

# gpt-oss. Its router and experts have biases; SINKS of all layers stand together.
SINKS = ("sinks", "self_attn.sinks", "attn_sinks.weight")
WO_BIAS = [("bo", "self_attn.o_proj.bias", "attn_output.bias")]
BIASED_EXPERTS = [
    ("router", "mlp.router.weight", "ffn_gate_inp.weight"), *EXPERTS[1:],
    ("router_bias", "mlp.router.bias", "ffn_gate_inp.bias"),
    ("experts.b1", "mlp.experts.gate_proj.bias", "ffn_gate_exps.bias"),
    ("experts.b3", "mlp.experts.up_proj.bias", "ffn_up_exps.bias"),
    ("experts.b2", "mlp.experts.down_proj.bias", "ffn_down_exps.bias"),
]

# Llama 4: experts stand input-major in one tensor, norms of q and k have no weights (no name).
UNIT_NORMS = [("q_norm", None, None), ("k_norm", None, None)]
LLAMA4_MLP = [(ours, hf.replace("mlp.", "feed_forward."), gguf) for ours, hf, gguf in GATE_UP + W2]
LLAMA4_EXPERTS = [
    ("router", "feed_forward.router.weight", "ffn_gate_inp.weight"),
    ("experts.w1", "feed_forward.experts.gate_up_proj", "ffn_gate_exps.weight"),
    ("experts.w3", "feed_forward.experts.gate_up_proj", "ffn_up_exps.weight"),
    ("experts.w2", "feed_forward.experts.down_proj", "ffn_down_exps.weight"),
    *((ours, hf.replace("mlp.", "feed_forward."), gguf) for ours, hf, gguf in SHARED_EXPERT[:3]),
]

# Qwen3-Next: of q, k, v and z, and of b and a, the rows of one key head stand together.
NEXT_DELTA = [
    ("delta.qkv", "linear_attn.in_proj_qkvz.weight", "attn_qkv.weight"),
    ("delta.z", "linear_attn.in_proj_qkvz.weight", "attn_gate.weight"),
    ("delta.a", "linear_attn.in_proj_ba.weight", "ssm_ba.weight"),
    ("delta.b", "linear_attn.in_proj_ba.weight", "ssm_ba.weight"),
    *DELTA[4:],
]
GROUPED = ("in_proj_qkvz.weight", "in_proj_ba.weight", "ssm_ba.weight")

SHAPES = {  # rows and columns, or length, in fields of the model
    "tok_embed": ("vocab_size", "dim"), "wcls": ("vocab_size", "dim"), "rms_final": ("dim",),
    "rms_att": ("dim",), "rms_ffn": ("dim",), "rms_att_post": ("dim",), "rms_ffn_post": ("dim",),
    "q_norm": ("head_dim",), "k_norm": ("head_dim",),
    "bq": ("q_dim",), "bk": ("kv_dim",), "bv": ("kv_dim",),
    "wq": ("q_dim", "dim"), "wk": ("kv_dim", "dim"), "wv": ("kv_dim", "dim"),
    "wo": ("dim", "q_dim"),
    "w1": ("hidden_dim", "dim"), "w2": ("dim", "hidden_dim"), "w3": ("hidden_dim", "dim"),
    "router": ("n_experts", "dim"), "experts.w1": ("expert_dim", "dim"),
    "experts.w2": ("dim", "expert_dim"), "experts.w3": ("expert_dim", "dim"),
    "shared.w1": ("shared_dim", "dim"), "shared.w2": ("dim", "shared_dim"),
    "shared.w3": ("shared_dim", "dim"), "shared_scale": ("dim",),
    "wg": ("q_dim", "dim"), "delta.qkv": ("delta_channels", "dim"), "delta.z": ("delta_v", "dim"),
    "delta.a": ("delta_v_heads", "dim"), "delta.b": ("delta_v_heads", "dim"),
    "delta.out": ("dim", "delta_v"), "delta.conv": ("delta_channels", "delta_conv"),
    "delta.decay": ("delta_v_heads",), "delta.dt": ("delta_v_heads",),
    "delta.norm": ("delta_v_dim",),
    "scale": ("one",), "embed_table": ("vocab_size", "embed_row"), "rms_embed_all": ("embed_dim",),
    "embed.gate": ("embed_dim", "dim"), "embed.mix": ("embed_dim", "dim"),
    "embed.up": ("dim", "embed_dim"), "rms_embed": ("dim",),
    "sinks": ("n_heads",), "bo": ("dim",), "router_bias": ("n_experts",),
    "experts.b1": ("n_experts", "expert_dim"), "experts.b3": ("n_experts", "expert_dim"),
    "experts.b2": ("n_experts", "dim"),
    "rms_router": ("dim",), "rms_experts": ("dim",), "rms_dense_post": ("dim",),
    "rms_experts_post": ("dim",), "experts.scale": ("n_experts",),
}
# Small matrices that decide much: in f32, whatever the others are.
EXACT = ("router", "delta.a", "delta.b")
FLAT = ("experts.b1", "experts.b2", "experts.b3")  # vectors, one after the other


def no_slide(c, l):
    return False


class Family(NamedTuple):
    parts: list  # of one layer, or a function of config and layer
    config: dict  # keys of config.json that this family reads, with what absence means
    slides: Callable = no_slide  # does layer l see a window only
    permuted: bool = False  # llama.cpp stores the rows of q and k in another order
    interleaved: bool = False  # so does the family itself: neighbours rotate together
    grows: Callable = None  # do layer l's queries grow with their position; None: all that do
    gemma: bool = False  # the embedding is scaled, attention has its own scale
    plus_one: bool = False  # norms are 1 + w
    keeps: Callable = no_slide  # does layer l keep a state instead of pairs
    fields: Callable = lambda c: {}  # metadata of its own
    layered: Callable = None  # what differs from layer to layer (Layered)


MISSING = ()  # a key without a default: it must be there
COMMON = dict(
    hidden_size=MISSING, intermediate_size=MISSING, num_hidden_layers=MISSING,
    num_attention_heads=MISSING, num_key_value_heads=None, head_dim=None, vocab_size=MISSING,
    max_position_embeddings=MISSING, rms_norm_eps=1e-6, hidden_act="silu",
    tie_word_embeddings=False, layer_types=None, rope_theta=10000.0, rope_scaling=None,
    rope_parameters=None, partial_rotary_factor=None, original_max_position_embeddings=None,
)
WINDOWED = dict(COMMON, num_key_value_heads=32, sliding_window=4096, use_sliding_window=False,
                max_window_layers=28)
GEMMA2 = dict(
    COMMON, head_dim=256, num_attention_heads=8, num_key_value_heads=4, vocab_size=256000,
    max_position_embeddings=8192, tie_word_embeddings=True,
    query_pre_attn_scalar=256, sliding_window=4096, attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0, hidden_activation="gelu_pytorch_tanh",
)
GEMMA3 = dict(
    GEMMA2, vocab_size=262208, max_position_embeddings=131072, rope_theta=1e6,
    rope_local_base_freq=1e4, sliding_window_pattern=6, attn_logit_softcapping=None,
    final_logit_softcapping=None,
)


# Gemma 4: layers with a window have other heads than those without, the last ones read the keys and
# values of layers before them.

GEMMA4 = dict(
    COMMON, head_dim=256, num_attention_heads=8, num_key_value_heads=4, vocab_size=262144,
    max_position_embeddings=131072, tie_word_embeddings=True, sliding_window=512,
    final_logit_softcapping=None, hidden_activation="gelu_pytorch_tanh", global_head_dim=512,
    num_global_key_value_heads=None, per_layer_config=None, attention_k_eq_v=False,
    num_kv_shared_layers=0, use_double_wide_mlp=False, hidden_size_per_layer_input=256,
    vocab_size_per_layer_input=262144, use_bidirectional_attention=None, enable_moe_block=False,
    num_experts=None, top_k_experts=None, moe_intermediate_size=None,
)
GEMMA4_UNIFIED = {
    **{k: v for k, v in GEMMA4.items() if not re.search("per_layer_input|moe_|experts", k)},
    "max_position_embeddings": 262144, "sliding_window": 1024,
    "use_bidirectional_attention": "vision"}
GEMMA4_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}
class Layered(NamedTuple):
    """What differs from layer to layer."""

    fields: dict  # metadata
    sizes: list  # [n_layers] fields of each layer alone
    owners: list  # [n_layers] whose keys and values it reads
    parts: list  # [n_layers]


def gemma4_slides(c, l):
    return (l + 1) % 6 != 0


def gemma4_heads(c, slides, where):
    """-> (kv heads, head_dim) of layers without a window, of those with one."""
    listed, heads = c["per_layer_config"], ([], [])
    for l, sliding in enumerate(slides):
        own = {"num_key_value_heads": c["num_key_value_heads"], "head_dim": c["head_dim"]}
        if listed is not None:
            said = next((x for k, x in listed.items() if k.isdecimal() and int(k) == l), {})
            check_value(where, f"per_layer_config: {l}", said, "an object")
            if set(said) - set(own):
                raise Refusal(f"{where}: per_layer_config: {l}: {sorted(set(said) - set(own))[0]} "
                              "of a layer alone is not supported")
            own.update(said)
        elif not sliding:
            own["head_dim"] = c["global_head_dim"]
            if c["attention_k_eq_v"] and c["num_global_key_value_heads"] is not None:
                own["num_key_value_heads"] = c["num_global_key_value_heads"]
        for key, value in own.items():
            check_value(where, key, value, "a whole number")
        heads[sliding].append(tuple(own.values()))
    for found in heads:
        if len(set(found)) > 1:
            raise Refusal(f"{where}: layers of one kind with different heads are not supported")
    full, sliding = heads
    return full[0], (sliding or full)[0]


def gemma4_owners(c, slides, where):
    """Whose keys and values each layer reads: those of the last own layer of its kind."""
    n = len(slides)
    first = n - c["num_kv_shared_layers"]
    if first < 1 or set(slides[:first]) != set(slides):
        raise Refusal(f"{where}: num_kv_shared_layers {n - first} of {n} leaves a kind of layers "
                      "without keys of its own")
    last = {slides[l]: l for l in range(first)}
    return [l if l < first else last[slides[l]] for l in range(n)]


def gemma4_parts(c, slides, owners, l):
    own = owners[l] == l
    norms = QK_NORMS if own else QK_NORMS[:1]
    qkv = QKV[: 1 if not own else 2 if c["attention_k_eq_v"] and not slides[l] else 3]
    embed = LAYER_EMBED if c.get("hidden_size_per_layer_input") else []
    experts = BESIDE if c.get("enable_moe_block") else []
    return GEMMA_NORMS + norms + qkv + WO + GATE_UP + W2 + experts + LAYER_SCALE + embed


def gemma4_experts(c, where):
    for key in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        if c[key] is None:
            raise Refusal(f"{where}: enable_moe_block is true, and {key} is missing")
    fields = moe_fields(dict(c, num_experts_per_tok=c["top_k_experts"], norm_topk_prob=True))
    return dict(fields, dense_beside=1)


def gemma4_layers(c, slides, where):
    if c["use_bidirectional_attention"] not in (None, "vision"):  # which is for pictures
        raise Refusal(f"{where}: use_bidirectional_attention "
                      f"{c['use_bidirectional_attention']!r} is not supported: only causal models "
                      "are")
    heads, owners = gemma4_heads(c, slides, where), gemma4_owners(c, slides, where)
    embed, n = c.get("hidden_size_per_layer_input", 0), len(slides)
    if embed and c["vocab_size_per_layer_input"] != c["vocab_size"]:
        raise Refusal(f"{where}: vocab_size_per_layer_input {c['vocab_size_per_layer_input']} is "
                      f"not vocab_size, {c['vocab_size']}")
    if n * embed % PANEL:
        raise Refusal(f"{where}: {n} layers with embeddings of {embed} are not supported")
    (kv_heads, head_dim), (window_kv_heads, window_head_dim) = heads
    fields = dict(n_kv_heads=kv_heads, head_dim=head_dim)
    if heads[0] != heads[1]:
        fields.update(window_kv_heads=window_kv_heads, window_head_dim=window_head_dim)
    if embed:
        fields.update(embed_dim=embed, table_scale=math.sqrt(embed),
                      mix_scale=c["hidden_size"] ** -0.5)
    if c.get("enable_moe_block"):
        fields.update(gemma4_experts(c, where))
    wide = c["use_double_wide_mlp"]
    sizes = [dict(zip(("n_kv_heads", "head_dim"), heads[sliding]),
                  hidden_dim=c["intermediate_size"] * (2 if wide and owners[l] != l else 1))
             for l, sliding in enumerate(slides)]
    return Layered(fields, sizes, owners,
                   [gemma4_parts(c, slides, owners, l) for l in range(n)])


def gemma4_rope(c, slides, where):
    """What rotates a layer of that kind; proportional: the first of all frequencies, the rest 0."""
    kind = ("full_attention", "sliding_attention")[slides]
    p = (c["rope_parameters"] or GEMMA4_ROPE).get(kind)
    p = checked_values({} if p is None else p, where, kind)
    rope = p.pop("rope_type", None) or "default"
    share = p.pop("partial_rotary_factor", None)
    share = 1.0 if share is None or rope == "default" else share
    if rope == "factors" and where == "GGUF":
        return dict(rope_type=rope, rope_theta=p["rope_theta"], factors=p["factors"])
    if rope not in ("default", "proportional") or not 0 < share <= 1:
        raise Refusal(f"{where}: {kind}: rope type {rope!r} with a share of {share} is not "
                      f"supported for {c['model_type']}")
    theta, factor = p.pop("rope_theta", None), p.pop("factor", None) or 1.0
    if theta is None or any(x is not None for x in p.values()):
        raise Refusal(f"{where}: {kind}: " + ("rope_theta is missing" if theta is None else
                                              f"rope parameters {sorted(p)} are not supported"))
    return dict(rope_type=rope, rope_theta=theta, share=share,
                factor=factor if rope == "proportional" else 1.0)


def rotates(c, l):
    """SmolLM3, Llama 4: every fourth layer has no rope."""
    if c.get("no_rope_layers"):
        return bool(c["no_rope_layers"][l])
    return "no_rope_layer_interval" not in c or (l + 1) % c["no_rope_layer_interval"] != 0


def window_of(c):
    """The window of the layers that slide, None: there is none, or it is switched off."""
    if "attention_chunk_size" in c:
        return c["attention_chunk_size"]
    return c.get("sliding_window") if c.get("use_sliding_window", True) else None


def all_slide(c, l):
    return window_of(c) is not None


def late_slide(c, l):
    return window_of(c) is not None and l >= c["max_window_layers"]


def unrotated_slide(c, l):
    return window_of(c) is not None and not rotates(c, l)


def rotated_slide(c, l):
    return window_of(c) is not None and rotates(c, l)


# Mixtures of experts.

MOE = dict(num_experts=None, num_local_experts=None, num_experts_per_tok=8, norm_topk_prob=False,
           moe_intermediate_size=768, decoder_sparse_step=1, mlp_only_layers=None)


def moe_fields(c, experts=128):
    said = {c[key] for key in ("num_experts", "num_local_experts") if c.get(key) is not None}
    if len(said) > 1:
        raise Refusal(f"num_experts and num_local_experts differ: {sorted(said)}")
    n = said.pop() if said else experts
    if not 1 <= c["num_experts_per_tok"] <= n <= MAX_EXPERTS:
        raise Refusal(f"{n} experts, of which a token uses {c['num_experts_per_tok']}, are not "
                      f"supported; up to {MAX_EXPERTS} are")
    return dict(n_experts=n, n_used=c["num_experts_per_tok"], expert_dim=c["moe_intermediate_size"],
                shared_dim=c.get("shared_expert_intermediate_size", 0),
                norm_topk=int(c["norm_topk_prob"]))


def has_experts(c, l):
    listed = c["mlp_only_layers"] or ()
    return l not in listed and (l + 1) % c["decoder_sparse_step"] == 0


def moe_parts(attention, experts=EXPERTS):
    """Of a family some of whose layers have experts, the others a dense MLP."""
    return lambda c, l: NORMS + attention + (experts if has_experts(c, l) else GATE_UP + W2)


# Qwen 3.5: gated delta nets, and full attention in every fourth layer.

QWEN35 = dict(
    COMMON, num_key_value_heads=4, head_dim=256, partial_rotary_factor=0.25,
    full_attention_interval=4, attn_output_gate=True, gguf_tiled=False, linear_conv_kernel_dim=4,
    linear_key_head_dim=128, linear_value_head_dim=128, linear_num_key_heads=16,
    linear_num_value_heads=32)
QWEN35_MOE = dict(
    QWEN35, **dict(MOE, norm_topk_prob=True, moe_intermediate_size=512), num_key_value_heads=2,
    intermediate_size=512, shared_expert_intermediate_size=512)
QWEN35_MOE.pop("mlp_only_layers")  # not read by transformers
QWEN35_MOE.pop("decoder_sparse_step")
QWEN3_NEXT = dict(
    QWEN35_MOE, mlp_only_layers=None, decoder_sparse_step=1, intermediate_size=5632,
    num_experts_per_tok=10)
LINEAR_KINDS = {"full_attention", "linear_attention"}


def keeps_state(c, l):
    if c["layer_types"] is not None:
        return c["layer_types"][l] == "linear_attention"
    return (l + 1) % c["full_attention_interval"] != 0


def delta_fields(c):
    k_heads, v_heads = c["linear_num_key_heads"], c["linear_num_value_heads"]
    k_dim, v_dim, conv = (c[f"linear_{what}"] for what in
                          ("key_head_dim", "value_head_dim", "conv_kernel_dim"))
    if v_heads % k_heads or k_dim % 4 or max(k_heads, v_heads, k_dim, v_dim) > 1024:
        raise Refusal(f"delta nets of {k_heads} key heads of {k_dim} and {v_heads} value heads of "
                      f"{v_dim} are not supported")
    if not 2 <= conv <= 8:
        raise Refusal(f"linear_conv_kernel_dim {conv} is not supported, 2 to 8 are")
    if not c["attn_output_gate"]:
        raise Refusal("attn_output_gate is false, and only gated attention is supported here")
    return dict(delta_k_heads=k_heads, delta_v_heads=v_heads, delta_k_dim=k_dim, delta_v_dim=v_dim,
                delta_conv=conv, att_gate=1, **({"delta_tiled": 1} if c["gguf_tiled"] else {}))


def delta_moe_fields(c):
    if not c["norm_topk_prob"]:
        raise Refusal("norm_topk_prob is false, which a qwen3_5_moe model does not read")
    return {**delta_fields(c), **moe_fields(c, 256)}


def delta_parts(feed_forward, delta=DELTA):
    """feed_forward: of all layers, or a function of config and layer."""
    attention = GATED_QKV + WO + QK_NORMS
    norms = [NORMS[0], (*NORMS[1][:2], "post_attention_norm.weight")]
    return lambda c, l: (norms + (delta if keeps_state(c, l) else attention) +
                         (feed_forward(c, l) if callable(feed_forward) else feed_forward))


def next_feed_forward(c, l):
    return EXPERTS + SHARED_EXPERT if has_experts(c, l) else GATE_UP + W2


# Ministral 3: queries grow with their position, and angles are scaled by yarn.

MINISTRAL3 = dict(COMMON, num_key_value_heads=8, head_dim=128, vocab_size=131072, rms_norm_eps=1e-5,
                  max_position_embeddings=262144, sliding_window=None)


def ministral3_fields(c):
    p = {**(c["rope_scaling"] or {}), **(c["rope_parameters"] or {})}
    growth = p.get("llama_4_scaling_beta")
    step = p.get("original_max_position_embeddings") or c["original_max_position_embeddings"]
    if growth is None or step is None or (p.get("rope_type") or p.get("type")) != "yarn":
        raise Refusal("ministral3 needs rope_parameters of type yarn with llama_4_scaling_beta and "
                      "original_max_position_embeddings")
    return dict(query_growth=growth, query_step=step, query_first=0)


# gpt-oss: a window in every other layer, sinks, experts that clamp.

GPT_OSS = dict(
    COMMON, num_key_value_heads=8, head_dim=64, rms_norm_eps=1e-5, rope_theta=150000.0,
    max_position_embeddings=131072, sliding_window=128, attention_bias=True, num_experts=None,
    num_local_experts=None, num_experts_per_tok=4, experts_per_token=None, swiglu_alpha=1.702,
    swiglu_limit=7.0, moe_intermediate_size=None, initial_context_length=None,
    quantization_config=None)
GPT_OSS_ROPE = {  # where config.json says nothing
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096}


def gpt_oss_fields(c):
    for ours, other in (("intermediate_size", "moe_intermediate_size"),
                        ("num_experts_per_tok", "experts_per_token")):
        if c[other] not in (None, c[ours]):
            raise Refusal(f"{ours} and {other} differ: {c[ours]} and {c[other]}")
    for key in ("swiglu_alpha", "swiglu_limit"):
        if not 1e-6 <= c[key] <= 1e6:
            raise Refusal(f"{key} {c[key]:g} is not supported")
    fields = moe_fields(dict(c, norm_topk_prob=True, moe_intermediate_size=c["intermediate_size"]))
    return dict(fields, swiglu_alpha=c["swiglu_alpha"], swiglu_limit=c["swiglu_limit"])


def gpt_oss_parts(c, l):
    norms = [NORMS[0], (*NORMS[1][:2], "post_attention_norm.weight")]
    biases = BIASES + WO_BIAS if c["attention_bias"] else []
    return norms + QKV + WO + biases + [SINKS] + BIASED_EXPERTS


# Llama 4: chunks in the layers that rotate, queries that grow in those that do not, experts.

LLAMA4 = dict(
    COMMON, num_attention_heads=40, num_key_value_heads=8, head_dim=128, vocab_size=202048,
    max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=5e5, intermediate_size=8192,
    intermediate_size_mlp=16384, num_experts_per_tok=1, num_local_experts=16, moe_layers=None,
    interleave_moe_layer_step=1, use_qk_norm=True, no_rope_layers=None, no_rope_layer_interval=4,
    attention_chunk_size=8192, attn_temperature_tuning=True, floor_scale=8192, attn_scale=0.1)


def llama4_fields(c):
    n, used = c["num_local_experts"], c["num_experts_per_tok"]
    if not 1 <= used <= n <= MAX_EXPERTS:
        raise Refusal(f"{n} experts, of which a token uses {used}, are not supported; up to "
                      f"{MAX_EXPERTS} are")
    fields = dict(
        hidden_dim=c["intermediate_size_mlp"], n_experts=n, n_used=used, norm_topk=0, route_input=1,
        expert_dim=c["intermediate_size"], shared_dim=c["intermediate_size"])
    if window_of(c) is not None:
        fields["window_chunks"] = 1
    if c["attn_temperature_tuning"]:
        fields.update(query_growth=c["attn_scale"], query_step=c["floor_scale"], query_first=1)
    return fields


def llama4_parts(c, l):
    mixture = (l in c["moe_layers"] if c["moe_layers"] is not None else
               (l + 1) % c["interleave_moe_layer_step"] == 0)
    return (NORMS + QKV + WO + (UNIT_NORMS if c["use_qk_norm"] and rotates(c, l) else []) +
            (LLAMA4_EXPERTS if mixture else LLAMA4_MLP))


FAMILIES = {
    "llama": Family(NORMS + MATRICES, COMMON, permuted=True),
    "mistral": Family(
        NORMS + MATRICES,
        dict(COMMON, num_key_value_heads=8, sliding_window=4096, max_position_embeddings=131072),
        slides=all_slide, permuted=True),
    "ministral3": Family(
        NORMS + MATRICES, MINISTRAL3, slides=all_slide, permuted=True, fields=ministral3_fields),
    "llama4_text": Family(
        llama4_parts, LLAMA4, slides=rotated_slide, interleaved=True, fields=llama4_fields,
        grows=lambda c, l: not rotates(c, l)),
    "smollm3": Family(
        NORMS + MATRICES,
        dict(WINDOWED, num_key_value_heads=4, rope_theta=2e6, sliding_window=None,
             tie_word_embeddings=True, no_rope_layers=None, no_rope_layer_interval=4),
        slides=unrotated_slide, permuted=True),
    "qwen2": Family(NORMS + MATRICES + BIASES, WINDOWED, slides=late_slide),
    "qwen3": Family(NORMS + MATRICES + QK_NORMS, dict(WINDOWED, head_dim=128), slides=late_slide),
    "qwen3_moe": Family(
        moe_parts(QKV + WO + QK_NORMS),
        dict(WINDOWED, **MOE, num_key_value_heads=4), slides=all_slide, fields=moe_fields),
    "qwen2_moe": Family(
        moe_parts(QKV + WO + BIASES, EXPERTS + SHARED_EXPERT),
        dict(WINDOWED, **dict(MOE, num_experts_per_tok=4, moe_intermediate_size=1408),
             num_key_value_heads=16, qkv_bias=True, shared_expert_intermediate_size=5632),
        slides=late_slide, fields=lambda c: moe_fields(c, 60)),
    "qwen3_5_text": Family(
        delta_parts(GATE_UP + W2), QWEN35, plus_one=True, keeps=keeps_state, fields=delta_fields),
    "qwen3_5_moe_text": Family(
        delta_parts(EXPERTS + SHARED_EXPERT), QWEN35_MOE, plus_one=True, keeps=keeps_state,
        fields=delta_moe_fields),
    "gpt_oss": Family(
        gpt_oss_parts, GPT_OSS, slides=lambda c, l: l % 2 == 0, fields=gpt_oss_fields),
    "qwen3_next": Family(
        delta_parts(next_feed_forward, NEXT_DELTA), QWEN3_NEXT, plus_one=True, keeps=keeps_state,
        fields=lambda c: {**delta_fields(c), **moe_fields(c, 512)}),
    "gemma2": Family(
        GEMMA_NORMS + MATRICES, GEMMA2, slides=lambda c, l: l % 2 == 0, gemma=True,
        plus_one=True),
    "gemma3_text": Family(
        GEMMA_NORMS + MATRICES + QK_NORMS, GEMMA3,
        slides=lambda c, l: (l + 1) % c["sliding_window_pattern"] != 0, gemma=True,
        plus_one=True),
    "gemma4_text": Family(
        None, GEMMA4, slides=gemma4_slides, gemma=True, layered=gemma4_layers),
    "gemma4_unified_text": Family(
        None, GEMMA4_UNIFIED, slides=gemma4_slides, gemma=True, layered=gemma4_layers),
    "phi3": Family(
        NORMS + FUSED, dict(COMMON, rms_norm_eps=1e-5, sliding_window=None), slides=all_slide),
}

REASONS = [  # why others are refused: a pattern of their name, and the reason
    ("gemma.?3n", "AltUp, LAuReL and activation sparsity are not supported"),
    ("moe|mixtral|dbrx|deepseek|jamba", "mixtures of experts of this kind are not supported"),
    ("mamba|rwkv|hyena|recurrent|zamba|lfm", "state-space and recurrent layers are not supported"),
    ("vl$|_vl|llava|mllama|idefics|paligemma|omni|vision",
     "multimodal models other than Gemma 3 and 4 are not supported"),
    ("bert|t5|bart|encoder", "encoders are not supported"),
    ("gpt2|gptj|gpt_neox|opt|bloom|mpt|falcon|phi$|phi2|starcoder|codegen|stablelm",
     "only models with RMS norms, rotary positions and gated MLPs are supported"),
]

# Keys of config.json that change nothing here. Any other key that is set and that the family does
# not read may change results, so it is refused by name.
HARMLESS = set("""
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path
    _sliding_window_pattern architectures
    attention_dropout attn_implementation auto_map begin_suppress_tokens bos_token_id
    bad_words_ids cache_implementation chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id do_sample dtype early_stopping embd_pdrop eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing hidden_dropout id2label initializer_range
    is_decoder is_causal label2id length_penalty mamba_ssm_dtype max_length max_window_layers
    min_length mtp_num_hidden_layers mtp_use_dedicated_embeddings
    model_max_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores
    pad_token_id prefix pretraining_tp problem_type pruned_heads remove_invalid_values
    repetition_penalty resid_pdrop return_dict return_dict_in_generate router_aux_loss_coef
    sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version
    transformers.js_config typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    use_sliding_window
""".split())

ACTS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def family_of(name, table=FAMILIES):
    """The row of an architecture, or the reason why there is none."""
    if isinstance(name, str) and name in table:
        return table[name]
    reasons = [reason + "; " for pattern, reason in REASONS if re.search(pattern, str(name), re.I)]
    known = ", ".join(table)
    raise Refusal(f"architecture {name!r}: {''.join(reasons[:1])}these are supported: {known}")


# What the value of a key must be. A key that is not here is read as text or not at all.
KINDS = {
    "a whole number": lambda v: type(v) is int and 1 <= v <= MOST,
    "a whole number or 0": lambda v: type(v) is int and 0 <= v <= MOST,
    "a whole number up to 9999": lambda v: type(v) is int and 1 <= v <= 9999,
    "a positive number": lambda v: type(v) in (int, float) and 1e-12 <= v <= 1e12,
    "a number above 1": lambda v: type(v) in (int, float) and 1 < v <= 1e12,
    "true or false": lambda v: type(v) is bool,
    "a text": lambda v: type(v) is str,
    "an object": lambda v: type(v) is dict,
    "true or false, or a number": lambda v: type(v) in (bool, int),
    "a list of layers": lambda v: type(v) is list and all(type(x) is int and x >= 0 for x in v),
    "a list of 0 and 1": lambda v: type(v) is list and all(x in (0, 1) for x in v),
    "a list of texts": lambda v: type(v) is list and all(type(x) is str for x in v),
}
KEYS = {key: kind for kind, keys in {
    "a whole number": """
        hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size
        max_position_embeddings original_max_position_embeddings sliding_window
        sliding_window_pattern no_rope_layer_interval num_experts num_local_experts
        full_attention_interval linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim
        linear_num_key_heads linear_num_value_heads
        num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size
        decoder_sparse_step top_k_experts global_head_dim num_global_key_value_heads
        vocab_size_per_layer_input intermediate_size_mlp interleave_moe_layer_step
        attention_chunk_size floor_scale experts_per_token initial_context_length""",
    "a whole number or 0": "max_window_layers num_kv_shared_layers hidden_size_per_layer_input",
    "a whole number up to 9999": "num_hidden_layers",
    "a number above 1": "rope_theta rope_local_base_freq",
    "a positive number": """
        rms_norm_eps partial_rotary_factor query_pre_attn_scalar
        attn_logit_softcapping final_logit_softcapping factor attention_factor beta_fast beta_slow
        mscale mscale_all_dim low_freq_factor high_freq_factor llama_4_scaling_beta
        attn_scale swiglu_alpha swiglu_limit""",
    "true or false": """
        tie_word_embeddings use_sliding_window truncate norm_topk_prob qkv_bias
        attn_output_gate gguf_tiled attention_k_eq_v use_double_wide_mlp enable_moe_block
        use_qk_norm attention_bias""",
    "true or false, or a number": "attn_temperature_tuning",
    "a text": "model_type hidden_act hidden_activation rope_type type use_bidirectional_attention",
    "an object": """
        rope_scaling rope_parameters text_config full_attention sliding_attention
        per_layer_config quantization_config""",
    "a list of layers": "mlp_only_layers moe_layers",
    "a list of 0 and 1": "no_rope_layers",
    "a list of texts": "layer_types",
}.items() for key in keys.split()}
# Keys for which null is a value of its own ("no window"), whatever absence means.
NULLABLE = ("num_key_value_heads", "sliding_window", "attn_logit_softcapping",
            "final_logit_softcapping", "use_bidirectional_attention", "attention_chunk_size")


def check_value(where, key, value, kind):
    if not KINDS[kind](value):
        raise Refusal(f"{where}: {key} is {repr(value)[:60]}, expected {kind}")


# Configs that wrap a language model's: its model_type, and whether embeddings are tied by default
# (None: as they are stored).
WRAPPED = {
    "gemma3": ("gemma3_text", True), "gemma4": ("gemma4_text", True),
    "gemma4_unified": ("gemma4_unified_text", True), "qwen3_5": ("qwen3_5_text", False),
    "qwen3_5_moe": ("qwen3_5_moe_text", False), "mistral3": ("mistral", None),
    "llama4": ("llama4_text", False)}
# Wrappers that hold one of several.
WRAPS_ALSO = {"mistral3": ("ministral3",)}


def text_config(c):
    """The language model's part of a multimodal config, or the config itself."""
    if c.get("model_type") not in WRAPPED:
        return c
    kind, default = WRAPPED[c["model_type"]]
    inner = c.get("text_config", {})
    check_value("config.json", "text_config", inner, "an object")
    if inner.get("model_type") in WRAPS_ALSO.get(c["model_type"], ()):
        kind = inner["model_type"]
    tied = "tie_word_embeddings"
    if default is None and {tied} & {*inner, *c}:
        default = inner.get(tied, c.get(tied))
        inner = {**inner, tied: default}
    if inner.get(tied, default) != c.get(tied, default):
        raise Refusal(f"config.json: {tied} is {c.get(tied, default)}, and "
                      f"{inner.get(tied, default)} in text_config")
    outer = ("eos_token_id", "bos_token_id", *QUANTIZED)
    return {**inner, **{k: c[k] for k in outer if c.get(k)}, "model_type": kind}


QUANTIZED = ("quantization_config", "quantization", "compression_config")


def check_config(c, family, ignored):
    for key in QUANTIZED:
        if c.get(key) and key not in ignored:
            method = c[key].get("quant_method") if isinstance(c[key], dict) else None
            if key in family.config and method == "mxfp4":
                continue
            raise Refusal(f"config.json: {key}: the weights are quantized already "
                          f"({method or 'unknown method'}); take the original weights, or a GGUF")
    known = set(family.config) | HARMLESS | set(ignored)
    if c.get("is_causal") is False and "is_causal" not in ignored:
        raise Refusal("config.json: is_causal is false, and only causal models are supported")
    for key, value in c.items():
        if key not in known and (value is True or value not in (None, 0, "", [], {})):
            raise Refusal(
                f"config.json: {key} = {json.dumps(value)[:60]} is not supported and may change "
                f"results (--ignore-key {key} converts anyway)"
            )


def full_config(config, family, where):
    """All keys that the family reads, each of the right kind. Null means what it means to
    transformers: the default where there is none, and where a key may do without."""
    c = {**family.config, **{k: v for k, v in config.items() if k in family.config}}
    for key, value in c.items():
        if value is MISSING:
            raise Refusal(f"{where}: {key} is missing")
        if value is not None:
            check_value(where, key, value, KEYS[key])
        elif key not in NULLABLE and family.config[key] is not None:
            raise Refusal(f"{where}: {key} is null, expected {KEYS[key]}")
    return dict(c, model_type=config["model_type"])


def layer_slides(c, family, where):
    """[n_layers]: does the layer see a window only."""
    n, kinds = c["num_hidden_layers"], c["layer_types"]
    listed = c.get("no_rope_layers")
    if listed is not None and len(listed) < n and (listed or not family.interleaved):
        raise Refusal(f"{where}: no_rope_layers names {len(c['no_rope_layers'])} of {n} layers")
    slides = [family.slides(c, l) for l in range(n)]
    if family.keeps is not no_slide:
        if kinds is not None and (len(kinds) != n or set(kinds) - LINEAR_KINDS):
            raise Refusal(f"{where}: layer_types {sorted(set(kinds))} for {n} layers")
        if all(family.keeps(c, l) for l in range(n)):
            raise Refusal(f"{where}: no layer attends, which is not supported")
        return slides
    if kinds is not None:
        slide = "chunked_attention" if "attention_chunk_size" in c else "sliding_attention"
        if len(kinds) != n or set(kinds) - {"full_attention", slide}:
            raise Refusal(f"{where}: layer_types {sorted(set(kinds))} for {n} layers")
        named = [kind == slide for kind in kinds]
        if named != slides and family.slides in (no_slide, all_slide):
            raise Refusal(f"{where}: layer_types says which layers slide, and a "
                          f"{c['model_type']} model does not read it")
        slides = named
    if family.layered:  # as transformers does
        slides[-1] = False
    if any(slides) and window_of(c) is None:
        size = "attention_chunk_size" if "attention_chunk_size" in c else "sliding_window"
        raise Refusal(f"{where}: layers slide, and there is no {size} in use")
    return slides


class Model(NamedTuple):
    family: Family
    fields: dict  # metadata of the new file
    windows: list  # [n_layers], 0: all, -1: the layer keeps a state
    ropes: list  # parameters of the different rotations
    layer_rope: list  # [n_layers], which of them, -1: none
    tied: bool
    parts: list  # [n_layers] of each layer
    sizes: list = None  # [n_layers] fields of each layer, where they differ
    grows: list = None  # [n_layers] whether queries grow, where not in all
    owners: list = None  # [n_layers] whose keys and values each reads, where not all their own


def head_fields(c):
    """How many heads there are, and how long each is."""
    heads, dim = c["num_attention_heads"], c["hidden_size"]
    kv_heads, head_dim = c["num_key_value_heads"] or heads, c["head_dim"] or dim // heads
    if heads % kv_heads:
        raise Refusal(f"{heads} attention heads cannot share {kv_heads} key-value heads")
    if head_dim < 2 or heads * head_dim > 1 << 20:
        raise Refusal(f"{heads} attention heads of {head_dim} are not supported")
    return dict(n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim)


PARTIAL = ("phi3", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")


def rotary_dim(c, params, head_dim, where):
    """How many leading dimensions of a head rotate: the same in all layers."""
    shares = {p.pop("partial_rotary_factor") or 1.0 for p in params}
    if shares != {1.0} and (c["model_type"] not in PARTIAL or len(shares) > 1):
        raise Refusal(f"{where}: partial_rotary_factor {shares} is supported for "
                      f"{', '.join(PARTIAL)} only")
    n = int(head_dim * shares.pop() + 1e-6)
    if n % 2 or not 2 <= n <= head_dim:
        raise Refusal(f"{n} rotating dimensions in heads of {head_dim}; an even number is needed")
    return n


def describe(config, ignored=(), yarn=None, where="config.json"):
    """config.json, or what stands for it in a GGUF, as the fields that C reads."""
    family = family_of(config.get("model_type"))
    check_config(config, family, ignored)
    c = full_config(config, family, where)
    act = c["hidden_activation"] if family.gemma else c["hidden_act"]
    if act not in ACTS:
        raise Refusal(f"{where}: activation {act!r} is not supported, {', '.join(ACTS)} are")

    slides = layer_slides(c, family, where)
    layered = family.layered(c, slides, where) if family.layered else None
    heads = head_fields(dict(c, num_key_value_heads=layered.fields["n_kv_heads"],
                             head_dim=layered.fields["head_dim"]) if layered else c)
    if layered:
        by_kind = {kind: dict(gemma4_rope(c, kind, where), dim=layered.sizes[slides.index(kind)]
                              ["head_dim"]) for kind in sorted(set(slides))}
        rotating = heads["head_dim"]
    else:
        by_kind = {kind: rope_params(c, kind, yarn, where) for kind in sorted(set(slides))}
        rotating = rotary_dim(c, by_kind.values(), heads["head_dim"], where)
    params = [by_kind[kind] for kind in slides]
    keeps = [family.keeps(c, l) for l in range(len(slides))]
    used = [p for l, p in enumerate(params) if rotates(c, l) and not keeps[l]]
    ropes = [p for i, p in enumerate(used) if p not in used[:i]] or params[:1]
    scalar = c.get("query_pre_attn_scalar", 1) if family.gemma else heads["head_dim"]
    fields = dict(
        dim=c["hidden_size"], hidden_dim=c["intermediate_size"], n_layers=c["num_hidden_layers"],
        **heads, rotary_dim=rotating, vocab_size=c["vocab_size"], seq_len=trained_length(c, ropes),
        norm_eps=c["rms_norm_eps"], attn_scale=scalar**-0.5,
        embed_scale=math.sqrt(c["hidden_size"]) if family.gemma else 1.0,
        attn_softcap=c.get("attn_logit_softcapping") or 0.0,
        final_softcap=c.get("final_logit_softcapping") or 0.0,
        act=ACTS[act], rope_theta=max(float(p["rope_theta"]) for p in ropes))
    fields.update(family.fields(c))
    if layered:
        fields.update(layered.fields)
    for key in ("norm_eps", "attn_softcap", "final_softcap"):
        if fields[key] > 1e6:
            raise Refusal(f"{where}: {key} {fields[key]:g} is not supported, at most 1e6 is")
    window = window_of(c) or 0
    return Model(
        family, fields,
        [-1 if kept else window if sliding else 0 for kept, sliding in zip(keeps, slides)], ropes,
        [ropes.index(p) if rotates(c, l) and not keeps[l] else -1 for l, p in enumerate(params)],
        bool(c["tie_word_embeddings"]),
        layered.parts if layered else [
            family.parts(c, l) if callable(family.parts) else family.parts
            for l in range(c["num_hidden_layers"])],
        layered and layered.sizes,
        [int(family.grows(c, l)) for l in range(len(slides))] if family.grows else None,
        layered and layered.owners)


GGUF_FAMILIES = {
    "llama": "llama", "smollm3": "smollm3", "qwen2": "qwen2", "qwen3": "qwen3",
    "gemma2": "gemma2", "gemma3": "gemma3_text", "phi3": "phi3", "qwen3moe": "qwen3_moe",
    "qwen35": "qwen3_5_text", "qwen35moe": "qwen3_5_moe_text", "mistral3": "ministral3",
    "gpt-oss": "gpt_oss", "qwen3next": "qwen3_next", "llama4": "llama4_text",
    "gemma4": "gemma4_text",
}
GGUF_KEYS = {  # ARCH.key -> key of config.json whose value it has, "": changes nothing
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "attention.value_length": "head_dim", "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq", "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping", "rope.dimension_count": "head_dim",
    "rope.scaling.type": "rope_type", "rope.scaling.factor": "factor",
    "rope.scale_linear": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow",
    "attention.causal": "use_sliding_window", "rope.scaling.finetuned": "", "vocab_size": "",
    "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "ssm.conv_kernel": "linear_conv_kernel_dim", "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads", "ssm.time_step_rank": "linear_num_value_heads",
    "ssm.inner_size": "linear_value_head_dim", "full_attention_interval": "full_attention_interval",
    "rope.dimension_sections": "", "attention.temperature_scale": "llama_4_scaling_beta",
    "rope.scaling.yarn_log_multiplier": "mscale_all_dim", "attention.recurrent_layers": "",
}
GGUF_RENAMED = {  # where the same key stands for another one's value
    ("llama4", "feed_forward_length"): "intermediate_size_mlp",
    ("llama4", "expert_feed_forward_length"): "intermediate_size",
    ("llama4", "expert_count"): "num_local_experts",
    ("llama4", "interleave_moe_layer_step"): "interleave_moe_layer_step",
    ("gemma4", "attention.key_length_swa"): "head_dim",
    ("gemma4", "attention.value_length_swa"): "head_dim",
    ("gemma4", "rope.dimension_count_swa"): "head_dim",
    ("gemma4", "attention.shared_kv_layers"): "num_kv_shared_layers",
    ("gemma4", "embedding_length_per_layer_input"): "hidden_size_per_layer_input",
    ("gemma4", "expert_used_count"): "top_k_experts",
}
GGUF_ONLY = {  # those that other architectures do not read
    "attention.temperature_scale": ("mistral3",), "rope.scaling.yarn_log_multiplier": ("mistral3",),
    "attention.recurrent_layers": ("qwen35", "qwen35moe", "qwen3next"),
}
GGUF_LISTS = ("attention.sliding_window_pattern", "rope.dimension_sections",
              "attention.recurrent_layers")
GEMMA4_LISTS = ("feed_forward_length", "attention.head_count_kv")
GGUF_FROZEN = 1e30  # what the frequencies are divided by that do not turn
GGUF_NEEDED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count",
               "context_length", "attention.layer_norm_rms_epsilon")
# Gemma models that scale attention by the width per head, not by head_dim: the 27B ones. A GGUF
# does not say; llama.cpp goes by the number of layers as well.
GEMMA_27B = {"gemma2": 46, "gemma3": 62}
# Layers of the Phi-3 models of 4,096 tokens, whose first GGUFs leave out their window of 2,047.
PHI3_4K = (32, 40)


def gguf_key(arch, key):
    return GGUF_RENAMED.get((arch, key), GGUF_KEYS.get(key))


def gguf_values(meta, arch):
    """ARCH.key without ARCH -> value, each of the right kind. Layers may have a list: of one value.
    What is 0 is absent."""
    values = {k[len(arch) + 1 :]: v for k, v in meta.items() if k.startswith(arch + ".")}
    reads = FAMILIES[GGUF_FAMILIES[arch]].config
    lists = GGUF_LISTS + (GEMMA4_LISTS if arch == "gemma4" else ())
    for key, value in values.items():
        named = gguf_key(arch, key)
        known = named is not None and (
            named in reads or not key.startswith(("expert_", "ssm.", "full_")))
        if not (known and arch in GGUF_ONLY.get(key, (arch,))) and value:
            raise Refusal(f"{arch}.{key} = {str(value)[:60]} is not supported")
        if isinstance(value, list) and key not in lists:
            if len(set(map(str, value))) != 1 or len(value) != values.get("block_count"):
                raise Refusal(f"{arch}.{key}: layers that differ from each other are not supported")
            values[key] = value[0]
    values = {k: v for k, v in values.items() if v != 0 or v is False}
    for key in GGUF_NEEDED:
        if key == "feed_forward_length" and reads.get(gguf_key(arch, key)):
            continue  # all layers have experts
        if key not in values:
            raise Refusal(f"{arch}.{key} is missing or 0")
    for key, value in values.items():
        if gguf_key(arch, key) and not isinstance(value, list):
            check_value("GGUF", f"{arch}.{key}", value, KEYS[gguf_key(arch, key)])
    return values


def gguf_config(meta, tensors):
    """What config.json would say, from a GGUF's metadata: what is absent is as in llama.cpp."""
    arch = meta.get("general.architecture")
    family = family_of(arch, GGUF_FAMILIES)
    own = gguf_values(meta, arch)
    if own.get("attention.causal") is False:
        raise Refusal(f"{arch}.attention.causal is false, and only causal models are supported")
    if "token_embd.weight" not in tensors:
        raise Refusal("tensor token_embd.weight is missing: no model, or only its vocabulary")
    heads, layers = own["attention.head_count"], own["block_count"]
    width = own["embedding_length"] // heads
    head_dim = own.get("attention.key_length", width)
    if own.get("attention.value_length", width) != head_dim:
        raise Refusal("keys and values of different lengths are not supported")
    read = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count",
            "context_length", "attention.layer_norm_rms_epsilon", "attention.sliding_window",
            "attn_logit_softcapping", "final_logit_softcapping", "rope.freq_base_swa",
            "expert_count", "expert_used_count", "expert_feed_forward_length",
            "expert_shared_feed_forward_length", "ssm.conv_kernel", "ssm.state_size",
            "ssm.group_count", "ssm.time_step_rank", "full_attention_interval",
            "interleave_moe_layer_step")
    c = {gguf_key(arch, key): own[key] for key in read if key in own}
    c.update(model_type="mistral" if arch == "llama" and "sliding_window" in c else family,
             num_key_value_heads=own.get("attention.head_count_kv", heads), head_dim=head_dim,
             vocab_size=tensors["token_embd.weight"].shape[0],
             tie_word_embeddings="output.weight" not in tensors,
             rope_theta=own.get("rope.freq_base", 10000.0),
             rope_scaling=gguf_rope_scaling(own, tensors))
    turning = own.get("rope.dimension_count", head_dim)
    if turning != head_dim:
        c["partial_rotary_factor"] = turning / head_dim
    if "ssm.inner_size" in own:
        c["linear_value_head_dim"] = own["ssm.inner_size"] // own.get("ssm.time_step_rank", 1)
        c["gguf_tiled"] = (arch != "qwen3next" and
                           c["linear_num_value_heads"] != c["linear_num_key_heads"])
    if arch == "mistral3" and "attention.temperature_scale" not in own:  # Mistral Small 3.1
        c["model_type"] = "llama"
    if arch == "llama4":  # chunks, growth and layers without rope are not said: as published
        if "llama4.attention.sliding_window" in meta:
            raise Refusal("llama4.attention.sliding_window: chunks of other than 8192 are not "
                          "supported")
        c["use_qk_norm"] = c["num_local_experts"] != 128
    if arch == "qwen3moe":  # llama.cpp knows no other
        c["norm_topk_prob"] = True
    if arch == "gpt-oss" and c["rope_scaling"]:  # a GGUF has no place for it
        c["rope_scaling"].setdefault("truncate", False)
    if arch in GEMMA_27B:
        c["query_pre_attn_scalar"] = width if layers == GEMMA_27B[arch] else head_dim
    said = "phi3.attention.sliding_window" in meta  # 0 says that there is none
    if arch == "phi3" and not said and layers in PHI3_4K and own["context_length"] == 4096:
        c["sliding_window"] = 2047
    c.update(gguf_layer_types(arch, own, layers))
    return gguf_gemma4(c, meta, own, tensors) if arch == "gemma4" else c


def gguf_layers(own, key, default=None):
    """[n_layers]: a value of a Gemma 4, which is one or a list."""
    value = own.get(key, default)
    values = value if isinstance(value, list) else [value] * own["block_count"]
    if len(values) != own["block_count"]:
        raise Refusal(f"gemma4.{key} has {len(values)} values for {own['block_count']} layers")
    for x in values:
        check_value("GGUF", f"gemma4.{key}", x, "a whole number")
    return values


def gguf_gemma4(c, meta, own, tensors):
    """The same of a Gemma 4, whose layers differ from each other."""
    for key in ("attention.key_length", "attention.key_length_swa",
                "attention.sliding_window_pattern"):
        if key not in own:
            raise Refusal(f"gemma4.{key} is missing or 0")
    dims = own["attention.key_length"], own["attention.key_length_swa"]
    for key, dim in (("attention.value_length_swa", dims[1]), ("rope.dimension_count", dims[0]),
                     ("rope.dimension_count_swa", dims[1])):
        if own.get(key, dim) != dim:
            raise Refusal(f"gemma4.{key} = {own[key]} is not supported, {dim} is")
    freqs = tensors.get("rope_freqs.weight")
    if freqs is None:
        raise Refusal("tensor rope_freqs.weight is missing: which frequencies turn is not known")
    n, shared = own["block_count"], own.get("attention.shared_kv_layers", 0)
    slides = [kind == "sliding_attention" for kind in c["layer_types"]]
    if len(slides) != n or slides[-1]:
        raise Refusal(f"gemma4.attention.sliding_window_pattern {slides} for {n} layers, of which "
                      "the last one has to see all")
    kv_heads = gguf_layers(own, "attention.head_count_kv", own["attention.head_count"])
    widths = gguf_layers(own, "feed_forward_length")
    wide = widths[0] != widths[-1]
    if widths != [widths[0] * (2 if wide and l >= n - shared else 1) for l in range(n)]:
        raise Refusal(f"gemma4.feed_forward_length {str(widths)[:60]} is not supported")
    table = tensors.get("per_layer_token_embd.weight")
    c.update(
        intermediate_size=widths[0], use_double_wide_mlp=wide, num_kv_shared_layers=shared,
        num_key_value_heads=kv_heads[0], head_dim=dims[1], rope_scaling=None,
        per_layer_config={str(l): {"head_dim": dims[s], "num_key_value_heads": kv_heads[l]}
                          for l, s in enumerate(slides)},
        attention_k_eq_v=any(f"blk.{l}.attn_v.weight" not in tensors
                             for l in range(n - shared) if not slides[l]),
        hidden_size_per_layer_input=own.get("embedding_length_per_layer_input", 0),
        vocab_size_per_layer_input=c["vocab_size"] if table is None else table.shape[0],
        final_logit_softcapping=meta.get("gemma4.final_logit_softcapping", 30.0) or None,
        rope_parameters={
            "sliding_attention": {"rope_theta": own.get("rope.freq_base_swa", 1e4)},
            "full_attention": {
                "rope_type": "factors", "rope_theta": own.get("rope.freq_base", 1e4),
                "factors": [x if x < GGUF_FROZEN else math.inf for x in freqs.vector().tolist()]}})
    if "expert_count" in own:
        c.update(enable_moe_block=True, top_k_experts=own.get("expert_used_count"))
    return {k: v for k, v in c.items() if k not in ("rope_local_base_freq", "num_experts_per_tok")}


def gguf_layer_types(arch, own, layers):
    """Which layers see a window only, or keep a state. Gemma 3 without a window has none of them."""
    recurrent = own.get("attention.recurrent_layers")
    if recurrent is not None:
        if not isinstance(recurrent, list) or not all(type(x) is bool for x in recurrent):
            raise Refusal(f"{arch}.attention.recurrent_layers is {repr(recurrent)[:60]}, expected "
                          "true or false for each layer")
        kinds = ("full_attention", "linear_attention")
        return {"layer_types": [kinds[keeps] for keeps in recurrent]}
    pattern = own.get("attention.sliding_window_pattern")
    if arch == "gemma3" and "attention.sliding_window" not in own:
        pattern = [False] * layers
    if pattern is None:
        return {}
    if isinstance(pattern, list) and not all(type(x) in (int, bool) for x in pattern):
        raise Refusal(f"{arch}.attention.sliding_window_pattern holds {repr(pattern)[:60]}")
    if not isinstance(pattern, list):
        pattern = [l % pattern < pattern - 1 for l in range(layers)]
    kinds = ("full_attention", "sliding_attention")
    return {"layer_types": [kinds[bool(slides)] for slides in pattern]}


def gguf_rope_scaling(own, tensors):
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))
    kind = own.get("rope.scaling.type", "linear")
    if any(".rope_factors_" in f".{name}" for name in tensors):
        return {"rope_type": "longrope"}
    if "rope_freqs.weight" in tensors:  # llama3 scaling, worked out by the converter
        if kind not in ("none", "linear") or (kind == "linear" and factor != 1):
            raise Refusal(f"rope_freqs.weight and rope scaling {kind!r} together are not supported")
        return {"rope_type": "factors", "factors": tensors["rope_freqs.weight"].vector().tolist()}
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = own.get("rope.scaling.original_context_length", own["context_length"])
        scaling["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            scaling[name] = own.get("rope.scaling.yarn_" + name)
        if "rope.scaling.yarn_log_multiplier" in own:
            scaling.update(mscale=1.0, mscale_all_dim=own["rope.scaling.yarn_log_multiplier"])
        if "attention.temperature_scale" in own:
            scaling["llama_4_scaling_beta"] = own["attention.temperature_scale"]
    return scaling


def unpermuted(n_heads, rows):
    """llama.cpp interleaves the halves of each head of q and k; this order puts them back."""
    return np.arange(rows).reshape(n_heads, rows // n_heads // 2, 2).swapaxes(1, 2).reshape(-1)


class Weights:
    """Source tensors by our names; knows which have been used."""

    TOP = [
        ("tok_embed", "embed_tokens.weight", "token_embd.weight"),
        ("rms_final", "norm.weight", "output_norm.weight"),
        ("wcls", "lm_head.weight", "output.weight"),
    ]
    IGNORED = (r"rotary_emb\.inv_freq$|(^|\.)(vision_tower|audio_tower|embed_vision|embed_audio|"
               r"multi_modal_projector|visual|vision_model)\.|^rope_freqs\.|^mtp\.")

    def __init__(self, tensors, gguf, model):
        self.tensors, self.gguf, self.model = tensors, gguf, model
        f = dict(model.fields, one=1)
        f["embed_row"] = f["n_layers"] * f.get("embed_dim", 0)
        if "delta_conv" in f:
            k, v = (f[f"delta_{x}_heads"] * f[f"delta_{x}_dim"] for x in "kv")
            f.update(delta_channels=2 * k + v, delta_v=v)
        self.sizes = [dict(f, **own) for own in model.sizes or [{}] * f["n_layers"]]
        for s in self.sizes:
            s.update(q_dim=s["n_heads"] * s["head_dim"], kv_dim=s["n_kv_heads"] * s["head_dim"])
        self.taken = {}  # name in the source -> rows used
        embed = [n for n in tensors if n.endswith("embed_tokens.weight")]
        head = [n for n in tensors if n.endswith("lm_head.weight")]
        self.prefix = embed[0][: -len("embed_tokens.weight")] if embed else "model."
        self.head = head[0] if head else "lm_head.weight"

    def source_name(self, part, layer=None):
        ours, hf, gguf = part
        if self.gguf:
            beside = layer is None or gguf[0] == "^"
            return gguf.lstrip("^") if beside else f"blk.{layer}.{gguf}"
        if ours == "wcls":  # stands beside the model, not in it
            return self.head
        if hf[0] == "^":
            return self.prefix + hf[1:]
        return self.prefix + (hf if layer is None else f"layers.{layer}.{hf}")

    def get(self, part, layer=None):
        """The tensor of a part, checked against the config."""
        name, sizes = self.source_name(part, layer), self.sizes[layer or 0]
        shape = tuple(sizes[f] for f in SHAPES[part[0]])
        t = self.tensors.get(name)
        if t is None:
            raise Refusal(f"tensor {name} is missing, expected {list(shape)}")
        readable = self.gguf or t.kind in PLAIN or isinstance(t, Blocks)
        if t.kind in NO_WEIGHTS or not readable:
            raise Refusal(f"tensor {name}: dtype {t.kind} is not supported, {', '.join(PLAIN)} are")
        if t.shape in ((1, *shape), (shape[0], 1, *shape[1:])):  # one row, or one input channel
            t = t.reshaped(shape)
        if "att_gate" in sizes and part[0] in ("wq", "wg"):
            return self.gated(t, part[0], sizes)
        if name.endswith(GROUPED):
            return self.grouped(t, part[0], sizes)
        begin = self.taken.get(name, 0)
        end = begin + (shape[0] if len(shape) == 2 else 1)
        if t.shape[1:] != shape[1:] or end > t.n_rows or (len(shape) == 1 and t.shape != shape):
            raise Refusal(f"tensor {name}: expected {list(shape)}, found {list(t.shape)}")
        self.taken[name] = end
        if len(shape) == 1:
            return t
        family = self.model.family
        if part[0] in ("wq", "wk") and (family.interleaved or (self.gguf and family.permuted)):
            n = sizes["n_heads" if part[0] == "wq" else "n_kv_heads"]
            return t.pick(begin + unpermuted(n, shape[0]))
        return t if end - begin == t.n_rows else t.pick(np.arange(begin, end))

    def gated(self, t, ours, sizes):
        """Queries or gates of q_proj, whose rows are each head's query and then its gate."""
        heads, rows = sizes["n_heads"], sizes["head_dim"]
        if t.shape != (2 * heads * rows, sizes["dim"]):
            raise Refusal(f"tensor {t.name}: expected {[2 * heads * rows, sizes['dim']]}, found "
                          f"{list(t.shape)}")
        self.taken[t.name] = t.n_rows
        order = np.arange(t.n_rows).reshape(heads, 2, rows)[:, int(ours == "wg")]
        return t.pick(order.reshape(-1))

    def grouped(self, t, ours, sizes):
        """Some rows of each key head: its q, k, values and gates, or its betas and decays."""
        heads, dim = sizes["delta_k_heads"], sizes["dim"]
        each = sizes["delta_v_heads"] // heads
        k, v = sizes["delta_k_dim"], each * sizes["delta_v_dim"]
        lengths = dict(q=k, k=k, v=v, z=v)
        if ours in ("delta.a", "delta.b"):
            lengths = dict(b=each, a=each)
        rows = sum(lengths.values())
        if t.shape != (heads * rows, dim):
            raise Refusal(f"tensor {t.name}: expected {[heads * rows, dim]}, found {list(t.shape)}")
        self.taken[t.name] = t.n_rows
        cuts = np.split(np.arange(t.n_rows).reshape(heads, rows),
                        np.cumsum(list(lengths.values()))[:-1], axis=1)
        found = dict(zip(lengths, cuts))
        return t.pick(np.concatenate([found[x].reshape(-1) for x in ours[len("delta."):]]))

    def stack(self, part, layer):
        """The tensors of all experts, one for each: from one tensor each, or out of one for all."""
        sizes = self.sizes[layer or 0]
        shape = tuple(sizes[f] for f in SHAPES[part[0]])
        n = sizes["n_experts"]
        whole, piece, pieces = STACKS[part[0]]
        if "*" not in part[1] and not self.gguf:
            return self.columns(part, layer, shape, piece, pieces)
        whole = self.source_name((part[0], part[1].partition("*")[0] + whole, part[2]), layer)
        if whole not in self.tensors and not self.gguf:
            names = [(part[0], part[1].replace("*", str(e)), part[2]) for e in range(n)]
            return [self.get(name, layer) for name in names]
        if self.gguf:
            fused = self.source_name((part[0], None, "ffn_gate_up_exps.weight"), layer)
            if pieces == 2 and whole not in self.tensors and fused in self.tensors:
                whole = fused
            else:
                piece, pieces = 0, 1
        t, wanted = self.tensors.get(whole), (n, pieces * shape[0], shape[1])
        if t is None:
            raise Refusal(f"tensor {whole} is missing, expected {list(wanted)}")
        if t.kind in NO_WEIGHTS or (t.kind not in PLAIN and not self.gguf):
            raise Refusal(f"tensor {whole}: dtype {t.kind} is not supported, {', '.join(PLAIN)} are")
        if t.shape != wanted:
            raise Refusal(f"tensor {whole}: expected {list(wanted)}, found {list(t.shape)}")
        self.taken[whole] = t.n_rows
        rows = t.reshaped((n * wanted[1], wanted[2]))
        return [rows.pick((e * pieces + piece) * shape[0] + np.arange(shape[0])) for e in range(n)]

    def columns(self, part, layer, shape, piece, pieces):
        """The same out of a tensor [experts][inputs][outputs]."""
        name, n = self.source_name(part, layer), self.sizes[layer]["n_experts"]
        t, wanted = self.tensors.get(name), (n, shape[1], pieces * shape[0])
        if t is None or t.shape != wanted:
            raise Refusal(f"tensor {name}: expected {list(wanted)}, found "
                          f"{list(t.shape) if t else 'none'}")
        if t.kind not in PLAIN:
            raise Refusal(f"tensor {name}: dtype {t.kind} is not supported, {', '.join(PLAIN)} are")
        self.taken[name] = t.n_rows
        return [Columns(t, e, piece * shape[0], n=shape[0]) for e in range(n)]

    def unread(self):
        """Keys and values of layers that read those of others: files may have them all the same."""
        owners = self.model.owners or []
        return {self.source_name(part, l) for l, owner in enumerate(owners) if owner != l
                for part in QKV[1:] + QK_NORMS[1:] + [V_NORM]}

    def check_all_used(self):
        unread = self.unread()
        for name, t in self.tensors.items():
            if name in self.taken and self.taken[name] != t.n_rows:
                raise Refusal(
                    f"tensor {name}: {t.n_rows} rows, expected {self.taken[name]} from the config"
                )
            if name not in self.taken and not re.search(self.IGNORED, name) and name not in unread:
                raise Refusal(f"tensor {name} is not known, so the results would be wrong")

    def head_is_tied(self):
        """True when there is no output matrix of its own. A stored copy must be a copy."""
        embed, _, head = (self.tensors.get(self.source_name(part)) for part in self.TOP)
        if self.model.tied and head is not None and embed is not None:
            if not same_bits(embed, head):
                raise Refusal(f"config.json ties the output matrix, but {head.name} differs")
            self.taken[head.name] = head.n_rows
        return self.model.tied


def same_bits(t, u):
    if (t.kind, t.shape) != (u.kind, u.shape):
        return False
    step = max(1, SLICE // t.n_cols)
    spans = [(a, min(a + step, t.n_rows)) for a in range(0, t.n_rows, step)]
    return all((t.raw(a, b) == u.raw(a, b)).all() for a, b in spans)


# ---- 3. rope -------------------------------------------------------------------------------------

SCALINGS = {  # the parameters each type of scaling reads
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
             "truncate"},
    "factors": {"factors"},
}


# Families that take some of them only.
TYPES_OF = {"phi3": ("default",), "llama4_text": ("default", "llama3", "factors")}


def rope_params(c, slides, yarn, where):
    """What rotates a layer, in one flat dict, from either layout of config.json and from both."""
    layered = "rope_local_base_freq" in c  # Gemma 3: rope_scaling is for full attention alone
    old, new = dict(c["rope_scaling"] or {}), dict(c["rope_parameters"] or {})
    if c["model_type"] == "gpt_oss" and not old and not new:
        old = dict(GPT_OSS_ROPE)
    top = {k: c[k] for k in ("rope_theta", "partial_rotary_factor")}
    if layered:
        kinds = ("full_attention", "sliding_attention")
        both = {kind: checked_values(new.pop(kind, None) or {}, where, kind) for kind in kinds}
        if "type" in old and old["type"] != old.get("rope_type", "default"):
            raise Refusal(f"{where}: the type of rope_scaling must be called rope_type in Gemma 3")
        both[kinds[0]].update(old)
        for key, value in new.items():
            if value is not None:
                raise Refusal(f"{where}: rope_parameters: {key} = {value!r} beside layer types")
        top["rope_theta"] = c["rope_local_base_freq"] if slides else c["rope_theta"]
        return checked_rope({**top, **both[kinds[slides]]}, c, yarn, where)
    said = [checked_rope({**top, **p}, c, yarn, where) for p in (old, new) if p]
    if len(said) == 2 and said[0] != said[1]:
        raise Refusal(f"{where}: rope_scaling {json.dumps(old)[:90]} and rope_parameters "
                      f"{json.dumps(new)[:90]} say different things; keep one")
    return said[0] if said else checked_rope(top, c, yarn, where)


def checked_values(p, where, what):
    """A dict whose values are of the right kind. Scaling stands for any object of parameters."""
    check_value(where, what, p, "an object")
    for key, value in p.items():
        if value is not None and key in KEYS:
            check_value(where, key, value, KEYS[key])
    return dict(p)


def checked_rope(p, c, yarn, where):
    """One set of parameters: those of its type, all of them, and no others."""
    p = checked_values(p, where, "rope_scaling")
    if c["model_type"] == "ministral3":  # it has no meaning there, and describe() has the other
        p = {k: v for k, v in p.items()
             if k not in ("max_position_embeddings", "llama_4_scaling_beta")}
    if c["model_type"] in ("qwen3_5_text", "qwen3_5_moe_text"):  # of pictures; text counts one way
        p = {k: v for k, v in p.items() if k not in ("mrope_section", "mrope_interleaved")}
    kind = p.get("rope_type") or p.pop("type", None) or "default"
    if p.pop("type", kind) not in (kind, None):
        raise Refusal(f"{where}: rope_type and type of the rope scaling differ")
    if kind not in SCALINGS or kind not in TYPES_OF.get(c["model_type"], SCALINGS):
        raise Refusal(f"{where}: rope scaling {kind!r} is not supported for {c['model_type']}")
    known = {"rope_theta", "rope_type", "partial_rotary_factor", "finetuned",
             "original_max_position_embeddings", *SCALINGS[kind]}
    for key, value in p.items():
        if key not in known and value is not None:
            raise Refusal(f"{where}: rope parameter {key} of scaling {kind!r} is not supported")
    p = {k: v for k, v in p.items() if v is not None and k != "finetuned"}
    p.update(rope_type=kind, partial_rotary_factor=p.get("partial_rotary_factor"))
    if "rope_theta" not in p:
        raise Refusal(f"{where}: rope_theta is null")
    if yarn:
        if c["model_type"] not in ("qwen2", "qwen3", "qwen3_moe") or kind != "default":
            raise Refusal("--yarn is for Qwen models without a scaling of their own")
        original = min(32768, c["max_position_embeddings"])
        return dict(p, rope_type="yarn", factor=yarn, original_max_position_embeddings=original)
    for key in ("factor", "low_freq_factor", "high_freq_factor"):
        if key in SCALINGS[kind] and key not in p:
            raise Refusal(f"{where}: rope scaling {kind!r} without a {key}")
    if kind == "llama3" and p["high_freq_factor"] < p["low_freq_factor"]:
        raise Refusal(f"{where}: rope scaling: high_freq_factor is below low_freq_factor")
    return with_original_length(p, c, where)


def with_original_length(p, c, where):
    """The length that was trained before the scaling, which stands in one of three places."""
    key = "original_max_position_embeddings"
    if p["rope_type"] not in ("llama3", "yarn"):
        return {k: v for k, v in p.items() if k != key}
    said = {n for n in (p.get(key), c[key]) if n is not None}
    if len(said) > 1 or ("rope_local_base_freq" in c and key not in p and said):
        raise Refusal(f"{where}: {key} of the rope scaling and that of the model differ")
    return {**p, key: said.pop() if said else c["max_position_embeddings"]}


def trained_length(c, ropes):
    """max_position_embeddings, or what yarn stretches it to."""
    longest = c["max_position_embeddings"]
    for p in ropes:
        if p["rope_type"] == "yarn":
            longest = max(longest, int(p["factor"] * p["original_max_position_embeddings"]))
    if longest > MOST:
        raise Refusal(f"a context of {longest} tokens is not supported, at most {MOST} is")
    return longest


def yarn_ramp(p, dim):
    """[dim/2]: 0 where frequencies stay, 1 where they are divided (arXiv 2309.00071)."""
    theta, length = p["rope_theta"], p["original_max_position_embeddings"]

    def turning(rotations):  # the dimension that turns this often over the trained length
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turning(p.get("beta_fast") or 32), turning(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    return np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)


def yarn_scale(p):
    def mscale(weight):
        return 1.0 if p["factor"] <= 1 else 0.1 * weight * math.log(p["factor"]) + 1.0

    if p.get("attention_factor") is not None:
        return p["attention_factor"]
    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(p["mscale"]) / mscale(p["mscale_all_dim"])
    return mscale(1.0)


def rope_table(p, dim):
    """-> inverse frequencies [dim/2], factor of cos and sin; in float32, as in transformers. Only
    the power is taken in float64 and rounded: float32 powers differ from machine to machine."""
    f32 = np.float32
    share = np.arange(0, dim, 2, dtype=f32) / f32(dim)
    wave = np.power(float(p["rope_theta"]), share.astype(np.float64)).astype(f32)
    inv, kind, factor = f32(1) / wave, p["rope_type"], p.get("factor")
    if kind == "linear":
        inv = inv / f32(factor)
    elif kind == "proportional":
        turning = int(p["share"] * dim // 2)
        inv = np.where(np.arange(dim // 2) < turning, inv, f32(0)) / f32(factor)
    elif kind == "factors":
        if len(p["factors"]) != len(inv):
            raise Refusal(f"rope_freqs.weight: expected [{len(inv)}], found [{len(p['factors'])}]")
        if min(p["factors"]) <= 0:
            raise Refusal(f"rope_freqs.weight holds {min(p['factors'])}, expected numbers above 0")
        inv = inv / np.asarray(p["factors"], f32)
    elif kind == "llama3":
        low, high = p["low_freq_factor"], p["high_freq_factor"]
        turns = p["original_max_position_embeddings"] / (2 * np.pi / inv)
        # 0: slow, divided; 1: fast, kept. Llama 4's two factors are the same.
        smooth = np.clip((turns - low) / (high - low), 0, 1) if high > low else turns >= low
        inv = (1 - smooth) * inv / factor + smooth * inv
    elif kind == "yarn":
        ramp = yarn_ramp(p, dim)
        inv = f32(1) / (f32(factor) * wave) * ramp + inv * (1 - ramp)
        return inv.astype(f32), yarn_scale(p)
    return inv.astype(f32), 1.0


# ---- 4. panels -----------------------------------------------------------------------------------

K = {"f32": 1, "f16": 2, "bf16": 2, "q8": 4, "q4": 8}  # columns of a row in a 64-byte line
DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8": "I8", "q4": "U8"}
ITEM = {"F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
# Types of a GGUF whose values a type of ours holds as they are.
HELD = {"q8": ("Q8_0", "Q4_0", "Q5_0", "MXFP4"), "q4": ("Q4_0", "Q4_1")}
KEPT = {"F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "q8", "Q4_0": "q4", "Q4_1": "q4"}


def up(n, multiple):
    return (n + multiple - 1) // multiple * multiple


def padded(x, rows, cols):
    if x.shape == (rows, cols):
        return x
    out = np.zeros((rows, cols), x.dtype)
    out[: x.shape[0], : x.shape[1]] = x
    return out


def to_panels(x, k):
    """[rows][cols] -> [rows/16][cols/k][16][k]; rows and cols are padded already."""
    rows, cols = x.shape
    return x.reshape(rows // PANEL, PANEL, cols // k, k).transpose(0, 2, 1, 3)


def nibble_panels(n):
    """4-bit codes [rows][cols] -> bytes [rows/16][cols/8][16][4], column 4 + b above column b."""
    rows, cols = n.shape
    n = n.reshape(rows, cols // 8, 2, 4)
    return to_panels((n[:, :, 0] | n[:, :, 1] << 4).reshape(rows, cols // 2), 4)


def to_f16(x, what):
    with np.errstate(over="ignore"):
        y = x.astype(np.float16)
    if not np.isfinite(y).all():
        raise Refusal(f"tensor {what} holds values too large for 16-bit floats; try --type bf16")
    return y


def to_bf16(x, what):
    """Rounded to nearest even, as uint16."""
    u = x.view(np.uint32)
    y = ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)
    if (y & 0x7F80 == 0x7F80).any():
        raise Refusal(f"tensor {what} holds values too large for 16-bit floats; try --type f32")
    return y


def quantize_q8(x, name):
    """x [rows][cols], cols a multiple of 32 -> int8 codes, f16 scales [rows][cols/32]."""
    g = x.reshape(len(x), -1, GROUP)
    scale = to_f16(np.abs(g).max(-1) / np.float32(127), name)
    step = scale.astype(np.float32)
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    q = np.clip(np.rint(g * inverse[..., None]), -127, 127)
    return q.astype(np.int8).reshape(x.shape), scale


# How many of 15 steps to leave off below and above a group's range: outliers may be clipped.
CUTS = ((0, 0), (0.5, 0.5), (1, 1), (1.5, 1.5), (0, 1), (1, 0))


def fit_line(g, code, mean):
    """Least squares of g ~ scale * code + offset per row -> scale, offset, squared error less the
    variance of g, which is the same for every code."""
    average = code.mean(-1, keepdims=True)
    power = np.einsum("rk,rk->r", code, code)[:, None] - GROUP * average * average
    common = np.einsum("rk,rk->r", code, g)[:, None] - GROUP * average * mean
    scale = np.divide(common, power, out=np.zeros_like(power), where=power > 0)
    return scale, mean - scale * average, -common * scale


def nibbles(g, scale, offset):
    """round((g - offset) / scale) in 0..15; 0 where scale is 0."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    code = (g - offset) * inverse
    np.rint(code, out=code)
    return np.clip(code, 0, 15, out=code)


def quantize_groups(g, name):
    """g [groups][32] -> codes 0..15, f16 scales and offsets [groups][1]. The best of a few ranges
    by least squares, then once more around it: rms error 7.1% of a Gaussian's, Q4_1 has 7.8%."""
    low, span = g.min(-1, keepdims=True), np.ptp(g, -1, keepdims=True)
    mean = g.mean(-1, keepdims=True)
    tries = [(span / (15 + a + b), low + span * np.float32(a / (15 + a + b))) for a, b in CUTS]
    best = [span / 15, low, np.full_like(low, np.inf)]
    for i in range(len(CUTS) + 1):
        scale, offset = tries[i] if i < len(CUTS) else best[:2]
        new = fit_line(g, nibbles(g, scale, offset), mean)
        better = new[2] < best[2]
        best = [np.where(better, n, o) for n, o in zip(new, best)]
    scale, offset = to_f16(best[0], name), to_f16(best[1], name)
    code = nibbles(g, scale.astype(np.float32), offset.astype(np.float32))
    return code.astype(np.uint8), scale, offset


def quantize_q4(x, name):
    """x [rows][cols] -> codes 0..15, f16 scales and offsets [rows][cols/32]:
    w = scale * code + offset."""
    g, step = x.reshape(-1, GROUP), 4096  # as much as a cache holds
    parts = [quantize_groups(g[a : a + step], name) for a in range(0, len(g), step)]
    code, scale, offset = (np.concatenate(p) for p in zip(*parts))
    return code.reshape(x.shape), scale.reshape(len(x), -1), offset.reshape(len(x), -1)


def mxfp4_codes(t, a, b):
    """Rows [a, b) of MXFP4 as int8 codes and f16 scales: w = 2^(e - 128) code, exact where f16 has
    that scale. Below it codes are rounded, above it they are larger."""
    raw = t.raw(a, b).reshape(b - a, t.n_cols // GROUP, -1)
    e = raw[..., 0].astype(np.int32)
    step = np.clip(e, 128 - 24, 128 + 15)
    codes = FP4[np.concatenate([raw[..., 1:] & 15, raw[..., 1:] >> 4], -1)]
    codes = np.rint(np.ldexp(codes, (e - step)[..., None]))
    if np.abs(codes).max() > 127:
        raise Refusal(f"tensor {t.name} holds values too large for 16-bit floats; try --type bf16")
    scale = np.ldexp(np.float32(1), step - 128).astype(np.float16)
    return codes.astype(np.int8).reshape(b - a, -1), scale, None


def ggml_blocks(t, a, b):
    """Rows [a, b) of a Q4_0, Q4_1, Q5_0 or Q8_0 tensor as they are stored: codes [rows][cols], f16
    scales [rows][cols/32], offsets (Q4_1) or None. Codes of Q4_0 count from -8, Q5_0's from -16."""
    raw = t.raw(a, b).reshape(b - a, t.n_cols // GROUP, -1)  # [rows][blocks][bytes of a block]
    scale = raw[..., :2].copy().view("<f2")[..., 0]
    check_finite(t, scale)
    if t.kind == "Q8_0":
        return raw[..., 2:].view(np.int8).reshape(b - a, -1), scale, None
    halves = raw[..., -16:]  # byte i: column i in the low half, 16 + i in the high
    codes = np.concatenate([halves & 15, halves >> 4], -1)
    if t.kind == "Q5_0":  # a fifth bit for each column
        fifth = np.unpackbits(raw[..., 2:6].copy(), axis=-1, bitorder="little")
        codes = codes | fifth << 4
    offset = raw[..., 2:4].copy().view("<f2")[..., 0] if t.kind == "Q4_1" else None
    if offset is not None:
        check_finite(t, offset)
    return codes.reshape(b - a, -1), scale, offset


class Output(NamedTuple):
    """A tensor of the new file; chunks() yields its bytes as arrays."""

    name: str
    dtype: str
    shape: tuple
    chunks: Callable


def array(name, x):
    dtype = {"float32": "F32", "int32": "I32", "uint8": "U8"}[x.dtype.name]
    return Output(name, dtype, x.shape, lambda: [np.ascontiguousarray(x)])


class Matrix:
    """One matrix on its way into panels: [rows][cols] in slices of whole panels. Scales and offsets
    pile up while the codes stream by, and follow them."""

    def __init__(self, name, tensor, kind):
        self.name, self.t, self.kind = name, tensor, kind
        self.rows, self.cols = up(tensor.n_rows, PANEL), up(tensor.n_cols, GROUP)
        if kind in ("f32", "f16", "bf16"):
            self.cols = up(tensor.n_cols, K[kind])
        self.held = tensor.kind in HELD.get(kind, ())
        self.scales, self.offsets = [], []

    def outputs(self):
        panels, k = self.rows // PANEL, K[self.kind]
        shape = (panels, self.cols // k, PANEL, 4 if self.kind == "q4" else k)
        outs = [Output(self.name, DTYPES[self.kind], shape, self.codes)]
        groups = (panels, self.cols // GROUP, PANEL)
        if self.kind in HELD:
            outs.append(Output(self.name + ".scale", "F16", groups, lambda: self.scales))
        if self.kind == "q4" and self.t.kind != "Q4_0":
            outs.append(Output(self.name + ".offset", "F16", groups, lambda: self.offsets))
        return outs

    def codes(self):
        self.scales, self.offsets = [], []
        step = max(PANEL, SLICE // self.cols // PANEL * PANEL)
        for a in range(0, self.rows, step):
            b = min(a + step, self.rows)
            yield np.ascontiguousarray(self.slice(a, min(b, self.t.n_rows), b - a))

    def slice(self, a, b, rows):
        """Rows [a, b) of the source as panels of `rows` rows."""
        if self.kind in HELD:
            return self.quantized(a, b, rows)
        x = padded(self.t.f32(a, b), rows, self.cols)
        if self.kind == "f16":
            x = to_f16(x, self.t.name)
        elif self.kind == "bf16":
            x = to_bf16(x, self.t.name)
        return to_panels(x, K[self.kind])

    def quantized(self, a, b, rows):
        if self.t.kind == "MXFP4" and self.held:
            codes, scale, offset = mxfp4_codes(self.t, a, b)
        elif self.held:
            codes, scale, offset = ggml_blocks(self.t, a, b)
            if self.kind == "q8" and self.t.kind != "Q8_0":
                codes = codes.astype(np.int8) - (8 if self.t.kind == "Q4_0" else 16)
        else:
            x, offset = padded(self.t.f32(a, b), b - a, self.cols), None
            if self.kind == "q8":
                codes, scale = quantize_q8(x, self.t.name)
            else:
                codes, scale, offset = quantize_q4(x, self.t.name)
        self.keep(self.scales, scale, rows)
        if offset is not None:
            self.keep(self.offsets, offset, rows)
        codes = padded(codes, rows, self.cols)
        return to_panels(codes, 4) if self.kind == "q8" else nibble_panels(codes)

    def keep(self, pile, x, rows):
        pile.append(np.ascontiguousarray(to_panels(padded(x, rows, x.shape[1]), 1)[..., 0]))


def stack_outputs(name, tensors, kind):
    """The matrices of all experts one after the other, each in panels of its own."""
    parts = [Matrix(name, t, kind).outputs() for t in tensors]
    outs = []
    for like, *_ in zip(parts[0], *parts[1:]):
        i = len(outs)
        outs.append(Output(like.name, like.dtype, (len(parts) * like.shape[0], *like.shape[1:]),
                           lambda i=i: (x for part in parts for x in part[i].chunks())))
    return outs


def matrix_type(target, tensor, is_vocab):
    """Which type a matrix gets when --type is target (None: keep what the source has)."""
    if target is None:
        return KEPT.get(tensor.kind, "q8")
    if target == "q4" and is_vocab and tensor.kind not in HELD["q4"]:
        return "q8"  # rows of the vocabulary are few bits in the sum and many in the quality
    return target


class CutRows(Tensor):
    """A table whose rows are cut into 16, in blocks that do not end there."""

    def __init__(self, t):
        self.__dict__.update(t.__dict__, whole=t, kind=t.kind + " rows",
                             n_rows=t.n_rows * PANEL, n_cols=t.n_cols // PANEL)

    def f32(self, a=0, b=None):
        b = self.n_rows if b is None else b
        return self.whole.f32(a // PANEL, b // PANEL).reshape(b - a, self.n_cols)


def cut_rows(t):
    """A table of embeddings, each row of it in a panel."""
    n, cols = t.n_rows * PANEL, t.n_cols // PANEL
    blocks = t.kind in HELD["q8"] + HELD["q4"] and cols % GROUP == 0
    return t.reshaped((n, cols)) if t.kind in PLAIN or blocks else CutRows(t)


def of_rms(t, dim):
    """The router's factors, and the one of its input, 1 / sqrt(dim)."""
    return t.vector() * np.float32(dim**-0.5)


def decays(t):
    """-exp(A_log), rounded once."""
    return -np.exp(t.vector().astype(np.float64)).astype(np.float32)


def model_outputs(model, weights, target):
    """Every tensor of the file but the tokenizer's, and the kinds that had to be requantized."""
    f, outs, lossy = model.fields, [], set()
    dims = [p.get("dim", f["rotary_dim"]) for p in model.ropes]
    tables = [rope_table(p, dim) for p, dim in zip(model.ropes, dims)]
    rows = [padded(inv[None], 1, max(dims) // 2)[0] for inv, _ in tables]
    outs.append(array("rope.inv_freq", np.stack(rows)))
    if set(dims) != {f["rotary_dim"]}:
        outs.append(array("rope.dims", np.int32(dims)))
    outs.append(array("rope.scale", np.float32([scale for _, scale in tables])))
    outs.append(array("layer.rope", np.int32(model.layer_rope)))
    outs.append(array("layer.window", np.int32(model.windows)))
    if model.grows and "query_growth" in f:
        outs.append(array("layer.query_grows", np.int32(model.grows)))
    if model.owners and model.owners != list(range(f["n_layers"])):
        outs.append(array("layer.owner", np.int32(model.owners)))
    hidden = [s["hidden_dim"] for s in model.sizes or ()]
    if set(hidden) - {f["hidden_dim"]}:
        outs.append(array("layer.hidden", np.int32(hidden)))

    def kind_of(part, t):
        kind = matrix_type(target, t, part[0] in ("tok_embed", "wcls"))
        if t.kind not in PLAIN and kind in HELD and t.kind not in HELD[kind]:
            lossy.add(f"{t.kind} to {kind}")
        return kind

    def add(name, part, layer=None):
        if part[0] in STACKS:
            tensors = weights.stack(part, layer)
            outs.extend(stack_outputs(name, tensors, kind_of(part, tensors[0])))
            return
        if part[1] is None:  # a norm without weights
            ones = np.ones(weights.sizes[layer]["head_dim"], np.float32)
            outs.append(array(name, ones))
            return
        t = weights.get(part, layer)
        if part[0] == "delta.conv":
            outs.append(Output(name, "F32", (t.n_cols, t.n_rows),
                               lambda: [np.ascontiguousarray(t.f32().T)]))
            return
        if part[0] == "delta.decay" and not weights.gguf:
            outs.append(Output(name, "F32", t.shape, lambda: [decays(t)]))
            return
        if part[0] in FLAT:
            outs.append(Output(name, "F32", (math.prod(t.shape),), lambda: [t.vector()]))
            return
        if part[0] == "rms_router":
            outs.append(Output(name, "F32", t.shape, lambda: [of_rms(t, f["dim"])]))
            return
        if part is EMBED_TABLE:
            t = cut_rows(t)
        if len(SHAPES[part[0]]) == 2:
            kind = "f32" if part[0] in EXACT else kind_of(part, t)
            outs.extend(Matrix(name, t, kind).outputs())
            return
        plus_one = (model.family.plus_one and not weights.gguf and "norm" in part[1]
                    and part[0] != "delta.norm")
        outs.append(Output(name, "F32", t.shape, lambda: [t.vector() + np.float32(plus_one)]))

    tied = weights.head_is_tied()
    for part in weights.TOP[:2] if tied else weights.TOP:
        add(part[0], part)
    if f.get("embed_dim"):
        add("embed_table", EMBED_TABLE)
        add("rms_embed", EMBED_NORM)
    if SINKS in model.parts[0]:
        sinks = [weights.get(SINKS, l).vector() for l in range(f["n_layers"])]
        outs.append(array("layer.sinks", np.stack(sinks)))
    for l in range(f["n_layers"]):
        for part in model.parts[l]:
            if part is SINKS:
                continue
            add(f"layers.{l}.{part[0]}", part, l)
        if model.owners and model.owners[l] == l:  # a norm without weights
            outs.append(array(f"layers.{l}.v_norm", np.ones(model.sizes[l]["head_dim"], np.float32)))
    weights.check_all_used()
    return outs, lossy


# ---- 5. tokenizers -------------------------------------------------------------------------------

NORMAL, SPECIAL, ADDED, BYTE, UNUSED = range(5)  # tok.kind
NORMALIZED, STRIPS_LEFT, STRIPS_RIGHT = 1, 2, 4  # tok.flags
SPACE = "\u2581"  # how SentencePiece writes a space

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35_SPLIT = (GPT4 % r"\p{N}").replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
    r" ?[^\s\p{L}\p{N}]", r" ?[^\s\p{L}\p{M}\p{N}]")
O200K_PARTS = [rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]{a}"
               rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]{b}(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
               for a, b in ("*+", "+*")]
O200K_SPLIT = "|".join(O200K_PARTS) + (
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEKKEN_SPLIT = "|".join(
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]{a}"
    rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]{b}" for a, b in ("*+", "+*")) + (
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLITS = {  # steps of a byte-level pre-tokenizer -> tokenizer.split
    ("gpt2",): "gpt2",
    ("digits", "gpt2"): "digits+gpt2",
    (GPT4 % r"\p{N}{1,3}", "bytes"): "llama3",
    (GPT4 % r"\p{N}", "bytes"): "qwen2",
    (QWEN35_SPLIT, "bytes"): "qwen35",
    (O200K_SPLIT, "bytes"): "o200k",
    (TEKKEN_SPLIT, "bytes"): "tekken",
}
GGUF_PRE = {  # tokenizer.ggml.pre -> split, nfc, ignore_merges
    "gpt-2": ("gpt2", 0, 0), "smollm": ("digits+gpt2", 0, 0), "llama-bpe": ("llama3", 0, 1),
    "llama3": ("llama3", 0, 1), "llama-v3": ("llama3", 0, 1), "qwen2": ("qwen2", 1, 0),
    "deepseek-r1-qwen": ("qwen2", 1, 0), "qwen35": ("qwen35", 1, 0), "gpt-4o": ("o200k", 0, 0),
    "llama4": ("o200k", 0, 0), "tekken": ("tekken", 0, 1),
}
GGUF_KINDS = {1: NORMAL, 2: UNUSED, 3: SPECIAL, 4: ADDED, 5: UNUSED, 6: BYTE}
# Tokens that end a turn, for files that name only one of them.
TURN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>",
             "<end_of_turn>", "<|end|>", "<turn|>")
HARMONY_ENDS = ("<|return|>", "<|call|>")  # gpt-oss, whose turn is several messages
GGUF_ENDS = (*TURN_ENDS, "</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>",
             "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
             "<|tool_response>")  # llama.cpp takes them for ends as well


def byte_alphabet():
    """GPT-2 writes bytes as printable characters -> {character: byte}."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(rest)}}


class Vocab:
    """ids with what they print and what they are; merges; what the metadata says."""

    def __init__(self, texts, kinds, model):
        self.texts, self.kinds = texts, kinds  # texts as the source spells them
        self.flags = {}  # id -> bits of tok.flags
        self.merges = np.zeros((0, 3), np.int32)
        self.ids = {t: i for i, t in reversed(list(enumerate(texts))) if t is not None}
        self.spaces = False  # the normalizer of tokenizer.json makes them U+2581
        self.strippers = []  # special tokens that swallow the white space after them
        self.meta = dict(model=model, split="none", nfc=0, ignore_merges=0, add_bos=0,
                         bos_id=-1, unk_id=-1, space_prefix=0, byte_fallback=0)

    def bytes_of(self, alphabet):
        """What each id prints."""
        out = []
        for i, (text, kind) in enumerate(zip(self.texts, self.kinds)):
            if self.flags.get(i, 0) & NORMALIZED:
                text = self.normalized(text)
            if text is None:
                out.append(b"")
            elif kind in (SPECIAL, ADDED, UNUSED):
                out.append(text.encode("utf-8", "surrogateescape"))
            elif kind == BYTE:
                out.append(bytes([int(text[3:5], 16)]))
            elif self.meta["model"] == "bpe" and all(c in alphabet for c in text):
                out.append(bytes(alphabet[c] for c in text))
            else:
                out.append(text.replace(SPACE, " ").encode("utf-8", "surrogateescape"))
        return out

    def normalized(self, text):
        """What an added token is in a normalized text, and what it prints (tokenizers 0.23)."""
        if self.meta["nfc"]:
            text = unicodedata.normalize("NFC", text)
        space = " " if self.meta["space_prefix"] == 1 else ""
        return space + (text.replace(SPACE, " ") if self.meta["model"] == "spm" else text)

    def outputs(self):
        pieces = self.bytes_of(byte_alphabet())
        ends = np.cumsum([0] + [len(p) for p in pieces], dtype=np.int64)
        if ends[-1] >= 1 << 31:
            raise Refusal("the vocabulary is too large")
        out = [
            array("tok.bytes", np.frombuffer(b"".join(pieces), np.uint8)),
            array("tok.offsets", ends.astype(np.int32)),
            array("tok.kind", np.uint8(self.kinds)),
        ]
        if any(self.flags.values()):
            flags = [self.flags.get(i, 0) for i in range(len(self.texts))]
            out.append(array("tok.flags", np.uint8(flags)))
        return out + [array("tok.merges", self.merges)]

    def limit(self, n):
        """Drops added tokens that have no row in the embedding (Gemma 3's image token)."""
        if len(self.texts) > n:
            if self.merges.size and self.merges.max() >= n:
                raise Refusal(f"{len(self.texts)} tokens, but only {n} embedding rows")
            warn(f"tokens {n} to {len(self.texts) - 1} have no embedding and are left out")
            self.texts, self.kinds = self.texts[:n], self.kinds[:n]
            self.flags = {i: bits for i, bits in self.flags.items() if i < n}
        for key in ("bos_id", "unk_id"):
            if self.meta[key] >= len(self.texts):
                raise Refusal(f"the tokenizer's {key} is {self.meta[key]}, the model has ids below "
                              f"{len(self.texts)}")

    def text_of(self, i):
        return self.texts[i] if i is not None and 0 <= i < len(self.texts) else None


def merges_by_pair(pairs, ids):
    """Merges in the order of the list, as ids."""
    try:
        ranks = {pair: i for i, pair in enumerate(pairs)}  # of one pair, the last place counts
        pairs = [pair for i, pair in enumerate(pairs) if ranks[pair] == i]
        merges = [(ids[left], ids[right], ids[left + right]) for left, right in pairs]
    except KeyError as e:
        raise Refusal(f"the tokenizer merges to or from {e}, which is no token") from None
    return np.array(merges, np.int32).reshape(-1, 3)


def merges_by_score(ids, score):
    """All ways to put a token together from two others, best score first, longer left part first,
    as Hugging Face's converters do it. ids: {text or bytes: id} of the tokens that take part."""
    found = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left = ids.get(token[:cut])
            if left is not None:
                right = ids.get(token[cut:])
                if right is not None:
                    found.append((-score[i], -cut, i, left, right))
    found.sort()
    out = np.array([(left, right, i) for _, _, i, left, right in found], np.int32)
    return out.reshape(-1, 3)


def flat(spec, inner):
    """A pre-tokenizer, normalizer or post-processor of tokenizer.json as a list of steps."""
    if spec is None:
        return []
    if spec.get("type") == "Sequence":
        return [step for s in spec[inner] for step in flat(s, inner)]
    return [spec]


def unsupported(what, spec):
    return Refusal(f"tokenizer.json: {what} {json.dumps(spec)[:300]} is not supported")


def split_of(spec):
    """tokenizer.split of a byte-level pre-tokenizer."""
    steps = []
    for s in flat(spec, "pretokenizers"):
        pattern = s.get("pattern", {})
        pieces = (s.get("behavior"), bool(s.get("invert")))  # both keep all that the pattern finds
        if s["type"] == "ByteLevel" and not s.get("add_prefix_space"):
            steps.append("gpt2" if s.get("use_regex", True) else "bytes")
        elif s["type"] == "Digits" and s.get("individual_digits"):
            steps.append("digits")
        elif s["type"] == "Split" and pieces in (("Isolated", False), ("Removed", True)):
            steps.append(pattern.get("Regex"))
        else:
            raise unsupported("pre-tokenizer", s)
    if tuple(steps) not in SPLITS:
        raise unsupported("pre-tokenizer", spec)
    return SPLITS[tuple(steps)]


def read_normalizer(v, spec):
    """-> whether it makes spaces U+2581."""
    spaces = False
    for s in flat(spec, "normalizers"):
        spm = v.meta["model"] == "spm"
        if s["type"] == "NFC":
            v.meta["nfc"] = 1
        elif spm and s["type"] == "Prepend" and s["prepend"] == SPACE:
            v.meta["space_prefix"] = 1
        elif (spm and s["type"] == "Replace"
              and (s["pattern"], s["content"]) == ({"String": " "}, SPACE)):
            spaces = True
        else:
            raise unsupported("normalizer", s)
    return spaces


PREPEND = {"never": 0, "first": 2, "always": 3}  # Metaspace's prepend_scheme -> space_prefix


def read_spm_pretokenizer(v, spec, spaces):
    steps = flat(spec, "pretokenizers")
    for s in steps:
        if s["type"] == "Metaspace" and s.get("replacement") == SPACE and len(steps) == 1:
            scheme = s.get("prepend_scheme", "always")
            both = v.meta["space_prefix"] and scheme == "always"
            if scheme not in PREPEND or both or s.get("add_prefix_space", True) < bool(
                    scheme == "always"):
                raise unsupported("pre-tokenizer", s)
            v.meta["space_prefix"] = v.meta["space_prefix"] or PREPEND[scheme]
            v.meta["split"] = "words" if s.get("split", True) else "none"
        elif not (spaces and s["type"] == "Split" and s["pattern"] == {"String": " "}
                  and not s.get("invert")):
            raise unsupported("pre-tokenizer", s)  # (that split never finds one: they are U+2581)
    if not spaces and not steps:
        raise unsupported("pre-tokenizer", spec)


def read_decoder(v, spec):
    """tokenizer.strip, or a refusal when decoding does more than C does."""
    steps = flat(spec, "decoders")
    names = [s["type"] for s in steps]
    strip = 0
    for s in steps:
        if s["type"] == "Metaspace" and s.get("replacement") == SPACE:
            strip = 2 * (s.get("prepend_scheme", "always") != "never")
        elif s["type"] == "Strip" and (s["content"], s["start"], s["stop"]) == (" ", 1, 0):
            strip = 1
        elif s["type"] == "Replace":
            if (s["pattern"], s["content"]) != ({"String": SPACE}, " "):
                raise unsupported("decoder", s)
        elif s["type"] not in ("ByteLevel", "ByteFallback", "Fuse"):
            raise unsupported("decoder", s)
    known = (["ByteLevel"],) if v.meta["model"] == "bpe" else (
        ["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"],
        ["Metaspace"], ["Replace", "Fuse"], ["Replace", "Fuse", "Strip"])
    if steps and (names not in known or (v.meta["byte_fallback"] and "ByteFallback" not in names)):
        raise unsupported("decoder", spec)
    if steps and strip != int(v.meta["space_prefix"] > 0):
        v.meta["strip"] = strip


def read_post_processor(v, spec):
    for s in flat(spec, "processors"):
        if s["type"] == "ByteLevel":
            continue
        if s["type"] != "TemplateProcessing" or v.meta["add_bos"]:
            raise unsupported("post-processor", s)
        names = [next(iter(x)) for x in s["single"]]
        if names == ["Sequence"]:
            continue
        if names != ["SpecialToken", "Sequence"]:
            raise unsupported("post-processor", s["single"])
        token = s["special_tokens"][s["single"][0]["SpecialToken"]["id"]]
        if len(token["ids"]) != 1:
            raise unsupported("post-processor", token)
        v.meta.update(add_bos=1, bos_id=token["ids"][0])


def check_tokenizer_json(spec):
    """The vocabulary of tokenizer.json: ids that are ids, texts that are texts."""
    def refuse(what, value):
        raise Refusal(f"tokenizer.json: {what}: {repr(value)[:60]}")

    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    added = spec.get("added_tokens") or []
    for key, value, kind in (("vocab", vocab, dict), ("merges", merges, list),
                             ("added_tokens", added, list)):
        if type(value) is not kind:
            refuse(key, value)
    for text, i in [*vocab.items(), *((t["content"], t["id"]) for t in added)]:
        if type(text) is not str or type(i) is not int or not 0 <= i < MOST:
            refuse("id of a token", {text: i} if type(text) is str else text)
        if re.search("[\ud800-\udfff]", text):
            refuse("a token is no text", text)
    if len(set(vocab.values())) < len(vocab):
        refuse("vocab", "an id stands there twice")
    for m in merges:
        pair = m.split(" ") if isinstance(m, str) else m
        if type(pair) is not list or [*map(type, pair)] != [str, str]:
            refuse("merges", m)


def vocab_from_json(spec):
    """tokenizer.json"""
    m = spec["model"]
    if m.get("type", "BPE") != "BPE":
        raise Refusal(f"tokenizer.json: a {m['type']} model is not supported, BPE is")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if m.get(key):
            raise Refusal(f"tokenizer.json: {key} is not supported")
    check_tokenizer_json(spec)
    added = {t["id"]: t for t in spec.get("added_tokens") or []}
    n = 1 + max([*m["vocab"].values(), *added])
    texts, kinds = [None] * n, [UNUSED] * n
    for text, i in m["vocab"].items():
        texts[i], kinds[i] = text, NORMAL
        if m.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", text):
            kinds[i] = BYTE
    steps = flat(spec.get("pre_tokenizer"), "pretokenizers")
    byte_level = any(s["type"] == "ByteLevel" for s in steps)
    v = Vocab(texts, kinds, "bpe" if byte_level else "spm")
    pairs = [tuple(p.split(" ")) if isinstance(p, str) else tuple(p) for p in m["merges"]]
    v.merges = merges_by_pair(pairs, m["vocab"])
    v.meta.update(ignore_merges=int(bool(m.get("ignore_merges"))),
                  byte_fallback=int(bool(m.get("byte_fallback"))))
    v.spaces = read_normalizer(v, spec.get("normalizer"))
    if byte_level:
        v.meta["split"] = split_of(spec["pre_tokenizer"])
    else:
        read_spm_pretokenizer(v, spec.get("pre_tokenizer"), v.spaces)
    for i, t in added.items():
        add_token(v, i, t)
    unk = m.get("unk_token")
    if unk is not None and unk not in v.ids:
        raise Refusal(f"tokenizer.json: unk_token {unk!r} is no token")
    v.meta["unk_id"] = v.ids.get(unk, -1)
    if v.meta["unk_id"] >= 0 and bool(m.get("fuse_unk")) == byte_level:
        v.meta["fuse_unk"] = int(bool(m.get("fuse_unk")))
    read_decoder(v, spec.get("decoder"))
    read_post_processor(v, spec.get("post_processor"))
    return v


def add_token(v, i, t):
    """An added token of tokenizer.json or tokenizer_config.json."""
    text, special = t["content"], bool(t.get("special"))
    if not isinstance(i, int) or not 0 <= i < MOST or not isinstance(text, str):
        raise Refusal(f"tokenizer: {text!r} cannot be added as id {i!r}")
    if v.ids.get(text, i) != i:
        i = v.ids[text]  # tokens of the vocabulary keep their ids
    if v.text_of(i) not in (None, text):
        raise Refusal(f"tokenizer: added token {text!r} has id {i}, which is {v.text_of(i)!r}")
    if t.get("single_word"):
        raise Refusal(f"tokenizer: added token {text!r} is for whole words, which is not supported")
    flags = [t.get("normalized", False), t.get("lstrip"), t.get("rstrip")]
    if flags[0] and v.meta["model"] == "spm" and (
            any(flags[1:]) if v.spaces else any(c in text for c in (" ", SPACE))):
        raise Refusal(f"tokenizer: added token {text!r} is normalized and "
                      f"{'swallows' if v.spaces else 'holds'} spaces, which is not supported")
    if t.get("rstrip"):
        v.strippers.append(text)
    grow = i + 1 - len(v.texts)
    v.texts += [None] * grow
    v.kinds += [UNUSED] * grow
    v.texts[i], v.kinds[i] = text, SPECIAL if special else ADDED
    v.flags[i] = sum(bit for bit, on in zip((NORMALIZED, STRIPS_LEFT, STRIPS_RIGHT), flags) if on)
    v.ids[text] = i


def protobuf_fields(data):
    """-> [(field number, value)] of a protocol buffer message: ints, or bytes of any length."""
    def varint(at):
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value, at

    at, out = 0, []
    while at < len(data):
        key, at = varint(at)
        kind = key & 7
        if kind == 0:
            value, at = varint(at)
        else:
            n, at = varint(at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at : at + n], at + n
            if len(value) != n:
                raise IndexError
        out.append((key >> 3, value))
    return out


def vocab_from_sentencepiece(data):
    """tokenizer.model, a protocol buffer. Fields: 1 pieces (1 text, 2 score, 3 type), 2 trainer
    (3 model type, 40 and 41 ids of unk and bos), 3 normalizer (1 name, 2 table, 3 dummy prefix,
    4 removes extra spaces)."""
    try:
        top = protobuf_fields(data)
        pieces = [dict(protobuf_fields(p)) for field, p in top if field == 1]
        trainer, normalizer = ({k: v for f, m in top if f == n for k, v in protobuf_fields(m)}
                               for n in (2, 3))
        texts = [p[1].decode() for p in pieces]
    except (IndexError, KeyError, ValueError):
        raise Refusal("tokenizer.model is cut or damaged") from None
    if trainer.get(3, 1) != 2:
        raise Refusal("tokenizer.model: a SentencePiece unigram model is not supported, BPE is")
    if normalizer.get(2):
        name = normalizer.get(1, b"").decode("utf-8", "replace")
        raise Refusal(f"tokenizer.model: normalizer {name!r} is not supported")
    if normalizer.get(4, 1):
        raise Refusal("tokenizer.model removes extra white space, which is not supported")
    v = Vocab(texts, [GGUF_KINDS[p.get(3, 1)] for p in pieces], "spm")
    scores = [struct.unpack("<f", p[2])[0] if 2 in p else 0.0 for p in pieces]
    add_spm_merges(v, scores)
    v.meta.update(unk_id=trainer.get(40, 0), bos_id=trainer.get(41, 1), add_bos=1,
                  space_prefix=int(normalizer.get(3, 1)))
    # SentencePiece finds user-defined pieces after spaces have become U+2581: undo that here.
    v.texts = [t.replace(SPACE, " ") if k == ADDED else t for t, k in zip(v.texts, v.kinds)]
    return v


def add_spm_merges(v, scores):
    ids = {t: i for t, i in v.ids.items() if v.kinds[i] == NORMAL}
    v.merges = merges_by_score(ids, scores)
    v.meta["byte_fallback"] = int(BYTE in v.kinds)


def vocab_from_ranks(data, split):
    """A tiktoken file: lines of base64 and rank. Any two tokens that make a third merge, best rank
    first; a whole piece that is a token stays one."""
    try:
        lines = map(bytes.split, data.splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error):
        raise Refusal("the rank file is damaged") from None
    n = 1 + max(ranks.values())
    v = Vocab([None] * n, [UNUSED] * n, "bpe")
    printable = {b: c for c, b in byte_alphabet().items()}
    for token, i in ranks.items():
        v.texts[i], v.kinds[i] = "".join(printable[b] for b in token), NORMAL
    v.merges = merges_by_score(ranks, [-i for i in range(n)])
    v.meta.update(split=split, nfc=int(split == "qwen2"), ignore_merges=1)
    return v


LLAMA2C_SPECIAL = 3  # <unk>, BOS, EOS, then the 256 bytes


def vocab_from_llama2c(path, n):
    """tokenizer.bin of llama2.c, n tokens: the length of the longest one, then of each a score and
    its bytes. SentencePiece's, with spaces for U+2581."""
    f = SourceFile(path)
    data, at, texts, scores = f.read(0, f.size), 4, [], []
    try:
        for _ in range(n):
            score, length = struct.unpack_from("<fi", data, at)
            at += 8 + length
            if length < 0 or at > len(data) or not math.isfinite(score):
                raise ValueError(f"token {len(texts)}")
            scores.append(score)
            texts.append(data[at - length : at].decode().replace(" ", SPACE))
    except (struct.error, ValueError):
        raise Refusal(f"token {len(texts)} of {n} is cut or damaged, or this is the tokenizer of "
                      "another model (--tokenizer names its own)", path) from None
    if at != len(data):
        raise Refusal(f"{len(data) - at} bytes after {n} tokens: the tokenizer of another model "
                      "(--tokenizer names its own)", path)
    kinds = [SPECIAL if i < LLAMA2C_SPECIAL else BYTE if re.fullmatch("<0x[0-9A-F]{2}>", t) else
             NORMAL for i, t in enumerate(texts)]
    v = Vocab(texts, kinds, "spm")
    add_spm_merges(v, scores)
    v.meta.update(unk_id=0, bos_id=1, add_bos=1, space_prefix=1)
    return v


def is_rank_file(data):
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data[:300]) is not None


def token_text(value):
    """A token in tokenizer_config.json is a string or an object."""
    return value.get("content") if isinstance(value, dict) else value


NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def named_tokens(config):
    """-> [(key, token)] of what tokenizer_config.json names, in the order in which transformers
    gives ids to those that are new: the usual names, others of a model's own, then lists."""
    extra = config.get("extra_special_tokens")
    lists = {"extra_special_tokens": extra or config.get("additional_special_tokens") or []}
    others = [k for k in config if k.endswith("_token") and k[:4] != "add_" and k not in NAMED]
    out = [(k, config[k]) for k in (*NAMED, *others) if config.get(k)]
    for key, tokens in lists.items():
        out += [(key, t) for t in (tokens.values() if isinstance(tokens, dict) else tokens)]
    return out


def tokenizer_config(path):
    """tokenizer_config.json; without added_tokens_decoder with those files that older versions of
    transformers put beside it, as the newer ones read them."""
    config = read_json(os.path.join(path, "tokenizer_config.json"), {})
    if "added_tokens_decoder" in config:
        return config
    config.update(read_json(os.path.join(path, "special_tokens_map.json"), {}))
    special = {token_text(t) for _, t in named_tokens(config)}
    added = read_json(os.path.join(path, "added_tokens.json"), {})
    config["added_tokens_decoder"] = {
        i: {"content": t, "special": t in special} for t, i in added.items()}
    return config


def add_named_tokens(v, config, from_json):
    """Tokens that only the config knows; transformers gives those without an id the next ones.
    from_json: the vocabulary is that of tokenizer.json."""
    def flags_of(t):  # as AddedToken has them; without tokenizer.json nothing is normalized
        return {**t, "normalized": from_json and t.get("normalized", not t.get("special"))}

    decoder = sorted((int(i), t) for i, t in config["added_tokens_decoder"].items())
    for i, t in decoder:
        text = t.get("content")
        if text not in v.ids or v.kinds[v.ids[text]] not in (SPECIAL, ADDED):
            if from_json and text not in v.ids and i > len(v.texts):
                raise Refusal(f"tokenizer_config.json: added_tokens_decoder gives {text!r} id {i}, "
                              f"and transformers {len(v.texts)}, the next one of tokenizer.json")
            add_token(v, i, flags_of(t))
    merged = set(v.merges[:, 2].tolist())
    for key, token in named_tokens(config):
        t = flags_of(token) if isinstance(token, dict) else {"content": token}
        text = t.get("content")
        i = v.ids.get(text)
        if not text or (i is not None and (v.kinds[i] != NORMAL or i in merged or len(text) == 1)):
            continue  # what merges make of a text stays a part of it
        if not from_json and v.meta["model"] != "spm":
            if i is None:
                warn(f"{key} {text!r} is no token of the vocabulary")
            continue
        add_token(v, len(v.texts), {**t, "special": True})
        if i is None:
            warn(f"{key} {text!r} is not in the vocabulary and becomes id {v.ids[text]}")


def vocab_from_directory(path, model_type):
    """-> Vocab, tokenizer_config.json"""
    config = tokenizer_config(path)
    as_json, as_model = (os.path.join(path, n) for n in ("tokenizer.json", "tokenizer.model"))
    check_there(as_json)
    check_there(as_model)
    ranks = glob.glob(os.path.join(path, "*.tiktoken"))
    if os.path.exists(as_json):
        try:
            v = vocab_from_json(read_json(as_json))
        except (KeyError, TypeError, AttributeError, IndexError) as e:
            raise Refusal(f"tokenizer.json is damaged or of an unknown layout: {e!r}") from None
    elif os.path.exists(as_model) or ranks:
        v = vocab_from_model(as_model if os.path.exists(as_model) else ranks[0], model_type)
    else:
        raise Refusal("no tokenizer.json, tokenizer.model or *.tiktoken")
    add_named_tokens(v, config, os.path.exists(as_json))
    bos = v.ids.get(token_text(config.get("bos_token")))
    if bos is not None and v.meta["bos_id"] < 0:
        v.meta["bos_id"] = bos
    said = config.get("add_bos_token")
    if said is not None and not os.path.exists(as_json):
        v.meta["add_bos"] = int(said)
    elif said is not None and bos is not None and said != v.meta["add_bos"]:
        warn(f"tokenizer_config.json: add_bos_token is {json.dumps(said)}, which the post-processor "
             "of tokenizer.json overrules, as in transformers 5")
    if config.get("add_eos_token"):
        warn("tokenizer_config.json sets add_eos_token, which would close every text; no text is")
    if v.meta["bos_id"] < 0:
        v.meta["add_bos"] = 0
    return v, config


def vocab_from_model(path, model_type):
    with open(path, "rb") as f:
        data = f.read()
    if not is_rank_file(data):
        return vocab_from_sentencepiece(data)
    split = {"llama": "llama3", "smollm3": "llama3", "qwen2": "qwen2", "qwen3": "qwen2",
             "qwen2_moe": "qwen2", "qwen3_moe": "qwen2"}
    if model_type not in split:
        raise Refusal(f"a rank file does not say how {model_type!r} splits text")
    v = vocab_from_ranks(data, split[model_type])
    v.meta["add_bos"] = int(split[model_type] == "llama3")
    return v


def known_pre(meta, texts):
    """The pre-tokenizer of a GGUF. Those of Llama 3's first weeks have none, but Llama 3's
    vocabulary: the only one with its header token and 128,256 tokens."""
    pre = meta.get("tokenizer.ggml.pre")
    if pre in (None, "default") and len(texts) == 128256 and "<|start_header_id|>" in texts:
        warn("the file names no pre-tokenizer; its vocabulary is Llama 3's, so is the pre-tokenizer")
        return "llama-bpe"
    return pre


def gguf_ends(v):
    """Texts that end an answer. In a Gemma 4, which has <|tool_response>, </s> is a word."""
    return [t for t in GGUF_ENDS if t != "</s>" or "<|tool_response>" not in v.ids]


def add_gguf_facts(v, name):
    """What llama.cpp (llama-vocab.cpp) knows beside the file: texts of tokens that end a turn are
    control tokens whatever their type, and all added tokens of a Phi-3 but three swallow the white
    space behind them."""
    for text in gguf_ends(v):
        if text in v.ids and v.kinds[v.ids[text]] in (NORMAL, ADDED):
            v.kinds[v.ids[text]] = SPECIAL
    if re.search("phi-?3", name.lower()):
        plain = {"<unk>", "<s>", "<|endoftext|>"}
        ids = {v.ids[t] for t in v.ids if t not in plain and
               (t == "</s>" or v.kinds[v.ids[t]] in (SPECIAL, ADDED))}
        v.flags.update(dict.fromkeys(ids, STRIPS_RIGHT))
        v.strippers = [v.texts[i] for i in sorted(ids)]


def vocab_from_gguf(meta):
    def get(key, default=None):
        return meta.get("tokenizer.ggml." + key, default)

    model, texts = get("model"), get("tokens")
    if model not in ("gpt2", "llama", "gemma4") or not texts:
        raise Refusal(f"tokenizer {model!r} is not supported, gpt2, llama (SentencePiece) and "
                      "gemma4 are")
    if not get("token_type"):
        raise Refusal("tokenizer.ggml.token_type is missing: which tokens are control tokens and "
                      "bytes is not known; convert the model anew")
    kinds = [GGUF_KINDS.get(k, NORMAL) for k in get("token_type")]
    if get("add_eos_token"):
        warn("the file sets add_eos_token, which would close every text; no text is")
    if get("remove_extra_whitespaces"):
        raise Refusal("the tokenizer removes extra white space, which is not supported")
    v = Vocab(texts, kinds, "bpe" if model == "gpt2" else "spm")
    add_gguf_facts(v, str(meta.get("general.name", "")))
    v.meta.update(bos_id=get("bos_token_id", 1 if model == "llama" and len(texts) > 1 else -1))
    if model == "llama":
        if len(get("scores") or []) != len(texts):
            raise Refusal(f"{len(texts)} tokens, but {len(get('scores') or [])} scores")
        add_spm_merges(v, get("scores"))
        v.meta.update(add_bos=int(get("add_bos_token", True)),
                      unk_id=get("unknown_token_id", 0),
                      space_prefix=int(get("add_space_prefix", True)))
        return v
    if not get("merges"):
        raise Refusal(f"tokenizer.ggml.merges is missing, and a {model} vocabulary needs it")
    pairs = []
    for m in get("merges"):
        cut = m.find(" ", 1)
        pairs.append((m[:cut], m[cut + 1 :]))
    v.merges = merges_by_pair(pairs, v.ids)
    if model == "gemma4":  # SentencePiece's texts, merged in the order of a list
        v.meta.update(add_bos=int(v.meta["bos_id"] >= 0), byte_fallback=1,
                      unk_id=get("unknown_token_id", -1))
        return v
    pre = known_pre(meta, texts)
    if pre not in GGUF_PRE:
        raise Refusal(f"pre-tokenizer {pre!r} is not supported, {', '.join(GGUF_PRE)} are")
    split, nfc, ignore = GGUF_PRE[pre]
    v.meta.update(split=split, nfc=nfc, ignore_merges=ignore,
                  add_bos=int(v.meta["bos_id"] >= 0 and
                              get("add_bos_token", split in ("llama3", "tekken"))))
    return v


def stop_ids(v, *sources):
    """Ids that end an answer: those the files name, and the turn ends among the special tokens."""
    ids = {i for s in sources for i in (s if isinstance(s, list) else [s]) if i is not None}
    ids |= {v.ids[t] for t in TURN_ENDS if t in v.ids and v.kinds[v.ids[t]] in (SPECIAL, ADDED)}
    if all(t in v.ids for t in HARMONY_ENDS):  # <|end|> is only that of one of its messages
        ids = ids - {v.ids.get("<|end|>")} | {v.ids[t] for t in HARMONY_ENDS}
    return sorted(i for i in ids if 0 <= i < len(v.texts))


# ---- 6. chat templates ---------------------------------------------------------------------------

PIECES = ("begin default_system system_prefix system_suffix user_prefix user_suffix "
          "user_prefix_after_system assistant_prefix assistant_suffix generation").split()
SYSTEM, USER, ANSWER, AGAIN = "Marksystem", "Markuser", "Markanswer", "Markagain"
HELPER = "You are a helpful assistant"
LLAMA3_TURN_END = "<|eot_id|>"
# Llama 3's own default. A date that moves would make every export another model.
TODAY = "26 Jul 2024"


class Template:
    """A model's Jinja chat template, rendered as transformers does."""

    def __init__(self, source, tokens):
        import jinja2
        from jinja2 import ext, sandbox

        class Generation(ext.Extension):
            """{% generation %} marks answers for training; the text is unchanged."""

            tags = {"generation"}

            def parse(self, parser):
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        env = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
        env.filters["tojson"] = lambda x, **how: json.dumps(x, **{"ensure_ascii": False, **how})
        env.globals["raise_exception"] = self.refuse
        self.error, self.tokens = jinja2.TemplateError, tokens
        self.said = ""  # why the latest messages were refused
        self.today = {}
        try:
            self.template = env.from_string(source)
        except jinja2.TemplateError as e:
            raise Refusal(f"the chat template is not valid: {e}") from None

    def refuse(self, message):
        raise self.error(message)

    def render(self, messages, generation=False, tools=None):
        """The text, or None when the template refuses the messages: (role, text), or whole ones."""
        messages = [dict(m) if isinstance(m, dict) else {"role": m[0], "content": m[1]}
                    for m in messages]
        values = dict(self.tokens, messages=messages, add_generation_prompt=generation, tools=tools,
                      documents=None, enable_thinking=False, **self.today)
        try:
            return self.template.render(values)
        except self.error as e:
            if "strftime_now" in str(e) and not self.today:
                self.today = {"strftime_now": lambda form: TODAY}
                return self.render(messages, generation, tools)
            self.said = str(e)
            return None
        except Exception as e:  # a template is a stranger's program; whatever it runs into refuses
            self.said = str(e)
            return None


def cut(text, a, b=None):
    """The part of text between marks a and b."""
    if text is None or a not in text:
        return None
    text = text.split(a, 1)[1]
    return text if b is None else text.split(b, 1)[0] if b in text else None


def without(text, head="", tail=""):
    """text less what it begins or ends with; None when it does not."""
    if text is None or not (text.startswith(head) and text.endswith(tail)):
        return None
    return text[len(head) : len(text) - len(tail)]


def ending(text, longer, eos):
    """What closes a turn: text, which ends a conversation, less the eos some templates (Phi-3) put
    only there, so that the longer conversation goes on with it."""
    if longer is not None and not longer.startswith(text) and text.endswith(eos):
        return text[: len(text) - len(eos)]
    return text


def always_invites(alone, invited, final, between):
    """Does a rendering end with an invitation although none was asked for (Llama 3's first
    template)? final: what follows an answer at the end, between: what follows one before a turn."""
    return alone == invited and bool(between) and bool(final) and not between.startswith(final)


def chat_pieces(template, bos):
    """Finds the pieces between marked messages -> None when the plainest cannot be rendered."""
    one = [("user", USER)]
    two = one + [("assistant", ANSWER)]
    alone, invited, three = (
        template.render(one), template.render(one, True), template.render(two + [("user", AGAIN)]))
    if alone is None or USER not in alone:
        return None
    p = dict.fromkeys(PIECES, "")
    before, after = alone.split(USER, 1)
    eos = template.tokens.get("eos_token") or ""
    final, between = cut(template.render(two), ANSWER) or "", cut(three, ANSWER, AGAIN)
    p["user_suffix"] = ending(after, cut(invited, USER), eos)
    p["generation"] = without(cut(invited, USER), head=p["user_suffix"]) or ""
    if always_invites(alone, invited, ending(final, between, eos), between):
        user_prefix = without(before, head=bos) or before
        closing = without(between, tail=user_prefix)
        generation = closing is not None and without(final, head=closing)
        if generation and after.endswith(generation):
            final = closing
            p["user_suffix"] = without(after, tail=generation)
            p["generation"] = generation
    p["assistant_prefix"] = without(cut(three, USER, ANSWER), head=p["user_suffix"]) or ""
    p["assistant_suffix"] = ending(final, between, eos)
    p["user_prefix"] = without(between, head=p["assistant_suffix"])
    if p["user_prefix"] is None or not before.endswith(p["user_prefix"]):
        p["user_prefix"] = without(before, head=bos) or before
    head = without(before, tail=p["user_prefix"])  # all that precedes the first turn
    with_system = template.render([("system", SYSTEM)] + one)
    p["system_refused"] = (
        template.said if with_system is None
        else "" if SYSTEM in with_system else "it leaves a system text out")
    add_system_pieces(p, head, with_system, bos)
    p["trim"] = trims(template, [("user", f"  {USER}  ")])
    p["trim_system"] = p["trim"] if with_system is None else trims(
        template, [("system", f"  {SYSTEM}  "), ("user", USER)])
    return p


def trims(template, messages):
    """Does the template strip the white space around the first message?"""
    text = template.render(messages)
    return text is not None and messages[0][1] not in text


def add_system_pieces(p, head, text, bos):
    """Splits head into begin and default system turn; text: a rendering with a system text."""
    if text is not None and (SYSTEM not in text or USER not in text):
        text = None
    opening = head if text is None else text.split(SYSTEM)[0]
    if head.startswith(bos) and opening.startswith(bos) and not p["user_prefix"].startswith(bos):
        p["begin"] = bos
    p["default_system"] = head[len(p["begin"]) :]
    p["user_prefix_after_system"] = p["user_prefix"]
    if text is None:
        return
    p["system_prefix"] = opening[len(p["begin"]) :]
    between = cut(text, SYSTEM, USER)
    p["system_suffix"] = without(between, tail=p["user_prefix"])
    if p["system_suffix"] is None:  # the system text stands inside the user's turn
        p["system_suffix"], p["user_prefix_after_system"] = between, ""


def compose(p, messages, generation=False):
    """A conversation put together from pieces, as tokenizer_turn does it."""
    out = p["begin"] + (p["default_system"] if messages[0][0] != "system" else "")
    for i, (role, text) in enumerate(messages):
        trim = p.get("trim_system", p["trim"]) if role == "system" else p["trim"]
        text = text.strip() if trim else text
        after_system = role == "user" and i > 0 and messages[i - 1][0] == "system"
        out += p[role + "_prefix" + ("_after_system" if after_system else "")]
        out += text + p[role + "_suffix"]
    return out + (p["generation"] if generation else "")


def verify_chat(template, p):
    """Compares compositions with the template's own renderings -> False: the plainest is wrong."""
    system, user, answer = ("system", "Be brief."), ("user", "One?\nTwo!"), ("assistant", "Yes.")
    cases = {
        "a single question": [user],
        "a system text": [system, user],
        "white space around a text": [("system", "\n Be brief. "), ("user", " One?\n")],
        "white space around a question": [("user", " One?\n")],
        "two questions": [user, answer, ("user", "Why?")],
        "a system text and two questions": [system, user, answer, ("user", "Why?")],
    }
    for what, messages in cases.items():
        if messages[0][0] == "system" and p["system_refused"]:
            continue
        wanted = template.render(messages, True)
        if wanted is not None and wanted != compose(p, messages, True):
            if what == "a single question":
                return False
            warn(f"the chat template is not reproduced for {what}; other conversations are")
    return True


# Tools: the same once more. A template shows each tool as JSON, between pieces; a call is a JSON
# object with the function's name and its arguments, behind a marker where the model has one.

TOOL_PIECES = ("tools_begin tools_system_prefix tools_system_suffix tools_separator tools_end "
               "call_marker call_begin call_middle call_end call_separator call_name "
               "call_arguments result_begin result_separator result_end").split()
RESULT, LATER = "Markresult", "Marklater"
DUMP = {"ensure_ascii": False}


def tool(name, text="What it does.", **properties):
    return {"type": "function", "function": {
        "name": name, "description": text,
        "parameters": {"type": "object", "properties": properties, "required": [*properties]}}}


def call(name, number=0, **arguments):
    return {"type": "function", "id": f"call0000{number}",
            "function": {"name": name, "arguments": arguments}}


def calling(text, *calls):
    return {"role": "assistant", "content": text, "tool_calls": [*calls]}


def result(text, number=0):
    return {"role": "tool", "content": text, "tool_call_id": f"call0000{number}"}


FIRST, SECOND = tool("markfirst", a={"type": "string"}), tool("marksecond", b={"type": "integer"})
CALL, OTHER = call("markfirst", 1, a="markvalue"), call("marksecond", 2, b=7)


def need(value, why):
    if value is None:
        raise Refusal(why)
    return value


def dump_tool(p, t):
    """A tool as the template prints it."""
    t = t["function"] if p.get("tools_bare") else t
    return json.dumps(t, **DUMP, indent=int(p["tools_indent"]) if p.get("tools_indent") else None)


def tool_style(text):
    """How a rendering prints a tool -> what dump_tool goes by."""
    for style in ({}, {"tools_indent": "4"}, {"tools_indent": "2"}):
        for bare in ({}, {"tools_bare": "1"}):
            if dump_tool({**style, **bare}, FIRST) in text:
                return {**style, **bare}
    raise Refusal("it does not print a tool as plain JSON")


def add_tool_list(p, template, chat):
    """Where tools stand: behind the system text, before the first question."""
    one = [("user", USER)]
    text = need(template.render(one, tools=[FIRST]), template.said)
    p.update(tool_style(text))
    first, second = dump_tool(p, FIRST), dump_tool(p, SECOND)
    p["tools_begin"] = text.split(first)[0]
    p["tools_end"] = need(cut(text, first, USER), "tools stand behind the question")
    text = template.render(one, tools=[FIRST, SECOND])
    p["tools_separator"] = need(cut(text, first, second), "two tools are not printed in a row")
    if chat["system_refused"]:
        return
    text = template.render([("system", SYSTEM), *one], tools=[FIRST])
    if text is None or SYSTEM not in text:
        raise Refusal("with tools it takes no system text")
    p["tools_system_prefix"] = text.split(SYSTEM)[0]
    p["tools_system_suffix"] = need(cut(text, SYSTEM, first), "tools stand before the system text")


def add_call_keys(p):
    """The JSON of a call, its marker and what closes it."""
    form = "a call is not JSON of a name and arguments alone"
    start = p["call_begin"].find("{")
    if start < 0:
        raise Refusal(form)
    p["call_marker"] = p["call_begin"][:start].strip()
    try:
        text = p["call_begin"][start:] + "markname" + p["call_middle"] + "{}" + p["call_end"]
        made = json.JSONDecoder().raw_decode(text)[0]
        keys = {json.dumps(v): k for k, v in made.items()}
        p["call_name"], p["call_arguments"] = keys.pop('"markname"'), keys.pop("{}")
    except (ValueError, KeyError, AttributeError):
        raise Refusal(form) from None
    if keys or len(made) != 2 or list(made) != [p["call_name"], p["call_arguments"]]:
        raise Refusal(form)


def add_calls(p, template, chat):
    """Calls stand in an answer, results between it and the next turn."""
    name, arguments = "markfirst", json.dumps(CALL["function"]["arguments"], **DUMP)
    other = json.dumps(OTHER["function"]["arguments"], **DUMP)


    def rendered(*messages):
        return template.render([("user", USER), *messages, ("user", AGAIN)])

    text = need(rendered(calling("", CALL), result(RESULT, 1)), template.said)
    opening = chat["user_suffix"] + chat["assistant_prefix"]
    p["call_begin"] = need(without(cut(text, USER, name), head=opening),
                           "a call does not stand where an answer does")
    p["call_middle"] = need(cut(text, name, arguments), "arguments are not plain JSON")
    closing = cut(text, arguments, RESULT) or ""
    ending = chat["assistant_suffix"]
    if not ending or ending not in closing:
        raise Refusal("a call does not end as an answer does")
    p["call_end"], behind = closing.split(ending, 1)
    shown, later = RESULT, LATER
    if json.dumps(RESULT) in text:
        p["result_json"] = "1"
        shown, later = json.dumps(RESULT), json.dumps(LATER)
    p["result_begin"] = behind[:-1] if "result_json" in p else behind
    p["result_end"] = need(without(cut(text, shown, AGAIN), tail=chat["user_prefix"]),
                           "a result is not followed by a turn")
    both = rendered(calling("", CALL), result(RESULT, 1), result(LATER, 1))
    p["result_separator"] = need(cut(both, shown, later), "two results are not printed in a row")
    text = rendered(calling("", CALL, OTHER), result(RESULT, 1), result(LATER, 2))
    if text is None:
        p["call_one"] = "1"
    else:
        p["call_separator"] = need(
            without(cut(text, arguments, "marksecond"), head=p["call_end"], tail=p["call_begin"]),
            "two calls are not printed in a row")
        if other not in text:
            raise Refusal("arguments are not plain JSON")
    text = rendered(calling(ANSWER, CALL), result(RESULT, 1))
    if text is not None and ANSWER in text:
        p["call_text"] = need(without(cut(text, ANSWER, name), tail=p["call_begin"]),
                              "a text before a call changes it")
    add_call_keys(p)


def compose_calls(p, chat, m):
    """An answer that calls, as tools_answer does it."""
    text = m["content"].strip() if chat["trim"] else m["content"]
    out = chat["assistant_prefix"] + (text + p["call_text"] if text and "call_text" in p else "")
    made = []
    for c in m["tool_calls"]:
        f = c["function"]
        made.append(p["call_begin"] + f["name"] + p["call_middle"]
                    + json.dumps(f["arguments"], **DUMP) + p["call_end"])
    return out + p["call_separator"].join(made) + chat["assistant_suffix"]


def compose_tools(p, chat, messages, tools, generation=False):
    """A conversation with tools put together from pieces, as serve/tools.c does it."""
    out, rest = "", list(messages)
    if tools:
        system = rest.pop(0)[1] if rest[0][0] == "system" else None
        shown = p["tools_separator"].join(dump_tool(p, t) for t in tools)
        system = system.strip() if system is not None and chat["trim_system"] else system
        out = p["tools_begin"] if system is None else (
            p["tools_system_prefix"] + system + p["tools_system_suffix"])
        question = rest.pop(0)[1]
        out += shown + p["tools_end"] + (question.strip() if chat["trim"] else question)
        out += chat["user_suffix"]
    else:
        out = compose(chat, [rest.pop(0)])
    for i, m in enumerate(rest):
        if not isinstance(m, dict):
            out += compose({**chat, "begin": "", "default_system": ""}, [m])
        elif m["role"] == "assistant":
            out += compose_calls(p, chat, m)
        else:
            again = i > 0 and isinstance(rest[i - 1], dict) and rest[i - 1]["role"] == "tool"
            more = i + 1 < len(rest) and isinstance(rest[i + 1], dict) and (
                rest[i + 1]["role"] == "tool")
            out += p["result_separator"] if again else p["result_begin"]
            out += json.dumps(m["content"], **DUMP) if "result_json" in p else m["content"]
            out += "" if more else p["result_end"]
    return out + (chat["generation"] if generation else "")


def verify_tools(template, p, chat):
    """Compares compositions with the template's own renderings of what it was not probed with."""
    odd = tool("weigh", "Weighs \"it\" <here> & there's\tür \u2028 \x7f.", n={"type": "number", "enum": [1, 2.5]},
               deep={"type": "object", "properties": {"x": {"type": "array", "items": {}}}})
    plain = {"type": "function", "function": {"name": "now", "parameters": {}}}
    system, user, answer = ("system", "Be brief."), ("user", "One?\nTwo!"), ("assistant", "Yes.")
    weigh = call("weigh", 1, n=2.5, deep={"x": [None, True, "ü\"\n"]})
    ask, told = calling("", weigh), result('{"grams": 3, "note": "it\'s"}\n', 1)
    cases = {
        "a question": [user],
        "a system text": [system, user],
        "white space": [("system", "\n Be brief. "), ("user", " One?\n")],
        "a result": [user, ask, told],
        "white space around a result": [user, ask, result(" 3\n", 1)],
        "an answer to a result": [system, user, ask, told, answer, user],
        "calls one after the other": [user, ask, told, calling("", call("now", 2)),
                                      result("12:00", 2), answer, user],
        "a call after a text": [user, calling("I weigh it.", weigh), told],
    }
    if "call_one" not in p:
        cases["two calls"] = [user, calling("", weigh, call("now", 2)), told, result("12:00", 2)]
    for what, messages in cases.items():
        if messages[0][0] == "system" and chat["system_refused"]:
            continue
        for tools in ([odd, plain], [plain], None):
            if tools is None and not any(isinstance(m, dict) for m in messages):
                continue
            wanted = template.render(messages, True, tools)
            if wanted != compose_tools(p, chat, messages, tools, True):
                raise Refusal(f"{what} {'' if tools else 'without tools '}is not reproduced"
                              + (f" ({template.said})" if wanted is None else ""))


def check_marker(p, v):
    """An answer shows no control tokens, so a call must not need one to be seen."""
    for i, text in enumerate(v.texts):
        if v.kinds[i] == SPECIAL and text and text in p["call_begin"] + p["call_end"]:
            raise Refusal(f"{text} around a call is a control token")


def tool_pieces(template, chat, v):
    """-> the chat.* strings of tools: why they are left out, or nothing where there are none."""
    one = [("user", USER)]
    if not chat or template.render(one, tools=[FIRST]) == template.render(one):
        return {}
    p = dict.fromkeys(TOOL_PIECES, "")
    try:
        add_tool_list(p, template, chat)
        add_calls(p, template, chat)
        verify_tools(template, p, chat)
        check_marker(p, v)
        return {"tools": "1", **p}
    except Refusal as e:
        why = " ".join(str(e).split()) or "(no word)"
        warn(f"the tools of the chat template are left out: {why}")
        return {"tools_refused": why}


def kvzip_texts(p, bos, add_bos):
    """-> kvzip.prefix, kvzip.postfix, as the authors write them for each family."""
    if p is None:
        return bos if add_bos else "", "\n\nAnswer: "
    postfix = p["user_suffix"] + p["generation"]
    if p["user_suffix"].startswith(LLAMA3_TURN_END):  # their Llama 3 texts leave the dates out
        header = p["user_prefix"].replace("user", "system")
        prefix = p["begin"] + header + HELPER + p["user_suffix"] + p["user_prefix"]
        return prefix, "\n\n" + postfix
    system = p["default_system"]
    if not system and p["system_prefix"]:
        system = p["system_prefix"] + HELPER + "." + p["system_suffix"]
        return p["begin"] + system + p["user_prefix_after_system"], postfix
    return p["begin"] + system + p["user_prefix"], postfix


def chat_metadata(source, v, tokens):
    """chat.* and kvzip.* strings from a template, or those of a base model when there is none."""
    bos, p = tokens.get("bos_token") or "", None
    if source:
        template = Template(source, tokens)
        p = chat_pieces(template, bos)
        if p is None or not verify_chat(template, p):
            why = f" ({template.said})" if template.said else ""
            warn(f"the chat template cannot be taken apart{why}; the model is converted without it")
            p = None
    out = {"chat." + piece: p[piece] if p else "" for piece in PIECES}
    out |= {"chat." + k: t for k, t in tool_pieces(template if p else None, p, v).items()}
    out["kvzip.prefix"], out["kvzip.postfix"] = kvzip_texts(p, bos, v.meta["add_bos"])
    for token in v.strippers:
        out = {k: re.sub(re.escape(token) + r"\s+", lambda m: token, t) for k, t in out.items()}
    out["chat.trim"] = str(int(bool(p and p["trim"])))
    if p and p["trim_system"] != p["trim"]:
        out["chat.trim_system"] = str(int(p["trim_system"]))
    if p and p["system_refused"]:
        out["chat.system_refused"] = " ".join(p["system_refused"].split()) or "(no word)"
        warn(f"the chat template takes no system text: {out['chat.system_refused']}")
    return {"chat.present": str(int(p is not None)), **out}


def template_of(path, config):
    """The chat template of a Hugging Face directory, wherever this version keeps it."""
    jinja = os.path.join(path, "chat_template.jinja")
    check_there(jinja)
    if os.path.exists(jinja):
        try:
            with open(jinja, encoding="utf-8") as f:
                return f.read()
        except ValueError as e:
            found = foreign(jinja) or f"damaged: {e}"
            raise Refusal(f"chat_template.jinja is {found}") from None
    source = config.get("chat_template")
    if source is None:
        source = read_json(os.path.join(path, "chat_template.json"), {}).get("chat_template")
    if isinstance(source, list):
        named = {t["name"]: t["template"] for t in source}
        source = named.get("default")
        if named and source is None:
            warn(f"of the chat templates {', '.join(named)} none is called default: none is used")
    return source


# ---- 7. the file ---------------------------------------------------------------------------------


def layout(outputs):
    """-> [(name, dtype, shape, begin, end, chunks)], fillers between so that all begin aligned."""
    out, at = [], 0
    for o in outputs:
        if at % ALIGN:
            gap = ALIGN - at % ALIGN
            fill = lambda gap=gap: [np.zeros(gap, np.uint8)]
            out.append((f"pad.{len(out)}", "U8", (gap,), at, at + gap, fill))
            at += gap
        n = math.prod(o.shape) * ITEM[o.dtype]
        out.append((o.name, o.dtype, o.shape, at, at + n, o.chunks))
        at += n
    return out


class Progress:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, total):
        self.total, self.done, self.shown = max(total, 1), 0, -1
        self.on = sys.stderr is not None and sys.stderr.isatty()

    def add(self, n, name):
        self.done += n
        percent = 100 * self.done // self.total
        if self.on and percent != self.shown:
            self.shown = percent
            bar = "#" * (percent * 30 // 100)
            print(f"\r{bar:.<30} {percent:3d}% {name:24.24}", end="", file=sys.stderr, flush=True)

    def close(self):
        if self.on:
            print("\r" + " " * 64 + "\r", end="", file=sys.stderr, flush=True)


def write_tensors(f, rows, digest, progress):
    for name, dtype, shape, begin, end, chunks in rows:
        digest.update(b"" if name.startswith("pad.") else f"{name} {dtype} {shape}".encode())
        for chunk in chunks():
            data = memoryview(chunk).cast("B") if chunk.size else b""
            f.write(data)
            if not name.startswith("pad."):
                digest.update(data)
            begin += len(data)
            progress.add(len(data), name)
        assert begin == end, (name, begin, end)


PEOPLE = ("name", "source", "type")  # metadata that changes no result


@contextlib.contextmanager
def signals_held():
    """What happens in there and the note of it are one: no signal comes between."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


class NewFile:
    """A file that appears whole or not at all: see newfile.h, whose rules these are. Its temporary
    file, "TARGET.PID.N.tmp", is locked while it is written: one without a lock is a dead writer's.
    """

    def __init__(self, path):
        self.asked, self.path = path, os.path.realpath(path)
        self.file = self.temporary = None
        self.written = False
        with self.errors():
            old = self.check()
            self.remove_dead()
            self.file = os.fdopen(self.open_temporary(0o600 if old else 0o666), "wb")
            if old is not None:
                self.take_over(old)

    @contextlib.contextmanager
    def errors(self):
        """What the system refuses, as the refusal of this file; nothing is left of it."""
        try:
            yield
        except OSError as e:
            self.discard()
            raise Refusal(e.strerror or str(e), self.asked) from None
        except BaseException:
            self.discard()
            raise

    def check(self):
        """-> facts of the file that is there, or None. A file that may not be written to may not
        be replaced either."""
        if not os.path.basename(self.asked):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if self.asked == "-":
            raise Refusal("a model is written to a file, not to stdout; ./- is one", self.asked)
        if not os.path.lexists(self.path):
            return None
        st = os.lstat(self.path)
        if not stat.S_ISREG(st.st_mode):
            raise Refusal("not a regular file", self.asked)
        if not os.access(self.path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if not self.lock(fd):
                raise Refusal("another process is writing to it", self.asked)
        finally:
            os.close(fd)  # ends the lock
        return st

    def take_over(self, old):
        """The owner and the mode of the file that is replaced."""
        fd, mode = self.file.fileno(), stat.S_IMODE(old.st_mode)
        if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
            try:
                os.fchown(fd, old.st_uid, old.st_gid)
            except OSError:
                mode &= 0o777  # no set-id bits for another owner
        os.fchmod(fd, mode)

    def open_temporary(self, mode):
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        for n in range(100):
            temporary = f"{self.path}.{os.getpid()}.{n}.tmp"
            try:
                with signals_held():
                    fd = os.open(temporary, flags, mode)
                    self.temporary = temporary
            except FileExistsError:
                continue
            if self.lock(fd) and os.fstat(fd).st_nlink > 0:
                return fd
            os.close(fd)  # another writer has just taken it for a dead one's
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    @staticmethod
    def lock(fd):
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:  # a file system without locks lets everybody in
            return e.errno not in (errno.EACCES, errno.EAGAIN)
        return True

    def remove_dead(self):
        """Removes the temporary files of writers that died."""
        folder, base = os.path.split(self.path)
        names = []
        with contextlib.suppress(OSError):  # it may be writable and not readable
            names = os.listdir(folder)
        for name in names:
            if re.fullmatch(re.escape(base) + r"\.[0-9]+\.[0-9]+\.tmp", name):
                with contextlib.suppress(OSError):
                    path = os.path.join(folder, name)
                    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                    with open(os.open(path, flags), "rb") as f:
                        st = os.fstat(f.fileno())
                        if stat.S_ISREG(st.st_mode):
                            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                            os.unlink(path)

    def commit(self):
        """Synced, then renamed once; from then on no signal and no error takes anything back."""
        with self.errors():
            self.file.flush()
            os.fsync(self.file.fileno())
            self.leave_cache()
            with signals_held():
                os.rename(self.temporary, self.path)
                self.temporary, self.written = None, True
                for s in STOPPING:
                    signal.signal(s, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            self.file.close()
            fd = os.open(os.path.dirname(self.path), os.O_RDONLY)
            os.fsync(fd)  # makes the rename durable, where the file system can
            os.close(fd)

    def leave_cache(self):
        """A large file leaves the page cache, where writing has put it in small pages: the first to map it gets large
        ones, out of which weights are read faster (weights.h)."""
        if self.file.tell() >= 256 << 20 and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def discard(self):
        """Removes the temporary file, if it is not in its place yet."""
        temporary, self.temporary = self.temporary, None
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()


# What the files of a model end in: an output of such a name in its folder is taken for one.
MODEL_FILES = (".safetensors", ".json", ".model", ".tiktoken", ".jinja", ".bin", ".pth", ".gguf")


def refuse_sources(out, model):
    """An output may not replace a file that is read, nor become one."""
    folder = os.path.isdir(model)
    names = [os.path.join(model, n) for n in sorted(os.listdir(model))] if folder else [model]
    for name in names:
        if os.path.exists(name) and (not folder or name.endswith(MODEL_FILES)):
            if os.path.exists(out) and os.path.samefile(out, name):
                raise Refusal(f"is read for the conversion ({os.path.basename(name)})", out)
    target = os.path.realpath(out)
    parent = os.path.dirname(target)
    if folder and target.endswith(MODEL_FILES) and os.path.isdir(parent):
        if os.path.samefile(parent, model):
            raise Refusal("would be taken for a part of the model in its folder", out)


def refuse_opened(out):
    """The same for all that was opened by then, such as the shards an index names."""
    if os.path.exists(out.path):
        st = os.stat(out.path)
        if (st.st_dev, st.st_ino) in SourceFile.opened:
            raise Refusal("is read for the conversion", out.asked)


def write_file(out, meta, outputs):
    """All that plan() has prepared into a NewFile, which then takes its place."""
    for key, value in meta.items():
        if "\0" in value:
            raise Refusal(f"{key} would hold a zero byte, which ends a text in C: {value[:60]!r}")
    rows = layout(outputs)
    blank = "0" * 64
    meta = {"format": meta.pop("format"), "fingerprint": blank, **meta}
    head = {"__metadata__": meta}
    head.update({n: {"dtype": d, "shape": s, "data_offsets": [a, b]} for n, d, s, a, b, _ in rows})
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    text += b" " * (up(8 + len(text), ALIGN) - 8 - len(text))
    if len(text) > MAX_HEADER:
        raise Refusal("too many tensors for one file")
    digest = hashlib.sha256()
    for key, value in meta.items():
        if key not in PEOPLE and not key.startswith(("chat.", "kvzip.")):
            digest.update(f"{key}={value}\n".encode())
    progress = Progress(rows[-1][4])
    try:
        with out.errors():
            out.file.write(struct.pack("<Q", len(text)) + text)
            write_tensors(out.file, rows, digest, progress)
            out.file.seek(8 + text.index(b'"fingerprint":"') + len(b'"fingerprint":"'))
            out.file.write(digest.hexdigest().encode())
        out.commit()
    finally:
        progress.close()


def number(x):
    """A field as text: the shortest that reads back as the same float32."""
    if isinstance(x, (int, str)):
        return str(x)
    texts = (f"{float(x):.{digits}g}" for digits in range(1, 10))
    return next(t for t in texts if np.float32(t) == np.float32(x))


MAX_STOPS = 64  # as tokenizer.c has it


def token_ids(where, key, value, several=False):
    """The ids that a file names: none, one, or a list where there may be several."""
    ids = value if several and isinstance(value, list) else [value]
    for i in ids:
        if not (i is None or (type(i) is int and 0 <= i < 1 << 31)):
            raise Refusal(f"{where}: {key} is {repr(value)[:60]}, expected the id of a token")
    return [i for i in ids if i is not None]


def check_ids(v, rows, configs):
    """Every id that config.json and generation_config.json name has a row in the embedding."""
    for where, c in configs.items():
        for key in ("bos_token_id", "eos_token_id"):
            for i in token_ids(where, key, c.get(key), key == "eos_token_id"):
                if i >= rows:
                    raise Refusal(f"{where}: {key} is {i}, and there are {rows} tokens")
                if i >= len(v.texts) and key == "eos_token_id":
                    warn(f"{where}: {key} {i} is not in the tokenizer and ends no answer")


def check_token(where, key, t):
    """A token is a text, or an object with it."""
    text = t.get("content") if isinstance(t, dict) else t
    if not (isinstance(text, str) or t is None):
        raise Refusal(f"{where}: {key} is {repr(t)[:60]}, expected a token")


def check_tokenizer_config(path):
    """The fields of tokenizer_config.json and special_tokens_map.json that are read here."""
    for where in ("special_tokens_map.json", "tokenizer_config.json"):
        c = read_json(os.path.join(path, where), {})
        for key, value in c.items():
            if key.endswith("_token") and not key.startswith("add_"):
                check_token(where, key, value)
        for key in ("extra_special_tokens", "additional_special_tokens"):
            tokens = c.get(key) or []
            for t in tokens.values() if isinstance(tokens, dict) else tokens:
                check_token(where, key, t)
        if c.get("add_bos_token") is not None:
            check_value(where, "add_bos_token", c["add_bos_token"], "true or false")
        added = c.get("added_tokens_decoder", {})
        check_value(where, "added_tokens_decoder", added, "an object")
        for i, t in added.items():
            if not (re.fullmatch("[0-9]{1,8}", i, re.A) and isinstance(t, dict)):
                raise Refusal(f"{where}: added_tokens_decoder: {i[:20]!r} is no id of a token")
            check_token(where, f"added_tokens_decoder: {i}", t)
        template = c.get("chat_template")
        if isinstance(template, list):
            if not all(isinstance(t, dict) and {"name", "template"} <= set(t) and
                       all(isinstance(x, str) for x in t.values()) for t in template):
                raise Refusal(f"{where}: chat_template is a list of other than templates")
        elif template is not None:
            check_value(where, "chat_template", template, "a text")


def read_directory(path):
    """-> config, tensors, Vocab, chat metadata, stop ids of a Hugging Face directory."""
    check_directory(path)
    with within("config.json"):
        outer = read_json(os.path.join(path, "config.json"))
        config = text_config(outer)
        family_of(config.get("model_type"))
    tensors = open_directory(path)
    if WRAPPED.get(outer.get("model_type"), ("", False))[1] is None:
        stored = any(name.endswith("lm_head.weight") for name in tensors)
        config.setdefault("tie_word_embeddings", not stored)
    if config["model_type"] == "gpt_oss":
        one_by_one(tensors)
    check_tokenizer_config(path)
    with within("the tokenizer's files"):
        v, tc = vocab_from_directory(path, config["model_type"])
        tokens = {k: token_text(x) for k, x in tc.items() if k.endswith("_token") and token_text(x)}
        template = template_of(path, tc)
    generation = read_json(os.path.join(path, "generation_config.json"), {})
    rows = config.get("vocab_size")
    rows = rows if type(rows) is int else len(v.texts)
    eos = tokens.get("eos_token")
    if eos is not None and v.ids.get(eos, rows) >= rows:
        raise Refusal(f"tokenizer_config.json: eos_token {eos!r} is no token of the vocabulary")
    configs = {"config.json": config, "generation_config.json": generation}
    check_ids(v, rows, configs)
    if v.meta["bos_id"] < 0 and config.get("bos_token_id") is not None and "bos_token" not in tc:
        v.meta["bos_id"] = config["bos_token_id"]
    stops = stop_ids(v, config.get("eos_token_id"), generation.get("eos_token_id"),
                     v.ids.get(eos))
    with within("the chat template"):
        return config, tensors, v, chat_metadata(template, v, tokens), stops


# Ids of a GGUF that are read, and what llama.cpp takes for SentencePiece when they are no tokens.
GGUF_IDS = {"bos": 1, "eos": 2, "unknown": 0, "eot": None, "eom": None}


def check_gguf_tokens(meta):
    """The lists of a GGUF's vocabulary: what they hold, and that they are equally long."""
    def get(key, kind):
        value = meta.get("tokenizer.ggml." + key, [])
        if not isinstance(value, list) or not all(type(x) is kind for x in value):
            raise Refusal(f"GGUF: tokenizer.ggml.{key} is no list of {kind.__name__} values")
        return value

    texts, scores = get("tokens", str), get("scores", float)
    kinds, merges = get("token_type", int), get("merges", str)
    for name, values in (("scores", scores), ("token_type", kinds)):
        if values and len(values) != len(texts):
            raise Refusal(f"GGUF: {len(texts)} tokens, but {len(values)} tokenizer.ggml.{name}")
    if not all(map(math.isfinite, scores)):
        raise Refusal("GGUF: tokenizer.ggml.scores holds a value that is not finite")
    for i, (text, kind) in enumerate(zip(texts, kinds)):
        if GGUF_KINDS.get(kind) == BYTE and not re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
            raise Refusal(f"GGUF: token {i} is a byte, and its text is {text[:20]!r}")
    for key in ("add_bos_token", "add_space_prefix"):
        value = meta.get("tokenizer.ggml." + key, False)
        check_value("GGUF", "tokenizer.ggml." + key, value, "true or false")
    for m in merges:
        if m.find(" ", 1) < 0:
            raise Refusal(f"GGUF: tokenizer.ggml.merges holds {m[:20]!r}, expected two tokens")
    template = meta.get("tokenizer.chat_template", "")
    check_value("GGUF", "tokenizer.chat_template", template, "a text")


def checked_gguf_ids(meta):
    """The metadata with every id that is read a token of the vocabulary, as llama.cpp has them."""
    meta = dict(meta)
    texts, spm = meta.get("tokenizer.ggml.tokens"), meta.get("tokenizer.ggml.model") == "llama"
    n = len(texts) if isinstance(texts, list) else 0
    for name, default in GGUF_IDS.items():
        key = f"tokenizer.ggml.{name}_token_id"
        value = meta.get(key)
        if value is not None and (type(value) is not int or value < 0):
            raise Refusal(f"GGUF: {key} is {repr(value)[:60]}, expected the id of a token")
        if value is not None and value >= n:
            if not spm and name in ("bos", "eos"):
                raise Refusal(f"GGUF: {key} is {value}, and there are {n} tokens")
            other = default if spm and default is not None and default < n else None
            warn(f"{key} is {value}, and there are {n} tokens: {'none' if other is None else other}"
                 " is used, as llama.cpp does")
            value = other
        elif value is None and spm and name == "eos" and default < n:
            value = default
        meta[key] = value
    return {k: x for k, x in meta.items() if x is not None}


def gguf_vocab(meta):
    """-> metadata whose ids are tokens, Vocab."""
    check_gguf_tokens(meta)
    meta = checked_gguf_ids(meta)
    with within("GGUF vocabulary"):
        return meta, vocab_from_gguf(meta)


def read_gguf(path):
    """The same of a GGUF file."""
    meta, tensors = open_gguf(path)
    with within("GGUF metadata"):
        config = gguf_config(meta, tensors)
    meta, v = gguf_vocab(meta)
    names = {"bos_token": v.meta["bos_id"], "eos_token": meta.get("tokenizer.ggml.eos_token_id")}
    tokens = {k: v.text_of(i) for k, i in names.items() if v.text_of(i)}
    ends = [meta.get(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot", "eom")]
    ends += [v.ids.get(text) for text in gguf_ends(v)]
    with within("the chat template"):
        chat = chat_metadata(meta.get("tokenizer.chat_template"), v, tokens)
    return config, tensors, v, chat, stop_ids(v, *ends)


def read_llama2c(path, tokenizer):
    """The same of a checkpoint of llama2.c, whose tokenizer is another file. Its stories end where
    the next one would begin: with BOS."""
    config, tensors = open_llama2c(path)
    tokenizer = tokenizer or os.path.join(os.path.dirname(os.path.abspath(path)), "tokenizer.bin")
    if not os.path.exists(tokenizer):
        raise Refusal(f"{tokenizer} is missing; --tokenizer PATH names the model's own")
    v = vocab_from_llama2c(tokenizer, config["vocab_size"])
    return config, tensors, v, chat_metadata(None, v, {}), stop_ids(v, 1, 2)


def check_special(v, stops):
    """What C holds about special ids, after the last token without an embedding has gone."""
    for name in ("bos_id", "unk_id"):
        if not -1 <= v.meta[name] < len(v.texts):
            raise Refusal(f"tokenizer: {name} is {v.meta[name]} of {len(v.texts)} tokens")
    if len(stops) > MAX_STOPS:
        raise Refusal(f"{len(stops)} tokens end an answer, at most {MAX_STOPS} are supported")


def tokenizer_metadata(v, stops):
    meta = {"tokenizer." + k: str(x) for k, x in v.meta.items()}
    meta["tokenizer.stop_ids"] = ",".join(str(i) for i in stops if i < len(v.texts))
    return meta


# Where the values of a model's config stand, and what its source is called.
SOURCES = {"config.json": "Hugging Face", "GGUF": "GGUF", "llama2.c": "llama2.c"}


def source_kind(path):
    if os.path.isdir(path):
        return "config.json"
    return "llama2.c" if os.path.isfile(path) and is_llama2c(path) else "GGUF"


def plan(args):
    """-> metadata and tensors of the new file; everything is checked, nothing is converted yet."""
    where, gguf = source_kind(args.model), not os.path.isdir(args.model)
    if args.tokenizer and where != "llama2.c":
        raise Refusal("--tokenizer is for checkpoints of llama2.c; others have theirs with them")
    config, tensors, v, chat, stops = (
        read_llama2c(args.model, args.tokenizer) if where == "llama2.c" else
        (read_gguf if gguf else read_directory)(args.model))
    model = describe(config, args.ignore_key, args.yarn, where)
    v.limit(model.fields["vocab_size"])
    check_special(v, stops)
    target = args.type or (None if gguf else "q8")
    outputs, lossy = model_outputs(model, Weights(tensors, gguf, model), target)
    if lossy:
        warn(f"requantized with some loss: {', '.join(sorted(lossy))}")
    kinds = sorted({t.kind for t in tensors.values() if len(t.shape) == 2})
    name = os.path.basename(os.path.abspath(args.model))
    meta = {
        "format": FORMAT,
        "name": name[: -len(".gguf")] if name.endswith(".gguf") else name,
        "source": f"{SOURCES[where]}, " + " ".join(kinds),
        "type": target or "keep",
        **{k: number(x) for k, x in model.fields.items()},
        **tokenizer_metadata(v, stops),
        **chat,
    }
    return meta, outputs + v.outputs()


def plan_tokenizer(args):
    """The same without weights, to test tokenizers whose models are too large to test with."""
    with open(args.model, "rb") as f:
        data = f.read()
    if data[:4] == b"GGUF":
        _, v = gguf_vocab(open_gguf(args.model)[0])
    elif data[:1] == b"{":
        v = vocab_from_json(read_json(args.model))
    elif is_rank_file(data):
        v = vocab_from_ranks(data, args.split)
    else:
        v = vocab_from_sentencepiece(data)
    meta = {"format": FORMAT, **tokenizer_metadata(v, []), **chat_metadata(None, v, {})}
    return meta, v.outputs()


def parse_args():
    p = argparse.ArgumentParser(
        prog="export.py",
        description="Convert a Hugging Face directory, a GGUF file or a checkpoint of llama2.c for "
        "./run.",
        epilog="""examples:
  export.py ~/models/Llama-3.2-1B-Instruct -o llama.kvz
  export.py SmolLM2-135M-Instruct.Q4_1.gguf -o smollm2.kvz    its 4-bit weights stay bit for bit
  export.py ~/models/Qwen3-4B --type q4 --yarn 4 -o qwen3.kvz
  export.py stories260K.bin --tokenizer tok512.bin -o stories.kvz    llama2.c's own""",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help="directory with config.json and *.safetensors, a .gguf file, or a "
                   ".bin file of llama2.c")
    p.add_argument("-o", "--out", required=True, help="the file to write")
    p.add_argument(
        "--type", choices=list(K),
        help="type of the matrices (default: q8; of a GGUF: what it has, where a type here holds "
        "it exactly, and q8 otherwise). q4 keeps the embedding and the output matrix in q8")
    p.add_argument(
        "--yarn", type=float, metavar="FACTOR",
        help="Qwen: stretch the context by FACTOR (KVzip's authors use 4 for Qwen3)")
    p.add_argument(
        "--ignore-key", action="append", default=[], metavar="KEY",
        help="convert although config.json sets KEY, which is not supported")
    p.add_argument(
        "--tokenizer", metavar="PATH",
        help="llama2.c: the model's tokenizer (default: tokenizer.bin beside it)")
    tests = p.add_argument_group("for tests")
    tests.add_argument("--tokenizer-only", action="store_true", help="model is a tokenizer's file")
    tests.add_argument(
        "--split", choices=["llama3", "qwen2"], default="llama3",
        help="how text is split before the merges of a rank file")
    args = p.parse_args()
    if args.yarn is not None and not 1 < args.yarn <= 1e6:
        p.error("--yarn takes a factor above 1")
    return args


def convert(args):
    SourceFile.opened.clear()
    refuse_sources(args.out, args.model)
    out = NewFile(args.out)
    try:
        with within("the model"):
            meta, outputs = (plan_tokenizer if args.tokenizer_only else plan)(args)
            refuse_opened(out)
            with np.errstate(all="ignore"):  # what is no number in the end is refused by its name
                write_file(out, meta, outputs)
    except KeyboardInterrupt:
        sys.exit("export.py: interrupted, " + ("all written" if out.written else "nothing written"))
    finally:
        out.discard()


def main():
    args = parse_args()
    handlers = {s: signal.getsignal(s) for s in STOPPING}
    try:
        for s in STOPPING:  # all of them clean up
            if handlers[s] is not signal.SIG_IGN:
                signal.signal(s, signal.default_int_handler)
        convert(args)
    except Refusal as e:
        path = args.model if e.path is None else e.path
        sys.exit(f"export.py: {printable(path)}: {printable(e)}")
    except OSError as e:
        sys.exit(f"export.py: {printable(e.filename or args.model)}: {e.strerror or printable(e)}")
    except ImportError as e:
        sys.exit(f"export.py: {e}; pip install -r requirements.txt")
    except KeyboardInterrupt:
        sys.exit("export.py: interrupted, nothing written")
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


if __name__ == "__main__":
    main()
