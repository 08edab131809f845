"""``python -m tutelage``, which launchers of several processes call."""

from tutelage.cli import main

main()
