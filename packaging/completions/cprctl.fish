# SPDX-License-Identifier: GPL-2.0-or-later
# fish completion for cprctl(1): cprctl itself knows its words, and the agent knows the VMs.

function __cprctl_complete
    for completion in (env _CPRCTL_COMPLETE=fish_complete COMP_WORDS=(commandline -cp) COMP_CWORD=(commandline -t) \
            cprctl 2>/dev/null)
        set -l parts (string split -m 1 "," -- $completion)
        switch $parts[1]
            case plain
                echo $parts[2]
            case file
                __fish_complete_path $parts[2]
            case dir
                __fish_complete_directories $parts[2]
        end
    end
end

complete --no-files --command cprctl --arguments "(__cprctl_complete)"
