"""example_scores.py: which pairs of a text matter, and which stay: by head, over the text, and word by word.

    python example_scores.py smollm2.kvz town.txt [RATIO [OUT.png]]

Needs matplotlib. Each part can be pasted into a cell of a notebook.
"""
import sys

import matplotlib
import numpy as np

import kvzip

path, source = sys.argv[1:3]
ratio = float(sys.argv[3]) if len(sys.argv) > 3 else 0.3
out = sys.argv[4] if len(sys.argv) > 4 else "scores.png"
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# ---- read, score, evict ----

model = kvzip.Model(path)
with open(source, encoding="utf-8") as f:
    cache = model.compress(f.read(), ratio=ratio, policy="kvzip", scores=True)
scores, kept = cache.scores, cache.kept  # [n_scored, n_kv_heads, n_ctx]; attention weights, and bool
print(f"{cache.n_kept} of {cache.n_pairs} pairs stay: {cache.full_bytes / 1e6:.1f} MB become {cache.bytes / 1e6:.1f} MB")

# ---- the heads ----

heads = scores.shape[0] * scores.shape[1]
figure, axes = plt.subplots(3, 1, figsize=(11, 10), height_ratios=[3, 3, 2], constrained_layout=True)
shown = np.log10(np.maximum(scores, 1e-4)).reshape(heads, -1)
image = axes[0].imshow(shown, aspect="auto", interpolation="nearest", cmap="viridis")
figure.colorbar(image, ax=axes[0], label="largest attention, log10")
axes[0].set(title="scores", ylabel="head, layer by layer")
axes[1].imshow(kept.reshape(heads, -1), aspect="auto", interpolation="nearest", cmap="Greys")
axes[1].set(title=f"kept at {ratio:g}: black stays", ylabel="head, layer by layer")

# ---- the text ----

share = kept.mean(axis=(0, 1))  # of the heads that keep a token
axes[2].fill_between(np.arange(cache.n_ctx), share, step="mid", linewidth=0)
axes[2].set(xlim=(0, cache.n_ctx), ylim=(0, 1), xlabel="token", ylabel="share of heads that keep it")
figure.savefig(out, dpi=110)

# ---- the words that most and fewest heads keep ----

words = [model.detokenize([i]) for i in cache.ids[cache.n_prefix:]]
order = np.argsort(share)
print("most kept:  ", " ".join(repr(words[i]) for i in order[::-1][:12]))
print("least kept: ", " ".join(repr(words[i]) for i in order[:12]))
print("saved as", out)
