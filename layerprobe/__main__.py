"""`python -m layerprobe`, the same as the command `layerprobe`."""

from layerprobe.cli.main import main

if __name__ == "__main__":
    main()
