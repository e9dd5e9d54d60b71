"""The command `python -m llmdpd.report`: see `llmdpd.cli.report`."""

from llmdpd.cli.report import main

if __name__ == "__main__":
    raise SystemExit(main())
