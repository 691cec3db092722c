#!/usr/bin/env bash
# Trains a teacher on Fashion-MNIST, evaluates it, times its layers and draws a report.
# Environment: OUT (folder of the run; a run that it holds is replaced), BIN (the trainer), PYTHON (with matplotlib and
# safetensors), DATA (folder of the data set; unset: where Debian's package dataset-fashion-mnist puts it).
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=${OUT:-runs/demo}
BIN=${BIN:-build/bin/m2teacher}
PYTHON=${PYTHON:-.venv/bin/python}
export BIN PYTHON
data=(${DATA:+--data "idx:$DATA"})
recipe=apps/m2teacher/recipes/fashion_mnist.toml

echo "== Training a student and its momentum teacher, without labels =="
"$BIN" pretrain --config "$recipe" "${data[@]}" --out "$OUT" --overwrite
"$BIN" compare --checkpoint "$OUT" >"$OUT/accuracy.md"
"$BIN" time-layers --recipe "$recipe" "${data[@]}" >"$OUT/time.md"
bash apps/m2teacher/report.sh "$OUT" >/dev/null \
  --class-names T-shirt,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Boot

echo
echo "== What the encoders have learnt (kNN and linear probes on frozen features) =="
cat "$OUT/accuracy.md"
echo
echo "== What the layer costs =="
cat "$OUT/time.md"
echo
echo "Picture: $OUT/report.png"
