"""Draw what a command shows in a terminal, as an SVG.

    python docs/terminal_svg.py docs/demo/terminal.svg "epoch 8/25" python launch.py --config=configs/demo.py

Runs the command in a pseudo terminal until the text appears and the next two seconds have passed, draws the last lines
then, and interrupts the command. The screen is that of `mtl_sparse.runtime.terminal`: lines, styles, and a display at
the end that is erased line by line.
"""

import io
import os
import pathlib
import pty
import re
import signal
import subprocess
import sys
import time

from rich.ansi import AnsiDecoder
from rich.console import Console

COLUMNS, LINES = 100, 24


def screen(output: str) -> list[str]:
    """Return the lines of a terminal after this output, with their styles."""
    lines, row = [""], 0
    for text, code in re.findall(r"([^\r\n\x1b]+|\x1b\[[\d;]*m)|(\r|\n|\x1b\[1A|\x1b\[2K|\x1b\[\?25[hl])", output):
        lines[row] += text
        if code == "\x1b[2K":
            lines[row] = ""
        row += {"\n": 1, "\x1b[1A": -1}.get(code, 0)
        lines += [""] * (row + 1 - len(lines))
    return lines


def output_until(text: str, command: list[str], seconds: float = 2) -> str:
    """Return the output of a command up to some seconds after a text, then interrupt it."""
    parent, child = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
    process = subprocess.Popen(command, env=env, stdin=child, stdout=child, stderr=child)
    os.close(child)
    output, seen = b"", 0.0
    while not seen or time.monotonic() < seen + seconds:
        output += os.read(parent, 65536)
        if not seen and text.encode() in output:
            seen = time.monotonic()
    process.send_signal(signal.SIGINT)
    try:
        while os.read(parent, 65536):
            pass
    except OSError:  # the process has closed the terminal
        process.wait()
    return output.decode(errors="replace")


def main(path: str, text: str, *command: str) -> None:
    """Draw the terminal of a command when `text` has appeared."""
    lines = [line for line in screen(output_until(text, list(command))) if line.strip()]
    shown = lines[-LINES:]
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in AnsiDecoder().decode("\n".join(shown)):
        console.print(line, no_wrap=True, crop=True)
    svg = console.export_svg(title=" ".join(command))
    # Without the fonts of another host: pages make no requests to others.
    pathlib.Path(path).write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S))


if __name__ == "__main__":
    main(*sys.argv[1:])
