"""The text of `--help`: every argument a command reads, at most 100 columns wide."""

from omnistep.core.config import ARGUMENTS, SECTIONS, Argument, Command
from omnistep.core.config_rules import NOT_YET
from omnistep.core.config_types import shown, type_usage


def help_text(command: Command) -> str:
    """Usage, then each section with its arguments: type, default, and a line of meaning."""
    nproc = " [--nproc N]" if command.spawns else ""
    lines = [
        f"usage: {command.program} {command.words}{nproc} [--section.name value ...]",
        "",
        command.about,
        "",
        *(_LAUNCHING if command.spawns else ()),
        "A recipe is YAML: sections with their arguments. The command line wins over the recipe,",
        "the recipe over the defaults. On the command line MAPPING is JSON, NAMES is a or [a,b].",
        "Paths are relative to the current directory; omnistep:data/... is a file of the package.",
    ]
    for section, kind in SECTIONS.items():
        read = [a for name, a in ARGUMENTS.items() if name.startswith(f"{section}.")]
        read = [argument for argument in read if command.takes(argument.name)]
        if read:
            lines += ["", f"{section} - {(kind.__doc__ or '').splitlines()[0]}", ""]
        for argument in read:
            lines += [_usage(argument, command), f"      {argument.info.help}"]
    return "\n".join(lines)


_LAUNCHING = (
    "--nproc N starts N ranks on this machine. Started by torchrun or srun, it joins their ranks.",
    "Ranks that tensor, pipeline, ulysses and context parallelism leave over see other samples.",
    "",
)


def _usage(argument: Argument, command: Command) -> str:
    notes = [_default(argument, command)]
    if argument.name in NOT_YET:
        notes.append(f"only {' or '.join(map(shown, NOT_YET[argument.name]))} for now")
    return f"  --{argument.name} {type_usage(argument.type)} ({'; '.join(notes)})"


def _default(argument: Argument, command: Command) -> str:
    if argument.info.required:
        is_needed = argument.name.split(".")[0] in command.needs
        return "required" if is_needed else "not needed here"
    if argument.info.otherwise:
        return f"default: {argument.info.otherwise}"
    if argument.default is None:
        return "default: none"
    is_text = isinstance(argument.default, str)
    return f"default: {argument.default if is_text else shown(argument.default)}"
