# What demo.sh and smollm2.sh share: headings, commands that are shown before they run, and steps
# that are not done again when a run that was interrupted goes on.
BIN=${BIN:-.}
if [ -t 1 ]; then
    say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
else
    say() { printf '\n%s\n' "$*"; }
fi

# Ctrl-C and SIGTERM reach the program that runs; the shell waits until it has saved its work.
goes_on() { # exit code
    [ "$1" -eq 0 ] || printf '\nStopped before the end: %s goes on from here.\n' "$again" >&2
}
trap 'exit 130' INT TERM HUP
trap 'goes_on $?' EXIT

# Prints a command as one would type it, an option to a line's end where it is long.
show() {
    line='$' piece=
    for word in "$@" --; do
        case $word in
        *[!A-Za-z0-9_./,:=+-]* | '') word="'$(printf %s "$word" | sed "s/'/'\\\\''/g")'" ;;
        -*)
            if [ $((${#line} + ${#piece})) -gt 97 ]; then
                printf '%s \\\n' "$line"
                line='     '
            fi
            line=$line$piece piece=
            ;;
        esac
        piece="$piece $word"
    done
    printf '%s\n' "$line"
}
run() {
    show "$@"
    "$@"
}

# A file that is there is whole: whatever makes one gives it its name at the end.
unless_there() { # file, command that makes it
    if [ -e "$1" ]; then
        echo "$1 is there already."
        return
    fi
    shift
    run "$@"
}
write_to() { # file, command that writes it to its output
    if [ -e "$1" ]; then
        echo "$1 is there already."
        return
    fi
    file=$1
    shift
    echo "$(show "$@") >$file"
    "$@" >"$file.part"
    mv "$file.part" "$file"
}

# Trains to the last step. Where a checkpoint is, from there.
train_to() { # steps, out, options
    steps=$1 out=$2
    shift 2
    last=$out/step_$(printf %08d "$steps")
    if [ -e "$last" ]; then
        echo "$out is trained already."
        return
    fi
    [ ! -e "$out/latest" ] || set -- "$@" --resume
    run "$BIN/train" "$@" --steps "$steps" --out "$out"
    [ -e "$last" ] # if not, it was told to stop
}
