#!/usr/bin/env python3
"""oracle.py: random tiny models of every family, our logits against transformers'.

    python3 -m venv oracle
    oracle/bin/pip install torch==2.15.0 transformers==5.24.0 numpy==2.4.6 gguf==0.19.0 jinja2==3.1.6
    make && oracle/bin/python tests/oracle.py

Run by hand: torch is large. Every case is a family, a number and a seed: a config.json as an author
could have published it (both layouts of transformers, plain or inside a multimodal one), random
weights, and the tokenizer of fixtures/smol. transformers reads the same directory that export.py
reads, and computes in float32 with eager attention; where no config of transformers says the same
(--yarn, mistral with layer_types), oracle_config() names the one that does. A case marked "gguf"
reaches us through a GGUF file, with names and q/k rows as llama.cpp's converter writes them.
Weights are scaled so that attention is peaked (logits of standard deviation 2 to 3 before softmax)
and the output logits are of size 10: a wrong window, angle, norm or cap shows up as 0.01 to 1.

Difference: max |ours - theirs| / max |theirs|, over all positions and ids. Exit 1 above 1e-4, unless the random
model is one that float32 is too short for: then both distances to transformers in float64 are printed, and ours
may be four times that of its own float32, whose sums come in another order.

Chapters: 1 cases  2 families  3 models  4 GGUF  5 comparing
"""
import argparse
import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import gguf
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from safetensors.torch import save_file

torch.set_num_threads(1)
torch.set_grad_enabled(False)

import gemma4 as gemma4_gguf

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
RUN = os.environ.get("RUN", os.path.join(ROOT, "run"))
EXPORT = os.environ.get("EXPORT", os.path.join(ROOT, "export.py"))
TOKENIZER = os.path.join(HERE, "fixtures", "smol")
N_TOKENS = 640  # of that tokenizer
LIMIT = 1e-4


# ---- 1. cases ----


class Case(NamedTuple):
    name: str
    rng: np.random.Generator
    config: dict  # config.json
    n: int  # length of the text
    marks: list  # what is special, for people; some act as well
    blocks: dict  # of MXFP4: codes and exponents, by name

    @property
    def text(self):
        return self.config.get("text_config", self.config)


def any_of(rng, *options):
    return options[rng.integers(len(options))]


