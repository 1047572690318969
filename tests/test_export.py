#!/usr/bin/env python3
"""export.py: what it writes is what the models say, and what it cannot convert it refuses by name.

Runs on the committed fixtures; GGUF, sharded, fused and damaged models are made from them.
"""

import base64
import contextlib
import errno
import io
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

import gguf
import numpy as np
from safetensors import safe_open

TESTS = os.path.dirname(os.path.abspath(__file__))
FIXTURES = os.path.join(TESTS, "fixtures")
NAMES = ["smol", "llama", "qwen2", "qwen3", "gemma3", "mistral"]
sys.path.insert(0, os.path.dirname(TESTS))
sys.path.insert(0, os.path.join(os.path.dirname(TESTS), "bench"))
import export  # noqa: E402
import gemma4  # noqa: E402
import shapes  # noqa: E402
from checks import run_cases  # noqa: E402
from test_serve import Server  # noqa: E402

SUFFIX = {
    "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj", "w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj",
}
GGUF_SUFFIX = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up", "input_layernorm": "attn_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm",
}
GEMMA_SUFFIX = {"post_attention_layernorm": "post_attention_norm",
                "pre_feedforward_layernorm": "ffn_norm",
                "post_feedforward_layernorm": "post_ffw_norm"}


def run(*argv):
    """export.py with these arguments -> exit status, what it said."""
    said = io.StringIO()
    with mock.patch.object(sys, "argv", ["export.py", *argv]), contextlib.redirect_stderr(said):
        with contextlib.redirect_stdout(said):
            try:
                export.main()
                return 0, said.getvalue()
            except SystemExit as e:
                status = e.code if isinstance(e.code, int) else 1
                return status, said.getvalue() + (e.code if isinstance(e.code, str) else "")


def read_source(path):
    """model.safetensors of a fixture as float32; numpy has no bfloat16, so by hand."""
    with open(os.path.join(path, "model.safetensors"), "rb") as f:
        data = f.read()
    n = struct.unpack("<Q", data[:8])[0]
    out = {}
    for name, e in json.loads(data[8 : 8 + n]).items():
        if name != "__metadata__":
            raw = data[8 + n + e["data_offsets"][0] : 8 + n + e["data_offsets"][1]]
            x = np.frombuffer(raw, {"BF16": "<u2", "F32": "<f4", "U8": "u1"}[e["dtype"]])
            if e["dtype"] == "BF16":
                x = (x.astype(np.uint32) << 16).view(np.float32)
            out[name] = x.reshape(e["shape"])
    return out


