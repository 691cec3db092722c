#!/usr/bin/env bash
# Trains a teacher on Fashion-MNIST, evaluates it, times its layers and draws a report.
# Environment: OUT (folder of the run), BIN (the trainer), PYTHON (with matplotlib and safetensors), DATA (folder of the
# data set; unset: where Debian's package dataset-fashion-mnist puts it).
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=${OUT:-runs/demo}
BIN=${BIN:-build/bin/m2teacher}
PYTHON=${PYTHON:-.venv/bin/python}
data=(${DATA:+--data "idx:$DATA"})

echo "== Training a student and its momentum teacher, without labels =="
"$BIN" pretrain "${data[@]}" --out "$OUT"
checkpoint=$OUT/checkpoint.safetensors
"$BIN" neighbours "${data[@]}" --checkpoint "$checkpoint" --out "$OUT/neighbours.safetensors"
"$BIN" compare "${data[@]}" --checkpoint "$checkpoint" >"$OUT/accuracy.md"
"$BIN" time-layers "${data[@]}" >"$OUT/time.md"
"$PYTHON" apps/m2teacher/report.py "$OUT" >/dev/null

echo
echo "== What the encoders have learnt (kNN and linear probes on frozen features) =="
cat "$OUT/accuracy.md"
echo
echo "== What the layer costs =="
cat "$OUT/time.md"
echo
echo "Picture: $OUT/report.png"