def common(rng, i, family):
    """What all families have, in the layout of transformers 4."""
    head_dim = any_of(rng, 16, 24, 32, 40, 56, 64, 80, 96, 112, 128, 256)
    kv_heads, group = any_of(rng, 1, 2, 3, 4), int(rng.integers(1, 9))
    while kv_heads * group * head_dim > 2048:
        kv_heads, group = max(kv_heads // 2, 1), max(group - 1, 1)
    heads = kv_heads * group
    apart = family.startswith(("qwen3", "gemma", "qwen2_moe", "gpt_oss")) or (family != "phi3" and rng.random() < 0.6)
    return {
        "model_type": family,
        "hidden_size": int(rng.integers(30, 220)) if apart else heads * head_dim,
        "intermediate_size": int(rng.integers(20, 400)),
        "num_hidden_layers": int(rng.integers(2, 6)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **({"head_dim": head_dim} if apart else {}),
        "vocab_size": N_TOKENS + int(rng.integers(0, 150)),
        "max_position_embeddings": 2048,
        "rms_norm_eps": any_of(rng, 1e-5, 1e-6, 1e-3),
        "tie_word_embeddings": bool(rng.random() < 0.5),
        "rope_theta": any_of(rng, 1e4, 5e5, 1e6, 2804339835.0),
        "rope_scaling": SCALINGS[i % len(SCALINGS)](rng) if family in SCALED else None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": any_of(rng, "float32", "bfloat16", "float16"),
    }


def llama3(rng):
    return {"rope_type": "llama3", "factor": any_of(rng, 4.0, 8.0, 32.0), "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": any_of(rng, 64, 256)}


def yarn(rng):
    p = {"rope_type": "yarn", "factor": any_of(rng, 2.0, 4.0, 40.0),
         "original_max_position_embeddings": any_of(rng, 32, 64, 512)}
    p.update(any_of(rng, {}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"attention_factor": 1.2},
                    {"mscale": 0.707, "mscale_all_dim": 1.0}, {"truncate": False}))
    return p


SCALED = ("llama", "qwen2", "qwen3", "mistral", "smollm3", "qwen3_moe")
SCALINGS = (
    lambda rng: None, llama3, yarn, lambda rng: {"rope_type": "linear", "factor": 4.0},
    lambda rng: {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})


def draw(family, i, seed):
    rng = np.random.default_rng([seed, i, *family.encode()])
    c, marks = common(rng, i, family), []
    FAMILIES[family](rng, i, c, marks)
    if c.get("rope_scaling"):
        marks.append((c["rope_scaling"].get("rope_type") or "old yarn"))
    if rng.random() < 0.5:
        modernize(c)
        marks.append("v5")
    if "wrapped" in marks:
        c = {"model_type": family[: -len("_text")], "text_config": c, "image_token_id": 5, "video_token_id": 6,
             "vision_start_token_id": 7, "vision_end_token_id": 8, "vision_config": {"hidden_size": 8},
             "tie_word_embeddings": c["tie_word_embeddings"]}
    if "multimodal" in marks:
        outer = {"model_type": OUTER.get(family, family.replace("_text", "")),
                 "architectures": ["ForConditionalGeneration"],
                 "eos_token_id": [2], "vision_config": {"hidden_size": 8, "model_type": "siglip"}}
        c = {**outer, "text_config": c, "tie_word_embeddings": c["tie_word_embeddings"]}
    return Case(f"{family}-{i:02d}", rng, c, int(rng.integers(110, 220)) if i % 8 else 600, marks, {})


def modernize(c):
    """The same in the layout of transformers 5."""
    c["dtype"] = c.pop("torch_dtype")
    if c["model_type"] == "gpt_oss" and not c["rope_scaling"]:
        del c["rope_scaling"], c["rope_theta"]
        return
    if "global_head_dim" in c:  # layers of their own
        own = {"head_dim": c.pop("global_head_dim")}
        if c["attention_k_eq_v"] and c["num_global_key_value_heads"]:
            own["num_key_value_heads"] = c["num_global_key_value_heads"]
        del c["num_global_key_value_heads"]
        full = [l for l, kind in enumerate(c["layer_types"]) if kind == "full_attention"]
        c["per_layer_config"] = {str(l): own for l in full}
        return
    if "rope_scaling" not in c:
        return
    scaling = dict(c.pop("rope_scaling") or {"rope_type": "default"})
    scaling["rope_type"] = scaling.pop("type", None) or scaling["rope_type"]
    c["rope_parameters"] = {"rope_theta": c.pop("rope_theta"), **scaling}
    if "rope_local_base_freq" in c:
        local = {"rope_type": "default", "rope_theta": c.pop("rope_local_base_freq")}
        c["rope_parameters"] = {"full_attention": c["rope_parameters"], "sliding_attention": local}
    if "partial_rotary_factor" in c:
        c["rope_parameters"]["partial_rotary_factor"] = c.pop("partial_rotary_factor")
    if "sliding_window_pattern" in c:
        c["_sliding_window_pattern"] = c.pop("sliding_window_pattern")
        c["layer_types"] = kinds(c, lambda l: (l + 1) % c["_sliding_window_pattern"] != 0)


def kinds(c, slides):
    """layer_types"""
    n = c["num_hidden_layers"]
    return ["sliding_attention" if slides(l) else "full_attention" for l in range(n)]


# ---- 2. families ----

WINDOWS = (1, 7, 16, 33, 63, 64, 65, 100)  # pages hold 64


def to_gguf(c, marks):
    """This case travels as a GGUF, which has no place for all that a config.json can say."""
    marks.append("gguf")
    for key in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"):
        (c["rope_scaling"] or {}).pop(key, None)
    if "query_pre_attn_scalar" in c:
        c["query_pre_attn_scalar"] = c["head_dim"]


def llama(rng, i, c, marks):
    if i % 3 == 2:
        to_gguf(c, marks)


def mistral(rng, i, c, marks):
    c["sliding_window"] = any_of(rng, *WINDOWS) if i % 4 else None
    if i % 4 == 2:
        c["layer_types"] = kinds(c, lambda l: l % 2 == 0)
        marks.append("alternating")


def ministral3(rng, i, c, marks):
    """Queries that grow every 16 to 100 tokens, with yarn as the published models have it and without mscale."""
    del c["rope_theta"], c["rope_scaling"]
    c["head_dim"] = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    c["rope_parameters"] = {
        "rope_type": "yarn", "type": "yarn", "rope_theta": any_of(rng, 1e6, 1e4),
        "factor": any_of(rng, 2.0, 16.0, 48.0),
        "original_max_position_embeddings": any_of(rng, 16, 33, 64, 100), "beta_fast": 32.0, "beta_slow": 1.0,
        "max_position_embeddings": 2048, "mscale": 1.0, "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": any_of(rng, 0.1, 0.5)}
    if i % 4 == 1:
        for key in ("mscale", "mscale_all_dim"):
            del c["rope_parameters"][key]
    c["sliding_window"] = any_of(rng, *WINDOWS) if i % 5 == 4 else None
    if i % 3 == 2:
        c["rope_parameters"].update(mscale=1.0, mscale_all_dim=1.0)
        c["sliding_window"] = None
        marks.append("gguf")
    elif i % 3 == 1:
        marks.append("multimodal")


def qwen(rng, i, c, marks):
    if i % 5 == 0 and i % 2 == 0:
        marks.append("--yarn")
    if i % 2:
        c.update(use_sliding_window=True, sliding_window=any_of(rng, *WINDOWS),
                 max_window_layers=int(rng.integers(0, c["num_hidden_layers"])))
        if rng.random() < 0.3:
            c["layer_types"] = kinds(c, lambda l: rng.random() < 0.5)
    else:
        c.update(use_sliding_window=False, sliding_window=32)
        if i % 4 == 2:
            to_gguf(c, marks)


def smollm3(rng, i, c, marks):
    c.update(num_hidden_layers=c["num_hidden_layers"] + 2, pad_token_id=0)
    if i % 3 == 1:
        c.update(use_sliding_window=True, sliding_window=any_of(rng, *WINDOWS))
    if i % 3 == 2:
        c["no_rope_layers"] = [int(rng.random() < 0.5) for _ in range(c["num_hidden_layers"])]
    else:
        c["no_rope_layer_interval"] = 4 if i % 2 else any_of(rng, 2, 3)
    if i % 6 == 3:
        to_gguf(c, marks)


def gemma2(rng, i, c, marks):
    c.update(head_dim=c["head_dim"], hidden_activation="gelu_pytorch_tanh",
             query_pre_attn_scalar=any_of(rng, 24, c["head_dim"], 144),
             sliding_window=any_of(rng, *WINDOWS), tie_word_embeddings=i % 4 != 3,
             attn_logit_softcapping=any_of(rng, None, 50.0, 10.0, 3.0),
             final_logit_softcapping=any_of(rng, None, 30.0, 5.0))
    if i % 4 == 1:
        to_gguf(c, marks)


def gemma3(rng, i, c, marks):
    c.update(num_hidden_layers=int(rng.integers(2, 9)), hidden_activation="gelu_pytorch_tanh",
             query_pre_attn_scalar=any_of(rng, 24, c["head_dim"], 168),
             sliding_window=any_of(rng, *WINDOWS), tie_word_embeddings=i % 4 != 3,
             sliding_window_pattern=any_of(rng, 2, 3, 6), rope_local_base_freq=any_of(rng, 1e4, 1e3),
             rope_theta=1e6,
             rope_scaling={"rope_type": "linear", "factor": 8.0} if rng.random() < 0.5 else None)
    if i % 4 == 1:
        to_gguf(c, marks)
    if i % 4 == 2:
        marks.append("multimodal")


def gemma4(rng, i, c, marks):
    """E2B's, E4B's, 12B's, 26B's and 31B's shapes, small: other heads in full layers, caches that layers
    share, embeddings of each layer, double-wide MLPs, keys that are values, experts beside each MLP."""
    del c["rope_theta"], c["rope_scaling"]
    n, heads = int(rng.integers(3, 11)), any_of(rng, 1, 2, 4, 8)
    pattern = any_of(rng, 2, 3, 5, 6)
    layers = ["full_attention" if (l + 1) % pattern == 0 or l == n - 1 else "sliding_attention" for l in range(n)]
    own = [k for k in range(1, n + 1) if set(layers[:k]) == set(layers)]
    c.update(num_hidden_layers=n, num_attention_heads=heads, layer_types=layers,
             num_key_value_heads=any_of(rng, *(k for k in (1, 2, 4) if heads % k == 0)),
             head_dim=any_of(rng, 16, 24, 32, 64), global_head_dim=any_of(rng, 16, 32, 64, 128, 512),
             hidden_activation="gelu_pytorch_tanh", sliding_window=any_of(rng, *WINDOWS),
             final_logit_softcapping=any_of(rng, None, 30.0, 5.0), tie_word_embeddings=i % 4 != 3,
             attention_k_eq_v=i % 3 == 1, num_global_key_value_heads=None,
             num_kv_shared_layers=n - any_of(rng, *own) if i % 3 != 1 else 0, use_double_wide_mlp=i % 2 == 0,
             hidden_size_per_layer_input=any_of(rng, 16, 32, 48) if i % 3 != 1 else 0,
             vocab_size_per_layer_input=c["vocab_size"], enable_moe_block=False)
    if i % 2 and "unified" not in c["model_type"]:
        experts = any_of(rng, 1, 3, 8, 17, 64)
        c.update(enable_moe_block=True, num_experts=experts, top_k_experts=int(rng.integers(1, min(experts, 8) + 1)),
                 moe_intermediate_size=int(rng.integers(8, 100)))
        marks.append("experts")
    if "unified" in c["model_type"]:
        for key in ("hidden_size_per_layer_input", "vocab_size_per_layer_input", "enable_moe_block"):
            del c[key]
    if c["attention_k_eq_v"]:
        c["num_global_key_value_heads"] = any_of(rng, None, 1)
    if rng.random() < 0.7:
        c["rope_parameters"] = {
            "sliding_attention": {"rope_type": "default", "rope_theta": any_of(rng, 1e4, 1e3)},
            "full_attention": {"rope_type": "proportional", "rope_theta": any_of(rng, 1e6, 1e4),
                               "partial_rotary_factor": any_of(rng, 0.25, 0.5, 1.0)}}
    if i % 4 < 2:
        marks.append("gguf")
    if i % 4 == 2:
        marks.append("multimodal")


def phi3(rng, i, c, marks):
    width = c["hidden_size"] // c["num_attention_heads"]
    c["partial_rotary_factor"] = 0.75 if width % 16 == 0 and i % 2 else 1.0
    c.update(sliding_window=any_of(rng, *WINDOWS) if i % 3 else None, pad_token_id=0,
             original_max_position_embeddings=2048)
    if i % 3 == 2:
        to_gguf(c, marks)


def moe(rng, i, c, marks):
    c.update(head_dim=c["head_dim"], num_experts=any_of(rng, 1, 3, 8, 17, 64), norm_topk_prob=i % 3 != 1,
             moe_intermediate_size=int(rng.integers(8, 100)))
    c["num_experts_per_tok"] = int(rng.integers(1, min(c["num_experts"], 8) + 1))


def qwen3_moe(rng, i, c, marks):
    moe(rng, i, c, marks)
    if i % 4 == 1:
        c.update(use_sliding_window=True, sliding_window=any_of(rng, *WINDOWS))
    if i % 4 == 2:
        c["norm_topk_prob"] = True
        to_gguf(c, marks)
    elif i % 4 == 3:
        c.update(decoder_sparse_step=2, mlp_only_layers=[1] if rng.random() < 0.5 else [])
    else:
        c["mlp_only_layers"] = [0] if rng.random() < 0.5 else []
    if i % 3 == 0:
        marks.append("stacked")


def qwen2_moe(rng, i, c, marks):
    moe(rng, i, c, marks)
    c.pop("head_dim")
    c.update(hidden_size=c["num_attention_heads"] * 32, use_sliding_window=False,
             shared_expert_intermediate_size=int(rng.integers(8, 100)))
    if i % 2:
        marks.append("stacked")


def qwen35(rng, i, c, marks):
    n = c["num_hidden_layers"] = int(rng.integers(2, 7))
    k_heads = any_of(rng, 1, 2, 4)
    c.update(linear_num_key_heads=k_heads, linear_num_value_heads=k_heads * any_of(rng, 1, 2, 3),
             linear_key_head_dim=any_of(rng, 8, 20, 32, 64, 128), linear_value_head_dim=any_of(rng, 8, 21, 64, 128),
             linear_conv_kernel_dim=4 if i % 3 else any_of(rng, 2, 3), layer_types=None)
    while (c["head_dim"] * 0.25) % 2:
        c["head_dim"] += 8
    if i % 2:
        c["layer_types"] = ["linear_attention" if rng.random() < 0.6 else "full_attention" for _ in range(n)]
        c["layer_types"][rng.integers(n)] = "full_attention"
    else:
        c["full_attention_interval"] = int(rng.integers(2, n + 1))
    if i % 4 == 1:
        c["partial_rotary_factor"] = 0.5
    c["tie_word_embeddings"] = bool(i % 2)
    if i % 3 == 1:
        marks.append("wrapped")
    elif i % 4 == 2 or i == 8:
        to_gguf(c, marks)


def qwen35_moe(rng, i, c, marks):
    qwen35(rng, i, c, marks)
    moe(rng, i, c, marks)
    for key in ("norm_topk_prob", "intermediate_size"):
        c.pop(key)
    c["shared_expert_intermediate_size"] = int(rng.integers(8, 100))
    if i % 2:
        marks.append("stacked")


def gpt_oss(rng, i, c, marks):
    """Sinks, a window in every other layer, experts that clamp, saved as transformers has them or in MXFP4."""
    c.update(head_dim=c["head_dim"], num_local_experts=any_of(rng, 1, 3, 8, 17, 32), sliding_window=any_of(rng, *WINDOWS),
             swiglu_limit=any_of(rng, 7.0, 1.5, 0.5), attention_bias=i % 5 != 4,
             rope_scaling={"rope_type": "yarn", "factor": any_of(rng, 32.0, 4.0), "beta_fast": 32.0, "beta_slow": 1.0,
                           "truncate": False, "original_max_position_embeddings": any_of(rng, 64, 4096)},
             tie_word_embeddings=i % 6 == 5)
    c["num_experts_per_tok"] = int(rng.integers(1, min(c["num_local_experts"], 4) + 1))
    if i % 5 == 3:
        c["layer_types"] = kinds(c, lambda l: rng.random() < 0.5)
    if i % 2:
        marks.append("mxfp4")
        c.update(hidden_size=32 * int(rng.integers(1, 6)), intermediate_size=32 * int(rng.integers(1, 6)),
                 experts_per_token=c["num_experts_per_tok"], quantization_config={"quant_method": "mxfp4"})
    if i % 7 == 6:
        c.update(rope_theta=150000.0, rope_scaling=None)  # transformers' own scaling
        marks.append("no rope said")
    elif i % 4 == 2 or i == 7:
        to_gguf(c, marks)
        c.update(rope_scaling=dict(c["rope_scaling"], truncate=False), attention_bias=True, swiglu_limit=7.0,
                 tie_word_embeddings=False, layer_types=None)


def qwen3_next(rng, i, c, marks):
    qwen35(rng, i, c, marks)
    wrapped = "wrapped" in marks
    if wrapped:
        marks.remove("wrapped")
    moe(rng, i, c, marks)
    c["shared_expert_intermediate_size"] = int(rng.integers(8, 100))
    if "gguf" in marks:  # llama.cpp knows one length of heads, experts in all layers
        c["linear_value_head_dim"], c["norm_topk_prob"] = c["linear_key_head_dim"], True
    elif i % 3 == 2:
        c.update(decoder_sparse_step=2, mlp_only_layers=[1] if rng.random() < 0.5 else [])
    if i % 2:
        marks.append("stacked")


def llama4(rng, i, c, marks):
    """Scout's and Maverick's shapes, small: chunks shorter than the text, queries that grow every few tokens."""
    n = int(rng.integers(3, 9))
    c.update(num_hidden_layers=n, head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
             intermediate_size_mlp=int(rng.integers(20, 300)), num_local_experts=any_of(rng, 1, 3, 8, 16),
             num_experts_per_tok=1, interleave_moe_layer_step=any_of(rng, 1, 2), use_qk_norm=i % 3 != 1,
             attention_chunk_size=any_of(rng, 7, 16, 33, 64, 100, 128), floor_scale=any_of(rng, 5, 16, 50),
             attn_scale=any_of(rng, 0.1, 0.5), attn_temperature_tuning=any_of(rng, True, True, 4, False),
             rope_theta=5e5)
    c["rope_scaling"] = None
    if i % 2 == 0:
        c["rope_scaling"] = dict(llama3(rng), high_freq_factor=any_of(rng, 1.0, 4.0))
    if i % 4 == 1:
        c["no_rope_layers"] = [int(rng.random() < 0.6) for _ in range(n)]
    elif i % 4 == 2:
        c["no_rope_layers"] = []
    if i % 5 == 3:
        c["num_experts_per_tok"] = min(2, c["num_local_experts"])
    if i % 5 == 4:
        c["moe_layers"] = [n - 1]
    if i == 7:
        c["attention_chunk_size"] = None
    if i % 4 == 3:  # what a GGUF does not say
        c.update(attention_chunk_size=8192, floor_scale=8192, attn_scale=0.1, attn_temperature_tuning=True,
                 use_qk_norm=True)
        for key in ("no_rope_layers", "moe_layers"):
            c.pop(key, None)
        to_gguf(c, marks)
    elif i % 3 == 2:
        marks.append("multimodal")


OUTER = {"ministral3": "mistral3"}  # configs that wrap it, where the name is another one's
FAMILIES = {"llama": llama, "mistral": mistral, "ministral3": ministral3,
            "qwen2": qwen, "qwen3": qwen, "smollm3": smollm3,
            "gemma2": gemma2, "gemma3_text": gemma3, "gemma4_text": gemma4, "gemma4_unified_text": gemma4,
            "phi3": phi3, "qwen3_moe": qwen3_moe, "qwen2_moe": qwen2_moe, "qwen3_5_text": qwen35,
            "qwen3_5_moe_text": qwen35_moe, "qwen3_next": qwen3_next, "llama4_text": llama4, "gpt_oss": gpt_oss}


# ---- 3. models ----


def oracle_config(case):
    """The config of transformers that computes what config.json means to us."""
    c = copy.deepcopy(case.text)  # transformers writes into it
    if "alternating" in case.marks:  # a class of its own there
        c["model_type"] = "ministral"
        c.setdefault("head_dim", c["hidden_size"] // c["num_attention_heads"])
    if "--yarn" in case.marks:
        p = {"rope_type": "yarn", "factor": 4.0,
             "original_max_position_embeddings": c["max_position_embeddings"]}
        theta = c.pop("rope_theta", None) or c["rope_parameters"]["rope_theta"]
        c.pop("rope_scaling", None)
        c["rope_parameters"] = {"rope_theta": theta, **p}
    if "attn_temperature_tuning" in c:  # published files have 4, transformers takes true and false
        c["attn_temperature_tuning"] = bool(c["attn_temperature_tuning"])
    return transformers.AutoConfig.for_model(**c)


def make_model(case):
    """A model of transformers with random weights, exact in the type they are stored in."""
    config, rng, dim = oracle_config(case), case.rng, case.text["hidden_size"]
    stacked = case.text["model_type"].startswith("llama4")  # experts as [inputs][outputs]
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32).eval()
    stored = getattr(torch, case.text.get("dtype") or case.text["torch_dtype"])
    family = case.text["model_type"]
    gemma = family.startswith(("gemma", "qwen3_5", "qwen3_next"))  # norms are 1 + w, but for Gemma 4
    plain = family.startswith("gemma4")
    q_and_k = (case.text["num_attention_heads"] + case.text["num_key_value_heads"]) * (
        case.text.get("head_dim") or dim // case.text["num_attention_heads"])
    for name, p in model.named_parameters():
        x = rng.standard_normal(p.shape).astype(np.float32)
        if p.ndim >= 2:
            gain = 1.6 if re.search("[qk]_proj", name) else 1.0
            if plain and re.search("[qk]_proj", name):
                gain = 1.0  # norms give them their size
            if "embed_tokens_per_layer" in name:
                gain = math.sqrt(p.shape[1] / 16)
            elif re.search("embed_tokens|lm_head", name):
                gain = 1.5 if gemma and config.tie_word_embeddings else 3.0
            x *= gain / math.sqrt(p.shape[-2] if stacked and "experts." in name and p.ndim == 3 else p.shape[-1])
            if "qkv_proj" in name:
                x[:q_and_k] *= 1.6
            if "embed_tokens" in name and not config.tie_word_embeddings and not gemma:
                x *= math.sqrt(dim) / 3
        elif name.endswith("bias"):
            x *= 0.5
        elif name.endswith("A_log"):
            x = np.log(rng.uniform(0.01, 16, p.shape)).astype(np.float32)
        elif name.endswith("dt_bias"):
            x = x - 2
        else:
            one = plain or not gemma or "linear_attn.norm" in name
            x = 0.3 * x + one + 0.6 * bool(re.search("[qk]_norm", name))
            if plain and re.search("[qk]_norm", name):
                x *= 1.5 / math.sqrt(math.sqrt(len(x)))  # attention's scale is 1
        if "mlp.experts" in name:
            x = expert_values(case, name, x)
            if name.endswith("router.scale"):
                x *= math.sqrt(dim)  # which its input is divided by
        p.copy_(torch.from_numpy(x).to(stored).float())
    for name, p in model.named_buffers():
        if name.endswith("layer_scalar"):
            p.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, 1)).to(stored).float())
    return model, stored


FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32) / 2


def expert_values(case, name, x):
    """Of gpt-oss: biases that matter, and matrices that MXFP4 holds."""
    if name.endswith("_bias"):
        return x * np.float32(0.5 * math.sqrt(x.shape[-1]))
    if "mxfp4" not in case.marks:
        return x
    x = x.swapaxes(1, 2)  # the file has rows of input
    g = x.reshape(*x.shape[:2], -1, 32)
    e = np.floor(np.log2(np.abs(g).max(-1, keepdims=True))) - 2
    code = np.abs(g[..., None] / 2.0 ** e[..., None] - FP4).argmin(-1)
    case.blocks[name] = (code.astype(np.uint8), (e[..., 0] + 127).astype(np.uint8))
    return np.ascontiguousarray((FP4[code] * 2.0**e).reshape(x.shape).swapaxes(1, 2)).astype(np.float32)


def mxfp4(case, tensors):
    """The experts as openai/gpt-oss-20b has them."""
    for name, (code, e) in case.blocks.items():
        del tensors[name]
        tensors[name + "_blocks"] = torch.from_numpy(code[..., ::2] | code[..., 1::2] << 4).contiguous()
        tensors[name + "_scales"] = torch.from_numpy(e).contiguous()


def make_directory(case, model, stored, path):
    """A directory as on the Hub; in every third one the weights are in two files."""
    os.makedirs(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(TOKENIZER, name), path)
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(case.config, f, indent=1)
    tensors = {n: p.detach().to(stored).contiguous() for n, p in model.named_parameters()}
    tensors.update({n: p.to(stored) for n, p in model.named_buffers() if n.endswith("layer_scalar")})
    mxfp4(case, tensors)
    if "stacked" not in case.marks and case.text["model_type"] != "gpt_oss":
        tensors = one_by_one(tensors)
    if "wrapped" in case.marks:
        tensors = {n.replace("model.", "model.language_model.", 1): t for n, t in tensors.items()}
        tensors.update({"model.visual.x.weight": torch.zeros(4, 4), "mtp.fc.weight": torch.zeros(4, 4)})
    if "multimodal" in case.marks:
        head = tensors.pop("lm_head.weight", None)
        old = case.rng.random() < 0.5
        prefix = "language_model.model." if old else "model.language_model."
        tensors = {n.replace("model.", prefix, 1): t for n, t in tensors.items()}
        tower = "vision_tower.x.weight" if old else "model.vision_tower.x.weight"
        tensors[tower] = torch.zeros(4, 4)
        if head is not None:
            tensors["language_model.lm_head.weight" if old else "lm_head.weight"] = head
    elif model.config.tie_word_embeddings and case.rng.random() < 0.3:
        embed = next(n for n in tensors if n.endswith("embed_tokens.weight"))
        tensors["lm_head.weight"] = tensors[embed].clone()
    if case.rng.random() < 0.3:
        save_shards(tensors, path)
    else:
        save_file(tensors, os.path.join(path, "model.safetensors"), {"format": "pt"})


