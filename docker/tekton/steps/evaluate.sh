#!/bin/sh
# Through the very preprocessing and postprocessing that serves, on the split that was held out.
set -eu
marina evaluate run --data data --output evaluation
