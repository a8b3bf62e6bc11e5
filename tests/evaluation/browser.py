"""A headless browser that loads a page at several widths and reports its problems."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
BEFORE = """<script>
window.problems = [];
const report = problem => window.problems.push(problem);
for (const level of ["error", "warn"])
  console[level] = (...words) => report(`console.${level}: ${words.join(" ")}`);
window.addEventListener("error", event => report(`error: ${event.message || event.target.tagName}`), true);
window.addEventListener("unhandledrejection", event => report(`rejected: ${event.reason}`));
</script>"""
AFTER = """<script>
window.addEventListener("load", () => setTimeout(() => {
  const problems = window.problems;
  document.querySelectorAll("details").forEach(details => details.open = true);
  const all = selector => [...document.querySelectorAll(selector)];
  const images = [...document.images], drawings = all("svg"), root = document.documentElement;
  for (const image of images)
    if (!image.complete || !image.naturalWidth || !image.getBoundingClientRect().width)
      problems.push(`image: ${image.alt}`);
  for (const drawing of drawings) {
    const box = drawing.getBoundingClientRect();
    if (!(box.width > 0 && box.height > 0))
      problems.push(`empty svg: ${drawing.getAttribute("aria-label")}`);
  }
  const small = all("figure svg text").filter(text => text.getBoundingClientRect().height < 6);
  if (small.length) problems.push(`text too small to read: ${small[0].textContent}`);
  if (root.scrollWidth > innerWidth + 1) {
    const wide = all("body *").filter(e => e.getBoundingClientRect().right > innerWidth + 1);
    const names = wide.slice(0, 3).map(e => e.tagName + "." + e.className);
    problems.push(`overflow: ${root.scrollWidth} > ${innerWidth}, ${names}`);
  }
  const text = all("body *:not(script)").flatMap(e => [...e.childNodes])
    .filter(node => node.nodeType === 3).map(node => node.textContent);
  for (const piece of text)
    if (/\\b(NaN|undefined|None|Infinity|inf|nan)\\b/.test(piece)) problems.push(`text: ${piece}`);
  const fetched = performance.getEntriesByType("resource").map(entry => entry.name)
    .filter(name => !name.startsWith("data:"));
  if (fetched.length) problems.push(`fetched: ${fetched}`);
  const counts = {images: images.length, drawings: drawings.length, words: text.length};
  parent.postMessage({width: innerWidth, ...counts, problems}, "*");
}, 100));
</script>"""

COLLECT = """<pre id="found"></pre><script>
const found = [];
addEventListener("message", event => {
  found.push(event.data);
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


def find_browser() -> str | None:
    """The binary of Chromium or Chrome."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def load(page: Path, folder: Path, widths: tuple[int, ...] = (390, 1280)) -> list[dict[str, Any]]:
    """Load a page at each width, in frames: a window has at least 500 pixels."""
    text = page.read_text(encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    copy = text.replace("<head>", f"<head>{BEFORE}", 1).replace("</body>", f"{AFTER}</body>", 1)
    assert copy.count("<script>") == text.count("<script>") + 2
    (folder / "page.html").write_text(copy, encoding="utf-8")
    frames = "".join(
        f'<iframe src="page.html" width="{width}" height="2000" style="border: 0"></iframe>'
        for width in widths
    )
    (folder / "frames.html").write_text(f"<!doctype html><body>{COLLECT}{frames}</body>", encoding="utf-8")
    browser = find_browser()
    assert browser is not None
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--enable-logging=stderr",
    ]
    flags += [
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1700,2200",
        "--virtual-time-budget=20000",
        "--dump-dom",
    ]
    done = subprocess.run(
        [browser, *flags, (folder / "frames.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, f"the browser gave no page: {done.stderr[-2000:]}"
    found = json.loads(html.unescape(match.group(1)) or "[]")
    for line in done.stderr.splitlines():
        if "CONSOLE" in line:
            found.append({"width": 0, "images": 0, "drawings": 0, "words": 0, "problems": [line]})
    return sorted(found, key=lambda item: item["width"])
