#!/usr/bin/env python3
"""What a context of any length costs when it is evicted while it is read: memory and time per token.

    bench/stream.py models/smollm2.kvz --profile models/smollm2.kvp -o stream.svg

Contexts of 12,500 to 100,000 tokens (eval/make_tasks.py facts) are read with --budget; prints a table and, with -o, draws it:
one self-contained SVG, the full cache's bytes beside what was held.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

from newfile import new_file

HERE = os.path.dirname(os.path.abspath(__file__))
RUN = os.path.join(HERE, "..", "run")


def context(tokens, path):
    """A text of about so many tokens."""
    task = subprocess.run([sys.executable, os.path.join(HERE, "..", "eval", "make_tasks.py"), "facts", "-n", "1",
                           "--tokens", str(tokens)], stdout=subprocess.PIPE, check=True).stdout
    with open(path, "w") as f:
        f.write(json.loads(task)["context"])


def measure(a, tokens, folder):
    text, cache = os.path.join(folder, "text"), os.path.join(folder, "cache")
    context(tokens, text)
    args = [RUN, "compress", a.model, "-f", text, "-o", cache, "--budget", str(a.budget), "--json", "-q"]
    args += ["--profile", a.profile] if a.profile else []
    p = subprocess.Popen(args, stdout=subprocess.PIPE)
    row = json.loads(p.stdout.read())
    _, status, usage = os.wait4(p.pid, 0)
    if status != 0:
        sys.exit("compress failed")
    row["max_rss"] = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    row["ms_per_token"] = 1000 * row["prefill_s"] / (row["n_prefix"] + row["n_ctx"])
    return row


def panel(rows, left, title, lines):
    """One panel of the chart; lines: (name, colour, values)."""
    width, height, top = 260, 180, 40
    most = max(max(v) for _, _, v in lines) * 1.1
    x = lambda r: left + width * r["n_ctx"] / rows[-1]["n_ctx"]
    y = lambda v: top + height * (1 - v / most)
    out = [f'<text x="{left}" y="24" font-weight="bold">{title}</text>',
           f'<path d="M{left} {top}v{height}h{width}" fill="none" stroke="#888"/>']
    for i in range(5):
        v = most * i / 4.4
        out.append(f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.3g}</text>')
    for r in rows:
        out.append(f'<text x="{x(r):.1f}" y="{top + height + 16}" text-anchor="middle">{r["n_ctx"] / 1000:.0f}K</text>')
    for k, (name, colour, values) in enumerate(lines):
        points = " ".join(f"{x(r):.1f},{y(v):.1f}" for r, v in zip(rows, values))
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out.append(f'<text x="{left + 10}" y="{top + 14 + 16 * k}" fill="{colour}">{name}</text>')
    return out


def chart(rows, out):
    mb = lambda key: [r[key] / 1e6 for r in rows]
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" width="720" height="260" font-family="sans-serif" font-size="11">',
             '<rect width="720" height="260" fill="white"/>']
    parts += panel(rows, 60, "cache, MB at most, by tokens read", [("all pairs, kept", "#d55e00", mb("full_bytes")),
                                                                    ("evicted while reading", "#0072b2", mb("peak_bytes"))])
    parts += panel(rows, 420, "milliseconds per token", [("", "#0072b2", [r["ms_per_token"] for r in rows])])
    with out:
        out.write("\n".join(parts + ["</svg>", ""]))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--profile")
    p.add_argument("--tokens", default="12500,25000,50000,75000,100000")
    p.add_argument("--budget", type=int, default=2000)
    p.add_argument("-o", type=new_file, help="new file: the chart")
    a = p.parse_args()
    print(f"{'tokens':>8}{'seconds':>9}{'ms/token':>10}{'cache, MB':>11}{'at most':>9}{'full':>9}{'process, MB':>13}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in map(int, a.tokens.split(",")):
            r = measure(a, tokens, folder)
            rows.append(r)
            print(f"{r['n_ctx']:>8}{r['prefill_s']:>9.1f}{r['ms_per_token']:>10.3f}{r['bytes'] / 1e6:>11.1f}"
                  f"{r['peak_bytes'] / 1e6:>9.1f}{r['full_bytes'] / 1e6:>9.1f}{r['max_rss'] / 1e6:>13.1f}", flush=True)
    if a.o:
        chart(rows, a.o)


if __name__ == "__main__":
    main()
