#!/bin/sh
# What is served; it is written only when it answers its golden pictures as it must.
set -eu
marina archive build run --output archive.mar
