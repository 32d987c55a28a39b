#!/bin/sh
# What was asked for, how far it came and why no further. No secret is among the parameters.
set -eu
echo "parameters"
marina pipeline check | sed 's/^/  /'
echo "steps"
for step in $MARINA_STATUSES; do echo "  $step"; done
if [ -e device ]; then echo "trained on: $(cat device)"; fi
if [ -e gate.txt ]; then echo "gate: $(cat gate.txt)"; else echo "gate: not reached"; fi
if [ -e archive.id ]; then
  echo "archive: $MARINA_MODEL_NAME $(cat version), in the store as $(cat archive.id)"
else
  echo "archive: none was pushed, and no tag was moved"
fi
