"""`python -m rwkv_peft` is `rwkv-peft`."""

import sys

from .cli import main

sys.exit(main())
