#!/usr/bin/env python3
"""test_page.py: the page of `run serve` as a person meets it, in Chromium without a window, on the committed fixtures.

Chromium is told what to do over a pipe (--remote-debugging-pipe: JSON with a zero byte behind it). Needs nothing but
Python's standard library and a Chromium. The last line says how many checks passed and failed.
"""
import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

from checks import check, end
from test_serve import TEXT, Server, until

CHROMIUM = os.environ.get("CHROMIUM", "chromium")


class Browser:
    """A page in Chromium, until the with block ends."""

    def __init__(self):
        self.folder = tempfile.mkdtemp()
        theirs_in, self.to = os.pipe()
        self.of, theirs_out = os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]

        def become_3_and_4():
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self.p = subprocess.Popen([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                                   "--no-first-run", "--user-data-dir=" + self.folder, "--remote-debugging-pipe", "about:blank"],
                                  stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                  preexec_fn=become_3_and_4, pass_fds=(3, 4))
        for fd in (theirs_in, theirs_out, *ends):
            os.close(fd)
        self.rest, self.id, self.session, self.problems = b"", 0, None, []
        until(lambda: self.pages())
        self.session = self.call("Target.attachToTarget", targetId=self.pages()[0], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.p.kill()
        self.p.wait()
        os.close(self.to)
        os.close(self.of)
        shutil.rmtree(self.folder, ignore_errors=True)

    def pages(self):
        return [t["targetId"] for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]

    def read(self):
        """The next message. What the page complains of is noted."""
        while b"\0" not in self.rest:
            piece = os.read(self.of, 1 << 16)
            if not piece:
                raise EOFError("Chromium has ended")
            self.rest += piece
        line, self.rest = self.rest.split(b"\0", 1)
        m = json.loads(line)
        if m.get("method") == "Runtime.exceptionThrown":
            self.problems.append(m["params"]["exceptionDetails"])
        if m.get("method") == "Log.entryAdded" and m["params"]["entry"]["level"] == "error":
            self.problems.append(m["params"]["entry"].get("text", "") + " " + m["params"]["entry"].get("url", ""))
        return m

    def call(self, method, **params):
        self.id += 1
        m = {"id": self.id, "method": method, "params": params}
        if self.session:
            m["sessionId"] = self.session
        os.write(self.to, json.dumps(m).encode() + b"\0")
        while True:
            m = self.read()
            if m.get("id") == self.id:
                if "error" in m:
                    raise RuntimeError("%s: %s" % (method, m["error"]))
                return m["result"]

    def js(self, code):
        """The value of an expression in the page."""
        r = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in r:
            raise RuntimeError("%s: %s" % (code, r["exceptionDetails"]))
        return r["result"].get("value")

    def open(self, url):
        self.call("Page.navigate", url=url)
        return until(lambda: self.js("document.readyState") == "complete" and self.js("location.href") == url)

    def wait(self, code, what, seconds=30):
        check(until(lambda: self.js(code), seconds), "%s: %s" % (what, code))

    def text(self, css):
        return self.js("[...document.querySelectorAll(%s)].map(e => e.textContent).join('|')" % json.dumps(css))

    def press(self, key, code=0, text="", modifiers=0):
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, modifiers=modifiers, **more)

    def write(self, css, text):
        """Text into a field, as if it were typed."""
        self.js("document.querySelector(%s).select()" % json.dumps(css))
        self.js("document.querySelector(%s).focus()" % json.dumps(css))
        self.call("Input.insertText", text=text)

    def click(self, css):
        self.js("document.querySelector(%s).click()" % json.dumps(css))

    def look(self, width, height, scheme, path=None):
        """Another size and colour scheme; a picture of it."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        if path:
            with open(path, "wb") as f:
                f.write(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


BAD = '<img src="x" onerror="hacked = 1"> <script>hacked = 2</script> '
QUESTION = "Who built the bridge?"


def ask(b, text, most=8):
    """Asks and waits: the paragraphs that came, and the line below the answer."""
    n = b.js("document.querySelectorAll('#log p').length")
    b.write("#most", str(most))
    b.write("#question", text)
    b.press("Enter", 13, "\r")
    b.wait("document.getElementById('stop').hidden && document.querySelectorAll('#log p').length > %d" % n, "an answer")
    return b.js("[...document.querySelectorAll('#log p')].slice(%d).map(p => p.textContent)" % n)


def test_start(b, s):
    check(b.open("http://127.0.0.1:%d/" % s.port), "the page opens")
    b.wait("document.getElementById('model').textContent.startsWith('smol,')", "it names the model")
    b.wait("document.querySelectorAll('#documents li').length === 1", "there is no document")
    check(b.js("document.getElementById('add').open"), "so it asks for one")
    fields = "[...document.querySelectorAll('input, textarea, select')]"
    check(b.js(fields + ".every(e => e.labels.length === 1 && e.labels[0].textContent.trim())"), "each field has a label")
    check(b.js("document.activeElement === document.body"), "nothing has the focus")
    b.press("Tab", 9)
    style = b.js("(({outlineStyle, outlineWidth}) => outlineStyle + outlineWidth)(getComputedStyle(document.activeElement))")
    check(style == "solid3px", "what has the focus shows it: %s" % style)
    check(b.problems == [], "the browser complains of nothing: %s" % b.problems)
    b.js("document.body.append(Object.assign(document.createElement('script'), {textContent: 'hacked = 3'}))")
    b.js("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"hacked = 4\">')")
    b.js("fetch('http://127.0.0.1:1/').catch(() => 0)")
    b.wait("1", "time passes")
    check(b.js("typeof hacked") == "undefined", "a script from elsewhere does not run")
    told = [p for p in b.problems if "Content Security Policy" in str(p)]
    check(len(told) >= 3, "nor is anybody else talked to: %s" % b.problems)
    b.problems.clear()


def test_add(b, s, folder):
    b.write("#text", BAD + TEXT[:600])
    b.write("#name", "a b")
    b.click("#read")
    check(b.js("!document.getElementById('name').validity.valid") and b.text("#documents li label") == " No document: a plain chat", "a bad name")
    b.write("#name", "town")
    b.write("#ratio", "0.4")
    b.click("#read")
    b.wait("document.querySelectorAll('#documents li').length === 2", "a document is added")
    d = s.get("/v1/documents/town")[1]
    check(b.text("#documents li:last-child label") == " town", "its name")
    size = lambda n: "%.*f KB" % (2 - (n >= 1e4) - (n >= 1e5), n / 1e3)
    facts = "%d tokens, %s of %s, kvzip 0.4" % (d["tokens"], size(d["bytes"]), size(d["full_bytes"]))
    check(b.text("#documents li:last-child .dim") == facts, "%r, not %r" % (b.text("#documents li:last-child .dim"), facts))
    check(b.js("document.querySelector('#documents input[value=town]').checked"), "it is the one that is asked")
    check(b.text("#reading").startswith("town: %d tokens in " % d["tokens"]), "seconds: %s" % b.text("#reading"))
    check(b.text("#ask-title") == "Ask about town", "where")
    for name, data, problem in (("broken.txt", b"ab\xff\xfe", "the text: "), ("empty.txt", b"", "the text is empty"), ("\u00e4 b.c.txt", TEXT[:200].encode(), "")):
        path = os.path.join(folder, name)
        with open(path, "wb") as f:
            f.write(data)
        root = b.call("DOM.getDocument")["root"]["nodeId"]
        b.call("DOM.setFileInputFiles", nodeId=b.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"], files=[path])
        b.wait("document.getElementById('text').placeholder.startsWith(%s)" % json.dumps(name), "a file is picked")
        b.click("#read")
        b.wait("document.getElementById('new-problem').textContent.startsWith(%s) && !document.getElementById('read').disabled"
               % json.dumps(problem), "what is wrong with %s is said" % name)
        del b.problems[:]  # the browser names what was refused
    b.wait("document.querySelectorAll('#documents li').length === 3", "a file is added")
    check(s.get("/v1/documents/b.c")[0] == 200, "a name is made of the file's: %s" % b.text("#documents label"))
    b.write("#text", TEXT[:100])
    b.write("#name", "b.c")
    b.click("#read")
    check(b.text("#read") == "Replace b.c?", "a document is not replaced unasked")
    old = s.get("/v1/documents/b.c")[1]["tokens"]
    b.click("#read")
    check(until(lambda: s.get("/v1/documents/b.c")[1]["tokens"] < old), "it is when that was meant")
    b.wait("!document.getElementById('read').disabled", "read")


def test_ask(b, s):
    b.click("#documents input[value=town]")
    b.write("#temperature", "0")
    question, answer, facts = ask(b, QUESTION)
    want = s.chat(QUESTION, document="town")[1]
    said = want["choices"][0]["message"]["content"]
    check((question, answer) == (QUESTION, said), "the answer is the server's: %r, not %r" % (answer, said))
    tokens = s.get("/v1/documents/town")[1]["tokens"]
    check(facts.startswith("8 tokens, first word after ") and " tokens/s, %d of %d prompt tokens cached; cut at 8 tokens" %
          (tokens, want["usage"]["prompt_tokens"]) in facts, "figures: %s" % facts)
    chat = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": said}, {"role": "user", "content": "Why?"}]
    check(ask(b, "Why?")[1] == s.chat(chat, document="town")[1]["choices"][0]["message"]["content"], "a second question knows the first")
    b.click("#anew")
    check(b.text("#log") == "" and ask(b, QUESTION)[1] == said, "a new conversation does not")
    problem = ask(b, "word " * 3000)
    check(len(problem) == 1 and "tokens" in problem[0] and b.js("document.querySelector('#log p:last-child').className") == "bad", "errors are shown: %s" % problem)
    check(b.js("document.getElementById('question').value.length") > 10000, "and the question is there again")
    b.problems.clear()
    b.write("#most", "1500")
    b.write("#question", BAD)
    b.press("Enter", 13, "\r")
    b.wait("document.querySelector('#log [aria-busy=true]')?.textContent.length > 20", "an answer streams")
    check(b.js("!document.getElementById('stop').hidden && document.getElementById('send').hidden"), "it can be stopped")
    b.press("Escape", 27)
    b.wait("document.getElementById('stop').hidden", "Esc stops it")
    check(b.text("#log p:last-child").endswith("; stopped"), "and that is said: %s" % b.text("#log p:last-child"))
    check(until(lambda: not any(x["is_processing"] for x in s.get("/slots")[1])), "its slot is free")
    check(b.js("document.querySelectorAll('#log img, #log script').length === 0 && typeof hacked === 'undefined'"), "what is said is text")


def test_map(b, s):
    m = s.get("/v1/documents/town/map")[1]
    b.click("#documents li:nth-child(2) button")
    b.wait("document.querySelectorAll('#words span').length === %d" % m["n_ctx"], "the map has the tokens")
    check(b.js("document.activeElement.id") == "map-title", "the focus goes there")
    check(b.js("document.getElementById('words').textContent") == "".join(m["text"]) == BAD + TEXT[:600], "their text")
    check(b.js("document.querySelectorAll('#words img, #words script').length === 0 && typeof hacked === 'undefined'"), "which stays text")
    check(b.text("#map-facts").startswith("{:,} pairs of {:,} stay, 40%.".format(m["n_kept"], m["n_pairs"])), b.text("#map-facts"))
    shares = [int(x) for x in b.js("[...document.querySelectorAll('#heads button')].map(e => parseFloat(e.textContent))")]
    check(len(shares) == 9 and all(abs(x - 100 * n / m["n_ctx"]) < 1 for x, n in zip(shares, sum(m["kept_pairs"], []))), "heads: %s" % shares)
    b.js("document.querySelector('#heads button').focus()")
    for key, code in (("ArrowRight", 39), ("ArrowDown", 40)):
        b.press(key, code)
    check(b.js("document.activeElement.getAttribute('aria-label')").startswith("layer 1, head 1: "), "arrow keys go from head to head")
    part = s.get("/v1/documents/town/map?layer=1&head=1")[1]
    b.press("Enter", 13, "\r")
    b.wait("document.querySelectorAll('#words .gone').length === %d" % part["kept"].count(0), "a head's own tokens")
    check(b.js("document.activeElement.getAttribute('aria-pressed')") == "true" and b.js("document.getElementById('head').value") == "1", "it is chosen")
    title = b.js("document.querySelectorAll('#words span')[5].title")
    check(title == "token 5: kept by %d of 1 head" % part["kept"][5], title)
    for width, scheme in ((360, "light"), (360, "dark"), (1280, "dark"), (1280, "light")):
        b.look(width, 800, scheme)
        wide = b.js("[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > %d && !e.closest('#heads')).map(e => e.tagName + e.id)" % width)
        check(b.js("document.documentElement.scrollWidth") <= width and not wide, "%d wide: nothing to the side: %s" % (width, wide))
        dark = sum(map(int, b.js("getComputedStyle(document.body).backgroundColor")[4:-1].split(","))) < 200
        check(dark == (scheme == "dark"), "the page is %s" % scheme)


def test_delete(b, s):
    button = "#documents li:nth-child(2) button:last-child"
    b.click(button)
    check(b.text(button) == "Delete town?" and s.get("/v1/documents/town")[0] == 200, "deleting asks once more")
    b.click(button)
    b.wait("document.querySelectorAll('#documents li').length === 2", "then it is gone")
    check(s.get("/v1/documents/town")[0] == 404 and b.js("document.getElementById('map').hidden"), "with its map")
    check(b.js("document.querySelector('#documents input').checked"), "nothing is asked about")
    check(ask(b, "Hello there")[1] == s.chat("Hello there")[1]["choices"][0]["message"]["content"], "a chat without a document")
    check(b.problems == [], "the browser complains of nothing: %s" % b.problems)
    s.stop()
    check(ask(b, "Hello?") == ["the server does not answer"], "a server that has gone: %s" % b.text("#log"))


def test_key(b, folder):
    keys = os.path.join(folder, "keys")
    with open(keys, "w") as f:
        f.write("sesame\n")
    with Server("--api-key-file", keys) as s:
        b.open("http://127.0.0.1:%d/" % s.port)
        b.wait("!document.getElementById('key').hidden", "it asks for a key")
        b.write("#key-text", "open")
        b.press("Enter", 13, "\r")
        b.wait("document.getElementById('problem').textContent.startsWith('no key')", "a wrong one is refused")
        b.write("#key-text", "sesame")
        b.press("Enter", 13, "\r")
        b.wait("document.getElementById('model').textContent.startsWith('smol,') && document.getElementById('key').hidden", "the right one is taken")
        check(len(ask(b, "Hello")) == 3 and b.text("#problem") == "", "and used")
        b.js("location.reload()")
        b.wait("document.getElementById('model')?.textContent.startsWith('smol,')", "and kept as long as the tab")


def main():
    with tempfile.TemporaryDirectory() as folder, Browser() as b:
        with Server("--docs", os.path.join(folder, "docs")) as s:
            b.look(1280, 800, "light")
            test_start(b, s)
            test_add(b, s, folder)
            test_ask(b, s)
            test_map(b, s)
            test_delete(b, s)
        test_key(b, folder)
    return end("test_page")


if __name__ == "__main__":
    sys.exit(main())
