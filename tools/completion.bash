# Tab completion of recipes, their keys and options after dmd_ds/train.py, for bash:
#
#     source tools/completion.bash
#
# The keys are asked for once a shell, of $DMD_DS_PYTHON or python.

_dmd_ds_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

_dmd_ds_train() {
    local word=${COMP_WORDS[COMP_CWORD]}
    COMPREPLY=()
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "--help --version --list-recipes --dry-run" -- "$word"))
        return
    fi
    if [[ -z $_dmd_ds_keys ]]; then
        _dmd_ds_keys=$(cd "$_dmd_ds_folder" && "${DMD_DS_PYTHON:-python}" -c \
            'from dmd_ds.recipe import known_keys, shipped_recipes; print(*shipped_recipes(), *(f"{key}=" for key in known_keys()))')
    fi
    COMPREPLY=($(compgen -W "$_dmd_ds_keys" -- "$word"))
    if [[ ${COMPREPLY[0]} == *= ]]; then compopt -o nospace 2>/dev/null; fi
}

# `deepspeed ... dmd_ds/train.py tiny key=value` and `python dmd_ds/train.py ...`: ours from train.py on, files before it
_dmd_ds_launched() {
    local word
    for word in "${COMP_WORDS[@]:0:COMP_CWORD}"; do
        if [[ $word == */train.py ]]; then _dmd_ds_train; return; fi
    done
    COMPREPLY=($(compgen -f -- "${COMP_WORDS[COMP_CWORD]}"))
}

complete -o default -F _dmd_ds_launched deepspeed
complete -o default -F _dmd_ds_launched python
