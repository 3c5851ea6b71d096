#!/usr/bin/env bash
# Debian's arm64 Python under qemu, with this repository's package and one bundle. Guide: docs/arm64.md
set -euo pipefail

SCRIPT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")
REPOSITORY=$(cd "$(dirname "$SCRIPT")/../.." && pwd)

usage() {
    cat <<END
usage: arm64-run.sh [--cpu NAME] [--llama DIR] [--bundle DIR] [--data DIR] [--out DIR] -- ARGUMENTS OF python3.11

  arm64-run.sh -- -m tinyllava_edge info
  arm64-run.sh --bundle demo/bundle --data pictures -- -m tinyllava_edge run /bundle --image /data/cat.png "What is this?"

  --cpu NAME    the core that qemu imitates: max (default; all that qemu has but SME), cortex-a53, cortex-a76 ...;
                qemu's properties may follow, e.g. max,sve=off
  --llama DIR   llama.cpp's libraries; default: build/arm64/llama, made by build.sh
  --bundle DIR  is /bundle there, read-only
  --data DIR    is /data there, read-only
  --out DIR     is /out there, writable; everything else that is written is lost
  -h, --help    this text

The root is build/arm64/root, made by arm64-root.sh. Root's rights are not needed where user namespaces are allowed, nor
is binfmt_misc; without it programs there can't start other programs. It guards against mistakes, not against malice: the
kernel is this machine's. Times mean nothing under qemu.
Environment: QEMU_OPTIONS are more options of qemu-aarch64-static, e.g. "-d in_asm -D /out/log".
END
}

fail() { # message, hint
    printf 'error: %s\n' "$1" >&2
    if [ -n "${2:-}" ]; then printf 'hint: %s\n' "$2" >&2; fi
    exit 1
}

refuse() { # a command line that can't be meant, hint
    printf 'error: %s\nhint: %s\n' "$1" "${2:-arm64-run.sh --help}" >&2
    exit 2
}

read_only() { # directory, place in the root
    mount --bind "$1" "$ROOT/$2"
    write_protect "$ROOT/$2"
}

write_protect() { # mount
    # a user namespace may not drop the flags that the mount has, so they are named again
    mount -o "remount,bind,$(findmnt --noheadings --first-only --output VFS-OPTIONS --target "$1" | sed 's/^rw/ro/')" "$1"
}

# Runs as root of a user namespace (or as root), in a mount namespace that ends with the program.
inside() {
    # the machine's own /proc, with all that lies on it: as root /proc/sys could be written there
    mount --rbind /proc "$ROOT/proc"
    local place
    findmnt --noheadings --raw --output TARGET --submounts --target "$ROOT/proc" | while read -r place; do
        write_protect "$(printf %b "$place")"
    done
    mount --bind /dev/null "$ROOT/dev/null"
    mount --bind /dev/urandom "$ROOT/dev/urandom"
    mount -t tmpfs none "$ROOT/tmp"
    # Never the host's /sys: ONNX Runtime's cpuinfo dies of an x86 machine's. It wants two files there, and a processor
    # in /proc/cpuinfo; what the core can do it asks the kernel, which is qemu.
    mount -t tmpfs none "$ROOT/sys"
    mkdir -p "$ROOT/sys/devices/system/cpu"
    local last=$(($(nproc) - 1)) core
    echo "0-$last" | tee "$ROOT/sys/devices/system/cpu/possible" >"$ROOT/sys/devices/system/cpu/present"
    for core in $(seq 0 "$last"); do
        printf 'processor\t: %s\nCPU implementer\t: 0x41\nCPU architecture: 8\n' "$core"
        printf 'CPU variant\t: 0x0\nCPU part\t: %s\nCPU revision\t: 0\n\n' "$(part_number "$CORE")"
    done >"$ROOT/sys/cpuinfo"
    mount --bind "$ROOT/sys/cpuinfo" "$ROOT/proc/cpuinfo"
    mount --bind "$QEMU" "$ROOT/qemu"
    read_only "$REPOSITORY" repository
    read_only "$LLAMA" opt/site/llama_cpp/lib
    if [ -n "$BUNDLE" ]; then read_only "$BUNDLE" bundle; fi
    if [ -n "$DATA" ]; then read_only "$DATA" data; fi
    if [ -n "$OUT" ]; then mount --bind "$OUT" "$ROOT/out"; fi
    cd /
    # ONNX Runtime's wheel gathers telemetry unless it is told not to before it is loaded
    exec env -i HOME=/tmp LANG=C.UTF-8 PATH=/usr/bin OPENBLAS_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 \
        ORT_DISABLE_TELEMETRY=1 PYTHONPATH=/repository:/opt/site:/opt/eval QEMU_CPU="$CORE" \
        "$(command -v chroot)" "$ROOT" /qemu ${QEMU_OPTIONS:-} /usr/bin/python3.11 "$@"
}

