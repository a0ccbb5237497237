#!/usr/bin/env bash
set -euo pipefail

help() {
  cat <<'HELP'
Compares this project's model with the published PyTorch model, stage by stage, on one picture, one clip and one text.

    bash benchmarks/real_weights.sh MODEL [WORKDIR] [options]

Downloads the published files, makes the virtual environments, and runs `python -m conversion.compare`, which converts
the weights, runs the PyTorch model and this one, and prints one table (also WORKDIR/table-FRAMES.txt). Exit code 1 when
a stage is over its limit, 2 for a mistake in the command. Downloads and conversion are not made again.
All in fp32 on the CPU: memory for four bytes a parameter and a half more, Linux, Python 3.11. Disk, without the
environments (5 GB each), is twice the download:

    MODEL                 download  licence           repository
    llava-1.5              14.1 GB  Llama 2           llava-hf/llava-1.5-7b-hf
    llava-v1               15.2 GB  Apache-2.0, LLaMA mmaaz60/LLaVA-7B-Lightening-v1-1, openai/clip-vit-large-patch14
    qwen-vl                19.3 GB  Tongyi Qianwen    Qwen/Qwen-VL-Chat; its own code runs under transformers 4.32
    llava-next-mistral     15.1 GB  Apache-2.0        llava-hf/llava-v1.6-mistral-7b-hf
    llava-next-vicuna      14.1 GB  Llama 2           llava-hf/llava-v1.6-vicuna-7b-hf
    llava-next-llama3      16.7 GB  Llama 3           llava-hf/llama3-llava-next-8b-hf
    llava-onevision-0.5b    1.8 GB  Apache-2.0        llava-hf/llava-onevision-qwen2-0.5b-si-hf
    llava-onevision-7b     16.1 GB  Apache-2.0        llava-hf/llava-onevision-qwen2-7b-si-hf
    smolvlm-256m            0.5 GB  Apache-2.0        HuggingFaceTB/SmolVLM-256M-Instruct
    smolvlm-500m            1.0 GB  Apache-2.0        HuggingFaceTB/SmolVLM-500M-Instruct
    smolvlm-2.2b            4.5 GB  Apache-2.0        HuggingFaceTB/SmolVLM-Instruct
    gemma3-4b               8.6 GB  Gemma terms       google/gemma-3-4b-it, after accepting its terms
    gemma3-12b             24.4 GB  Gemma terms       google/gemma-3-12b-it, after accepting its terms
    medgemma-4b             8.6 GB  Health AI terms   google/medgemma-4b-it, after accepting its terms

WORKDIR is real_weights/MODEL by default.

    --source=FOLDER       a published folder that is here already: nothing is downloaded
    --vision=FOLDER       the CLIP folder that belongs to --source, when it is published apart (llava-v1)
    --frames=9            frames of the clip, a square number
    --limit=1e-3          largest allowed |a-b| / max(|b|, root mean square of the stage)
    --python=PYTHON       a Python that has this project with its extra [convert]: no environment is made
    --qwen-python=PYTHON  a Python with the packages of Qwen-VL's code: no environment is made for it

Revisions are pinned in this script for llava-1.5, qwen-vl, llava-next-mistral, smolvlm-256m, gemma3-4b and the CLIP of
llava-v1. None could be established for the others: the newest is taken. The commit of every download is written to
REVISION next to its files, and later runs keep it.
HELP
}

fail() {
  echo "error: $*" >&2
  exit 2
}

