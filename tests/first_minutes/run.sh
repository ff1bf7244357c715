#!/usr/bin/env bash
# The first ten minutes of somebody who has the project and a terminal: what is printed goes to OUT/log.txt, what the terminals showed to
# OUT/*.screen, pictures of the report to OUT/*.png where there is a chromium. Needs git, tmux and python3.
#
#     tests/first_minutes/run.sh OUT
#
# FIRST_MINUTES_PROGRAMS names a directory with both programs, where they are not to be built and installed first.
set -uo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
out=$(realpath -m "${1:?the directory for what is seen}")
mkdir -p "$out"
work=$(mktemp -d)
hub=
session="first-minutes-$$"
tidy() {
    [ -n "$hub" ] && kill "$hub" 2>/dev/null
    tmux kill-session -t "$session" 2>/dev/null
    rm -rf "$work"
}
trap tidy EXIT
exec > >(tee "$out/log.txt") 2>&1

say() { printf '\n$ %s\n' "$*"; }
run() {
    say "$@"
    local begin=$SECONDS
    timeout 1200 "$@" </dev/null
    printf '[exit %d, %d s]\n' $? $((SECONDS - begin))
}
# A screen of 80 columns, as it is after these keys.
screen() {
    local name=$1 wait=$2
    shift 2
    tmux send-keys -t "$session" "$@" Enter
    sleep "$wait"
    tmux capture-pane -p -t "$session" >"$out/$name.screen"
    printf '\n--- screen: %s\n' "$name"
    cat "$out/$name.screen"
}

export HOME=$work/home CARGO_HOME=${CARGO_HOME:-$HOME/.cargo} RUSTUP_HOME=${RUSTUP_HOME:-$HOME/.rustup}
mkdir -p "$HOME"
if [ -n "${FIRST_MINUTES_PROGRAMS:-}" ]; then
    export PATH=$FIRST_MINUTES_PROGRAMS:$PATH
else
    run git clone -q "$here" "$work/flashlm"
    cd "$work/flashlm" || exit 1
    run cargo run --release --locked --example first_story
    run cargo install --quiet --locked --path runtime --root "$work/installed"
    run cargo install --quiet --locked --path prep --root "$work/installed"
    export PATH=$work/installed/bin:$PATH
fi

cd "$HOME" || exit 1
cp -r "$here/examples/tiny-opt" "$here/examples/synthetic.txt" .
run flashlm --help
run flashlm assess tiny-opt
run flashlm prepare tiny-opt --text synthetic.txt --tokens 8000
run flashlm inspect tiny-opt.flashlm
run flashlm plan tiny-opt.flashlm --memory 24MB
run flashlm run tiny-opt.flashlm --memory 24MB --prompt "Once upon a time" -n 60
run flashlm run tiny-opt.flashlm --memory 5MB --prompt "Once upon a time"
run flashlm bench tiny-opt.flashlm --memory 24MB
run flashlm doctor tiny-opt.flashlm
run flashlm run nobody/nothing --prompt "Once"

# A model of the hub, asked for on a terminal.
python3 "$here/tests/first_minutes/hub.py" "$HOME/tiny-opt" some-org/tiny-opt >"$work/endpoint" &
hub=$!
for _ in $(seq 50); do [ -s "$work/endpoint" ] && break; sleep 0.1; done
export HF_ENDPOINT HF_HOME=$HOME/hf
HF_ENDPOINT=$(cat "$work/endpoint")
tmux new-session -d -s "$session" -x 80 -y 40 "env PS1='$ ' HOME=$HOME PATH=$PATH HF_ENDPOINT=$HF_ENDPOINT HF_HOME=$HF_HOME bash --norc"
screen hub-offer 8 "flashlm run some-org/tiny-opt --memory 24MB"
screen hub-no 3 "n"
run flashlm prepare some-org/tiny-opt --text synthetic.txt --tokens 8000
screen conversation 8 "clear; flashlm run some-org/tiny-opt --memory 24MB -n 60"
screen turn 8 "Once upon a time there was a dragon"
screen help 2 "/help"
screen stats 2 "/stats"
tmux send-keys -t "$session" C-c
screen interrupted 2 ""
tmux send-keys -t "$session" C-d

if command -v chromium >/dev/null; then
    for width in 1400 420; do
        for scheme in light dark; do
            dark=$([ "$scheme" = dark ] && echo 0 || echo 1)
            timeout 60 chromium --headless --no-sandbox --disable-gpu --hide-scrollbars \
                --blink-settings=preferredColorScheme=$dark --window-size=$width,2400 \
                --screenshot="$out/report-$width-$scheme.png" "file://$HOME/tiny-opt.report.html" 2>/dev/null
        done
    done
fi
ls "$out"
