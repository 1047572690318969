#!/usr/bin/env python3
"""export.py of families whose layers are of kinds of their own: Ministral 3, Llama 4, Qwen3-Next.

From folders and GGUF files alike; and what of them is refused. Runs on the committed fixtures, of which GGUF files
are made as llama.cpp's converter names and orders things.
"""
import json
import os
import subprocess
import sys
import unittest

import gguf
import numpy as np

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [TESTS, os.path.dirname(TESTS)]
import export
import test_export
from checks import run_cases
from test_export import DROP, FIXTURES, GGUF_SUFFIX, Converted, read_source, write_source

COMMON_KEYS = {
    "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length", "head_dim": "attention.key_length",
}
NAMES = {
    **GGUF_SUFFIX, "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps", "linear_attn.in_proj_ba": "ssm_ba", "linear_attn.out_proj": "ssm_out",
    "linear_attn.conv1d": "ssm_conv1d", "linear_attn.norm": "ssm_norm", "mlp.router": "ffn_gate_inp",
}


def config_of(name):
    with open(os.path.join(FIXTURES, name, "config.json")) as f:
        return json.load(f)


def write_gguf(path, arch, config, more, tensors, pre="smollm"):
    """more: keys of the architecture alone; tensors: names as in a GGUF without blk.N where the first part says it."""
    w = gguf.GGUFWriter(path, arch)
    for theirs, ours in COMMON_KEYS.items():
        w.add_uint32(f"{arch}.{ours}", config[theirs])
    w.add_uint32(f"{arch}.attention.value_length", config["head_dim"])
    w.add_uint32(f"{arch}.rope.dimension_count", int(
        config["head_dim"] * config["rope_parameters"].get("partial_rotary_factor", 1)))
    w.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    w.add_float32(f"{arch}.rope.freq_base", config["rope_parameters"]["rope_theta"])
    for key, value in more.items():
        add = w.add_array if isinstance(value, list) else w.add_string if isinstance(value, str) else \
            w.add_float32 if isinstance(value, float) else w.add_uint32
        add(f"{arch}.{key}", value)
    with open(os.path.join(FIXTURES, "smol", "tokenizer.json"), encoding="utf-8") as f:
        spec = json.load(f)
    special = {t["id"]: t["content"] for t in spec["added_tokens"]}
    texts = {i: t for t, i in spec["model"]["vocab"].items()} | special
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_bos_token_id(1)
    w.add_token_list([texts[i] for i in sorted(texts)])
    w.add_token_types([3 if i in special else 1 for i in sorted(texts)])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]])
    for name, x in tensors.items():
        w.add_tensor(name, np.ascontiguousarray(x, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def gguf_name(theirs, names=None):
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if theirs in top:
        return top[theirs]
    _, _, layer, rest = theirs.replace("feed_forward.", "mlp.").split(".", 3)
    part, kind = (rest, "weight") if rest.endswith(("A_log", "dt_bias")) else rest.rsplit(".", 1)
    own = {"linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias"}
    return f"blk.{layer}.{own[part]}" if part in own else f"blk.{layer}.{ {**NAMES, **(names or {})}[part]}.{kind}"


def permuted(x, heads):
    """Rows of q or k with neighbours that rotate together."""
    return x.reshape(heads, 2, len(x) // heads // 2, -1).swapaxes(1, 2).reshape(x.shape)


class Layers(test_export.Case):
    def refuse(self, model, *words):
        if os.path.exists(self.out):
            os.remove(self.out)
        super().refuse(model, *words)

    def same_model(self, c, want):
        self.same_tensors(c, want, ("tok.bytes", "tok.offsets", "tok.kind", "tok.merges", "tok.flags"))
        for key, value in want.meta.items():
            if not key.startswith(("tokenizer.", "chat.", "kvzip.", "source", "fingerprint", "type", "name")):
                self.assertEqual(c.meta.get(key), value, key)

    def wrapped(self, name, outer, prefix, **more):
        """The fixture inside a multimodal config, with other tensor prefixes and a tower that is left out."""
        path = self.copy(name)
        inner = config_of(name)
        with open(os.path.join(path, "config.json"), "w") as f:
            json.dump({"model_type": outer, "text_config": inner, "vision_config": {"a": 1}, **more}, f)
        named = {n.replace("model.", prefix, 1): x for n, x in read_source(path).items()}
        named["vision_tower.x.weight"] = named["vision_model.y.weight"] = np.zeros((2, 2), np.float32)
        named["multi_modal_projector.linear.weight"] = np.zeros((2, 2), np.float32)
        write_source(path, named)
        return path


class TestMinistral3(Layers):
    WANT = os.path.join(FIXTURES, "ministral.kvz")

    def gguf(self, more=None, arch="mistral3", pre="smollm"):
        c = config_of("ministral")
        p = c["rope_parameters"]
        heads = {"q_proj": c["num_attention_heads"], "k_proj": c["num_key_value_heads"]}
        tensors = {}
        for theirs, x in read_source(os.path.join(FIXTURES, "ministral")).items():
            n = heads.get(theirs.split(".")[-2])
            tensors[gguf_name(theirs)] = permuted(x, n) if n else x
        keys = {"feed_forward_length": c["intermediate_size"], "rope.scaling.type": "yarn",
                "rope.scaling.factor": p["factor"],
                "rope.scaling.original_context_length": p["original_max_position_embeddings"],
                "rope.scaling.yarn_beta_fast": p["beta_fast"], "rope.scaling.yarn_beta_slow": p["beta_slow"],
                "rope.scaling.yarn_log_multiplier": p["mscale_all_dim"],
                "attention.temperature_scale": p["llama_4_scaling_beta"], **(more or {})}
        keys = {k: v for k, v in keys.items() if v is not DROP}
        return write_gguf(os.path.join(self.dir, "m.gguf"), arch, c, keys, tensors, pre)

    def test_fields(self):
        c = Converted(self.WANT)
        self.assertEqual((c.meta["query_growth"], c.meta["query_step"], c.meta["query_first"]), ("0.1", "24", "0"))
        self.assertNotIn("layer.query_grows", c.t)
        self.assertEqual(c.t["rope.scale"].tolist(), [1.0])  # mscale and mscale_all_dim are the same

    def test_gguf(self):
        self.same_model(self.convert(self.gguf(), "--type", "f32"), Converted(self.WANT))
        small = {"attention.temperature_scale": DROP, "rope.scaling.yarn_log_multiplier": DROP}
        c = self.convert(self.gguf(small), "--type", "f32")  # Mistral Small 3.1
        self.assertNotIn("query_growth", c.meta)
        self.assertGreater(float(c.t["rope.scale"][0]), 1.2)
        self.refuse(self.gguf(arch="llama"), "llama.rope.scaling.yarn_log_multiplier")
        c = self.convert(self.gguf(pre="tekken"))  # as llama.cpp has it
        keys = ("split", "ignore_merges", "add_bos", "bos_id", "nfc")
        self.assertEqual([c.meta["tokenizer." + key] for key in keys], ["tekken", "1", "1", "1", "0"])

    def test_wrappers(self):
        want = Converted(self.WANT)
        for prefix in ("language_model.model.", "model.language_model."):
            path = self.wrapped("ministral", "mistral3", prefix, tie_word_embeddings=True)
            self.same_tensors(self.convert(path, "--type", "f32"), want)
        inner = config_of("ministral")
        del inner["tie_word_embeddings"]  # neither says: as the weights are stored
        self.edit(path, "config.json", text_config=inner, tie_word_embeddings=DROP)
        self.same_tensors(self.convert(path, "--type", "f32"), want)
        inner["tie_word_embeddings"] = False
        self.edit(path, "config.json", text_config=inner, tie_word_embeddings=True)
        self.refuse(path, "tie_word_embeddings is True, and False in text_config")
        inner.update(tie_word_embeddings=True, model_type="mistral", sliding_window=None)
        inner["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
        self.edit(path, "config.json", text_config=inner)  # Mistral Small 3.1
        self.assertNotIn("query_growth", self.convert(path).meta)
        self.edit(path, "config.json", quantization_config={"quant_method": "fp8"})
        self.refuse(path, "quantized already (fp8)")

    def test_split(self):
        """Words are cut by the cases of letters, digits stand alone, contractions are no pieces of their own."""
        path = self.copy("qwen3")
        with open(os.path.join(path, "tokenizer.json"), encoding="utf-8") as f:
            spec = json.load(f)
        ids, pairs = spec["model"]["vocab"], ("aB", "BC", "12", "a'", "'s", "!/")
        for old, new in zip([t for t in ids if len(t) > 2], pairs):
            ids[new] = ids.pop(old)
        spec["model"]["merges"] = [list(p) for p in pairs]
        spec["normalizer"] = None
        for split, want in ((export.TEKKEN_SPLIT, ["a", "BC", "1", "2", "a", "'s", "!/"]),
                            (export.GPT4 % r"\p{N}", ["aB", "C", "1", "2", "a", "'s", "!/"])):
            spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = split
            with open(os.path.join(path, "tokenizer.json"), "w", encoding="utf-8") as f:
                json.dump(spec, f)
            self.convert(path)
            done = subprocess.run([os.path.join(os.path.dirname(TESTS), "run"), "tokenize", self.out, "-p",
                                   "aBC12a's!/", "-q"], capture_output=True)
            self.assertEqual([int(x) for x in done.stdout.split()], [ids[t] for t in want])

    def test_refusals(self):
        p = config_of("ministral")["rope_parameters"]
        for change, word in (
            ({"llama_4_scaling_beta": None}, "needs rope_parameters of type yarn with llama_4_scaling_beta"),
            ({"llama_4_scaling_beta": "much"}, "llama_4_scaling_beta is 'much'"),
            ({"rope_type": "linear", "beta_fast": None, "beta_slow": None, "mscale": None, "mscale_all_dim": None},
             "ministral3 needs"),
            ({"original_max_position_embeddings": None}, "ministral3 needs"),
            ({"llama_5_scaling": 1.0}, "rope parameter llama_5_scaling"),
        ):
            self.refuse(self.copy("ministral", rope_parameters={**p, **change}), word)
        self.refuse(self.copy("ministral", rope_parameters=None), "ministral3 needs")
        self.refuse(self.copy("llama", rope_scaling=p), "llama_4_scaling_beta")


class TestQwen3Next(Layers):
    WANT = os.path.join(FIXTURES, "qwen3next.kvz")

    def test_rows(self):
        """Each key head's q, k, values and gates stand together."""
        source, c = read_source(os.path.join(FIXTURES, "qwen3next")), Converted(self.WANT)
        at = "model.layers.0.linear_attn."
        x = source[at + "in_proj_qkvz.weight"].reshape(2, 112, 48)
        q, k, v, z = (p.reshape(-1, 48) for p in np.split(x, [16, 32, 72], axis=1))
        np.testing.assert_array_equal(c.matrix("layers.0.delta.qkv")[:144], np.concatenate([q, k, v]))
        np.testing.assert_array_equal(c.matrix("layers.0.delta.z")[:80], z)
        b, a = np.split(source[at + "in_proj_ba.weight"].reshape(2, 4, 48), 2, axis=1)
        np.testing.assert_array_equal(c.matrix("layers.0.delta.b")[:4], b.reshape(4, 48))
        np.testing.assert_array_equal(c.matrix("layers.0.delta.a")[:4], a.reshape(4, 48))
        self.assertNotIn("delta_tiled", c.meta)

    def gguf(self, more=None):
        c, tensors, experts = config_of("qwen3next"), {}, {}
        for theirs, x in read_source(os.path.join(FIXTURES, "qwen3next")).items():
            if ".experts." in theirs:
                at, expert = theirs.split(".experts.")
                e, part, _ = expert.split(".")
                experts.setdefault(f"{at}.experts.{part}.weight", {})[int(e)] = x
                continue
            if "in_proj_qkvz" in theirs:
                q, k, v, z = (p.reshape(-1, 48) for p in np.split(x.reshape(2, 112, 48), [16, 32, 72], axis=1))
                layer = theirs.split(".")[2]
                tensors[f"blk.{layer}.attn_qkv.weight"] = np.concatenate([q, k, v])
                tensors[f"blk.{layer}.attn_gate.weight"] = z
                continue
            if theirs.endswith("A_log"):
                x = -np.exp(x.astype(np.float64)).astype(np.float32)
            elif theirs.endswith("norm.weight") and "linear_attn" not in theirs:
                x = x + np.float32(1)
            elif "conv1d" in theirs:
                x = x[:, 0]
            tensors[gguf_name(theirs, {"post_attention_layernorm": "post_attention_norm"})] = x
        for theirs, parts in experts.items():
            tensors[gguf_name(theirs)] = np.stack([parts[e] for e in range(len(parts))])
        kinds = [kind == "linear_attention" for kind in c["layer_types"]]
        keys = {"feed_forward_length": c["intermediate_size"], "expert_count": 5, "expert_used_count": 2,
                "expert_feed_forward_length": 24, "expert_shared_feed_forward_length": 32,
                "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.group_count": 2, "ssm.time_step_rank": 4,
                "ssm.inner_size": 80, "full_attention_interval": 4, "attention.recurrent_layers": kinds, **(more or {})}
        return write_gguf(os.path.join(self.dir, "q.gguf"), "qwen3next", c, keys, tensors)

    def test_gguf(self):
        self.same_model(self.convert(self.gguf(), "--type", "f32"), Converted(self.WANT))
        self.refuse(self.gguf({"attention.recurrent_layers": [1, 0, 1]}), "recurrent_layers")
        self.refuse(self.gguf({"attention.recurrent_layers": [True, False]}), "layer_types")
        self.refuse(self.gguf({"nextn_predict_layers": 1}), "nextn_predict_layers")

    def test_refusals(self):
        for change, word in (
            (dict(linear_num_value_heads=2), "in_proj_qkvz.weight: expected [144, 48], found [224, 48]"),
            (dict(linear_num_value_heads=3), "delta nets of 2 key heads"),
            (dict(mlp_only_layers=[1]), "model.layers.1.mlp.gate_proj.weight is missing"),
            (dict(decoder_sparse_step=2), "model.layers.0.mlp.gate_proj.weight is missing"),
            (dict(attention_bias=True), "attention_bias"),
        ):
            self.refuse(self.copy("qwen3next", **change), word)


class TestLlama4(Layers):
    WANT = os.path.join(FIXTURES, "llama4.kvz")

    def test_layers(self):
        source, c = read_source(os.path.join(FIXTURES, "llama4")), Converted(self.WANT)
        self.assertEqual(c.t["layer.window"].tolist(), [32, 32, 32, 0])
        self.assertEqual(c.t["layer.rope"].tolist(), [0, 0, 0, -1])
        self.assertEqual(c.t["layer.query_grows"].tolist(), [0, 0, 0, 1])
        meta = ("query_growth", "query_step", "query_first", "window_chunks", "route_input", "hidden_dim",
                "expert_dim", "shared_dim", "n_experts", "n_used")
        self.assertEqual([c.meta[k] for k in meta], ["0.1", "20", "1", "1", "1", "40", "64", "64", "3", "1"])
        for l in range(4):
            self.assertEqual(f"layers.{l}.q_norm" in c.t and f"layers.{l}.k_norm" in c.t, l < 3)
            self.assertEqual(f"layers.{l}.router" in c.t, l % 2 == 1)
        np.testing.assert_array_equal(c.t["layers.0.q_norm"], np.ones(16))
        self.assertNotIn("layers.1.shared_scale", c.t)
        x = source["model.layers.1.feed_forward.experts.gate_up_proj"]
        for ours, want in (("w1", x[:, :, :64]), ("w3", x[:, :, 64:]),
                           ("w2", source["model.layers.1.feed_forward.experts.down_proj"])):
            got = c.matrix(f"layers.1.experts.{ours}").reshape(3, want.shape[2], want.shape[1])
            np.testing.assert_array_equal(got, want.swapaxes(1, 2))
        q = source["model.layers.0.self_attn.q_proj.weight"].reshape(4, 8, 2, 48).swapaxes(1, 2)
        np.testing.assert_array_equal(c.matrix("layers.0.wq"), q.reshape(64, 48))

    def test_configs(self):
        want = Converted(self.WANT)
        chunked = ["chunked_attention"] * 3 + ["full_attention"]
        for change in (dict(layer_types=chunked), dict(no_rope_layers=[]), dict(no_rope_layers=[1, 1, 1, 0]),
                       dict(moe_layers=[1, 3], interleave_moe_layer_step=1), dict(attn_temperature_tuning=4)):
            self.same_tensors(self.convert(self.copy("llama4", **change), "--type", "f32"), want)
        path = self.wrapped("llama4", "llama4", "language_model.model.", tie_word_embeddings=True)
        self.same_tensors(self.convert(path, "--type", "f32"), want)
        c = self.convert(self.copy("llama4", attention_chunk_size=None, attn_temperature_tuning=False))
        self.assertEqual(c.t["layer.window"].tolist(), [0, 0, 0, 0])
        self.assertFalse({"window_chunks", "query_growth"} & set(c.meta))
        self.assertNotIn("layer.query_grows", c.t)
        c = self.convert(self.copy("llama4", use_qk_norm=False))
        self.assertFalse(any(name.endswith("q_norm") for name in c.t))

    def gguf(self, more=None):
        c, tensors = config_of("llama4"), {}
        for theirs, x in read_source(os.path.join(FIXTURES, "llama4")).items():
            if theirs.endswith("gate_up_proj"):
                for part, half in zip(("gate_proj", "up_proj"), np.split(x.swapaxes(1, 2), 2, axis=1)):
                    tensors[gguf_name(theirs.replace("gate_up_proj", part + ".weight"))] = half
            elif theirs.endswith("experts.down_proj"):
                tensors[gguf_name(theirs + ".weight")] = x.swapaxes(1, 2)
            else:
                tensors[gguf_name(theirs)] = x
        keys = {"feed_forward_length": 40, "expert_feed_forward_length": 64, "expert_count": 3, "expert_used_count": 1,
                "interleave_moe_layer_step": 2, **(more or {})}
        return write_gguf(os.path.join(self.dir, "l.gguf"), "llama4", c, keys, tensors)

    def test_gguf(self):
        """A GGUF does not say chunks, growth and which layers rotate: they are those of the published models."""
        rope = {"rope_type": "default", "rope_theta": 5e5}
        path = self.copy("llama4", attention_chunk_size=DROP, floor_scale=DROP, attn_scale=DROP, rope_parameters=rope)
        want = self.convert(path, "--type", "f32")
        self.assertEqual(want.t["layer.window"].tolist(), [8192, 8192, 8192, 0])
        self.same_model(self.convert(self.gguf(), "--type", "f32"), want)
        self.refuse(self.gguf({"attention.sliding_window": 0}), "attention.sliding_window")
        self.refuse(self.gguf({"expert_weights_scale": 2.0}), "expert_weights_scale")

    def test_refusals(self):
        rope = config_of("llama4")["rope_parameters"]
        for change, word in (
            (dict(layer_types=["sliding_attention"] * 4), "sliding_attention"),
            (dict(no_rope_layers=[1, 1]), "no_rope_layers names 2 of 4 layers"),
            (dict(num_local_experts=4), "router.weight: expected [4, 48], found [3, 48]"),
            (dict(intermediate_size=32), "experts.gate_up_proj: expected [3, 48, 64], found [3, 48, 128]"),
            (dict(moe_layers=[0]), "model.layers.0.feed_forward.router.weight is missing"),
            (dict(num_experts_per_tok=4), "3 experts, of which a token uses 4"),
            (dict(attention_bias=True), "attention_bias"),
            (dict(intermediate_size_mlp=48), "expected [48, 48], found [40, 48]"),
            (dict(rope_parameters={**rope, "rope_type": "yarn"}), "rope scaling 'yarn' is not supported"),
            (dict(attention_chunk_size="8k"), "attention_chunk_size is '8k'"),
            (dict(attn_temperature_tuning="on"), "attn_temperature_tuning is 'on'"),
        ):
            self.refuse(self.copy("llama4", **change), word)


if __name__ == "__main__":
    sys.exit(run_cases("test_layers"))
