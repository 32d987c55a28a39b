#!/bin/sh
# The data set checked, copies merged, split, in one layout.
set -eu
source=raw
for zip in raw/*.zip; do
  if [ -e "$zip" ]; then source=$zip; fi
done
set -f
set -- --source "$source" --output data --replace --seed "$MARINA_SEED"
if [ -n "$MARINA_MAX_SIDE" ]; then set -- "$@" --max-side "$MARINA_MAX_SIDE"; fi
if [ -n "$MARINA_SPLIT" ]; then
  # shellcheck disable=SC2086  # three numbers
  set -- "$@" --split $MARINA_SPLIT
fi
marina data prepare "$@"
