"""``python -m hf_dp`` is the program ``hf-dp``."""

from hf_dp.cli.main import main

if __name__ == "__main__":
    main()