def one_by_one(tensors):
    """Experts as published files have them, not as transformers 5 has them in memory."""
    out = {}
    for name, t in tensors.items():
        at, kind = name.rsplit(".", 1)
        for e in range(len(t) if "mlp.experts." in name else 0):
            parts = zip(("gate_proj", "up_proj"), t[e].chunk(2)) if kind == "gate_up_proj" else [("down_proj", t[e])]
            out.update({f"{at}.{e}.{part}.weight": x.contiguous() for part, x in parts})
        if "mlp.experts." not in name:
            out[name] = t
    return out


def save_shards(tensors, path):
    where = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(tensors)}
    for shard in set(where.values()):
        part = {n: t for n, t in tensors.items() if where[n] == shard}
        save_file(part, os.path.join(path, shard), {"format": "pt"})
    with open(os.path.join(path, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {}, "weight_map": where}, f)


# ---- 4. GGUF ----

ARCHS = {"ministral3": "mistral3", "llama4_text": "llama4", "qwen3_next": "qwen3next", "gemma3_text": "gemma3",
         "qwen3_moe": "qwen3moe", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe",
         "gpt_oss": "gpt-oss"}
PERMUTED = ("llama", "smollm3", "ministral3")  # llama.cpp rotates neighbours in these, so q and k are interleaved


