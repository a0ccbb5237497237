#!/usr/bin/env bash
set -euo pipefail

help() {
  cat <<'HELP'
Runs a command of this project on all workers of a Cloud TPU, and again after each preemption, until it ends.

    ./launch_tpu.sh --name=red --zone=us-west4-a --type=v5litepod-16 --spot -- \
        redvillm_jax.train --config=configs/qwen.py --workdir=gs://BUCKET/run --config.data=gs://BUCKET/streams

The node is created, or used as it is when it exists. This checkout, with changes to files that git knows, is copied to
all workers and installed there, unless they have it already. Worker 0's log is shown, and another worker's log when that
worker fails. The run belongs to the pod: it goes on after Ctrl-C or a lost connection, and the same command follows it
again. A preempted node is deleted and created again. The exit code is the command's; 2 also means a mistake in the
launcher's options.

    --name=NAME      of the node
    --zone=ZONE      e.g. us-west4-a
    --type=TYPE      as gcloud calls it: v4-32, v5litepod-16, v5p-16, v6e-16
    --project=ID     gcloud's own setting if left out
    --spot           cheaper, and may be preempted
    --queued         wait in line for the node (a queued resource of the same name)
    --version=NAME   runtime version of the node, by default the one for JAX on that type
    --delete         delete the node when the command has ended, well or not
    --keep           keep it (the default): the next launch starts at once, but an idle node costs as much as a busy one
    --stop           instead of a command: stop the run on the node
    --dry-run        print the commands instead of running them, as if there were no such node

LAUNCH_TPU_POLL=15 is the number of seconds between two looks at the node's state, LAUNCH_TPU_PATIENCE=3600 the number
after which a state that does not change ends the launch; waiting in line, and for room in a zone, may take any time.
HELP
}

fail() { echo "error: $*" >&2 && exit 2; }
note() { echo "launch_tpu: $*" >&2; }

quoted() { # the words as one line for a shell, with quotes only where they are needed
  local word flag line="" quote="'\\''"
  for word; do
    flag="" && [[ $word =~ ^--[a-z_.-]+= ]] && flag=${BASH_REMATCH[0]}
    word=${word#"$flag"}
    [[ $word =~ ^[A-Za-z0-9_./:=@,+-]+$ ]] || word="'${word//\'/$quote}'"
    line+=" $flag$word"
  done
  echo "${line# }"
}

# --- The command line ---

name="" zone="" type="" project="" version="" spot="" queued="" delete="" stop="" dry_run=""
poll=${LAUNCH_TPU_POLL:-15} patience=${LAUNCH_TPU_PATIENCE:-3600}
while (($#)); do
  case $1 in
    -h | --help) help && exit ;;
    --name=?* | --zone=?* | --type=?* | --project=?* | --version=?*) key=${1%%=*} && declare "${key#--}=${1#*=}" ;;
    --name | --zone | --type | --project | --version | --*=) fail "$1: expected ${1%=}=VALUE (see --help)" ;;
    --spot) spot=--spot ;;
    --queued) queued=yes ;;
    --delete) delete=yes ;;
    --keep) delete="" ;;
    --stop) stop=yes ;;
    --dry-run) dry_run=yes ;;
    --) shift && break ;;
    -*) fail "unknown option $1: options come first, then --, then the command (see --help)" ;;
    *) fail "unexpected $1: write -- before the command, e.g. -- redvillm_jax.train --config=… (see --help)" ;;
  esac
  shift
