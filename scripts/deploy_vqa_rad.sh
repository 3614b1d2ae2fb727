#!/usr/bin/env bash
# A consortium on one machine: server, three sites that hold VQA-RAD's heads, chests and abdomens, TLS, keys; one site is killed.
#   scripts/deploy_vqa_rad.sh FOLDER_OF_VQA_RAD [WORK_FOLDER]
# Prints every command before it runs it; docs/deploy.md holds what it printed. Stops all that it started.
set -euo pipefail
data=$(realpath "$1"); work=${2:-$(mktemp -d)}; mkdir -p "$work"; cd "$work"
ln -sfn "$data" vqa_rad
export OMP_NUM_THREADS=1
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
run() { printf '$ %s\n' "$*"; "$@"; }
background() { local log=$1; shift; printf '$ %s > %s 2>&1 &\n' "$*" "$log"; "$@" >> "$log" 2>&1 & }
until_says() { for _ in $(seq 600); do grep -q "$2" "$1" 2>/dev/null && return; sleep 0.5; done; echo "nothing like '$2' in $1"; exit 1; }

run fedmllm server new server --host localhost --gate 127.0.0.1:9092
background server.log fedmllm server start server
until_says server.log 'SuperLink on'
for site in ABD CHEST HEAD; do
  run fedmllm site new "$site" --name "$site" --server 127.0.0.1:9092
  run cp server/ca.crt "$site/"
  printf '$ cat > %s/site.toml\n' "$site"
  tee "$site/site.toml" <<TOML
name = "$site"
server = "127.0.0.1:9092"
ca = "ca.crt"
key = "site.key"
column = "image_organ"   # of the one file on this machine, the rows of this site
value = "$site"
threads = 1

[data]
name = "vqa-rad"
root = "vqa_rad"

[backbone]
name = "tiny"

[allow]
max_steps = 20
max_rounds = 50
metrics = ["loss", "num_steps", "num_tokens", "time_s"]

[allow.settings]
"train.lr" = { max = 1e-2 }
"prompt.name" = ["plain", "agnostic"]
TOML
  run fedmllm server add server "$site" "$site/site.key.pub"
done
printf '$ cat > experiment.toml\n'
tee experiment.toml <<TOML
num_rounds = 8
cohort_size = 3

[data]                   # the server's own test rows
name = "vqa-rad"
root = "vqa_rad"

[partition]              # for the comparison in one process; real sites are what they are
name = "by-column"
column = "image_organ"

[backbone]
name = "tiny"

[aggregator]
name = "fedavg"

[train]
lr = 1e-3
batch_size = 4
accumulation = 1
max_steps = 8

[evaluate]
limit = 100

[engine]
name = "flower-sites"
min_sites = 2            # a round counts with two of three
round_timeout_s = 300
TOML
run fedmllm site check ABD/site.toml
run fedmllm site start ABD/site.toml --dry-run experiment.toml
for site in ABD CHEST HEAD; do background "$site.log" fedmllm site start "$site/site.toml"; declare "$site=$!"; done
background run.log fedmllm server run server experiment.toml --out out
runner=$!
until_says run.log 'round 2/8'
printf '$ kill -9 %s   # the process of site CHEST\n' "$CHEST"; kill -9 "$CHEST"
until_says run.log 'left out'
background CHEST.log fedmllm site start CHEST/site.toml
wait "$runner"
run cat run.log
run tail -n 3 CHEST.log
run ls out out/adapter
