#!/usr/bin/env bash
set -euo pipefail

help() {
  cat <<'HELP'
Compares this project's model with the published PyTorch model, stage by stage, on one picture and one clip.

    bash benchmarks/real_weights.sh llava-1.5|llava-v1|qwen-vl [WORKDIR] [options]

Downloads the published files, makes the virtual environments, converts the weights, runs the PyTorch model, runs
this one, and prints one table (also WORKDIR/table-FRAMES.txt). Exit code 1 when an array is over its limit, 2 for
a mistake in the command. Finished parts are not made again, so the same command continues where it stopped.
All in fp32 on the CPU: 64 GB of memory, Linux, Python 3.11. Disk without the environments (5 GB each):

    llava-1.5   28 GB   llava-hf/llava-1.5-7b-hf
    llava-v1    29 GB   mmaaz60/LLaVA-7B-Lightening-v1-1 and openai/clip-vit-large-patch14
    qwen-vl     39 GB   Qwen/Qwen-VL-Chat; its own code runs under transformers 4.32 in a second environment

WORKDIR is real_weights/MODEL by default.

    --source=FOLDER       a published folder that is here already: nothing is downloaded
    --vision=FOLDER       the CLIP folder that belongs to --source, when it is published apart (llava-v1)
    --frames=9            frames of the clip, a square number
    --limit=1e-3          largest allowed |a-b| / max(1, |b|)
    --dump=FILE           compare with these arrays (an .npz of benchmarks.dump_torch) instead of running PyTorch
    --python=PYTHON       a Python that has this project with its extra [convert]: no environment is made
    --qwen-python=PYTHON  a Python with the packages of Qwen-VL's code: no environment is made for it

Revisions are pinned in this script, except for mmaaz60/LLaVA-7B-Lightening-v1-1, for which none could be established:
the newest is taken. The commit of every download is written to REVISION next to its files, and later runs keep it.
HELP
}

fail() {
  echo "error: $*" >&2
  exit 2
}

