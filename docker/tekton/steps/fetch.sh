#!/bin/sh
# The parameters and the store checked; data set and weights from the store. With demo_pictures, drawn ones are pushed first.
set -eu
marina pipeline check > /dev/null
if [ -n "$MARINA_S3_ENDPOINT" ]; then export AWS_ENDPOINT_URL="$MARINA_S3_ENDPOINT"; fi
marina store check

# Nothing of another run, where a volume has served one before.
rm -rf drawn raw data weights live run evaluation live-evaluation archive.mar version device gpu gate.txt run.id archive.id

# Digits and dots, higher with every run: a server takes no other content under a version that it has.
printf '%s\n' "${MARINA_MODEL_VERSION:-$(date -u +1.%Y%m%d.%H%M%S)}" > version

if [ "$MARINA_DEMO_PICTURES" -gt 0 ]; then
  marina data draw --output drawn --pictures "$MARINA_DEMO_PICTURES" --seed "$MARINA_SEED"
  marina store push drawn --name "${MARINA_DATASET%@*}"
fi

# A data set that was pushed as a folder becomes `raw`, and a zip a file in it.
mkdir raw
marina store pull "$MARINA_DATASET" --kind datasets --output raw
if [ -n "$MARINA_WEIGHTS" ]; then
  mkdir weights
  marina store pull "$MARINA_WEIGHTS" --kind weights --output weights
fi
if [ -n "$MARINA_LIVE" ]; then
  mkdir live
  marina store pull "$MARINA_LIVE" --kind runs --output live
fi
