"""`python -m orthomerge`."""

from orthomerge.cli import main

if __name__ == "__main__":
    main()
