# Sourced by the stand-ins for the closed repository's scripts: they hold callers to its whole contract, write a file a
# part, and fail in each way that the real ones can. STAND_IN_FAILS names the way:
#
#   crash             a message on stderr, exit code 1
#   hang              a child that does not end
#   disk-full         the words of a full disk, half a part, exit code 1
#   exit-1            all parts and the words of a success, exit code 1
#   exit-0-error      all parts, exit code 0, and a Traceback of a step between
#   nothing           exit code 0, and no file
#   zero-bytes        one part has 0 bytes, as LiteRT's compiler leaves it
#   too-few-parts     one part is missing
#   wrong-magic       one part is no .tflite
#   beside            the parts lie in the repository, not in OUTPUT_DIR
#
# STAND_IN_PARTS says how many parts a decoder has: 2. What the caller told is written into each part, after its magic.
# Exit code 2 is a broken contract, 64 an unknown way to fail.
# shellcheck shell=bash

readonly told=(
    MODEL_PATH GPTQ_MODELPATH OUTPUT_DIR PLATFORM MODEL_KIND MODEL_SIZE WEIGHT_BIT CLEN PLEN CLOUD_WEIGHT_NUM
    CLOUD_ACT_NUM MTK_BATCH_SIZE DISABLE_PGPTQ IS_LLAMA RATE SKIP_ENV_SETUP USE_OPTIMIZED_CONVERT CONDA_ENV
)

refuse() {
    printf 'mtk_cloud: %s\n' "$*" >&2
    exit 2
}

matches() { # matches NAME PATTERN
    [[ ${!1} =~ ^($2)$ ]] || refuse "$1 is '${!1}', not $2"
}

check() { # check KIND
    local name here folder
    for name in "${told[@]}"; do
        [[ -n ${!name:-} ]] || refuse "$name is not set"
    done
    matches PLATFORM 'MT6991|MT6989|MT6897'
    matches MODEL_KIND "$1"
    matches MODEL_SIZE '0_5B|0_58B|0_9B|1_2B|1_6B|8B'
    matches WEIGHT_BIT '4|8'
    for name in CLEN PLEN CLOUD_WEIGHT_NUM CLOUD_ACT_NUM MTK_BATCH_SIZE; do
        matches "$name" '[1-9][0-9]*'
    done
    ((PLEN <= CLEN)) || refuse "PLEN $PLEN is over CLEN $CLEN"
    for name in DISABLE_PGPTQ IS_LLAMA SKIP_ENV_SETUP USE_OPTIMIZED_CONVERT; do
        matches "$name" 'true|false'
    done
    matches RATE '[0-9]+(\.[0-9]+)?'
    for name in MODEL_PATH GPTQ_MODELPATH OUTPUT_DIR; do
        matches "$name" '/.*'
        [[ -d ${!name} && -r ${!name} ]] || refuse "$name ${!name} is no folder that can be read"
    done
    here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
    [[ $(pwd -P) == "$here" ]] || refuse "runs in $(pwd -P), not in its own folder"
    [[ -w $OUTPUT_DIR ]] || refuse "OUTPUT_DIR $OUTPUT_DIR cannot be written"
    [[ -z $(ls -A -- "$OUTPUT_DIR") ]] || refuse "OUTPUT_DIR $OUTPUT_DIR is not empty"
    [[ ! $MODEL_PATH -ef $GPTQ_MODELPATH ]] || refuse "MODEL_PATH and GPTQ_MODELPATH are one folder"
    for folder in "$MODEL_PATH" "$GPTQ_MODELPATH"; do
        [[ ! $OUTPUT_DIR/ == "$folder"/* ]] || refuse "OUTPUT_DIR lies in $folder"
    done
    python3 - "$1" <<'PYTHON' || refuse "its models are not what they have to be"
import json, os, struct, sys

def say(why):
    sys.exit(f"mtk_cloud: {why}")

def tensors(folder):
    names = [name for name in os.listdir(folder) if name.endswith(".safetensors")]
    found = {}
    for name in names:
        with open(os.path.join(folder, name), "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            found.update(json.loads(file.read(length)))
    return found or say(f"{folder} has no weights")

model, gptq = os.environ["MODEL_PATH"], os.environ["GPTQ_MODELPATH"]
for folder in (model, gptq):
    if not os.path.isfile(os.path.join(folder, "config.json")):
        say(f"{folder} has no config.json")
config = json.load(open(os.path.join(model, "config.json")))
if "quantization_config" in config:
    say("MODEL_PATH is quantised")
if sys.argv[1] == "multimodal" and not {"vision_config", "vision_tower", "vision_encoder"} & set(config):
    say("MODEL_PATH does not see")
tensors(model)
path = os.path.join(gptq, "quantize_config.json")
if not os.path.isfile(path):
    say("GPTQ_MODELPATH has no quantize_config.json")
if json.load(open(path)).get("bits") != int(os.environ["WEIGHT_BIT"]):
    say("GPTQ_MODELPATH has other bits than WEIGHT_BIT")
if not any(name.endswith(".qweight") for name in tensors(gptq)):
    say("GPTQ_MODELPATH has no codes")
PYTHON
}

part() { # part FOLDER NAME
    local name
    {
        printf '\x1c\x00\x00\x00TFL3'
        for name in "${told[@]}"; do
            printf '%s=%s\n' "$name" "${!name}"
        done
    } >"$1/$2"
    echo "wrote $2"
}

compile() { # compile KIND…; of the last there are STAND_IN_PARTS
    local ways='crash|hang|disk-full|exit-1|exit-0-error|nothing|zero-bytes|too-few-parts|wrong-magic|beside'
    local fails=${STAND_IN_FAILS:-} parts=${STAND_IN_PARTS:-2} folder=$OUTPUT_DIR kind number last
    [[ -z $fails || $fails =~ ^($ways)$ ]] || { echo "STAND_IN_FAILS=$fails: one of $ways" >&2; exit 64; }
    echo "mtk_cloud: $MODEL_KIND $MODEL_SIZE for $PLATFORM"
    case $fails in
        crash) echo "NeuroPilot: unsupported operator GATHER_ND in block 0" >&2; exit 1 ;;
        hang) sleep 3600; exit 1 ;;
        nothing) echo "Conversion finished successfully"; exit 0 ;;
        beside) folder=$PWD ;;
    esac
    for kind; do
        [[ $kind == decoder ]] || part "$folder" "${MODEL_SIZE}_$kind.tflite"
    done
    for ((number = 1; number <= parts; number++)); do
        part "$folder" "${MODEL_SIZE}_decoder_part${number}of$parts.tflite"
    done
    last=$folder/${MODEL_SIZE}_decoder_part${parts}of$parts.tflite
    case $fails in
        disk-full) truncate -s 6 "$last"; echo "dd: error writing '$last': No space left on device" >&2; exit 1 ;;
        zero-bytes) : >"$last" ;;
        too-few-parts) rm "$last" ;;
        wrong-magic) printf 'PK\x03\x04 a zip, no model' >"$last" ;;
        exit-0-error)
            printf 'Traceback (most recent call last):\n  File "quantize.py", line 1\nValueError: NaN in layer 3\n' >&2
            ;;
    esac
    echo "Conversion finished successfully"
    [[ $fails != exit-1 ]] || exit 1
}
