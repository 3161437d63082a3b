"""`python -m reprune`."""

from reprune.cli import main

main()
