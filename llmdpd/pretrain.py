"""The command `python -m llmdpd.pretrain`: see `llmdpd.cli.pretrain`."""

from llmdpd.cli.pretrain import main

if __name__ == "__main__":
    raise SystemExit(main())
