#!/bin/sh
# An adapter added to its base: a .pth like any other, which every RWKV program loads.
#   sh examples/merge.sh [BASE ADAPTER OUT]
set -e
BASE=${1:-src/rwkv_peft/assets/tiny/model.pth}
ADAPTER=${2:-runs/lora/adapter}
OUT=${3:-runs/lora/merged.pth}

rwkv-peft merge "$BASE" "$ADAPTER" "$OUT"   # several adapters may stand there: each adds its own change
rwkv-peft generate --model "$OUT" --prompt 'User: Two red apples for Ann, please.\n\nAssistant:' --temperature 0

# Without merging, the same:  rwkv-peft generate --model BASE --adapter ADAPTER [--adapter ANOTHER] --prompt …