# absolute PROGRAM: the same program from every folder (a virtual environment's link must not be followed)
absolute() { if [[ $1 == */* ]]; then realpath -ms "$1"; else echo "$1"; fi; }

# The commits that public code names for these repositories.
revision_llava_15=b234b804b114d9e37bb655e11cbbb5f5e971b7a9
revision_clip=32bd64288804d66eefd0ccbe215aa642df71cc41
revision_qwen_vl=f57cfbd358cb56b710d963669ad1bcfb44cdcdd8
revision_next_mistral=2424fdd47412fccc66d91719126b420e9fbd7065
revision_smolvlm_256m=7e3e67edbbed1bf9888184d9df282b700a323964
revision_gemma3_4b=093f9f388b31de276ce2de164bdc2081324b9767

model="" workdir="" source="" vision="" frames=9 limit=1e-3 python="" qwen_python=""
for argument in "$@"; do
  case $argument in
    -h | --help) help && exit ;;
    --source=*) source=$(realpath -m "${argument#*=}") ;;
    --vision=*) vision=$(realpath -m "${argument#*=}") ;;
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
repository="" revision=main files=('*.json' '*.jinja' '*.safetensors' tokenizer.model)
case $model in
  llava-1.5) repository=llava-hf/llava-1.5-7b-hf revision=$revision_llava_15 ;;
  llava-v1)
    repository=mmaaz60/LLaVA-7B-Lightening-v1-1
    files=('*.json' '*.bin' tokenizer.model)
    ;;
  qwen-vl)
    repository=Qwen/Qwen-VL-Chat revision=$revision_qwen_vl
    files=('*.json' '*.py' '*.tiktoken' '*.bin')
    ;;
  llava-next-mistral) repository=llava-hf/llava-v1.6-mistral-7b-hf revision=$revision_next_mistral ;;
  llava-next-vicuna) repository=llava-hf/llava-v1.6-vicuna-7b-hf ;;
  llava-next-llama3) repository=llava-hf/llama3-llava-next-8b-hf ;;
  llava-onevision-0.5b) repository=llava-hf/llava-onevision-qwen2-0.5b-si-hf ;;
  llava-onevision-7b) repository=llava-hf/llava-onevision-qwen2-7b-si-hf ;;
  smolvlm-256m) repository=HuggingFaceTB/SmolVLM-256M-Instruct revision=$revision_smolvlm_256m ;;
  smolvlm-500m) repository=HuggingFaceTB/SmolVLM-500M-Instruct ;;
  smolvlm-2.2b) repository=HuggingFaceTB/SmolVLM-Instruct ;;
  gemma3-4b) repository=google/gemma-3-4b-it revision=$revision_gemma3_4b ;;
  gemma3-12b) repository=google/gemma-3-12b-it ;;
  medgemma-4b) repository=google/medgemma-4b-it ;;
  "") fail "which model? (see --help)" ;;
  *) fail "unknown model $model (see --help)" ;;
esac
[[ -z $source || -d $source ]] || fail "$source: not a folder; --source takes a published folder"
[[ -z $vision || -d $vision ]] || fail "$vision: not a folder; --vision takes a CLIP folder"
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
  download "$repository" "$source" "$revision" "${files[@]}"
  if [[ $model == llava-v1 ]]; then
    vision=$workdir/clip-vit-large-patch14
    download openai/clip-vit-large-patch14 "$vision" "$revision_clip" config.json model.safetensors
  fi
fi

options=()
if [[ $model == qwen-vl ]]; then
  if [[ -z $qwen_python ]]; then
    environment "$workdir/venv-qwen" torch==2.13.0 torchvision transformers==4.32.0 'numpy<2' accelerate==1.15.0 \
      tiktoken einops transformers_stream_generator==0.0.4 matplotlib pillow requests
    qwen_python=$workdir/venv-qwen/bin/python
  fi
  options+=(--python="$qwen_python" --trust_remote_code)
fi
[[ -z $vision ]] || options+=(--vision="$vision")
tokenizer=(--without_tokenizer) # arbitrary ids serve where a folder has none
for name in tokenizer.json tokenizer.model qwen.tiktoken; do [[ ! -f $source/$name ]] || tokenizer=(); done

step "comparing"
"$python" -m conversion.compare --source="$source" --base="$workdir/base" --frames="$frames" --limit="$limit" \
  "${options[@]}" "${tokenizer[@]}" | tee "$workdir/table-$frames.txt"
