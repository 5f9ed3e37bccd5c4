"""Run the command line with ``python -m lorabridge``."""

from lorabridge.commands import main

if __name__ == "__main__":
    main()