def write_source(path, tensors, name="model.safetensors"):
    """float32 tensors, or bytes, as a safetensors file, padded as the library does it."""
    head, at = {}, 0
    for key, x in tensors.items():
        head[key] = {"dtype": "U8" if x.dtype == np.uint8 else "F32", "shape": x.shape, "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(head).encode()
    with open(os.path.join(path, name), "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for x in tensors.values():
            f.write(np.ascontiguousarray(x, "u1" if x.dtype == np.uint8 else "<f4").tobytes())


class Converted:
    """A converted file as Python sees it, matrices taken out of their panels again."""

    def __init__(self, path):
        with open(path, "rb") as f:
            self.header_bytes = struct.unpack("<Q", f.read(8))[0]
            self.header = json.loads(f.read(self.header_bytes))
        self.meta = self.header.pop("__metadata__")
        raw = open(path, "rb").read()[8 + self.header_bytes :]
        self.t = {}
        types = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I8": "i1", "U8": "u1"}
        for name, e in self.header.items():
            a, b = e["data_offsets"]
            self.t[name] = np.frombuffer(raw[a:b], types[e["dtype"]]).reshape(e["shape"])

    def matrix(self, name):
        """float32 [rows][cols], padding included."""
        x, dtype = self.t[name], self.header[name]["dtype"]
        if dtype == "BF16":
            x = (x.astype(np.uint32) << 16).view(np.float32)
        if dtype == "U8":
            x = np.concatenate([x & 15, x >> 4], -1)  # [panels][cols/8][16][8]
        x = x.transpose(0, 2, 1, 3).reshape(x.shape[0] * 16, -1).astype(np.float32)
        if dtype in ("I8", "U8"):
            x = x.reshape(len(x), -1, 32)
            scale = self.rows(name + ".scale")
            if name + ".offset" in self.t:
                x = x * scale + self.rows(name + ".offset")
            else:
                x = x * scale - (8 * scale if dtype == "U8" else 0)
        return x.reshape(len(x), -1)

    def rows(self, name):
        x = self.t[name].astype(np.float32)  # [panels][cols/32][16]
        return x.transpose(0, 2, 1).reshape(x.shape[0] * 16, -1, 1)


class Case(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="test_export.")
        self.addCleanup(shutil.rmtree, self.dir)
        self.out = os.path.join(self.dir, "out.kvz")

    def convert(self, model, *args):
        status, said = run(model, "-o", self.out, *args)
        self.assertEqual(status, 0, said)
        return Converted(self.out)

    def refuse(self, model, *words, args=()):
        """Refused in one line that holds the words, and nothing is left behind."""
        status, said = run(model, "-o", self.out, *args)
        self.assertEqual(status, 1, said)
        self.assertEqual(said.count("\n"), 0, said)
        for word in words:
            self.assertIn(word, said)
        left = [f for f in os.listdir(self.dir) if "kvz" in f]
        self.assertEqual(left, [])

    def copy(self, name, **config):
        """A copy of a fixture in the temporary directory with changed config keys."""
        path = os.path.join(self.dir, name)
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(os.path.join(FIXTURES, name), path)
        self.edit(path, "config.json", **config)
        return path

    def edit(self, path, file, **changes):
        with open(os.path.join(path, file)) as f:
            value = {**json.load(f), **changes}
        with open(os.path.join(path, file), "w") as f:
            json.dump({k: v for k, v in value.items() if v is not DROP}, f)

    def same_tensors(self, a, b, but=()):
        self.assertEqual(set(a.t) - set(but), set(b.t) - set(but))
        for name in a.t:
            if name not in but and not name.startswith("pad."):
                np.testing.assert_array_equal(a.t[name], b.t[name], name)


DROP = object()


class TestFixtures(Case):
    def test_same_bytes_as_committed(self):
        script = os.path.join(TESTS, "convert_fixtures.sh")
        env = dict(os.environ, PYTHON=sys.executable)
        subprocess.run(["sh", script, self.dir], check=True, env=env)
        for name in sorted(os.listdir(self.dir)):
            with open(os.path.join(self.dir, name), "rb") as a:
                with open(os.path.join(FIXTURES, name), "rb") as b:
                    self.assertEqual(a.read(), b.read(), name)
        self.assertEqual(len(os.listdir(self.dir)), 19)

    def test_layout(self):
        for name in NAMES + ["smol-q8", "smol-q4"]:
            path = os.path.join(FIXTURES, name + ".kvz")
            c = Converted(path)
            self.assertEqual((8 + c.header_bytes) % 64, 0)
            for tensor, e in c.header.items():
                self.assertTrue(tensor.startswith("pad.") or e["data_offsets"][0] % 64 == 0, tensor)
            with safe_open(path, "np") as f:  # refuses holes and overlaps
                self.assertEqual(set(f.keys()), set(c.header))
                self.assertEqual(f.metadata()["format"], "kvzip.c model 1")

    def test_f32_is_exact(self):
        for name in NAMES:
            c = Converted(os.path.join(FIXTURES, name + ".kvz"))
            source = read_source(os.path.join(FIXTURES, name))
            self.check_weights(c, source, 0)
            one = np.float32(name == "gemma3")
            np.testing.assert_array_equal(c.t["rms_final"], source["model.norm.weight"] + one)
            norm = source["model.layers.1.input_layernorm.weight"]
            np.testing.assert_array_equal(c.t["layers.1.rms_att"], norm + one)

    def check_weights(self, c, source, share):
        """Every matrix within share of its largest value; padding is zero."""
        pairs = {f"layers.{l}.{ours}": f"model.layers.{l}.{theirs}.weight"
                 for l in range(int(c.meta["n_layers"])) for ours, theirs in SUFFIX.items()}
        pairs.update({"tok_embed": "model.embed_tokens.weight", "wcls": "lm_head.weight"})
        for ours, theirs in pairs.items():
            if theirs not in source:
                self.assertNotIn(ours, c.t)
                continue
            x, y = c.matrix(ours), source[theirs]
            if not c.header[ours]["dtype"] == "U8":
                self.assertEqual(np.abs(x[len(y) :]).max(initial=0), 0)
                self.assertEqual(np.abs(x[:, y.shape[1] :]).max(initial=0), 0)
            x = x[: y.shape[0], : y.shape[1]]
            if share == 0:
                np.testing.assert_array_equal(x, y)
            self.assertLessEqual(np.abs(x - y).max(), share * np.abs(y).max() + 1e-12, ours)

    def test_other_types(self):
        source = read_source(os.path.join(FIXTURES, "smol"))
        for kind, share in (("bf16", 0), ("f16", 1e-3), ("q8", 0.5 / 127 * 1.01), ("q4", 0.12)):
            self.check_weights(Converted(os.path.join(FIXTURES, f"smol-{kind}.kvz")), source, share)

    def test_q4_keeps_the_vocabulary_in_q8(self):
        c = Converted(os.path.join(FIXTURES, "smol-q4.kvz"))
        self.assertEqual(c.header["tok_embed"]["dtype"], "I8")
        self.assertEqual(c.header["layers.0.wq"]["dtype"], "U8")

    def test_vocabulary(self):
        for name in NAMES:
            c = Converted(os.path.join(FIXTURES, name + ".kvz"))
            with safe_open(os.path.join(FIXTURES, name, "expected.safetensors"), "np") as f:
                raw, ends = f.get_tensor("vocab.bytes"), f.get_tensor("vocab.offsets")
            np.testing.assert_array_equal(c.t["tok.bytes"], raw)
            np.testing.assert_array_equal(c.t["tok.offsets"], ends)
            with open(os.path.join(FIXTURES, name, "tokenizer.json")) as f:
                model = json.load(f)["model"]
            self.assertEqual(len(c.t["tok.merges"]), len(model["merges"]))
            ids = model["vocab"]
            first = model["merges"][0]
            left, right = first.split(" ") if isinstance(first, str) else first
            want = [ids[left], ids[right], ids[left + right]]
            self.assertEqual(c.t["tok.merges"][0].tolist(), want)

    def test_kinds(self):
        kinds = Converted(os.path.join(FIXTURES, "gemma3.kvz")).t["tok.kind"].tolist()
        self.assertEqual(kinds[:14], [1] * 7 + [2] * 6 + [3])
        self.assertEqual(kinds.count(3), 256)
        self.assertEqual(set(kinds[-100:]), {0})

    def test_tokenizer_metadata(self):
        want = {
            "smol": "bpe digits+gpt2 nfc=0 ignore=0 bos=0 space=0 bytes=0 stops=0,2",
            "llama": "bpe llama3 nfc=0 ignore=1 bos=1 space=0 bytes=0 stops=763,767",
            "qwen2": "bpe qwen2 nfc=1 ignore=0 bos=0 space=0 bytes=0 stops=680,682",
            "qwen3": "bpe qwen2 nfc=1 ignore=0 bos=0 space=0 bytes=0 stops=795,797",
            "gemma3": "spm none nfc=0 ignore=0 bos=1 space=0 bytes=1 stops=1,6",
            "mistral": "spm none nfc=0 ignore=0 bos=1 space=1 bytes=1 stops=2",
        }
        for name, text in want.items():
            m = Converted(os.path.join(FIXTURES, name + ".kvz")).meta
            m = {k.replace("tokenizer.", ""): v for k, v in m.items()}
            got = (f"{m['model']} {m['split']} nfc={m['nfc']} ignore={m['ignore_merges']} "
                   f"bos={m['add_bos']} space={m['space_prefix']} bytes={m['byte_fallback']} "
                   f"stops={m['stop_ids']}")
            self.assertEqual(got, text, name)

    def test_chat(self):
        """Pieces, put together as C does it, give the text of transformers."""
        for name in NAMES:
            meta = Converted(os.path.join(FIXTURES, name + ".kvz")).meta
            p = {k[5:]: v for k, v in meta.items() if k.startswith("chat.")}
            p["trim"] = p["trim"] == "1"
            with open(os.path.join(FIXTURES, name, "cases.json")) as f:
                cases = json.load(f)
            self.assertEqual(meta["kvzip.postfix"], cases["text"]["postfix"], name)
            self.assertGreaterEqual(len(cases["chat_cases"]), 3)
            for case in cases["chat_cases"]:
                messages = [(m["role"], m["content"]) for m in case["messages"]]
                invite = case["add_generation_prompt"]
                if name == "qwen3" and invite and "enable_thinking" not in case:
                    continue  # the pieces close the think block
                self.assertEqual(export.compose(p, messages, invite), case["text"], name)

    def test_kvzip_prefix(self):
        chatml = "<|im_start|>system\n%s<|im_end|>\n<|im_start|>user\n"
        header = "<|start_header_id|>%s<|end_header_id|>\n\n"
        helper = "You are a helpful assistant"
        smollm = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        want = {
            "smol": chatml % smollm,
            "llama": f"<|begin_of_text|>{header % 'system'}{helper}<|eot_id|>{header % 'user'}",
            "qwen2": chatml % (helper + "."),
            "qwen3": chatml % (helper + "."),
            "gemma3": f"<bos><start_of_turn>user\n{helper}.\n\n",
            "mistral": f"<s>[INST] {helper}.\n\n",
        }
        for name, text in want.items():
            meta = Converted(os.path.join(FIXTURES, name + ".kvz")).meta
            self.assertEqual(meta["kvzip.prefix"], text)

    def test_layers(self):
        c = Converted(os.path.join(FIXTURES, "gemma3.kvz"))
        self.assertEqual(c.t["layer.window"].tolist(), [16] * 5 + [0, 16])
        self.assertEqual(c.t["layer.rope"].tolist(), [0] * 5 + [1, 0])
        self.assertEqual(c.meta["act"], "gelu_tanh")
        self.assertEqual(np.float32(c.meta["embed_scale"]), np.float32(8))
        self.assertEqual(np.float32(c.meta["attn_scale"]), np.float32(24**-0.5))
        for i, theta in enumerate((1e4, 1e6)):
            want = 1 / theta ** (np.arange(0, 32, 2) / 32)
            np.testing.assert_allclose(c.t["rope.inv_freq"][i], want, rtol=2e-7)
        c = Converted(os.path.join(FIXTURES, "mistral.kvz"))
        self.assertEqual(c.t["layer.window"].tolist(), [24] * 3)

    def test_no_slice_matters(self):
        """Matrices cut into the smallest slices give the same bytes."""
        for name, kind in (("smol", "q4"), ("llama", "q8"), ("gemma3", "bf16")):
            path = os.path.join(FIXTURES, name)
            whole = self.convert(path, "--type", kind)
            with mock.patch.object(export, "SLICE", 1):
                self.same_tensors(whole, self.convert(path, "--type", kind))
                self.assertEqual(Converted(self.out).meta, whole.meta)


class TestLayouts(Case):
    """The same model told in other ways."""

    def test_sharded(self):
        path = self.copy("llama")
        whole = self.convert(path)
        tensors = read_source(path)
        names = list(tensors)
        shards = {"model-00001-of-00002.safetensors": names[: len(names) // 2],
                  "model-00002-of-00002.safetensors": names[len(names) // 2 :]}
        for shard, part in shards.items():
            write_source(path, {n: tensors[n] for n in part}, shard)
        index = {n: shard for shard, part in shards.items() for n in part}
        with open(os.path.join(path, "model.safetensors.index.json"), "w") as f:
            json.dump({"metadata": {}, "weight_map": index}, f)
        os.unlink(os.path.join(path, "model.safetensors"))
        self.same_tensors(whole, self.convert(path))
        os.unlink(self.out)
        os.unlink(os.path.join(path, "model-00002-of-00002.safetensors"))
        self.refuse(path, "model-00002-of-00002.safetensors is missing")

    def test_new_config_layout(self):
        old = self.convert(self.copy("gemma3"), "--type", "f32")
        ropes = {"full_attention": {"rope_type": "default", "rope_theta": 1e6},
                 "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
        kinds = ["full_attention" if l % 6 == 5 else "sliding_attention" for l in range(7)]
        new = self.copy("gemma3", rope_theta=DROP, rope_local_base_freq=DROP, rope_scaling=DROP,
                        sliding_window_pattern=DROP, torch_dtype=DROP, dtype="bfloat16",
                        rope_parameters=ropes, layer_types=kinds)
        self.assertEqual(self.convert(new, "--type", "f32").meta, old.meta)

    def test_scaled_gemma3(self):
        """Linear scaling is for the full layers alone."""
        path = self.copy("gemma3", rope_scaling={"rope_type": "linear", "factor": 8.0})
        plain, c = Converted(os.path.join(FIXTURES, "gemma3.kvz")), self.convert(path)
        np.testing.assert_array_equal(c.t["rope.inv_freq"][0], plain.t["rope.inv_freq"][0])
        np.testing.assert_array_equal(c.t["rope.inv_freq"][1] * 8, plain.t["rope.inv_freq"][1])

    def test_multimodal_gemma3(self):
        plain = self.convert(self.copy("gemma3"), "--type", "f32")
        for prefix in ("language_model.model.", "model.language_model."):
            path = self.copy("gemma3")
            tensors = {n.replace("model.", prefix, 1): x for n, x in read_source(path).items()}
            tensors["vision_tower.patch.weight"] = np.zeros((4, 4), np.float32)
            tensors["model.multi_modal_projector.x.weight"] = np.zeros((4, 4), np.float32)
            write_source(path, tensors)
            with open(os.path.join(path, "config.json")) as f:
                text = json.load(f)
            with open(os.path.join(path, "config.json"), "w") as f:
                json.dump({"model_type": "gemma3", "text_config": text, "vision_config": {"a": 1},
                           "eos_token_id": [1, 6]}, f)
            c = self.convert(path, "--type", "f32")
            self.same_tensors(c, plain)
            self.assertEqual(c.meta["fingerprint"], plain.meta["fingerprint"])

    def test_fused_phi3(self):
        apart = self.convert(self.copy("mistral"), "--type", "f32")
        path = self.copy("mistral", model_type="phi3")
        tensors = read_source(path)
        for l in range(3):
            p = f"model.layers.{l}."
            qkv = [tensors.pop(f"{p}self_attn.{n}_proj.weight") for n in "qkv"]
            tensors[p + "self_attn.qkv_proj.weight"] = np.concatenate(qkv)
            gate_up = [tensors.pop(f"{p}mlp.{n}_proj.weight") for n in ("gate", "up")]
            tensors[p + "mlp.gate_up_proj.weight"] = np.concatenate(gate_up)
        write_source(path, tensors)
        self.same_tensors(self.convert(path, "--type", "f32"), apart)

    def test_tied_head(self):
        path = self.copy("smol")
        plain = self.convert(path, "--type", "f32")
        tensors = read_source(path)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        write_source(path, tensors)
        self.same_tensors(self.convert(path, "--type", "f32"), plain)
        os.unlink(self.out)
        tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
        write_source(path, tensors)
        self.refuse(path, "lm_head.weight differs")

    def test_tokens_without_embedding(self):
        path = self.copy("gemma3")
        with open(os.path.join(path, "tokenizer.json")) as f:
            added = json.load(f)["added_tokens"]
        added.append(dict(added[0], id=768, content="<image>"))
        self.edit(path, "tokenizer.json", added_tokens=added)
        c = self.convert(path)
        self.assertEqual(len(c.t["tok.kind"]), 768)
        self.assertIn("no embedding", run(path, "-o", self.out)[1])


class TestFolders(Case):
    """What is found instead of a model is named in one line."""

    LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"

    def put(self, path, text, mode="w"):
        with open(path, mode) as f:
            f.write(text)
        return path

    def index(self, path, shards):
        self.put(os.path.join(path, "model.safetensors.index.json"),
                 json.dumps({"weight_map": shards}))

    def test_index_beside_a_single_file(self):
        """The one file counts, as in transformers; the index and its shards may be anything."""
        path = self.copy("llama")
        want = self.convert(path).meta["fingerprint"]
        tensors = read_source(path)
        write_source(path, {n: x * 0 for n, x in tensors.items()}, "old.safetensors")
        for shards in (dict.fromkeys(tensors, "old.safetensors"), {"a": "gone.safetensors"}):
            self.index(path, shards)
            self.assertEqual(self.convert(path).meta["fingerprint"], want)

    def test_shards(self):
        path = self.copy("llama")
        tensors, first = read_source(path), "model.embed_tokens.weight"
        os.unlink(os.path.join(path, "model.safetensors"))
        write_source(path, tensors, "a.safetensors")
        write_source(path, {first: tensors[first]}, "b.safetensors")
        self.index(path, {**dict.fromkeys(tensors, "a.safetensors"), first: "b.safetensors"})
        self.refuse(path, first, "is in a.safetensors and in b.safetensors")
        os.symlink("blobs/gone", os.path.join(path, "c.safetensors"))
        self.index(path, {first: "c.safetensors"})
        self.refuse(path, "c.safetensors is a link to nothing: blobs/gone")
        for value in (None, [], {"a": 3}):
            self.put(os.path.join(path, "model.safetensors.index.json"),
                     json.dumps({"weight_map": value}))
            self.refuse(path, "weight_map")

    def test_pointers_and_pages(self):
        for text, word in ((self.LFS, "git-lfs pointer"), ("<!DOCTYPE html><html>", "web page")):
            for file in ("model.safetensors", "config.json", "tokenizer.json"):
                path = self.copy("smol")
                self.put(os.path.join(path, file), text)
                self.refuse(path, file, word)
            os.unlink(os.path.join(path, "tokenizer.json"))
            self.put(os.path.join(path, "tokenizer.model"), text)
            self.refuse(path, "tokenizer.model", word)
            self.refuse(self.put(os.path.join(self.dir, "m.gguf"), text), word)
        smol = os.path.join(FIXTURES, "smol")
        self.refuse(os.path.join(smol, "model.safetensors"), "name its directory")
        self.refuse(smol + ".kvz", "converted already")
        self.refuse(self.put(os.path.join(self.dir, "m.pth"), b"PK\3\4", "wb"), "pickled")
        self.refuse(self.put(os.path.join(self.dir, "m.bin"), b"tjgg\1\0\0\0", "wb"), "GGML")
        os.symlink("gone", os.path.join(self.dir, "link"))
        self.refuse(os.path.join(self.dir, "link"), "link is a link to nothing: gone")

    def test_links_and_texts_beside(self):
        """A link to nothing does not make another file count; UTF-16 is named in each."""
        for file in ("tokenizer.json", "tokenizer.model", "chat_template.jinja"):
            path = self.copy("smol")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(path, file))
            os.symlink("blobs/gone", os.path.join(path, file))
            self.refuse(path, f"{file} is a link to nothing: blobs/gone")
        for file in ("config.json", "tokenizer.json", "chat_template.jinja"):
            path = self.copy("smol")
            self.put(os.path.join(path, file), "{}".encode("utf-16"), "wb")
            self.refuse(path, file, "UTF-16")
        self.put(os.path.join(path, "chat_template.jinja"), b"caf\xe9", "wb")
        self.refuse(path, "chat_template.jinja is damaged")

    def test_other_folders(self):
        for file, bare, word in (
            ("adapter_config.json", True, "LoRA"), ("adapter_config.json", False, "LoRA"),
            ("modules.json", False, "sentence-transformers"), ("snapshots", True, "snapshots/"),
            ("params.json", True, "authors"), ("x.gguf", True, "name one of them"),
            ("model_index.json", True, "diffusion"), ("nothing", True, "config.json is missing"),
        ):
            path = self.copy("smol")
            if bare:
                shutil.rmtree(path)
                os.mkdir(path)
            self.put(os.path.join(path, file), "{}")
            self.refuse(path, word)
        path = self.copy("smol")
        os.rename(os.path.join(path, "model.safetensors"), os.path.join(path, "x.fp16.safetensors"))
        for other in ("expected.safetensors", "fits.safetensors"):
            os.unlink(os.path.join(path, other))
        self.refuse(path, "no model.safetensors", "x.fp16.safetensors")
        os.symlink("gone", os.path.join(path, "model.safetensors"))
        self.refuse(path, "model.safetensors is a link to nothing")
        for key in export.QUANTIZED:
            self.refuse(self.copy("smol", **{key: {"quant_method": "fp8", "bits": 4}}), key, "fp8")

    def header(self, path, change):
        """Changes the JSON header of a safetensors file."""
        with open(path, "rb") as f:
            data = f.read()
        n = struct.unpack("<Q", data[:8])[0]
        text = change(data[8 : 8 + n].decode()).encode()
        self.put(path, struct.pack("<Q", len(text)) + text + data[8 + n :], "wb")

    def test_safetensors_headers(self):
        """As the safetensors library has it: no gap, no overlap, no name twice."""
        def entry(h, **change):
            h = json.loads(h)
            h["model.norm.weight"].update(change)
            return json.dumps(h)

        for change, word in (
            (lambda h: entry(h, data_offsets=[0, 192]), "expected"),
            (lambda h: entry(h, shape=[-1, -96]), "damaged"),
            (lambda h: entry(h, shape=["96"]), "damaged"),
            (lambda h: entry(h, dtype=3), "damaged"),
            (lambda h: "[" * 100000, "damaged"),
            (lambda h: h.replace("{", '{"model.norm.weight":1,', 1), "twice"),
        ):
            path = self.copy("smol")
            self.header(os.path.join(path, "model.safetensors"), change)
            self.refuse(path, "model.safetensors", word)

    def test_damage_at_random(self):
        """A short form of fuzz_export.py, the same each time."""
        import fuzz_export
        fuzz = fuzz_export.Fuzz()
        fuzz.setUp()
        self.addCleanup(shutil.rmtree, fuzz.dir)
        fuzz.fuzz(100, 0)

    def test_foreign_text_in_messages(self):
        """Names from a file reach no terminal as they are."""
        path = self.copy("smol", **{"k\x1b[31m\nexport.py: fine\u202e": 3})
        status, said = run(path, "-o", self.out)
        self.assertEqual((status, said.count("\n")), (1, 0))
        self.assertTrue(said.isprintable(), said)

    def test_no_field_stops_it(self):
        """What nobody expected is a line that names the place, not a traceback."""
        for what, word in (("export.describe", "the model"), ("export.chat_metadata", "template"),
                           ("export.vocab_from_directory", "tokenizer's files")):
            for error in (StopIteration(), RuntimeError("x"), RecursionError(), MemoryError()):
                with mock.patch(what, side_effect=error):
                    self.refuse(os.path.join(FIXTURES, "smol"), word, "unexpected content")


class TestDescribe(unittest.TestCase):
    """config.json to Config fields, without any weights."""

    BASE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=100, max_position_embeddings=4096)

    def describe(self, kind, **config):
        return export.describe({**self.BASE, "model_type": kind, **config})

    def test_windows(self):
        self.assertEqual(self.describe("llama").windows, [0] * 4)
        self.assertEqual(self.describe("mistral").windows, [4096] * 4)
        self.assertEqual(self.describe("mistral", sliding_window=None).windows, [0] * 4)
        kinds = ["sliding_attention", "full_attention"] * 2
        m = self.describe("qwen2", layer_types=kinds, use_sliding_window=True)
        self.assertEqual(m.windows, [4096, 0] * 2)
        self.assertEqual(self.describe("qwen2").windows, [0] * 4)
        m = self.describe("qwen2", use_sliding_window=True, max_window_layers=3, sliding_window=8)
        self.assertEqual(m.windows, [0, 0, 0, 8])
        self.assertEqual(self.describe("gemma2").windows, [4096, 0, 4096, 0])
        m = self.describe("gemma3_text", sliding_window_pattern=2)
        self.assertEqual(m.windows, [4096, 0] * 2)

    def test_layers_without_rope(self):
        self.assertEqual(self.describe("smollm3").layer_rope, [0, 0, 0, -1])
        m = self.describe("smollm3", no_rope_layers=[0, 1, 1, 0])
        self.assertEqual(m.layer_rope, [-1, 0, 0, -1])

    def test_gemma2(self):
        f = self.describe("gemma2").fields
        self.assertEqual((f["attn_softcap"], f["final_softcap"]), (50.0, 30.0))
        self.assertEqual(f["attn_scale"], 1 / 16)
        self.assertEqual((f["head_dim"], f["act"], f["embed_scale"]), (256, "gelu_tanh", 8.0))
        m = self.describe("gemma2", attn_logit_softcapping=None)
        self.assertEqual(m.fields["attn_softcap"], 0)

    def test_head_dim(self):
        self.assertEqual(self.describe("qwen3").fields["head_dim"], 128)
        self.assertEqual(self.describe("qwen2").fields["head_dim"], 16)
        f = self.describe("phi3", partial_rotary_factor=0.75, head_dim=32).fields
        self.assertEqual((f["head_dim"], f["rotary_dim"]), (32, 24))

    def test_defaults(self):
        f = self.describe("llama").fields
        self.assertEqual((f["norm_eps"], f["rope_theta"]), (1e-6, 10000.0))
        self.assertEqual(self.describe("smollm3").fields["rope_theta"], 2e6)
        self.assertTrue(self.describe("smollm3").tied)
        self.assertFalse(self.describe("qwen2").tied)

    def table(self, kind="llama", **config):
        m = self.describe(kind, **config)
        return export.rope_table(m.ropes[0], m.fields["rotary_dim"])

    def test_linear(self):
        plain, _ = self.table()
        half, scale = self.table(rope_scaling={"type": "linear", "factor": 2.0})
        np.testing.assert_array_equal(half * 2, plain)
        self.assertEqual(scale, 1.0)

    def test_llama3(self):
        """transformers' rule, wave by wave: short ones stay, long ones are divided."""
        scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                       original_max_position_embeddings=64)
        plain, _ = self.table(head_dim=64, rope_theta=5e5)
        got, _ = self.table(head_dim=64, rope_theta=5e5, rope_scaling=scaling)
        for f, g in zip(plain.astype(float), got):
            wave = 2 * math.pi / f
            smooth = (64 / wave - 1) / (4 - 1)
            blend = (1 - smooth) * f / 8 + smooth * f
            want = f if wave < 64 / 4 else f / 8 if wave > 64 / 1 else blend
            self.assertAlmostEqual(g / want, 1, places=6)

    def test_yarn(self):
        """transformers' _compute_yarn_parameters, in plain floats."""
        theta, dim, factor, length = 1e6, 128, 4.0, 32768
        scaling = dict(rope_type="yarn", factor=factor, original_max_position_embeddings=length)
        got, scale = self.table("qwen2", head_dim=dim, rope_theta=theta, rope_scaling=scaling)

        def correction(turns):
            return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = math.floor(correction(32)), math.ceil(correction(1))
        for i, g in enumerate(got):
            freq = theta ** (-2 * i / dim)
            keep = 1 - min(max((i - low) / (high - low), 0), 1)
            self.assertAlmostEqual(g / (freq / factor * (1 - keep) + freq * keep), 1, places=6)
        self.assertAlmostEqual(scale, 0.1 * math.log(4) + 1)
        m = export.describe({**self.BASE, "model_type": "qwen3"}, yarn=4.0)
        self.assertEqual(m.ropes[0]["original_max_position_embeddings"], 4096)
        self.assertEqual(m.fields["seq_len"], 16384)

    def test_old_names_of_scaling(self):
        new = self.table(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
        old = self.table(rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=5e5)
        np.testing.assert_array_equal(new[0], old[0])


    def refuses(self, word, kind, **config):
        with self.assertRaises(export.Refusal) as caught:
            self.describe(kind, **config)
        self.assertIn(word, str(caught.exception))

    YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}

    def test_two_spellings_of_rope(self):
        """transformers 5 takes rope_scaling and drops rope_parameters with its theta: both are
        taken when they agree, and neither when they do not."""
        both = dict(rope_scaling=self.YARN, rope_parameters=dict(self.YARN, rope_theta=1e6))
        self.assertEqual(self.describe("qwen3", rope_theta=1e6, **both).ropes,
                         self.describe("qwen3", rope_parameters=both["rope_parameters"]).ropes)
        self.refuses("say different things", "qwen3", **both)
        plain = {"rope_type": "default", "rope_theta": 1e6}
        self.refuses("say different things", "qwen3", **dict(both, rope_parameters=plain))
        for empty in ({}, None):
            m = self.describe("qwen3", rope_scaling=self.YARN, rope_parameters=empty)
            self.assertEqual((m.ropes[0]["rope_type"], m.ropes[0]["rope_theta"]), ("yarn", 1e4))
        m = self.describe("qwen3", rope_theta=5e5, rope_parameters=plain)
        self.assertEqual(m.ropes[0]["rope_theta"], 1e6)
        per_layer = {"full_attention": plain, "sliding_attention": plain}
        self.refuses("full_attention", "qwen3", rope_parameters=per_layer)
        self.refuses("differ", "llama", rope_scaling=dict(self.YARN, type="linear"))

    def test_gemma3_rope(self):
        """Each kind of layer has its own theta where rope_parameters does not say; rope_scaling is
        for full attention. As Gemma3TextConfig.convert_rope_params_to_dict does it."""
        linear = {"rope_type": "linear", "factor": 8.0}
        plain = {"rope_type": "default"}
        base = dict(sliding_window_pattern=2, rope_theta=1e6, rope_local_base_freq=1e4)
        for ropes, scaling, want in (
            ({"full_attention": linear, "sliding_attention": plain}, None, (1e4, 1e6, 8)),
            ({"full_attention": linear}, None, (1e4, 1e6, 8)),
            ({"sliding_attention": {"rope_theta": 2e4}, "full_attention": None}, linear,
             (2e4, 1e6, 8)),
            (None, linear, (1e4, 1e6, 8)),
            (None, None, (1e4, 1e6, None)),
        ):
            m = self.describe("gemma3_text", rope_parameters=ropes, rope_scaling=scaling, **base)
            slide, full = m.ropes
            got = slide["rope_theta"], full["rope_theta"], full.get("factor")
            self.assertEqual((got, slide["rope_type"]), (want, "default"))
        self.refuses("beside layer types", "gemma3_text", rope_parameters={"rope_theta": 5.0})
        self.refuses("rope_type", "gemma3_text", rope_scaling={"type": "linear", "factor": 8.0})

    def test_original_length(self):
        """Inside the scaling, at the top, or the model's own; two that differ are refused."""
        key = "original_max_position_embeddings"
        inside = {"rope_type": "yarn", "factor": 2.0}
        for scaling, top, want in ((dict(inside, **{key: 1024}), None, 1024), (inside, 512, 512),
                                   (dict(inside, **{key: 512}), 512, 512), (inside, None, 4096)):
            m = self.describe("llama", rope_scaling=scaling, **{key: top})
            self.assertEqual(m.ropes[0][key], want)
        self.refuses(key, "llama", rope_scaling=dict(inside, **{key: 1024}), **{key: 512})

    def test_windows_in_use(self):
        """A window that is switched off, or that is not there, makes no layer slide."""
        slide = ["full_attention", "sliding_attention"] * 2
        m = self.describe("qwen2", sliding_window=8, max_window_layers=0)
        self.assertEqual(m.windows, [0] * 4)
        m = self.describe("qwen2", use_sliding_window=True, sliding_window=None)
        self.assertEqual(m.windows, [0] * 4)
        self.refuses("no sliding_window in use", "qwen2", layer_types=slide, sliding_window=8)
        self.refuses("no sliding_window in use", "gemma2", sliding_window=None)
        self.refuses("does not read it", "mistral", layer_types=slide)
        self.refuses("does not read it", "llama", layer_types=slide)
        self.refuses("for 4 layers", "gemma2", layer_types=slide[:3])
        self.refuses("no_rope_layers", "smollm3", no_rope_layers=[1, 0])

    def test_key_value_heads(self):
        """What absence means differs from family to family, null does not."""
        wide = dict(num_attention_heads=64, hidden_size=128, head_dim=2, num_key_value_heads=DROP)
        for kind, want in (("llama", 64), ("mistral", 8), ("qwen3", 32), ("smollm3", 4)):
            c = {k: v for k, v in {**self.BASE, **wide}.items() if v is not DROP}
            c["model_type"] = kind
            self.assertEqual(export.describe(c).fields["n_kv_heads"], want, kind)
            c["num_key_value_heads"] = None
            self.assertEqual(export.describe(c).fields["n_kv_heads"], 64, kind)

    def test_values_of_no_kind(self):
        """Each key that is read is named when its value is none of its kind."""
        infinite, big = float("inf"), 10**400
        wrong = (float("nan"), infinite, -infinite, big, -1, True, "1", [], [1], {"a": 1}, 1e300)
        for kind in export.FAMILIES:
            for key in export.FAMILIES[kind].config:
                for value in wrong:
                    if export.KINDS[export.KEYS[key]](value):
                        continue
                    if key == "max_window_layers" or value not in ([], {}) or key not in (
                            "rope_scaling", "rope_parameters"):
                        self.refuses(key, kind, **{key: value})
        self.refuses("rms_norm_eps is nan", "llama", rms_norm_eps=float("nan"))
        self.refuses("factor is nan", "llama", rope_scaling=dict(self.YARN, factor=float("nan")))
        self.refuses("rms_norm_eps is null", "llama", rms_norm_eps=None)
        self.refuses("hidden_size is missing", "llama", hidden_size=export.MISSING)


class TestExperts(Case):
    """Mixtures of experts: saved one by one, stacked as transformers 5 has them, or in a GGUF."""

    def stacked(self, path):
        """The experts of a copy as transformers 5 has them in memory."""
        source, out = read_source(path), {}
        for name, x in source.items():
            if ".mlp.experts." not in name:
                out[name] = x
        for l in (0, 2):
            at = f"model.layers.{l}.mlp.experts."
            part = lambda e, kind: source[f"{at}{e}.{kind}_proj.weight"]
            out[at + "gate_up_proj"] = np.stack(
                [np.concatenate([part(e, "gate"), part(e, "up")]) for e in range(6)])
            out[at + "down_proj"] = np.stack([part(e, "down") for e in range(6)])
        write_source(path, out)
        return path

    def test_stacks(self):
        """Each expert stands in panels of its own; the router is exact whatever the others are."""
        source = read_source(os.path.join(FIXTURES, "qwen3moe"))
        for kind, share in (("f32", 0), ("bf16", 0), ("q8", 0.5 / 127 * 1.01), ("q4", 0.12)):
            c = self.convert(os.path.join(FIXTURES, "qwen3moe"), "--type", kind)
            for ours, theirs, rows in (("w1", "gate", 24), ("w3", "up", 24), ("w2", "down", 48)):
                x = c.matrix(f"layers.2.experts.{ours}").reshape(6, -1, 64 if ours != "w2" and
                                                                 kind in ("q8", "q4") else
                                                                 48 if ours != "w2" else
                                                                 32 if kind in ("q8", "q4") else 24)
                self.assertEqual(x.shape[1], -(-rows // 16) * 16)
                for e in range(6):
                    y = source[f"model.layers.2.mlp.experts.{e}.{theirs}_proj.weight"]
                    far = np.abs(x[e, :rows, : y.shape[1]] - y).max()
                    self.assertLessEqual(far, share * np.abs(y).max())
            router = c.matrix("layers.2.router")
            np.testing.assert_array_equal(router[:6], source["model.layers.2.mlp.gate.weight"])
            self.assertNotIn("layers.2.w1", c.t)
            self.assertNotIn("layers.1.router", c.t)  # mlp_only_layers
            self.assertIn("layers.1.w1", c.t)

    def test_layouts(self):
        want = Converted(os.path.join(FIXTURES, "qwen3moe.kvz"))
        path = self.stacked(self.copy("qwen3moe"))
        self.same_tensors(self.convert(path, "--type", "f32"), want)
        q8 = self.convert(path, "--type", "q8")
        self.same_tensors(self.convert(os.path.join(FIXTURES, "qwen3moe"), "--type", "q8"), q8)
        c = self.convert(self.copy("qwen3moe", num_experts=DROP, num_local_experts=6))
        self.assertEqual(c.meta["n_experts"], "6")

    def test_refusals(self):
        for change, *words in (
            (dict(num_experts=5), "tensor model.layers.0.mlp", "experts.5.", "is not known"),
            (dict(num_experts=7), "expected [7, 48]"),
            (dict(num_local_experts=8), "num_local_experts differ: [6, 8]"),
            (dict(num_experts_per_tok=9), "a token uses 9"),
            (dict(num_experts=2000), "up to 1024"),
            (dict(moe_intermediate_size=32), "experts.0.gate_proj.weight", "expected [32, 48]"),
            (dict(mlp_only_layers=[]), "model.layers.1.mlp.gate.weight is missing"),
            (dict(mlp_only_layers="all"), "mlp_only_layers", "a list of layers"),
            (dict(decoder_sparse_step=3), "model.layers.0.mlp.gate_proj.weight is missing"),
        ):
            self.refuse(self.copy("qwen3moe", **change), *words)
        path = self.stacked(self.copy("qwen3moe", moe_intermediate_size=32))
        self.refuse(path, "experts.gate_up_proj: expected [6, 64, 48], found [6, 48, 48]")


class TestQwen35(Case):
    """Qwen 3.5: layers that keep a state, gated attention."""

    def test_weights(self):
        source = read_source(os.path.join(FIXTURES, "qwen35"))
        c = Converted(os.path.join(FIXTURES, "qwen35.kvz"))
        self.assertEqual(c.t["layer.window"].tolist(), [-1, 0, -1, 0])
        self.assertEqual(c.t["layer.rope"].tolist(), [-1, 0, -1, 0])
        self.assertEqual(c.meta["rotary_dim"], "4")
        at, ours = "model.layers.0.linear_attn.", "layers.0.delta."
        for mine, theirs in (("qkv", "in_proj_qkv"), ("z", "in_proj_z"), ("a", "in_proj_a"),
                             ("b", "in_proj_b"), ("out", "out_proj")):
            y = source[at + theirs + ".weight"]
            np.testing.assert_array_equal(c.matrix(ours + mine)[: len(y)], y)
        np.testing.assert_array_equal(c.t[ours + "conv"], source[at + "conv1d.weight"][:, 0].T)
        np.testing.assert_allclose(c.t[ours + "decay"], -np.exp(source[at + "A_log"]), rtol=1e-7)
        np.testing.assert_array_equal(c.t[ours + "dt"], source[at + "dt_bias"])
        np.testing.assert_array_equal(c.t[ours + "norm"], source[at + "norm.weight"])
        q = source["model.layers.1.self_attn.q_proj.weight"].reshape(4, 2, 16, 48)
        np.testing.assert_array_equal(c.matrix("layers.1.wq"), q[:, 0].reshape(64, 48))
        np.testing.assert_array_equal(c.matrix("layers.1.wg"), q[:, 1].reshape(64, 48))
        for mine, theirs in (("layers.1.q_norm", "model.layers.1.self_attn.q_norm.weight"),
                             ("layers.0.rms_att", "model.layers.0.input_layernorm.weight"),
                             ("rms_final", "model.norm.weight")):
            np.testing.assert_array_equal(c.t[mine], source[theirs] + np.float32(1))
        q8 = self.convert(os.path.join(FIXTURES, "qwen35"), "--type", "q8")
        self.assertEqual(q8.header["layers.0.delta.qkv"]["dtype"], "I8")
        self.assertEqual(q8.header["layers.0.delta.a"]["dtype"], "F32")

    def test_configs(self):
        want = Converted(os.path.join(FIXTURES, "qwen35.kvz"))
        path = self.copy("qwen35", layer_types=DROP, full_attention_interval=2)
        self.same_tensors(self.convert(path, "--type", "f32"), want)
        path = self.copy("qwen35")
        with open(os.path.join(path, "config.json")) as f:
            inner = json.load(f)
        inner["rope_parameters"].update(mrope_section=[1, 1, 0], mrope_interleaved=True)
        outer = dict(model_type="qwen3_5", text_config=inner, vision_config={"depth": 1},
                     tie_word_embeddings=True)
        with open(os.path.join(path, "config.json"), "w") as f:
            json.dump(outer, f)
        source = read_source(path)
        named = {n.replace("model.", "model.language_model.", 1): x for n, x in source.items()}
        named["model.visual.patch.weight"] = named["mtp.fc.weight"] = np.zeros((2, 2), np.float32)
        write_source(path, named)
        self.same_tensors(self.convert(path, "--type", "f32"), want)

    def test_refusals(self):
        kinds = ["linear_attention", "full_attention"] * 2
        for change, *words in (
            (dict(layer_types=kinds[:3]), "layer_types", "for 4 layers"),
            (dict(layer_types=["sliding_attention", *kinds[1:]]), "sliding_attention"),
            (dict(layer_types=["linear_attention"] * 4), "no layer attends"),
            (dict(layer_types=["full_attention"] * 4), "tensor model.layers.0.self_attn.q_proj"),
            (dict(attn_output_gate=False), "attn_output_gate is false"),
            (dict(attention_bias=True), "attention_bias"),
            (dict(linear_num_value_heads=3), "delta nets of 2 key heads"),
            (dict(linear_key_head_dim=18), "delta nets of 2 key heads of 18"),
            (dict(linear_conv_kernel_dim=9), "linear_conv_kernel_dim 9"),
            (dict(linear_conv_kernel_dim=3), "conv1d.weight: expected [144, 3]"),
            (dict(linear_value_head_dim=24), "expected [160, 48]"),
            (dict(num_attention_heads=8), "q_proj.weight: expected [256, 48], found [128, 48]"),
        ):
            self.refuse(self.copy("qwen35", **change), *words)
        self.refuse(self.copy("qwen35"), "--yarn is for", args=("--yarn", "4"))
        self.refuse(self.copy("qwen35moe", norm_topk_prob=False), "norm_topk_prob is false")

    def test_split(self):
        """Marks belong to words, where Qwen 2 cuts between them."""
        path = self.copy("qwen3")
        with open(os.path.join(path, "tokenizer.json"), encoding="utf-8") as f:
            spec = json.load(f)
        ids, mark = spec["model"]["vocab"], "\u00cc\u0123"  # the bytes of U+0301
        spare = [t for t in ids if len(t) > 2][:4]
        for old, new in zip(spare, (mark, "a" + mark, "!" + mark, "\u0120" + mark)):
            ids[new] = ids.pop(old)
        spec["model"]["merges"] = [["\u00cc", "\u0123"], ["a", mark], ["!", mark], ["\u0120", mark]]
        spec["normalizer"] = None
        for split, want in ((export.QWEN35_SPLIT, ["a" + mark, "b", "!" + mark, "\u0120" + mark]),
                            (export.GPT4 % r"\p{N}", ["a", mark, "b", "!" + mark, "\u0120" + mark])):
            spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = split
            with open(os.path.join(path, "tokenizer.json"), "w", encoding="utf-8") as f:
                json.dump(spec, f)
            self.convert(path)
            done = subprocess.run([os.path.join(os.path.dirname(TESTS), "run"), "tokenize", self.out,
                                   "-p", "a\u0301b!\u0301 \u0301", "-q"], capture_output=True)
            got = [int(x) for x in done.stdout.split()]
            self.assertEqual(got, [ids[t] for t in want])


class TestGptOss(Case):
    """gpt-oss: sinks, biases, experts in MXFP4, stacked with gate and up taking turns, or in a GGUF."""

    PATH = os.path.join(FIXTURES, "gptoss")

    def setUp(self):
        super().setUp()
        self.source = read_source(self.PATH)

    def expert(self, l, ours, source=None):
        """[experts][rows][columns] of a layer as float32."""
        source = source or self.source
        at = f"model.layers.{l}.mlp.experts." + ("down_proj" if ours == "w2" else "gate_up_proj")
        blocks, e = source[at + "_blocks"], source[at + "_scales"].astype(np.float64)
        codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*blocks.shape[:3], 32)
        fp4 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6])
        x = np.where(codes > 7, -1, 1) * fp4[codes & 7] * 2.0 ** (e[..., None] - 127)
        x = x.reshape(*x.shape[:2], -1).astype(np.float32)
        return x if ours == "w2" else x[:, "w1 w3".split().index(ours) :: 2]

    def plain(self, **config):
        """The fixture as transformers saves it."""
        path = self.copy("gptoss", quantization_config=DROP, **config)
        out = {n: x for n, x in self.source.items() if not n.endswith(("_blocks", "_scales"))}
        for l in range(4):
            at = f"model.layers.{l}.mlp.experts."
            both = np.stack([self.expert(l, "w1"), self.expert(l, "w3")], 2)
            out[at + "gate_up_proj"] = both.reshape(5, 64, 32).swapaxes(1, 2)
            out[at + "down_proj"] = self.expert(l, "w2").swapaxes(1, 2)
        write_source(path, out)
        return path

    def changed(self, **tensors):
        """The fixture with other tensors of layer 0's experts; None: without."""
        path, source = self.copy("gptoss"), dict(self.source)
        for name, x in tensors.items():
            source["model.layers.0.mlp.experts." + name] = x
        write_source(path, {n: x for n, x in source.items() if x is not None})
        return path

    def test_layouts(self):
        want = Converted(os.path.join(FIXTURES, "gptoss.kvz"))
        self.same_tensors(self.convert(self.plain(), "--type", "f32"), want)
        for l in (0, 3):
            at, ours = f"model.layers.{l}.", f"layers.{l}."
            for w in ("w1", "w2", "w3"):
                x = want.matrix(f"{ours}experts.{w}").reshape(5, 32, 32)
                np.testing.assert_array_equal(x, self.expert(l, w))
            bias = self.source[at + "mlp.experts.gate_up_proj_bias"]
            for theirs, mine in ((bias[:, ::2], "experts.b1"), (bias[:, 1::2], "experts.b3"),
                                 (self.source[at + "mlp.experts.down_proj_bias"], "experts.b2"),
                                 (self.source[at + "mlp.router.bias"], "router_bias"),
                                 (self.source[at + "self_attn.o_proj.bias"], "bo")):
                np.testing.assert_array_equal(want.t[ours + mine], theirs.reshape(-1))
            np.testing.assert_array_equal(want.t["layer.sinks"][l], self.source[at + "self_attn.sinks"])
        self.assertEqual(want.t["layer.window"].tolist(), [16, 0, 16, 0])
        self.assertEqual((want.meta["swiglu_alpha"], want.meta["swiglu_limit"]), ("1.702", "2"))
        path = self.plain(layer_types=DROP, experts_per_token=DROP)  # every other layer slides
        self.same_tensors(self.convert(path, "--type", "f32"), want)

    def test_types(self):
        """q8 holds MXFP4 as it is, and so do floats; q4 does not."""
        for kind in (None, "q8", "bf16", "f16", "q4"):
            c = self.convert(self.PATH, *(("--type", kind) if kind else ()))
            for w in ("w1", "w2", "w3"):
                x = c.matrix(f"layers.2.experts.{w}").reshape(5, 32, 32)
                off = np.abs(x - self.expert(2, w)).max() / np.abs(x).max()
                self.assertTrue(0 < off < 0.12 if kind == "q4" else off == 0, (kind, w, off))
        self.assertEqual(self.convert(self.PATH).header["layers.2.experts.w1"]["dtype"], "I8")

    def test_scales(self):
        """Exponents that f16 has not: small codes are rounded, large ones grow or are refused."""
        scales = self.source["model.layers.0.mlp.experts.down_proj_scales"]
        for e, kind, far in ((104, "q8", 0), (101, "q8", 2.0**-25), (1, "q8", 2.0**-25), (0, "f32", 0),
                             (146, "q8", 0), (200, "f32", 0)):
            path = self.changed(down_proj_scales=np.full_like(scales, e))
            c, source = self.convert(path, "--type", kind), read_source(path)
            x = c.matrix("layers.0.experts.w2").reshape(5, 32, 32)
            self.assertLessEqual(np.abs(x - self.expert(0, "w2", source)).max(), far)
        os.remove(self.out)
        self.refuse(self.changed(down_proj_scales=np.full_like(scales, 200)), "down_proj_blocks",
                    "too large", args=("--type", "q8"))

    def test_gguf(self):
        """As convert_hf_to_gguf.py writes it: gate and up apart, experts in MXFP4 or plain."""
        want = Converted(os.path.join(FIXTURES, "gptoss.kvz"))
        for mxfp4 in (True, False):
            c = self.convert(self.gguf(mxfp4), "--type", "f32")
            self.same_tensors(c, want)
            for key in ("swiglu_limit", "n_used", "expert_dim", "seq_len", "attn_scale"):
                self.assertEqual(c.meta[key], {"swiglu_limit": "7"}.get(key, want.meta[key]))
        x = self.convert(self.gguf(True)).matrix("layers.1.experts.w3")
        np.testing.assert_array_equal(x.reshape(5, 32, 32), self.expert(1, "w3"))
        os.remove(self.out)
        self.refuse(self.gguf(True, expert_feed_forward_length=16), "moe_intermediate_size differ")

    def gguf(self, mxfp4, **other):
        path = os.path.join(self.dir, "gptoss.gguf")
        w = gguf.GGUFWriter(path, "gpt-oss")
        numbers = dict(
            embedding_length=32, feed_forward_length=32, block_count=4, expert_count=5,
            expert_used_count=2, expert_feed_forward_length=32, context_length=2048)
        numbers.update({"attention.head_count": 8, "attention.head_count_kv": 2, "attention.key_length": 16,
                        "attention.value_length": 16, "attention.sliding_window": 16,
                        "rope.scaling.original_context_length": 64}, **other)
        for key, n in numbers.items():
            w.add_uint32("gpt-oss." + key, n)
        for key, x in {"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 150000.0,
                       "rope.scaling.factor": 32.0}.items():
            w.add_float32("gpt-oss." + key, x)
        w.add_string("gpt-oss.rope.scaling.type", "yarn")
        TestGGUF.add_tokenizer(self, w, "smol", {})
        top = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight",
               "model.norm.weight": "output_norm.weight"}
        parts = {**GGUF_SUFFIX, "self_attn.sinks": "attn_sinks", "mlp.router": "ffn_gate_inp",
                 "post_attention_layernorm": "post_attention_norm"}
        for name, x in self.source.items():
            if ".experts." in name:
                continue
            if name in top:
                w.add_tensor(top[name], x)
                continue
            _, _, l, rest = name.split(".", 3)
            part, kind = rest.rsplit(".", 1) if not rest.endswith("sinks") else (rest, "weight")
            w.add_tensor(f"blk.{l}.{parts[part]}.{kind}", x)
        for l in range(4):
            self.add_experts(w, l, mxfp4)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        return path

    def add_experts(self, w, l, mxfp4):
        at = f"model.layers.{l}.mlp.experts."
        for name, ours, first, step in (("gate", "w1", 0, 2), ("up", "w3", 1, 2), ("down", "w2", 0, 1)):
            theirs = at + ("down_proj" if step == 1 else "gate_up_proj")
            w.add_tensor(f"blk.{l}.ffn_{name}_exps.bias",
                         np.ascontiguousarray(self.source[theirs + "_bias"][:, first::step]))
            if not mxfp4:
                w.add_tensor(f"blk.{l}.ffn_{name}_exps.weight", np.ascontiguousarray(self.expert(l, ours)))
                continue
            blocks = self.source[theirs + "_blocks"][:, first::step]
            codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*blocks.shape[:3], 32)
            raw = np.concatenate([self.source[theirs + "_scales"][:, first::step, :, None],
                                  codes[..., :16] | codes[..., 16:] << 4], -1)
            w.add_tensor(f"blk.{l}.ffn_{name}_exps.weight", np.ascontiguousarray(raw).view(np.int8),
                         raw_shape=(5, 32, 32), raw_dtype=39)  # MXFP4, which the package has no name for

    def test_refusals(self):
        for change, *words in (
            (dict(experts_per_token=3), "num_experts_per_tok and experts_per_token differ: 2 and 3"),
            (dict(num_local_experts=4), "router.bias: expected [4], found [5]"),
            (dict(num_local_experts=6), "router.weight", "expected [6, 32]"),
            (dict(intermediate_size=64), "experts.0.gate_proj.weight: expected [64, 32], found [32, 32]"),
            (dict(swiglu_limit=0), "swiglu_limit", "a positive number"),
            (dict(swiglu_limit=1e7), "swiglu_limit 1e+07"),
            (dict(attention_bias=False), "k_proj.bias", "is not known"),
            (dict(quantization_config={"quant_method": "gptq"}), "quantized already (gptq)"),
            (dict(rope_scaling={"rope_type": "longrope"}), "longrope"),
        ):
            self.refuse(self.copy("gptoss", **change), *words)
        at = "model.layers.0.mlp.experts.gate_up_proj"
        blocks, scales = self.source[at + "_blocks"], self.source[at + "_scales"]
        self.refuse(self.changed(gate_up_proj_scales=None), at + "_scales is missing")
        self.refuse(self.changed(gate_up_proj_scales=scales.astype(np.float32)), "expected U8, found F32")
        self.refuse(self.changed(gate_up_proj_scales=scales[:, :62]), "[5, 62, 1] scales")
        self.refuse(self.changed(gate_up_proj_blocks=blocks[:, :63], gate_up_proj_scales=scales[:, :63]),
                    "[5, 63, 1, 16]")
        self.refuse(self.changed(gate_up_proj=np.zeros((5, 32, 64), np.float32)), "is there, and")
        self.refuse(self.changed(gate_up_proj_bias=np.zeros((5, 63), np.float32)), "[5, 63] is not supported")
        self.refuse(self.copy("smol", model_type="gpt_oss2"), "supported")

    def test_split(self):
        """Words are cut by the cases of letters, with what an apostrophe brings."""
        path = self.copy("qwen2")
        with open(os.path.join(path, "tokenizer.json"), encoding="utf-8") as f:
            spec = json.load(f)
        mark = "\u00cc\u0123"  # U+0301
        ids = spec["model"]["vocab"]
        joined = ["aB", "Ba", "BB", "BBa", "a'", "a's", "1a", "!/", mark, "a" + mark, "!" + mark, "/!"]
        for text in joined:
            ids.setdefault(text, max(ids.values()) + 1)
        spec["model"]["merges"] = [["a", "B"], ["B", "B"], ["B", "a"], ["BB", "a"], ["a", "'"], ["a'", "s"],
                                   ["1", "a"], ["!", "/"], ["/", "!"], ["\u00cc", "\u0123"], ["a", mark], ["!", mark]]
        spec["normalizer"] = None
        spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = export.O200K_SPLIT
        with open(os.path.join(path, "tokenizer.json"), "w", encoding="utf-8") as f:
            json.dump(spec, f)
        self.assertEqual(self.convert(path).meta["tokenizer.split"], "o200k")
        for text, want in (("aBa", ["a", "Ba"]), ("BBa", ["BBa"]), ("BBBB", ["BB", "BB"]), ("aBB", ["a", "BB"]),
                           ("a's", ["a's"]), ("1a", ["1", "a"]), ("!/", ["!/"]), ("a\u0301B", ["a" + mark, "B"]),
                           ("!\n/!", ["!", "\u010a", "/", "!"]), ("!\u0301", ["!" + mark])):
            done = subprocess.run([os.path.join(os.path.dirname(TESTS), "run"), "tokenize", self.out,
                                   "-p", text, "-q"], capture_output=True)
            self.assertEqual([int(x) for x in done.stdout.split()], [ids[t] for t in want], text)

    def test_stops(self):
        """<|end|> ends a message; the turn ends with <|return|> or <|call|>."""
        v = export.Vocab(["<|end|>", "<|return|>", "<|call|>", "<|endoftext|>", "a"], [1, 1, 1, 1, 0], "bpe")
        self.assertEqual(export.stop_ids(v, 1, 0), [1, 2, 3])
        v = export.Vocab(["<|end|>", "<|return|>", "a"], [1, 1, 0], "bpe")
        self.assertEqual(export.stop_ids(v, 1), [0, 1])


