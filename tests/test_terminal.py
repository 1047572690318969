#!/usr/bin/env python3
"""test_terminal.py: what a person at a terminal types: keys, history, pasting, signals, colours; and how it is left.

Run after `make run`. The last line says how many checks passed and failed. Nothing here waits for longer than LIMIT.
"""
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import tempfile
import termios
import time

from checks import check, end
from test_cli import RUN, Model, works

LIMIT = 20  # seconds


class Terminal:
    """A command in a terminal of its own, which is killed at the end, whatever has happened."""

    def __init__(self, *args, term="xterm", columns=80, env=()):
        self.out, self.seen = b"", 0
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            for s in (signal.SIGINT, signal.SIGTSTP, signal.SIGQUIT):  # a job in the background ignores them
                signal.signal(s, signal.SIG_DFL)
            os.environ.update(dict(env), TERM=term)
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            os.execv(RUN, [RUN, *map(str, args)])
        self.before = termios.tcgetattr(self.fd)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.fd)

    def read(self, seconds):
        if not select.select([self.fd], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # the other side is closed
            data = b""
        self.out += data
        return data != b""

    def until(self, pattern):
        """Waits for what has not been waited for before; the match."""
        last = time.monotonic() + LIMIT
        while time.monotonic() < last:
            found = re.compile(pattern, re.S).search(self.out, self.seen)
            if found:
                self.seen = found.end()
                return found
            if not self.read(0.1) and self.dead():
                break
        check(False, "%r never came: %r" % (pattern, self.out[self.seen:]))
        return re.match(b"()", b"")

    def type(self, keys):
        os.write(self.fd, keys)

    def prompt(self):
        self.until(rb"\r> \x1b\[K\r\x1b\[2C")

    def dead(self):
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def code(self):
        """The exit code, or minus the signal; None: it goes on."""
        last = time.monotonic() + LIMIT
        while time.monotonic() < last:
            self.read(0.05)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        return None

    def restored(self):
        """As it was: modes of the terminal, and no marks of what is pasted."""
        while self.read(0.1):
            pass
        marks = re.findall(rb"\x1b\[\?2004([hl])", self.out)
        return termios.tcgetattr(self.fd)[:6] == self.before[:6] and (not marks or marks[-1] == b"l")

    def end(self, what, code=0):
        got = self.code()
        check(got == code, "%s: ends with %s" % (what, got))
        check(self.restored(), "%s: the terminal is not as it was: %r" % (what, self.out[-80:]))


def chat(m, *flags, **how):
    return Terminal("chat", m.path, "-n", 1, "--temp", 0, "--json", "-q", "-j", 1, *flags, **how)


def asked(t):
    """The question of the next line of JSON."""
    row = t.until(rb'(\{"question[^\r\n]*\})\r\n').group(1)
    return json.loads(row)["question"] if row else None


def test_keys(m):
    """Keys that move and cut, history, characters of several bytes and columns."""
    typed = [("Who \u00e9\U0001f600?\x1b[D\x7f\x7fis\x1b[H> \x01\x1b[3~\x1b[3~\x05!\n", "Who is?!"),
             ("lost\x15\x1b[A\x1b[D\x08\n", "Who is!"),              # Ctrl-U; up; left; backspace
             ("\x1b[A\x1b[A\x1b[B\x17now\x1bOH\x1b[C\x1b[C\x0b\n", "Wh"),  # up, up, down; Ctrl-W; home, right, Ctrl-K
             ("new\x1b[A\x1b[B\x04 one\x1b[D\x04\n", "new on"),      # what was typed comes back; Ctrl-D takes away
             ("one two\x17\x01\x19three \x05\x19\n", "twothree one two"),   # Ctrl-W cuts for Ctrl-Y
             ("e\u0301x\x1b[D\x1b[Da\n", "ae\u0301x"),               # a mark goes with its letter
             ("\u6f22\u5b57\x1b[D\x7f\n", "\u5b57"),
             ("  \x1b[5~\x1b[99;5X\x1bblong" + " line" * 60 + "\x1b[D\x1b[D\n", "  long" + " line" * 60),
             ("a\0b\tc\n", "abc"), ("\x1b[F\x1b[4~end\x1b[1~the \n", "the end")]
    with chat(m) as t:
        for keys, want in typed:
            t.prompt()
            t.type(keys.encode())
            got = asked(t)
            check(got == want, "%r gave %r, not %r" % (keys, got, want))
        t.prompt()
        t.type(b"\x04")
        t.end("Ctrl-D")


def test_paste(m):
    """What is pasted is one message, and its control characters are no keys."""
    with chat(m) as t:
        t.prompt()
        t.type(b"\x1b[200~Name\r\nall\tof\x01\nthem\x1b[A\x1b[201~?\n")
        t.until("\u21b5".encode())
        check(asked(t) == "Name\n\nall\tof\x01\nthem?", "a paste")
        t.prompt()
        t.type(b"\x1b[200~" + b"0123456789" * 20000 + b"\x1b[201~\x15short\n")
        check(asked(t) == "short", "a long paste that is taken back")
        t.prompt()
        t.type(b"\x04")
        t.end("after pasting")


def rows(out, columns):
    """What one row of a terminal shows after it was drawn: text, and where the cursor is."""
    row, at = [" "] * 400, 0
    for part in re.findall(r"\x1b\[([0-9;?]*)([A-Za-z])|(.)", out.decode("utf-8", "replace"), re.S):
        if part[2] == "\r":
            at = 0
        elif part[2] == "\n":
            row, at = [" "] * 400, 0
        elif part[2]:
            row[at] = part[2]
            at += 2 if ord(part[2]) >= 0x1100 else 1
        elif part[1] == "K":
            row[at:] = [" "] * (400 - at)
        elif part[1] == "C":
            at += int(part[0] or 1)
    check(not "".join(row[columns:]).strip(), "a line goes beyond column %d: %r" % (columns, "".join(row).rstrip()))
    return "".join(row).rstrip(), at


def test_drawing(m):
    """A line longer than the terminal stays in its row, the cursor in sight; also when the window changes."""
    text = "".join(chr(97 + i % 26) for i in range(70))
    with chat(m, columns=40) as t:
        t.prompt()
        t.type(text.encode())
        t.until(text[-10:].encode() + rb"\x1b\[K\r\x1b\[39C")
        check(rows(t.out, 40) == ("> " + text[-37:], 39), "the end of a long line: %s" % (rows(t.out, 40),))
        t.type(b"\x01")
        t.until(rb"\x1b\[K\r\x1b\[2C")
        check(rows(t.out, 40) == ("> " + text[:37], 2), "its beginning: %s" % (rows(t.out, 40),))
        fcntl.ioctl(t.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
        t.until(rb"\x1b\[K\r\x1b\[2C")
        check(rows(t.out, 20) == ("> " + text[:17], 2), "a smaller window: %s" % (rows(t.out, 20),))
        t.type("\u6f22".encode() * 12)
        t.until(rb"\x1b\[K\r\x1b\[18C")
        check(rows(t.out, 20)[1] == 18, "wide characters: %s" % (rows(t.out, 20),))
        t.type(b"\x15\x0b\x1b[A\n\x04")
        t.end("a small window")


def test_signals(m):
    """Ctrl-C takes the line back, then asks, then ends; whatever signal comes the terminal is as it was."""
    with chat(m) as t:
        t.prompt()
        t.type(b"wrong")
        t.until(b"wrong")
        t.type(b"\x03")
        t.prompt()
        check(b"Ctrl-C again" not in t.out, "Ctrl-C with a line ends nothing")
        t.type(b"right\n")
        check(asked(t) == "right", "a line after Ctrl-C")
        t.prompt()
        t.type(b"\x03")
        t.until(rb"Ctrl-C again or Ctrl-D ends")
        t.prompt()
        t.type(b"\x03")
        t.end("Ctrl-C twice")
    for s in signal.SIGTERM, signal.SIGHUP, signal.SIGINT:
        with chat(m) as t:
            t.prompt()
            t.type(b"half a")
            t.until(b"half a")
            os.kill(t.pid, s)
            if s == signal.SIGINT:
                t.prompt()
                t.type(b"\x04")
            t.end("signal %d" % s, 0 if s == signal.SIGINT else 128 + s)
    with chat(m) as t:  # Ctrl-\ and Ctrl-Z at the prompt: a session without a shell cannot stop
        t.prompt()
        t.type(b"\x1c\x1astays\n")
        check(asked(t) == "stays", "Ctrl-\\ and Ctrl-Z")
        t.prompt()
        t.type(b"\x04")
        t.end("Ctrl-\\")
    with Terminal("chat", m.path, "-n", 2000, "--ignore-eos", "-j", 1) as t:  # an answer is stopped, the chat goes on
        t.prompt()
        t.type(b"Tell\n")
        t.until(rb"Tell\r?\x1b?.*\n.")
        t.type(b"\x03")
        t.until(rb"interrupted\]")
        t.prompt()
        t.type(b"\x04")
        t.end("an answer that is stopped")


def test_stop(m):
    """Stopped and continued, as by a shell: keys are given again."""
    with chat(m) as t:
        t.prompt()
        t.type(b"abc")
        t.until(b"abc")
        os.kill(t.pid, signal.SIGSTOP)
        os.waitpid(t.pid, os.WUNTRACED)
        termios.tcsetattr(t.fd, termios.TCSANOW, t.before)
        os.kill(t.pid, signal.SIGCONT)
        t.until(rb"\x1b\[\?2004h\r> abc\x1b\[K")
        t.type(b"\x7fd\n")
        check(asked(t) == "abd", "a line that was stopped in between")
        t.prompt()
        t.type(b"\x04")
        t.end("stopped and continued")


def test_plain(m):
    """TERM=dumb: no control sequences, lines as the terminal has them."""
    with chat(m, term="dumb") as t:
        t.until(b"> ")
        t.type(b"Plainn\x7f?\n")
        check(asked(t) == "Plain?", "a line with TERM=dumb")
        t.until(b"> ")
        t.type(b"\x04")
        t.end("TERM=dumb")
        check(b"\x1b" not in t.out, "control sequences with TERM=dumb: %r" % t.out)


def test_progress(m, d):
    """Bars are drawn where the cursor moves, not with TERM=dumb, -q or in a pipe; and nothing is coloured anywhere."""
    with open(d + "/ids", "w") as f:
        f.write(" ".join(str(30 + i * 7919 % 600) for i in range(1500)))
    slow = ["compress", m.path, "--ids", d + "/ids", "--isa", "scalar", "-j", 1, "-o", d + "/slow.kvc"]
    for term, flags in ("xterm", []), ("dumb", []), ("xterm", ["-q"]):
        with Terminal(*slow, *flags, term=term) as t:
            t.end("compress")
            check((b"\x1b[K" in t.out) == (term == "xterm" and not flags), "a bar with TERM=%s %s: %r" % (term, flags, t.out))
    for words in ["-h"], ["compress", "-h"], ["info", m.path], ["info", d + "/slow.kvc"], ["info", d + "/none"], ["help", "man"], ["x"]:
        with Terminal(*words) as t:
            t.code()
            check(t.out and b"\x1b" not in t.out, "%s: steers the terminal: %r" % (words, t.out))
    with chat(m) as t:
        t.prompt()
        t.type(b"/help\n/stats\nWho?\n")
        asked(t)
        t.prompt()
        t.type(b"\x04")
        t.end("orders")
        check(not re.search(rb"\x1b\[[0-9;]*m", t.out), "colours: %r" % t.out)
    r = works("chat", m.path, "-n", 3, "--temp", 0, "-j", 1, input=b"Who?\n")
    check(b"\x1b" not in r.out and "\x1b" not in r.err, "a pipe gets control sequences: %r %r" % (r.out, r.err))


def test_ask(m, d):
    """ask has the same lines, and each question sees the cache alone."""
    works("compress", m.path, "-p", "Ada keeps forty goats. " * 8, "-o", d + "/a.kvc", "-q")
    with Terminal("ask", m.path, d + "/a.kvc", "-n", 1, "--json", "-q", "-j", 1) as t:
        t.prompt()
        t.type(b"Wo?\x1b[D\x1b[Dh\n")
        check(asked(t) == "Who?", "ask: a line")
        t.prompt()
        t.type(b"\x1b[A\n")
        check(asked(t) == "Who?", "ask: history")
        t.prompt()
        t.type(b"\x04")
        t.end("ask")


def main():
    smol = Model("smol")
    signal.alarm(300)  # were all limits wrong, this one ends it
    with tempfile.TemporaryDirectory() as d:
        test_keys(smol)
        test_paste(smol)
        test_drawing(smol)
        test_signals(smol)
        test_stop(smol)
        test_plain(smol)
        test_ask(smol, d)
        test_progress(smol, d)
    return end("test_terminal")


if __name__ == "__main__":
    sys.exit(main())
