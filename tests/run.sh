#!/bin/sh
# Runs the C tests named as arguments, then the Python ones, and adds up their "N passed, N failed" lines.
# A program that dies without such a line counts as one failure. C_ONLY=1 leaves the Python tests out; WRAP is a
# command to run each C test under, ISA the instruction set they are to use. The exporter's tests need the local
# virtual environment, those of the server's page a Chromium: without it they are skipped, and named.
cd "$(dirname "$0")/.." || exit 1
BUILD=${BUILD:-build} PYTHON=${PYTHON:-python3}
passed=0 failed=0 skipped=0
out=$BUILD/test.out

add() { # exit status of the program whose output is in $out, its name
    line=$(grep -E '[0-9]+ passed, [0-9]+ failed' "$out" | tail -n 1)
    p=$(echo "$line" | sed -n 's/.*[^0-9]\([0-9][0-9]*\) passed.*/\1/p')
    f=$(echo "$line" | sed -n 's/.* \([0-9][0-9]*\) failed.*/\1/p')
    if [ -z "$p" ] || { [ "$1" -ne 0 ] && [ "$f" -eq 0 ]; }; then
        echo "$2: ended with status $1"
        f=$((${f:-0} + 1))
    fi
    passed=$((passed + ${p:-0})) failed=$((failed + f))
}

run() { # name, command: shows what it prints, and adds its counts
    name=$1 start=$(date +%s)
    shift
    "$@" >"$out" 2>&1
    status=$?
    cat "$out"
    seconds=$(($(date +%s) - start))
    [ $seconds -lt 5 ] || echo "$name: $seconds s"
    add $status "$name"
}

for t in "$@"; do run "$t" ${WRAP:-} "$BUILD/$t" ${ISA:-}; done
[ -n "${ISA:-}${QUICK:-}" ] || for t in test_model test_policies; do # products by tiles, in plain C
    case " $* " in *" $t "*) run "$t amx-emulated" ${WRAP:-} "$BUILD/$t" amx-emulated ;; esac
done

if [ -z "${C_ONLY:-}" ]; then
    for t in test_cli test_install test_answers test_documents test_terminal test_fitted test_serve test_machines test_tools test_memory test_files test_foreign test_every test_tasks test_suite test_tutorial; do run $t "$PYTHON" tests/$t.py; done
    if make venv PYTHON="$PYTHON" >"$BUILD/venv.out" 2>&1; then
        run test_export .venv/bin/python tests/test_export.py
        run test_layers .venv/bin/python tests/test_layers.py
        run test_llama2c .venv/bin/python tests/test_llama2c.py
        run test_python .venv/bin/python tests/test_python.py
    else
        echo "test_export, test_layers, test_llama2c, test_python: skipped, no virtual environment: $(tail -n 1 "$BUILD/venv.out")"
        skipped=$((skipped + 4))
    fi
    if CHROMIUM=$(command -v chromium-headless-shell || command -v chromium || command -v google-chrome); then
        export CHROMIUM
        run test_page "$PYTHON" tests/test_page.py
    else
        echo "test_page: skipped, no chromium"
        skipped=$((skipped + 1))
    fi
    if [ -f .venv-clients/ok ]; then
        run test_clients .venv-clients/bin/python tests/test_clients.py
    else
        echo "test_clients: skipped, there are no clients yet: make clients"
        skipped=$((skipped + 1))
    fi
    run test_docs "$PYTHON" tests/test_docs.py
fi

echo "$passed passed, $failed failed$([ $skipped -gt 0 ] && echo ", $skipped skipped")"
[ "$failed" -eq 0 ]
