"""`python train.py …` takes the original program's flags; docs/migration.md says what each means."""

import sys

from rwkv_peft.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
