"""`python -m strixft` is `strixft`."""

from strixft.app.cli import main

if __name__ == "__main__":
    main()
