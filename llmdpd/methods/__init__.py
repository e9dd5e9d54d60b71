"""One file or folder for each method: configuration, network, losses, preset, checks, registration."""
