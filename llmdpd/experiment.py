"""The command `python -m llmdpd.experiment`: see `llmdpd.cli.experiment`."""

from llmdpd.cli.experiment import main

if __name__ == "__main__":
    raise SystemExit(main())