def make_gguf(case, model, path):
    c, family = model.config, case.text["model_type"]
    if family.startswith("gemma4"):
        tensors = {n: p for n, p in [*model.named_parameters(), *model.named_buffers()]
                   if "inv_freq" not in n and "embed_scale" not in n}
        return gemma4_gguf.write(path, case.text, {n: p.numpy() for n, p in tensors.items()}, add_vocabulary)
    arch = ARCHS.get(family, family)
    w = gguf.GGUFWriter(path, arch)
    heads, kv_heads, dim = c.num_attention_heads, c.num_key_value_heads, c.hidden_size
    head_dim = getattr(c, "head_dim", None) or dim // heads
    p = c.rope_parameters
    p = p.get("full_attention", p)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(dim)
    if hasattr(c, "intermediate_size") and arch != "llama4":
        w.add_feed_forward_length(c.intermediate_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(p["rope_theta"])
    w.add_rope_dimension_count(int(head_dim * p.get("partial_rotary_factor", 1.0)))
    if family in ("gemma2", "gemma3_text", "phi3", "gpt_oss") and c.sliding_window:
        w.add_sliding_window(c.sliding_window)
    if family == "gemma2":
        w.add_attn_logit_softcapping(c.attn_logit_softcapping or 0.0)
        w.add_final_logit_softcapping(c.final_logit_softcapping or 0.0)
    if family == "gemma3_text":
        w.add_rope_freq_base_swa(c.rope_parameters["sliding_attention"]["rope_theta"])
        w.add_sliding_window_pattern([kind == "sliding_attention" for kind in c.layer_types])
    if arch.startswith(("qwen35", "qwen3next")):
        add_delta(w, c, case.text)
    if arch == "llama4":
        w.add_feed_forward_length(c.intermediate_size_mlp)
        w.add_expert_feed_forward_length(c.intermediate_size)
        w.add_interleave_moe_layer_step(c.interleave_moe_layer_step)
        w.add_expert_count(c.num_local_experts)
        w.add_expert_used_count(c.num_experts_per_tok)
    if arch in ("qwen3moe", "qwen35moe", "qwen3next"):
        w.add_expert_count(case.text["num_experts"])
        w.add_expert_used_count(c.num_experts_per_tok)
        w.add_expert_feed_forward_length(c.moe_intermediate_size)
    if arch == "gpt-oss":
        w.add_expert_count(c.num_local_experts)
        w.add_expert_used_count(c.num_experts_per_tok)
        w.add_expert_feed_forward_length(c.intermediate_size)
    add_scaling(w, p, head_dim)
    add_vocabulary(w)
    names = gguf.get_tensor_name_map(gguf_arch(arch), c.num_hidden_layers)
    for name, tensor in model.named_parameters():
        x = tensor.detach().numpy()
        one = family.startswith(("gemma", "qwen3_5", "qwen3_next"))  # norms are 1 + w
        if one and name.endswith("norm.weight") and "linear_attn" not in name:
            x = x + np.float32(1)
        if "linear_attn" in name:
            name, x = (tiled if arch.startswith("qwen35") else apart)(c, name, x)
        if family in PERMUTED and re.search(r"[qk]_proj\.weight", name):
            n = heads if "q_proj" in name else kv_heads
            x = x.reshape(n, 2, len(x) // n // 2, -1).swapaxes(1, 2).reshape(x.shape)
        if "mlp.experts" in name and arch == "gpt-oss":
            gpt_oss_experts(w, names, case, name, x)
            continue
        for name, x in gguf_parts(c, name.replace("self_attn.sinks", "self_attn.sinks.weight"), x):
            name = name if name.startswith("blk.") else names.get_name(name, (".weight", ".bias"))
            w.add_tensor(name, np.ascontiguousarray(x))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def add_delta(w, c, text):
    w.add_ssm_conv_kernel(c.linear_conv_kernel_dim)
    w.add_ssm_state_size(c.linear_key_head_dim)
    w.add_ssm_group_count(c.linear_num_key_heads)
    w.add_ssm_time_step_rank(c.linear_num_value_heads)
    w.add_ssm_inner_size(c.linear_value_head_dim * c.linear_num_value_heads)
    w.add_full_attention_interval(text["full_attention_interval"])
    w.add_rope_dimension_sections([11, 11, 10, 0])
    if "shared_expert_intermediate_size" in text:
        w.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)


def tiled(c, name, x):
    """A delta net's tensor as convert_hf_to_gguf.py writes it: value heads of one key head stand apart."""
    keys, d = c.linear_num_key_heads, c.linear_value_head_dim
    each, qk = c.linear_num_value_heads // keys, 2 * keys * c.linear_key_head_dim

    def heads(rows, size):
        return rows.reshape(keys, each, size, -1).swapaxes(0, 1).reshape(rows.shape)

    if name.endswith("A_log"):
        x = -np.exp(x)
    if "conv1d" in name:
        x = x[:, 0]
    if re.search("in_proj_qkv|conv1d", name):
        x = np.concatenate([x[:qk], heads(x[qk:], d)])
    elif "in_proj_z" in name:
        x = heads(x, d)
    elif "out_proj" in name:
        x = heads(np.ascontiguousarray(x.T), d).T
    elif re.search("in_proj_[ab]|A_log|dt_bias", name):
        x = heads(x, 1)
    return name.replace("dt_bias", "dt_proj.bias"), x


def apart(c, name, x):
    """A delta net's tensor of Qwen3-Next: [q, k, v, z] of each key head stand apart."""
    if name.endswith("A_log"):
        x = -np.exp(x)
    if "conv1d" in name:
        x = x[:, 0]
    return name.replace("dt_bias", "dt_proj.bias"), x


def gguf_parts(c, name, x):
    """Stacks of experts under the names that convert_hf_to_gguf.py gives them."""
    if "in_proj_qkvz" in name:
        at = f"blk.{name.split('.')[2]}."
        k, v = c.linear_key_head_dim, c.linear_value_head_dim * c.linear_num_value_heads // c.linear_num_key_heads
        cuts = np.split(x.reshape(c.linear_num_key_heads, -1, x.shape[1]), [k, 2 * k, 2 * k + v], axis=1)
        q, k, v, z = (p.reshape(-1, x.shape[1]) for p in cuts)
        return [(at + "attn_qkv.weight", np.concatenate([q, k, v])), (at + "attn_gate.weight", z)]
    if c.model_type == "llama4_text" and "experts." in name and x.ndim == 3:
        x = x.swapaxes(1, 2)
    if name.endswith("experts.gate_up_proj"):
        gate, up = np.split(x, 2, axis=1)
        at = name.replace("gate_up_proj", "%s.weight")
        return [(at % "gate_proj", gate), (at % "up_proj", up)]
    return [(name + ".weight" if name.endswith("experts.down_proj") else name, x)]


def gpt_oss_experts(w, names, case, name, x):
    """As convert_hf_to_gguf.py writes them: gate and up apart, rows of input, MXFP4 where it was."""
    at, kind = name.rsplit(".", 1)
    parts = ("gate_proj", "up_proj") if "gate_up" in kind else ("down_proj",)
    for i, part in enumerate(parts):
        if kind.endswith("_bias"):
            w.add_tensor(names.get_name(f"{at}.{part}.bias", (".weight", ".bias")),
                         np.ascontiguousarray(x[:, i :: len(parts)]))
            continue
        ours = names.get_name(f"{at}.{part}.weight", (".weight", ".bias"))
        if name not in case.blocks:
            w.add_tensor(ours, np.ascontiguousarray(x.swapaxes(1, 2)[:, i :: len(parts)]))
            continue
        code, e = (y[:, i :: len(parts)] for y in case.blocks[name])
        raw = np.concatenate([e[..., None], code[..., :16] | code[..., 16:] << 4], -1)
        w.add_tensor(ours, np.ascontiguousarray(raw.reshape(*raw.shape[:2], -1)),
                     raw_dtype=gguf.GGMLQuantizationType.MXFP4)


def gguf_arch(name):
    return next(a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == name)


def add_scaling(w, p, head_dim):
    kind = p["rope_type"]
    if kind == "llama3":
        w.add_tensor("rope_freqs.weight", llama3_factors(p, head_dim))
    elif kind != "default":
        w.add_rope_scaling_type(gguf.RopeScalingType(kind))
        w.add_rope_scaling_factor(p["factor"])
        if kind == "yarn":
            w.add_rope_scaling_orig_ctx_len(p["original_max_position_embeddings"])
        if "llama_4_scaling_beta" in p:
            w.add_rope_scaling_yarn_log_mul(p["mscale_all_dim"])
            w.add_attn_temperature_scale(p["llama_4_scaling_beta"])


def llama3_factors(p, dim):
    """What each frequency is divided by, as convert_hf_to_gguf.py works it out."""
    out, length = [], p["original_max_position_embeddings"]
    for j in range(0, dim, 2):
        wave = 2 * math.pi * p["rope_theta"] ** (j / dim)
        if wave < length / p["high_freq_factor"]:
            out.append(1.0)
        elif wave > length / p["low_freq_factor"]:
            out.append(p["factor"])
        else:
            low, high = p["low_freq_factor"], p["high_freq_factor"]
            smooth = (length / wave - low) / (high - low)
            out.append(1 / ((1 - smooth) / p["factor"] + smooth))
    return np.array(out, np.float32)


def add_vocabulary(w):
    with open(os.path.join(TOKENIZER, "tokenizer.json"), encoding="utf-8") as f:
        spec = json.load(f)
    special = {t["id"]: t["content"] for t in spec["added_tokens"]}
    texts = {i: t for t, i in spec["model"]["vocab"].items()} | special
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list([texts[i] for i in sorted(texts)])
    w.add_token_types([3 if i in special else 1 for i in sorted(texts)])
    merges = spec["model"]["merges"]
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])


