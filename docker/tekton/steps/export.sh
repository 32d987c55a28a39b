#!/bin/sh
# The network alone, for programs that do without TorchServe; and the recipe says what executes it in the archive.
set -eu
if [ "$MARINA_BACKEND" = torch ]; then
  echo "backend is torch: the weights are all there is to export"
  exit 0
fi
marina pipeline recipe run --backend "$MARINA_BACKEND"
rm -rf run/export
marina export run --output run/export
