"""`python -m grpo_autotune`, and `torchrun ... -m grpo_autotune`: the same as the command `grpo-autotune`."""

import sys

from grpo_autotune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
