"""``python -m foxlm``: the same as the ``foxlm`` command."""

from foxlm.cli.app import main

if __name__ == "__main__":
    main()
