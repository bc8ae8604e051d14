"""``python -m tvmtrain``: the command line where no script was installed."""

from tvmtrain.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
