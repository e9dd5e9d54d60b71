"""The command `python -m llmdpd.collect`: see `llmdpd.cli.collect`."""

from llmdpd.cli.collect import main

if __name__ == "__main__":
    raise SystemExit(main())
