#!/usr/bin/env bash
# A directory with Debian's arm64 Python and what the edge runtime needs, for runs under qemu. Guide: docs/arm64.md
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPOSITORY=$(cd "$HERE/../.." && pwd)
SUITE=bookworm
PACKAGES=(python3.11-minimal libpython3.11-stdlib libstdc++6) # apt adds what they depend on, nothing else
WHEELS=(numpy pillow onnxruntime typer rich jinja2 typing-extensions diskcache)
QUESTIONS=(easy-vqa) # for eval alone, so beside what a device needs

usage() {
    cat <<END
usage: arm64-root.sh [--force] [--sources DIR]

Makes build/arm64/root. Nothing in it is run while it is made, and no rights are needed: packages of Debian $SUITE are
downloaded by apt, which checks their signatures, and unpacked; wheels for aarch64 come by pip in the versions of
constraints.txt, which holds no digests: contents.txt in the root has the SHA-256 of each wheel that came. llama-cpp-python
is its Python part, from the sources that runtimes/native/build.sh unpacked. opt/site in the root is what a device needs;
opt/eval holds the questions that eval asks here.

  --force        make it anew
  --sources DIR  unpacked source distribution of llama-cpp-python; default: build/llama.cpp/llama_cpp_python-VERSION
  -h, --help     this text

Environment:
  DEBIAN_MIRROR  where Debian's packages are; default: http://deb.debian.org/debian
  PYTHON         interpreter whose pip downloads the wheels; default: python3
A run that was cut goes on where it stopped. Then: runtimes/native/arm64-run.sh
END
}

fail() { # message, hint
    printf 'error: %s\n' "$1" >&2
    if [ -n "${2:-}" ]; then printf 'hint: %s\n' "$2" >&2; fi
    exit 1
}

