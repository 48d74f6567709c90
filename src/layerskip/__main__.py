"""``python -m layerskip``: the command line, without an installed script."""

from layerskip.cli import main

if __name__ == "__main__":
    main()
