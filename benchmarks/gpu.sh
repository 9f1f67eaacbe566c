#!/usr/bin/env bash
# Everything about the GPU kernels in one command, in under eight minutes:
#   bash benchmarks/gpu.sh [--only build|tests|sanitize|bench] [--rehearse] FOLDER
# Builds in place for the GPU that is there, tests the backends triton and cuda, has compute-sanitizer look at a few of
# these tests, measures every operator and, with transformers and peft, a whole step. Logs, JSON lines and summary.txt go
# to FOLDER. Needs no network and no virtual environment: it uses `python3` (or $PYTHON), with torch, triton, pytest and
# numpy, and nvcc.
# --rehearse does the same without a GPU: Triton interpreted, CUDA emulated on the CPU, small shapes.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} only="" rehearse="" folder=""
while [ $# -gt 0 ]; do
  case $1 in
    --only) only=$2; shift ;;
    --rehearse) rehearse=--rehearse ;;
    -*) echo "unknown option $1" >&2; exit 2 ;;
    *) folder=$1 ;;
  esac
  shift
done
case $only in "" | build | tests | sanitize | bench) ;; *) echo "--only takes build, tests, sanitize or bench" >&2; exit 2 ;; esac
[ -n "$folder" ] || { echo "usage: bash benchmarks/gpu.sh [--only PART] [--rehearse] FOLDER" >&2; exit 2; }
mkdir -p "$folder"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

build() {  # without pyproject.toml, which older setuptools cannot read
  rm -rf build/gpu && mkdir -p build/gpu/vqfast && cp setup.py build/gpu && ln -s ../../csrc build/gpu/csrc &&
    (cd build/gpu && "$python" setup.py -q build_ext --inplace) && cp build/gpu/vqfast/*.so vqfast/
}
export python
export -f build

part() {  # part NAME SECONDS COMMAND...: unless another part alone was asked for
  local name=$1 seconds=$2; shift 2
  [ -z "$only" ] || [ "$only" = "$name" ] || return 0
  local start=$SECONDS status=0
  timeout -s INT -k 15 "$seconds" "$@" >>"$folder/$name.log" 2>&1 || status=$?  # interrupted, so that both still report
  [ $status = 0 ] || failed=1
  {
    echo "$name: $([ $status = 0 ] && echo passed || echo "FAILED ($status)") in $((SECONDS - start)) s, $name.log"
    [ "$name" = bench ] || grep -E "^(FAILED|ERROR)|[0-9]+ (passed|failed)|error:|ERROR SUMMARY" "$folder/$name.log" | tail -25
  } | tee -a "$folder/summary.txt"
}

[ -n "$only" ] || rm -f "$folder"/{summary.txt,build.log,tests.log,sanitize.log,bench.log}
several=()
"$python" -c "import xdist" 2>/dev/null && several=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")  # Triton compiles on every core
if [ -n "$rehearse" ]; then
  export TRITON_INTERPRET=1
  VQFAST_EMULATED_CUDA=$("$python" tests/emulation/build.py) || exit 1
  export VQFAST_EMULATED_CUDA
  quick=(-k "(triton or cuda) and not test_without_gpu and float64 and bfloat16 and (k7r1 or rows or tokens or one_position or own)")
else
  capability=$("$python" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())") || exit 1
  [ "$capability" != 90 ] || capability=90a
  export VQFAST_BUILD=cuda VQFAST_CUDA_ARCHITECTURES=$capability
  part build 90 bash -c build
  quick=(-k "(triton or cuda or test_gpu or test_graph) and not test_without_gpu")
fi
export VQFAST_REQUIRE=cuda,triton
part tests 150 "$python" -m pytest -q -p no:cacheprovider "${several[@]}" tests/ops tests/tuning/test_graph.py "${quick[@]}"
if [ -z "$rehearse" ] && command -v compute-sanitizer >/dev/null; then
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    part sanitize 45 compute-sanitizer --tool $tool --error-exitcode 9 "$python" -m pytest -q -p no:cacheprovider \
      tests/ops/test_generic.py -k "cuda and float64 and bfloat16 and (k7r1 or tokens)"
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi
part bench 90 "$python" -m benchmarks.gpu $rehearse --seconds 65 "$folder"
if "$python" -c "import peft, transformers" 2>/dev/null; then
  part bench 60 "$python" -m benchmarks.gpu_step $rehearse "$folder"
else
  echo "bench: no peft or transformers: the whole step is not measured" | tee -a "$folder/summary.txt"
fi
[ -n "$only" ] && [ "$only" != bench ] || sed -n '/^operator /,$p' "$folder/bench.log" | tee -a "$folder/summary.txt"
exit $failed
