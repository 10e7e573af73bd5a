"""`python -m strixft` is `strixft`."""

from strixft.cli import main

if __name__ == "__main__":
    main()
