# What the loop starts from: a base policy, 48 training problems and the evaluation sets, in a new directory.
#
#     bash -eu start.sh SEED NUM_TRAIN OUT
#
# Half of the problems like those trained on select the checkpoint (select.jsonl), the other half tests (valid.jsonl).
rloop toy --out "$3/toy" --seed "$1" --num-test 200
mv "$3/toy/policy" "$3/policy"
mkdir "$3/sets"
head -n "$2" "$3/toy/train.jsonl" >"$3/train.jsonl"
head -n 100 "$3/toy/valid.jsonl" >"$3/sets/select.jsonl"
tail -n +101 "$3/toy/valid.jsonl" >"$3/sets/valid.jsonl"
for name in prec paren long; do head -n 100 "$3/toy/$name.jsonl" >"$3/sets/$name.jsonl"; done
