#!/usr/bin/env bash
# RLoop without DVC: the loop in the shell, to copy and change.
#
#   bash examples/loop.sh POLICY TRAIN VALID OUT [ITERATIONS]
#
# POLICY is a checkpoint directory or a hub id, TRAIN and VALID are files of problems (rloop prepare), OUT gets 1/rl,
# 1/examples.jsonl, 1/policy, 2/rl, ..., eval/ and report.html. Started again, also with more iterations, it goes on where
# it was; to make something anew, remove it first. The options of each stage can be set from outside:
#
#   RL="--steps 50" bash examples/loop.sh ...
set -euo pipefail
(($# >= 4)) || { echo "usage: bash $0 POLICY TRAIN VALID OUT [ITERATIONS]" >&2; exit 2; }
base=$1 train=$2 valid=$3 out=$4 iterations=${5:-3}

: "${LAUNCH=rloop}" # or: accelerate launch --config_file configs/accelerate/gpu8-fsdp2.yaml -m rloop_cli
: "${PROMPT=--template boxed --max-tokens 2048}" # the same in training and evaluation
: "${RL=--steps 200}"
: "${FILTER=--max-pass-rate 0.1}"
: "${RFT=--epochs 1}"
: "${EVAL=--num-samples 32 --k 8 --k 16 --k 32}"

# shellcheck disable=SC2086 # options are to be split
evaluate() { # NUMBER POLICY...
  local policies=() policy
  for policy in "${@:2}"; do policies+=(--policy "$policy"); done
  $LAUNCH eval "${policies[@]}" --problems "$valid" --out "$out/eval/$1" $PROMPT $EVAL
}

# shellcheck disable=SC2086
explore_and_tune() { # ITERATION START
  local here=$out/$1
  $LAUNCH rl --policy "$2" --problems "$train" --out "$here/rl" $PROMPT $RL
  [[ -e $here/examples.jsonl ]] || rloop filter --rollouts "$here/rl" --out "$here/examples.jsonl" $FILTER
  [[ -e $here/policy ]] || $LAUNCH rft --policy "$2" --examples "$here/examples.jsonl" --out "$here/policy" $RFT
}

evaluate 0 "$base"
start=$base
for ((i = 1; i <= iterations; i++)); do
  explore_and_tune "$i" "$start"
  start=$out/$i/policy
  evaluate "$i" "$out/$i/rl/checkpoints" "$start"
done
rloop report --runs "$out"
