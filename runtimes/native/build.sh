#!/usr/bin/env bash
# llama.cpp's own llama-server and llama-mtmd-cli, from the sources that llama-cpp-python brings. Guide: docs/native.md
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
TARGETS=(llama-server llama-mtmd-cli)
MARK=.sdist-sha256

usage() {
    cat <<END
usage: build.sh [--native | --arch ARCH] [--work DIR] [--jobs N] [--sdist FILE]

Builds llama.cpp's llama-server and llama-mtmd-cli with their libraries:

  build.sh                             for any arm64 Linux    -> build/arm64/llama
  build.sh --arch armv8.2-a+dotprod    for newer arm64 cores  -> build/arm64/llama-armv8.2-a+dotprod
  build.sh --native                    for this machine       -> build/native/llama

  --arch ARCH    what GCC's -march takes; the least that every core must have. Default: armv8-a
  --native       for this machine's own processor; can't be combined with --arch
  --work DIR     where sources and objects are kept; default: build/llama.cpp
  --jobs N       compilers at once; default: the number of cores
  --sdist FILE   take this source distribution of llama-cpp-python instead of downloading it
  -h, --help     this text

The version is the one in constraints.txt. A run that was cut goes on where it stopped.
Environment: PYTHON names the interpreter whose pip downloads (default: python3).
END
}

fail() { # message, hint
    printf 'error: %s\n' "$1" >&2
    if [ -n "${2:-}" ]; then printf 'hint: %s\n' "$2" >&2; fi
    exit 1
}

refuse() { # a command line that can't be meant, hint
    printf 'error: %s\nhint: %s\n' "$1" "${2:-build.sh --help}" >&2
    exit 2
}

