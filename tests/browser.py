"""A page in headless Chromium: what it draws there, and what the browser complains of."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ON_A_MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=2000",
)
# A page around the page, for a width that no window can have, and to look inside from outside
FRAME = """<!doctype html><body style="margin:0">
<iframe id="page" src="{file}" style="width:{width}px;height:2000px;border:0"></iframe>
<script>
document.getElementById("page").onload = event => {{
  const page = event.target.contentDocument, root = page.documentElement;
  const inside = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1 &&
    a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
  const found = {{
    overflow: root.scrollWidth - root.clientWidth,
    ground: page.defaultView.getComputedStyle(page.body).backgroundColor,
    charts: [...page.querySelectorAll("svg.chart")].map(svg => {{
      const box = svg.getBoundingClientRect();
      const panel = svg.closest(".panel"), figure = svg.closest("figure");
      const text = element => element ? element.textContent.trim() : "";
      return {{
        title: [text(figure.querySelector("h3")), text(panel.querySelector("h4"))],
        width: box.width,
        height: box.height,
        axes: [...svg.querySelectorAll("text.axis")].map(text),
        marks: [...svg.querySelectorAll(".mark")].map(mark => {{
          const shape = mark.querySelector(".shape, .bar"), drawn = shape.getBoundingClientRect();
          return {{
            words: text(mark.querySelector("title")),
            drawn: drawn.width > 0 && drawn.height > 0 && inside(drawn, box),
            fill: page.defaultView.getComputedStyle(shape).fill,
          }};
        }}),
        outside: [...svg.querySelectorAll("text")]
          .filter(element => !inside(element.getBoundingClientRect(), box)).map(text),
        data: [...panel.querySelectorAll("tbody tr")]
          .map(row => [...row.children].map(text)),
      }};
    }}),
  }};
  const pre = document.createElement("pre");
  pre.id = "found";
  pre.textContent = JSON.stringify(found);
  document.body.append(pre);
}};
</script>"""


def find() -> str | None:
    """Where a Chromium is, if there is one."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    return found or (ON_A_MAC if Path(ON_A_MAC).exists() else None)


def look(
    chromium: str, page: Path, folder: Path, width: int, dark: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """What is drawn of a page `width` pixels wide, and what was logged of it.

    `folder` takes the browser's files and those of this look.
    """
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(file=html.escape(page.as_uri()), width=width))
    done = subprocess.run(
        [
            chromium,
            *FLAGS,
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={max(width, 500)},2000",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--allow-file-access-from-files",
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr
    # What a page says is logged by its console; the rest is about buses and drivers.
    logged = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(match[1])), logged