class TestRefusals(Case):
    def test_architectures(self):
        for kind, word in (
            ("mixtral", "mixtures of experts"), ("deepseek_v3", "mixtures of experts"),
            ("mamba", "state-space"), ("qwen2_vl", "multimodal"), ("bert", "encoders"),
            ("gemma3n_text", "AltUp"), ("gpt2", "rotary"), ("nonsense", "supported: llama"), (None, "supported"),
        ):
            self.refuse(self.copy("smol", model_type=kind), str(kind), word)

    def test_config_keys(self):
        for name, key, value, word in (
            ("llama", "attention_bias", True, "attention_bias"),
            ("llama", "mlp_bias", True, "mlp_bias"),
            ("llama", "hidden_act", "relu", "relu"),
            ("llama", "sliding_window", 24, "sliding_window"),
            ("llama", "partial_rotary_factor", 0.5, "partial_rotary_factor"),
            ("llama", "residual_multiplier", 0.22, "residual_multiplier"),
            ("llama", "is_causal", False, "is_causal"),
            ("llama", "quantization_config", {"quant_method": "gptq"}, "gptq"),
            ("llama", "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
            ("llama", "rope_scaling", {"type": "longrope", "long_factor": [1]}, "longrope"),
            ("llama", "rope_scaling", {"type": "linear"}, "factor"),
            ("llama", "rope_scaling", {"type": "linear", "factor": 2.0, "mrope_section": [1]},
             "mrope_section"),
            ("llama", "num_key_value_heads", 3, "share"),
            ("llama", "hidden_size", "64", "hidden_size"),
            ("llama", "num_hidden_layers", True, "num_hidden_layers"),
            ("qwen2", "layer_types", ["linear_attention"] * 3, "linear_attention"),
            ("qwen2", "dual_chunk_attention_config", {"a": 1}, "dual_chunk"),
            ("gemma3", "use_bidirectional_attention", True, "use_bidirectional_attention"),
            ("gemma3", "hidden_activation", "gelu", "gelu"),
            ("qwen3", "num_experts", 8, "num_experts"),
        ):
            self.refuse(self.copy(name, **{key: value}), word)

    def test_gemma4(self):
        full = {"head_dim": 32, "num_key_value_heads": 1}
        for change, word in (
            ({"enable_moe_block": True}, "num_experts is missing"),
            ({"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2,
              "moe_intermediate_size": 20}, "layers.0.router.proj.weight is missing"),
            ({"use_bidirectional_attention": "all"}, "only causal models"),
            ({"num_kv_shared_layers": 6}, "without keys of its own"),
            ({"num_kv_shared_layers": 7}, "without keys of its own"),
            ({"per_layer_config": {"2": full, "4": {"head_dim": 64}, "6": full}}, "different heads"),
            ({"per_layer_config": {"2": {"rope_theta": 5}}}, "rope_theta of a layer alone"),
            ({"vocab_size_per_layer_input": 512}, "vocab_size_per_layer_input 512"),
            ({"hidden_size_per_layer_input": 17}, "embeddings of 17"),
            ({"attention_bias": True}, "attention_bias"),
            ({"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}}, "rope_theta is missing"),
            ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4}}}, "yarn"),
        ):
            self.refuse(self.copy("gemma4", **change), word)
        self.refuse(self.copy("gemma4", model_type="gemma4"), "hidden_size")

    def test_gemma4_layouts(self):
        """Inside a multimodal config, and as transformers 5.24 writes it: the same tensors."""
        a = Converted(os.path.join(FIXTURES, "gemma4.kvz"))
        with open(os.path.join(FIXTURES, "gemma4", "config.json")) as f:
            inner = json.load(f)
        tensors = read_source(os.path.join(FIXTURES, "gemma4"))
        layers = {str(l): {"head_dim": 32, "num_key_value_heads": 1} for l in (2, 4, 6)}
        inner.update(per_layer_config=layers, global_head_dim=DROP, num_global_key_value_heads=DROP)
        inner = {k: v for k, v in inner.items() if v is not DROP}
        path = self.copy("gemma4", **{k: DROP for k in inner})
        self.edit(path, "config.json", model_type="gemma4", text_config=inner, vision_config={"a": 1},
                  global_head_dim=DROP, num_global_key_value_heads=DROP)
        prefixed = {n.replace("model.", "model.language_model.", 1): x for n, x in tensors.items()}
        prefixed["model.vision_tower.x"] = prefixed["model.embed_audio.y"] = np.zeros(3, np.float32)
        # Layers that read the keys of others may have their own in the file.
        name = "model.language_model.layers.5.self_attn.k_proj.weight"
        prefixed[name] = np.zeros((32, 32), np.float32)
        write_source(path, prefixed)
        self.same_tensors(a, self.convert(path, "--type", "f32"))

    def test_gemma4_experts(self):
        """Beside a dense block: in stacks as transformers saves them, or one by one."""
        want = Converted(os.path.join(FIXTURES, "gemma4moe.kvz"))
        source = read_source(os.path.join(FIXTURES, "gemma4moe"))
        at = "model.layers.1."
        self.assertEqual(want.meta["dense_beside"], "1")
        self.assertEqual(want.meta["shared_dim"], "0")
        gate_up = source[at + "experts.gate_up_proj"]
        for name, x in (("w1", gate_up[:, :20]), ("w3", gate_up[:, 20:]),
                        ("w2", source[at + "experts.down_proj"])):
            y = want.matrix(f"layers.1.experts.{name}").reshape(6, 32, -1)
            np.testing.assert_array_equal(y[:, : x.shape[1], : x.shape[2]], x)
        np.testing.assert_array_equal(want.t["layers.1.rms_router"],
                                      source[at + "router.scale"] * np.float32(32**-0.5))
        for ours, theirs in (("rms_experts", "pre_feedforward_layernorm_2.weight"),
                             ("rms_dense_post", "post_feedforward_layernorm_1.weight"),
                             ("rms_experts_post", "post_feedforward_layernorm_2.weight"),
                             ("rms_ffn_post", "post_feedforward_layernorm.weight"),
                             ("experts.scale", "router.per_expert_scale")):
            np.testing.assert_array_equal(want.t["layers.1." + ours], source[at + theirs])
        path = self.copy("gemma4moe")
        for l in range(4):
            at = f"model.layers.{l}.experts."
            gate_up, down = source.pop(at + "gate_up_proj"), source.pop(at + "down_proj")
            for e in range(6):
                source.update({f"{at}{e}.gate_proj.weight": gate_up[e, :20],
                               f"{at}{e}.up_proj.weight": gate_up[e, 20:],
                               f"{at}{e}.down_proj.weight": down[e]})
        write_source(path, source)
        self.same_tensors(self.convert(path, "--type", "f32"), want)
        os.remove(self.out)
        for change, *words in (
            (dict(num_experts=5), "experts.gate_up_proj: expected [5, 40, 32], found [6, 40, 32]"),
            (dict(top_k_experts=7), "a token uses 7"),
            (dict(top_k_experts=None), "top_k_experts is missing"),
            (dict(moe_intermediate_size=24), "experts.gate_up_proj: expected [6, 48, 32]"),
            (dict(enable_moe_block=False), "is not known"),
        ):
            self.refuse(self.copy("gemma4moe", **change), *words)

    def test_ignored_key(self):
        c = self.convert(self.copy("llama", nonsense=3), "--ignore-key", "nonsense")
        self.assertEqual(c.meta["dim"], "64")

    def test_ids(self):
        """Those of config.json and generation_config.json: of any type, outside the vocabulary."""
        for file in ("config.json", "generation_config.json"):
            for key in ("bos_token_id", "eos_token_id"):
                path = self.copy("smol")
                with open(os.path.join(path, "generation_config.json"), "w") as f:
                    f.write("{}")
                self.edit(path, file, **{key: 99999})
                self.refuse(path, file, key + " is 99999")
        for value in (-1, 1 << 31, "2", 2.0, True, [-1], [[1]], {"a": 1}, float("nan")):
            with self.assertRaisesRegex(export.Refusal, "^here: key is "):
                export.token_ids("here", "key", value, several=True)
        self.refuse(self.copy("smol", bos_token_id=[1]), "bos_token_id is [1]")
        path = self.copy("smol")
        self.edit(path, "tokenizer_config.json", eos_token="<|nowhere|>")
        status, said = run(path, "-o", self.out)
        self.assertEqual(status, 1, said)
        self.assertIn("eos_token '<|nowhere|>' is no token", said)
        c = self.convert(self.copy("smol", bos_token_id=None, pad_token_id=-1, eos_token_id=[5, 0]))
        self.assertEqual(c.meta["tokenizer.stop_ids"], "0,2,5")

    def test_tensors(self):
        path = self.copy("smol")
        whole = read_source(path)
        name = "model.layers.2.mlp.up_proj.weight"
        write_source(path, {n: x for n, x in whole.items() if n != name})
        self.refuse(path, name + " is missing", "[96, 96]")
        bias = {"model.layers.0.self_attn.o_proj.bias": np.zeros(96, np.float32)}
        write_source(path, {**whole, **bias})
        self.refuse(path, "o_proj.bias is not known")
        write_source(path, {**whole, name: np.zeros((64, 96), np.float32)})
        self.refuse(path, name, "[96, 96]", "[64, 96]")
        write_source(path, {**whole, name: np.zeros((112, 96), np.float32)})
        self.refuse(path, name, "112 rows")
        write_source(path, {**whole, name: np.full((96, 96), np.nan, np.float32)})
        self.refuse(path, name, "not finite")
        write_source(path, {**whole, name: np.full((96, 96), 1e9, np.float32)})
        self.refuse(path, name, "too large", args=("--type", "f16"))

    def test_values_too_large(self):
        """What becomes infinite in the type asked for is refused in one line."""
        path, name = self.copy("llama"), "model.layers.1.mlp.up_proj.weight"
        tensors = read_source(path)
        tensors[name] = tensors[name].copy()
        tensors[name][3, 5] = np.float32(3.4e38)
        write_source(path, tensors)
        for kind in ("bf16", "f16", "q8", "q4"):
            script = [sys.executable, export.__file__, path, "-o", self.out, "--type", kind]
            p = subprocess.run(script, capture_output=True, text=True)
            self.assertEqual((p.returncode, p.stderr.count("\n")), (1, 1), p.stderr)
            self.assertIn(name + " holds values too large", p.stderr)
        self.convert(path, "--type", "f32")

    def test_untied_without_head(self):
        self.refuse(self.copy("smol", tie_word_embeddings=False), "lm_head.weight is missing")

    def test_cut_files(self):
        path = self.copy("smol")
        file = os.path.join(path, "model.safetensors")
        with open(file, "rb") as f:
            data = f.read()
        for n in (0, 4, 8, 100, 3000, len(data) // 2, len(data) - 1):
            with open(file, "wb") as f:
                f.write(data[:n])
            self.refuse(path, "model.safetensors")
        os.unlink(file)
        self.refuse(path, "no model.safetensors")
        with open(os.path.join(path, "pytorch_model.bin"), "w") as f:
            f.write("x")
        self.refuse(path, "pickled")

    def test_damaged_text_files(self):
        for file in ("config.json", "tokenizer.json"):
            for text in ("", "{", "[]", "{}", '{"model": 3}', '{"model_type": []}'):
                path = self.copy("smol")
                with open(os.path.join(path, file), "w") as f:
                    f.write(text)
                self.refuse(path)
        os.unlink(os.path.join(path, "tokenizer.json"))
        self.refuse(path, "no tokenizer.json")

    def test_tokenizers(self):
        for change, word in (
            ({"normalizer": {"type": "NFKC"}}, "NFKC"),
            ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
            ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "pre-tokenizer"),
            ({"pre_tokenizer": None}, "pre-tokenizer"),
            ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
            ({"post_processor": {"type": "RobertaProcessing"}}, "RobertaProcessing"),
        ):
            path = self.copy("smol")
            self.edit(path, "tokenizer.json", **change)
            self.refuse(path, word)
        path = self.copy("llama")
        with open(os.path.join(path, "tokenizer.json")) as f:
            pre = json.load(f)["pre_tokenizer"]
        pre["pretokenizers"][0]["pattern"]["Regex"] += "|x"
        self.edit(path, "tokenizer.json", pre_tokenizer=pre)
        self.refuse(path, "pre-tokenizer")

    def test_usage(self):
        self.assertEqual(run("-h")[0], 0)
        self.assertIn("examples:", run("-h")[1])
        self.assertEqual(run()[0], 2)
        self.assertEqual(run("x", "-o", self.out, "--type", "q5")[0], 2)
        self.assertEqual(run("x", "-o", self.out, "--yarn", "1")[0], 2)
        self.refuse(os.path.join(self.dir, "nothing"), "No such file")
        self.refuse(self.copy("llama"), "--yarn is for Qwen", args=("--yarn", "4"))


