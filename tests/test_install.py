#!/usr/bin/env python3
"""test_install.py: `make install`, the manual page, what shells complete, from the tables of commands and flags, and docs/install.md.

CROSS=1 builds with zig's compiler, too, which takes minutes; else make only says what it would do.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile

from checks import check, end

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUN = os.environ.get("RUN", os.path.join(ROOT, "run"))


def told(*words, **options):
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120, **options)
    check(done.returncode == 0, "%s: exit %d: %s" % (" ".join(words)[:80], done.returncode, done.stderr[-300:]))
    return done.stdout


def flags_of(program):
    """Every command's flags, as its -h lists them."""
    commands = re.findall(r"^  run (\w+)", told(RUN, "-h"), re.M)
    check(len(commands) > 10, "commands: %s" % commands)
    return {c: set(re.findall(r"^  (--?[a-z][-a-z]*)\b", told(program, c, "-h"), re.M)) for c in commands}


def check_manual(text, flags):
    plain = text.replace("\\-", "-")
    for command, names in flags.items():
        section = re.search(r'^\.SS "%s .*?(?=^\.S[SH]|\Z)' % command, plain, re.M | re.S)
        check(section, "the manual has " + command)
        for name in names - {"-h"}:
            check("\n\\fB%s\\fR" % name in section.group(0), "the manual's %s has %s" % (command, name))
    check(not re.search(r"\brun (compress|ask|calibrate)", plain), "the manual speaks of kvzip, not of run")
    for lint in ["mandoc", "-Tlint", "-Wwarning"], ["groff", "-man", "-ww", "-Tutf8", "-z"]:
        if shutil.which(lint[0]):
            done = subprocess.run(lint, input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            check(not done.stdout, "%s: %s" % (lint[0], done.stdout[:300]))


def complete_in_bash(script, *words):
    """What bash offers for the last of the words."""
    line = "source %s\nCOMP_WORDS=(\"$@\") COMP_CWORD=$(($# - 1))\n_kvzip\nprintf '%%s\\n' \"${COMPREPLY[@]}\"\n" % script
    return told("bash", "-c", line, "bash", "kvzip", *words).split()


def check_bash(script, flags):
    check(set(complete_in_bash(script, "")) == set(flags) | {"help"}, "bash completes commands")
    check(complete_in_bash(script, "comp") == ["compress"], "bash completes a command's name")
    for command, names in flags.items():
        check(set(complete_in_bash(script, command, "-")) == names, "bash completes the flags of " + command)
    for words, want in [(("compress", "m", "--fit", ""), ["none", "values", "both", "merge", "pool"]), (("compress", "--fit", "v"), ["values"]),
                        (("compress", "--fit", "=", "b"), ["both"]), (("ask", "m", "c", "-n", "-"), []),
                        (("compress", "--policy", "snap"), ["snapkv"]), (("help", "zs"), ["zsh"])]:
        check(complete_in_bash(script, *words) == want, "bash: %s: %s" % (words, complete_in_bash(script, *words)))


def check_others(zsh, fish):
    if shutil.which("zsh"):
        told("zsh", "-n", zsh)
    if shutil.which("fish"):
        told("fish", "-n", fish)
        line = "source %s; complete -C 'kvzip compress --fit '; complete -C 'kvzip comp'" % fish
        got = told("fish", "--no-config", "-c", line)
        check(all(word in got for word in ("none", "values", "both", "compress")), "fish completes: %r" % got)


def check_document():
    """Every command of docs/install.md, word for word, in a home of its own; orders, keys and variables as the program has them."""
    with open(os.path.join(ROOT, "docs", "install.md")) as f:
        text = f.read()
    lines = [line.split("   #")[0].strip() for block in re.findall(r"```\n(.*?)```", text, re.S) for line in block.splitlines()]
    with tempfile.TemporaryDirectory() as home:
        env = dict(os.environ, HOME=home, PATH=home + "/.local/bin:" + os.environ["PATH"], MANPAGER="cat", MAKEFLAGS="-s")
        build = os.path.join(ROOT, "build", "kvzip-1.0.tar.gz")
        for line in lines:
            cross = "cross" in line and os.environ.get("CROSS") != "1"
            line = line.replace("make", "make -n", 1) if cross else line
            if line.startswith(("kvzip help man", "make dist", "tar")) and not shutil.which({"k": "man", "m": "git", "t": "tar"}[line[0]]):
                continue
            done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=900)
            check(done.returncode == 0, "install.md: %s: exit %d: %s" % (line, done.returncode, done.stderr[-300:]))
            if line.startswith("kvzip help man"):
                check("compress" in done.stdout and "calibrate" in done.stdout, "install.md: the manual page: %r" % done.stdout[:100])
            if "DESTDIR" in line and " install" in line:
                check(os.path.exists(home + "/package/usr/bin/kvzip"), "install.md: DESTDIR")
        left = [n for _, _, names in os.walk(home + "/package") for n in names]
        check(not left and os.path.exists(home + "/.local/bin/kvzip"), "install.md: uninstall takes %s" % left)
        check(os.path.exists(home + "/kvzip-1.0/run.c"), "install.md: an archive without run.c")
        if os.path.exists(build):
            os.remove(build)
        rows = re.findall(r"^    ((?:bin|share)/\S+)", text, re.M)
        there = {os.path.relpath(os.path.join(f, n), home + "/.local") for f, _, names in os.walk(home + "/.local") for n in names}
        check(set(rows) == {n for n in there if not n.startswith(("lib/", "include/"))}, "install.md: files %s, not %s" % (rows, there))
    model = os.path.join(ROOT, "tests", "fixtures", "smol.kvz")
    orders = subprocess.run([RUN, "chat", model, "-j", "1"], input=b"/help\n", stdout=subprocess.PIPE, stderr=subprocess.PIPE).stderr.decode()
    for name, what in re.findall(r"^(/\w+) +(?:FILE)? +(\S.*)$", orders, re.M):
        check("`%s`" % name in text or "`%s FILE`" % name in text, "install.md lacks " + name)
    sources = [os.path.join(f, n) for f, _, names in os.walk(ROOT) for n in names
               if n.endswith(".c") and "/tests" not in f and "/build" not in f and "/." not in f[len(ROOT):]]
    used = {name for path in sources for name in re.findall(r'getenv\("(\w+)"\)', open(path).read())}
    named = set(re.findall(r"^\| `(\w+)` \|", text.split("## Environment")[1], re.M))
    check(used == named, "install.md: variables %s, not %s" % (sorted(named), sorted(used)))