done
[[ $poll =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "LAUNCH_TPU_POLL=$poll: expected a number of seconds, e.g. 15"
[[ $patience =~ ^[0-9]+$ ]] || fail "LAUNCH_TPU_PATIENCE=$patience: expected a whole number of seconds, e.g. 3600"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  fail "--name=$name: expected lower-case letters, digits and dashes, starting with a letter, e.g. --name=red"
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "--zone=$zone: expected a zone such as --zone=us-west4-a"
[[ $dry_run ]] || command -v gcloud > /dev/null || fail "no gcloud on PATH: https://cloud.google.com/sdk/docs/install"
where=("--zone=$zone" ${project:+"--project=$project"})
cd "$(dirname "$(readlink -f "$0")")"
if [[ ! $stop ]]; then
  [[ $type =~ ^v[0-9]+[a-z]*-[0-9]+$ ]] || fail "--type=$type: expected a slice such as --type=v5litepod-16"
  case $type in
    v5e-*) fail "--type=$type: gcloud's name for it is v5litepod-${type#*-}" ;;
    v4-*) : "${version:=tpu-ubuntu2204-base}" ;;
    v5litepod-*) : "${version:=v2-alpha-tpuv5-lite}" ;;
    v5p-*) : "${version:=v2-alpha-tpuv5}" ;;
    v6e-*) : "${version:=v2-alpha-tpuv6e}" ;;
  esac
  [[ $version ]] || fail "--type=$type: no runtime version is known for it, give one with --version=NAME"
  (($#)) || fail "no command: write it after --, e.g. -- redvillm_jax.train --config=… (see --help)"
  [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_.]*$ && (-e ${1//.//}.py || -e ${1//.//}/__main__.py) ]] ||
    fail "$1: expected a module of this checkout, without python -m, e.g. redvillm_jax.train"
  changed=$(git stash create 2> /dev/null) || fail "$PWD: expected a git checkout, its files go to the workers"
  tree=$(git rev-parse --short=12 "${changed:-HEAD}^{tree}") # the same content has the same name
  new=$(git ls-files --others --exclude-standard -- '*.py' | tr '\n' ' ')
  [[ ! $new ]] || note "not sent, because git does not know them: ${new% } (git add)"
  [[ " $* " != *" --workdir="* || $* == *--workdir=gs://* ]] ||
    note "--workdir lies on the node's own disk and is lost with the node: use gs://BUCKET/…"
fi

# --- The node ---

exec 3>&1 # where --dry-run prints, also from functions whose output is read
run() { if [[ $dry_run ]]; then quoted "$@" >&3; else "$@"; fi; }
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all "--command=$(quoted "$@")" --quiet
}

describe() { # KIND FIELD: the state; NONE when there is no such thing, UNKNOWN when gcloud cannot say
  local answer
  if answer=$(run gcloud compute tpus "$1" describe "$name" "${where[@]}" "--format=value($2)" 2>&1); then
    [[ ! $dry_run ]] || answer=NONE
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo NONE
  else
    note "${answer##*$'\n'}"
    echo UNKNOWN
  fi
}

look() {
  state=$(describe tpu-vm state)
  if [[ $queued && $state == NONE ]]; then state=$(describe queued-resources state.state); fi
}

gone() { [[ $state =~ ^(PREEMPTED|TERMINATED|SUSPENDING|SUSPENDED|NONE)$ ]]; }

create() {
  local what=(tpu-vm create "$name" "${where[@]}" "--accelerator-type=$type" "--version=$version") error
  if [[ $queued ]]; then
    what=(queued-resources create "$name" "${where[@]}" "--node-id=$name" "--accelerator-type=$type")
    what+=("--runtime-version=$version")
  fi
  note "creating $name ($type)"
  error=$(run gcloud compute tpus "${what[@]}" ${spot:+"$spot"} --quiet 2>&1 >&3) && return
  echo "$error" >&2
  [[ $error == *[Cc]apacity* ]] || retry
  note "$zone has no room for $type: trying again (--queued waits in line)"
  since=$SECONDS # of get_ready
}

delete() {
  if [[ $queued ]]; then
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  fi
}

# What fails at first is a mistake; hours later it is more likely the network, and somebody may be asleep.
retry() { ((attempt)) && note "trying again" && sleep "$poll" || exit 1; }

get_ready() { # brings the node to READY, whatever it is now
  local before="" since=$SECONDS
  while look && [[ $state != READY ]]; do
    if [[ $state != "$before" ]]; then
      note "$name: $state"
      before=$state since=$SECONDS
    else
      sleep "$poll"
      if [[ ! $state =~ ^(ACCEPTED|WAITING_FOR_RESOURCES|UNKNOWN)$ ]] && ((SECONDS - since >= patience)); then
        note "$name has been $state for $patience s: see what is wrong with gcloud, or delete it, then launch again"
        exit 1
      fi
    fi
    case $state in
      NONE) create ;;
      PREEMPTED | TERMINATED | SUSPENDED) delete || retry ;;
      UNKNOWN) retry ;;
      STOPPED | FAILED) note "start $name or delete it with gcloud, then launch again" && exit 1 ;;
      *) ;; # on its way
    esac
    [[ ! $dry_run ]] || return 0
  done
}