class TestWriting(Case):
    def test_old_file_survives(self):
        """Interrupted, out of space, refused in the middle: the old file stays, alone."""
        with open(self.out, "w") as f:
            f.write("old")
        full = OSError(errno.ENOSPC, "No space left on device")
        for what, error, word in (
            ("export.Progress.add", KeyboardInterrupt(), "interrupted"),
            ("os.fsync", full, "out.kvz: No space left on device"),
            ("os.rename", full, "No space left on device"),
            ("export.to_panels", export.Refusal("no"), "no"),
        ):
            with mock.patch(what, side_effect=error):
                status, said = run(os.path.join(FIXTURES, "smol"), "-o", self.out)
            self.assertEqual((status, said.count("\n")), (1, 0))
            self.assertIn(word, said)
            self.assertEqual(os.listdir(self.dir), ["out.kvz"])
            with open(self.out) as f:
                self.assertEqual(f.read(), "old")

    def test_terminated(self):
        """SIGTERM in the middle of a real process."""
        code = ("import os, signal, sys; sys.path.insert(0, sys.argv.pop(1)); import export; "
                "export.Progress.add = lambda *a: os.kill(os.getpid(), signal.SIGTERM); "
                "export.main()")
        argv = [sys.executable, "-c", code, os.path.dirname(TESTS), os.path.join(FIXTURES, "smol")]
        p = subprocess.run([*argv, "-o", self.out], capture_output=True, text=True, timeout=60)
        self.assertEqual((p.returncode, p.stderr), (1, "export.py: interrupted, nothing written\n"))
        self.assertEqual(os.listdir(self.dir), [])

    def test_zero_byte(self):
        """In a text of the model, which ./run would refuse."""
        path = self.copy("smol")
        template = "{% for m in messages %}{{ m.content }}\0{% endfor %}"
        self.edit(path, "tokenizer_config.json", chat_template=template)
        self.refuse(path, "chat.", "zero byte")

    def test_closed_descriptors(self):
        """Without standard input, output and error it converts as with them."""
        out = os.path.join(self.dir, "closed")
        script = 'exec "$0" "$1" "$2" -o "$3" 0<&- 1>&- 2>&-'
        argv = [sys.executable, export.__file__, os.path.join(FIXTURES, "smol"), out]
        subprocess.run(["sh", "-c", script, *argv], check=True, timeout=60)
        self.convert(os.path.join(FIXTURES, "smol"))
        with open(out, "rb") as a, open(self.out, "rb") as b:
            self.assertEqual(a.read(), b.read())

    def test_no_stream(self):
        here = os.getcwd()
        os.chdir(self.dir)
        self.addCleanup(os.chdir, here)
        status, said = run(os.path.join(FIXTURES, "smol"), "-o", "-")
        self.assertEqual((status, os.listdir(self.dir)), (1, []), said)
        self.assertIn("not to stdout", said)

    def test_places(self):
        smol = os.path.join(FIXTURES, "smol")
        self.assertEqual(run(smol, "-o", os.path.join(self.dir, "no", "x"))[0], 1)
        self.assertIn("not a regular file", run(smol, "-o", "/dev/null")[1])
        self.assertIn("not a regular file", run(smol, "-o", self.dir)[1])

    def test_sources_are_never_replaced(self):
        """By whatever name: the file itself, a link to it, a hard link, a shard of the index."""
        path = self.copy("smol")
        weights = os.path.join(path, "model.safetensors")
        link, hard = os.path.join(self.dir, "link"), os.path.join(self.dir, "hard")
        os.symlink(weights, link)
        os.link(weights, hard)
        elsewhere = os.path.join(self.dir, "elsewhere.safetensors")
        sharded = self.copy("llama")
        os.rename(os.path.join(sharded, "model.safetensors"), elsewhere)
        names = read_source(os.path.join(FIXTURES, "llama"))
        index = dict.fromkeys(names, "../elsewhere.safetensors")
        with open(os.path.join(sharded, "model.safetensors.index.json"), "w") as f:
            json.dump({"weight_map": index}, f)
        for model, out, word in (
            (path, weights, "is read"), (path, link, "is read"), (path, hard, "is read"),
            (path, os.path.join(path, "config.json"), "is read"),
            (path, os.path.join(path, "new.safetensors"), "part of the model"),
            (path, os.path.join(self.dir, "smol", "..", "smol", "x.json"), "part of the model"),
            (sharded, elsewhere, "is read"),
        ):
            before = self.everything()
            status, said = run(model, "-o", out)
            self.assertEqual((status, said.count("\n")), (1, 0), said)
            self.assertIn(word, said)
            self.assertEqual(self.everything(), before)
        self.assertEqual(run(path, "-o", os.path.join(path, "model.kvz")), (0, ""))

    def everything(self):
        """{path: bytes} of all files."""
        files = [os.path.join(d, n) for d, _, names in os.walk(self.dir) for n in names]
        return {f: open(f, "rb").read() for f in sorted(files)}

    def test_links_and_modes(self):
        """A link stays and what it names is replaced, also when that is not there yet; the mode of
        a file stays, a new one has the usual mode."""
        smol, link = os.path.join(FIXTURES, "smol"), os.path.join(self.dir, "link")
        os.symlink("out.kvz", link)
        self.assertEqual(run(smol, "-o", link), (0, ""))
        mask = os.umask(0)
        os.umask(mask)
        self.assertEqual(os.stat(self.out).st_mode & 0o777, 0o666 & ~mask)
        with open(self.out, "w") as f:
            f.write("old")
        os.chmod(self.out, 0o600)
        modes, take_over = [], export.NewFile.take_over

        def watched(new, old):
            modes.append(os.stat(new.temporary).st_mode & 0o777)
            take_over(new, old)

        with mock.patch.object(export.NewFile, "take_over", watched):
            self.assertEqual(run(smol, "-o", link), (0, ""))
        self.assertEqual(modes, [0o600])  # at no time may others open it
        self.assertTrue(os.path.islink(link))
        self.assertEqual(os.stat(self.out).st_mode & 0o777, 0o600)
        self.assertGreater(os.path.getsize(self.out), 1000)
        os.symlink("loop", os.path.join(self.dir, "loop"))
        self.assertEqual(run(smol, "-o", os.path.join(self.dir, "loop"))[0], 1)

    def test_temporaries(self):
        """Those of dead writers go, a living one's stays; a link that waits under the name of ours
        is not written through."""
        victim = os.path.join(self.dir, "victim")
        dead, alive, other = (self.out + end for end in (".1.0.tmp", ".2.0.tmp", ".tmp"))
        for name in (victim, dead, alive, other):
            with open(name, "w") as f:
                f.write("precious")
        trap = f"{self.out}.{os.getpid()}.0.tmp"
        os.symlink(victim, trap)
        hold = ("import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); "
                "print(flush=True); sys.stdin.read()")
        with subprocess.Popen([sys.executable, "-c", hold, alive], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as p:
            p.stdout.readline()
            self.assertEqual(run(os.path.join(FIXTURES, "smol"), "-o", self.out), (0, ""))
            self.assertIn("writing to it", run(os.path.join(FIXTURES, "smol"), "-o", alive)[1])
            p.stdin.close()
        left = sorted(os.listdir(self.dir))
        want = [self.out, alive, other, trap, victim]
        self.assertEqual(left, sorted(map(os.path.basename, want)))
        with open(victim) as f:
            self.assertEqual(f.read(), "precious")

    def test_checked_before_any_work(self):
        with mock.patch("export.plan", side_effect=AssertionError):
            for out in ("/dev/null", self.dir, os.path.join(self.dir, "no", "x"), ""):
                status, said = run(os.path.join(FIXTURES, "smol"), "-o", out)
                self.assertEqual((status, said.count("\n")), (1, 0), said)

    def test_interrupted_after_the_rename(self):
        """What is in its place stays there, and that is said."""
        sync = os.fsync
        calls = []

        def interrupt(fd):
            calls.append(fd)
            if len(calls) == 2:  # of the directory
                raise KeyboardInterrupt
            sync(fd)

        with mock.patch("os.fsync", side_effect=interrupt):
            status, said = run(os.path.join(FIXTURES, "smol"), "-o", self.out)
        self.assertEqual((status, said), (1, "export.py: interrupted, all written"))
        self.assertGreater(os.path.getsize(self.out), 1000)

    def test_silent_without_terminal(self):
        self.assertEqual(run(os.path.join(FIXTURES, "smol"), "-o", self.out), (0, ""))

    def test_fingerprint(self):
        """Moves with weights and tokenizer, not with names and chat texts."""
        path = self.copy("smol")
        first = self.convert(path).meta["fingerprint"]
        other = os.path.join(self.dir, "renamed")
        shutil.copytree(path, other)
        self.edit(other, "tokenizer_config.json", chat_template=None)
        c = self.convert(other)
        self.assertEqual((c.meta["fingerprint"], c.meta["chat.present"]), (first, "0"))
        tensors = read_source(path)
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
        write_source(path, tensors)
        self.assertNotEqual(self.convert(path).meta["fingerprint"], first)


class TestChat(unittest.TestCase):
    USER = [("user", "Hi")]

    def pieces(self, source, **tokens):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            t = export.Template(source, tokens)
            p = export.chat_pieces(t, tokens.get("bos_token", ""))
            good = p is not None and export.verify_chat(t, p)
        return p if good else None, said.getvalue()

    def test_refused_system(self):
        p, said = self.pieces(
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
            "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")
        self.assertEqual((p["system_prefix"], p["user_prefix"]), ("", "<user>"))
        self.assertEqual((p["trim"], said), (True, ""))

    def test_system_without_a_place(self):
        """The model's metadata say why, in one line; export says it as well."""
        class V:
            strippers, meta, texts, kinds = [], {"add_bos": 0}, [], []

        turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no\\nrole') }}{% endif %}"
        leave = turns.replace("messages %}", "messages if m.role != 'system' %}")
        for source, why in ((refuse + turns, "no role"), (leave, "it leaves a system text out"),
                            (turns, None)):
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                meta = export.chat_metadata(source, V, {})
            self.assertEqual((meta["chat.present"], meta.get("chat.system_refused")), ("1", why))
            self.assertEqual(why or "", said.getvalue().strip()[-len(why):] if why else "")

    def test_always_invites(self):
        """Llama 3's first template ends in an assistant header whether asked to or not."""
        later = ("{% for m in messages %}{% set c = '<|h|>' + m.role + '</h>' + m.content + '<|e|>' %}"
                 "{% if loop.first %}{{ bos_token }}{% endif %}{{ c }}{% endfor %}"
                 "{% if add_generation_prompt %}<|h|>assistant</h>{% endif %}")
        first = later.replace("{% if add_generation_prompt %}", "{% if true %}")
        self.assertEqual(self.pieces(first, bos_token="<|b|>"), self.pieces(later, bos_token="<|b|>"))

    def test_white_space(self):
        """Each role's texts are stripped, or not, as the template does it; half of it is said."""
        turn = "{%% for m in messages %%}<{{ m.role }}>{{ %s }}</>{%% endfor %%}"
        for text, trim, trim_system, warned in (
            ("m.content", False, False, False), ("m.content | trim", True, True, False),
            ("m.content | trim if m.role == 'system' else m.content", False, True, False),
            ("m.content.lstrip()", True, True, True),
        ):
            p, said = self.pieces(turn % text)
            self.assertEqual((p["trim"], p["trim_system"]), (trim, trim_system))
            self.assertEqual("white space" in said, warned)

    def test_system_inside_user_turn(self):
        p, said = self.pieces(
            "{{ bos_token }}{% if messages[0].role == 'system' %}"
            "{% set s = '<<' + messages[0].content + '>>' %}{% set messages = messages[1:] %}"
            "{% else %}{% set s = '' %}{% endif %}"
            "{% for m in messages %}{% if m.role == 'user' %}"
            "[I]{{ s if loop.first else '' }}{{ m.content }}[/I]"
            "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}", bos_token="<s>")
        self.assertEqual(said, "")
        self.assertEqual(p["begin"], "<s>")
        self.assertEqual((p["system_prefix"], p["system_suffix"]), ("[I]<<", ">>"))
        self.assertEqual((p["user_prefix"], p["user_prefix_after_system"]), ("[I]", ""))

    def test_eos_only_at_the_end(self):
        p, _ = self.pieces(
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% else %}{{ eos_token }}{% endif %}",
            eos_token="</s>")
        self.assertEqual((p["user_suffix"], p["assistant_suffix"]), ("<end>", "<end>"))

    def test_date_does_not_move(self):
        source = "{{ strftime_now('%d') }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
        self.assertEqual(self.pieces(source)[0]["default_system"], export.TODAY)

    def test_none_called_default(self):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            named = [{"name": "tool_use", "template": "x"}]
            self.assertIsNone(export.template_of("/nowhere", {"chat_template": named}))
        self.assertIn("tool_use none is called default", said.getvalue())

    def test_hopeless(self):
        self.assertIsNone(self.pieces("constant")[0])
        self.assertIsNone(self.pieces("{{ messages[0].content | upper }}")[0])
        self.assertIsNone(self.pieces("{{ nothing.at.all }}")[0])
        with self.assertRaises(export.Refusal):
            export.Template("{% if %}", {})

    def test_partly(self):
        p, said = self.pieces(
            "{% for m in messages %}{{ loop.length }}[{{ m.content }}]{% endfor %}")
        self.assertIsNotNone(p)
        self.assertIn("two questions", said)

    def test_base_model(self):
        self.assertEqual(export.kvzip_texts(None, "<s>", 1), ("<s>", "\n\nAnswer: "))
        self.assertEqual(export.kvzip_texts(None, "<s>", 0), ("", "\n\nAnswer: "))


