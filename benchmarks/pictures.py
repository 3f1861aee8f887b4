"""python -m benchmarks.pictures RUN [RUN ...] [--results FILE] [--name report]: docs/NAME-light.png, NAME-dark.png,
the page of these runs as headless Chromium shows it.

report: launch.ppo of the embedded model with --eval_steps 5. demo: the runs and results.json of `make demo`.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from launch.report import report

DOCS = Path(__file__).resolve().parents[1] / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def browser() -> str | None:
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def chromium(page: Path, *flags: str, dark: bool = False) -> str:
    """What headless Chromium prints on the page; with --screenshot=FILE in `flags` it is photographed."""
    program = browser()
    if program is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is installed")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000"]
    with tempfile.TemporaryDirectory() as profile:
        command = [program, *always, *scheme, f"--user-data-dir={profile}", *flags, page.absolute().as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


def photograph(page: Path, picture: Path, width: int, height: int, *, dark: bool = False) -> None:
    """The upper part of the page as a PNG of at most 256 colours, which suits drawings and keeps the file small."""
    from PIL import Image  # arrives with matplotlib

    window = f"--window-size={width},{height + 120}"  # headless Chromium may leave the last lines unpainted
    chromium(page, f"--screenshot={picture.absolute()}", window, dark=dark)
    with Image.open(picture) as image:
        image.convert("RGB").crop((0, 0, width, height)).quantize(256, dither=Image.Dither.NONE).save(
            picture, optimize=True
        )


def main() -> None:
    """Writes both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--results")
    parser.add_argument("--title")
    parser.add_argument("--name", default="report")
    parser.add_argument("--height", type=int, default=1750)
    words = parser.parse_args()
    results = Path(words.results).absolute() if words.results else None
    runs = [Path(run).absolute() for run in words.runs]
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        page = Path(directory) / "report.html"
        for run in runs:  # the page names the directories as they are given: as a user would see them
            Path("output").mkdir(exist_ok=True)
            Path(f"output/{run.name}").symlink_to(run)
        report([f"output/{run.name}" for run in runs], page, results=results, title=words.title)
        for scheme in ("light", "dark"):
            picture = DOCS / f"{words.name}-{scheme}.png"
            photograph(page, picture, 1280, words.height, dark=scheme == "dark")
            print(f"{picture}: {picture.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