install() {
  on_workers grep -qsx "$tree" redvillm_jax/.launch/installed 2> /dev/null && [[ ! $dry_run ]] && return
  local archive
  note "installing on all workers"
  archive=$(git rev-parse --git-dir)/redvillm_jax-$tree.tgz
  run git archive --format=tar.gz "--output=$archive" "$tree" &&
    run gcloud compute tpus tpu-vm scp "$archive" launch_worker.sh "$name:" "${where[@]}" --worker=all --quiet &&
    on_workers bash launch_worker.sh install "$tree" &&
    run rm "$archive"
}

end_jobs() { # with all that they started
  local job
  for job in $jobs; do kill -- "-$job" 2> /dev/null || true; done
  jobs=""
}

run_there() { # ID COMMAND: ends with the command, or when the node is gone, which ssh can take long to notice
  local command code=0 there=(bash launch_worker.sh run "$1" "$tree" "${@:2}")
  [[ ! $dry_run ]] || { on_workers "${there[@]}" && return; }
  set -m # a process group for each
  on_workers "${there[@]}" < /dev/null &
  command=$! jobs=$!
  { while sleep "$poll" && look && ! gone; do :; done && kill -- "-$command" 2> /dev/null; } &
  jobs+=" $!"
  set +m
  wait "$command" 2> /dev/null || code=$?
  end_jobs
  return $code
}

was_lost() { # EXIT_CODE: whether the node is gone; its processes can end a while before its state tells
  local looks=4
  case $1 in
    2) looks=1 ;; # a mistake that the command itself has reported
    255) ;;       # the connection
    1[3-9]?)      # ended by a signal: so a preemption begins, minutes before the state may tell
      looks=20
      note "exit code $1 is a signal's: looking at $name $looks times, in case it is going away"
      ;;
  esac
  while look && ! gone; do
    ((looks -= 1)) || return 1
    sleep "$poll"
  done
}

# --- Run it ---

jobs="" id=$(date +%s)-$$ attempt=0 code=0
trap end_jobs EXIT
trap 'note "left: what runs on $name goes on, the same command follows it, --stop stops it" && exit 130' INT TERM
if [[ $stop ]]; then on_workers bash launch_worker.sh stop && exit; fi

while true; do
  get_ready
  ((attempt += 1))
  code=0
  install || code=$?
  if ((code)); then
    was_lost $code || { note "installing on $name failed, see above" && exit $code; }
  else
    while code=0 && { run_there "$id-$attempt" "$@" || code=$?; } && ((code)) && ! was_lost $code; do
      ((code == 255)) || [[ $state == UNKNOWN ]] || break
      note "the connection to $name is lost: trying again"
    done
    if ! ((code)) || ! gone; then break; fi
  fi
  note "$name is gone ($state) after attempt $attempt: starting again"
done
if [[ $delete ]]; then delete; else note "$name is kept and costs until: $(dry_run=yes delete 3>&1)"; fi
exit "$code"