# ---- 5. comparing ----


def command(*args):
    done = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        what = done.stdout.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"{os.path.basename(args[0])} failed: {' '.join(what)}")


def compare(case, folder, isa):
    """-> largest difference, largest logit, what to say of it ("": nothing)."""
    model, stored = make_model(case)
    source, kvz, out = (os.path.join(folder, case.name + x) for x in ("", ".kvz", ".logits"))
    make_directory(case, model, stored, source)
    if "gguf" in case.marks:
        source += ".gguf"
        make_gguf(case, model, source)
    ids = case.rng.integers(0, case.text["vocab_size"], case.n)
    theirs = model(torch.tensor(ids)[None]).logits[0].numpy()
    with open(out + ".ids", "w") as f:
        f.write(" ".join(map(str, ids)))
    more = ["--yarn", "4"] if "--yarn" in case.marks else []
    command(sys.executable, EXPORT, source, "-o", kvz, "--type", "f32", *more)
    command(RUN, "logits", kvz, "--ids", out + ".ids", "--kv", "f32", "-j", "1", "-q", "-o", out,
            *(["--isa", isa] if isa else []))
    ours = load_file(out)["logits"]
    if ours.shape != theirs.shape:
        raise RuntimeError(f"logits {ours.shape}, expected {theirs.shape}")
    size = float(np.abs(theirs).max())
    far = float(np.abs(ours - theirs).max() / size)
    if far < LIMIT:
        return far, size, ""
    exact = model.double()(torch.tensor(ids)[None]).logits[0].numpy()
    mine, noise = (float(np.abs(x - exact).max() / size) for x in (ours, theirs))
    return far, size, f"  to float64: {mine:.1e}, theirs {noise:.1e}{'' if mine <= 4 * noise else '  FAILED'}"


