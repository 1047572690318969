#!/usr/bin/env python3
"""fuzz_export.py: damaged models. Each is converted, and then ./run reads it, or refused in one line.

    fuzz_export.py [RUNS] [SEED]

Fields of the JSON files get values of other kinds, or go; bytes of headers and of GGUF files change.
A run is the next number of the seed, so that `fuzz_export.py 1 N` shows run N again.
"""

import copy
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile

import test_export as t

HOSTILE = [None, True, False, 0, 1, -1, 2, 3, 1.5, 1e-40, 1e400, -1e400, float("nan"), 10**400, 1 << 31,
           1 << 63, 4294967295, "", "x", "0", "\x1b[31m\n\u202e\ud800", [], [None], [[]], [1], ["x"],
           {}, {"a": 1}, {"x": {"y": []}}]
RUN = os.path.join(os.path.dirname(t.TESTS), "run")


def places(value, at=()):
    """Paths of all values in a JSON tree, long lists and vocabularies by their first few."""
    yield at
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys)[:40]:
        yield from places(value[key], (*at, key))


def mutated(value, r):
    """A copy in which one or two values are others, are gone, or stand where others stood."""
    value = copy.deepcopy(value)
    for _ in range(r.choice((1, 1, 2))):
        at = r.choice(list(places(value))[1:] or [()])
        if not at:
            return r.choice(HOSTILE)
        parent = value
        for key in at[:-1]:
            parent = parent[key]
        kind = r.random()
        if kind < 0.15:
            del parent[at[-1]]
        elif kind < 0.25:
            parent[at[-1]] = [parent[at[-1]]]
        elif kind < 0.3 and isinstance(parent, dict):
            parent[r.choice(EXTRA)] = r.choice(HOSTILE)
        else:
            parent[at[-1]] = copy.deepcopy(r.choice(HOSTILE))
    return value


EXTRA = sorted(t.export.KEYS) + ["quantization_config", "layer_types", "chat_template", "bos_token_id",
                                 "eos_token_id", "added_tokens_decoder", "is_causal", "architectures"]


def damaged(data, r, head):
    """Bytes with a few changes, most of them in the first `head`."""
    data = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 4))):
        at = r.randrange(min(head, len(data)) if r.random() < 0.9 else len(data))
        kind = r.random()
        if kind < 0.4:
            data[at] = r.randrange(256)
        elif kind < 0.6:
            data[at] ^= 1 << r.randrange(8)
        elif kind < 0.8:
            data[at : at + 8] = struct.pack("<Q", r.choice((0, 1, 2, 255, 1 << 31, 1 << 32, 1 << 63, 2**64 - 1)))
        elif kind < 0.9:
            del data[at : at + r.choice((1, 4, 8))]
        else:
            del data[at:]
        if not data:
            break
    return bytes(data)


class Fuzz(t.TestGGUF):
    """Seeds and what is to hold; TestGGUF has the writer of GGUF files."""

    def runTest(self):
        pass

    def seeds(self):
        """A plain model, one in shards, one with Gemma's keys, one with a rope of its own, layers of kinds of
        their own; GGUFs."""
        self.folders = []
        for name in ("smol", "gemma3", "llama", "mistral", "gptoss", "llama4", "qwen3next", "ministral"):
            path = self.copy(name, generation=t.DROP)
            for file, value in (("generation_config.json", {"bos_token_id": 1, "eos_token_id": [1, 2]}),
                                ("special_tokens_map.json", {"bos_token": {"content": "<s>"}})):
                with open(os.path.join(path, file), "w") as f:
                    json.dump(value, f)
            self.folders.append(path)
        single = os.path.join(self.folders[2], "model.safetensors")
        names = list(t.read_source(self.folders[2]))
        os.rename(single, os.path.join(self.folders[2], "part.safetensors"))
        with open(os.path.join(self.folders[2], "model.safetensors.index.json"), "w") as f:
            json.dump({"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")}, f)
        self.ggufs = [self.gguf("smol", "llama"), self.gguf("gemma3", "gemma3"),
                      self.gguf("qwen2", "qwen2", "Q4_0")]

    def damage(self, r):
        """-> the path of a damaged model, and what was done to it."""
        if r.random() < 0.4:
            source = r.choice(self.ggufs)
            path = os.path.join(self.dir, "damaged.gguf")
            with open(source, "rb") as f, open(path, "wb") as g:
                g.write(damaged(f.read(), r, 1500 if r.random() < 0.6 else 100000))
            return path, source
        source, path = r.choice(self.folders), os.path.join(self.dir, "damaged")
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(source, path)
        file = r.choice([n for n in sorted(os.listdir(path)) if n.endswith((".json", ".safetensors"))
                         and n not in ("expected.safetensors", "cases.json")] + ["config.json"] * 4)
        whole = os.path.join(path, file)
        with open(whole, "rb") as f:
            data = f.read()
        if file.endswith(".safetensors"):
            n = struct.unpack("<Q", data[:8])[0]
            text = json.dumps(mutated(json.loads(data[8 : 8 + n]), r)).encode("utf-8", "replace")
            changed = struct.pack("<Q", len(text)) + text + data[8 + n :]
            data = changed if r.random() < 0.7 else damaged(data, r, n)
        elif r.random() < 0.8:
            data = json.dumps(mutated(json.loads(data), r)).encode("utf-8", "replace")
        else:
            data = damaged(data, r, 2000)
        with open(whole, "wb") as f:
            f.write(data)
        return path, f"{os.path.basename(source)}/{file}"

    def check(self, path):
        """Exit 0 and a file that ./run reads, or exit 1, one line and no file."""
        status, said = t.run(path, "-o", self.out)
        lines = [s for s in said.split("\n") if s and not s.startswith("export.py: warning: ")]
        assert all(c.isprintable() for c in said.replace("\n", "")), repr(said)
        if status == 0:
            assert lines == [], said
            if os.path.exists(RUN):
                p = subprocess.run([RUN, "info", self.out], capture_output=True, text=True, errors="replace")
                assert p.returncode == 0, p.stderr
            os.unlink(self.out)
        else:
            assert status == 1 and len(lines) == 1 and lines[0].startswith("export.py: "), said
        assert not [n for n in os.listdir(self.dir) if "out.kvz" in n]
        return said

    def fuzz(self, runs, seed):
        self.seeds()
        for n in range(seed, seed + runs):
            path, what = self.damage(random.Random(n))
            try:
                said = self.check(path)
            except BaseException:
                print(f"fuzz_export: run {n} ({what}): finding", file=sys.stderr)
                raise
            if runs == 1:
                print(what, said)


def main():
    runs, seed = (int(a) for a in (sys.argv[1:] + ["1000", "0"][len(sys.argv) - 1 :])[:2])
    fuzz = Fuzz()
    fuzz.setUp()
    try:
        fuzz.fuzz(runs, seed)
    finally:
        shutil.rmtree(fuzz.dir)
    print(f"fuzz_export: {runs} runs from {seed}, no finding")


if __name__ == "__main__":
    main()
