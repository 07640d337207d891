"""Look at the built pages in a browser without a network: `python docs/check_pages.py docs/_build/html`.

Chromium loads each page at 1280 and 390 pixels, but not those that Sphinx makes of sources. The script prints one line
for each page that is wider than the window, each formula that is not set, and each file that a page requests from
another host, and exits with status 1 if there are any.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WIDTHS = (1280, 390)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT = 900  # seconds for all pages

SCRIPT = """<!doctype html><meta charset="utf-8"><body style="margin:0"><script>
const wait = milliseconds => new Promise(resolve => setTimeout(resolve, milliseconds));
async function look(page, width) {
  const frame = document.createElement("iframe");
  Object.assign(frame, {width, height: 900, src: "/" + page, style: "position:absolute;top:0;left:0"});
  const loaded = new Promise(resolve => frame.onload = resolve);
  document.body.append(frame);
  await loaded;
  const inside = frame.contentDocument, faults = [];
  const formulas = inside.querySelectorAll(".math").length;
  const unset = () => [...inside.querySelectorAll(".math")].filter(each => !each.querySelector("mjx-container"));
  for (let tries = 0; tries < 200 && unset().length; tries++) await wait(50);
  const [left] = unset();
  if (left) faults.push(unset().length + " of " + formulas + " formulas are not set: " + left.textContent);
  for (const each of inside.querySelectorAll("mjx-merror, [data-mml-node=merror]"))
    faults.push("formula with an error: " + each.textContent.slice(0, 80));
  const root = inside.documentElement;
  if (root.scrollWidth > root.clientWidth) {
    const wide = [...inside.body.querySelectorAll("*")]
      .filter(each => each.getBoundingClientRect().right > root.clientWidth + 1 && !each.closest(".sidebar-drawer"))
      .map(each => each.tagName.toLowerCase() + (each.className.baseVal ?? each.className).replace(/^|\\s+/g, "."));
    const size = root.scrollWidth + " pixels wide in a window of " + root.clientWidth;
    faults.push(size + ": " + wide.slice(0, 3).join(", "));
  }
  for (const each of frame.contentWindow.performance.getEntriesByType("resource"))
    if (!each.name.startsWith(location.origin) && !each.name.startsWith("data:"))
      faults.push("requests " + each.name);
  frame.remove();
  return faults.map(fault => [page, width, fault]);
}
(async () => {
  const {pages, widths} = await (await fetch("/__pages__")).json();
  const todo = widths.flatMap(width => pages.map(page => [page, width])), found = todo.map(() => []);
  let next = 0;
  async function lane() {  // a page waits for its formulas and files, so that several are looked at together
    for (let number = next++; number < todo.length; number = next++)
      try { found[number] = await look(...todo[number]); }
      catch (error) { found[number] = [[...todo[number], String(error)]]; }
  }
  await Promise.all(Array.from({length: 6}, lane));
  await fetch("/__found__", {method: "POST", body: JSON.stringify(found.flat())});
})();
</script></body>"""

Fault = tuple[str, int, str]
"""A page, the width of the window, and what is wrong."""


def browser() -> str | None:
    """Return the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def faults(root: Path, pages: list[str] | None = None) -> list[Fault]:
    """Return what is wrong with the pages under ``root`` but those of sources, or with some, in the order of the pages.

    Raises:
        RuntimeError: if there is no Chromium, or it does not answer in time.
    """
    if (program := browser()) is None:
        raise RuntimeError(f"needs one of {', '.join(BROWSERS)}")
    found = (path.relative_to(root) for path in root.rglob("*.html"))
    names = pages or sorted(str(path) for path in found if path.parts[0] not in ("_static", "_modules"))
    answer: list[Fault] = []
    done = threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/__look__":
                self._send("text/html", SCRIPT)
            elif self.path == "/__pages__":
                self._send("application/json", json.dumps({"pages": names, "widths": WIDTHS}))
            else:
                super().do_GET()

        def do_POST(self) -> None:
            found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer.extend((page, width, fault) for page, width, fault in found)
            self._send("text/plain", "")
            done.set()

        def _send(self, kind: str, text: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root))) as server,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={profile}",
            "--window-size=1400,1000",
        ]
        options += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-port=0"]
        address = f"http://127.0.0.1:{server.server_port}/__look__"
        process = subprocess.Popen([program, *options, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if not done.wait(TIMEOUT):
                raise RuntimeError(f"{program} did not look at {len(names)} pages in {TIMEOUT} seconds")
        finally:
            process.terminate()
            process.wait()
            server.shutdown()
    return answer


def main() -> None:
    """Check the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/check_pages.py FOLDER")
    root = Path(sys.argv[1])
    if not (root / "index.html").exists():
        sys.exit(f"{root}: has no index.html; build the documentation first")
    if browser() is None:
        print(f"not looked at: needs one of {', '.join(BROWSERS)}")
        return
    found = faults(root)
    for page, width, fault in found:
        print(f"{page}, {width} pixels: {fault}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
