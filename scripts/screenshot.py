"""Look at HTML pages in headless Chromium, as on a phone and on a desktop, light and dark: pictures, and what is wrong.

    python scripts/screenshot.py PAGE… -o DIR

Says for each page what does not fit (the page scrolls sideways, a label is cut), what its scripts complain of, and what
it asks the network for; exits with 1 where there is any. `bash scripts/browser.sh` installs Chromium, which is driven
by its DevTools protocol through a pipe, so that nothing else has to be installed.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

WIDTHS: Final = {"phone": 390, "desktop": 1440}
SCHEMES: Final = ("light", "dark")
_NAMES: Final = ("chromium", "chromium-browser", "google-chrome")
_SECONDS: Final = 60.0
#: The tallest picture that is taken.
_TALLEST: Final = 12_000
#: Finds elements that reach past the page's right edge outside of what scrolls by itself, and texts of pictures that
#: reach out of their picture.
_LOOK: Final = """(() => {
  const wide = document.documentElement.clientWidth, found = [];
  const inside = (element) => {
    for (let above = element.parentElement; above && above !== document.body; above = above.parentElement)
      if (["auto", "scroll", "hidden"].includes(getComputedStyle(above).overflowX)) return true;
    return false;
  };
  const name = (element) => `${element.tagName.toLowerCase()}.${element.getAttribute("class") || ""} ` +
    (element.textContent || "").slice(0, 60);
  for (const element of document.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    if (box.width && (box.right > wide + 1 || box.left < -1) && !inside(element)) found.push(name(element));
  }
  for (const text of document.querySelectorAll("svg text")) {
    const box = text.getBoundingClientRect(), picture = text.ownerSVGElement.getBoundingClientRect();
    if (box.width && (box.left < picture.left - 1 || box.right > picture.right + 1 ||
        box.top < picture.top - 1 || box.bottom > picture.bottom + 1)) found.push("cut: " + name(text));
  }
  return { scroll: document.documentElement.scrollWidth, wide, height: document.documentElement.scrollHeight,
    found: found.slice(0, 20) };
})()"""


@dataclass
class Seen:
    """What is wrong with a page at one width in one scheme.

    Attributes:
        overflow: pixels by which it scrolls sideways.
        cut: elements that reach out of the page or of their picture.
        errors: of its scripts and its security policy.
        requests: to anything but the page itself.
    """

    page: Path
    width: int
    scheme: str
    overflow: int = 0
    cut: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        scrolls = [f"scrolls sideways by {self.overflow} px"] if self.overflow else []
        return [*scrolls, *self.cut, *self.errors, *(f"asks for {one}" for one in self.requests)]


def chromium() -> str | None:
    """The command of a Chromium; None where there is none."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Browser:
    """A headless Chromium; use as a context manager."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._number = 0
        self._held: list[dict[str, Any]] = []
        self._data = b""

    def __enter__(self) -> Browser:
        self._home = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        in_end, self._write = os.pipe()
        self._read, out_end = os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4.
        words = [
            self._command, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            "--disable-dev-shm-usage", "--disable-background-networking", "--remote-debugging-pipe",
            f"--user-data-dir={self._home.name}", "about:blank",
        ]  # fmt: skip
        shell = ["bash", "-c", f'exec "$@" 3<&{in_end} 4>&{out_end}', "chromium", *words]
        self._process = subprocess.Popen(
            shell, pass_fds=(in_end, out_end), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(in_end)
        os.close(out_end)
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._home.cleanup()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and wait for what it answers."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        until = time.monotonic() + _SECONDS
        while True:
            said = self._next(until)
            if said.get("id") != self._number:
                self._held.append(said)
            elif "error" in said:
                raise RuntimeError(f"{method}: {said['error']}")
            else:
                return said["result"]

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._data:
            if not select.select([self._read], [], [], max(until - time.monotonic(), 0))[0]:
                raise TimeoutError("Chromium does not answer")
            more = os.read(self._read, 1 << 20)
            if not more:
                raise RuntimeError("Chromium has ended")
            self._data += more
        line, _, self._data = self._data.partition(b"\0")
        return json.loads(line)

    def _wait(self, method: str) -> None:
        until = time.monotonic() + _SECONDS
        while not any(said.get("method") == method for said in self._held):
            self._held.append(self._next(until))

    def look(self, page: Path, width: int, scheme: str, picture: Path | None = None) -> Seen:
        """Load a page, say what is wrong with it, and take a picture of all of it."""
        self._held.clear()
        height = 844 if width < 600 else 900
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **screen)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        address = page.absolute().as_uri()
        if why := self.ask("Page.navigate", url=address).get("errorText"):
            raise RuntimeError(f"{page}: {why}")
        self._wait("Page.loadEventFired")
        found = self.ask("Runtime.evaluate", expression=_LOOK, returnByValue=True)["result"]["value"]
        if picture is not None:
            tall = {
                **screen,
                "height": min(found["height"], _TALLEST),
            }  # what sticks to the screen's edge is at its place
            self.ask("Emulation.setDeviceMetricsOverride", **tall)
            whole = {"x": 0, "y": 0, "width": width, "height": min(found["height"], _TALLEST), "scale": 1}
            taken = self.ask("Page.captureScreenshot", clip=whole, captureBeyondViewport=True)
            picture.write_bytes(base64.b64decode(taken["data"]))
        seen = Seen(page, width, scheme, max(found["scroll"] - found["wide"], 0), found["found"])
        for said in self._held:
            _heard(seen, said, address)
        return seen


def _heard(seen: Seen, said: dict[str, Any], address: str) -> None:
    parameters = said.get("params", {})
    match said.get("method"):
        case "Runtime.exceptionThrown":
            seen.errors.append(str(parameters["exceptionDetails"].get("exception", {}).get("description"))[:200])
        case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
            seen.errors.append(parameters["entry"]["text"][:200])
        case "Network.requestWillBeSent" if parameters["request"]["url"] != address:
            seen.requests.append(parameters["request"]["url"][:200])
        case _:
            pass


def looked(pages: Iterable[Path], command: str, folder: Path | None = None) -> Iterable[Seen]:
    """Each page at both widths in both schemes; pictures go to ``folder``, named after page, width and scheme."""
    with Browser(command) as browser:
        for page in pages:
            for name, width in WIDTHS.items():
                for scheme in SCHEMES:
                    picture = folder / f"{page.stem}-{name}-{scheme}.png" if folder else None
                    yield browser.look(page, width, scheme, picture)


def main() -> int:
    parser = argparse.ArgumentParser(description="Pictures of HTML pages, and what does not fit.")
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="where the pictures go")
    args = parser.parse_args()
    command = chromium()
    if command is None:
        sys.stderr.write("no Chromium here; bash scripts/browser.sh\n")
        return 7
    args.out.mkdir(parents=True, exist_ok=True)
    code = 0
    for seen in looked(args.pages, command, args.out):
        for fault in seen.faults:
            code = 1
            sys.stdout.write(f"{seen.page} {seen.width} px {seen.scheme}: {fault}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
