"""The command `python -m llmdpd.data`: see `llmdpd.cli.data`."""

import importlib

if __name__ == "__main__":
    # By its name, as `llmdpd.__main__` does it: this package stands below the commands and imports none of them.
    raise SystemExit(importlib.import_module("llmdpd.__main__").run("data"))
