#!/bin/sh
# Trains in `run`, goes on with a training that was stopped, and puts the version into its recipe.
set -eu
if [ -e run/summary.json ]; then
  echo "run has ended already"
elif [ -e run/last.ckpt ]; then
  marina train --resume run
else
  rm -rf run
  set -- --data data --output run --name "$MARINA_MODEL_NAME" --license "$MARINA_LICENSE" \
    --definition "$MARINA_DEFINITION" --model-size "$MARINA_MODEL_SIZE" --epochs "$MARINA_EPOCHS" \
    --batch "$MARINA_BATCH" --patience "$MARINA_PATIENCE" --seed "$MARINA_SEED"
  if [ -n "$MARINA_SIZE" ]; then set -- "$@" --size "$MARINA_SIZE"; fi
  if [ -n "$MARINA_WEIGHTS" ]; then set -- "$@" --weights weights/*; fi
  if [ -n "$MARINA_LIVE" ]; then set -- "$@" --weights live/best.safetensors; fi
  # Never `auto`, which would take the CPU in silence.
  if [ "$(cat device)" = gpu ]; then set -- "$@" --devices 0; else set -- "$@" --devices cpu; fi
  marina train "$@"
fi
marina pipeline recipe run --version "$(cat version)"
