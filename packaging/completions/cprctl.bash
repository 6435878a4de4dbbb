# SPDX-License-Identifier: GPL-2.0-or-later
# bash completion for cprctl(1): cprctl itself knows its words, and the agent knows the VMs.
# cprctl gets the line as it stands, because COMP_WORDS splits user@host at the "@".

_cprctl() {
    local IFS=$'\n' line="${COMP_LINE:0:COMP_POINT}" completion type value
    local -a words
    IFS=$' \t' read -ra words <<<"$line"
    [[ $line == *[$' \t'] ]] && words+=('')
    COMPREPLY=()
    for completion in $(env COMP_WORDS="$line" COMP_CWORD=$((${#words[@]} - 1)) \
        _CPRCTL_COMPLETE=bash_complete "$1" 2>/dev/null); do
        IFS=',' read -r type value <<<"$completion"
        case $type in
        plain) COMPREPLY+=("$value") ;;
        file) compopt -o default ;;
        dir) compopt -o dirnames ;;
        esac
    done
}

complete -o nosort -F _cprctl cprctl
