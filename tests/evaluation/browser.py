"""A page in headless Chromium, without anything that drives it: a script in a copy of the page tells what it sees."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Before the page's own scripts: what goes wrong in them.
LISTEN = """<script>
const wrong = [];
addEventListener("error", event => wrong.push(event.message || `not loaded: ${event.target.src}`), true);
addEventListener("unhandledrejection", event => wrong.push(String(event.reason)));
for (const kind of ["error", "warn"]) {
  const own = console[kind];
  console[kind] = (...said) => { wrong.push(said.join(" ")); own.apply(console, said); };
}
</script>"""
TELL = """<script>addEventListener("load", () => {
  const seen = (%s)();
  const told = document.createElement("pre");
  told.id = "told";
  told.textContent = JSON.stringify({wrong, seen});
  document.body.append(told);
});</script>"""


def find_browser() -> str | None:
    """Chromium or Chrome, if it is installed."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def look_at(browser: str, page: Path, script: str, folder: Path, *options: str) -> dict[str, Any]:
    """Load a page from its file, with no network, and let a script look at it.

    Args:
        browser: The program.
        page: The page.
        script: A JavaScript function of no arguments; what it returns is JSON.
        folder: For a copy of the page, and the browser's profile.
        *options: Of the browser.

    Returns:
        ``seen``, what the script returned; ``wrong``, messages of errors and warnings; ``console``, the same as the
        browser logs it.
    """
    text = page.read_text(encoding="utf-8")
    assert "<head>" in text and "</body>" in text
    copy = folder / "copy.html"
    copy.write_text(text.replace("<head>", f"<head>{LISTEN}").replace("</body>", TELL % script + "</body>"))
    command = [
        *(browser, "--headless", "--disable-gpu", "--no-first-run", "--disable-extensions", "--enable-logging=stderr"),
        *(f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"),
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
        *("--virtual-time-budget=5000", *options, "--dump-dom", copy.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return {**json.loads(html.unescape(found[1])), "console": console}
