#!/usr/bin/env bash
# First ten minutes on a GPU: tests, scripts, benchmarks, CIFAR-10; writes OUT/gpu.md, ready for results/.
#
#     benchmarks/gpu.sh [OUT]                                       # OUT: gpu_report by default
#     PYTHON=python3 CIFAR10=DIR benchmarks/gpu.sh out              # DIR/{train,test}/<class>/*
#     STAGES="objective knn" benchmarks/gpu.sh out                  # some stages alone
#
# Without a GPU it is a rehearsal on the CPU, with tiny sizes, in a few minutes. A stage that fails or outlasts
# its time limit is recorded, and the others go on. OUT/*.txt hold the whole output of every stage.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
OUT=$(realpath -m "${1:-gpu_report}") PYTHON=${PYTHON:-python} ROWS=()
[ -x "$(command -v "$PYTHON")" ] || { echo "error: no Python at $PYTHON; set PYTHON" >&2; exit 2; }
rm -rf "$OUT/work" && mkdir -p "$OUT/work" && rm -f "$OUT"/*.txt
export PYTHON PYTHONUNBUFFERED=1 W=$OUT/work
if "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    DEVICE=cuda AMP=fp16 TESTS=tests IMAGES=200 SIZES="--batch_size_per_gpu 64 --num_workers 4"
    OBJECTIVE="--images 256 1024 4096 16384 --runs 20" AUGMENT="" LOADER=""
    STEP="--arch resnet18 resnet50 --batch_size 256"
    VIT="--batch_size 64 --runs 10" KNN="--runs 5" LINEAR="--num_workers 8 --runs 1 --epochs 2"
    CIFAR="--arch resnet18 --batch_size 256 --epochs 5 --lr 2e-3"
else
    DEVICE=cpu AMP=bf16 TESTS=tests/test_utils.py IMAGES=8
    TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export TORCHDYNAMO_DISABLE OMP_NUM_THREADS
    SIZES="--batch_size_per_gpu 8 --num_workers 0 --global_crops_size 32 --local_crops_size 16 --out_dim 256"
    OBJECTIVE="--images 64 --runs 1" AUGMENT="--batch_size 8 --repeats 1"
    STEP="--arch tiny --batch_size 16 --runs 1"
    VIT="--arch vit_tiny --batch_size 2 --runs 1" LOADER="--images 4 --repeats 1"
    KNN="--bank 1000 --queries 100 --classes 10 --k 10 --runs 1" LINEAR="--image_size 32 --runs 1 --epochs 1"
    CIFAR="--arch tiny --projector 64 32 --batch_size 500 --epochs 1"
fi
export DEVICE

stage() {  # stage NAME SECONDS COMMAND: runs it, keeps its output, adds a row and a section to the report
    local name=$1 limit=$2 command=$3 start=$SECONDS code result
    [[ " ${STAGES:-$name} " == *" $name "* ]] || return 0
    echo "$name ..."
    [ "$DEVICE" = cuda ] || limit=$((4 * limit))  # a rehearsal may share its cores
    timeout -k 10 "$limit" bash -c "${command//python /\"\$PYTHON\" }" >"$OUT/$name.txt" 2>&1 </dev/null
    code=$?
    case $code in
        0) result=ok ;;
        124 | 137) result="stopped after $limit s" ;;
        *) result="failed, exit code $code" ;;
    esac
    echo "    $result, $((SECONDS - start)) s"
    ROWS+=("| $name | $((SECONDS - start)) | $result |")
    local shown=12 && [ $code = 0 ] || shown=40
    {
        printf '\n## %s\n\n```\n$ %s\n' "$name" "$command"
        tr '\r' '\n' <"$OUT/$name.txt" | grep -v -e '^$' -e 'it/s\]' -e 's/it\]' | tail -n $shown | cut -c1-200
        echo '```'
    } | sed "s|$W|DIR|g; s|$OUT|OUT|g; s|$PWD/||g" >>"$W/sections.md"
    {
        echo "# One GPU"
        echo
        cat "$W/machine.md"
        printf '\nCommand: `benchmarks/gpu.sh`, commit %s. Stages, with wall seconds:\n\n' "$COMMIT"
        printf '| stage | s | result |\n|---|---|---|\n'
        printf '%s\n' "${ROWS[@]}"
        cat "$W/sections.md"
    } >"$OUT/gpu.md"
}

COMMIT=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
python_machine="import torch, torchvision, timm
from benchmarks.measure import machine
print(f'{machine()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, '
      f'torchvision {torchvision.__version__}, timm {timm.__version__}; device: $DEVICE')"
PYTHONPATH=. "$PYTHON" -c "$python_machine" >"$W/machine.md" 2>&1
PYTHONPATH=. "$PYTHON" -c "from pathlib import Path; from benchmarks.linear import draw_images
draw_images(Path('$W/images'), 224, {'train': $IMAGES, 'test': 16})" || exit

TRAIN="python main.py --arch vit_tiny --device $DEVICE --data_path $W/images/train --epochs 2 --warmup_epochs 1 \
    --print_freq 2 $SIZES"
EVAL="--device $DEVICE --data_path $W/images --pretrained_weights $W/ema/checkpoint.pth --num_workers 4"

# the cheap ones first: what they find is worth more than any figure
stage train 90 "$TRAIN --output_dir $W/ema"
stage train-none 60 "$TRAIN --teacher none --output_dir $W/none"
stage train-released 60 "$TRAIN --preset released-imagenet --output_dir $W/released"
stage train-accumulated 60 "$TRAIN --accum_iter 2 --grad_checkpointing --output_dir $W/accum"
stage train-compiled 180 "$TRAIN --compile --output_dir $W/compiled"
stage train-deterministic 60 "$TRAIN --deterministic --output_dir $W/deterministic"
stage train-fp16 60 "$TRAIN --amp $AMP --output_dir $W/fp16"
stage eval-knn 60 "python eval_knn.py $EVAL --nb_knn 5 20"
stage eval-linear 60 "python eval_linear.py $EVAL --epochs 2 --output_dir $W/sgd"
stage eval-linear-cached 60 "python eval_linear.py $EVAL --epochs 2 --cache_features --lr 0.001 0.01 \
    --output_dir $W/cached"
stage eval-linear-lbfgs 60 "python eval_linear.py $EVAL --solver lbfgs --output_dir $W/lbfgs"
stage cifar-shapes 60 "python cifar/main.py --dataset shapes --device $DEVICE $CIFAR --epochs 2 \
    --output_dir $W/shapes"
stage objective 90 "python benchmarks/objective.py --device $DEVICE $OBJECTIVE --output $OUT/objective.csv"
stage training-step 90 "python benchmarks/training_step.py --device $DEVICE $STEP"
stage pretraining-step 90 "python benchmarks/pretraining_step.py --device $DEVICE $VIT"
stage augmentation 60 "python benchmarks/augmentation.py --device $DEVICE $AUGMENT"
stage loader 60 "python benchmarks/loader.py --device $DEVICE $LOADER"
stage knn 60 "python benchmarks/knn.py --device $DEVICE $KNN"
if [ -n "${CIFAR10:-}" ]; then
    stage cifar10 240 "python cifar/main.py --dataset folder --data_path $CIFAR10 --device $DEVICE $CIFAR \
        --output_dir $W/cifar10"
fi
stage linear 90 "python benchmarks/linear.py --device $DEVICE $LINEAR"
stage tests-cuda 90 "TEST_GPU=0 python -m pytest -q tests/test_device.py"
stage tests 240 "python -m pytest -q -n auto $TESTS"
rm -rf "$W"
echo "report: $OUT/gpu.md"
