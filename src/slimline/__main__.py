"""``python -m slimline``."""

from slimline.cli import main

main()
