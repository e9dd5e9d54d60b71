"""The command `python -m llmdpd.train`: see `llmdpd.cli.train`."""

from llmdpd.cli.train import main

if __name__ == "__main__":
    raise SystemExit(main())
