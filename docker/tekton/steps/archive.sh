#!/bin/sh
# What is served; it is written only when it answers its golden pictures as it must. What it is compared with later, to
# see whether the world has changed, are the pictures that it was evaluated on.
set -eu
marina archive build run --output archive.mar --baseline data
