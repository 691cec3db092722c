#!/usr/bin/env bash
# Usage: report.sh RUN [OPTIONS OF report.py]
# Draws RUN/report.png of a run of m2teacher: its curves, and what its teacher finds alike.
# Environment: BIN (the trainer), PYTHON (with matplotlib and safetensors).
set -euo pipefail
run=$1
repository=$(cd "$(dirname "$0")/../.." && pwd)
BIN=${BIN:-$repository/build/bin/m2teacher}
PYTHON=${PYTHON:-$repository/.venv/bin/python}

"$BIN" neighbours --checkpoint "$run" --out "$run/neighbours.safetensors"
"$PYTHON" "$repository/apps/m2teacher/report.py" "$@"