refuse() { # a command line that can't be meant
    printf 'error: %s\nhint: arm64-root.sh --help\n' "$1" >&2
    exit 2
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

# Names all that is missing at once, with Debian's packages that bring it.
check_tools() {
    local packages=()
    command -v apt-get >/dev/null || fail "apt-get is missing" "the packages come by apt: use Debian or Ubuntu"
    command -v dpkg-deb >/dev/null || packages+=(dpkg)
    command -v qemu-aarch64-static >/dev/null || packages+=(qemu-user-static)
    command -v unshare >/dev/null || packages+=(util-linux)
    [ -f "$KEYRING" ] || packages+=(debian-archive-keyring)
    "$PYTHON" -m pip --version >/dev/null 2>&1 || packages+=(python3-pip)
    [ ${#packages[@]} = 0 ] || fail "missing tools" "apt-get install ${packages[*]}"
}

# apt with lists, archives and state of its own; the machine's settings (proxies) hold, its sources don't.
own_apt() {
    apt-get -qq \
        -o Dir::State="$APT/state" -o Dir::State::status="$APT/status" -o Dir::Cache="$APT/cache" \
        -o Dir::Etc::sourcelist="$APT/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Install-Recommends=false \
        -o APT::Sandbox::User= -o Debug::NoLocking=true "$@"
}

fetch_packages() {
    mkdir -p "$APT/state/lists/partial" "$APT/cache/archives/partial"
    : >"$APT/status" # nothing is installed, so apt brings every dependency
    echo "deb [arch=arm64 signed-by=$KEYRING] $MIRROR $SUITE main" >"$APT/sources.list"
    echo "downloading packages of Debian $SUITE from $MIRROR" >&2
    own_apt update || fail "apt can't read $MIRROR" "name another mirror: DEBIAN_MIRROR=URL"
    own_apt install --download-only --yes "${PACKAGES[@]}" || fail "apt can't download the packages" "try again"
}

unpack_packages() { # result
    local name file
    # older downloads may lie beside what apt chose; it lists only what is not there yet, so it is shown an empty cache
    own_apt -o Dir::Cache::archives="$APT/nothing" install --print-uris --yes "${PACKAGES[@]}" >"$WORK/chosen"
    while read -r _ name _; do
        file=$APT/cache/archives/$name
        dpkg-deb --extract "$file" "$1" || fail "$file can't be unpacked" "remove it and try again"
        echo "debian $(dpkg-deb --field "$file" Package) $(dpkg-deb --field "$file" Version)" >>"$1/contents.txt"
    done <"$WORK/chosen"
    [ -s "$1/contents.txt" ] || fail "apt chose no package" "remove $APT and try again"
}

fetch_wheels() { # result, what
    local part=$1.tmp-$$ wanted
    PARTS+=("$part")
    wanted=$(printf '%s ' "${@:2}"; sha256sum <"$REPOSITORY/constraints.txt")
    if [ -f "$1/wanted.txt" ] && [ "$(cat "$1/wanted.txt")" = "$wanted" ]; then return; fi
    echo "downloading wheels for aarch64: ${*:2}" >&2
    rm -rf "$part"
    "$PYTHON" -m pip download --quiet --dest "$part" --constraint "$REPOSITORY/constraints.txt" \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
        --python-version 3.11 --only-binary=:all: "${@:2}" ||
        fail "pip can't download the wheels" "try again, or PYTHON=INTERPRETER"
    echo "$wanted" >"$part/wanted.txt"
    rm -rf "$1"
    mv "$part" "$1"
}

unpack_wheels() { # wheels, result, directory in it
    local wheel digest
    mkdir -p "$2/$3"
    for wheel in "$1"/*.whl; do
        "$PYTHON" -m zipfile -e "$wheel" "$2/$3" || fail "$wheel can't be unpacked" "remove $1 and try again"
        digest=$(sha256sum <"$wheel")
        echo "wheel $(basename "$wheel") sha256:${digest%% *}" >>"$2/contents.txt"
    done
}

unpack_llama() { # sources of llama-cpp-python, result
    local site=$2/opt/site about
    mkdir -p "$site/llama_cpp/lib" # where arm64-run.sh shows the libraries
    cp "$1"/llama_cpp/*.py "$site/llama_cpp/"
    about=$site/llama_cpp_python-$VERSION.dist-info # makes the version known to importlib.metadata
    mkdir "$about"
    cp "$1/PKG-INFO" "$about/METADATA"
    echo "source llama_cpp_python-$VERSION (Python part)" >>"$2/contents.txt"
}

main() {
    local force="" sources="" root made
    while [ $# -gt 0 ]; do
        case $1 in
            --force) force=yes ;;
            --sources)
                [ $# -gt 1 ] && [ -n "$2" ] || refuse "--sources needs a value"
                sources=$2
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
    PYTHON=${PYTHON:-python3}
    MIRROR=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
    KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
    WORK=$REPOSITORY/build/arm64/downloads
    APT=$WORK/apt
    VERSION=$(sed -n 's/^llama_cpp_python==//p' "$REPOSITORY/constraints.txt")
    [ -n "$VERSION" ] || fail "$REPOSITORY/constraints.txt names no version of llama_cpp_python"
    sources=${sources:-$REPOSITORY/build/llama.cpp/llama_cpp_python-$VERSION}
    root=$REPOSITORY/build/arm64/root

    made=$(cat "${BASH_SOURCE[0]}" "$REPOSITORY/constraints.txt" | sha256sum)
    if [ -z "$force" ] && [ -f "$root/made.txt" ] && [ "$(cat "$root/made.txt")" = "$made" ]; then
        echo "$root"
        return
    fi
    check_tools
    [ -f "$sources/PKG-INFO" ] && [ -d "$sources/llama_cpp" ] ||
        fail "$sources: no sources of llama-cpp-python" "run runtimes/native/build.sh first, or name them: --sources DIR"
    grep -qx "Version: $VERSION" "$sources/PKG-INFO" || fail "$sources: not llama-cpp-python $VERSION"
    mkdir -p "$WORK"
    fetch_packages
    fetch_wheels "$WORK/wheels" "${WHEELS[@]}"
    fetch_wheels "$WORK/questions" "${QUESTIONS[@]}"

    PART=$root.tmp-$$ RESULT=$root OLD=$root.tmp-old-$$
    PARTS+=("$PART" "$OLD")
    mkdir "$PART"
    unpack_packages "$PART"
    unpack_wheels "$WORK/wheels" "$PART" opt/site
    unpack_wheels "$WORK/questions" "$PART" opt/eval
    unpack_llama "$sources" "$PART"
    # places where arm64-run.sh mounts something
    mkdir -p "$PART"/{proc,sys,dev,tmp,repository,bundle,data,out}
    touch "$PART/qemu" "$PART"/dev/{null,urandom}
    echo "$made" >"$PART/made.txt"
    if [ -e "$root" ]; then mv "$root" "$OLD"; fi
    mv "$PART" "$root"
    rm -rf "$OLD"
    echo "$root"
}

main "$@"