part_number() { # Arm's number of a core; a Cortex-A76's for those that are none, such as max
    case ${1%%,*} in
        cortex-a35) echo 0xd04 ;;
        cortex-a53) echo 0xd03 ;;
        cortex-a55) echo 0xd05 ;;
        cortex-a57) echo 0xd07 ;;
        cortex-a72) echo 0xd08 ;;
        neoverse-n1) echo 0xd0c ;;
        *) echo 0xd0b ;;
    esac
}

main() {
    export CORE=max BUNDLE="" DATA="" OUT="" ROOT=$REPOSITORY/build/arm64/root LLAMA=$REPOSITORY/build/arm64/llama QEMU
    while [ $# -gt 0 ]; do
        case $1 in
            --cpu | --llama | --bundle | --data | --out)
                [ $# -gt 1 ] && [ -n "$2" ] || refuse "$1 needs a value"
                case $1 in
                    --cpu) CORE=$2 ;;
                    --llama) LLAMA=$2 ;;
                    --bundle) BUNDLE=$2 ;;
                    --data) DATA=$2 ;;
                    --out) OUT=$2 ;;
                esac
                shift
                ;;
            -h | --help)
                usage
                exit 0
                ;;
            --)
                shift
                break
                ;;
            *) refuse "unknown argument $1" ;;
        esac
        shift
    done
    [ $# -gt 0 ] || refuse "nothing to run: arguments of python3.11 come after --"
    QEMU=$(command -v qemu-aarch64-static) || fail "qemu-aarch64-static is missing" "apt-get install qemu-user-static"
    [ -f "$ROOT/made.txt" ] || fail "$ROOT is missing" "run runtimes/native/arm64-root.sh"
    local name
    for name in proc sys tmp dev/null dev/urandom repository bundle data out qemu opt/site/llama_cpp/lib usr/bin/python3.11; do
        [ -e "$ROOT/$name" ] || fail "$ROOT/$name is missing" "make it anew: runtimes/native/arm64-root.sh --force"
    done
    [ -f "$LLAMA/libllama.so" ] || fail "$LLAMA holds no libllama.so" "run runtimes/native/build.sh"
    for name in LLAMA BUNDLE DATA OUT; do # the program starts elsewhere, so paths are made absolute
        [ -z "${!name}" ] || [ -d "${!name}" ] || fail "${!name}: no such directory" "check the path"
        [ -z "${!name}" ] || printf -v "$name" %s "$(cd "${!name}" && pwd)"
    done
    # qemu 7.2 computes SME's 8-bit outer products wrong, and ONNX Runtime uses them where it finds SME
    [[ $CORE != max && $CORE != max,* || $CORE == *,sme=* ]] || CORE+=,sme=off
    local cores words
    cores=$("$QEMU" -cpu help || true) # qemu 7.2 ends this with code 1
    [[ $CORE =~ ^[a-z0-9-]+(,[a-z0-9-]+=[a-z0-9.]+)*$ && " $(tr -s '\n' ' ' <<<"$cores") " == *" ${CORE%%,*} "* ]] ||
        refuse "--cpu $CORE: qemu knows no such core" "qemu-aarch64-static -cpu help"
    # only qemu knows a core's properties, and says so when it starts something
    words=$("$QEMU" -cpu "$CORE" -L "$ROOT" "$ROOT/usr/bin/python3.11" -V 2>&1) ||
        refuse "--cpu $CORE: ${words:-qemu starts nothing as this core}" "leave properties away, or see qemu's guide to Arm cores"
    export PATH=$PATH:/usr/sbin:/sbin
    local spaces=(--map-root-user --mount)
    if ! unshare "${spaces[@]}" true 2>/dev/null; then
        [ "$(id -u)" = 0 ] && spaces=(--mount) && unshare "${spaces[@]}" true 2>/dev/null ||
            fail "this user may not make namespaces" "as root: sysctl kernel.unprivileged_userns_clone=1, or run this as root"
    fi
    export STARTED_BY=$$
    exec unshare "${spaces[@]}" bash "$SCRIPT" --inside "$@" # the same process, so $$ stays
}

if [ "${1:-}" = --inside ] && [ "${STARTED_BY:-}" = $$ ]; then # not where a user types it
    shift
    inside "$@"
else
    main "$@"
fi
