"""gemma4.py: a Gemma 4 as a GGUF file, with the keys and names of llama.cpp's converter
(conversion/gemma.py and gguf-py). For tests/test_export.py and tests/oracle.py."""
import re

import gguf
import numpy as np

NAMES = {  # of transformers -> of a GGUF; those of a layer without its number
    "embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight", "embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2", "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj", "post_per_layer_input_norm": "post_norm", "router.proj": "ffn_gate_inp",
    "layer_scalar": "layer_output_scale.weight", "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale", "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}


def name_of(name):
    name = name.removeprefix("model.")
    layer = re.match(r"layers\.(\d+)\.", name)
    if not layer:
        return NAMES[name]
    rest = name[layer.end():]
    found = NAMES.get(rest) or NAMES[rest.removesuffix(".weight")] + ".weight"
    return f"blk.{layer[1]}.{found}"


def heads_of(c):
    """-> head_dim of full layers, [n_layers] kv heads."""
    full = [l for l, kind in enumerate(c["layer_types"]) if kind == "full_attention"]
    own = {"head_dim": c.get("global_head_dim", 512)}
    if c.get("attention_k_eq_v") and c.get("num_global_key_value_heads"):
        own["num_key_value_heads"] = c["num_global_key_value_heads"]
    own = c.get("per_layer_config", {}).get(str(full[0]), own)
    heads = [own.get("num_key_value_heads") if l in full else None for l in range(c["num_hidden_layers"])]
    return own["head_dim"], [n or c["num_key_value_heads"] for n in heads]


def keys(c):
    """{key: value} of config.json; head and MLP sizes that differ from layer to layer are lists."""
    sliding = [kind == "sliding_attention" for kind in c["layer_types"]]
    n, width, shared = c["num_hidden_layers"], c["intermediate_size"], c["num_kv_shared_layers"]
    full_dim, kv_heads = heads_of(c)
    widths = [width * (2 if c["use_double_wide_mlp"] and l >= n - shared else 1) for l in range(n)]
    rope = c.get("rope_parameters") or {
        "full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    out = {
        "block_count": n, "context_length": c["max_position_embeddings"], "embedding_length": c["hidden_size"],
        "feed_forward_length": widths if len(set(widths)) > 1 else width,
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": kv_heads if len(set(kv_heads)) > 1 else kv_heads[0],
        "attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]),
        "rope.freq_base": float(rope["full_attention"]["rope_theta"]),
        "rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"]),
        "attention.sliding_window": c["sliding_window"], "attention.sliding_window_pattern": sliding,
        "attention.key_length": full_dim, "attention.value_length": full_dim,
        "attention.key_length_swa": c["head_dim"], "attention.value_length_swa": c["head_dim"],
        "rope.dimension_count": full_dim, "rope.dimension_count_swa": c["head_dim"],
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": c.get("hidden_size_per_layer_input") or 0,
        "final_logit_softcapping": float(c["final_logit_softcapping"] or 0)}
    if c.get("enable_moe_block"):
        out.update({"expert_count": c["num_experts"], "expert_used_count": c["top_k_experts"],
                    "expert_feed_forward_length": c["moe_intermediate_size"]})
    return {f"gemma4.{key}": value for key, value in out.items()}


def add_key(w, key, value):
    add = {bool: w.add_bool, int: w.add_uint32, float: w.add_float32, str: w.add_string,
           list: w.add_array}[type(value)]
    add(key, value)


def rope_freqs(c):
    """What a full layer's frequencies are divided by: those that do not turn, by 1e30."""
    dim, p = heads_of(c)[0], (c.get("rope_parameters") or {}).get("full_attention", {})
    turning = int(dim * p.get("partial_rotary_factor", 0.25) / 2)
    return np.float32([1] * turning + [1e30] * (dim // 2 - turning))


def add_tokenizer(w, spec, **ids):
    """A tokenizer.json like Gemma's; ids: those of bos, eos and so on."""
    texts = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    types = {t["id"]: 3 if t["special"] else 4 for t in spec["added_tokens"]}
    w.add_tokenizer_model("gemma4")
    w.add_token_list(texts)
    w.add_token_scores([-1000.0] * len(texts))
    w.add_token_types([types.get(i, 6 if re.fullmatch("<0x..>", t) else 1) for i, t in enumerate(texts)])
    w.add_token_merges([" ".join(m) for m in spec["model"]["merges"]])
    w.add_add_space_prefix(False)
    w.add_add_bos_token(True)
    for name, i in ids.items():
        w.add_uint32(f"tokenizer.ggml.{name}_token_id", i)


def write(path, c, tensors, tokenizer, kind="F32", change=None, split=False):
    """c: config.json; tensors {name of transformers: float32 array}; tokenizer: a function of the
    writer; kind: type of the matrices; change: other values of keys, None: left out; split: gate
    and up of the experts are two tensors."""
    w, qtype = gguf.GGUFWriter(path, "gemma4"), gguf.GGMLQuantizationType[kind]
    for key, value in {**keys(c), **(change or {})}.items():
        if value is not None:
            add_key(w, key, value)
    tokenizer(w)
    out = {name_of(name): x for name, x in tensors.items()}
    for l in range(c["num_hidden_layers"] if split else 0):
        both = np.split(out.pop(f"blk.{l}.ffn_gate_up_exps.weight"), 2, axis=1)
        out.update({f"blk.{l}.ffn_{name}_exps.weight": x for name, x in zip(("gate", "up"), both)})
    for name, x in {**out, "rope_freqs.weight": rope_freqs(c)}.items():
        x = np.ascontiguousarray(x, np.float32)
        if x.ndim > 1 and kind != "F32" and x.shape[-1] % 32 == 0 and "ffn_gate_inp" not in name:
            w.add_tensor(name, gguf.quants.quantize(x, qtype), raw_dtype=qtype)
        else:
            w.add_tensor(name, x)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
