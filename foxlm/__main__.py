"""``python -m foxlm``: the same as the ``foxlm`` command."""

from foxlm.cli import main

if __name__ == "__main__":
    main()
