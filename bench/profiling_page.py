"""`python -m bench.profiling_page`: the example of docs/profiling.md, profiled anew on this machine.

Kept in results/profile-example.json, and from there in the page. `--page` only writes the page.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import perfkit
from bench.record import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "profiling.md"
RECORD = RESULTS / "profile-example.json"
BEGIN, END = "<!-- recorded: written by python -m bench.profiling_page -->", "<!-- end -->"
COMMAND = ("profile", "cnn", "--mode", "training")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="profile nothing, only write the page")
    if not parser.parse_args().page:
        subprocess.run([sys.executable, "-m", "perfkit.cli", *COMMAND, "--json", str(RECORD)], check=True)
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{example()}\n{END}{rest.partition(END)[2]}")


def example() -> str:
    """What the page shows: the command and what it printed."""
    profile = perfkit.Profile.from_json(RECORD)
    return f"`perfkit {' '.join(COMMAND)}` printed on {profile.created[:10]}:\n\n```text\n{profile}```"


if __name__ == "__main__":
    main()
