"""The subcommands of `rayva`, one module each.

A module has `add_arguments(parser)` and `run(options) -> exit code`. It is imported only when its command
is called, so that `rayva --help` is quick.
"""

COMMANDS: dict[str, tuple[str, str]] = {
    "recipe": ("rayva.commands.recipe", "print a recipe, resolved"),
    "chat": ("rayva.commands.chat", "ask a model about a picture"),
    "inspect": ("rayva.commands.inspect", "show how the rows of a LLaVA JSON file are seen in training"),
    "plan": ("rayva.commands.plan", "show which samples a training stage visits when, and prove it"),
    "import": ("rayva.commands.import_", "turn a LLaVA checkpoint of another program into a model folder"),
    "score": ("rayva.commands.score", "score files of predictions or reviews, as JSON"),
    "compare": ("rayva.commands.compare", "compare evaluations, with intervals and examples"),
    "export": ("rayva.commands.export", "write a model folder in another format"),
}
"""Module and one line of help, by the command's name."""
