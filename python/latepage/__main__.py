"""`python -m latepage` is the command `latepage`."""

from latepage.cli import main

if __name__ == "__main__":
    main()
