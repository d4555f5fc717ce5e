"""python -m amphista: the command line."""

from amphista.cli.app import main

main()