def main():
    make = ["make", "-s", "-C", ROOT, "NAME=kvzip", "PREFIX=/opt/k"]
    with tempfile.TemporaryDirectory() as d:
        at = d + "/opt/k/"
        told(*make, "DESTDIR=" + d, "-o", "run", "install")
        flags = flags_of(at + "bin/kvzip")
        check(told(at + "bin/kvzip", "ask", "-h").startswith("usage: kvzip ask"), "-h speaks of kvzip")
        wrong = subprocess.run([at + "bin/kvzip", "nothing"], stderr=subprocess.PIPE, text=True)
        check(wrong.returncode == 2 and wrong.stderr == "kvzip: unknown command 'nothing' (kvzip -h shows the usage)\n",
              "an error of kvzip: %r" % wrong.stderr)
        with open(at + "share/man/man1/kvzip.1") as f:
            check_manual(f.read(), flags)
        check_bash(at + "share/bash-completion/completions/kvzip", flags)
        check_others(at + "share/zsh/site-functions/_kvzip", at + "share/fish/vendor_completions.d/kvzip.fish")
        path = dict(os.environ, PATH=at + "bin:" + os.environ["PATH"])
        model = os.path.join(ROOT, "tests", "fixtures", "smol.kvz")
        done = subprocess.run(["kvzip", "calibrate", model, "-o", d + "/x", "--isa", "mmx"], env=path, cwd=d,
                              stderr=subprocess.PIPE)
        check(b"--isa mmx" in done.stderr, "kvzip of PATH finds its sample text: %r" % done.stderr)
        told(*make, "DESTDIR=" + d, "uninstall")
        left = [name for _, _, names in os.walk(at) for name in names]
        check(not left, "uninstall leaves %s" % left)
    check_document()
    return end("test_install")


if __name__ == "__main__":
    sys.exit(main())
