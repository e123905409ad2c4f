"""`python -m perfkit`: the command line, where its script is not on the path."""

from perfkit.cli import main

main()
