"""`python -m bench.profiling_page`: the example of docs/profiling.md, profiled anew on this machine.

Kept in results/profile-example.json, and from there in the page. `--page` only writes the page.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import perfkit
from bench.pages import DOCS, RESULTS, put

PAGE = DOCS / "profiling.md"
RECORD = RESULTS / "profile-example.json"
MARKS = "<!-- recorded: written by python -m bench.profiling_page -->", "<!-- end -->"
COMMAND = ("profile", "cnn", "--mode", "training")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="profile nothing, only write the page")
    if not parser.parse_args().page:
        subprocess.run([sys.executable, "-m", "perfkit.cli", *COMMAND, "--json", str(RECORD)], check=True)
    put(PAGE, MARKS, [example()])


def example() -> str:
    """What the page shows: the command and what it printed."""
    profile = perfkit.Profile.from_json(RECORD)
    return f"`perfkit {' '.join(COMMAND)}` printed on {profile.created[:10]}:\n\n```text\n{profile}```"


if __name__ == "__main__":
    main()