# How Qwen 2.5 and Llama 3 have tools, at half the length.
HERMES = r"""{%- macro turn(role, text) %}{{ '<|im_start|>' + role + '\n' + text + '<|im_end|>\n' }}{% endmacro %}
{%- set system = messages[0].content if messages[0].role == 'system' else 'You help.' %}
{%- if tools %}{{ '<|im_start|>system\n' + system + '\n\n# Tools\n<tools>' }}
{%- for t in tools %}{{ '\n' }}{{ t | tojson }}{% endfor %}
{{- '\n</tools>\nCall them: <tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call><|im_end|>\n' }}
{%- else %}{{ turn('system', system) }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' }}{{ m.content }}{{ '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- elif m.tool_calls %}{{ '<|im_start|>assistant' + ('\n' + m.content if m.content else '') }}
{%- for c in m.tool_calls %}
{{- '\n<tool_call>\n{"name": "' }}{{ c.function.name }}{{ '", "arguments": ' }}{{ c.function.arguments | tojson }}
{{- '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif m.role != 'system' %}{{ turn(m.role, m.content) }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

IN_QUESTION = """{{ bos_token }}{% if messages[0].role == 'system' %}
{%- set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif -%}
<h>system</h>{{ 'Environment: ipython ' if tools else '' }}{{ system }}<e>
{%- if tools -%}
<h>user</h>Answer in JSON: {"name": name, "parameters": arguments}.
{% for t in tools %}{{ t | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}
{{- messages[0].content | trim }}<e>{% set messages = messages[1:] %}{% endif %}
{%- for m in messages %}
{%- if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif -%}
<h>assistant</h>{"name": "{{ m.tool_calls[0].function.name }}", "parameters":
{{- ' ' + m.tool_calls[0].function.arguments | tojson }}}<e>
{%- elif m.role == 'tool' -%}<h>ipython</h>{{ m.content | tojson }}<e>
{%- else -%}<h>{{ m.role }}</h>{{ m.content | trim }}<e>{% endif %}
{%- endfor %}{% if add_generation_prompt %}<h>assistant</h>{% endif %}"""


class TestTools(Case):
    def tools(self, source, controls=(), **tokens):
        class V:
            strippers, meta = [], {"add_bos": 0}
            texts, kinds = list(controls), [export.SPECIAL] * len(controls)

        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            meta = export.chat_metadata(source, V, tokens)
        self.assertEqual(meta["chat.present"], "1")
        return {k[5:]: v for k, v in meta.items()}, said.getvalue()

    def test_in_the_system_turn(self):
        p, said = self.tools(HERMES)
        self.assertEqual((said, p["tools"]), ("", "1"))
        self.assertEqual((p["call_marker"], p["call_name"], p["call_arguments"]), ("<tool_call>", "name", "arguments"))
        self.assertEqual((p["call_text"], p["call_separator"]), ("\n", "\n"))
        self.assertEqual(p["tools_begin"], "<|im_start|>system\nYou help.\n\n# Tools\n<tools>\n")
        self.assertEqual(p["result_separator"], "\n</tool_response>\n<tool_response>\n")
        self.assertFalse({"tools_indent", "tools_bare", "call_one", "result_json"} & set(p))

    def test_in_the_question(self):
        p, said = self.tools(IN_QUESTION, bos_token="<s>")
        self.assertEqual((said, p["tools"]), ("", "1"))
        self.assertEqual((p["call_marker"], p["call_name"], p["call_arguments"]), ("", "name", "parameters"))
        self.assertEqual((p["tools_indent"], p["call_one"], p["result_json"]), ("4", "1", "1"))
        self.assertNotIn("call_text", p)
        self.assertEqual(p["result_begin"], "<h>ipython</h>")

    def test_compositions(self):
        """Conversations that export did not try, as jinja2 has them."""
        odd = export.tool("z", 'quo"te', deep={"enum": [None, "\u2028\x07é", 1e-7, True, {}, []]})
        for source in (HERMES, HERMES.replace("t | tojson", "t.function | tojson"), IN_QUESTION):
            template = export.Template(source, {"bos_token": "<s>"})
            chat = export.chat_pieces(template, "<s>")
            p = export.tool_pieces(template, chat, mock.Mock(texts=[]))
            for messages in ([("system", "S"), ("user", "q"), export.calling("", export.call("z", deep={"a": "b\n"})),
                              export.result("r"), ("assistant", "ok"), ("user", "w"),
                              export.calling("", export.call("z")), export.result('{"é": 1}')],
                             [("user", " q "), ("assistant", "a"), ("user", "b")]):
                for tools in ([odd], [export.FIRST, odd, export.SECOND]):
                    self.assertEqual(export.compose_tools(p, chat, messages, tools, True),
                                     template.render(messages, True, tools))

    def test_server(self):
        """`run serve` writes conversations down as jinja2 does, and cuts them into the same tokens."""
        odd = export.tool("weigh", 'quo"te <b> \u2028\x7fé', n={"enum": [None, 2.5, 1e-07]})
        weigh, now = (export.call("weigh", 1, n=[True, 'é"\n']), export.call("now", 2))
        talks = ([("user", " q\n")], [("system", " S "), ("user", "q"), ("assistant", "a"), ("user", "w")],
                 [("system", "S"), ("user", "q"), export.calling("", weigh), export.result('{"g": "<x>"}\n', 1),
                  ("assistant", "a"), ("user", "w"), export.calling("t", now), export.result("", 2)],
                 [("user", "q"), export.calling("", weigh, now), export.result("1", 1), export.result("2", 2)])
        for fixture, source in (("qwen2", HERMES), ("llama", IN_QUESTION)):
            path = self.copy(fixture)
            self.edit(path, "tokenizer_config.json", chat_template=source)
            self.convert(path)
            with open(os.path.join(path, "tokenizer_config.json")) as f:
                template = export.Template(source, {"bos_token": json.load(f).get("bos_token")})
            tried = 0
            with Server(model=self.out) as s:
                for messages in talks:
                    for tools in ([odd], [export.FIRST, odd, export.SECOND], None):
                        wanted = template.render(messages, True, tools)
                        if wanted is None:
                            continue
                        sent = [m if isinstance(m, dict) else dict(zip(("role", "content"), m)) for m in messages]
                        sent = [{**m, "tool_calls": [{**c, "function": {
                            **c["function"], "arguments": json.dumps(c["function"]["arguments"])}}
                            for c in m["tool_calls"]]} if "tool_calls" in m else m for m in sent]
                        body = {"messages": sent, **({"tools": tools} if tools else {})}
                        self.assertEqual(s.post("/apply-template", body), (200, {"prompt": wanted}))
                        whole = {"content": wanted, "parse_special": True}
                        self.assertEqual(s.post("/tokenize", body)[1]["tokens"],
                                         s.post("/tokenize", whole)[1]["tokens"])
                        tried += 1
            self.assertGreaterEqual(tried, 9)

    def test_what_cannot_be_said(self):
        """Named, in the file and at export; the rest of the template is converted all the same."""
        for old, new, why in (
            ("t | tojson", "t.function.name", "it does not print a tool as plain JSON"),
            ("c.function.arguments | tojson", "c.function.arguments", "arguments are not plain JSON"),
            ('{"name": "\' }}', "' }}", "a call is not JSON of a name and arguments alone"),
            ('", "arguments": \' }}', '", "id": "\' + c.id + \'", "arguments": \' }}',
             "a call is not JSON of a name and arguments alone"),
            ("{{ m.content }}", "{{ m.content | trim }}", "a result is not reproduced"),
            ("{{ m.content }}", "{{ m.tool_call_id }}{{ m.content }}", "calls one after the other is not reproduced"),
            ("{{ '<|im_start|>system\\n'", "{{ raise_exception('not\ntoday') + '<|im_start|>system\\n'", "not today"),
            ("# Tools", "# Tools' + messages | length | string + '", "a result is not reproduced"),
        ):
            self.assertIn(old, HERMES)
            p, said = self.tools(HERMES.replace(old, new))
            self.assertNotIn("tools", p)
            self.assertIn(why, p["tools_refused"])
            self.assertIn("the tools of the chat template are left out: " + p["tools_refused"], said)
        p, said = self.tools(HERMES, ["<tool_call>"])
        self.assertEqual(p["tools_refused"], "<tool_call> around a call is a control token")

    def test_no_tools(self):
        """Nothing is said where a template never had any."""
        p, said = self.tools("{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}")
        self.assertEqual(("tools" in p, "tools_refused" in p, said), (False, False, ""))


class TestTokenizers(Case):
    def test_merges_by_score(self):
        """As transformers' generate_merges does it."""
        score = {"a": 0, "b": 0, "ab": -2, "aa": -1, "aab": -3, "aaab": -9, "q": 0, "aq": -2.5}
        ids = {t: i for i, t in enumerate(score)}
        want = []
        for token, s in score.items():
            for cut in range(1, len(token)):
                if token[:cut] in ids and token[cut:] in ids:
                    want.append((token[:cut], token[cut:], s))
        want.sort(key=lambda m: (m[2], len(m[0]), len(m[1])), reverse=True)
        got = export.merges_by_score(ids, list(score.values()))
        self.assertEqual(got.tolist(), [[ids[l], ids[r], ids[l + r]] for l, r, _ in want])

    def write_ranks(self, path, tokens):
        with open(path, "wb") as f:
            for i, t in enumerate(tokens):
                f.write(base64.b64encode(t) + b" %d\n" % i)

    def test_rank_file_with_added_tokens(self):
        """As Meta ships it: tokenizer.model is a rank file, special tokens are in the config."""
        path = self.copy("llama")
        os.unlink(os.path.join(path, "tokenizer.json"))
        tokens = [bytes([b]) for b in range(256)] + [b" a"]
        self.write_ranks(os.path.join(path, "tokenizer.model"), tokens)
        special = {"content": "<|begin_of_text|>", "special": True}
        self.edit(path, "tokenizer_config.json", added_tokens_decoder={"258": special},
                  eos_token=None)
        c = self.convert(path)
        self.assertEqual(c.t["tok.kind"].tolist(), [0] * 257 + [4, 1])
        self.assertEqual(c.t["tok.bytes"].tobytes(), b"".join(tokens) + b"<|begin_of_text|>")
        self.assertEqual(c.meta["tokenizer.split"], "llama3")
        self.assertEqual((c.meta["tokenizer.bos_id"], c.meta["tokenizer.add_bos"]), ("258", "1"))

    def test_rank_file(self):
        tokens = [bytes([b]) for b in range(256)] + [b"ab", b"abc", b"\xff\xfe"]
        path = os.path.join(self.dir, "x.tiktoken")
        self.write_ranks(path, tokens)
        c = self.convert(path, "--tokenizer-only", "--split", "qwen2")
        want = [[97, 98, 256], [256, 99, 257], [255, 254, 258]]
        self.assertEqual(c.t["tok.merges"].tolist(), want)
        self.assertEqual(c.t["tok.bytes"].tobytes(), b"".join(tokens))
        self.assertEqual((c.meta["tokenizer.split"], c.meta["tokenizer.nfc"]), ("qwen2", "1"))

    PIECES = [("<unk>", 0, 2), ("<s>", 0, 3), ("<0x41>", 0, 6), ("\u2581", -3, 1), ("a", -4, 1),
              ("\u2581a", -1, 1), ("\u2581\u2581", 0, 4), ("<x>", 0, 5)]

    def sentencepiece(self, model_type=2, **normalizer):
        def field(number, value):
            if isinstance(value, int):
                return bytes([number << 3]) + bytes([value]) if number < 16 else bytes(
                    [(number & 15) << 3 | 128, number >> 4, value])
            if isinstance(value, float):
                return bytes([number << 3 | 5]) + struct.pack("<f", value)
            return bytes([number << 3 | 2, len(value)]) + value

        out = b""
        for text, score, kind in self.PIECES:
            out += field(1, field(1, text.encode()) + field(2, float(score)) + field(3, kind))
        out += field(2, field(3, model_type) + field(40, 0) + field(41, 1))
        extra = b"".join(field(int(k[1:]), v) for k, v in normalizer.items())
        return out + field(3, field(1, b"identity") + field(4, 0) + extra)

    def write(self, data):
        path = os.path.join(self.dir, "tokenizer.model")
        with open(path, "wb") as f:
            f.write(data)
        return path

    def test_sentencepiece(self):
        c = self.convert(self.write(self.sentencepiece()), "--tokenizer-only")
        self.assertEqual(c.t["tok.kind"].tolist(), [4, 1, 3, 0, 0, 0, 2, 4])
        self.assertEqual(c.t["tok.merges"].tolist(), [[3, 4, 5]])
        self.assertEqual(c.t["tok.bytes"].tobytes(), b"<unk><s>A a a  <x>")
        want = dict(bos_id="1", unk_id="0", space_prefix="1", byte_fallback="1")
        self.assertEqual({k: c.meta["tokenizer." + k] for k in want}, want)
        c = self.convert(self.write(self.sentencepiece(_3=0)), "--tokenizer-only")
        self.assertEqual(c.meta["tokenizer.space_prefix"], "0")

    def test_refused_sentencepiece(self):
        alone = ("--tokenizer-only",)
        self.refuse(self.write(self.sentencepiece(model_type=1)), "unigram", args=alone)
        self.refuse(self.write(self.sentencepiece(_2=b"abc")), "identity", args=alone)
        data = self.sentencepiece()
        for n in range(1, len(data)):
            try:
                export.vocab_from_sentencepiece(data[:n])
            except export.Refusal:
                pass

    def test_token_that_swallows_space(self):
        path = self.copy("smol")
        with open(os.path.join(path, "tokenizer.json")) as f:
            added = json.load(f)["added_tokens"]
        added[2]["rstrip"] = True  # <|im_end|>
        self.edit(path, "tokenizer.json", added_tokens=added)
        postfix = self.convert(path).meta["kvzip.postfix"]
        self.assertEqual(postfix, "<|im_end|><|im_start|>assistant\n")

    def test_metaspace(self):
        path = self.copy("mistral")
        space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first",
                 "split": False}
        self.edit(path, "tokenizer.json", normalizer=None, pre_tokenizer=space)
        self.assertEqual(self.convert(path).meta["tokenizer.space_prefix"], "2")
        strip = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}
        for change, field, value in (
            ({"prepend_scheme": "always"}, "space_prefix", "3"), ({"split": True}, "split", "words"),
            ({"prepend_scheme": "never"}, "strip", "1"),
        ):
            self.edit(path, "tokenizer.json", pre_tokenizer={**space, **change})
            self.assertEqual(self.convert(path).meta["tokenizer." + field], value)
        self.edit(path, "tokenizer.json", decoder=strip)
        os.unlink(self.out)
        self.refuse(path, "decoder", "Metaspace")  # the model has byte tokens

    def tokenizer(self, name, **model):
        path = os.path.join(self.copy(name), "tokenizer.json")
        with open(path) as f:
            spec = json.load(f)
        spec["model"].update(model)
        return path, spec

    def test_flags(self):
        path, spec = self.tokenizer("mistral")
        add = {"single_word": False, "lstrip": False, "rstrip": False, "special": False}
        spec["added_tokens"] += [{**add, "id": 640, "content": "<T>", "normalized": True},
                                 {**add, "id": 641, "content": "<R>", "normalized": False,
                                  "lstrip": True, "rstrip": True}]
        self.edit(os.path.dirname(path), "tokenizer.json", **spec)
        c = self.convert(path, "--tokenizer-only")
        self.assertEqual(c.t["tok.flags"].tolist()[638:], [0, 0, 1, 6])
        self.assertEqual(c.t["tok.bytes"].tobytes()[-7:], b" <T><R>")
        os.unlink(self.out)
        spec["added_tokens"][-1]["normalized"] = True
        self.edit(os.path.dirname(path), "tokenizer.json", **spec)
        self.refuse(path, "<R>", "swallows", args=("--tokenizer-only",))

    def wide(self, name):
        """A copy of a fixture with 32 more rows in its embedding, as padded models have them."""
        path = self.copy(name)
        tensors = read_source(path)
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            if key in tensors:
                more = np.zeros((32, tensors[key].shape[1]), np.float32)
                tensors[key] = np.vstack([tensors[key], more])
        write_source(path, tensors)
        self.edit(path, "config.json", vocab_size=len(tensors["model.embed_tokens.weight"]))
        return path

    def added(self, name, **config):
        """What tokenizer_config.json adds -> [(text, kind, flags)] from the first new id on."""
        path = self.wide(name)
        self.edit(path, "tokenizer_config.json", **config)
        c = self.convert(path)
        n, ends = len(self.tokenizer(name)[1]["model"]["vocab"]), c.t["tok.offsets"]
        data, flags = c.t["tok.bytes"].tobytes(), c.t.get("tok.flags", c.t["tok.kind"] * 0)
        return [(data[ends[i] : ends[i + 1]].decode(), int(c.t["tok.kind"][i]), int(flags[i]))
                for i in range(n, len(c.t["tok.kind"]))]

    def test_named_tokens(self):
        """Ids and flags of tokens that only the config names, as AutoTokenizer of transformers 5.24
        gives them: the usual names first, then others, then one of the two lists."""
        tool, x, end = ("<tool>", 1, 0), ("<X>", 1, 0), ("<end>", 1, 0)
        for config, want in (
            (dict(extra_special_tokens=["<tool>", "<X>"]), [tool, x]),
            (dict(extra_special_tokens={"image_token": "<tool>"}), [tool]),
            (dict(additional_special_tokens=["<tool>"], extra_special_tokens=["<X>"]), [x]),
            (dict(image_token="<tool>", additional_special_tokens=["<X>"], pad_token="<end>"),
             [end, tool, x]),
            (dict(pad_token={"content": "<X>", "lstrip": True, "rstrip": True,
                             "normalized": False}), [("<X>", 1, 6)]),
            (dict(added_tokens_decoder={"641": {"content": "<tool>", "special": True},
                                        "640": {"content": "<X>"}}), [("<X>", 2, 1), tool]),
        ):
            self.assertEqual(self.added("smol", **config), want, config)
        os.unlink(self.out)
        path = self.wide("smol")
        gap = {"645": {"content": "<tool>", "special": True}}
        self.edit(path, "tokenizer_config.json", added_tokens_decoder=gap)
        self.refuse(path, "'<tool>' id 645", "640")
        self.edit(path, "tokenizer_config.json", added_tokens_decoder=DROP,
                  extra_special_tokens=[3])
        self.refuse(path, "extra_special_tokens is 3")

    def test_named_and_normalized(self):
        """A token of the config without flags is normalized unless it is special."""
        self.assertEqual(self.added("mistral", added_tokens_decoder={"640": {"content": "<t>"}}),
                         [(" <t>", 2, 1)])

    def test_named_in_the_vocabulary(self):
        """A named token that tokenizer.json does not list as added is special all the same, unless
        merges make it of a text."""
        spec = self.tokenizer("smol")[1]
        path = self.wide("smol")
        merged = "".join(spec["model"]["merges"][0]).replace(" ", "")
        self.edit(path, "tokenizer.json", added_tokens=[])
        self.edit(path, "tokenizer_config.json", pad_token=merged, unk_token="!")
        kinds = self.convert(path).t["tok.kind"]
        ids = spec["model"]["vocab"]
        self.assertEqual([int(kinds[ids[t]]) for t in ("<|im_start|>", "<|im_end|>", merged, "!")],
                         [1, 1, 0, 0])

    def test_who_adds_bos(self):
        """The post-processor of tokenizer.json; add_bos_token counts where there is none of both,
        as in transformers 5.24."""
        for name, said, want in (("llama", False, "1"), ("smol", True, "0"), ("llama", True, "1")):
            path = self.copy(name)
            self.edit(path, "tokenizer_config.json", add_bos_token=said)
            status, text = run(path, "-o", self.out)
            self.assertEqual(status, 0, text)
            self.assertEqual("overrules" in text, want != str(int(said)))
            self.assertEqual(Converted(self.out).meta["tokenizer.add_bos"], want)
        path = self.copy("mistral")
        os.unlink(os.path.join(path, "tokenizer.json"))
        shutil.move(self.write(self.sentencepiece()), path)
        self.edit(path, "tokenizer_config.json", add_bos_token=False, eos_token="<s>")
        self.assertEqual(self.convert(path).meta["tokenizer.add_bos"], "0")

    def test_fields(self):
        """What neither side does is refused by name."""
        for model, word in (({"dropout": 0.1}, "dropout"), ({"end_of_word_suffix": "x"}, "suffix"),
                            ({"unk_token": "<none>"}, "<none>")):
            path, spec = self.tokenizer("smol", **model)
            self.edit(os.path.dirname(path), "tokenizer.json", **spec)
            self.refuse(path, word, args=("--tokenizer-only",))
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        for change, word in (({"decoder": {"type": "WordPiece"}}, "WordPiece"),
                             ({"normalizer": replace}, "Replace")):
            path, spec = self.tokenizer("smol")
            self.edit(os.path.dirname(path), "tokenizer.json", **change)
            self.refuse(path, word, args=("--tokenizer-only",))
        path, spec = self.tokenizer("mistral", fuse_unk=False)
        self.edit(os.path.dirname(path), "tokenizer.json", **spec)
        self.assertEqual(self.convert(path, "--tokenizer-only").meta["tokenizer.fuse_unk"], "0")

    def test_tokens_beside(self):
        """added_tokens.json and special_tokens_map.json count where added_tokens_decoder is absent."""
        path = self.copy("mistral")
        os.unlink(os.path.join(path, "tokenizer.json"))
        shutil.move(self.write(self.sentencepiece()), path)
        for file, value in (("added_tokens.json", {"<end>": 8, "<tool>": 9}),
                            ("special_tokens_map.json", {"eos_token": {"content": "<end>"}})):
            with open(os.path.join(path, file), "w") as f:
                json.dump(value, f)
        c = self.convert(path)
        self.assertEqual(c.t["tok.kind"].tolist(), [4, 1, 3, 0, 0, 0, 2, 4, 1, 2])
        self.assertEqual(c.t["tok.bytes"].tobytes()[-11:], b"<end><tool>")
        self.assertIn("8", c.meta["tokenizer.stop_ids"].split(","))


