"""Headless Chromium for tests of pages, spoken to over a pipe (the DevTools protocol): no package, no port."""

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
WIDTH = 360
"""CSS pixels of a small phone."""
_SECONDS = 60
# The protocol speaks on file descriptors 3 and 4.
_EXEC = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"


class Browser:
    """One browser process; a context manager that ends it.

    Args:
        folder: new folder for its profile.
    """

    def __init__(self, folder):
        self._read, there = os.pipe()
        from_here, self._write = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (from_here, there)]
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        command = [sys.executable, "-S", "-c", _EXEC, *map(str, ends), BROWSER, *options]
        silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, pass_fds=ends, start_new_session=True, **silent)
        for end in (from_here, there, *ends):
            os.close(end)
        self._buffer, self._last, self._events = b"", 0, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)  # a session of its own
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def open(self, page, *, is_dark, width=WIDTH):
        """A loaded file as a phone shows it, in light or dark."""
        return Tab(self, page, is_dark=is_dark, width=width)

    def call(self, method, session=None, **params):
        """One command of the protocol, and its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (found := self._message()).get("id") != self._last:
            self._events.append(found)
        assert "error" not in found, found
        return found["result"]

    def events(self, method, session):
        """What has been told of since the session began, without waiting."""
        return [event["params"] for event in self._events if (event["method"], event.get("sessionId")) == (method, session)]

    def wait_for(self, method, session):
        """Until something is told of."""
        while not self.events(method, session):
            self._events.append(self._message())

    def _message(self):
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], _SECONDS)
            assert ready, "the browser does not answer"
            more = os.read(self._read, 1 << 16)
            assert more, "the browser has died"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


class Tab:
    """A page in a `Browser`."""

    def __init__(self, browser, page, *, is_dark, width):
        self._browser, self._page = browser, page.as_uri()
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self._call(f"{domain}.enable")
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=740, deviceScaleFactor=2, mobile=True)
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}])
        self._call("Emulation.setFocusEmulationEnabled", enabled=True)
        self._call("Page.navigate", url=self._page)
        browser.wait_for("Page.loadEventFired", self._session)

    def _call(self, method, **params):
        return self._browser.call(method, self._session, **params)

    def run(self, script):
        """The value of a JavaScript expression, as JSON."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press_tab(self):
        """The key; gives what then has the focus, and whether that shows."""
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        return self.run(_FOCUS)

    def requests(self):
        """Addresses that were asked for beside the page itself."""
        sent = [event["request"]["url"] for event in self._browser.events("Network.requestWillBeSent", self._session)]
        assert sent[0] == self._page
        return [url for url in sent[1:] if not url.startswith("data:")]

    def complaints(self):
        """What the page's scripts, or its policy, let the console say."""
        logged = self._browser.events("Runtime.consoleAPICalled", self._session)
        return [*logged, *self._browser.events("Runtime.exceptionThrown", self._session)]

    def probe(self):
        """What `PROBE` found; all that was folded is open then."""
        return self.run(PROBE)


_FOCUS = """(() => {
  const one = document.activeElement, box = one.getBoundingClientRect(), style = getComputedStyle(one);
  const shows = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0 && box.width > 0 && box.right > 0;
  return { tag: one.tagName.toLowerCase(), kind: one.className || one.type || "", text: one.textContent.slice(0, 40), shows };
})()"""

PROBE = """(() => {
const found = { problems: [] };
for (const one of document.querySelectorAll("details")) one.open = true;
const first = name => document.querySelector(`section[aria-labelledby=${name}] tbody tr`);
const knob = [...document.querySelectorAll("section[aria-labelledby=points] th button")].find(b => b.textContent === "knob");
if (knob) {
  const value = () => parseFloat(first("points").cells[1].textContent);
  knob.click(); found.up = value(); knob.click(); found.down = value();
}
found.width = document.documentElement.scrollWidth;
const edge = screen.width;
for (const one of document.body.querySelectorAll("*")) {
  const box = one.getBoundingClientRect();
  const isWide = box.right > edge + 0.5 && !one.parentElement.closest(".scroll, pre");
  if (isWide) found.problems.push("beyond the screen: " + one.outerHTML.slice(0, 90));
}
found.hacked = typeof hacked;

// The switch: one chart at a time, by the radio buttons, each of which the keyboard reaches and a label names.
const radios = [...document.querySelectorAll("input[type=radio]")], figures = [...document.querySelectorAll(".charts > figure")];
found.switches = radios.map((radio, i) => {
  radio.labels[0].click();
  return radio.tabIndex === 0 && radio.labels[0].textContent !== "" && figures.every((f, j) => (f.offsetParent !== null) === (i === j));
});

// Names of what can be used or seen, as a screen reader asks for them.
for (const one of document.querySelectorAll("button, a, input, summary, [role], [tabindex]")) {
  const name = one.getAttribute("aria-label") || (one.labels && one.labels[0] && one.labels[0].textContent) || one.textContent;
  if (!name.trim()) found.problems.push("no name: " + one.outerHTML.slice(0, 80));
}
for (const one of document.querySelectorAll("section")) {
  if (!document.getElementById(one.getAttribute("aria-labelledby"))) found.problems.push("a section without a name");
}

// Contrast of every text with what is behind it: 4.5 : 1, WCAG 2.1, 1.4.3.
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const light = color => rgb(color).slice(0, 3).map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = one => {
  for (; one; one = one.parentElement) { const c = getComputedStyle(one).backgroundColor; if (!(rgb(c)[3] === 0)) return c; }
  return "rgb(255, 255, 255)";
};
let texts = 0;
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const one = walk.currentNode.parentElement;
  if (!walk.currentNode.data.trim() || one.closest("script, title")) continue;
  const style = getComputedStyle(one), own = light(one.closest("svg") ? style.fill : style.color);
  const [a, b] = [own, light(behind(one))].sort((x, y) => y - x), contrast = (a + 0.05) / (b + 0.05);
  texts++;
  if (contrast < 4.5) found.problems.push("contrast " + contrast.toFixed(1) + ": " + walk.currentNode.data.slice(0, 40));
}
found.texts = texts;
found.dark = light(getComputedStyle(document.body).backgroundColor) < 0.1;
return found;
})()"""
