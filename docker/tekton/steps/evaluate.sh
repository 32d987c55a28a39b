#!/bin/sh
# Through the very preprocessing and postprocessing that serves, on the split that was held out.
set -eu
marina evaluate run --data data --output evaluation
if [ -n "$MARINA_LIVE" ]; then
  echo "the model that serves now, on the same pictures"
  marina evaluate live --data data --output live-evaluation
fi
