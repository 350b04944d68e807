"""The commands of `pm-llm`, one a file: `add` puts a command's parser among the others, `call` runs it."""

COMMANDS = tuple(
    (
        "quickstart init tune run add remove restore status doctor merge evaluate tasks score vector compress route "
        "methods report gate export push"
    ).split()
)
