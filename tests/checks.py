"""checks.py: what the Python tests count by, as test.h is for those in C, and how they read our files."""
import array
import json
import struct
import sys
import unittest

KINDS = {"F32": "f", "I32": "i", "U8": "B", "F16": "H"}

passed = failed = 0


def check(ok, what):
    global passed, failed
    if ok:
        passed += 1
    else:
        failed += 1
        print("FAILED:", what)


def end(name):
    """The last line of a test; whether one failed."""
    print("%s: %d passed, %d failed" % (name, passed, failed))
    return failed != 0


def run_cases(name):
    """The unittest cases of the program, which is called so; whether one failed."""
    suite = unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"])
    result = unittest.TextTestRunner(verbosity=0, stream=sys.stdout).run(suite)
    bad = len(result.failures) + len(result.errors)
    print(f"{name}: {result.testsRun - bad} passed, {bad} failed")
    return bad > 0


class Tensors:
    """A safetensors file: self[name] is a flat array, shape[name] its sizes, at[name] where it begins."""

    def __init__(self, path):
        with open(path, "rb") as f:
            data = f.read()
        n = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:8 + n])
        self.meta = header.pop("__metadata__", {})
        self.shape = {name: t["shape"] for name, t in header.items()}
        self.dtype = {name: t["dtype"] for name, t in header.items()}
        self.at = {name: 8 + n + t["data_offsets"][0] for name, t in header.items()}
        self.raw = {name: data[8 + n + t["data_offsets"][0]:8 + n + t["data_offsets"][1]]
                    for name, t in header.items()}

    def __getitem__(self, name):
        return array.array(KINDS[self.dtype[name]], self.raw[name])

    def ragged(self, name, i):
        begin, end = self[name + "_offsets"][i:i + 2]
        return self[name][begin:end]

    def rows(self, name):
        return self.shape[name + "_offsets"][0] - 1