# absolute PROGRAM: the same program from every folder (a virtual environment's link must not be followed)
absolute() { if [[ $1 == */* ]]; then realpath -ms "$1"; else echo "$1"; fi; }

# The commits that public code names for these repositories; "main" where none could be established.
revision_llava_15=b234b804b114d9e37bb655e11cbbb5f5e971b7a9
revision_llava_v1=main
revision_clip=32bd64288804d66eefd0ccbe215aa642df71cc41
revision_qwen_vl=f57cfbd358cb56b710d963669ad1bcfb44cdcdd8

model="" workdir="" source="" vision="" frames=9 limit=1e-3 dump="" python="" qwen_python=""
for argument in "$@"; do
  case $argument in
    -h | --help) help && exit ;;
    --source=*) source=$(realpath -m "${argument#*=}") ;;
    --vision=*) vision=$(realpath -m "${argument#*=}") ;;
    --dump=*) dump=$(realpath -m "${argument#*=}") ;;
    --frames=*) frames=${argument#*=} ;;
    --limit=*) limit=${argument#*=} ;;
    --python=*) python=$(absolute "${argument#*=}") ;;
    --qwen-python=*) qwen_python=$(absolute "${argument#*=}") ;;
    -*) fail "unknown option $argument (see --help)" ;;
    *)
      [[ -z $workdir ]] || fail "$argument is one argument too many (see --help)"
      if [[ -z $model ]]; then model=$argument; else workdir=$argument; fi
      ;;
  esac
done
case $model in
  llava-1.5 | llava-v1) family=llava ;;
  qwen-vl) family=qwen_vl ;;
  "") fail "which model: llava-1.5, llava-v1 or qwen-vl (see --help)" ;;
  *) fail "unknown model $model, expected llava-1.5, llava-v1 or qwen-vl" ;;
esac
[[ -z $source || -d $source ]] || fail "$source: not a folder; --source takes a published folder"
[[ -z $vision || -d $vision ]] || fail "$vision: not a folder; --vision takes a CLIP folder"
[[ -z $dump || -f $dump ]] || fail "$dump: not a file; --dump takes an .npz of benchmarks.dump_torch"
workdir=$(realpath -m "${workdir:-real_weights/$model}")
mkdir -p "$workdir"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

step() { echo "== $*" >&2; }

# environment FOLDER PACKAGE...: a virtual environment with these packages, made once
environment() {
  local folder=$1
  shift
  [[ -f $folder/whole ]] && return
  step "making $folder"
  "$(command -v python3.11 || command -v python3)" -m venv --clear "$folder"
  "$folder/bin/pip" install --quiet "$@"
  touch "$folder/whole"
}

# download REPOSITORY FOLDER REVISION PATTERN...: these files of a repository, and its commit in REVISION
download() {
  local repository=$1 folder=$2 revision=$3 patterns=()
  shift 3
  for pattern in "$@"; do patterns+=(--include "$pattern"); done
  [[ -f $folder/REVISION ]] && revision=$(<"$folder/REVISION")
  step "downloading $repository at $revision"
  "$hf" download "$repository" --revision "$revision" --local-dir "$folder" "${patterns[@]}" >&2
  head -n 1 "$folder/.cache/huggingface/download/config.json.metadata" >"$folder/REVISION"
  step "$repository is at commit $(<"$folder/REVISION")"
}

if [[ -z $python ]]; then
  environment "$workdir/venv" -e '.[convert]'
  python=$workdir/venv/bin/python
fi

if [[ -z $source ]]; then
  hf=$(dirname "$python")/hf
  source=$workdir/published
  case $model in
    llava-1.5) download llava-hf/llava-1.5-7b-hf "$source" "$revision_llava_15" '*.json' '*.safetensors' tokenizer.model ;;
    llava-v1)
      download mmaaz60/LLaVA-7B-Lightening-v1-1 "$source" "$revision_llava_v1" '*.json' '*.bin' tokenizer.model
      vision=$workdir/clip-vit-large-patch14
      download openai/clip-vit-large-patch14 "$vision" "$revision_clip" config.json model.safetensors
      ;;
    qwen-vl) download Qwen/Qwen-VL-Chat "$source" "$revision_qwen_vl" '*.json' '*.py' '*.tiktoken' '*.bin' ;;
  esac
fi

tokenizer=--without_tokenizer # arbitrary ids serve where a folder has none
for name in tokenizer.json tokenizer.model qwen.tiktoken; do [[ -f $source/$name ]] && tokenizer=""; done

step "converting $source"
"$python" -m conversion.from_torch --family=$family --source="$source" ${vision:+--vision="$vision"} $tokenizer \
  --out="$workdir/base" >&2

if [[ -z $dump ]]; then
  inputs=$workdir/inputs-$frames.npz dump=$workdir/torch-$frames.npz
  "$python" -m benchmarks.make_inputs --base="$workdir/base" --frames="$frames" --out="$inputs"
  if [[ ! -f $dump ]]; then
    runner=$python
    if [[ $family == qwen_vl ]]; then
      if [[ -z $qwen_python ]]; then
        environment "$workdir/venv-qwen" torch==2.13.0 torchvision transformers==4.32.0 'numpy<2' accelerate==1.15.0 \
          tiktoken einops transformers_stream_generator==0.0.4 matplotlib pillow requests
        qwen_python=$workdir/venv-qwen/bin/python
      fi
      runner=$qwen_python
    fi
    step "running the PyTorch model"
    "$runner" -m benchmarks.dump_torch --family=$family --source="$source" ${vision:+--vision="$vision"} \
      --inputs="$inputs" --out="$dump" >&2 || fail "the PyTorch model did not run, see above"
  fi
fi

step "comparing"
"$python" -m benchmarks.compare_stages --base="$workdir/base" --reference="$dump" --limit="$limit" |
  tee "$workdir/table-$frames.txt"
