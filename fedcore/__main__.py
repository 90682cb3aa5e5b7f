"""The command line as `python -m fedcore`."""

from fedcore.cli import main

main()
