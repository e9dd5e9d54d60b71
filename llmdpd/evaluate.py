"""The command `python -m llmdpd.evaluate`: see `llmdpd.cli.evaluate`."""

from llmdpd.cli.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
