#!/bin/sh
# Trains the step in artifact/ with what is in this folder alone; options go to the runner: ./train.sh --data FILE [--help]
here=$(cd "$(dirname "$0")" && pwd) || exit 1
exec "$here/bin/tvmtrain-run" "$here/artifact" "$@"
