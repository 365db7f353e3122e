# Completion of xen-disk for fish. The program itself knows what can stand where.

function __xen_disk_complete
    set -l words (commandline -opc)
    set -l lines (xen-disk complete $words[2..-1] (commandline -ct) 2>/dev/null)
    switch "$lines[1]"
        case :files
            __fish_complete_path (commandline -ct)
        case :directories
            __fish_complete_directories (commandline -ct)
        case '*'
            printf '%s\n' $lines
    end
end
complete -c xen-disk -f -a '(__xen_disk_complete)'
