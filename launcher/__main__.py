"""`python -m launcher` is `baton`."""

from launcher.cli import main

main()
