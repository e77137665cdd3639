"""`python -m minigrpo`, which is `minigrpo` where scripts are not on the PATH; torchrun starts it so, too."""

from minigrpo.commands import main

if __name__ == "__main__":
    main()
