"""`python -m minigrpo`: the same as `minigrpo`, where that is not on the PATH, and for torchrun."""

from minigrpo.commands import main

if __name__ == "__main__":
    main()