class TestGGUF(Case):
    """The fixtures as llama.cpp's converter would store them."""

    KEYS = {
        "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "max_position_embeddings": "context_length",
    }

    def gguf(self, name, arch, kind="F32", extra=None, keep=()):
        """Writes NAME.gguf; kind: type of the matrices."""
        path = os.path.join(self.dir, name + ".gguf")
        with open(os.path.join(FIXTURES, name, "config.json")) as f:
            c = json.load(f)
        w = gguf.GGUFWriter(path, arch)
        for theirs, ours in self.KEYS.items():
            w.add_uint32(f"{arch}.{ours}", c[theirs])
        w.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", c["rms_norm_eps"])
        theta = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]
        w.add_float32(f"{arch}.rope.freq_base", theta)
        head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        for key in ("key_length", "value_length"):
            w.add_uint32(f"{arch}.attention.{key}", head_dim)
        for key, value in (extra or {}).items():
            (w.add_uint32 if isinstance(value, int) else w.add_string)(key, value)
        self.add_tokenizer(w, name, extra or {})
        heads = {"q_proj": c["num_attention_heads"], "k_proj": c["num_key_value_heads"]}
        qtype = gguf.GGMLQuantizationType[kind]
        for theirs, x in read_source(os.path.join(FIXTURES, name)).items():
            ours = self.name_of(theirs, arch)
            if arch == "llama" and theirs.split(".")[-2] in heads:
                n = heads[theirs.split(".")[-2]]
                x = x.reshape(n, 2, x.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(x.shape)
            if arch.startswith("gemma") and "norm" in theirs:
                x = x + np.float32(1)
            if x.ndim == 2 and kind != "F32":
                w.add_tensor(ours, gguf.quants.quantize(x, qtype), raw_dtype=qtype)
            else:
                w.add_tensor(ours, np.ascontiguousarray(x, np.float32))
        for ours, x in keep:
            w.add_tensor(ours, x)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        return path

    def name_of(self, theirs, arch):
        top = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight",
               "model.norm.weight": "output_norm.weight"}
        if theirs in top:
            return top[theirs]
        _, _, layer, rest = theirs.split(".", 3)
        part, kind = rest.rsplit(".", 1)
        table = {**GGUF_SUFFIX, **(GEMMA_SUFFIX if arch.startswith("gemma") else {})}
        return f"blk.{layer}.{table[part]}.{kind}"

    def add_tokenizer(self, w, name, extra):
        with open(os.path.join(FIXTURES, name, "tokenizer.json")) as f:
            spec = json.load(f)
        with open(os.path.join(FIXTURES, name, "tokenizer_config.json")) as f:
            config = json.load(f)
        model = spec["model"]
        texts = sorted(model["vocab"], key=model["vocab"].get)
        kinds = [1] * len(texts)
        for t in spec["added_tokens"]:
            kinds[t["id"]] = 3 if t["special"] else 4
        spm = model["byte_fallback"]
        for i, t in enumerate(texts):
            if spm and len(t) == 6 and t.startswith("<0x"):
                kinds[i] = 6
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        w.add_tokenizer_model("llama" if spm else "gpt2")
        w.add_token_list(texts)
        w.add_token_types(kinds)
        if spm:
            rank = {l + r: i for i, (l, r) in reversed(list(enumerate(pairs)))}
            w.add_token_scores([-float(rank.get(t, len(pairs))) for t in texts])
        else:
            pre = {"smol": "smollm", "llama": "llama-bpe"}.get(name, "qwen2")
            w.add_string("tokenizer.ggml.pre", pre)
            w.add_token_merges([" ".join(p) for p in pairs])
        for key in ("bos", "eos"):
            token = config[key + "_token"]
            if token and f"tokenizer.ggml.{key}_token_id" not in extra:
                w.add_uint32(f"tokenizer.ggml.{key}_token_id", model["vocab"][token])
        w.add_bool("tokenizer.ggml.add_bos_token", name in ("llama", "gemma3", "mistral"))
        w.add_bool("tokenizer.ggml.add_space_prefix", name == "mistral")
        w.add_chat_template(config["chat_template"])

    def same_model(self, c, name, but=()):
        """Same tensors and metadata as the Hugging Face fixture gives."""
        want = Converted(os.path.join(FIXTURES, name + ".kvz"))
        self.same_tensors(c, want, but=but)
        skip = ("name", "source", "type", "fingerprint", "tokenizer.stop_ids")
        for key in want.meta:
            if key not in skip:
                self.assertEqual(c.meta[key], want.meta[key], key)

    def test_special_ids(self):
        """A list where one id stands, without a token's name to go by."""
        path = self.copy("llama", bos_token_id=[1 << 20])
        self.edit(path, "tokenizer_config.json", bos_token=DROP, chat_template=DROP)
        self.edit(path, "tokenizer.json", post_processor=None)
        self.refuse(path, "bos_token_id", "1048576")

    def test_known_by_name(self):
        """llama.cpp's: Phi-3's added tokens take the white space behind them, tokens whose text
        ends a turn are control tokens, and Llama 3's vocabulary needs no pre-tokenizer's name."""
        texts = ["<unk>", "<s>", "</s>", "<|end|>", "<|user|>", "a", "<eos>"]
        for name, flags in (("Phi-3.5 mini", {2: 4, 3: 4, 4: 4, 6: 4}), ("Phi 4", {}), ("", {})):
            v = export.Vocab(texts, [4, 3, 0, 0, 1, 0, 0], "spm")
            export.add_gguf_facts(v, name)
            self.assertEqual(v.kinds, [4, 3, 1, 1, 1, 0, 1])
            self.assertEqual(v.flags, flags)
        llama = ["<|start_header_id|>"] + ["x"] * 128255
        with contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(export.known_pre({}, llama), "llama-bpe")
            self.assertIsNone(export.known_pre({}, llama[1:]))
        self.assertEqual(export.known_pre({"tokenizer.ggml.pre": "qwen2"}, llama), "qwen2")

    def test_vocabulary_left_out(self):
        """Merges and types of tokens cannot be guessed; without a BOS none is added."""
        def without(name, key):
            with mock.patch.object(gguf.GGUFWriter, key, lambda *a, **k: None):
                return self.gguf(name, "llama")

        self.refuse(without("smol", "add_token_merges"), "tokenizer.ggml.merges is missing")
        for name in ("smol", "mistral"):
            self.refuse(without(name, "add_token_types"), "tokenizer.ggml.token_type is missing")
        meta = {"tokenizer.ggml." + k: v for k, v in dict(
            model="gpt2", pre="llama-bpe", tokens=["a", "b", "ab"], token_type=[1, 1, 1],
            merges=["a b"], add_bos_token=True).items()}
        self.assertEqual(export.vocab_from_gguf(meta).meta["add_bos"], 0)

    def test_llama_family(self):
        """Rows of q and k put back, tokenizer and chat pieces as from tokenizer.json."""
        self.same_model(self.convert(self.gguf("smol", "llama")), "smol")

    def test_qwen(self):
        self.same_model(self.convert(self.gguf("qwen3", "qwen3"), "--type", "f32"), "qwen3")
        self.same_model(self.convert(self.gguf("qwen2", "qwen2"), "--type", "f32"), "qwen2")

    def test_rope_factors(self):
        want = Converted(os.path.join(FIXTURES, "llama.kvz"))
        plain = 1 / np.float32(5e5) ** (np.arange(0, 16, 2, dtype=np.float32) / 16)
        factors = (plain / want.t["rope.inv_freq"][0]).astype(np.float32)
        path = self.gguf("llama", "llama", keep=[("rope_freqs.weight", factors)])
        c = self.convert(path)
        self.same_model(c, "llama", but=("rope.inv_freq",))
        np.testing.assert_allclose(c.t["rope.inv_freq"], want.t["rope.inv_freq"], rtol=1e-6)

    def gemma4(self, name, tensors=None, **how):
        path = os.path.join(self.dir, name + ".gguf")
        parts = []
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            with open(os.path.join(FIXTURES, name, file)) as f:
                parts.append(json.load(f))
        config, spec, tokens = parts

        def tokenizer(w):
            ids = spec["model"]["vocab"]
            gemma4.add_tokenizer(w, spec, bos=ids["<bos>"], eos=ids["<eos>"], unknown=ids["<unk>"])
            w.add_chat_template(tokens["chat_template"])

        gemma4.write(path, config, tensors or read_source(os.path.join(FIXTURES, name)), tokenizer,
                     **how)
        return path

    def test_gemma4(self):
        """The same as the folder gives: heads, MLPs and caches of each layer, embeddings of layers,
        frequencies that stand still, experts, the vocabulary."""
        for name, split in (("gemma4", False), ("gemma4moe", False), ("gemma4moe", True)):
            c = self.convert(self.gemma4(name, split=split))
            self.same_model(c, name)
            self.assertEqual(c.meta["tokenizer.stop_ids"], "1,6")

    def test_gemma4_blocks(self):
        """The bits of blocks stay; rows of the table of embeddings, which are cut within blocks, are
        rounded anew."""
        rng = np.random.default_rng(7)
        source = read_source(os.path.join(FIXTURES, "gemma4"))
        shapes = {name: x.shape for name, x in source.items()}
        for name, shape in shapes.items():
            if "per_layer" in name and not name.endswith("per_layer_input_norm.weight"):
                double = [2 * n if n in (16, 112) else n for n in shape]
                source[name] = np.float32(rng.standard_normal(double))
        for kind in ("Q8_0", "F16"):
            qtype = gguf.GGMLQuantizationType[kind]
            wide = {"gemma4.embedding_length_per_layer_input": 32}
            c = self.convert(self.gemma4("gemma4", source, kind=kind, change=wide))
            for ours, theirs in (("tok_embed", "embed_tokens"), ("layers.3.w1", "layers.3.mlp.gate_proj"),
                                 ("embed_table", "embed_tokens_per_layer")):
                x = gguf.quants.quantize(source[f"model.{theirs}.weight"], qtype)
                x = gguf.quants.dequantize(x, qtype)
                got = c.matrix(ours)
                if ours == "embed_table":
                    got = got[:, : 224 // 16].reshape(768, 224)
                cut = kind == "Q8_0" and ours == "embed_table"
                self.assertLessEqual(np.abs(got - x).max(), 0.02 if cut else 0)

    def test_gemma4_refusals(self):
        for change, word in (
            ({"attention.key_length_swa": None}, "attention.key_length_swa is missing"),
            ({"attention.sliding_window_pattern": None}, "sliding_window_pattern is missing"),
            ({"attention.sliding_window_pattern": [True] * 7}, "the last one has to see all"),
            ({"attention.sliding_window_pattern": [True] * 5 + [False]}, "for 7 layers"),
            ({"attention.value_length_swa": 8}, "value_length_swa = 8 is not supported, 16 is"),
            ({"rope.dimension_count": 8}, "rope.dimension_count = 8"),
            ({"rope.dimension_count_swa": 8}, "rope.dimension_count_swa = 8"),
            ({"rope.scaling.factor": 2.0}, "together are not supported"),
            ({"attention.head_count_kv": [2, 2, 1]}, "head_count_kv has 3 values for 7 layers"),
            ({"attention.head_count_kv": [2, 2, 1, 2, 1, 1, 1]}, "different heads"),
            ({"attention.head_count_kv": [2, 2, 1, 2, 1, -1, 1]}, "is -1, expected a whole number"),
            ({"feed_forward_length": [48, 48, 48, 48, 96, 96, 96]}, "feed_forward_length"),
            ({"attention.shared_kv_layers": 7, "feed_forward_length": 48}, "without keys of its own"),
            ({"expert_count": 4}, "top_k_experts is missing"),
            ({"embedding_length_per_layer_input": 32}, "per_layer_token_embd.weight: expected"),
            ({"attention.causal": False}, "only causal models"),
            ({"attn_logit_softcapping": 5.0}, "attn_logit_softcapping"),
        ):
            change = {"gemma4." + key: value for key, value in change.items()}
            self.refuse(self.gemma4("gemma4", change=change), word)
        source = read_source(os.path.join(FIXTURES, "gemma4moe"))
        del source["model.layers.2.experts.down_proj"]
        self.refuse(self.gemma4("gemma4moe", source),
                    "blk.2.ffn_down_exps.weight is missing, expected [6, 32, 20]")
        with mock.patch.object(gemma4, "rope_freqs", lambda c: np.float32([1])):
            self.refuse(self.gemma4("gemma4"), "expected [16], found [1]")

    def test_gemma4_words(self):
        """</s> is a word there, <turn|> an end."""
        texts = ["<unk>", "</s>", "<turn|>", "<|tool_response>"]
        v = export.Vocab(texts, [3, 0, 0, 0], "spm")
        export.add_gguf_facts(v, "")
        self.assertEqual(v.kinds, [3, 0, 1, 1])

    def test_sliding_llama_is_mistral(self):
        path = self.gguf("mistral", "llama", extra={"llama.attention.sliding_window": 24})
        self.same_model(self.convert(path), "mistral", but=("tok.merges", "tok.kind"))

    def test_gemma3(self):
        """Norms are 1 + w already; window pattern and scale follow from the architecture."""
        path = self.gguf("gemma3", "gemma3", extra={"gemma3.attention.sliding_window": 16})
        c, want = self.convert(path), Converted(os.path.join(FIXTURES, "gemma3.kvz"))
        self.same_tensors(c, want, but=("tok.merges", "tok.kind"))
        self.assertEqual(np.float32(c.meta["attn_scale"]), np.float32(32**-0.5))
        found = {tuple(m) for m in c.t["tok.merges"].tolist()}
        self.assertLessEqual({tuple(m) for m in want.t["tok.merges"].tolist()}, found)

    def test_blocks_kept(self):
        """Q8_0, Q4_0, Q4_1, Q5_0: what llama.cpp reads from them is what we read, bit for bit."""
        source = read_source(os.path.join(FIXTURES, "llama"))
        for kind, target, dtype in (
            ("Q8_0", None, "I8"), ("Q4_0", None, "U8"), ("Q4_1", None, "U8"),
            ("Q4_0", "q8", "I8"), ("Q5_0", None, "I8"), ("Q8_0", "f32", "F32"),
        ):
            path = self.gguf("llama", "llama", kind)
            c = self.convert(path, *(("--type", target) if target else ()))
            for ours, theirs in SUFFIX.items():
                name = f"layers.1.{ours}"
                self.assertEqual(c.header[name]["dtype"], dtype)
                self.assertEqual(name + ".offset" in c.t, kind == "Q4_1")
                x = source[f"model.layers.1.{theirs}.weight"]
                q = gguf.GGMLQuantizationType[kind]
                want = gguf.quants.dequantize(gguf.quants.quantize(x, q), q)
                np.testing.assert_array_equal(c.matrix(name)[: len(want), : want.shape[1]], want)

    @staticmethod
    def plain_values(kind, b):
        """One block as ggml-quants.c reads it, in plain floats."""
        fp4 = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]
        if kind == "MXFP4":
            d = 2.0 ** (b[0] - 128)
            return [d * fp4[x & 15] for x in b[1:]] + [d * fp4[x >> 4] for x in b[1:]]
        if kind == "NVFP4":
            out = []
            for s in range(4):
                e, m = b[s] >> 3 & 15, b[s] & 7
                d = (m * 2.0**-9 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)) / 2
                d = 0 if b[s] == 127 else d
                codes = b[4 + 8 * s : 12 + 8 * s]
                out += [d * fp4[x & 15] for x in codes] + [d * fp4[x >> 4] for x in codes]
            return out
        d = struct.unpack("<e", bytes(b[:2]))[0]
        if kind == "Q1_0":
            return [d if b[2 + j // 8] >> j % 8 & 1 else -d for j in range(128)]
        return [((b[2 + j // 4] >> j % 4 * 2 & 3) - 1) * d for j in range(64)]

    def test_new_block_types(self):
        """Types that the package gguf does not know, from a file with one tensor of each."""
        rng = np.random.default_rng(5)
        for number, t in export.BLOCK_TYPES.items():
            raw = rng.integers(0, 256, (3, 2 * t.n_bytes), np.uint8)
            raw[0, 0] = 0  # the smallest scale of MXFP4 is no normal number
            for block in range(2):
                raw[:, block * t.n_bytes + 1] &= 0x3B  # no infinite f16
            path = os.path.join(self.dir, t.name + ".gguf")
            head = struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + struct.pack("<Q1sI", 1, b"x", 2)
            head += struct.pack("<QQIQ", 2 * t.columns, 3, number, 0)
            with open(path, "wb") as f:
                f.write(head + b"\0" * (-len(head) % 32) + raw.tobytes())
            tensor = export.open_gguf(path)[1]["x"]
            want = [[v for b in row.reshape(2, -1) for v in self.plain_values(t.name, b.tolist())]
                    for row in raw]
            self.assertEqual((tensor.kind, tensor.shape), (t.name, (3, 2 * t.columns)))
            np.testing.assert_array_equal(tensor.f32(), np.float32(want))

    def test_facts_left_out(self):
        """What a GGUF does not say is as llama.cpp has it."""
        def describe(arch, **own):
            values = {"block_count": 6, "embedding_length": 64, "feed_forward_length": 96,
                      "attention.head_count": 4, "context_length": 4096,
                      "attention.layer_norm_rms_epsilon": 1e-5}
            values.update({k.replace("__", "."): v for k, v in own.items()})
            meta = {f"{arch}.{k}": v for k, v in values.items() if v is not DROP}
            embed = mock.Mock(shape=(100, 64))
            c = export.gguf_config({"general.architecture": arch, **meta},
                                   {"token_embd.weight": embed})
            return export.describe(c, where="GGUF")

        for arch in ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3"):
            f = describe(arch).fields
            self.assertEqual((f["n_kv_heads"], f["head_dim"], f["rope_theta"]), (4, 16, 1e4), arch)
        self.assertEqual(describe("gemma2").windows, [4096, 0] * 3)
        self.assertEqual(describe("gemma2").fields["attn_softcap"], 50)
        self.assertEqual(describe("gemma3").windows, [0] * 6)
        m = describe("gemma3", attention__sliding_window=512, rope__freq_base=1e6,
                     rope__scaling__factor=8.0)
        self.assertEqual(m.windows, [512] * 5 + [0])
        self.assertEqual([(p["rope_theta"], p.get("factor")) for p in m.ropes],
                         [(1e4, None), (1e6, 8.0)])
        m = describe("gemma3", attention__sliding_window=8, attention__sliding_window_pattern=2)
        self.assertEqual(m.windows, [8, 0] * 3)
        self.assertEqual(describe("phi3", block_count=32).windows, [2047] * 32)
        self.assertEqual(describe("phi3").windows, [0] * 6)
        m = describe("phi3", block_count=40, attention__sliding_window=0)
        self.assertEqual(m.windows, [0] * 40)
        m = describe("llama", rope__scale_linear=2.0)
        self.assertEqual((m.ropes[0]["rope_type"], m.ropes[0]["factor"]), ("linear", 2.0))
        m = describe("llama", rope__scaling__factor=2.0, rope__scaling__type="none")
        self.assertEqual(m.ropes[0]["rope_type"], "default")
        m = describe("llama", attention__head_count_kv=[2] * 6)
        self.assertEqual(m.fields["n_kv_heads"], 2)
        for word, own in (
            ("head_count_kv", dict(attention__head_count_kv=[2] * 5 + [4])),
            ("head_count_kv", dict(attention__head_count_kv="2")),
            ("causal", dict(attention__causal=False)),
            ("block_count is missing", dict(block_count=DROP)),
            ("block_count is missing or 0", dict(block_count=0)),
            ("rms_epsilon", dict(attention__layer_norm_rms_epsilon=float("nan"))),
            ("rotating dimensions", dict(rope__dimension_count=64)),
        ):
            with self.assertRaises(export.Refusal) as caught:
                describe("phi3", **own)
            self.assertIn(word, str(caught.exception))

    def test_other_ggufs(self):
        for key, value, word in (("general.type", "adapter", "LoRA"),
                                 ("general.type", "mmproj", "projector"),
                                 ("general.alignment", 24, "power of two"),
                                 ("general.alignment", "32", "power of two")):
            self.refuse(self.gguf("smol", "llama", extra={key: value}), word)
        self.refuse(self.gguf("smol", "clip"), "projector")
        path = self.gguf("smol", "llama")
        with open(path, "rb") as f:
            data = f.read()
        at = data.index(b"blk.0.ffn_norm.weight")
        for changed, word in ((data[:at] + b"blk.1" + data[at + 5 :], "twice"),
                              (data[:4] + b"\0\0\0\3" + data[8:], "big-endian"),
                              (data.replace(b"token_embd", b"token_embx"), "vocabulary")):
            with open(path, "wb") as f:
                f.write(changed)
            self.refuse(path, word)

    def test_blocks_that_are_not_finite(self):
        """A scale that is kept as it is has to be a number."""
        path = self.gguf("llama", "llama", "Q8_0")
        t = export.open_gguf(path)[1]["blk.0.attn_q.weight"]
        with open(path, "r+b") as f:
            f.seek(t.offset)
            f.write(struct.pack("<e", float("inf")))
        self.refuse(path, "blk.0.attn_q.weight", "not finite")

    def test_loss_is_announced(self):
        path = self.gguf("llama", "llama", "Q5_1")
        self.assertIn("requantized with some loss: Q5_1 to q8", run(path, "-o", self.out)[1])
        path = self.gguf("llama", "llama", "Q4_1")
        self.assertEqual(run(path, "-o", self.out), (0, ""))
        self.assertIn("Q4_1 to q8", run(path, "-o", self.out, "--type", "q8")[1])

    def test_refused(self):
        self.refuse(self.gguf("smol", "mamba"), "mamba", "state-space")
        self.refuse(self.gguf("smol", "llama", extra={"llama.expert_count": 8}), "expert_count")
        scaling = {"llama.rope.scaling.type": "longrope"}
        self.refuse(self.gguf("smol", "llama", extra=scaling), "longrope")
        self.refuse(self.gguf("smol", "llama", extra={"split.count": 2}), "split")
        bias = ("blk.0.attn_q.bias", np.zeros(144, np.float32))
        self.refuse(self.gguf("smol", "llama", keep=[bias]), "attn_q.bias")

    def test_ids(self):
        """Ids that are no tokens: llama.cpp's default, or a refusal where it has none to use."""
        prefix = "tokenizer.ggml."
        for name, key, got in (("bos", "bos_id", "1"), ("unknown", "unk_id", "0")):
            path = self.gguf("mistral", "llama", extra={prefix + name + "_token_id": 4294967295})
            status, said = run(path, "-o", self.out)
            self.assertEqual(status, 0, said)
            self.assertIn(name + "_token_id is 4294967295", said)
            self.assertEqual(Converted(self.out).meta["tokenizer." + key], got)
        path = self.gguf("smol", "llama", extra={prefix + "eot_token_id": 99999})
        self.assertIn("eot_token_id is 99999", run(path, "-o", self.out)[1])
        os.unlink(self.out)
        for name in ("bos", "eos", "unknown", "eot", "eom"):
            path = self.gguf("smol", "llama", extra={f"{prefix}{name}_token_id": "2"})
            self.refuse(path, name + "_token_id is '2'")
        self.refuse(self.gguf("smol", "llama", extra={prefix + "eos_token_id": 99999}), "99999")

    def test_cut(self):
        path = self.gguf("smol", "llama")
        with open(path, "rb") as f:
            data = f.read()
        for n in [*range(0, 200, 7), *range(200, len(data), len(data) // 60), len(data) - 1]:
            with open(path, "wb") as f:
                f.write(data[:n])
            self.refuse(path)

    def test_shapes(self):
        """Files of random weights for timing (bench/shapes.py): the shape that they are to have, and numbers of a usual size."""
        path, ids, logits = (os.path.join(self.dir, name) for name in ("shape.gguf", "ids", "logits"))
        with open(ids, "w") as f:
            f.write("7 300 12 400")
        program = os.path.join(os.path.dirname(TESTS), "run")
        delta = {"rope.dimension_count": 16, "rope.dimension_sections": [3, 3, 2, 0], "full_attention_interval": 2,
                 "ssm.conv_kernel": 4, "ssm.state_size": 32, "ssm.group_count": 2, "ssm.time_step_rank": 2, "ssm.inner_size": 64}
        both = {"rope.freq_base_swa": 1e4, "rope.dimension_count_swa": 32, "attention.sliding_window": 16,
                "attention.sliding_window_pattern": [True, False], "attention.shared_kv_layers": 0, "attention.key_length_swa": 32,
                "attention.value_length_swa": 32, "final_logit_softcapping": 30.0, "embedding_length_per_layer_input": 32}
        for arch, tied, more in (("llama", True, {}), ("qwen2", False, {}), ("qwen35", True, delta), ("gemma4", True, both)):
            shape = shapes.Shape(arch, 64, 96, 2, 4, 2, 32, 512, tied, 1e4, 256, more)
            for kind in shapes.TYPES:
                with mock.patch.dict(shapes.SHAPES, tiny=shape):
                    shapes.write(path, "tiny", kind)
                meta = self.convert(path).meta
                keys = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "seq_len")
                self.assertEqual([int(meta[key]) for key in keys], [64, 96, 2, 4, 2, 32, 512, 256])
                subprocess.run([program, "logits", self.out, "--ids", ids, "-o", logits, "-q"], check=True)
                x = Converted(logits).t["logits"]
                self.assertTrue(x.shape == (4, 512) and np.isfinite(x).all() and 0.05 < x.std() < 20, x.std())


if __name__ == "__main__":
    sys.exit(run_cases("test_export"))
