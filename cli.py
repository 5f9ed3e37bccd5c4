"""Run the lorabridge command line from a checkout."""

from lorabridge.commands import main

if __name__ == "__main__":
    main()