# Names all that is missing at once, with the packages of Debian and Ubuntu that bring it.
need() { # program package, ...
    local packages=() programs=()
    while [ $# -gt 0 ]; do
        if ! command -v "$1" >/dev/null; then
            programs+=("$1")
            packages+=("$2")
        fi
        shift 2
    done
    if [ ${#programs[@]} -gt 0 ]; then
        fail "missing: ${programs[*]}" "apt-get install ${packages[*]}"
    fi
}

sha256_of_sdist() { # version
    case $1 in
        0.3.36) echo 832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e ;;
        *) fail "no SHA-256 of llama-cpp-python $1 is known here" "add it to sha256_of_sdist in $HERE/build.sh" ;;
    esac
}

check_sha256() { # file, digest
    local found
    found=$(sha256sum <"$1") || fail "$1 can't be read"
    [ "${found%% *}" = "$2" ] || fail "$1 has SHA-256 ${found%% *}, not $2" "${3:-remove the file and try again}"
}

fetch_sdist() { # version, digest, work directory -> the file's path in SDIST
    SDIST=$3/llama_cpp_python-$1.tar.gz
    if [ ! -e "$SDIST" ]; then
        "$PYTHON" -m pip --version >/dev/null 2>&1 ||
            fail "$PYTHON has no pip" "apt-get install python3-pip, or name another interpreter: PYTHON=INTERPRETER"
        local part=$3/download.tmp-$$
        PARTS+=("$part")
        rm -rf "$part"
        mkdir -p "$part"
        echo "downloading the sources of llama-cpp-python $1" >&2
        # pip asks a source distribution for its metadata, which runs code of it: so pip has to know the digest, too
        echo "llama-cpp-python==$1 --hash=sha256:$2" >"$part/requirements.txt"
        "$PYTHON" -m pip download --quiet --no-deps --no-binary :all: --require-hashes --dest "$part" \
            --requirement "$part/requirements.txt" ||
            fail "pip can't download llama-cpp-python $1 of SHA-256 $2" "bring the file yourself: --sdist FILE"
        [ -e "$part/llama_cpp_python-$1.tar.gz" ] ||
            fail "pip brought no llama_cpp_python-$1.tar.gz" "bring the file yourself: --sdist FILE"
        mv "$part/llama_cpp_python-$1.tar.gz" "$SDIST"
        rm -rf "$part"
    fi
    check_sha256 "$SDIST" "$2"
}

# Sources stay for the next run, with a mark of the archive that they are from; others give way.
unpack() { # sdist, version, digest, work directory -> the directory of llama.cpp in SOURCE, in UNPACKED which run did it
    local whole=$4/llama_cpp_python-$2
    UNPACKED="sources unpacked by an earlier run and not read again"
    if [ ! -f "$whole/$MARK" ] || [ "$(cat "$whole/$MARK")" != "$3" ]; then
        UNPACKED="sources unpacked by this run"
        local part=$4/unpack.tmp-$$
        PARTS+=("$part")
        rm -rf "$part"
        mkdir -p "$part"
        tar -xzf "$1" -C "$part" || fail "$1 can't be unpacked"
        echo "$3" >"$part/llama_cpp_python-$2/$MARK"
        rm -rf "$whole"
        mv "$part/llama_cpp_python-$2" "$whole"
        rmdir "$part"
    fi
    SOURCE=$whole/vendor/llama.cpp
    [ -f "$SOURCE/CMakeLists.txt" ] || fail "$SOURCE holds no sources of llama.cpp" "remove $whole and try again"
}

# At every end, Ctrl-C's too: what is half made goes, and a result that was moved aside comes back.
PARTS=() RESULT="" OLD=""
clean_up() {
    if [ -n "$OLD" ] && [ -e "$OLD" ] && [ ! -e "$RESULT" ]; then mv "$OLD" "$RESULT"; fi
    if [ ${#PARTS[@]} -gt 0 ]; then rm -rf "${PARTS[@]}"; fi
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Programs, libraries and licence, stripped, put in the old result's place.
collect() { # directory of the objects, result, strip program, what was built
    local part=$2.tmp-$$ program
    RESULT=$2 OLD=$2.tmp-old-$$
    PARTS+=("$part" "$OLD")
    rm -rf "$part"
    mkdir -p "$part"
    for program in "${TARGETS[@]}"; do cp "$1/bin/$program" "$part/"; done
    cp -a "$1"/bin/*.so* "$part/"
    find "$part" -type f -exec "$3" --strip-unneeded {} +
    cp "$SOURCE/LICENSE" "$part/LICENSE"
    printf '%s\n' "$4" >"$part/BUILD.txt"
    (cd "$part" && find . -type f ! -name BUILD.txt -printf '%P\n' | LC_ALL=C sort | xargs sha256sum) >>"$part/BUILD.txt"
    if [ -e "$2" ]; then mv "$2" "$OLD"; fi
    mv "$part" "$2"
    rm -rf "$OLD"
}

main() {
    local arch="" native="" work="$ROOT/build/llama.cpp" jobs="" sdist=""
    while [ $# -gt 0 ]; do
        case $1 in
            --native) native=yes ;;
            --arch | --work | --jobs | --sdist)
                [ $# -gt 1 ] && [ -n "$2" ] || refuse "$1 needs a value"
                case $1 in
                    --arch) arch=$2 ;;
                    --work) work=$2 ;;
                    --jobs) jobs=$2 ;;
                    --sdist) sdist=$2 ;;
                esac
                shift
                ;;
            -h | --help)
                usage
                exit 0
                ;;
            *) refuse "unknown argument $1" ;;
        esac
        shift
    done
    [ -z "$native" ] || [ -z "$arch" ] || refuse "--native and --arch exclude each other"
    [[ -z $arch || $arch =~ ^armv[89][a-z0-9.+-]*$ ]] || refuse "--arch $arch: a name like armv8-a or armv8.2-a+dotprod is wanted"
    [[ -z $jobs || $jobs =~ ^[1-9][0-9]*$ ]] || refuse "--jobs $jobs is not a number"
    jobs=${jobs:-$(nproc)}
    arch=${arch:-armv8-a}
    [ -z "$sdist" ] || { [ -f "$sdist" ] && [ -r "$sdist" ]; } || fail "--sdist $sdist: no file that can be read" "check the path"

    local tools=(cmake cmake ninja ninja-build tar tar sha256sum coreutils)
    if [ -z "$sdist" ]; then
        [ -z "${PYTHON:-}" ] || command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON: no such program" "name another, or unset it"
        PYTHON=${PYTHON:-python3}
        tools+=("$PYTHON" python3-pip)
    fi
    local name strip compiler out flags
    if [ -n "$native" ]; then
        name=native strip=strip compiler=c++ out=$ROOT/build/native/llama
        tools+=(cc gcc c++ g++ strip binutils)
        flags=(-DGGML_NATIVE=ON)
    else
        name=arm64 strip=aarch64-linux-gnu-strip compiler=aarch64-linux-gnu-g++ out=$ROOT/build/arm64/llama
        if [ "$arch" != armv8-a ]; then name+=-$arch out+=-$arch; fi
        tools+=(aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu aarch64-linux-gnu-g++ g++-aarch64-linux-gnu)
        tools+=(aarch64-linux-gnu-strip binutils-aarch64-linux-gnu)
        flags=(-DCMAKE_TOOLCHAIN_FILE="$HERE/aarch64.cmake" -DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH="$arch")
    fi
    need "${tools[@]}"
    local words
    if [ -z "$native" ]; then
        words=$(LC_ALL=C aarch64-linux-gnu-gcc -march="$arch" -E -x c /dev/null 2>&1 >/dev/null) ||
            refuse "--arch $arch: the compiler doesn't know it" "it takes ${words##*: }"
    fi

    local version digest
    version=$(sed -n 's/^llama_cpp_python==//p' "$ROOT/constraints.txt")
    [ -n "$version" ] || fail "$ROOT/constraints.txt names no version of llama_cpp_python"
    digest=$(sha256_of_sdist "$version")
    mkdir -p -- "$work" 2>/dev/null && [ -w "$work" ] ||
        fail "--work $work: no directory that can be made or written to" "name another: --work DIR"
    work=$(cd -- "$work" && pwd)
    if [ -n "$sdist" ]; then
        check_sha256 "$sdist" "$digest" "pass the source distribution of llama-cpp-python $version"
        SDIST=$sdist
    else
        fetch_sdist "$version" "$digest" "$work"
    fi
    unpack "$SDIST" "$version" "$digest" "$work"

    # No OpenMP, OpenSSL or curl: the programs then need libc, libm and libstdc++ alone. No page for the server to serve,
    # and no video: with it, a WebP in a request starts ffmpeg.
    flags+=(
        -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_OPENMP=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_CURL=OFF
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DMTMD_VIDEO=OFF
        "-DCMAKE_INSTALL_RPATH=\$ORIGIN" -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON
    )
    local objects=$work/$name
    cmake -S "$SOURCE" -B "$objects" -G Ninja "${flags[@]}" >"$work/$name-cmake.log" 2>&1 ||
        { tail -n 20 "$work/$name-cmake.log" >&2; fail "cmake can't configure llama.cpp" "see $work/$name-cmake.log; to begin anew remove $objects"; }
    cmake --build "$objects" --parallel "$jobs" --target "${TARGETS[@]}" >&2 ||
        fail "llama.cpp doesn't compile" "the compiler's words stand above; the same command goes on where it stopped"
    mkdir -p "$(dirname "$out")"
    collect "$objects" "$out" "$strip" "llama.cpp of llama-cpp-python $version, sdist sha256 $digest
$UNPACKED
$("$compiler" --version | head -n 1)
cmake ${flags[*]//"$ROOT"\//}"
    echo "$out"
}

main "$@"
