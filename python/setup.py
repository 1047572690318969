"""setup.py: `pip install ./python` builds the library with make and puts it beside kvzip.py."""
import os
import re
import shutil
import subprocess

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)


class Build(build_py):
    def run(self):
        super().run()
        subprocess.run(["make", "-C", ROOT, "lib"], check=True)
        for name in ("libkvzip.so", "libkvzip.dylib"):
            path = os.path.join(ROOT, "build", name)
            if os.path.exists(path):
                os.makedirs(self.build_lib, exist_ok=True)
                shutil.copy(path, self.build_lib)


class Binary(Distribution):
    def has_ext_modules(self):  # a wheel for this machine alone
        return True


with open(os.path.join(HERE, "kvzip.py"), encoding="utf-8") as f:
    version = re.search(r'^__version__ = "(.*)"', f.read(), re.M).group(1)
setup(version=version, cmdclass={"build_py": Build}, distclass=Binary)
