"""`python -m grpo_autotune`, and `torchrun ... -m grpo_autotune`: the same as the command `grpo-autotune`."""

import sys

from grpo_autotune.cli.main import main

if __name__ == "__main__":
    words = sys.argv[1:]
    if words and words[0].startswith("--local_rank="):  # the `deepspeed` launcher says it there and in LOCAL_RANK
        words = words[1:]
    sys.exit(main(words))
