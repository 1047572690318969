#!/usr/bin/env python3
"""test_tutorial.py: the six programs of docs/tutorial, and the text that goes with them.

`make tutorial` builds and runs them without a warning; so do clang, the sanitizers and, under qemu, the
ARM compiler, where they are installed. What README.md quotes stands in the program of its section, what
it prints is what the program prints, and what it names is where it says. Last, every program is built
once more with a line spoilt, and has to fail. The last line says how many checks passed and failed.
"""
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile

from checks import check, end

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HERE = os.path.join(ROOT, "docs", "tutorial")
PROGRAMS = sorted(f[:-2] for f in os.listdir(HERE) if f.endswith(".c"))
CC = os.environ.get("CC", "cc").split()
FLAGS = ["-std=c11", "-Wall", "-Wextra", "-Wshadow", "-Werror"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

# Of a program: a line, or a part of one, and what it becomes.
SPOILT = [
    ("1_naive", "expf(weight[t] - max)", "expf(weight[t])"),
    ("1_naive", "weight[t] /= sum;", ""),
    ("2_online", "a->sum *= shrink;", ""),
    ("2_online", "max == -INFINITY ? 0.0f : max", "max"),
    ("2_online", "raise_max(&b, max);", ""),
    ("3_grouped", "(g + 1) * GROUP; h++", "(g + 1) * GROUP; h += 2"),
    ("3_grouped", "a->o[i] *= shrink;", ";"),
    ("4_paged", "pool[*last].refs > 1", "pool[*last].refs > 2"),
    ("4_paged", "s[c] = -INFINITY;", ";"),
    ("4_paged", "pool[h->page[i]].refs--;", ";"),
    ("5_vector", "b[i * COLS + col]", "b[col * COLS + i]"),
    ("5_vector", "_mm256_loadu_ps(b + i * COLS + col)", "_mm256_loadu_ps(b + i * COLS)"),
    ("6_kvzip", "s[c] - lse[r]", "s[c]"),
    ("6_kvzip", "return max + logf(sum);", "return max;"),
    ("6_kvzip", "i < n_keep", "i >= ALL - n_keep"),
    ("6_kvzip", "to->k[i][n % PAGE] = from->k[i][t % PAGE]", "to->k[i][n % PAGE] = from->k[i][n % PAGE]"),
    ("6_kvzip", "    cut(h, n);", "    cut(h, h->len);"),
]


def text_of(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as f:
        return f.read()


def call(command, **options):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def build(source, out, cc, flags):
    return call(cc + FLAGS + flags + ["-I", HERE, "-o", out, source, "-lm"])


def timeless(output):
    return re.sub(r"[\d.]+ (ms|GB/s|times)", r"T \1", output)


def comparable(output):
    """Without times, and without how far a result is off: compilers may round otherwise."""
    return re.sub(r"\d\.\de[-+]\d+", "E", timeless(output))


# ---- the programs ----

def check_native(tmp):
    """The output of each program, as `make tutorial` built it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    made = call(["make", "-C", ROOT, "-s", "werror=1", "BUILD=" + tmp, "tutorial"], env=env)
    check(made.returncode == 0, "make tutorial:\n" + made.stdout)
    printed = {}
    for name in PROGRAMS:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        run = call([os.path.join(tmp, "tutorial", name)])
        took = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        printed[name] = run.stdout
        check(run.returncode == 0, f"{name}: status {run.returncode}\n{run.stdout}")
        check("differs from the definition by" in run.stdout, f"{name}: compares with the definition")
        check(took < 2.0, f"{name}: takes {took:.1f} s")
        check(timeless(run.stdout) in timeless(made.stdout), f"{name}: make tutorial shows the same figures")
    return printed


def check_variant(tmp, what, cc, flags, printed, wrap=()):
    """Another compiler, or other flags, and the same figures; the instruction sets may differ."""
    for name in PROGRAMS:
        out = os.path.join(tmp, "variant")
        built = build(os.path.join(HERE, name + ".c"), out, cc, flags)
        check(built.returncode == 0, f"{name}, {what}: does not build\n{built.stdout}")
        run = call(list(wrap) + [out]) if built.returncode == 0 else built
        check(run.returncode == 0, f"{name}, {what}: status {run.returncode}\n{run.stdout}")
        same = comparable(run.stdout) == comparable(printed[name])
        check(same or "AVX2" in run.stdout + printed[name], f"{name}, {what}: prints\n{run.stdout}")


def check_variants(tmp, printed):
    probe = os.path.join(tmp, "probe.c")
    with open(probe, "w") as f:
        f.write("int main(void) { return 0; }\n")
    variants = [("sanitizers", CC, SANITIZE, ())]
    if shutil.which("clang"):
        variants.append(("clang", ["clang"], ["-O2"], ()))
    if shutil.which("aarch64-linux-gnu-gcc") and shutil.which("qemu-aarch64"):
        variants.append(("AArch64", ["aarch64-linux-gnu-gcc"], ["-O2", "-static"], ["qemu-aarch64"]))
    for what, cc, flags, wrap in variants:
        if build(probe, os.path.join(tmp, "probe"), cc, flags).returncode == 0:
            check_variant(tmp, what, cc, flags, printed, wrap)
        else:
            print(f"test_tutorial: {what} left out, not installed")


def check_spoilt(tmp, printed):
    """A program that is wrong says so: without this, none of the checks above would mean anything."""
    for name, old, new in SPOILT:
        source = text_of("docs", "tutorial", name + ".c")
        check(old in source, f"{name}: has no {old}")
        if old.startswith("_mm") and "AVX2 is" not in printed[name]:
            continue
        path, out = os.path.join(tmp, "spoilt.c"), os.path.join(tmp, "spoilt")
        with open(path, "w", encoding="utf-8") as f:
            f.write(source.replace(old, new))
        built = build(path, out, CC, ["-O1", "-Wno-error"])
        check(built.returncode == 0, f"{name} with {new}: does not build\n{built.stdout}")
        run = call([out])
        check(run.returncode == 1 and "FAILED" in run.stdout, f"{name} with {new}: status {run.returncode}")
    check({s[0] for s in SPOILT} == set(PROGRAMS), "every program is spoilt once")


# ---- the text ----

def sections(readme):
    """Program and text of each section that has a program."""
    for part in re.split(r"^## ", readme, flags=re.M)[1:]:
        title = re.match(r"\d\. .*\[(\w+)\.c\]", part)
        if title:
            yield title.group(1), part


def check_text(readme, printed):
    seen = []
    for name, part in sections(readme):
        source = text_of("docs", "tutorial", name + ".c")
        seen.append(name)
        quotes = re.findall(r"^```c\n(.*?)^```$", part, flags=re.M | re.S)
        check(quotes, f"{name}: its section quotes it")
        for quote in quotes:
            check(quote in source, f"{name}: has no\n{quote}")
        outputs = re.findall(r"^```text\n(.*?)^```$", part, flags=re.M | re.S)
        check(len(outputs) == 1, f"{name}: its section shows what it prints")
        same = outputs and comparable(outputs[0]) == comparable(printed[name])
        check(same or "no AVX2" in printed[name], f"{name}: prints\n{printed[name]}")
    check(seen == PROGRAMS, "one section for each program, in order")


def check_names(readme):
    """Links lead to files, and what "In the project" names stands in the file that is linked next."""
    for link in re.findall(r"\]\(([^):]+)\)", readme):
        check(os.path.exists(os.path.join(HERE, link)), f"README.md: there is no {link}")
    for paragraph in re.findall(r"^In the project: .*?\n\n", readme, flags=re.M | re.S):
        names = []
        for name, link in re.findall(r"`(\w+)`|\]\(([^)]+)\)", paragraph):
            if name:
                names.append(name)
                continue
            path = os.path.join(HERE, link)
            text = text_of(path) if os.path.exists(path) else ""
            for n in names:
                check(re.search(r"\b%s\b" % n, text), f"README.md: {link} has no {n}")
            names = []


def main():
    readme = text_of("docs", "tutorial", "README.md")
    with tempfile.TemporaryDirectory() as tmp:
        printed = check_native(tmp)
        check_variants(tmp, printed)
        check_spoilt(tmp, printed)
    check_text(readme, printed)
    check_names(readme)
    return end("test_tutorial")


if __name__ == "__main__":
    sys.exit(main())