def describe(case):
    c = case.text
    heads = c["num_attention_heads"]
    width = c.get("head_dim") or c["hidden_size"] // heads
    windowed = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    return (f"{case.name:15} {c['num_hidden_layers']} layers {heads:2}/{c['num_key_value_heads']} heads of {width:3}, "
            f"dim {c['hidden_size']:4} mlp {c.get('intermediate_size', 0):3}, window {windowed or '-':>3}, "
            f"{'tied' if c['tie_word_embeddings'] else 'free'}, {case.n:3} tokens  {' '.join(case.marks):28}")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", metavar="NAME", help="cases whose name begins so: gemma2, llama-03")
    p.add_argument("--per-family", type=int, default=8, metavar="N")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--isa", help="scalar, avx2, avx2vnni, avx512, avx512bf16, amx or neon")
    p.add_argument("--keep", metavar="DIR", help="keep the models here")
    args = p.parse_args()
    worst, failed, n, began = {}, 0, 0, time.time()
    for family in FAMILIES:
        for i in range(args.per_family):
            if args.only and not f"{family}-{i:02d}".startswith(args.only):
                continue
            case, n = draw(family, i, args.seed), n + 1
            with tempfile.TemporaryDirectory() as folder:
                try:
                    far, size, note = compare(case, args.keep or folder, args.isa)
                    worst[family] = max(far, worst.get(family, 0.0))
                    failed += note.endswith("FAILED")
                    print(f"{describe(case)} {far:.1e} of {size:.1f}{note}", flush=True)
                except RuntimeError as e:
                    failed += 1
                    print(f"{describe(case)} FAILED: {e}", flush=True)
    print(f"\n{n} models, {failed} failed, {time.time() - began:.0f} s; largest difference by family:")
    for family, far in worst.items():
        print(f"  {family:12} {far:.1e}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
